//! Walks a tree into values, in path order, many directories at a time. A raw upper directory and a plain one differ
//! only in how attributes and 0/0 character devices are read.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use ephemeral_overlay::attributes::{Handle, Xattrs};
use ephemeral_overlay::error::{At, SystemError};
use ephemeral_overlay::overlay::{self, Artefacts, is_never_data};
use rayon::prelude::*;
use rustix::fs::{AtFlags, FileType, Stat, statat};
use rustix::io::Errno;

use crate::entry::{Kind, Meta};
use crate::error::{Error, Result};
use crate::path::RelPath;
use crate::per_thread::DIRECTORIES;
use crate::tree::{Tree, is_nothing, list, read_link};

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
    /// A regular file. Its metadata are read with its contents, of the very inode.
    File,
    /// Anything that is complete without contents.
    Other(Kind, Box<Meta>),
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
    /// Whether a file has no holes worth looking for.
    #[must_use]
    pub fn is_dense(&self) -> bool {
        self.blocks.saturating_mul(512) >= self.size
    }

    /// The bytes that it takes on disk.
    #[must_use]
    pub fn allocated(&self) -> i128 {
        i128::from(self.blocks) * 512
    }
}

/// The fields of a status have other widths on other architectures.
pub(crate) fn unsigned(value: impl TryInto<u64>) -> u64 {
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
    let directories = scan.par_iter().filter(|found| matches!(found.object, Object::Other(Kind::Dir { .. }, _)));
    let unmoved = directories.map(|found| {
        let stat = tree.stat(&found.path)?;
        Ok(stat.map(|stat| Stamp::of(&stat)) == Some(found.stamp))
    });
    // The first that moved, or an error, ends it.
    unmoved.try_fold(|| true, |all, one: Result<bool>| one.map(|one| all && one)).try_reduce(|| true, |a, b| Ok(a && b))
}

/// Walks what is at and below `start`; nothing when nothing is there.
///
/// # Errors
/// As [`scan`].
pub fn scan_below(tree: &Tree, view: View, start: &RelPath) -> Result<Vec<Found>> {
    let parent = match tree.open_parent(start) {
        Ok(parent) => parent,
        Err(error) if is_nothing(error.errno()) => return Ok(Vec::new()),
        Err(error) => return Err(error.into()),
    };
    let walk = Walk { tree, view };
    let name = if start.is_root() { OsStr::new(".") } else { start.name() };
    // Level by level: the directories of a level are listed at the same time, one open descriptor for each thread.
    let mut listed: HashMap<RelPath, Listed> = HashMap::new();
    let first = walk.look(parent.as_fd(), name, start)?;
    let mut level = Vec::new();
    if let Some(Child::Dir) = first {
        level.push(start.clone());
    }
    while !level.is_empty() {
        let found =
            level.par_iter().with_max_len(DIRECTORIES).map(|path| walk.list(path)).collect::<Result<Vec<_>>>()?;
        let mut next = Vec::new();
        for (path, listing) in level.into_iter().zip(found) {
            let Some(listing) = listing else { continue };
            let below = listing.children.iter().filter(|(_, child)| matches!(child, Child::Dir));
            next.extend(below.map(|(path, _)| path.clone()));
            listed.insert(path, listing);
        }
        level = next;
    }
    Ok(in_order(start, first, listed))
}

/// Puts what was listed into path order.
fn in_order(start: &RelPath, first: Option<Child>, mut listed: HashMap<RelPath, Listed>) -> Vec<Found> {
    let mut all = Vec::with_capacity(1 + listed.values().map(|listing| listing.children.len()).sum::<usize>());
    let mut open = vec![first.map(|child| (start.clone(), child)).into_iter().collect::<Vec<_>>().into_iter()];
    while let Some(children) = open.last_mut() {
        match children.next() {
            None => drop(open.pop()),
            Some((path, Child::Object(object, stamp))) => all.push(Found { path, object, stamp }),
            Some((path, Child::Dir)) => {
                // It is not there when it went before it could be opened.
                let Some(listing) = listed.remove(&path) else { continue };
                all.push(Found { path, object: listing.object, stamp: listing.stamp });
                open.push(listing.children.into_iter());
            }
        }
    }
    all
}

/// A directory, as it was listed.
struct Listed {
    object: Object,
    stamp: Stamp,
    /// What is in it, by name.
    children: Vec<(RelPath, Child)>,
}

/// What stands in a directory.
#[allow(clippy::large_enum_variant, reason = "nearly all of them are objects")]
enum Child {
    Object(Object, Stamp),
    /// To be listed next.
    Dir,
}

struct Walk<'a> {
    tree: &'a Tree,
    view: View,
}

impl Walk<'_> {
    /// Lists a directory; `None` when it has gone.
    fn list(&self, path: &RelPath) -> Result<Option<Listed>> {
        let shown = self.tree.show(path);
        let dir = match self.tree.open_dir(path) {
            Err(error) if is_nothing(error.errno()) => return Ok(None),
            other => other?,
        };
        // Looked at through the descriptor: what is recorded is what is walked.
        let stat = rustix::fs::fstat(&dir).at("fstat", &shown)?;
        let Some((meta, opaque)) = self.meta(&stat, &Handle::open(dir.as_fd()), path)? else { return Ok(None) };
        let mut children = Vec::new();
        for name in list(dir.as_fd(), &shown)? {
            let path = path.child(&name);
            if let Some(child) = self.look(dir.as_fd(), &name, &path)? {
                children.push((path, child));
            }
        }
        let object = Object::Other(Kind::Dir { opaque }, Box::new(meta));
        Ok(Some(Listed { object, stamp: Stamp::of(&stat), children }))
    }

    /// Looks at the object `name` of `parent`; `None` when it has gone.
    fn look(&self, parent: BorrowedFd<'_>, name: &OsStr, path: &RelPath) -> Result<Option<Child>> {
        let shown = self.tree.show(path);
        let Some(stat) = look(statat(parent, name, AtFlags::SYMLINK_NOFOLLOW), "fstatat", &shown)? else {
            return Ok(None);
        };
        let stamp = Stamp::of(&stat);
        let object = match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => return Ok(Some(Child::Dir)),
            FileType::RegularFile => return Ok(Some(Child::Object(Object::File, stamp))),
            FileType::CharacterDevice if self.view == View::Upper && stat.st_rdev == 0 => {
                return Ok(Some(Child::Object(Object::Whiteout, stamp)));
            }
            FileType::Symlink => match read_link(parent, name, &shown) {
                Ok(target) => Kind::Symlink { target },
                Err(error) if is_nothing(error.errno()) => return Ok(None),
                // It was a symlink, and something else has its name by now.
                Err(error) if error.errno() == Some(Errno::INVAL) => return self.look(parent, name, path),
                Err(error) => return Err(error.into()),
            },
            FileType::Fifo => Kind::Fifo,
            FileType::Socket => Kind::Socket,
            device => {
                let (major, minor) = (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev));
                Kind::Device { block: device == FileType::BlockDevice, major, minor }
            }
        };
        let meta = self.meta(&stat, &Handle::child(parent, name), path)?;
        Ok(meta.map(|(meta, _)| Child::Object(Object::Other(object, Box::new(meta)), stamp)))
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

/// The metadata of an open file, and its status at that moment.
///
/// # Errors
/// Any failing call, and as [`meta`].
pub fn file_meta(file: &File, view: View, shown: &Path) -> Result<(Meta, Stat)> {
    let raw = Handle::open(file.as_fd()).read_all().at("listxattr", shown)?;
    let stat = rustix::fs::fstat(file).at("fstat", shown)?;
    Ok((meta(&stat, raw, view, shown)?.0, stat))
}

/// The metadata of the directory at `path` of a plain tree.
///
/// # Errors
/// Any failing call.
pub fn dir_meta(tree: &Tree, path: &RelPath) -> Result<Meta> {
    let shown = tree.show(path);
    let dir = tree.open_dir(path)?;
    let raw = Handle::open(dir.as_fd()).read_all().at("listxattr", &shown)?;
    Ok(meta(&rustix::fs::fstat(&dir).at("fstat", &shown)?, raw, View::Plain, &shown)?.0)
}

/// A failed look at something that has gone is no error.
fn look<T>(result: Result<T, Errno>, call: &'static str, path: impl AsRef<Path>) -> Result<Option<T>, SystemError> {
    match result {
        Err(error) if is_nothing(Some(error)) => Ok(None),
        Err(error) => Err(error).at(call, path),
        Ok(value) => Ok(Some(value)),
    }
}
