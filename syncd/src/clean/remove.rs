//! The last look at one name, and its removal.

use std::ffi::OsStr;
use std::os::fd::BorrowedFd;

use rustix::fs::{AtFlags, FlockOperation, OFlags, flock, fstat, statat, unlinkat};
use rustix::io::Errno;

use super::seen::Look;
use crate::tree::open_child_file;

/// Why a name was not removed.
#[derive(Debug)]
pub(super) enum Refused {
    /// It is not there any more.
    Gone,
    /// It is not what was judged any more.
    Changed,
    /// Somebody has locked it.
    Locked,
    /// A call failed.
    Failed(&'static str, Errno),
}

/// A name that was judged, in an open directory.
#[derive(Debug)]
pub(super) struct Doomed<'a> {
    pub(super) dir: BorrowedFd<'a>,
    pub(super) name: &'a OsStr,
    pub(super) look: &'a Look,
}

impl Doomed<'_> {
    /// Removes a regular file. Who has a BSD lock on it keeps it, as tmpfiles.d(5) promises.
    pub(super) fn remove_file(&self) -> Result<(), Refused> {
        let file = open_child_file(self.dir, self.name, OFlags::RDONLY);
        let file = file.map_err(|error| refused("openat2", error))?;
        if Look::of(&fstat(&file).map_err(|error| refused("fstat", error))?) != *self.look {
            return Err(Refused::Changed);
        }
        flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|error| refused("flock", error))?;
        self.remove_symlink()
    }

    /// Removes a symlink, which nobody can lock.
    pub(super) fn remove_symlink(&self) -> Result<(), Refused> {
        self.unlink(AtFlags::empty(), |now| now == *self.look)
    }

    /// Removes an empty directory. If we have `emptied` it, its times are not what they were.
    pub(super) fn remove_dir(&self, emptied: bool) -> Result<(), Refused> {
        self.unlink(AtFlags::REMOVEDIR, |now| {
            if emptied { now.identity() == self.look.identity() } else { now == *self.look }
        })
    }

    fn unlink(&self, flags: AtFlags, is_it: impl Fn(Look) -> bool) -> Result<(), Refused> {
        let now = statat(self.dir, self.name, AtFlags::SYMLINK_NOFOLLOW).map_err(|error| refused("fstatat", error))?;
        if !is_it(Look::of(&now)) {
            return Err(Refused::Changed);
        }
        unlinkat(self.dir, self.name, flags).map_err(|error| refused("unlinkat", error))
    }
}

fn refused(call: &'static str, error: Errno) -> Refused {
    match error {
        Errno::NOENT => Refused::Gone,
        // Something else has the name, or came into the directory, or was mounted there.
        Errno::LOOP | Errno::NOTDIR | Errno::ISDIR | Errno::NXIO | Errno::XDEV | Errno::NOTEMPTY | Errno::BUSY => {
            Refused::Changed
        }
        // A lock; or a lease, which an open(2) would break.
        Errno::AGAIN => Refused::Locked,
        error => Refused::Failed(call, error),
    }
}
