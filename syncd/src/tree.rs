//! A directory tree that is only ever reached through its descriptor: no symlink is followed, no mount crossed, and
//! no path is too long (`PATH_MAX` limits one call, not a tree).

use std::cell::OnceCell;
use std::ffi::{CString, OsStr, OsString};
use std::fs::File;
use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use ephemeral_overlay::error::{At, SystemError};
use ephemeral_overlay::layout::open_host_dir;
use rustix::fs::{
    AtFlags, Mode, OFlags, RawDir, RawDirEntry, ResolveFlags, SeekFrom, Stat, openat2, readlinkat, seek, statat,
};
use rustix::io::Errno;

use crate::path::RelPath;

/// Flags to open a directory with.
const DIRECTORY: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY);
/// How everything is looked up: no symlink is followed, no mount crossed.
const WITHIN: ResolveFlags = ResolveFlags::NO_SYMLINKS.union(ResolveFlags::NO_XDEV);
/// What one openat2(2) is given at the most; the kernel's limit is `PATH_MAX`, 4096.
const CHUNK: usize = 3072;
/// How many bytes of a directory one getdents64(2) is asked for.
const LISTED: usize = 32 << 10;

/// A tree by its root's descriptor.
#[derive(Debug)]
pub struct Tree {
    root: OwnedFd,
    path: PathBuf,
}

impl Tree {
    /// Opens the tree at a path of the running system.
    ///
    /// # Errors
    /// Whatever open(2) says.
    pub fn open(path: &Path) -> Result<Self, SystemError> {
        Ok(Self::new(open_host_dir(path)?, path))
    }

    /// The tree behind a descriptor; `path` is for messages.
    #[must_use]
    pub fn new(root: OwnedFd, path: &Path) -> Self {
        Self { root, path: path.to_path_buf() }
    }

    /// Where the tree is, for messages.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where `path` of the tree is, for messages.
    #[must_use]
    pub fn show<'a>(&'a self, path: &'a RelPath) -> Shown<'a> {
        Shown { tree: &self.path, path, whole: OnceCell::new() }
    }

    /// The root's descriptor.
    #[must_use]
    pub fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// Opens the directory at `path`.
    ///
    /// # Errors
    /// Whatever openat2(2) says: `ELOOP` for a symlink, `EXDEV` for a mount.
    pub fn open_dir(&self, path: &RelPath) -> Result<OwnedFd, SystemError> {
        self.open_at(path, DIRECTORY)
    }

    /// Opens the regular file at `path` for reading; never blocks on a FIFO.
    ///
    /// # Errors
    /// Whatever openat2(2) says.
    pub fn open_file(&self, path: &RelPath) -> Result<File, SystemError> {
        Ok(self.open_at(path, OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK)?.into())
    }

    /// Opens the directory that holds `path`; the root holds itself.
    ///
    /// # Errors
    /// Whatever openat2(2) says.
    pub fn open_parent(&self, path: &RelPath) -> Result<OwnedFd, SystemError> {
        self.open_dir(&path.parent().unwrap_or_default())
    }

    /// The status of what stands at `path`, not followed; `None` when nothing does.
    ///
    /// # Errors
    /// Whatever openat2(2) or fstatat(2) says, save that nothing is there.
    pub fn stat(&self, path: &RelPath) -> Result<Option<Stat>, SystemError> {
        let stat = self.open_parent(path).and_then(|parent| {
            let name = if path.is_root() { OsStr::new(".") } else { path.name() };
            statat(parent, name, AtFlags::SYMLINK_NOFOLLOW).at("fstatat", self.show(path))
        });
        match stat {
            Ok(stat) => Ok(Some(stat)),
            Err(error) if is_nothing(error.errno()) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn open_at(&self, path: &RelPath, flags: OFlags) -> Result<OwnedFd, SystemError> {
        let mut rest = path.as_path().as_os_str().as_bytes();
        let mut dir: Option<OwnedFd> = None;
        while rest.len() > CHUNK {
            // A name is at most 255 bytes, so there is a separator to cut at.
            let cut = rest[..CHUNK].iter().rposition(|&byte| byte == b'/').unwrap_or(CHUNK);
            let from = dir.as_ref().map_or(self.root(), AsFd::as_fd);
            dir = Some(open_beneath(from, OsStr::from_bytes(&rest[..cut]), DIRECTORY).at("openat2", self.show(path))?);
            rest = &rest[cut + 1..];
        }
        let from = dir.as_ref().map_or(self.root(), AsFd::as_fd);
        open_beneath(from, OsStr::from_bytes(rest), flags).at("openat2", self.show(path))
    }
}

/// Where something is, for messages: put together when it is asked for, which for most files is never.
#[derive(Debug)]
pub struct Shown<'a> {
    tree: &'a Path,
    path: &'a RelPath,
    whole: OnceCell<PathBuf>,
}

impl Deref for Shown<'_> {
    type Target = Path;

    fn deref(&self) -> &Path {
        self.whole.get_or_init(|| self.path.below(self.tree))
    }
}

impl AsRef<Path> for Shown<'_> {
    fn as_ref(&self) -> &Path {
        self
    }
}

/// Opens files of a tree, one after the other in path order: their directory is looked up once.
#[derive(Debug)]
pub struct Opener<'a> {
    tree: &'a Tree,
    /// The directory of the file that was opened last.
    last: Option<(RelPath, OwnedFd)>,
}

impl<'a> Opener<'a> {
    /// Nothing is open yet.
    #[must_use]
    pub fn new(tree: &'a Tree) -> Self {
        Self { tree, last: None }
    }

    /// As [`Tree::open_file`]. The directory may have been moved since it was opened: who must know asks the tree.
    ///
    /// # Errors
    /// Whatever openat2(2) says.
    pub fn open_file(&mut self, path: &RelPath) -> Result<File, SystemError> {
        let dir = match &self.last {
            Some((parent, dir)) if path.is_in(parent) => dir,
            _ => {
                let parent = path.parent().unwrap_or_default();
                let dir = self.tree.open_dir(&parent)?;
                &self.last.insert((parent, dir)).1
            }
        };
        open_child_file(dir.as_fd(), path.name(), OFlags::RDONLY).at("openat2", self.tree.show(path))
    }
}

/// Whether an error of openat2(2) says that nothing is at a path: no such name, or a file or a symlink on the way to it.
#[must_use]
pub fn is_nothing(error: Option<Errno>) -> bool {
    matches!(error, Some(Errno::NOENT | Errno::NOTDIR | Errno::LOOP))
}

/// Opens the directory `name` (or `.`) of a directory: no symlink is followed, no mount entered.
///
/// # Errors
/// Whatever openat2(2) says: `ELOOP` for a symlink, `EXDEV` for a mount.
pub fn open_child_dir(dir: BorrowedFd<'_>, name: &OsStr) -> rustix::io::Result<OwnedFd> {
    open_beneath(dir, name, DIRECTORY)
}

/// Opens the regular file `name` of a directory with more `flags`, as [`Tree::open_file`] does.
///
/// # Errors
/// Whatever openat2(2) says.
pub fn open_child_file(dir: BorrowedFd<'_>, name: &OsStr, flags: OFlags) -> rustix::io::Result<File> {
    // A single name leads nowhere else, and to check that takes the lock of all mounts (path_is_under, fs/namespace.c).
    open_as(dir, name, flags | OFlags::NOFOLLOW | OFlags::NONBLOCK, WITHIN).map(File::from)
}

/// Opens what is below a directory, by a path of at most `PATH_MAX`.
fn open_beneath(dir: BorrowedFd<'_>, path: &OsStr, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    open_as(dir, path, flags, WITHIN | ResolveFlags::BENEATH)
}

/// Opens something and writes nothing by reading it: not even the time of the last access, which would be a write to
/// lower's disk for each file, and would make the cleaner's files young.
fn open_as(dir: BorrowedFd<'_>, path: &OsStr, flags: OFlags, resolve: ResolveFlags) -> rustix::io::Result<OwnedFd> {
    let open = |flags| openat2(dir, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve);
    match open(flags | OFlags::NOATIME) {
        // It belongs to somebody else, open(2).
        Err(Errno::PERM) => open(flags),
        other => other,
    }
}

/// The names in a directory, sorted, each once: tmpfs lists names twice when the one that would be next is moved away
/// between two getdents64(2) (measured, Linux 6.18).
///
/// # Errors
/// Whatever getdents64(2) says: a listing that fails is never an empty one.
pub fn list(dir: BorrowedFd<'_>, path: &Path) -> Result<Vec<OsString>, SystemError> {
    let mut names = entries(dir, path, |entry| OsStr::from_bytes(entry.file_name().to_bytes()).to_owned())?;
    names.sort_unstable();
    names.dedup();
    Ok(names)
}

/// The same names by inode number, which is about the order in which they were made: what is looked at one after the
/// other lies together in memory. A name that became another file's between two getdents64(2) may be there twice.
///
/// # Errors
/// As [`list`].
pub fn list_by_inode(dir: BorrowedFd<'_>, path: &Path) -> Result<Vec<CString>, SystemError> {
    let mut entries = entries(dir, path, |entry| (entry.ino(), entry.file_name().to_owned()))?;
    entries.sort_unstable();
    entries.dedup_by(|(_, a), (_, b)| a == b);
    Ok(entries.into_iter().map(|(_, name)| name).collect())
}

/// What is in a directory, from its beginning.
fn entries<T>(dir: BorrowedFd<'_>, path: &Path, take: impl Fn(&RawDirEntry<'_>) -> T) -> Result<Vec<T>, SystemError> {
    seek(dir, SeekFrom::Start(0)).at("lseek", path)?;
    let mut buffer = Vec::with_capacity(LISTED);
    let mut listing = RawDir::new(dir, buffer.spare_capacity_mut());
    let mut entries = Vec::new();
    while let Some(entry) = listing.next() {
        let entry = match entry {
            // It was removed since it was opened: nothing is in it (getdents(2)).
            Err(Errno::NOENT) => break,
            other => other.at("getdents64", path)?,
        };
        if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            entries.push(take(&entry));
        }
    }
    Ok(entries)
}

/// Where the symlink `name` leads.
///
/// # Errors
/// Whatever readlinkat(2) says.
pub fn read_link(dir: BorrowedFd<'_>, name: &OsStr, path: &Path) -> Result<Vec<u8>, SystemError> {
    Ok(readlinkat(dir, name, Vec::new()).at("readlinkat", path)?.into_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_that_is_gone_is_empty_and_one_is_listed_from_its_beginning() {
        let place = tempfile::tempdir().unwrap();
        let inner = place.path().join("inner");
        std::fs::create_dir(&inner).unwrap();
        let (outer, dir) = (File::open(place.path()).unwrap(), File::open(&inner).unwrap());
        for _ in 0..2 {
            assert_eq!(list(outer.as_fd(), place.path()).unwrap(), ["inner"]);
            assert_eq!(list_by_inode(outer.as_fd(), place.path()).unwrap(), [c"inner".to_owned()]);
        }
        std::fs::remove_dir(&inner).unwrap();
        assert!(list(dir.as_fd(), &inner).unwrap().is_empty());
    }
}
