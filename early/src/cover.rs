//! The cover: lower's directory bound over the target itself, read-only.
//!
//! When an overlay is unmounted the target shows the disk. Whoever wrote there while a merge does would lose it to the
//! merge, or would hold a file open that nobody sees any more. Under the cover nobody can. The next overlay is mounted on
//! top of it, so that from then on there is no moment between the two.

use std::os::fd::AsFd;
use std::path::Path;

use anyhow::Result;
use ephemeral_overlay::Layout;
use ephemeral_overlay::error::At;
use ephemeral_overlay::layout::open_host_dir;
use ephemeral_overlay::mountinfo::{self, Mount};
use ephemeral_overlay::state::BootState;
use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};

use crate::sys::{self, Tree};

/// A cover that is not on its target yet. Everything that may fail is behind it.
#[derive(Debug)]
pub struct Cover(Tree);

impl Cover {
    /// Makes the cover of `target`, whose overlay is to be unmounted. It is noted in `state` before it is there. `None`
    /// where it lies under the overlay since an earlier time.
    ///
    /// # Errors
    /// When it cannot be made or noted.
    pub fn prepare(layout: &Layout, target: &Path, state: &mut BootState) -> Result<Option<Self>> {
        let number = state.entry(target).and_then(|entry| entry.cover);
        let mounts = mounts_on(layout, target)?;
        if number.is_some_and(|number| mounts.iter().any(|mount| mount.id == number)) {
            return Ok(None);
        }
        let at = layout.cover(target);
        std::fs::create_dir_all(&at).at("mkdir", &at)?;
        // A mount can be made read-only only where it is attached (mount_setattr(2) is not in our libraries), and must
        // not be writable for a moment on the target.
        sys::bind_privately(open_host_dir(&layout.lower(target))?, &at)?;
        let tree = sys::read_only_bind(&at, true).and_then(|()| Tree::of(open_host_dir(&at)?));
        sys::detach(&at);
        let tree = tree?;
        let number = tree.number()?;
        if let Some(entry) = state.entry(target) {
            entry.cover = Some(number);
        }
        state.write(&layout.boot_state())?;
        Ok(Some(Self(tree)))
    }

    /// Takes it out of `state`: it is not on `target`.
    ///
    /// # Errors
    /// When that cannot be noted.
    pub fn forget(layout: &Layout, target: &Path, state: &mut BootState) -> Result<()> {
        if let Some(entry) = state.entry(target) {
            entry.cover = None;
        }
        Ok(state.write(&layout.boot_state())?)
    }

    /// Puts it on `target`.
    ///
    /// # Errors
    /// Whatever `move_mount` says.
    pub fn attach(&self, layout: &Layout, target: &Path) -> Result<()> {
        self.0.attach(layout.open_dir(target)?.as_fd())
    }
}

/// Makes the cover that is on `target` read-only again: it may have been left to somebody, writable.
///
/// # Errors
/// When somebody writes through it.
pub fn close(layout: &Layout, target: &Path) -> Result<()> {
    sys::read_only_bind(&layout.below_root(target), true)
}

/// Takes the cover of `target` away, if it has one and nothing is mounted on that. Somebody who looks at the directory
/// through it keeps it, writable.
///
/// # Errors
/// When it can neither be unmounted nor made writable.
pub fn uncover(layout: &Layout, target: &Path, state: &mut BootState) -> Result<()> {
    if !is_covered(layout, target, state)? {
        return Ok(());
    }
    let at = layout.below_root(target);
    match unmount(&at, UnmountFlags::empty()) {
        Err(Errno::BUSY) => return sys::read_only_bind(&at, false),
        other => other.at("umount2", &at)?,
    }
    Cover::forget(layout, target, state)
}

/// Whether what one sees at `target` is its cover.
///
/// # Errors
/// When the mount table cannot be read.
pub fn is_covered(layout: &Layout, target: &Path, state: &BootState) -> Result<bool> {
    let cover = state.targets.iter().find(|entry| entry.path == target).and_then(|entry| entry.cover);
    let top = mounts_on(layout, target)?.last().map(|mount| mount.id);
    Ok(cover.is_some() && top == cover)
}

/// What is mounted on `target`, the topmost last.
fn mounts_on(layout: &Layout, target: &Path) -> Result<Vec<Mount>> {
    let text = std::fs::read("/proc/self/mountinfo").at("read", "/proc/self/mountinfo")?;
    let root = std::fs::canonicalize(layout.root()).at("realpath", layout.root())?;
    let mut mounts = mountinfo::below(&mountinfo::parse(&text), &root);
    mounts.retain(|mount| mount.mount_point == target);
    Ok(mounts)
}
