//! Room that is kept for the last checkpoint of a shutdown: nothing else will ever have what is in RAM then.
//!
//! The reserve is a file of allocated blocks in which nothing is ever written. It is made beside a checkpoint that was
//! written, so that one which finds nothing changed writes nothing at all, and after it, so that it takes no room
//! from it. It grows with what is in RAM, and never shrinks. It takes at most as much as it leaves to others.
//! It is of no use while a snapshot of the file system holds it, too.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use ephemeral_overlay::error::At;
use rustix::fs::{FallocateFlags, fallocate, statvfs, syncfs};

use super::Store;
use crate::durable;
use crate::error::Result;

const RESERVE: &str = "reserve";
/// A text of five times that length goes into it. A disk that has no room for this has no reserve.
const MIN: u64 = 4 << 20;
/// What is in RAM is mostly logs, which compress well.
const MAX: u64 = 1 << 30;

impl Store {
    /// Sees to it that the reserve can take what is in the tmpfs `ram`, as far as the disk has room for that.
    ///
    /// # Errors
    /// When it cannot be had. What was there before stays.
    pub fn renew_reserve(&self, ram: &Path) -> Result<()> {
        let upper = statvfs(ram).at("statvfs", ram)?;
        // For its name, owner and attributes an inode counts as one more block.
        let used = (upper.f_blocks - upper.f_bfree + upper.f_files - upper.f_ffree) * upper.f_frsize;
        let disk = statvfs(&self.path).at("statvfs", &self.path)?;
        let path = self.path.join(RESERVE);
        let old = match fs::symlink_metadata(&path) {
            // The blocks count, not the length: a copy of the store may be sparse.
            Ok(file) => file.blocks() * 512,
            Err(error) if error.kind() == ErrorKind::NotFound => 0,
            Err(error) => return Err(error).at("lstat", &path).map_err(Into::into),
        };
        let size = size(used, old, disk.f_bavail.saturating_mul(disk.f_frsize));
        if size <= old {
            return Ok(());
        }
        durable::write_file(&self.path, RESERVE, |file| {
            Ok(fallocate(file, FallocateFlags::empty(), 0, size).at("fallocate", &path)?)
        })
    }

    /// Gives the reserve up to whoever writes next; whether there was one.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub fn give_up_reserve(&self) -> Result<bool> {
        if !durable::exists(&self.path.join(RESERVE))? {
            return Ok(false);
        }
        durable::remove_file(&self.path, RESERVE)?;
        // Some file systems give freed blocks out again only when the transaction that freed them is on the disk.
        syncfs(File::open(&self.path).at("open", &self.path)?).at("syncfs", &self.path)?;
        Ok(true)
    }
}

/// How large the reserve should be, with `used` bytes in RAM, `old` in the reserve and `free` on the disk. Powers of two:
/// it is made anew a few times only, and has some room for what comes until then.
fn size(used: u64, old: u64, free: u64) -> u64 {
    let wanted = used.clamp(MIN, MAX).next_power_of_two();
    let half = free.saturating_add(old) / 2;
    let most = half.checked_ilog2().map_or(0, |log| 1 << log);
    let size = wanted.min(most);
    if size < MIN { 0 } else { size }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const PLENTY: u64 = 1 << 40;

    #[test]
    fn it_follows_what_is_in_ram() {
        let sizes = [0, 4 * MIB, 4 * MIB + 1, 100 * MIB, u64::MAX].map(|used| size(used, 0, PLENTY) / MIB);
        assert_eq!(sizes, [4, 4, 8, 128, 1024]);
    }

    #[test]
    fn as_much_as_it_takes_stays_free() {
        let sizes = [0, 8 * MIB - 1, 8 * MIB, 100 * MIB, 256 * MIB].map(|free| size(100 * MIB, 0, free) / MIB);
        assert_eq!(sizes, [0, 0, 4, 32, 128]);
        // Taking it changes nothing: the next look comes to the same.
        for free in [8 * MIB, 100 * MIB, 256 * MIB, PLENTY] {
            let old = size(100 * MIB, 0, free);
            assert_eq!(size(100 * MIB, old, free - old), old);
        }
    }
}
