//! `boot.json` in the run directory: what `early` did in this boot, for `syncd`. Written once the mounts stand,
//! changed only by `syncd` when a target is activated or released. No file: the hook was not active.

use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::error::{At, SystemError};
use crate::layout::open_host_dir;

/// The version of this file that this build reads and writes.
pub const VERSION: u32 = 1;

/// What `early` did in this boot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootState {
    /// [`VERSION`].
    pub version: u32,
    /// The newest checkpoint format that the merge in this initramfs can read; none newer is written in this boot.
    pub checkpoint_format: u32,
    /// Device and inode number of the root that was prepared: a chroot that sees this run directory is another one.
    pub root: (u64, u64),
    /// `persist.root`, below which the store of this boot is.
    pub persist: PathBuf,
    /// The overlays that were mounted.
    pub targets: Vec<TargetState>,
    /// The tmpfs mounts that were made.
    pub tmpfs: Vec<PathBuf>,
    /// Targets and tmpfs folders that wait for a file system, for `syncd activate`.
    pub deferred: Vec<PathBuf>,
    /// What was asked for and not done.
    pub skipped: Vec<Skipped>,
}

/// One overlay.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TargetState {
    /// The target, as in `dirs`.
    pub path: PathBuf,
    /// `major:minor` of the overlay's superblock, as mountinfo shows it.
    pub device: String,
    /// The upper directory was merged and discarded; nothing of this target is in RAM.
    pub released: bool,
    /// Something holds on to an overlay that was unmounted, and upper is mounted a second time: whether that is dead the
    /// kernel cannot tell any more, so it is not merged in this boot. What `syncd` said.
    // Absent in what an older `early` wrote, and ignored by an older `syncd`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pinned: Option<String>,
    /// The read-only bind of lower that lies under the overlay: its mount number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cover: Option<u64>,
}

impl TargetState {
    /// An overlay that was just mounted.
    #[must_use]
    pub fn new(path: &Path, device: String) -> Self {
        Self { path: path.to_path_buf(), device, released: false, pinned: None, cover: None }
    }
}

/// Something that was asked for and not done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skipped {
    /// What.
    pub path: PathBuf,
    /// Why, and what to do about it.
    pub reason: String,
}

/// Why a `boot.json` could not be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// It could not be read or written.
    #[error(transparent)]
    System(#[from] SystemError),
    /// It is not what this build writes.
    #[error("{} is not a boot state; reboot to have it written again", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What the parser said.
        source: serde_json::Error,
    },
    /// It was written by another version of `early`.
    #[error("{} has version {found}, this syncd reads {VERSION}; rebuild the initramfs and reboot", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
    },
}

/// Locks the boot state of a run directory for whoever reads it, does something, and writes it: until the descriptor is
/// closed. `None` where there is no run directory, and so nobody else.
///
/// # Errors
/// Whatever open(2) or flock(2) says.
pub fn lock(run_dir: &Path) -> Result<Option<OwnedFd>, SystemError> {
    match open_host_dir(run_dir) {
        Ok(directory) => {
            flock(&directory, FlockOperation::LockExclusive).at("flock", run_dir)?;
            Ok(Some(directory))
        }
        Err(error) if error.errno() == Some(Errno::NOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether somebody has locked the boot state of a run directory: mounts, merges or frees something at this moment.
///
/// # Errors
/// Whatever open(2) or flock(2) says.
pub fn is_locked(run_dir: &Path) -> Result<bool, SystemError> {
    match open_host_dir(run_dir) {
        Ok(directory) => match flock(&directory, FlockOperation::NonBlockingLockShared) {
            Err(Errno::WOULDBLOCK) => Ok(true),
            other => other.at("flock", run_dir).map(|()| false),
        },
        Err(error) if error.errno() == Some(Errno::NOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

impl BootState {
    /// Reads the state; `None` when there is no such file.
    ///
    /// # Errors
    /// When it exists and cannot be read or understood.
    pub fn read(path: &Path) -> Result<Option<Self>, StateError> {
        let bytes = match std::fs::read(path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).at("read", path).map_err(Into::into),
        };
        let malformed = |source| StateError::Malformed { path: path.to_path_buf(), source };
        let value: serde_json::Value = serde_json::from_slice(&bytes).map_err(malformed)?;
        match value.get("version").and_then(serde_json::Value::as_u64) {
            Some(found) if found != u64::from(VERSION) => {
                Err(StateError::Version { path: path.to_path_buf(), found: u32::try_from(found).unwrap_or(u32::MAX) })
            }
            _ => serde_json::from_value(value).map(Some).map_err(malformed),
        }
    }

    /// Writes the state, whole or not at all. The run directory is RAM: nothing is synced.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&self, path: &Path) -> Result<(), StateError> {
        let temporary = path.with_extension("json.new");
        let text = serde_json::to_string_pretty(self)
            .map_err(|source| StateError::Malformed { path: path.to_path_buf(), source })?;
        let mut file = std::fs::File::create(&temporary).at("open", &temporary)?;
        file.write_all(text.as_bytes()).at("write", &temporary)?;
        Ok(std::fs::rename(&temporary, path).at("rename", path)?)
    }

    /// What is known of `target`, released or not.
    pub fn entry(&mut self, target: &Path) -> Option<&mut TargetState> {
        self.targets.iter_mut().find(|state| state.path == target)
    }

    /// The overlay on `target`, if there is one that was not released.
    #[must_use]
    pub fn target(&self, target: &Path) -> Option<&TargetState> {
        self.targets.iter().find(|state| state.path == target && !state.released)
    }
}
