//! How full the tmpfs of the upper directories is, and what follows from that.
//!
//! At [`HIGH`] a checkpoint is due, so that what is in RAM is on disk before it is too late. At [`CRITICAL`] the tmpfs
//! grows, as far as `overlay.size` and the memory allow, and what is idle is to be released: a full tmpfs fails every
//! write to the targets.

use std::fmt;
use std::fs;
use std::time::{SystemTime, UNIX_EPOCH};

use bytesize::ByteSize;
use ephemeral_overlay::error::{At, SystemError};
use rustix::fs::statvfs;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::system::System;

/// From so many percent on a checkpoint is due.
pub const HIGH: u64 = 70;
/// From so many percent on there has to be more room.
pub const CRITICAL: u64 = 85;
/// What of the memory stays free of us, in percent of all.
const RESERVE: u64 = 10;
/// The most inodes there may be: one for so many bytes of `overlay.size`. Each takes about 1 KiB of memory.
const BYTES_PER_INODE: u64 = 4096;

/// What a tmpfs holds, and what it may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fill {
    /// Bytes in use.
    pub used_bytes: u64,
    /// The most bytes.
    pub size_bytes: u64,
    /// Inodes in use.
    pub used_inodes: u64,
    /// The most inodes.
    pub size_inodes: u64,
}

/// What is to be done about the fill level.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Action {
    /// Save what is in RAM, and say how full it is.
    Checkpoint,
    /// The tmpfs gets this size, in bytes and in inodes. [`look`] has done it.
    Grow {
        /// Bytes.
        size: u64,
        /// Inodes.
        inodes: u64,
    },
    /// Release what nothing uses.
    Release,
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Checkpoint => f.write_str("a checkpoint is due"),
            Self::Grow { size, inodes } => write!(f, "grown to {} and {inodes} inodes", ByteSize(*size)),
            Self::Release => f.write_str("what is idle is to be released"),
        }
    }
}

/// What [`look`] found, and what is to be done; kept for `syncd status`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Room {
    /// How full it was.
    pub fill: Fill,
    /// What is to be done, in order.
    pub actions: Vec<Action>,
    /// When, in seconds since the epoch.
    pub time: u64,
}

impl Fill {
    /// How full it is, in percent of the bytes or of the inodes, whichever is more.
    #[must_use]
    pub fn percent(&self) -> u64 {
        percent(self.used_bytes, self.size_bytes).max(percent(self.used_inodes, self.size_inodes))
    }

    /// The fill level of the tmpfs of a system.
    ///
    /// # Errors
    /// Whatever statvfs(3) says.
    pub fn of(system: &System) -> Result<Self, SystemError> {
        let path = system.layout.ram();
        let stat = statvfs(&path).at("statvfs", &path)?;
        Ok(Self {
            used_bytes: (stat.f_blocks - stat.f_bfree) * stat.f_frsize,
            size_bytes: stat.f_blocks * stat.f_frsize,
            used_inodes: stat.f_files - stat.f_ffree,
            size_inodes: stat.f_files,
        })
    }
}

/// Rounded down: what is not reached yet does not count. Without a limit nothing fills it.
fn percent(used: u64, of: u64) -> u64 {
    u64::try_from(u128::from(used) * 100 / u128::from(of.max(1))).unwrap_or(u64::MAX).min(if of == 0 { 0 } else { 100 })
}

/// The memory of the machine, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// All of it.
    pub total: u64,
    /// What new work may take without swapping: `MemAvailable`.
    pub available: u64,
}

/// Decides what is to be done. `ceiling` is `overlay.size` in bytes.
#[must_use]
pub fn decide(fill: Fill, memory: Memory, ceiling: u64) -> Vec<Action> {
    if fill.percent() < HIGH {
        return Vec::new();
    }
    let mut actions = vec![Action::Checkpoint];
    if fill.percent() >= CRITICAL {
        actions.extend(growth(fill, memory, ceiling));
        actions.push(Action::Release);
    }
    actions
}

/// The larger tmpfs, if there can be one: twice as large in what is short, but not more than the ceiling, nor than the
/// memory holds beside its reserve.
fn growth(fill: Fill, memory: Memory, ceiling: u64) -> Option<Action> {
    let free = memory.available.saturating_sub(memory.total / 100 * RESERVE);
    let mut size = fill.size_bytes;
    if percent(fill.used_bytes, fill.size_bytes) >= CRITICAL {
        size = (size * 2).min(ceiling).min(fill.used_bytes.saturating_add(free)).max(fill.size_bytes);
    }
    let mut inodes = fill.size_inodes;
    if percent(fill.used_inodes, fill.size_inodes) >= CRITICAL {
        let held = fill.used_inodes.saturating_add(free / BYTES_PER_INODE);
        inodes = (inodes * 2).min(ceiling / BYTES_PER_INODE).min(held).max(fill.size_inodes);
    }
    ((size, inodes) != (fill.size_bytes, fill.size_inodes)).then_some(Action::Grow { size, inodes })
}

/// Looks how full the tmpfs is, lets it grow where that is decided, and says what else is to be done; nothing where
/// nothing is in RAM.
///
/// # Errors
/// When that cannot be found out, or the kernel refuses to let it grow.
pub fn look(system: &System) -> Result<Vec<Action>> {
    if system.mounted_targets(&[])?.is_empty() {
        return Ok(Vec::new());
    }
    let fill = Fill::of(system)?;
    let memory = memory()?;
    let actions = decide(fill, memory, system.config.overlay.size.bytes(memory.total));
    if actions.is_empty() {
        return Ok(actions);
    }
    for action in &actions {
        if let Action::Grow { size, inodes } = *action {
            let ram = system.layout.ram();
            early::apply::grow(&system.layout, size, inodes).map_err(|source| Error::Mount { path: ram, source })?;
        }
    }
    let time = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let room = Room { fill, actions: actions.clone(), time };
    let path = system.layout.room();
    let text = serde_json::to_vec(&room).map_err(std::io::Error::from).at("encode", &path)?;
    fs::write(&path, text).at("write", &path)?;
    Ok(actions)
}

/// What [`look`] last had to do something about in this boot.
#[must_use]
pub fn last(system: &System) -> Option<Room> {
    serde_json::from_slice(&fs::read(system.layout.room()).ok()?).ok()
}

fn memory() -> Result<Memory, SystemError> {
    let path = "/proc/meminfo";
    let text = fs::read_to_string(path).at("read", path)?;
    let line = |key: &str| {
        let value = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
        value.and_then(|value| value.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) * 1024
    };
    Ok(Memory { total: line("MemTotal"), available: line("MemAvailable") })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const MEMORY: Memory = Memory { total: 1000 * MIB, available: 500 * MIB };

    fn fill(bytes: u64, inodes: u64) -> Fill {
        Fill { used_bytes: bytes * MIB, size_bytes: 100 * MIB, used_inodes: inodes, size_inodes: 1000 }
    }

    #[test]
    fn below_the_marks_nothing_is_done() {
        assert_eq!(decide(fill(69, 699), MEMORY, 900 * MIB), []);
        assert_eq!(decide(Fill { size_inodes: 0, ..fill(10, 0) }, MEMORY, 900 * MIB), []);
    }

    #[test]
    fn bytes_and_inodes_count_alike() {
        for fill in [fill(70, 0), fill(0, 700), fill(84, 849)] {
            assert_eq!(decide(fill, MEMORY, 900 * MIB), [Action::Checkpoint], "{fill:?}");
        }
        let grown = |size, inodes| [Action::Checkpoint, Action::Grow { size, inodes }, Action::Release];
        assert_eq!(decide(fill(85, 0), MEMORY, 900 * MIB), grown(200 * MIB, 1000));
        assert_eq!(decide(fill(0, 850), MEMORY, 900 * MIB), grown(100 * MIB, 2000));
        assert_eq!(decide(fill(100, 1000), MEMORY, 900 * MIB), grown(200 * MIB, 2000));
    }

    #[test]
    fn it_never_grows_beyond_the_ceiling_or_the_memory() {
        let size = |memory, ceiling| match decide(fill(90, 0), memory, ceiling)[..] {
            [Action::Checkpoint, Action::Grow { size, inodes: 1000 }, Action::Release] => size,
            [Action::Checkpoint, Action::Release] => 100 * MIB,
            ref other => panic!("{other:?}"),
        };
        assert_eq!(size(MEMORY, 150 * MIB), 150 * MIB);
        assert_eq!(size(MEMORY, 100 * MIB), 100 * MIB);
        // It never shrinks, whatever the configuration says since.
        assert_eq!(size(MEMORY, 50 * MIB), 100 * MIB);
        // 100 MiB of the memory are its reserve.
        assert_eq!(size(Memory { available: 120 * MIB, ..MEMORY }, 900 * MIB), 110 * MIB);
        assert_eq!(size(Memory { available: 100 * MIB, ..MEMORY }, 900 * MIB), 100 * MIB);
        let inodes = |ceiling| decide(fill(0, 1000), MEMORY, ceiling);
        assert!(inodes(8 * MIB).contains(&Action::Grow { size: 100 * MIB, inodes: 2000 }));
        assert!(inodes(6 * MIB).contains(&Action::Grow { size: 100 * MIB, inodes: 1536 }));
        assert_eq!(inodes(2 * MIB), [Action::Checkpoint, Action::Release]);
    }
}
