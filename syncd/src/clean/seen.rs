//! Since when each name is as it is, by the awake clock: a clock that is set, or a night of suspend, ages nothing.
//!
//! A file is known by its inode number and its times. What has other times than in the pass before was touched since,
//! whatever these times say, and is as young as that; so is another file with the number of one that is gone. Only what
//! the last pass met is known.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::Stat;
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

use crate::durable;
use crate::error::Result;
use crate::scan::{Stamp, unsigned};
use crate::written::boot_id;

/// The name of the record.
const RECORD: &str = "cleaner";

/// What the passes of one boot know.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Seen {
    folders: HashMap<PathBuf, HashMap<u64, State>>,
}

/// A file as it was met.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct State {
    /// Digest of its times.
    times: u64,
    /// Milliseconds of the awake clock.
    since: u64,
}

impl Seen {
    /// Reads what [`Seen::save`] wrote in this boot. What cannot be read is as good as nothing: everything is met anew.
    #[must_use]
    pub fn load(run_dir: &Path) -> Self {
        let record: Option<(String, Self)> = durable::read_record(run_dir, RECORD).ok().flatten();
        record.filter(|(boot, _)| *boot == boot_id()).map(|(_, seen)| seen).unwrap_or_default()
    }

    /// Writes it to the run directory, for the next process.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn save(&self, run_dir: &Path) -> Result<()> {
        durable::write_record(run_dir, RECORD, &(boot_id(), self))
    }

    /// Hands out what was known until now.
    pub(super) fn begin(&mut self) -> Self {
        std::mem::take(self)
    }

    /// The memory of a folder, for a pass at `now`.
    pub(super) fn folder(&mut self, path: &Path, now: Duration) -> Memory {
        let now = now.as_millis().try_into().unwrap_or(u64::MAX);
        let before = self.folders.remove(path).unwrap_or_default();
        Memory { met: HashMap::with_capacity(before.len()), before, now }
    }

    /// Takes the memory back after the pass.
    pub(super) fn keep(&mut self, path: PathBuf, memory: Memory) {
        self.folders.insert(path, memory.met);
    }
}

/// What is known of one folder.
#[derive(Debug)]
pub(super) struct Memory {
    before: HashMap<u64, State>,
    met: HashMap<u64, State>,
    now: u64,
}

impl Memory {
    /// How long it has been as it is, as far as we were awake to see it.
    pub(super) fn meet(&mut self, look: &Look) -> Duration {
        let times = look.digest();
        let known = self.before.get(&look.stamp.ino).filter(|state| state.times == times && state.since <= self.now);
        let state = State { times, since: known.map_or(self.now, |state| state.since) };
        self.met.insert(look.stamp.ino, state);
        Duration::from_millis(self.now - state.since)
    }

    /// It is in use, which counts as touching it.
    pub(super) fn renew(&mut self, look: &Look) {
        self.met.insert(look.stamp.ino, State { times: look.digest(), since: self.now });
    }
}

/// An inode as it was looked at: two that are equal have not been touched in between.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Look {
    device: u64,
    stamp: Stamp,
    atime: (i64, u64),
}

impl Look {
    pub(super) fn of(stat: &Stat) -> Self {
        let atime = (stat.st_atime, unsigned(stat.st_atime_nsec));
        Self { device: stat.st_dev, stamp: Stamp::of(stat), atime }
    }

    /// Device and inode number.
    pub(super) fn identity(&self) -> (u64, u64) {
        (self.device, self.stamp.ino)
    }

    /// The youngest of its times, since the epoch.
    pub(super) fn youngest(&self) -> Duration {
        let (seconds, nanoseconds) = self.atime.max(self.stamp.mtime).max(self.stamp.ctime);
        Duration::new(unsigned(seconds), u32::try_from(nanoseconds).unwrap_or(0))
    }

    /// What removing this name frees, in bytes.
    pub(super) fn frees(&self) -> u64 {
        if self.stamp.nlink == 1 { self.stamp.blocks.saturating_mul(512) } else { 0 }
    }

    fn digest(&self) -> u64 {
        let times = [self.atime, self.stamp.mtime, self.stamp.ctime];
        xxh3_64(
            &times.map(|(seconds, nanoseconds)| [seconds.to_le_bytes(), nanoseconds.to_le_bytes()]).concat().concat(),
        )
    }
}
