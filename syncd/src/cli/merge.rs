//! `syncd merge`, and `syncd unpack` for `early`.

use std::path::{Path, PathBuf};

use early::cover::uncover;
use ephemeral_overlay::state::BootState;
use syncd::conflict::Winner;
use syncd::durable;
use syncd::merge::{MergeOptions, MergeStats};
use syncd::progress::Progress;
use syncd::release::discard;
use syncd::store::Store;
use syncd::system::System;
use syncd::tree::Tree;
use syncd::{Error, death, merge};

use super::report::{TargetReport, count, finish};
use super::{Outcome, checkpoint};

pub(crate) fn run(
    system: &System,
    targets: &[PathBuf],
    accept_prefix: bool,
    progress: &Progress,
    json: bool,
) -> anyhow::Result<Outcome> {
    for_each(system, targets, json, |store, target| {
        let report = one(system, store, target, false, accept_prefix, progress)?;
        // Its overlay was unmounted by hand, from the cover of an earlier release: now it is the disk.
        if system.boot.is_some()
            && let Some(mut boot) = BootState::read(&system.layout.boot_state())?
        {
            uncover(&system.layout, target, &mut boot)
                .map_err(|source| Error::Mount { path: target.to_path_buf(), source })?;
        }
        Ok(report)
    })
}

pub(crate) fn set_aside(system: &System, targets: &[PathBuf], json: bool) -> anyhow::Result<Outcome> {
    for_each(system, targets, json, |store, target| move_away(system, store, target))
}

/// Does something with every target that may have something in the store, and reports what became of each.
fn for_each(
    system: &System,
    targets: &[PathBuf],
    json: bool,
    act: impl Fn(&Store, &Path) -> syncd::Result<Option<TargetReport>>,
) -> anyhow::Result<Outcome> {
    let path = system.store_path()?;
    let mounted = system.mounted_targets(targets);
    if mounted.as_ref().is_ok_and(Vec::is_empty) {
        // What is in RAM is saved wherever the store is.
        system.check_mounted("the store", system.persist())?;
    }
    if !durable::exists(&path.join("targets"))? && mounted.as_ref().is_ok_and(Vec::is_empty) {
        tracing::info!("nothing is pending");
        return finish(Vec::new(), json);
    }
    let store = Store::open(&path)?;
    let mut all = system.stored_targets(&store, targets)?;
    all.extend(mounted.unwrap_or_default());
    all.sort_unstable();
    all.dedup();
    let mut reports = Vec::new();
    for target in all {
        let report = match act(&store, &target) {
            Ok(None) => continue,
            Ok(Some(report)) => report,
            Err(error) => {
                let error = anyhow::Error::from(error);
                TargetReport::new(&target, Outcome::of_error(&error), format!("{error:#}"))
            }
        };
        report.say();
        if system.live {
            report.keep(&system.layout);
        }
        reports.push(report);
    }
    if reports.is_empty() {
        tracing::info!("nothing is pending");
    }
    finish(reports, json)
}

/// Merges one target. Where it was mounted in this boot, what is still in RAM goes into a last checkpoint first.
/// `unused` says that nobody has used the disk's version in this boot, although the system runs. The caller has locked the
/// boot state.
pub(crate) fn one(
    system: &System,
    store: &Store,
    target: &Path,
    unused: bool,
    accept_prefix: bool,
    progress: &Progress,
) -> syncd::Result<Option<TargetReport>> {
    let part = store.target(target);
    let state = system.boot.as_ref().and_then(|boot| boot.target(target));
    if let Some(why) = state.and_then(|state| state.pinned.as_ref()) {
        return Err(Error::Alive { target: target.to_path_buf(), why: why.clone() });
    }
    if state.is_none() && part.sequences()?.is_empty() && part.marker()?.is_none() {
        return Ok(None);
    }
    if state.is_none() {
        // The directory below the mount point has nothing to do with these checkpoints.
        system.check_mounted("it", target)?;
    }
    let lower = match state {
        Some(_) => system.lower(target)?,
        None => Tree::new(system.layout.open_dir(target)?, &system.layout.below_root(target)),
    };
    // The mount that is seen at the target counts, not only the bind below it.
    let seen = Tree::new(system.layout.open_dir(target)?, &system.layout.below_root(target));
    death::prove(&system.layout, target, state, &seen)?;
    if state.is_some() {
        checkpoint::last(system, store, target)?;
    }
    let ran_from_disk = part.booted_from_disk()? || (system.live && state.is_none() && !unused);
    let winner = if ran_from_disk { Winner::Disk } else { Winner::Ram };
    let stats = merge::merge(&part, &lower, MergeOptions { winner, accept_prefix }, progress)?;
    if state.is_some() {
        discard(&system.layout, target)?;
    }
    Ok(stats.map(|stats| report(target, &stats, winner)))
}

fn move_away(system: &System, store: &Store, target: &Path) -> syncd::Result<Option<TargetReport>> {
    let part = store.target(target);
    if part.sequences()?.is_empty() && part.marker()?.is_none() {
        return Ok(None);
    }
    if system.boot.as_ref().is_some_and(|boot| boot.target(target).is_some()) {
        let why = "it is in RAM, and a power cut would leave nothing of it".to_owned();
        return Err(Error::Alive { target: target.to_path_buf(), why });
    }
    let aside = part.set_aside()?;
    let message = format!("its checkpoints were moved to {}", aside.display());
    Ok(Some(TargetReport::new(target, Outcome::Done, message)))
}

fn report(target: &Path, stats: &MergeStats, winner: Winner) -> TargetReport {
    let mut words = vec![match (stats.checkpoints, &stats.set_aside) {
        (0, None) => "an earlier merge was complete; cleaned up after it".to_owned(),
        (0, Some(_)) => "nothing was merged".to_owned(),
        (number, _) => format!("{} merged, {}", count(number, "checkpoint"), count(stats.paths, "path")),
    }];
    if let Some(aside) = &stats.set_aside {
        let why = match stats.checkpoints {
            0 => "the checkpoints do not belong to this state of the disk",
            _ if stats.left.is_empty() => "the rest of the checkpoints is damaged",
            _ => "not everything in the checkpoints could be merged",
        };
        words.push(format!("{why}; they were moved to {}", aside.display()));
    }
    for (path, why) in &stats.left {
        words.push(format!(
            "{} cannot be on this disk ({why}) and is in those checkpoints only",
            path.below(target).display()
        ));
    }
    if stats.mixed {
        words.push(
            "an earlier merge had begun with what is set aside now: see what it holds before you use the directory"
                .to_owned(),
        );
    }
    let kept = match winner {
        Winner::Ram => "what was in RAM was kept",
        Winner::Disk => "what was on disk was kept",
    };
    for path in &stats.conflicts {
        words.push(format!(
            "{} was changed on disk and in RAM: {kept}, the other version is in `conflicts` in the store",
            path.below(target).display()
        ));
    }
    let outcome = if stats.is_exact() { Outcome::Done } else { Outcome::Partial };
    TargetReport::new(target, outcome, words.join("; "))
}

/// Unpacks the chain of `target` into `upper`.
pub(crate) fn unpack(system: &System, target: &Path, upper: &Path, progress: &Progress) -> anyhow::Result<Outcome> {
    let Some(store) = Store::open_to_read(&system.store_path()?)? else { return Ok(Outcome::Done) };
    unpack_into(system, &store, target, upper, progress)?;
    tracing::warn!("{}: its checkpoints could not be merged and are kept in RAM", target.display());
    Ok(Outcome::Done)
}

/// The same, in a store that is open.
pub(crate) fn unpack_into(
    system: &System,
    store: &Store,
    target: &Path,
    upper: &Path,
    progress: &Progress,
) -> anyhow::Result<()> {
    let lower = Tree::new(system.layout.open_dir(target)?, &system.layout.below_root(target));
    Ok(merge::unpack(&store.target(target), &lower, &Tree::open(upper)?, progress)?)
}
