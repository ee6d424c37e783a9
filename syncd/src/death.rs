//! The proof that a target's overlay is dead, without which nothing is ever written to lower: no mount namespace has
//! it, lower is under no overlay, and the kernel gives its upper directory to a probe.

use std::fs;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use early::apply::with_room;
use ephemeral_overlay::Layout;
use ephemeral_overlay::error::{At, SystemError};
use ephemeral_overlay::mountinfo;
use ephemeral_overlay::state::{BootState, TargetState};
use rustix::fs::{fstat, fstatfs};
use rustix::io::Errno;
use rustix::mount::{FsOpenFlags, fsconfig_create, fsconfig_set_string, fsopen};

use crate::error::{Error, Result};
use crate::namespaces::{self, View};
use crate::tree::Tree;

/// `OVERLAYFS_SUPER_MAGIC`, linux/magic.h.
const OVERLAYFS: u64 = 0x794c_7630;

/// Proves that nothing has the overlay of `target` whose directory on disk is `lower`; `state` is what `early`
/// recorded of it in this boot, if this is the system that booted.
///
/// # Errors
/// [`Error::Alive`] with who has it.
pub fn prove(layout: &Layout, target: &Path, state: Option<&TargetState>, lower: &Tree) -> Result<()> {
    let alive = |why: String| Err(Error::Alive { target: target.to_path_buf(), why });
    let is_overlay = |fd: BorrowedFd<'_>| -> Result<bool, SystemError> {
        let kind = fstatfs(fd).at("fstatfs", lower.path())?.f_type;
        Ok(u64::try_from(kind) == Ok(OVERLAYFS))
    };
    let stat = fstat(lower.root()).at("fstat", lower.path())?;
    let root = ephemeral_overlay::layout::open_host_dir(layout.root())?;
    // A whole system on an overlay (a live medium) is one file system; a target's own overlay is another.
    if is_overlay(lower.root())? && stat.st_dev != fstat(root.as_fd()).at("fstat", layout.root())?.st_dev {
        return alive(format!("an overlay is mounted on {}", lower.path().display()));
    }
    let views = namespaces::views()?;
    for (process, mount) in views.iter().flat_map(View::overlays) {
        // A device number is used again once its file system is gone, hence both.
        let is_recorded = state.is_some_and(|state| state.device == mount.device)
            && mount.option("upperdir") == Some(layout.upper(target));
        // The options are strings of that namespace.
        let is_ours = mount.option("lowerdir").is_some_and(|path| {
            fs::metadata(in_root_of(process, &path))
                .is_ok_and(|found| (found.dev(), found.ino()) == (stat.st_dev, stat.st_ino))
        });
        if is_recorded || is_ours {
            return alive(format!(
                "its overlay is mounted on {} in the mount namespace of process {process}; end that process, or wait for the next boot",
                mount.mount_point.display()
            ));
        }
    }
    if state.is_some() && !with_room(layout, || probe(layout, target))? {
        return alive(
            "something still uses its overlay, which is mounted nowhere any more; the next boot merges it".to_owned(),
        );
    }
    Ok(())
}

fn in_root_of(process: u32, path: &Path) -> PathBuf {
    Path::new("/proc").join(process.to_string()).join("root").join(path.strip_prefix("/").unwrap_or(path))
}

/// The mount points of overlays whose upper directory is in our run directory and that `boot` does not know.
///
/// # Errors
/// When the mount table cannot be read.
pub fn unknown_overlays(layout: &Layout, boot: Option<&BootState>) -> Result<Vec<String>, SystemError> {
    let text = fs::read("/proc/self/mountinfo").at("read", "/proc/self/mountinfo")?;
    let known = |device: &str| {
        boot.is_some_and(|boot| boot.targets.iter().any(|state| !state.released && state.device == device))
    };
    let ours = mountinfo::parse(&text).into_iter().filter(|mount| {
        let upper = mount.option("upperdir");
        mount.fs_type == "overlay"
            && upper.is_some_and(|upper| upper.starts_with(layout.ram()))
            && !known(&mount.device)
    });
    Ok(ours.map(|mount| mount.mount_point.display().to_string()).collect())
}

/// Whether the kernel would give upper to a new overlay. With `index=on` it answers EBUSY as long as any reference
/// to the old superblock lives: a lazily unmounted overlay with an open file, a namespace without processes
/// (measured on 6.1, 6.12 and 6.18). The probe leaves marks in upper, which is merged and discarded next.
fn probe(layout: &Layout, target: &Path) -> Result<bool, SystemError> {
    let (lower, upper, work) = (layout.lower(target), layout.upper(target), layout.work(target));
    if !upper.is_dir() {
        return Ok(true);
    }
    let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).at("fsopen overlay", &upper)?;
    let directories = [("lowerdir", &lower), ("upperdir", &upper), ("workdir", &work)];
    for (key, path) in directories {
        fsconfig_set_string(context.as_fd(), key, path.as_path()).at("fsconfig", path)?;
    }
    fsconfig_set_string(context.as_fd(), "index", "on").at("fsconfig index=on", &upper)?;
    match fsconfig_create(context.as_fd()) {
        Ok(()) => Ok(true),
        Err(Errno::BUSY) => Ok(false),
        Err(error) => Err(error).at("fsconfig create overlay", &upper),
    }
}
