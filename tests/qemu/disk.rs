//! A disk image: made of a tree, and looked at from outside, without booting.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::mount::{UnmountFlags, mount_bind, unmount};
use tempfile::TempDir;

use crate::tools::run;

/// The file system of a root disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Fs {
    Ext4,
    Btrfs,
    Xfs,
}

impl Fs {
    /// Its name, which is also that of its module.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Btrfs => "btrfs",
            Self::Xfs => "xfs",
        }
    }

    /// The smallest disk in MiB on which it is at ease.
    pub(crate) fn least(self) -> u64 {
        match self {
            Self::Ext4 => 64,
            Self::Btrfs => 256,
            Self::Xfs => 320,
        }
    }
}

/// What is on a disk, after the file system's log has been replayed.
#[derive(Debug)]
pub(crate) struct Disk {
    mount: Mount,
}

impl Disk {
    /// Makes an image of `megabytes` with the tree at `root` in it, owners and all.
    pub(crate) fn create(image: &Path, fs: Fs, megabytes: u64, root: &Path) -> Result<()> {
        fs::File::create(image)
            .and_then(|file| file.set_len(megabytes << 20))
            .with_context(|| format!("create {}", image.display()))?;
        run(&format!("mkfs.{}", fs.name()), &["-q".as_ref(), image.as_os_str()])?;
        let mount = Mount::of(image, fs)?;
        run("cp", &["-a".as_ref(), root.join(".").as_os_str(), mount.path.as_os_str()])?;
        mount.end()
    }

    /// Changes what is on an image, by `change`, which is given the mounted root.
    pub(crate) fn edit(image: &Path, fs: Fs, change: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        let mount = Mount::of(image, fs)?;
        change(&mount.path)?;
        mount.end()
    }

    /// The contents of an image, which stays as it is: its log is replayed, and it is checked, in a copy.
    pub(crate) fn of(image: &Path, fs: Fs) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("eo-disk-").tempdir().context("mkdtemp")?;
        let copy = directory.path().join("image");
        // Sparse, as fs::copy would not leave it.
        run("cp", &["--sparse=always".as_ref(), image.as_os_str(), copy.as_os_str()])?;
        // Not what we are about, but a damaged file system would explain a lot.
        Mount::of(&copy, fs)?.end()?;
        match fs {
            Fs::Ext4 => run("e2fsck", &["-f".as_ref(), "-n".as_ref(), copy.as_os_str()])?,
            Fs::Btrfs => run("btrfs", &["check".as_ref(), copy.as_os_str()])?,
            Fs::Xfs => run("xfs_repair", &["-n".as_ref(), copy.as_os_str()])?,
        };
        let mut mount = Mount::of(&copy, fs)?;
        mount.image = Some(directory);
        Ok(Self { mount })
    }

    /// Where a path of the disk lies here.
    pub(crate) fn at(&self, path: &str) -> PathBuf {
        self.mount.path.join(path.trim_start_matches('/'))
    }

    /// What stands in a file, without the newline at its end; `None`: there is none.
    pub(crate) fn file(&self, path: &str) -> Option<String> {
        let text = fs::read_to_string(self.at(path)).ok()?;
        Some(text.trim_end_matches('\n').to_owned())
    }

    /// Whether a merge of a target has begun and not ended.
    pub(crate) fn is_half_merged(&self, target: &str) -> bool {
        self.store(target).join("merging").exists()
    }

    /// The names of a target's checkpoint files, sorted.
    pub(crate) fn checkpoints(&self, target: &str) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.store(target)) else { return Vec::new() };
        let names = entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned());
        let mut names: Vec<String> =
            names.filter(|name| Path::new(name).extension().is_some_and(|extension| extension == "ckpt")).collect();
        names.sort();
        names
    }

    /// Mounts `/proc` on it, for its programs; it goes with the disk.
    pub(crate) fn mount_proc(&self) {
        let at = self.at("/proc");
        if !at.join("self").exists() {
            mount_bind("/proc", &at).unwrap();
        }
    }

    /// A target's directory in the store, which is in `/persist`, or is what the disk is there for.
    pub(crate) fn store(&self, target: &str) -> PathBuf {
        let own = self.at("/ephemeral-overlay");
        let store = if own.exists() { own } else { self.at("/persist/ephemeral-overlay") };
        store.join("targets").join(ephemeral_overlay::layout::target_name(Path::new(target)))
    }
}

/// An image that is mounted in this process's own mount namespace.
#[derive(Debug)]
struct Mount {
    path: PathBuf,
    /// What it is mounted on; removed after it was unmounted.
    _directory: TempDir,
    /// Where the image lies, if it goes with the mount.
    image: Option<TempDir>,
}

impl Mount {
    fn of(image: &Path, fs: Fs) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("eo-mount-").tempdir().context("mkdtemp")?;
        let path = directory.path().join("root");
        fs::create_dir(&path).context("mkdir")?;
        // Of a disk and its copies more than one may be mounted.
        let options = if fs == Fs::Xfs { "loop,nouuid" } else { "loop" };
        run("mount", &["-o".as_ref(), options.as_ref(), image.as_os_str(), path.as_os_str()])?;
        Ok(Self { path, _directory: directory, image: None })
    }

    fn end(self) -> Result<()> {
        unmount(&self.path, UnmountFlags::empty()).with_context(|| format!("umount {}", self.path.display()))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // An error means that it was unmounted already.
        unmount(&self.path, UnmountFlags::DETACH).ok();
    }
}
