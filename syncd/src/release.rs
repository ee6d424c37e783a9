//! Takes an overlay away from a running system, so that it can be merged, and puts it back where that fails.
//!
//! Nothing is unmounted that is in use, and nothing lazily. From the unmount on the target shows the cover that lies under
//! its overlay (`early::cover`), through which nobody can write: what the merge reads and replaces stays what it is. Whoever
//! opened a directory there is waited for, or the overlay is put back.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;
use std::time::{Duration, Instant};

use early::apply::{mount_again, with_room};
use early::cover;
use ephemeral_overlay::error::At;
use ephemeral_overlay::layout::open_host_dir;
use ephemeral_overlay::state::BootState;
use ephemeral_overlay::{Layout, mountinfo};
use rustix::fs::fstat;
use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};

use crate::error::{Error, Result};
use crate::in_use;
use crate::merge::hide_unfinished;
use crate::store::TargetStore;
use crate::tree::Tree;

/// How long whoever looks at the disk is waited for.
const PATIENCE: Duration = Duration::from_secs(2);

/// Whether the overlay of `target` is what one sees there: not after a release that was cut, or an unmount by hand.
///
/// # Errors
/// When the mount table cannot be read.
pub fn is_mounted(layout: &Layout, target: &Path) -> Result<bool> {
    let text = fs::read("/proc/self/mountinfo").at("read", "/proc/self/mountinfo")?;
    let root = fs::canonicalize(layout.root()).at("realpath", layout.root())?;
    let mounts = mountinfo::below(&mountinfo::parse(&text), &root);
    let top = mounts.iter().rfind(|mount| mount.mount_point == target);
    Ok(top.is_some_and(|mount| mount.fs_type == "overlay" && mount.option("upperdir") == Some(layout.upper(target))))
}

/// Unmounts the overlay of `target`, if nothing uses it, so that the disk is seen and nobody can write to it; else says who
/// does, and leaves it. The caller has locked the boot state.
///
/// # Errors
/// When it cannot be found out, or the disk not be kept from being written to: then the overlay is mounted again.
pub fn take_down(layout: &Layout, target: &Path, state: &mut BootState, store: &TargetStore) -> Result<Option<String>> {
    let failed = |error: anyhow::Error| Error::Mount { path: target.to_path_buf(), source: error };
    if is_mounted(layout, target)? {
        if !cover::has_cover(layout, target, state).map_err(failed)? {
            return Ok(Some(
                "no cover lies under its overlay, which takes Linux 5.8; it is merged at shutdown".to_owned(),
            ));
        }
        let users = || Ok::<_, Error>(in_use::overlay::search(layout, target)?.words());
        if let Some(users) = users()? {
            return Ok(Some(users));
        }
        let at = layout.below_root(target);
        match unmount(&at, UnmountFlags::empty()) {
            Err(Errno::BUSY) => {
                return Ok(Some(users()?.unwrap_or_else(|| format!("umount2 {}: somebody uses it", at.display()))));
            }
            other => other.at("umount2", &at)?,
        }
    } else if !shows_the_disk(layout, target)? {
        return Ok(Some("something else is mounted on it".to_owned()));
    }
    let closed = cover::close(layout, target, state).map_err(failed).and_then(|()| wait_until_unused(layout, target));
    if !matches!(closed, Ok(None)) {
        // Where an earlier release was cut, the merge may have begun.
        put_back(layout, target, state, store)?;
    }
    closed
}

/// Whether what one sees at `target` is its directory on disk.
fn shows_the_disk(layout: &Layout, target: &Path) -> Result<bool> {
    let identity = |dir| fstat(dir).map(|stat| (stat.st_dev, stat.st_ino)).at("fstat", target);
    Ok(identity(layout.open_dir(target)?)? == identity(open_host_dir(&layout.lower(target))?)?)
}

/// Waits until nobody has anything of the disk open for writing, or a directory of it at all; else says who does.
///
/// # Errors
/// When that cannot be found out.
pub fn wait_until_unused(layout: &Layout, target: &Path) -> Result<Option<String>> {
    let begun = Instant::now();
    loop {
        let users = in_use::search(layout, target)?.words();
        if users.is_none() || begun.elapsed() > PATIENCE {
            return Ok(users);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Mounts the overlay again on what is in RAM: the target shows the exact state, even after a merge has begun. Upper masks
/// every path that the merge touches, but for the temporary files that it may have left.
///
/// # Errors
/// When it cannot be mounted; what is in RAM is still there. That something could not be hidden or noted is returned, and no
/// reason to show a half merged directory.
pub fn put_back(layout: &Layout, target: &Path, state: &mut BootState, store: &TargetStore) -> Result<Option<Error>> {
    let hidden = with_room(layout, || {
        let (upper, lower) = (Tree::open(&layout.upper(target))?, Tree::open(&layout.lower(target))?);
        hide_unfinished(store, &lower, &upper)
    });
    match mount_again(layout, target, state) {
        Err(error) if !is_mounted(layout, target)? => Err(Error::Mount { path: target.to_path_buf(), source: error }),
        Err(error) => Ok(Some(Error::Mount { path: target.to_path_buf(), source: error })),
        Ok(()) => Ok(hidden.err()),
    }
}

/// Notes that `target` is not to be merged in this boot, and why.
///
/// # Errors
/// When that cannot be noted.
pub fn pin(layout: &Layout, target: &Path, state: &mut BootState, why: &str) -> Result<()> {
    if let Some(entry) = state.entry(target) {
        entry.pinned = Some(why.to_owned());
    }
    Ok(state.write(&layout.boot_state())?)
}

/// Frees the RAM of a target whose upper was merged. The caller has locked the boot state.
///
/// # Errors
/// When the state cannot be written, or the directory not be removed.
pub fn discard(layout: &Layout, target: &Path) -> Result<()> {
    let Some(mut boot) = BootState::read(&layout.boot_state())? else { return Ok(()) };
    for state in boot.targets.iter_mut().filter(|state| state.path == target) {
        state.released = true;
    }
    // First the word, then the deed: upper is of no use any more.
    boot.write(&layout.boot_state())?;
    remove_upper(layout, target)
}

/// Removes the upper directory of a target that was released, if something of it is there.
///
/// # Errors
/// When it cannot be removed.
pub fn remove_upper(layout: &Layout, target: &Path) -> Result<()> {
    match layout.upper(target).parent().map(|directory| (directory, fs::remove_dir_all(directory))) {
        Some((directory, Err(error))) if error.kind() != ErrorKind::NotFound => {
            Err(error).at("unlink", directory).map_err(Into::into)
        }
        _ => Ok(()),
    }
}
