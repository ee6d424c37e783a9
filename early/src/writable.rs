//! Read-only mounts that are made writable for a merge, and read-only again after it.

use std::path::PathBuf;

use anyhow::Result;
use ephemeral_overlay::error::At;
use ephemeral_overlay::layout::open_host_dir;
use rustix::fs::{StatVfsMountFlags, statvfs, syncfs};

use crate::sys;

/// The mounts that were made writable.
#[derive(Debug)]
pub struct Writable(Vec<PathBuf>);

impl Writable {
    /// Remounts what is mounted at `paths`, where it is read-only: by its superblock, or by a flag of its own, which
    /// systemd-shutdown gives to every mount below `/run/initramfs` (measured on 257). What does not exist or is no mount
    /// point (a root in a directory) is passed over.
    ///
    /// # Errors
    /// When the kernel refuses. What was made writable before is read-only again.
    pub fn make(paths: impl IntoIterator<Item = PathBuf>) -> Result<Self> {
        let mut all = Self(Vec::new());
        for path in paths {
            if let Err(error) = all.add(path) {
                // The refusal is what is reported.
                let _said_already = all.undo();
                return Err(error);
            }
        }
        Ok(all)
    }

    fn add(&mut self, path: PathBuf) -> Result<()> {
        if !path.is_dir() {
            return Ok(());
        }
        let read_only = statvfs(&path).at("statvfs", &path)?.f_flag.contains(StatVfsMountFlags::RDONLY);
        if read_only && sys::remount(&path, false)? {
            self.0.push(path);
        }
        Ok(())
    }

    /// Brings everything to the disk and makes it read-only.
    ///
    /// # Errors
    /// When that fails for one of them.
    pub fn undo(self) -> Result<()> {
        for path in self.0.iter().rev() {
            syncfs(open_host_dir(path)?).at("syncfs", path)?;
            sys::remount(path, true)?;
        }
        Ok(())
    }
}
