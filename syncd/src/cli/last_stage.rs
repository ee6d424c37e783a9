//! `syncd last-stage`: at the end of a shutdown, when every process is dead, what is still in RAM goes into a last
//! checkpoint, and everything is merged. The machine then boots the same with or without the hook. It depends on no unit
//! having run, and on no init: systemd has unmounted the overlays by then, others leave that to us.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use early::writable::Writable;
use early::{cover, sys};
use ephemeral_overlay::error::At;
use ephemeral_overlay::mountinfo::{self, Mount};
use rustix::mount::{UnmountFlags, unmount};
use syncd::Error;
use syncd::progress::Progress;
use syncd::store::Store;
use syncd::system::System;

use super::report::{TargetReport, finish};
use super::{Outcome, checkpoint, merge};

/// Until when a merge may begin. systemd-shutdown gives all that it runs last 90 seconds and then goes on; a merge that is
/// cut is finished at the next boot, but one that did not begin has cost nothing.
const MERGES_BEGIN: Duration = Duration::from_secs(45);

pub(crate) fn run(system: &System, progress: &Progress, json: bool) -> anyhow::Result<Outcome> {
    let targets = system.mounted_targets(&[])?;
    if targets.is_empty() {
        tracing::info!("nothing is in RAM");
        drop_mounts(system);
        return finish(Vec::new(), json);
    }
    let begun = Instant::now();
    unmount_overlays(system)?;
    let mut writable = Vec::new();
    // systemd-shutdown left everything read-only. What cannot be written to must not keep the rest from being saved.
    let mut make = |path: PathBuf| match Writable::make([path]) {
        Ok(made) => writable.push(made),
        Err(error) => tracing::warn!("{error:#}"),
    };
    // The root's own mount keeps a read-only flag beside its superblock's, and a store that was made after the boot has
    // no bind.
    make(system.layout.root().to_path_buf());
    let bind = system.store_bind()?;
    bind.iter().cloned().for_each(&mut make);
    let store = Store::open(&bind.map_or_else(|| system.store_path(), Ok)?)?;
    // All is saved before anything is merged: a merge may take the room that the last checkpoint of another target
    // needs, or the time.
    for target in &targets {
        if let Err(error) = checkpoint::last(system, &store, target) {
            // It is tried again below, and said there.
            tracing::debug!("{}: {:#}", target.display(), anyhow::Error::from(error));
        }
    }
    let mut reports = Vec::new();
    for target in &targets {
        make(system.layout.lower(target));
        let merged = if begun.elapsed() < MERGES_BEGIN {
            merge::one(system, &store, target, false, false, progress)
        } else {
            Err(Error::Alive { target: target.clone(), why: "the shutdown has no time left".to_owned() })
        };
        let report = match merged {
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
    let mut outcome = finish_disks(writable);
    // What could be neither merged nor saved is nowhere but in RAM.
    if reports.iter().all(|report| report.status != Outcome::Failed.status()) {
        drop_mounts(system);
    }
    outcome = outcome.max(finish(reports, json)?);
    Ok(outcome)
}

/// Unmounts the overlays that are still mounted, with what is mounted in them. One that is in use stays, and is saved.
fn unmount_overlays(system: &System) -> anyhow::Result<()> {
    let text = std::fs::read("/proc/self/mountinfo").at("read", "/proc/self/mountinfo")?;
    let mounts = mountinfo::parse(&text);
    for state in system.boot.iter().flat_map(|boot| &boot.targets).filter(|state| !state.released) {
        let at = std::fs::canonicalize(system.layout.below_root(&state.path)).at("realpath", &state.path)?;
        let overlay = mounts.iter().find(|mount| mount.mount_point == at && mount.device == state.device);
        let gone = overlay.map_or(Ok(true), |overlay| unmount_with_inner(&mounts, overlay));
        let found = gone.and_then(|is_gone| if is_gone { find_lower(system, &state.path) } else { Ok(()) });
        if let Err(error) = found {
            // What needs it says so.
            tracing::warn!("{}: {error:#}", state.path.display());
        }
    }
    Ok(())
}

/// Unmounts an overlay with what is mounted in it; says whether it is gone. Where something is in use the rest stays, too.
fn unmount_with_inner(mounts: &[Mount], overlay: &Mount) -> anyhow::Result<bool> {
    // Their order in the table is that in which they were made, which is not that in which they were mounted.
    let mut tree = vec![overlay];
    let mut next = 0;
    while let Some(&parent) = tree.get(next) {
        tree.extend(mounts.iter().filter(|mount| mount.parent == parent.id));
        next += 1;
    }
    for mount in tree.into_iter().rev() {
        if !sys::unmount_unused(&mount.mount_point)? {
            tracing::debug!("{} is in use", mount.mount_point.display());
            return Ok(false);
        }
    }
    Ok(true)
}

/// Binds the directory on disk of a target whose overlay is gone once more, where an init has unmounted all that it could,
/// our bind as well.
fn find_lower(system: &System, target: &Path) -> anyhow::Result<()> {
    let at = system.layout.lower(target);
    if sys::is_mounted(&at) {
        return Ok(());
    }
    system.check_mounted("it", target)?;
    sys::bind_privately(system.layout.open_dir(target)?, &at)
}

/// Syncs what was made writable, and makes it read-only again, each whatever becomes of the others.
fn finish_disks(writable: Vec<Writable>) -> Outcome {
    let mut outcome = Outcome::Done;
    for made in writable.into_iter().rev() {
        if let Err(error) = made.undo() {
            tracing::error!("{error:#}");
            outcome = Outcome::Failed;
        }
    }
    outcome
}

fn failed(target: &Path, error: Error) -> TargetReport {
    TargetReport::new(target, Outcome::Failed, format!("{:#}; its checkpoints stay", anyhow::Error::from(error)))
}

/// Takes our mounts away, so that what they are on (LUKS, LVM, md) can be stopped.
fn drop_mounts(system: &System) {
    if let Some(mut boot) = system.boot.clone() {
        for target in system.boot.iter().flat_map(|boot| &boot.targets) {
            if let Err(error) = cover::uncover(&system.layout, &target.path, &mut boot) {
                tracing::warn!("{error:#}");
            }
        }
    }
    let Ok(text) = std::fs::read("/proc/self/mountinfo") else { return };
    for mount in mountinfo::parse(&text).iter().rev() {
        let ours = mount.mount_point.starts_with(system.layout.run_dir());
        if ours && let Err(error) = unmount(&mount.mount_point, UnmountFlags::empty()) {
            tracing::warn!("umount2 {}: {error}", mount.mount_point.display());
        }
    }
}
