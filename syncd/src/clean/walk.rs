//! One folder from top to bottom. A directory is judged by what it was before anything in it was removed: an old tree
//! goes in one pass.
//!
//! As with systemd-tmpfiles, each name of a file with several is judged by itself; the times are those of the file, and
//! the loss of a name changes one of them, so that the next name stays until that is old, too. A file with the sticky bit
//! asks to be kept. A BSD lock on a directory, of either kind, keeps all below it; one on the folder itself, which
//! everybody may take, does not. Sockets, FIFOs and devices always stay.

use std::ffi::{CStr, OsStr};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ephemeral_overlay::error::{At, SystemError};
use rustix::fs::{AtFlags, FileType, FlockOperation, Mode, flock, fstat, statat};
use rustix::io::Errno;

use super::busy::Lookout;
use super::keep::{Keep, PATH_MAX};
use super::levels::{Level, Levels};
use super::remove::{Doomed, Refused};
use super::seen::{Look, Memory};
use super::{CleanOptions, FolderStats, Removed};
use crate::error::Result;
use crate::tree::{list_by_inode, open_child_dir};

/// How many errors are told.
const TOLD: usize = 10;

/// A folder that is cleaned.
#[derive(Debug)]
pub(super) struct Folder {
    pub(super) path: PathBuf,
    pub(super) device: u64,
    pub(super) dir: OwnedFd,
    /// Which directory of the tmpfs it is.
    pub(super) inside: PathBuf,
    pub(super) keeps_directories: bool,
}

/// What holds for all folders.
#[derive(Debug)]
pub(super) struct Pass<'a> {
    pub(super) keep: &'a Keep,
    pub(super) stale: Duration,
    pub(super) options: &'a CleanOptions,
}

/// A walk through a folder.
pub(super) struct Walk<'a, 'f> {
    folder: &'f Folder,
    pass: &'a Pass<'a>,
    lookout: &'a mut Lookout<'f>,
    memory: Memory,
    tell: &'a mut dyn FnMut(&Removed<'_>),
    /// Where it is, in bytes: a name comes and goes at the end for less than with a `PathBuf`.
    path: Vec<u8>,
    stats: FolderStats,
}

/// What became of a name.
enum Visit {
    Stays,
    Gone,
    /// It is a directory, and the walk is in it now.
    Entered,
}

/// What kind of name is to be removed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    File,
    Symlink,
    Dir { emptied: bool },
}

impl<'a, 'f> Walk<'a, 'f> {
    pub(super) fn new(
        folder: &'f Folder,
        pass: &'a Pass<'a>,
        lookout: &'a mut Lookout<'f>,
        memory: Memory,
        tell: &'a mut dyn FnMut(&Removed<'_>),
    ) -> Self {
        let path = folder.path.as_os_str().as_bytes().to_vec();
        let stats = FolderStats { path: folder.path.clone(), ..FolderStats::default() };
        Self { folder, pass, lookout, memory, tell, path, stats }
    }

    /// Visits everything.
    pub(super) fn run(mut self) -> Result<(Memory, FolderStats)> {
        if self.pass.keep.with_all_below(self.path()) {
            return Ok((self.memory, self.stats));
        }
        let look = Look::of(&fstat(&self.folder.dir).at("fstat", self.path())?);
        let names = list_by_inode(self.folder.dir.as_fd(), self.path())?;
        let dir = self.folder.dir.try_clone().at("dup", self.path())?;
        let mut levels = Levels::new(Level::new(dir, names, look, None));
        loop {
            let visit = match levels.next_name() {
                Some(name) => self.visit(&mut levels, &name)?,
                None => match levels.leave() {
                    None => return Ok((self.memory, self.stats)),
                    Some(Ok(left)) => {
                        let name = self.path.iter().rposition(|&byte| byte == b'/').unwrap_or(0);
                        let visit = self.leave(&levels, &left)?;
                        self.path.truncate(name);
                        visit
                    }
                    Some(Err(error)) => {
                        // What was moved is met again in the next pass.
                        let visit = if error == Errno::STALE { Visit::Stays } else { self.failed("openat", error) };
                        self.path.truncate(self.folder.path.as_os_str().len());
                        visit
                    }
                },
            };
            match visit {
                Visit::Entered => {}
                Visit::Gone => levels.here().changed = true,
                Visit::Stays => levels.here().stays = true,
            }
        }
    }

    /// Looks at a name in the directory where the walk is.
    fn visit(&mut self, levels: &mut Levels, name: &CStr) -> Result<Visit> {
        let stat = levels.dir().and_then(|dir| statat(dir, name, AtFlags::SYMLINK_NOFOLLOW));
        let name = OsStr::from_bytes(name.to_bytes());
        let stat = match stat {
            Ok(stat) => stat,
            Err(Errno::NOENT) => return Ok(Visit::Gone),
            Err(error) => return self.at(name, |walk| Ok(walk.failed("fstatat", error))),
        };
        if stat.st_dev != self.folder.device {
            return Ok(Visit::Stays);
        }
        let look = Look::of(&stat);
        let age = self.age(&look);
        let kind = match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => return self.at(name, |walk| walk.enter(levels, name, &look, age)),
            FileType::RegularFile if !Mode::from_raw_mode(stat.st_mode).contains(Mode::SVTX) => Kind::File,
            FileType::Symlink => Kind::Symlink,
            _ => return Ok(Visit::Stays),
        };
        match age {
            Some(age) => self.at(name, |walk| walk.remove(levels, name, &look, age, kind)),
            None => Ok(Visit::Stays),
        }
    }

    /// Does something about a name in the directory where the walk is, which is the last one of the path meanwhile. That
    /// of a young file is never needed.
    fn at(&mut self, name: &OsStr, act: impl FnOnce(&mut Self) -> Result<Visit>) -> Result<Visit> {
        let length = self.path.len();
        self.path.push(b'/');
        self.path.extend(name.as_bytes());
        let visit = act(self)?;
        if !matches!(visit, Visit::Entered) {
            self.path.truncate(length);
        }
        Ok(visit)
    }

    fn path(&self) -> &Path {
        as_path(&self.path)
    }

    /// How long nobody has touched it, if that is long enough.
    fn age(&mut self, look: &Look) -> Option<Duration> {
        let awake = self.memory.meet(look);
        let wall = self.pass.options.now.wall.saturating_sub(look.youngest());
        if wall > self.pass.stale && awake <= self.pass.stale {
            self.stats.waiting += 1;
        }
        Some(wall.min(awake)).filter(|&age| age > self.pass.stale)
    }

    /// Goes into a directory.
    fn enter(&mut self, levels: &mut Levels, name: &OsStr, look: &Look, age: Option<Duration>) -> Result<Visit> {
        if self.pass.keep.with_all_below(self.path()) {
            return Ok(Visit::Stays);
        }
        let open = levels.dir().and_then(|dir| {
            let dir = open_child_dir(dir, name)?;
            Ok((Look::of(&fstat(&dir)?), dir))
        });
        let dir = match open {
            Ok((now, dir)) if now == *look => dir,
            // A mount, or something else by now.
            Ok(_) | Err(Errno::XDEV | Errno::LOOP | Errno::NOTDIR | Errno::NOENT) => return Ok(Visit::Stays),
            Err(error) => return Ok(self.failed("openat2", error)),
        };
        if self.is_locked(&dir, look)? {
            self.stats.in_use += usize::from(age.is_some());
            return Ok(Visit::Stays);
        }
        match list_by_inode(dir.as_fd(), self.path()) {
            Ok(names) => levels.enter(Level::new(dir, names, *look, age)),
            Err(error) => return Ok(self.note(error)),
        }
        Ok(Visit::Entered)
    }

    /// Locks a directory for as long as it is open. A dry run only looks.
    fn is_locked(&mut self, dir: &OwnedFd, look: &Look) -> Result<bool> {
        if self.pass.options.dry_run {
            return self.lookout.is_locked(look.identity());
        }
        Ok(flock(dir, FlockOperation::NonBlockingLockExclusive).is_err())
    }

    /// Everything in a directory was visited; it is the last name of the path.
    fn leave(&mut self, levels: &Levels, left: &Level) -> Result<Visit> {
        match left.age {
            Some(age) if !left.stays && !self.folder.keeps_directories => {
                let name = self.path().file_name().unwrap_or_default().to_owned();
                self.remove(levels, &name, &left.look, age, Kind::Dir { emptied: left.changed })
            }
            _ => Ok(Visit::Stays),
        }
    }

    /// Removes a name that is old enough, unless it is to be kept.
    fn remove(&mut self, levels: &Levels, name: &OsStr, look: &Look, age: Duration, kind: Kind) -> Result<Visit> {
        let is_dir = matches!(kind, Kind::Dir { .. });
        if self.pass.keep.itself(self.path()) || (!is_dir && self.pass.keep.with_all_below(self.path())) {
            return Ok(Visit::Stays);
        }
        // On directories there are locks of our own.
        if self.lookout.is_used(look.identity(), as_path(&self.path))?
            || (!is_dir && self.lookout.is_locked(look.identity())?)
        {
            self.memory.renew(look);
            self.stats.in_use += 1;
            return Ok(Visit::Stays);
        }
        let removed = if self.pass.options.dry_run {
            Ok(())
        } else {
            levels.dir().map_err(|error| Refused::Failed("openat", error)).and_then(|dir| {
                let doomed = Doomed { dir, name, look };
                match kind {
                    Kind::File => doomed.remove_file(),
                    Kind::Symlink => doomed.remove_symlink(),
                    Kind::Dir { emptied } => doomed.remove_dir(emptied),
                }
            })
        };
        match removed {
            Ok(()) => self.count(look, age, is_dir),
            Err(Refused::Gone) => {}
            Err(Refused::Changed) => return Ok(Visit::Stays),
            Err(Refused::Locked) => {
                self.stats.in_use += 1;
                return Ok(Visit::Stays);
            }
            Err(Refused::Failed(call, error)) => return Ok(self.failed(call, error)),
        }
        Ok(Visit::Gone)
    }

    fn count(&mut self, look: &Look, age: Duration, is_dir: bool) {
        let bytes = if is_dir { 0 } else { look.frees() };
        *(if is_dir { &mut self.stats.directories } else { &mut self.stats.files }) += 1;
        self.stats.bytes += bytes;
        (self.tell)(&Removed { path: shown(&self.path), is_dir, age, bytes });
    }

    fn failed(&mut self, call: &'static str, error: Errno) -> Visit {
        let path = shown(&self.path).to_path_buf();
        self.note(SystemError { call, path, source: error.into() })
    }

    fn note(&mut self, error: SystemError) -> Visit {
        self.stats.failed += 1;
        if self.stats.errors.len() < TOLD {
            self.stats.errors.push(error);
        }
        Visit::Stays
    }
}

fn as_path(bytes: &[u8]) -> &Path {
    Path::new(OsStr::from_bytes(bytes))
}

/// A path, cut to a length that can be kept for many.
fn shown(path: &[u8]) -> &Path {
    as_path(path.get(..PATH_MAX).unwrap_or(path))
}
