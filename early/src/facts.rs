//! What the root looks like: everything the planner wants to know, and nothing else.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use ephemeral_overlay::config::Config;
use ephemeral_overlay::error::{At, SystemError};
use ephemeral_overlay::fstab::Entry;
use ephemeral_overlay::layout::{LoadError, target_name};
use ephemeral_overlay::mountinfo::Mount;
use ephemeral_overlay::{Layout, fstab, mountinfo};
use rustix::fs::{FileType, OFlags, fstat};
use rustix::io::Errno;

use crate::chains;

/// What stands at a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// Nothing.
    Missing,
    /// A directory, on the file system of this device number.
    Directory(u64),
    /// A symlink, as the last component or on the way.
    Symlink,
    /// Something else.
    Other,
}

/// The facts that a plan is made of.
#[derive(Debug)]
pub struct Facts {
    /// Total RAM in bytes.
    pub total_ram: u64,
    /// The mounts below the root that exist now.
    pub mounted: Vec<Mount>,
    /// The mounts that fstab names.
    pub fstab: Vec<Entry>,
    /// What stands at each path of interest.
    pub found: BTreeMap<PathBuf, Found>,
    /// The file system that `persist.root` is on, or would be created on.
    pub persist_device: u64,
    /// Targets whose chain is still in the store, or may be.
    pub pending: Vec<PathBuf>,
}

impl Facts {
    /// What stands at `path`.
    #[must_use]
    pub fn at(&self, path: &Path) -> Found {
        self.found.get(path).copied().unwrap_or(Found::Missing)
    }

    /// The mount point that `path` lies on according to fstab, when nothing is mounted there yet.
    #[must_use]
    pub fn missing(&self, path: &Path) -> Option<&Path> {
        fstab::missing(&self.fstab, &self.mounted, path)
    }
}

/// Looks at the root.
///
/// # Errors
/// When it, its fstab or the mount table cannot be read.
pub fn observe(layout: &Layout, config: &Config) -> Result<Facts, LoadError> {
    let info = rustix::system::sysinfo();
    let kept = config.persist.var_cache.iter().flat_map(|name| {
        let (from, to) = kept_paths(config, name);
        [from, to]
    });
    let mut found = BTreeMap::new();
    for path in config.overlay.dirs.iter().chain(config.tmpfs.mounts.keys()).cloned().chain(kept) {
        found.insert(path.clone(), look(layout, &path)?);
    }
    // After looking, which makes an automount mount.
    let mountinfo = std::fs::read("/proc/self/mountinfo").at("read", "/proc/self/mountinfo")?;
    let root = std::fs::canonicalize(layout.root()).at("realpath", layout.root())?;
    let mounted = mountinfo::below(&mountinfo::parse(&mountinfo), &root);
    let persist_device = config
        .persist
        .root
        .ancestors()
        .find_map(|path| match look(layout, path) {
            Ok(Found::Directory(device)) => Some(device),
            _ => None,
        })
        .unwrap_or_default();
    let pending = chains::pending(layout, &config.persist.root);
    let is_pending = |dir: &&PathBuf| pending.as_ref().map_or(true, |names| names.contains(&target_name(dir)));
    let pending = config.overlay.dirs.iter().filter(is_pending).cloned().collect();
    Ok(Facts {
        total_ram: info.totalram.saturating_mul(u64::from(info.mem_unit)),
        mounted,
        fstab: layout.fstab()?,
        found,
        persist_device,
        pending,
    })
}

/// Where a persistent cache is found on a system that never ran us, and where it is kept.
pub(crate) fn kept_paths(config: &Config, name: &str) -> (PathBuf, PathBuf) {
    let from = Path::new("/var/cache").join(name);
    let to = config.persist.root.join("var/cache").join(name);
    (from, to)
}

fn look(layout: &Layout, path: &Path) -> Result<Found, SystemError> {
    let opened = layout.open_dir(path).and_then(|fd| fstat(fd).at("fstat", path));
    match opened {
        Ok(stat) => Ok(Found::Directory(stat.st_dev)),
        Err(error) => match error.errno() {
            Some(Errno::NOENT) => Ok(Found::Missing),
            Some(Errno::LOOP) => Ok(Found::Symlink),
            Some(Errno::NOTDIR) => {
                let fd = layout.open(path, OFlags::PATH | OFlags::NOFOLLOW)?;
                let kind = FileType::from_raw_mode(fstat(fd).at("fstat", path)?.st_mode);
                Ok(if kind == FileType::Symlink { Found::Symlink } else { Found::Other })
            }
            _ => Err(error),
        },
    }
}
