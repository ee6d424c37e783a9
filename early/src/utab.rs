//! `/run/mount/utab`: the options of mounts that the kernel does not know.
//!
//! A mount that has `x-initrd.mount` there is left alone by systemd until systemd-shutdown, when every process is dead
//! (measured on 252 to 262). Any other is unmounted together with everything else, and what a late service writes then
//! goes to the disk below, where a merge meets it as a conflict. `/run` is moved to the root with what is in it.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::PathBuf;

use anyhow::Result;
use ephemeral_overlay::error::At;
use ephemeral_overlay::{Layout, mountinfo};
use rustix::fs::{FlockOperation, flock};

/// Has systemd keep what is mounted at `paths` of the root to the end of a shutdown.
pub(crate) fn keep_to_the_end(layout: &Layout, paths: &[PathBuf]) -> Result<()> {
    if paths.is_empty() {
        return Ok(());
    }
    let text = std::fs::read("/proc/self/mountinfo").at("read", "/proc/self/mountinfo")?;
    let root = std::fs::canonicalize(layout.root()).at("realpath", layout.root())?;
    let mounts = mountinfo::below(&mountinfo::parse(&text), &root);
    let mut lines = Vec::new();
    for path in paths {
        // The topmost stands last. libmount finds a line's mount by these three.
        let Some(mount) = mounts.iter().rfind(|mount| mount.mount_point == *path) else { continue };
        for (key, path) in [("SRC", &mount.source), (" TARGET", path), (" ROOT", &mount.root)] {
            lines.extend(key.as_bytes());
            lines.push(b'=');
            lines.extend(mountinfo::escape(path));
        }
        lines.extend(b" OPTS=x-initrd.mount\n");
    }
    let path = layout.utab();
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).at("mkdir", parent)?;
    }
    // libmount's own lock: it writes the file anew, by a rename.
    let lock_path = path.with_extension("lock");
    let lock = OpenOptions::new().append(true).create(true).open(&lock_path).at("open", &lock_path)?;
    flock(&lock, FlockOperation::LockExclusive).at("flock", &lock_path)?;
    // The others' lines stay.
    let mut file = OpenOptions::new().append(true).create(true).open(&path).at("open", &path)?;
    Ok(file.write_all(&lines).at("write", &path)?)
}
