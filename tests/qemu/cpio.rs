//! Writes a cpio archive in the format `newc`, as the kernel unpacks an initramfs from it.
//!
//! Each member is a header of 110 ASCII characters, the name with a NUL, and the contents; both are padded to four
//! bytes. The parents of a member stand before it. Everything belongs to root.

use std::collections::BTreeSet;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

pub(crate) const TESTS: &[(&str, fn())] =
    &[("a_member_is_laid_out_as_the_kernel_reads_it", layout), ("what_cpio_makes_of_it", read_back_by_cpio)];

const DIRECTORY: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;
const CHARACTER_DEVICE: u32 = 0o020_000;

/// An archive that is being written.
#[derive(Debug, Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
    members: u32,
    /// The directories, and the symlinks that stand for one.
    directories: BTreeSet<PathBuf>,
}

impl Archive {
    /// A directory, unless it is there already.
    pub(crate) fn directory(&mut self, path: &Path, mode: u32) {
        let path = plain(path);
        if path.as_os_str().is_empty() || !self.directories.insert(path.clone()) {
            return;
        }
        self.parents(&path);
        self.member(&path, DIRECTORY | mode, (0, 0), &[]);
    }

    /// A regular file.
    pub(crate) fn file(&mut self, path: &Path, mode: u32, contents: &[u8]) {
        let path = plain(path);
        self.parents(&path);
        self.member(&path, FILE | mode, (0, 0), contents);
    }

    /// A symlink; what lies below it later goes where it leads.
    pub(crate) fn symlink(&mut self, path: &Path, target: &Path) {
        let path = plain(path);
        self.parents(&path);
        self.member(&path, SYMLINK | 0o777, (0, 0), target.as_os_str().as_bytes());
        self.directories.insert(path);
    }

    /// A character device.
    pub(crate) fn device(&mut self, path: &Path, mode: u32, major_minor: (u32, u32)) {
        let path = plain(path);
        self.parents(&path);
        self.member(&path, CHARACTER_DEVICE | mode, major_minor, &[]);
    }

    /// The whole archive.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.member(Path::new("TRAILER!!!"), 0, (0, 0), &[]);
        self.bytes
    }

    fn parents(&mut self, path: &Path) {
        if let Some(parent) = path.parent() {
            self.directory(parent, 0o755);
        }
    }

    fn member(&mut self, path: &Path, mode: u32, (major, minor): (u32, u32), contents: &[u8]) {
        let name = path.as_os_str().as_bytes();
        let size = |length: usize| u32::try_from(length).expect("nothing here has 4 GiB");
        self.members += 1;
        let links = if mode & DIRECTORY == DIRECTORY { 2 } else { 1 };
        self.bytes.extend(b"070701");
        // inode, mode, owner, group, links, time, size, device (2), rdev (2), length of the name, checksum
        let fields = [self.members, mode, 0, 0, links, 0, size(contents.len()), 0, 0, major, minor];
        for field in fields.into_iter().chain([size(name.len() + 1), 0]) {
            self.bytes.extend(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend(name);
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(contents);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

/// A path relative to the archive's root, without dots.
fn plain(path: &Path) -> PathBuf {
    path.components().filter(|component| matches!(component, Component::Normal(_))).collect()
}

fn layout() {
    let mut archive = Archive::default();
    archive.file(Path::new("/a/./b"), 0o640, b"12345");
    let bytes = archive.finish();
    let text = String::from_utf8_lossy(&bytes).replace('\0', "_");
    let directory = "070701000000010000\
        41ed00000000000000000000000200000000000000000000000000000000000000000000000000000002000000\
        00a_";
    assert_eq!(&text[..112], directory);
    let file = &text[112..];
    assert!(file.starts_with("07070100000002000081a0"), "{file}");
    assert_eq!(&file[54..62], "00000005", "the size");
    assert_eq!(&file[110..124], "a/b___12345___".get(..14).unwrap(), "{file}");
    assert_eq!(bytes.len() % 4, 0);
    assert!(text.contains("TRAILER!!!"));
}

/// busybox is another reader of the format, and one that the boot tests have anyway.
fn read_back_by_cpio() {
    let mut archive = Archive::default();
    archive.symlink(Path::new("/bin"), Path::new("usr/bin"));
    archive.file(Path::new("/usr/bin/tool"), 0o755, b"#!/bin/sh\n");
    archive.directory(Path::new("/usr/bin"), 0o700);
    archive.device(Path::new("/dev/console"), 0o600, (5, 1));
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("archive");
    std::fs::write(&path, archive.finish()).unwrap();
    let Some(busybox) = crate::tools::which("busybox") else { return };
    let output =
        std::process::Command::new(busybox).args(["cpio", "-tvF"]).arg(&path).env("TZ", "UTC").output().unwrap();
    let listed = String::from_utf8(output.stdout).unwrap();
    // MODE OWNER SIZE DATE TIME NAME, the name last.
    let seen: Vec<(&str, &str)> =
        listed.lines().filter_map(|line| Some((line.get(..10)?, line.split(":00 ").last()?))).collect();
    let of = |name: &str| seen.iter().find(|(_, seen)| *seen == name).unwrap_or_else(|| panic!("{listed}")).0;
    assert_eq!(of("bin -> usr/bin"), "lrwxrwxrwx");
    assert_eq!(of("usr/bin/tool"), "-rwxr-xr-x");
    assert_eq!(of("usr/bin"), "drwxr-xr-x");
    assert_eq!(of("dev/console"), "crw-------");
    assert_eq!(seen.len(), 6, "{listed}");
}
