//! `syncd last-stage`: at the end of a shutdown, when every process is dead and the overlays are unmounted, what is
//! still in RAM goes into a last checkpoint, and everything is merged. The machine then boots the same with or without
//! the hook. It depends on no unit having run.

use std::path::Path;

use early::writable::Writable;
use ephemeral_overlay::mountinfo;
use rustix::mount::{UnmountFlags, unmount};
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
    // systemd-shutdown left them read-only. One that cannot be written to must not keep the others from being saved.
    let root = system.layout.root().to_path_buf();
    let binds = targets.iter().map(|target| system.layout.lower(target)).chain([system.layout.store_bind()]);
    let make = |path| Writable::make([path]).inspect_err(|error| tracing::warn!("{error:#}")).ok();
    let writable: Vec<_> = [root].into_iter().chain(binds).filter_map(make).collect();
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
        let report = match merge::one(system, &store, target, false, false, progress) {
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
    writable.into_iter().rev().try_for_each(Writable::undo)?;
    // What could be neither merged nor saved is nowhere but in RAM.
    if reports.iter().all(|report| report.status != Outcome::Failed.status()) {
        drop_mounts(system);
    }
    finish(reports, json)
}

fn failed(target: &Path, error: Error) -> TargetReport {
    TargetReport::new(target, Outcome::Failed, format!("{:#}; its checkpoints stay", anyhow::Error::from(error)))
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
