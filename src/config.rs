//! What the user wants: plain values, complete and consistent.
//!
//! A [`Config`] that came out of [`Config::parse`] keeps every rule: its paths are absolute and normalised, no overlay
//! target, tmpfs mount or store lies inside another, nothing is zero that must not be. Nobody needs to check again.
//! The known keys are exactly those that `read.rs` asks for; the rules between keys are all in `check.rs`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use glob::Pattern;

mod check;
mod error;
mod origins;
mod read;
mod section;
mod size;
mod value;

pub use error::ConfigError;
pub use size::Size;

/// The whole configuration.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Config {
    /// `[overlay]`: which directories are kept in RAM.
    pub overlay: Overlay,
    /// `[tmpfs]`: what is mounted empty at every boot.
    pub tmpfs: Tmpfs,
    /// `[persist]`: where the store is, and which caches survive a reboot.
    pub persist: Persist,
    /// `[checkpoint]`: when changes go to disk.
    pub checkpoint: Checkpoint,
    /// `[cleanup]`: the cleaner of stale files.
    pub cleanup: Cleanup,
    /// `[log]`: our own log.
    pub log: Log,
}

/// `[overlay]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Overlay {
    /// The targets, in the order given. May be empty.
    pub dirs: Vec<PathBuf>,
    /// The ceiling of the tmpfs that holds the upper directories.
    pub size: Size,
    /// When the targets are mounted.
    pub activate: Activate,
    /// Paths strictly inside a target that stay on disk.
    pub passthrough: Vec<PathBuf>,
}

/// When the targets are mounted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activate {
    /// Before the pivot, or after local-fs for a deferred target.
    Boot,
    /// At the first login, until the last logout.
    Login,
}

/// `[tmpfs]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tmpfs {
    /// Mount points and their ceilings.
    pub mounts: BTreeMap<PathBuf, Size>,
    /// The ceiling of every user's `~/.cache`; `None` leaves them on disk.
    pub user_cache: Option<Size>,
}

/// `[persist]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Persist {
    /// The directory on disk that holds the store.
    pub root: PathBuf,
    /// Names in `/var/cache` that stay on disk.
    pub var_cache: Vec<String>,
    /// Names in `~/.cache` that stay on disk.
    pub user_cache: Vec<String>,
}

/// `[checkpoint]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoint {
    /// What the last logout does.
    pub on_logout: OnLogout,
    /// How often a target is looked at; see [`Checkpoint::interval_of`].
    pub interval: Duration,
    /// Intervals of single targets. Every key is one of [`Overlay::dirs`].
    pub per_target: BTreeMap<PathBuf, Duration>,
    /// Whether checkpoints are taken at intervals and before suspend.
    pub snapshot: bool,
    /// The zstd level, 1 to 19.
    pub compression: i32,
    /// How many merges keep the contents that they replaced.
    pub history: u32,
}

/// What the last logout does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnLogout {
    /// Write a checkpoint.
    Checkpoint,
    /// Write a checkpoint, merge it and free the RAM.
    Release,
}

/// `[cleanup]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cleanup {
    /// How often the cleaner runs.
    pub interval: Duration,
    /// How long a file must have been untouched to be stale.
    pub stale: Duration,
    /// What is never stale, with all below it; each matches whole paths, and begins with `/`.
    pub exclude: Vec<Pattern>,
}

/// `[log]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Log {
    /// The file we log to.
    pub file: PathBuf,
}

impl Config {
    /// Applies files, given as path and text, one after another onto the defaults: arrays replace, tables merge.
    ///
    /// # Errors
    /// The first thing that is not allowed, with its file and line. The rules between keys are checked on the result
    /// of all files, so a later file may mend an earlier one.
    pub fn parse(sources: &[(PathBuf, String)]) -> Result<Self, ConfigError> {
        let mut config = Self::default();
        let mut origins = origins::Origins::new(sources);
        for file in 0..sources.len() {
            section::read_file(file, &mut origins, |root| read::apply(root, &mut config))?;
        }
        check::check(&mut config, &origins)?;
        Ok(config)
    }
}

impl Checkpoint {
    /// How often `target` is looked at.
    #[must_use]
    pub fn interval_of(&self, target: &Path) -> Duration {
        self.per_target.get(target).copied().unwrap_or(self.interval)
    }
}

impl Default for Overlay {
    fn default() -> Self {
        Self {
            dirs: vec!["/etc".into(), "/var/log".into()],
            size: Size::Percent(90),
            activate: Activate::Boot,
            passthrough: Vec::new(),
        }
    }
}

impl Default for Tmpfs {
    fn default() -> Self {
        let mounts = [("/tmp", 5), ("/var/tmp", 1), ("/var/cache", 2)];
        Self { mounts: mounts.map(|(path, gib)| (path.into(), Size::gib(gib))).into(), user_cache: Some(Size::gib(2)) }
    }
}

impl Default for Persist {
    fn default() -> Self {
        let user_cache = ["paru", "nvidia", "mesa_shader_cache", "mesa_shader_cache_db", "TauonMusicBox"];
        Self {
            root: "/persist".into(),
            var_cache: vec!["pacman".to_owned()],
            user_cache: user_cache.map(str::to_owned).into(),
        }
    }
}

impl Default for Checkpoint {
    fn default() -> Self {
        Self {
            on_logout: OnLogout::Checkpoint,
            interval: Duration::from_secs(5 * 60),
            per_target: [("/etc".into(), Duration::from_secs(30))].into(),
            snapshot: true,
            compression: 1,
            history: 5,
        }
    }
}

impl Default for Cleanup {
    fn default() -> Self {
        Self { interval: Duration::from_secs(60), stale: Duration::from_secs(10 * 60), exclude: Vec::new() }
    }
}

impl Default for Log {
    fn default() -> Self {
        Self { file: "/var/log/ramoverlay.log".into() }
    }
}
