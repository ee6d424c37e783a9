//! `syncd last-stage`: at the end of a shutdown, when every process is dead and the overlays are unmounted, what is
//! still in RAM goes into a last checkpoint, and everything is merged. The machine then boots the same with or without
//! the hook. It depends on no unit having run.

use std::path::{Path, PathBuf};

use ephemeral_overlay::error::{At, SystemError};
use ephemeral_overlay::layout::open_host_dir;
use ephemeral_overlay::mountinfo;
use rustix::fs::{StatVfsMountFlags, statvfs, syncfs};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount_remount, unmount};
use syncd::Error;
use syncd::progress::Progress;
use syncd::store::Store;
use syncd::system::System;

use super::report::{TargetReport, finish};
use super::{Outcome, checkpoint, merge};

pub(crate) fn run(system: &System, progress: &Progress, json: bool) -> anyhow::Result<Outcome> {
    let targets = system.mounted_targets(&[])?;
    if targets.is_empty() {
        tracing::info!("nothing is in RAM");
        drop_mounts(system);
        return finish(Vec::new(), json);
    }
    let writable = Writable::make(system, &targets)?;
    // The bind is writable with its superblock; the root's own mount keeps a read-only flag beside it. A store that was
    // made after the boot has no bind, and then the root was remounted as a whole.
    let bind = system.layout.store_bind();
    let store = Store::open(&if bind.join("targets").is_dir() { bind } else { system.store_path()? })?;
    // All is saved before anything is merged: a merge may take the room that the last checkpoint of another target needs.
    for target in &targets {
        if let Err(error) = checkpoint::last(system, &store, target) {
            // It is tried again below, and said there.
            tracing::debug!("{}: {:#}", target.display(), anyhow::Error::from(error));
        }
    }
    let mut reports = Vec::new();
    for target in &targets {
        let report = match merge::one(system, &store, target, false, progress) {
            Ok(Some(report)) => report,
            Ok(None) => continue,
            // A survivor: what it writes from now on is lost, what it wrote is not.
            Err(Error::Alive { why, .. }) => match checkpoint::last(system, &store, target) {
                Ok(()) => TargetReport::new(target, Outcome::Partial, format!("left pending for the next boot: {why}")),
                Err(error) => failed(target, error),
            },
            Err(error) => failed(target, error),
        };
        report.say();
        reports.push(report);
    }
    drop(store);
    writable.undo()?;
    // What could be neither merged nor saved is nowhere but in RAM.
    if reports.iter().all(|report| report.status != Outcome::Failed.status()) {
        drop_mounts(system);
    }
    finish(reports, json)
}

fn failed(target: &Path, error: Error) -> TargetReport {
    TargetReport::new(target, Outcome::Failed, format!("{:#}; its checkpoints stay", anyhow::Error::from(error)))
}

/// The mounts that were made writable again.
struct Writable(Vec<PathBuf>);

impl Writable {
    /// Remounts what lower and store are reached through. systemd-shutdown leaves the root read-only, and every mount
    /// below `/run/initramfs` with a read-only flag of its own beside that of the superblock (measured on 257).
    fn make(system: &System, targets: &[PathBuf]) -> Result<Self, Error> {
        let mut all = Self(Vec::new());
        let root = system.layout.root().to_path_buf();
        let binds = targets.iter().map(|target| system.layout.lower(target));
        for path in [root].into_iter().chain(binds).chain([system.layout.store_bind()]) {
            if !path.is_dir() || !statvfs(&path).at("statvfs", &path)?.f_flag.contains(StatVfsMountFlags::RDONLY) {
                continue;
            }
            match mount_remount(&path, MountFlags::empty(), c"") {
                // Not a mount point: a root in a directory.
                Err(Errno::INVAL) => continue,
                other => other.at("mount -o remount,rw", &path)?,
            }
            all.0.push(path);
        }
        Ok(all)
    }

    fn undo(self) -> Result<(), SystemError> {
        for path in self.0.iter().rev() {
            syncfs(open_host_dir(path)?).at("syncfs", path)?;
            mount_remount(path, MountFlags::RDONLY, c"").at("mount -o remount,ro", path)?;
        }
        Ok(())
    }
}

/// Takes our mounts away, so that what they are on (LUKS, LVM, md) can be stopped.
fn drop_mounts(system: &System) {
    let Ok(text) = std::fs::read("/proc/self/mountinfo") else { return };
    for mount in mountinfo::parse(&text).iter().rev() {
        let ours = mount.mount_point.starts_with(system.layout.run_dir());
        if ours && let Err(error) = unmount(&mount.mount_point, UnmountFlags::empty()) {
            tracing::warn!("umount2 {}: {error}", mount.mount_point.display());
        }
    }
}
