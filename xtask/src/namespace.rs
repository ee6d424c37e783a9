//! A mount namespace of our own. Nothing that is mounted in it is seen outside, and all of it goes with the last
//! process in it, however that process ends; a loop device that `mount` set up goes with its mount.

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, unshare};
use rustix::mount::{MountPropagationFlags, mount_change};

/// Says at once, before anything is built, that only root can do this.
pub(crate) fn require_root() -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!("this mounts file systems, in a mount namespace of its own: run it as root");
    }
    Ok(())
}

/// Moves this process, and with it all that it starts from now on, into a private mount namespace.
pub(crate) fn enter() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNS).context("unshare(CLONE_NEWNS)")?;
    // Where systemd runs, / is shared: without this every mount would show up in the namespace that we came from.
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).context("mount --make-rprivate /")
}
