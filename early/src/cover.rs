//! The cover: lower's directory bound over the target itself, read-only, below its overlay from the start.
//!
//! When the overlay is unmounted the target shows the disk. Whoever wrote there while a merge does would lose it to the
//! merge, or would hold a file open that nobody sees any more. The cover is what one sees then, so there is no moment in
//! which anybody could.

use std::os::fd::AsFd;
use std::path::Path;

use anyhow::{Result, bail};
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
pub(crate) struct Cover {
    tree: Tree,
    /// Of its mount, as mountinfo shows it.
    pub(crate) number: u64,
}

impl Cover {
    /// Makes the cover of `target`. `None` where it has one, or where the kernel cannot tell which mount it is (before
    /// Linux 5.8, statx(2)): a target without a cover is not released.
    ///
    /// # Errors
    /// When it cannot be made.
    pub(crate) fn prepare(layout: &Layout, target: &Path, state: &BootState) -> Result<Option<Self>> {
        if has_cover(layout, target, state)? {
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
        Ok(tree.number()?.map(|number| Self { tree, number }))
    }

    /// Puts it on `target`.
    ///
    /// # Errors
    /// Whatever `move_mount` says.
    pub(crate) fn attach(&self, layout: &Layout, target: &Path) -> Result<()> {
        self.tree.attach(layout.open_dir(target)?.as_fd())
    }

    /// Takes it away again, if it is what one sees at `target`: what was to lie on it failed.
    pub(crate) fn remove(&self, layout: &Layout, target: &Path) {
        if mounts_on(layout, target).is_ok_and(|mounts| mounts.last().is_some_and(|mount| mount.id == self.number)) {
            sys::detach(&layout.below_root(target));
        }
    }
}

/// Sees to it that nobody can write to the disk at `target`, which shows it. The cover that lies there may have been left
/// to somebody, writable; a new one is noted in `state` before it is there.
///
/// # Errors
/// When it cannot be covered, or somebody writes through the cover.
pub fn close(layout: &Layout, target: &Path, state: &mut BootState) -> Result<()> {
    if is_covered(layout, target, state)? {
        return sys::read_only_bind(&layout.below_root(target), true);
    }
    let Some(cover) = Cover::prepare(layout, target, state)? else {
        bail!("it has no cover, which takes Linux 5.8: it is brought to the disk by the next shutdown or boot");
    };
    note(layout, target, state, Some(cover.number))?;
    cover.attach(layout, target)
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
    note(layout, target, state, None)
}

/// Whether a cover lies on `target`, below its overlay or not.
///
/// # Errors
/// When the mount table cannot be read.
pub fn has_cover(layout: &Layout, target: &Path, state: &BootState) -> Result<bool> {
    let cover = cover_of(state, target);
    Ok(cover.is_some() && mounts_on(layout, target)?.iter().any(|mount| Some(mount.id) == cover))
}

/// Whether what one sees at `target` is its cover.
///
/// # Errors
/// When the mount table cannot be read.
pub fn is_covered(layout: &Layout, target: &Path, state: &BootState) -> Result<bool> {
    let cover = cover_of(state, target);
    let top = mounts_on(layout, target)?.last().map(|mount| mount.id);
    Ok(cover.is_some() && top == cover)
}

fn cover_of(state: &BootState, target: &Path) -> Option<u64> {
    state.targets.iter().find(|entry| entry.path == target)?.cover
}

fn note(layout: &Layout, target: &Path, state: &mut BootState, cover: Option<u64>) -> Result<()> {
    if let Some(entry) = state.entry(target) {
        entry.cover = cover;
    }
    Ok(state.write(&layout.boot_state())?)
}

/// What is mounted on `target`, the topmost last.
fn mounts_on(layout: &Layout, target: &Path) -> Result<Vec<Mount>> {
    let text = std::fs::read("/proc/self/mountinfo").at("read", "/proc/self/mountinfo")?;
    let root = std::fs::canonicalize(layout.root()).at("realpath", layout.root())?;
    let mut mounts = mountinfo::below(&mountinfo::parse(&text), &root);
    mounts.retain(|mount| mount.mount_point == target);
    Ok(mounts)
}
