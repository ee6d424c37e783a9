//! Random trees and random operations. Everything random is done by root, so nothing is ever opened through a
//! symlink, a FIFO or a device node, and device nodes are of the kind that does nothing (1:3).

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown, lchown, symlink};
use std::path::{Path, PathBuf};

use ephemeral_overlay::attributes::Handle;
use fastrand::Rng;
use rustix::fs::{
    AtFlags, CWD, FallocateFlags, FileType, Mode, OFlags, Timespec, Timestamps, fallocate, makedev, mknodat, utimensat,
};
use rustix::io::Errno;

use crate::mapped::Mapping;

/// Owners that files are given.
const OWNERS: [u32; 4] = [0, 0, 1000, 65534];
/// Modes that files are given.
const MODES: [u32; 6] = [0o644, 0o600, 0o755, 0o4755, 0o2755, 0o1777];

/// Does random things below one directory.
#[derive(Debug)]
pub struct Model {
    root: PathBuf,
    rng: Rng,
    /// An overlay is mounted on the root.
    pub mounted: bool,
    /// Attributes in `user.` can be had everywhere. tmpfs has them since 6.6.
    pub user_attributes: bool,
}

/// What stands in the tree: directories, regular files, and everything else.
#[derive(Debug, Default)]
struct Names {
    directories: Vec<PathBuf>,
    files: Vec<PathBuf>,
    others: Vec<PathBuf>,
}

impl Model {
    /// Nothing is done yet.
    #[must_use]
    pub fn new(root: &Path, seed: u64) -> Self {
        Self { root: root.to_path_buf(), rng: Rng::with_seed(seed), mounted: false, user_attributes: true }
    }

    /// A number below `end`.
    pub fn below(&mut self, end: usize) -> usize {
        self.rng.usize(..end)
    }

    /// Fills an empty tree.
    pub fn populate(&mut self) {
        for _ in 0..self.rng.usize(10..40) {
            self.create();
        }
        for _ in 0..self.rng.usize(0..10) {
            self.attributes();
        }
    }

    /// Does one random thing.
    pub fn step(&mut self) {
        match self.rng.u32(..20) {
            0..=4 => self.create(),
            5..=9 => self.rewrite(),
            10..=12 => self.attributes(),
            13..=15 => self.remove(),
            16..=17 => self.rename(),
            18 => self.replace_kind(),
            _ => self.remake_directory(),
        }
    }

    fn names(&self) -> Names {
        let mut names = Names { directories: vec![self.root.clone()], ..Names::default() };
        let mut at = 0;
        while let Some(directory) = names.directories.get(at).cloned() {
            at += 1;
            let mut entries: Vec<_> = fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().path()).collect();
            entries.sort();
            for path in entries {
                let kind = fs::symlink_metadata(&path).unwrap().file_type();
                if kind.is_dir() {
                    names.directories.push(path);
                } else if kind.is_file() {
                    names.files.push(path);
                } else {
                    names.others.push(path);
                }
            }
        }
        names
    }

    fn pick<T: Clone>(&mut self, from: &[T]) -> Option<T> {
        self.rng.choice(from.iter()).cloned()
    }

    /// A name in a random directory: often one that exists, or existed.
    fn somewhere(&mut self) -> PathBuf {
        let directories = self.names().directories;
        let directory = self.pick(&directories).unwrap();
        let name: OsString = match self.rng.u32(..30) {
            0 => OsString::from_vec(vec![b'n'; 255]),
            1 => OsStr::from_bytes(b"\xff\xfe\n odd").to_owned(),
            2 => ".hidden".into(),
            3 => "with space \\ and : , colon".into(),
            other => format!("n{}", other % 12).into(),
        };
        directory.join(name)
    }

    fn create(&mut self) {
        let path = self.somewhere();
        let names = self.names();
        let result = match self.rng.u32(..16) {
            0..=3 => fs::create_dir(&path),
            4 => symlink("nowhere/at all", &path),
            5 => node(&path, FileType::Fifo, 0),
            6 => node(&path, FileType::Socket, 0),
            7 => node(&path, FileType::CharacterDevice, makedev(1, 3)),
            8..=9 => match self.pick(&names.files) {
                Some(file) => fs::hard_link(file, &path),
                None => Ok(()),
            },
            10 => match self.pick(&names.others) {
                Some(other) => fs::hard_link(other, &path),
                None => Ok(()),
            },
            _ => self.file(&path),
        };
        tolerate(result, &path);
    }

    fn file(&mut self, path: &Path) -> std::io::Result<()> {
        let mut file = OpenOptions::new().write(true).create_new(true).custom_flags(no_follow()).open(path)?;
        match self.rng.u32(..8) {
            0 => Ok(()),
            1 => {
                // A hole, data, a hole.
                file.seek(SeekFrom::Start(300_000))?;
                file.write_all(&self.bytes(5000))?;
                file.set_len(900_000)
            }
            2 => file.write_all(&self.bytes(200_000)),
            3 => {
                // Long enough to be changed in place, some of the time.
                let length = self.rng.usize(100_000..1_600_000);
                file.write_all(&self.bytes(length))
            }
            _ => {
                let length = self.rng.usize(1..3000);
                file.write_all(&self.bytes(length))
            }
        }
    }

    fn bytes(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.rng.fill(&mut bytes);
        bytes
    }

    fn rewrite(&mut self) {
        let names = self.names();
        let Some(path) = self.pick(&names.files) else { return };
        let mut file = open(&path);
        let size = file.metadata().unwrap().len();
        match self.rng.u32(..9) {
            0 => {
                file.seek(SeekFrom::End(0)).unwrap();
                file.write_all(b"appended\n").unwrap();
            }
            1 => file.set_len(self.rng.u64(..size.max(1) * 2)).unwrap(),
            2 if size > 0 => {
                // Same length, same times.
                let meta = file.metadata().unwrap();
                let at = self.rng.u64(..size);
                file.write_all_at(&self.bytes(1), at).unwrap();
                set_times(&path, meta.mtime(), meta.mtime_nsec());
            }
            3 if size > 0 => {
                let length = usize::try_from(size.min(4096)).unwrap();
                Mapping::new(&file, length).write(&self.bytes(length));
            }
            4 if size > 0 => {
                let (at, length) = (self.rng.u64(..size), self.rng.usize(1..20_000));
                file.write_all_at(&self.bytes(length), at).unwrap();
            }
            5 => {
                // As a log is rotated that somebody keeps open.
                let copy = self.somewhere();
                let copied = OpenOptions::new().write(true).create_new(true).custom_flags(no_follow()).open(&copy);
                tolerate(copied.and_then(|mut copied| std::io::copy(&mut file, &mut copied)).map(drop), &copy);
                file.set_len(0).unwrap();
            }
            6 if size > 0 => {
                let (at, length) = (self.rng.u64(..size), self.rng.u64(1..300_000));
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                fallocate(&file, flags, at, length).unwrap();
            }
            _ => {
                file.set_len(0).unwrap();
                let length = self.rng.usize(..5000);
                file.write_all(&self.bytes(length)).unwrap();
            }
        }
    }

    fn attributes(&mut self) {
        let mut names = self.names();
        let everything: Vec<_> = [&mut names.directories, &mut names.files, &mut names.others]
            .into_iter()
            .flat_map(std::mem::take)
            .collect();
        let Some(path) = self.pick(&everything) else { return };
        let is_symlink = fs::symlink_metadata(&path).unwrap().is_symlink();
        let owner = self.pick(&OWNERS);
        match self.rng.u32(..8) {
            0 => lchown(&path, owner, Some(1000)).unwrap(),
            1 if !is_symlink => {
                let mode = self.pick(&MODES).unwrap();
                fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            }
            2 => set_times(&path, self.rng.i64(0..2_000_000_000), self.rng.i64(0..1_000_000_000)),
            3..=7 if !is_symlink => self.extended(&path),
            _ => {}
        }
    }

    fn extended(&mut self, path: &Path) {
        let kind = fs::symlink_metadata(path).unwrap().file_type();
        let name = path.file_name().unwrap();
        let parent = File::open(path.parent().unwrap()).unwrap();
        let handle = Handle::child(parent.as_fd(), name);
        let plain = kind.is_file() || kind.is_dir();
        let value = self.bytes(12);
        let result = match self.rng.u32(..6) {
            0 if plain && self.user_attributes => handle.write(b"user.one", &value),
            1 if plain && self.user_attributes => handle.remove(b"user.one"),
            2 => handle.write(b"trusted.two", &value),
            3 if kind.is_file() => {
                // Version 2, effective: cap_net_bind_service.
                let mut capability = vec![1, 0, 0, 2, 0, 4, 0, 0];
                capability.extend_from_slice(&[0; 12]);
                chown(path, Some(0), Some(0)).unwrap();
                handle.write(b"security.capability", &capability)
            }
            4 if plain => handle.write(b"system.posix_acl_access", &acl(self.rng.u8(..8))),
            5 if kind.is_dir() => handle.write(b"system.posix_acl_default", &acl(self.rng.u8(..8))),
            // Through an overlay this is a user's attribute; on the raw disk it would be overlayfs' own.
            _ if self.mounted => handle.write(b"trusted.overlay.own", &value),
            _ => Ok(()),
        };
        match result {
            Ok(()) | Err(Errno::NODATA | Errno::NOSPC) => {}
            Err(error) => panic!("{}: {error}", path.display()),
        }
    }

    fn remove(&mut self) {
        let names = self.names();
        let path = match self.rng.u32(..5) {
            0 => self.pick(&names.directories[1..]),
            1 => self.pick(&names.others),
            _ => self.pick(&names.files),
        };
        let Some(path) = path else { return };
        if fs::symlink_metadata(&path).unwrap().is_dir() {
            fs::remove_dir_all(&path).unwrap();
        } else {
            fs::remove_file(&path).unwrap();
        }
    }

    fn rename(&mut self) {
        let names = self.names();
        let from = match self.rng.u32(..4) {
            0 => self.pick(&names.directories[1..]),
            1 => self.pick(&names.others),
            _ => self.pick(&names.files),
        };
        let (Some(from), to) = (from, self.somewhere()) else { return };
        tolerate(fs::rename(&from, &to), &from);
    }

    /// Something is removed, and something of another kind takes its name.
    fn replace_kind(&mut self) {
        let names = self.names();
        let everything: Vec<_> =
            names.directories[1..].iter().chain(&names.files).chain(&names.others).cloned().collect();
        let Some(path) = self.pick(&everything) else { return };
        if fs::symlink_metadata(&path).unwrap().is_dir() {
            fs::remove_dir_all(&path).unwrap();
            tolerate(self.file(&path), &path);
        } else {
            fs::remove_file(&path).unwrap();
            fs::create_dir(&path).unwrap();
            tolerate(self.file(&path.join("inside")), &path);
        }
    }

    /// A directory is removed and made again: an opaque one over what lower has.
    fn remake_directory(&mut self) {
        let names = self.names();
        let Some(path) = self.pick(&names.directories[1..]) else { return };
        fs::remove_dir_all(&path).unwrap();
        fs::create_dir(&path).unwrap();
        for name in ["n1", "fresh"].into_iter().take(self.rng.usize(..3)) {
            tolerate(self.file(&path.join(name)), &path);
        }
    }
}

fn node(path: &Path, kind: FileType, device: u64) -> std::io::Result<()> {
    Ok(mknodat(CWD, path, kind, Mode::from_raw_mode(0o640), device)?)
}

fn open(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).custom_flags(no_follow()).open(path).unwrap()
}

/// An access control list of version 2 with one named user.
fn acl(permissions: u8) -> Vec<u8> {
    const NO_ID: u32 = u32::MAX;
    // USER_OBJ, USER, GROUP_OBJ, MASK, OTHER (linux/posix_acl.h)
    let entries = [(1u16, 6u16, NO_ID), (2, permissions.into(), 1000), (4, 4, NO_ID), (16, 7, NO_ID), (32, 4, NO_ID)];
    let mut bytes = 2u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        bytes.extend_from_slice(&tag.to_le_bytes());
        bytes.extend_from_slice(&permissions.to_le_bytes());
        bytes.extend_from_slice(&id.to_le_bytes());
    }
    bytes
}

/// Sets the time of last modification, a symlink not followed.
pub fn set_times(path: &Path, seconds: i64, nanoseconds: i64) {
    let time = Timespec { tv_sec: seconds, tv_nsec: nanoseconds };
    let times = Timestamps { last_access: time, last_modification: time };
    utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

fn no_follow() -> i32 {
    i32::try_from(OFlags::NOFOLLOW.bits()).unwrap()
}

/// A random operation may be impossible; it must not fail in any other way.
fn tolerate(result: std::io::Result<()>, path: &Path) {
    if let Err(error) = result {
        let impossible =
            [Errno::EXIST, Errno::NOTEMPTY, Errno::XDEV, Errno::ISDIR, Errno::NOTDIR, Errno::INVAL, Errno::NAMETOOLONG];
        let errno = Errno::from_io_error(&error);
        assert!(errno.is_some_and(|errno| impossible.contains(&errno)), "{}: {error}", path.display());
    }
}
