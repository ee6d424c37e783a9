//! The way from a folder down to where a walk is, one open directory after the other.
//!
//! A tree may be deeper than a process may have descriptors: only the folder itself and the innermost directories are
//! open. One that was closed is opened again as `..` of the one below it, and is taken only if it is the very inode that
//! it was: from a directory that was moved meanwhile that leads elsewhere.

use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::fs::{Mode, OFlags, fstat, openat};
use rustix::io::Errno;

use super::seen::Look;

/// How many are open.
const OPEN: usize = 64;

/// A directory on the way.
#[derive(Debug)]
pub(super) struct Level {
    dir: Option<OwnedFd>,
    names: std::vec::IntoIter<CString>,
    /// What it was when its parent was read.
    pub(super) look: Look,
    /// How long nobody has touched it, if that is long enough.
    pub(super) age: Option<Duration>,
    /// Something in it stays.
    pub(super) stays: bool,
    /// Something in it has gone.
    pub(super) changed: bool,
}

impl Level {
    /// An open directory, with the names that are to be visited.
    pub(super) fn new(dir: OwnedFd, names: Vec<CString>, look: Look, age: Option<Duration>) -> Self {
        Self { dir: Some(dir), names: names.into_iter(), look, age, stays: false, changed: false }
    }
}

/// The way down. The folder itself is always part of it.
#[derive(Debug)]
pub(super) struct Levels {
    folder: Level,
    below: Vec<Level>,
}

impl Levels {
    pub(super) fn new(folder: Level) -> Self {
        Self { folder, below: Vec::new() }
    }

    /// The directory where the walk is.
    pub(super) fn here(&mut self) -> &mut Level {
        self.below.last_mut().unwrap_or(&mut self.folder)
    }

    /// Its descriptor.
    pub(super) fn dir(&self) -> Result<BorrowedFd<'_>, Errno> {
        let here = self.below.last().unwrap_or(&self.folder);
        here.dir.as_ref().map(AsFd::as_fd).ok_or(Errno::BADF)
    }

    /// The next name in it.
    pub(super) fn next_name(&mut self) -> Option<CString> {
        self.here().names.next()
    }

    /// Goes down.
    pub(super) fn enter(&mut self, level: Level) {
        self.below.push(level);
        if let Some(far) = self.below.len().checked_sub(OPEN + 1) {
            self.below[far].dir = None;
        }
    }

    /// Goes up; `None` from the folder itself.
    ///
    /// # Errors
    /// The way up is lost, because a directory on it was moved. Then it has gone up to the folder.
    pub(super) fn leave(&mut self) -> Option<Result<Level, Errno>> {
        let left = self.below.pop()?;
        let Some(above) = self.below.last_mut().filter(|above| above.dir.is_none()) else { return Some(Ok(left)) };
        match left.dir.as_ref().ok_or(Errno::BADF).and_then(|dir| reopen(dir.as_fd(), &above.look)) {
            Ok(dir) => {
                above.dir = Some(dir);
                Some(Ok(left))
            }
            Err(error) => {
                self.below.clear();
                Some(Err(error))
            }
        }
    }
}

fn reopen(below: BorrowedFd<'_>, expected: &Look) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::NOATIME | OFlags::CLOEXEC;
    let dir = openat(below, "..", flags, Mode::empty())?;
    if Look::of(&fstat(&dir)?).identity() == expected.identity() { Ok(dir) } else { Err(Errno::STALE) }
}
