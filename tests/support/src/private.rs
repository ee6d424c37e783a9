//! A mount namespace of our own, for tests that mount.

use nix::sched::{CloneFlags, unshare};
use rustix::mount::{MountPropagationFlags, mount_change};

/// Puts the whole process into a mount namespace of its own, out of which nothing propagates. To be called before
/// there is a second thread.
///
/// # Errors
/// Why not, in words.
pub fn enter() -> Result<(), String> {
    if !rustix::process::geteuid().is_root() {
        return Err("they need root, for mounts, loop devices and trusted.* attributes".to_owned());
    }
    unshare(CloneFlags::CLONE_NEWNS).map_err(|error| format!("no mount namespace can be had: {error}"))?;
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", private).map_err(|error| format!("mount --make-rprivate /: {error}"))
}
