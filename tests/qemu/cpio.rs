//! Writes a cpio archive in the format `newc`, as the kernel unpacks an initramfs from it.
//!
//! Each member is a header of 110 ASCII characters, the name with a NUL, and the contents; both are padded to four
//! bytes. The parents of a member stand before it. Everything belongs to root.

use std::collections::BTreeSet;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

pub(crate) const TESTS: &[(&str, fn())] =
    &[("a_member_is_laid_out_as_the_kernel_reads_it", layout), ("parents_stand_before_what_is_in_them", members)];

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
    archive.file(Path::new("/./b"), 0o640, b"12345");
    archive.device(Path::new("/console"), 0o600, (5, 1));
    let bytes = archive.finish();
    let text = String::from_utf8_lossy(&bytes).replace('\0', "_");
    // Magic, inode and mode; owner and group; links; time; size; device; device of a node; name's length; checksum.
    let expected = [
        "070701 00000001 000081a0 00000000 00000000 00000001 00000000 00000005 00000000 00000000 00000000 00000000 \
         00000002 00000000 b_ 12345___",
        "070701 00000002 00002180 00000000 00000000 00000001 00000000 00000000 00000000 00000000 00000005 00000001 \
         00000008 00000000 console_ __",
        "070701 00000003 00000000 00000000 00000000 00000001 00000000 00000000 00000000 00000000 00000000 00000000 \
         0000000b 00000000 TRAILER!!!_ ___",
    ];
    assert_eq!(text, expected.concat().replace(' ', ""));
}

/// The names, with the modes in octal, in the order of the archive.
fn members() {
    let mut archive = Archive::default();
    archive.symlink(Path::new("/bin"), Path::new("usr/bin"));
    archive.file(Path::new("/usr/bin/tool"), 0o755, b"070701 is what a header begins with, and data may have it");
    archive.file(Path::new("/bin/other"), 0o755, b"");
    archive.directory(Path::new("/usr/bin"), 0o700);
    archive.directory(Path::new("/root"), 0o700);
    let bytes = archive.finish();
    let mut rest = bytes.as_slice();
    let mut seen = Vec::new();
    while rest.len() >= 110 {
        let field = |number: usize| {
            let digits = std::str::from_utf8(&rest[6 + 8 * number..14 + 8 * number]).unwrap();
            usize::from_str_radix(digits, 16).unwrap()
        };
        let name_end = (110 + field(11)).next_multiple_of(4);
        let name = String::from_utf8_lossy(&rest[110..110 + field(11) - 1]).into_owned();
        seen.push(format!("{:o} {name}", field(1)));
        rest = &rest[(name_end + field(6)).next_multiple_of(4)..];
    }
    let expected =
        ["120777 bin", "40755 usr", "40755 usr/bin", "100755 usr/bin/tool", "100755 bin/other", "40700 root"];
    assert_eq!(seen[..seen.len() - 1], expected);
}
