//! The file systems that a crash is tried on, each as its users have it.

use std::ffi::CStr;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::ValueEnum;
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use super::device::PATIENCE;
use crate::disk::run;

/// A file system, with how it is mounted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum FileSystem {
    /// ext4 as it is by default, with data=ordered
    Ext4,
    /// ext4 with data=writeback: names may be there before contents are
    Ext4Writeback,
    /// btrfs
    Btrfs,
    /// XFS
    Xfs,
}

impl FileSystem {
    /// All of them.
    pub(crate) const ALL: [Self; 4] = [Self::Ext4, Self::Ext4Writeback, Self::Btrfs, Self::Xfs];

    /// How large a disk it is given: not much more than it takes.
    pub(crate) fn bytes(self) -> u64 {
        match self {
            Self::Ext4 | Self::Ext4Writeback => 64 << 20,
            Self::Btrfs => 256 << 20,
            Self::Xfs => 320 << 20,
        }
    }

    /// Makes one in a file.
    pub(crate) fn make(self, image: &Path) -> Result<()> {
        let (program, arguments): (_, &[&str]) = match self {
            // What is otherwise written in the background, later, would be recorded.
            Self::Ext4 | Self::Ext4Writeback => {
                ("mkfs.ext4", &["-q", "-F", "-b", "4096", "-E", "lazy_itable_init=0,lazy_journal_init=0"])
            }
            Self::Btrfs => ("mkfs.btrfs", &["-q", "-f"]),
            Self::Xfs => ("mkfs.xfs", &["-q", "-f"]),
        };
        run(Command::new(program).args(arguments).arg(image))
    }

    /// Mounts one; its journal is replayed.
    pub(crate) fn mount(self, device: &Path, at: &Path) -> Result<()> {
        let (kind, options): (_, Option<&CStr>) = match self {
            Self::Ext4 => ("ext4", None),
            Self::Ext4Writeback => ("ext4", Some(c"data=writeback")),
            Self::Btrfs => ("btrfs", None),
            Self::Xfs => ("xfs", None),
        };
        let begun = Instant::now();
        loop {
            match mount(device, at, kind, MountFlags::empty(), options) {
                // A program that is just being started holds, until it runs, whatever was open here.
                Err(Errno::BUSY) if begun.elapsed() < PATIENCE => std::thread::sleep(Duration::from_millis(10)),
                other => return other.with_context(|| format!("mount {} as {kind}", device.display())),
            }
        }
    }

    /// Its name on the command line.
    pub(crate) fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }
}

/// Unmounts, and so writes everything. What was detached a moment ago may still hold it.
pub(crate) fn unmount_for_good(at: &Path) -> Result<()> {
    let begun = Instant::now();
    loop {
        match unmount(at, UnmountFlags::empty()) {
            Err(Errno::BUSY) if begun.elapsed() < PATIENCE => std::thread::sleep(Duration::from_millis(10)),
            other => return other.with_context(|| format!("umount2 {}", at.display())),
        }
    }
}
