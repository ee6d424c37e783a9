//! Every mount table of the machine: of each mount namespace that has a process in it, once for each root that its
//! processes have, because a process is shown only what is below its own root.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use ephemeral_overlay::error::{At, SystemError};
use ephemeral_overlay::mountinfo::{self, Mount};
use rustix::io::Errno;

/// What a process sees mounted.
#[derive(Debug)]
pub struct View {
    /// One process with this view.
    pub process: u32,
    /// Device and inode number of its root.
    pub root: (u64, u64),
    /// It is in our own mount namespace.
    pub is_ours: bool,
    /// The mounts, with paths below its root.
    pub mounts: Vec<Mount>,
}

impl View {
    /// Whether its paths begin at the directory `root`.
    pub(crate) fn has_root(&self, root: &fs::Metadata) -> bool {
        self.root == (root.dev(), root.ino())
    }

    /// The overlays among them, with the process.
    pub fn overlays(&self) -> impl Iterator<Item = (u32, &Mount)> {
        self.mounts.iter().filter(|mount| mount.fs_type == "overlay").map(|mount| (self.process, mount))
    }
}

/// All views of all processes.
///
/// # Errors
/// When `/proc` cannot be read.
pub fn views() -> Result<Vec<View>, SystemError> {
    let our_namespace = fs::read_link("/proc/self/ns/mnt").at("readlink", "/proc/self/ns/mnt")?;
    let mut views: BTreeMap<(PathBuf, (u64, u64)), View> = BTreeMap::new();
    for process in processes()? {
        let directory = directory(process);
        // A process that ended since is in no namespace.
        let Ok(namespace) = fs::read_link(directory.join("ns/mnt")) else { continue };
        let Ok(root) = fs::metadata(directory.join("root")) else { continue };
        let root = (root.dev(), root.ino());
        let key = (namespace, root);
        if views.contains_key(&key) {
            continue;
        }
        let path = directory.join("mountinfo");
        let Some(text) = unless_gone(fs::read(&path), "read", &path)? else { continue };
        let is_ours = key.0 == our_namespace;
        views.insert(key, View { process, root, is_ours, mounts: mountinfo::parse(&text) });
    }
    Ok(views.into_values().collect())
}

/// All processes, this one included.
///
/// # Errors
/// When `/proc` cannot be read.
pub fn processes() -> Result<Vec<u32>, SystemError> {
    let mut all = Vec::new();
    for entry in fs::read_dir("/proc").at("getdents64", "/proc")? {
        let entry = entry.at("getdents64", "/proc")?;
        all.extend(entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()));
    }
    Ok(all)
}

/// The open descriptors of a process, each with where it leads; none for one that ended. What was closed since is no use.
///
/// # Errors
/// When they cannot be listed.
pub(crate) fn descriptors(process: u32) -> Result<Vec<(PathBuf, PathBuf)>, SystemError> {
    let path = directory(process).join("fd");
    let Some(entries) = unless_gone(fs::read_dir(&path), "getdents64", &path)? else { return Ok(Vec::new()) };
    let links = entries.flatten().map(|entry| entry.path());
    Ok(links.filter_map(|link| Some((link.clone(), fs::read_link(link).ok()?))).collect())
}

/// The directory of a process.
pub(crate) fn directory(process: u32) -> PathBuf {
    Path::new("/proc").join(process.to_string())
}

/// What a call on a process's directory gave; `None` for one that ended since. A zombie answers `EINVAL`.
pub(crate) fn unless_gone<T>(
    result: std::io::Result<T>,
    call: &'static str,
    path: &Path,
) -> Result<Option<T>, SystemError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) => match Errno::from_io_error(&error) {
            Some(Errno::NOENT | Errno::SRCH | Errno::INVAL) => Ok(None),
            _ => Err(error).at(call, path),
        },
    }
}
