//! Walks a tree into values, in path order. A raw upper directory and a plain one differ only in how attributes and
//! 0/0 character devices are read.

use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use ephemeral_overlay::attributes::{Handle, Xattrs};
use ephemeral_overlay::error::{At, SystemError};
use ephemeral_overlay::overlay::{self, Artefacts, is_never_data};
use rustix::fs::{AtFlags, FileType, Stat, statat};
use rustix::io::Errno;

use crate::entry::{Kind, Meta};
use crate::error::{Error, Result};
use crate::path::RelPath;
use crate::tree::{Tree, list, open_child_dir, read_link};

/// How a tree is to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum View {
    /// The raw upper directory of an overlay.
    Upper,
    /// Any directory, as it is.
    Plain,
}

/// One object of a tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Where.
    pub path: RelPath,
    /// What; a file's contents are not read.
    pub object: Object,
    /// Which inode, as it was when it was met.
    pub stamp: Stamp,
}

/// What an object is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Object {
    /// A regular file.
    File(Meta),
    /// Anything that is complete without contents.
    Other(Kind, Meta),
    /// A whiteout.
    Whiteout,
}

/// An inode's identity and times: equal stamps before and after a read say that nothing was renamed in a directory,
/// and suggest (they do not prove, see docs/overlayfs.md) that a file was not written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Stamp {
    /// Inode number.
    pub ino: u64,
    /// Number of hard links.
    pub nlink: u64,
    /// Length in bytes.
    pub size: u64,
    /// Allocated units of 512 bytes.
    pub blocks: u64,
    /// Last modification, seconds and nanoseconds.
    pub mtime: (i64, u64),
    /// Last change of status, seconds and nanoseconds.
    pub ctime: (i64, u64),
}

impl Stamp {
    /// The stamp in a status.
    #[must_use]
    pub fn of(stat: &Stat) -> Self {
        Self {
            ino: stat.st_ino,
            nlink: unsigned(stat.st_nlink),
            size: unsigned(stat.st_size),
            blocks: unsigned(stat.st_blocks),
            mtime: (stat.st_mtime, unsigned(stat.st_mtime_nsec)),
            ctime: (stat.st_ctime, unsigned(stat.st_ctime_nsec)),
        }
    }
}

impl Stamp {
    /// The bytes that it takes on disk.
    #[must_use]
    pub fn allocated(&self) -> i128 {
        i128::from(self.blocks) * 512
    }
}

/// The fields of a status have other widths on other architectures.
fn unsigned(value: impl TryInto<u64>) -> u64 {
    value.try_into().unwrap_or(0)
}

/// Walks the whole tree, its root included, in path order. What vanishes between the listing and the look is left
/// out, as if it had gone a moment earlier.
///
/// # Errors
/// Any failing call, and in [`View::Upper`] any artefact that is not known.
pub fn scan(tree: &Tree, view: View) -> Result<Vec<Found>> {
    scan_below(tree, view, &RelPath::root())
}

/// Whether nothing was renamed, created or removed in any directory of a scan since it was met there.
///
/// # Errors
/// Any failing call.
pub fn is_unmoved(tree: &Tree, scan: &[Found]) -> Result<bool> {
    for found in scan.iter().filter(|found| matches!(found.object, Object::Other(Kind::Dir { .. }, _))) {
        if tree.stat(&found.path)?.map(|stat| Stamp::of(&stat)) != Some(found.stamp) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Walks what is at and below `start`; nothing when nothing is there.
///
/// # Errors
/// As [`scan`].
pub fn scan_below(tree: &Tree, view: View, start: &RelPath) -> Result<Vec<Found>> {
    let parent = match tree.open_parent(start) {
        Ok(parent) => parent,
        Err(error) if is_gone(error.errno()) => return Ok(Vec::new()),
        Err(error) => return Err(error.into()),
    };
    let mut walk = Walk { tree, view, all: Vec::new() };
    let name = if start.is_root() { OsStr::new(".") } else { start.name() };
    // One open directory for each level; a file's descriptor is closed before the next one is opened.
    let mut levels: Vec<Level> = walk.visit(parent.as_fd(), name, start)?.into_iter().collect();
    while let Some(level) = levels.last_mut() {
        let Some(name) = level.names.next() else {
            levels.pop();
            continue;
        };
        let path = level.path.child(&name);
        let below = walk.visit(level.dir.as_fd(), &name, &path)?;
        levels.extend(below);
    }
    Ok(walk.all)
}

struct Level {
    dir: OwnedFd,
    path: RelPath,
    names: std::vec::IntoIter<OsString>,
}

struct Walk<'a> {
    tree: &'a Tree,
    view: View,
    all: Vec<Found>,
}

impl Walk<'_> {
    /// Records the object `name` of `parent`; for a directory, opens it to be walked next.
    fn visit(&mut self, parent: BorrowedFd<'_>, name: &OsStr, path: &RelPath) -> Result<Option<Level>> {
        let shown = self.tree.show(path);
        let Some(stat) = look(statat(parent, name, AtFlags::SYMLINK_NOFOLLOW), "fstatat", &shown)? else {
            return Ok(None);
        };
        let stamp = Stamp::of(&stat);
        let file_type = FileType::from_raw_mode(stat.st_mode);
        if self.view == View::Upper && file_type == FileType::CharacterDevice && stat.st_rdev == 0 {
            self.all.push(Found { path: path.clone(), object: Object::Whiteout, stamp });
            return Ok(None);
        }
        if file_type == FileType::Directory {
            let Some(dir) = look(open_child_dir(parent, name), "openat2", &shown)? else {
                return Ok(None);
            };
            // Looked at once more through the descriptor: what is recorded is what is walked.
            let stat = rustix::fs::fstat(&dir).at("fstat", &shown)?;
            let Some((meta, opaque)) = self.meta(&stat, &Handle::of(dir.as_fd()), path)? else {
                return Ok(None);
            };
            let names = list(dir.as_fd(), &shown)?.into_iter();
            let object = Object::Other(Kind::Dir { opaque }, meta);
            self.all.push(Found { path: path.clone(), object, stamp: Stamp::of(&stat) });
            return Ok(Some(Level { dir, path: path.clone(), names }));
        }
        let Some((meta, _)) = self.meta(&stat, &Handle::child(parent, name), path)? else { return Ok(None) };
        let object = match file_type {
            FileType::RegularFile => Object::File(meta),
            FileType::Symlink => match read_link(parent, name, &shown) {
                Ok(target) => Object::Other(Kind::Symlink { target }, meta),
                Err(error) if is_gone(error.errno()) => return Ok(None),
                Err(error) => return Err(error.into()),
            },
            FileType::Fifo => Object::Other(Kind::Fifo, meta),
            FileType::Socket => Object::Other(Kind::Socket, meta),
            device => {
                let (major, minor) = (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev));
                let block = device == FileType::BlockDevice;
                Object::Other(Kind::Device { block, major, minor }, meta)
            }
        };
        self.all.push(Found { path: path.clone(), object, stamp });
        Ok(None)
    }

    /// The metadata, and whether a directory is opaque; `None` when the object has gone.
    fn meta(&self, stat: &Stat, handle: &Handle, path: &RelPath) -> Result<Option<(Meta, bool)>> {
        let shown = self.tree.show(path);
        match look(handle.read_all(), "listxattr", &shown)? {
            Some(raw) => meta(stat, raw, self.view, &shown).map(Some),
            None => Ok(None),
        }
    }
}

/// Metadata from a status and the raw attributes, and whether the object is an opaque directory.
///
/// # Errors
/// In [`View::Upper`], any artefact that is not known.
pub fn meta(stat: &Stat, mut raw: Xattrs, view: View, shown: &Path) -> Result<(Meta, bool)> {
    let artefacts = match view {
        View::Upper => {
            overlay::interpret(raw).map_err(|source| Error::Artefact { path: shown.to_path_buf(), source })?
        }
        View::Plain => {
            raw.retain(|name, _| !is_never_data(name));
            Artefacts { xattrs: raw, ..Artefacts::default() }
        }
    };
    let meta = Meta {
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        gid: stat.st_gid,
        mtime: stat.st_mtime,
        mtime_nsec: u32::try_from(stat.st_mtime_nsec).unwrap_or(0),
        immutable: artefacts.immutable,
        append_only: artefacts.append_only,
        xattrs: artefacts.xattrs,
    };
    Ok((meta, artefacts.opaque))
}

/// The metadata of the directory at `path` of a plain tree.
///
/// # Errors
/// Any failing call.
pub fn dir_meta(tree: &Tree, path: &RelPath) -> Result<Meta> {
    let shown = tree.show(path);
    let dir = tree.open_dir(path)?;
    let raw = Handle::of(dir.as_fd()).read_all().at("listxattr", &shown)?;
    Ok(meta(&rustix::fs::fstat(&dir).at("fstat", &shown)?, raw, View::Plain, &shown)?.0)
}

/// A failed look at something that has gone is no error.
fn look<T>(result: Result<T, Errno>, call: &'static str, path: &Path) -> Result<Option<T>, SystemError> {
    match result {
        Err(error) if is_gone(Some(error)) => Ok(None),
        other => other.at(call, path).map(Some),
    }
}

/// Whether an error says that the object is no longer what the listing named.
fn is_gone(error: Option<Errno>) -> bool {
    // openat(2) with O_DIRECTORY | O_NOFOLLOW says ENOTDIR, or ELOOP for a symlink.
    matches!(error, Some(Errno::NOENT | Errno::NOTDIR | Errno::LOOP))
}
