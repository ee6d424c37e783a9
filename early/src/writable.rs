//! Read-only file systems that are made writable for a merge, and read-only again after it.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::Result;
use ephemeral_overlay::error::At;
use ephemeral_overlay::layout::open_host_dir;
use rustix::fs::{StatVfsMountFlags, fstat, statvfs, syncfs};

use crate::sys;

/// The file systems that were made writable, by device, each with a mount of it.
#[derive(Debug)]
pub struct Writable(BTreeMap<u64, PathBuf>);

impl Writable {
    /// Remounts the file systems at `paths`, where they are read-only. A superblock is remounted through any of its
    /// mounts. What does not exist or is no mount point (a root in a directory) is passed over.
    ///
    /// # Errors
    /// When the kernel refuses. What was made writable before is read-only again.
    pub fn make(paths: impl IntoIterator<Item = PathBuf>) -> Result<Self> {
        let mut all = Self(BTreeMap::new());
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
        let Ok(directory) = open_host_dir(&path) else { return Ok(()) };
        let device = fstat(&directory).at("fstat", &path)?.st_dev;
        let read_only = statvfs(&path).at("statvfs", &path)?.f_flag.contains(StatVfsMountFlags::RDONLY);
        if read_only && !self.0.contains_key(&device) && sys::remount(&path, false)? {
            self.0.insert(device, path);
        }
        Ok(())
    }

    /// Brings everything to the disk and remounts it read-only.
    ///
    /// # Errors
    /// When that fails for one of them.
    pub fn undo(self) -> Result<()> {
        for path in self.0.values() {
            syncfs(open_host_dir(path)?).at("syncfs", path)?;
            sys::remount(path, true)?;
        }
        Ok(())
    }
}
