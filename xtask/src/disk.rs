//! A throwaway disk: an ext4 image in a file that loses its name before it is used, so that nothing of it is left
//! behind however we end. `mount` gives it a loop device that goes with the mount.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use ephemeral_overlay::mountinfo;
use rustix::mount::{UnmountFlags, unmount};

use crate::packages;

/// A disk image.
#[derive(Debug)]
pub(crate) struct Disk {
    image: File,
}

impl Disk {
    /// An empty ext4 of `bytes` bytes.
    pub(crate) fn create(bytes: u64) -> Result<Self> {
        let disk = Self::unformatted()?;
        disk.image.set_len(bytes).context("ftruncate")?;
        run(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(disk.path()))?;
        Ok(disk)
    }

    /// An empty ext4 all of whose blocks have been written once: no later write pays for the space of the image.
    pub(crate) fn written_once(bytes: u64) -> Result<Self> {
        let disk = Self::unformatted()?;
        let zeros = vec![0; 8 << 20];
        let mut at = 0;
        while at < bytes {
            disk.image.write_all_at(&zeros, at).context("writing a disk image")?;
            at += zeros.len() as u64;
        }
        disk.image.sync_all().context("fsync")?;
        disk.format_anew()?;
        Ok(disk)
    }

    /// Makes a new ext4 on it, which does nothing in the background later.
    pub(crate) fn format_anew(&self) -> Result<()> {
        let options = ["-q", "-F", "-E", "nodiscard,lazy_itable_init=0,lazy_journal_init=0", "-i", "8192"];
        run(Command::new("mkfs.ext4").args(options).arg(self.path()))?;
        self.image.sync_all().context("fsync")
    }

    /// What is on the disk at this moment; what the file system still has in RAM is not.
    pub(crate) fn as_it_is_now(&self) -> Result<Self> {
        let copy = Self::unformatted()?;
        run(Command::new("cp").args(["--sparse=always", "--"]).args([self.path(), copy.path()]))?;
        Ok(copy)
    }

    fn unformatted() -> Result<Self> {
        Ok(Self { image: tempfile::tempfile().context("creating a disk image")? })
    }

    /// A path that leads to the image as long as this process has it open.
    fn path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.image.as_raw_fd()).into()
    }

    /// Mounts it with more options for `mount -o`.
    pub(crate) fn mount(&self, at: &Path, options: &str) -> Result<()> {
        run(Command::new("mount").args(["-t", "ext4", "-o", &format!("loop{options}")]).arg(self.path()).arg(at))
    }
}

/// Bytes that were written so far to the device of a mounted disk (Documentation/block/stat.rst: the seventh field, in
/// sectors).
pub(crate) fn written(mount_point: &Path) -> Result<u64> {
    let device = std::fs::metadata(mount_point)?.dev();
    let path = format!("/sys/dev/block/{}:{}/stat", rustix::fs::major(device), rustix::fs::minor(device));
    let text = std::fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let sectors = text.split_whitespace().nth(6).context("statistics without the sectors written")?;
    Ok(sectors.parse::<u64>()? * 512)
}

/// Runs a program of the system and expects it to succeed.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command
        .env("PATH", packages::path())
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("running {program}"))?;
    if !output.status.success() {
        bail!("{program}: {}; {}", output.status, String::from_utf8_lossy(&output.stderr).trim_end());
    }
    Ok(())
}

/// The mount points at and below `directory` with their types, in the order in which they were mounted.
pub(crate) fn mounts_below(directory: &Path) -> Result<Vec<(PathBuf, String)>> {
    let info = std::fs::read("/proc/self/mountinfo").context("read /proc/self/mountinfo")?;
    let mounts = mountinfo::parse(&info).into_iter().filter(|mount| mount.mount_point.starts_with(directory));
    Ok(mounts.map(|mount| (mount.mount_point, mount.fs_type)).collect())
}

/// Takes away all mounts below `directory` (and at it, if it is one), whatever uses them.
pub(crate) fn detach_all(directory: &Path) -> Result<()> {
    for (mount_point, _) in mounts_below(directory)?.iter().rev() {
        unmount(mount_point, UnmountFlags::DETACH).with_context(|| format!("umount2 {}", mount_point.display()))?;
    }
    Ok(())
}
