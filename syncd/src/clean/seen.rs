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
    folders: HashMap<PathBuf, Vec<Known>>,
}

/// A file by its inode number. Those of a folder are sorted by that.
type Known = (u64, State);

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
        Memory { met: Vec::with_capacity(before.len()), before, next: 0, now }
    }

    /// Takes the memory back after the pass.
    pub(super) fn keep(&mut self, path: PathBuf, memory: Memory) {
        let mut met = memory.met;
        met.sort_by_key(|&(ino, _)| ino);
        // Of a file that was met several times the last one counts.
        met.dedup_by(|later, earlier| {
            let is_same = later.0 == earlier.0;
            if is_same {
                *earlier = *later;
            }
            is_same
        });
        self.folders.insert(path, met);
    }
}

/// What is known of one folder.
#[derive(Debug)]
pub(super) struct Memory {
    before: Vec<Known>,
    /// Behind the one of `before` that was asked for last.
    next: usize,
    /// In the order in which they were met.
    met: Vec<Known>,
    now: u64,
}

impl Memory {
    /// How long it has been as it is, as far as we were awake to see it.
    pub(super) fn meet(&mut self, look: &Look) -> Duration {
        let times = look.digest();
        let known = self.before(look.stamp.ino).filter(|state| state.times == times && state.since <= self.now);
        let state = State { times, since: known.map_or(self.now, |state| state.since) };
        self.met.push((look.stamp.ino, state));
        Duration::from_millis(self.now - state.since)
    }

    /// It is in use, which counts as touching it.
    pub(super) fn renew(&mut self, look: &Look) {
        self.met.push((look.stamp.ino, State { times: look.digest(), since: self.now }));
    }

    /// What was known of a file. Those of a directory are met by number, so that mostly the next one is asked for.
    fn before(&mut self, ino: u64) -> Option<State> {
        let is_next = self.before.get(self.next).is_some_and(|&(next, _)| next == ino);
        let at = if is_next { self.next } else { self.before.binary_search_by_key(&ino, |&(ino, _)| ino).ok()? };
        self.next = at + 1;
        Some(self.before[at].1)
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
        let bytes = times.map(|(seconds, nanoseconds)| [seconds.to_le_bytes(), nanoseconds.to_le_bytes()]);
        xxh3_64(bytes.as_flattened().as_flattened())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look(ino: u64, mtime: i64) -> Look {
        let stamp = Stamp { ino, nlink: 1, size: 0, blocks: 0, mtime: (mtime, 0), ctime: (1, 0) };
        Look { device: 1, stamp, atime: (1, 0) }
    }

    fn meet(seen: &mut Seen, now: u64, act: impl FnOnce(&mut Memory)) {
        let mut memory = seen.begin().folder(Path::new("/tmp"), Duration::from_secs(now));
        act(&mut memory);
        seen.keep("/tmp".into(), memory);
    }

    fn ages(seen: &mut Seen, now: u64, looks: &[Look]) -> Vec<u64> {
        let mut ages = Vec::new();
        meet(seen, now, |memory| ages.extend(looks.iter().map(|look| memory.meet(look).as_secs())));
        ages
    }

    #[test]
    fn files_are_known_in_whatever_order_they_are_met() {
        let mut seen = Seen::default();
        let [a, b, c] = [10, 20, 30].map(|ino| look(ino, 1));
        assert_eq!(ages(&mut seen, 100, &[c, a]), [0, 0]);
        assert_eq!(ages(&mut seen, 101, &[a, b, c, a]), [1, 0, 1, 1]);
        assert_eq!(ages(&mut seen, 103, &[b, c, a]), [2, 3, 3]);
        assert_eq!(ages(&mut seen, 104, &[look(20, 2), c]), [0, 4]);
        // Only what the last pass met is known.
        assert_eq!(ages(&mut seen, 105, &[a, look(20, 2)]), [0, 1]);
    }

    #[test]
    fn of_a_file_that_is_met_twice_the_last_time_counts() {
        let mut seen = Seen::default();
        assert_eq!(ages(&mut seen, 100, &[look(10, 1), look(20, 1)]), [0, 0]);
        meet(&mut seen, 110, |memory| {
            assert_eq!(memory.meet(&look(10, 1)).as_secs(), 10);
            assert_eq!(memory.meet(&look(20, 1)).as_secs(), 10);
            memory.renew(&look(10, 1));
        });
        assert_eq!(ages(&mut seen, 111, &[look(10, 1), look(20, 1)]), [1, 11]);
    }
}
