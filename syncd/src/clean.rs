//! Removes what nobody has touched for a while from the tmpfs folders.
//!
//! Such a folder is hostile: whoever may write to it can exchange any name at any moment. So everything is reached
//! relative to descriptors of directories, without following symlinks or entering mounts, and right before a name goes
//! it is looked at again: what is not, to the last time stamp, what was judged, stays. The kernel has no "unlink what
//! this descriptor is"; who wins the moment that is left loses a name that was his to remove.
//!
//! What is in use is looked for once in a pass, when the first name is old enough. What the kernel tells nobody is not
//! seen: a descriptor that is on its way through a socket, or that only a ring of
//! `io_uring` holds.

mod busy;
mod keep;
mod levels;
mod remove;
mod seen;
mod tmpfiles;
mod walk;

use std::ffi::OsStr;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use early::plan::VAR_CACHE;
use ephemeral_overlay::config::Config;
use ephemeral_overlay::error::{At, SystemError};
use ephemeral_overlay::{Layout, mountinfo};
use rustix::fs::{fstat, fstatfs};
use rustix::io::Errno;
use rustix::time::{ClockId, clock_gettime};

use busy::Lookout;
use keep::Keep;
pub use seen::Seen;
use walk::{Folder, Pass, Walk};

use crate::error::Result;
use crate::tree::open_child_dir;

/// `TMPFS_MAGIC` (linux/magic.h).
const TMPFS: i64 = 0x0102_1994;

/// When a pass takes place.
#[derive(Debug, Clone, Copy)]
pub struct Moment {
    /// By the clock on the wall, since the epoch. It may be set.
    pub wall: Duration,
    /// How long the machine has been awake in this boot.
    pub awake: Duration,
}

impl Moment {
    /// Now.
    #[must_use]
    pub fn now() -> Self {
        let read = |clock| {
            let time = clock_gettime(clock);
            Duration::new(time.tv_sec.try_into().unwrap_or(0), time.tv_nsec.try_into().unwrap_or(0))
        };
        // It stands still while the machine is suspended, clock_gettime(2).
        Self { wall: read(ClockId::Realtime), awake: read(ClockId::Monotonic) }
    }
}

/// What a pass does.
#[derive(Debug, Clone, Copy)]
pub struct CleanOptions {
    /// When it is.
    pub now: Moment,
    /// Remove nothing, and lock nothing.
    pub dry_run: bool,
}

/// Something that was removed, or would be.
#[derive(Debug)]
pub struct Removed<'a> {
    /// Where it was. Cut where it is longer than any path that a program may name.
    pub path: &'a Path,
    /// It is a directory.
    pub is_dir: bool,
    /// How long nobody had touched it.
    pub age: Duration,
    /// What that frees, in bytes; 0 for one of several names of a file.
    pub bytes: u64,
}

/// What a pass came to.
#[derive(Debug, Default)]
pub struct CleanStats {
    /// One for each folder of the configuration that is a tmpfs.
    pub folders: Vec<FolderStats>,
    /// Processes that even root may not look into, because a security module forbids it: what only they use is not
    /// known to be in use.
    pub hidden: Vec<u32>,
}

impl CleanStats {
    /// Whether nothing was left but what is to be left.
    #[must_use]
    pub fn is_exact(&self) -> bool {
        self.folders.iter().all(|folder| folder.failed == 0)
    }
}

/// What became of one folder.
#[derive(Debug, Default)]
pub struct FolderStats {
    /// The folder.
    pub path: PathBuf,
    /// Names of files and symlinks that were removed.
    pub files: usize,
    /// Directories that were removed.
    pub directories: usize,
    /// What that freed, in bytes.
    pub bytes: u64,
    /// Names that are old enough, and are in use or locked.
    pub in_use: usize,
    /// Names that are old enough by their times, and have not been known for long enough.
    pub waiting: usize,
    /// Names that could not be looked at or removed.
    pub failed: usize,
    /// Why, of the first few.
    pub errors: Vec<SystemError>,
}

/// Removes what is stale from every folder in `config.tmpfs` that is a tmpfs now, whoever mounted it. `seen` is what
/// the passes before knew; it knows what this one saw after it. Each name is told to `tell` once it is removed.
///
/// Not for a configuration that could not be read: the default one does not have its exceptions.
///
/// # Errors
/// When a folder cannot be opened, or what is to be kept cannot be found out. What cannot be removed is in the result.
pub fn pass(
    layout: &Layout,
    config: &Config,
    options: &CleanOptions,
    seen: &mut Seen,
    tell: &mut dyn FnMut(&Removed<'_>),
) -> Result<CleanStats> {
    let folders = folders(layout, config)?;
    let keep = Keep::read(
        layout,
        &config.cleanup.exclude,
        &folders.iter().filter_map(|folder| folder.path.to_str()).collect::<Vec<_>>(),
    )?;
    let mut lookout = Lookout::new(&folders);
    let mut past = seen.begin();
    let mut stats = CleanStats::default();
    for folder in &folders {
        let memory = past.folder(&folder.path, options.now.awake);
        let pass = Pass { keep: &keep, stale: config.cleanup.stale, options };
        let (memory, result) = Walk::new(folder, &pass, &mut lookout, memory, tell).run()?;
        seen.keep(folder.path.clone(), memory);
        stats.folders.push(result);
    }
    stats.hidden = lookout.hidden();
    Ok(stats)
}

/// The folders of the configuration on which a tmpfs is mounted.
fn folders(layout: &Layout, config: &Config) -> Result<Vec<Folder>> {
    let root = std::fs::canonicalize(layout.root()).at("realpath", layout.root())?;
    let table = std::fs::read("/proc/self/mountinfo").at("read", "/proc/self/mountinfo")?;
    let mounts = mountinfo::below(&mountinfo::parse(&table), &root);
    let mut folders = Vec::new();
    for path in config.tmpfs.mounts.keys() {
        // The last one is on top.
        let Some(mount) = mounts.iter().rfind(|mount| mount.mount_point == *path) else { continue };
        let dir = match layout.open_dir(path) {
            Ok(dir) => dir,
            Err(error) if matches!(error.errno(), Some(Errno::NOENT | Errno::LOOP | Errno::NOTDIR)) => continue,
            Err(error) => return Err(error.into()),
        };
        let shown = layout.below_root(path);
        // What the descriptor leads to counts.
        if fstatfs(&dir).at("fstatfs", &shown)?.f_type != TMPFS {
            continue;
        }
        let dir = open_child_dir(dir.as_fd(), OsStr::new(".")).at("openat2", &shown)?;
        let stat = fstat(&dir).at("fstat", &shown)?;
        folders.push(Folder {
            path: path.clone(),
            device: stat.st_dev,
            dir,
            inside: mount.root.clone(),
            // It began with the directories that programs expect there, which nobody would make again.
            keeps_directories: path == Path::new(VAR_CACHE),
        });
    }
    Ok(folders)
}
