//! `/run/mount/utab`: the options of mounts that the kernel does not know.
//!
//! A mount that has `x-initrd.mount` there is left alone by systemd until systemd-shutdown, when every process is dead
//! (measured on 252 to 262). Any other is unmounted together with everything else, and what a late service writes then
//! goes to the disk below, where a merge meets it as a conflict. `/run` is moved to the root with what is in it.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use anyhow::Result;
use ephemeral_overlay::error::At;
use ephemeral_overlay::{Layout, mountinfo};
use rustix::fs::{CWD, FlockOperation, Mode, OFlags, fchmod, flock, openat};

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
        let mut line = Vec::new();
        for (key, path) in [("SRC", &mount.source), (" TARGET", path), (" ROOT", &mount.root)] {
            line.extend(key.as_bytes());
            line.push(b'=');
            line.extend(mountinfo::escape(path));
        }
        line.extend(b" OPTS=x-initrd.mount");
        lines.push(line);
    }
    let path = layout.utab();
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).at("mkdir", parent)?;
    }
    // libmount's own lock: it writes the file anew, by a rename. A running systemd learns of a new line when the lock is
    // closed, if it was open for reading only, or `utab.event` is, since util-linux 2.39.
    let lock_path = path.with_extension("lock");
    let lock = open_or_create(&lock_path, OFlags::RDONLY)?;
    flock(&lock, FlockOperation::LockExclusive).at("flock", &lock_path)?;
    // What was mounted there before had the same line. The others' lines stay.
    let known = std::fs::read(&path).unwrap_or_default();
    lines.retain(|line| !known.split(|&byte| byte == b'\n').any(|known| known == line));
    let lines: Vec<u8> = lines.into_iter().flat_map(|line| [line, b"\n".to_vec()].concat()).collect();
    let mut file = File::from(open_or_create(&path, OFlags::WRONLY | OFlags::APPEND)?);
    file.write_all(&lines).at("write", &path)?;
    drop(open_or_create(&path.with_extension("event"), OFlags::WRONLY)?);
    Ok(())
}

fn open_or_create(path: &Path, flags: OFlags) -> Result<OwnedFd> {
    let mode = Mode::RUSR | Mode::WUSR | Mode::RGRP | Mode::ROTH;
    let file = openat(CWD, path, flags | OFlags::CREATE | OFlags::CLOEXEC, mode).at("openat", path)?;
    // Everybody's mount(8) reads it, whatever umask our unit has.
    fchmod(&file, mode).at("fchmod", path)?;
    Ok(file)
}
