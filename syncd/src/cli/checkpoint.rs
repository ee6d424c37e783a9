//! `syncd checkpoint`.

use std::path::{Path, PathBuf};

use anyhow::bail;
use bytesize::ByteSize;
use ephemeral_overlay::CHECKPOINT_FORMAT;
use ephemeral_overlay::state::BootState;
use syncd::checkpoint::{ChangeKind, CheckpointOptions, CheckpointStats, own_log, take};
use syncd::path::RelPath;
use syncd::store::Store;
use syncd::system::System;
use syncd::{Error, death, durable};

use super::report::{TargetReport, finish, in_words};
use super::{Outcome, say};

pub(crate) fn run(system: &System, targets: &[PathBuf], dry_run: bool, json: bool) -> anyhow::Result<Outcome> {
    let mounted = mounted(system, targets)?;
    if mounted.is_empty() {
        tracing::info!("nothing is in RAM: {}", why_nothing(system));
    }
    let shown = Shown { dry_run, paths: dry_run && !json };
    finish(take_all(system, &mounted, shown, TargetReport::say), json)
}

/// What a checkpoint shows, or leaves undone.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Shown {
    /// Nothing is written.
    pub dry_run: bool,
    /// Each path that changed is printed.
    pub paths: bool,
}

/// The targets in RAM, of those named or of all. What is there and nobody knows is an error.
pub(crate) fn mounted(system: &System, targets: &[PathBuf]) -> anyhow::Result<Vec<PathBuf>> {
    let mounted = system.mounted_targets(targets)?;
    if system.live {
        let unknown = death::unknown_overlays(&system.layout, system.boot.as_ref())?;
        if !unknown.is_empty() {
            return Err(Error::UnknownOverlays { targets: unknown.join(", ") }.into());
        }
    }
    Ok(mounted)
}

/// Takes a checkpoint of each target; each report is handed to `say` as soon as there is one.
pub(crate) fn take_all(
    system: &System,
    targets: &[PathBuf],
    shown: Shown,
    mut say: impl FnMut(&TargetReport),
) -> Vec<TargetReport> {
    let store = open_store(system, targets, shown.dry_run).map_err(in_words);
    // Whoever had the store until now may have released something.
    let is_there = |target: &&PathBuf| {
        let boot = BootState::read(&system.layout.boot_state());
        boot.map_or(true, |boot| boot.is_none_or(|boot| boot.target(target).is_some()))
    };
    let mut reports = Vec::new();
    for target in targets.iter().filter(is_there) {
        let own_log = own_log(target, &system.config.log.file);
        let taken = store
            .as_ref()
            .map_err(Clone::clone)
            .and_then(|store| one(system, store, target, shown.dry_run, own_log).map_err(in_words));
        let report = match taken {
            Ok(stats) => report(target, &stats, shown),
            Err(error) => TargetReport::new(target, Outcome::Failed, error),
        };
        say(&report);
        if !shown.dry_run {
            report.keep(&system.layout);
        }
        reports.push(report);
    }
    let written = reports.iter().any(|report| report.sequence.is_some());
    if let Ok(store) = store
        && written
        && reports.iter().all(|report| report.status != Outcome::Failed.status())
    {
        renew_reserve(system, &store);
    }
    reports
}

/// The store, once it knows that this boot came as far as here.
fn open_store(system: &System, targets: &[PathBuf], dry_run: bool) -> anyhow::Result<Store> {
    if system.live && !dry_run {
        note_this_boot(system, false)?;
    }
    let path = system.store_path()?;
    Ok(if dry_run || targets.is_empty() {
        // Before the first checkpoint there is no store, and nothing in it.
        Store::open_to_read(&path)?.unwrap_or_else(|| Store::absent(&path))
    } else {
        Store::open(&path)?
    })
}

/// Notes that this boot came as far as here, and keeps room for the last checkpoint, which may be the first one, too.
/// There is nothing yet that would be worth a checkpoint, and the boot waits.
pub(crate) fn booted(system: &System) -> anyhow::Result<Outcome> {
    if !system.live {
        bail!("{} is not the running system", system.layout.root().display());
    }
    note_this_boot(system, true)?;
    if !system.mounted_targets(&[])?.is_empty() {
        renew_reserve(system, &Store::open(&system.store_path()?)?);
    }
    Ok(Outcome::Done)
}

/// Keeps room for the last checkpoint of a shutdown. After a boot, and after a checkpoint that had its own room, and
/// wrote.
fn renew_reserve(system: &System, store: &Store) {
    if let Err(error) = store.renew_reserve(&system.layout.ram()) {
        // The checkpoint is durable, and that is what was asked for.
        tracing::debug!("there is no reserve, or a small one: {:#}", anyhow::Error::from(error));
    }
}

/// Takes a checkpoint of one target. A change of nothing but `own_log` is no reason to write.
pub(crate) fn one(
    system: &System,
    store: &Store,
    target: &Path,
    dry_run: bool,
    own_log: Option<RelPath>,
) -> syncd::Result<CheckpointStats> {
    if let Some(boot) = system.boot.as_ref().filter(|boot| boot.checkpoint_format < CHECKPOINT_FORMAT) {
        return Err(Error::OldInitramfs { reads: boot.checkpoint_format });
    }
    let (upper, lower) = system.upper_and_lower(target)?;
    let options = CheckpointOptions { dry_run, compression: system.config.checkpoint.compression, own_log };
    take(&store.target(target), &upper, &lower, &options)
}

/// Takes the last checkpoint of a target: nothing else will ever have what is in RAM. On a full disk it is given the
/// reserve.
pub(crate) fn last(system: &System, store: &Store, target: &Path) -> syncd::Result<()> {
    // Our own log counts as everything else does.
    let take = || one(system, store, target, false, None);
    let stats = match take() {
        Err(error) if error.is_full_disk() && store.give_up_reserve()? => {
            tracing::warn!("{}: the disk is full, the last checkpoint is given the reserve", target.display());
            take()
        }
        other => other,
    }?;
    if !stats.is_exact() || stats.healed.is_some() {
        report(target, &stats, Shown::default()).say();
    }
    Ok(())
}

/// Notes in the store that this boot came as far as here, and which targets are used from disk although checkpoints are
/// pending: the disk's versions are newer. What waits for its file system is not used before that is there; at boot, not
/// before `activate` has decided.
fn note_this_boot(system: &System, at_boot: bool) -> anyhow::Result<()> {
    let path = system.store_path()?;
    if !durable::exists(&path)?
        || matches!(system.check_mounted("the store", system.persist()), Err(Error::NotMounted { .. }))
    {
        return Ok(());
    }
    let store = Store::open(&path)?;
    store.reset_tries()?;
    for target in store.targets()? {
        let in_ram = system.boot.as_ref().is_some_and(|boot| boot.target(target.target()).is_some());
        let deferred =
            system.boot.as_ref().is_some_and(|boot| boot.deferred.iter().any(|path| path == target.target()));
        let waits = deferred && (at_boot || system.check_mounted("it", target.target()).is_err());
        if !in_ram && !waits && !target.sequences()?.is_empty() {
            target.note_disk_boot()?;
            tracing::warn!("{}: checkpoints are pending; `syncd merge` merges them", target.target().display());
        }
    }
    Ok(())
}

fn why_nothing(system: &System) -> &'static str {
    match &system.boot {
        _ if !system.live => "this is not the running system",
        None => "the hook was not active in this boot",
        Some(_) => "no such target was mounted, or it was released",
    }
}

pub(crate) fn report(target: &Path, stats: &CheckpointStats, shown: Shown) -> TargetReport {
    let mut words = Vec::new();
    if let Some(healed) = &stats.healed {
        words.push(format!("the earlier checkpoints were of no use ({healed}) and are replaced by a full one"));
    }
    if let Some(aside) = &stats.set_aside {
        words.push(format!(
            "the earlier checkpoints belong to another state of the disk and were moved to {}",
            aside.display()
        ));
    }
    let count = |kind| stats.changes.iter().filter(|(_, change)| *change == kind).count();
    let (written, deleted) = (count(ChangeKind::Written), count(ChangeKind::Deleted) + count(ChangeKind::Reverted));
    words.push(match stats.sequence {
        Some(sequence) => {
            let relation = if stats.full { "full" } else { "delta" };
            format!(
                "checkpoint {sequence} ({relation}): {written} written, {deleted} gone, {} on disk",
                ByteSize(stats.written_bytes)
            )
        }
        None if stats.changes.is_empty() => "nothing changed".to_owned(),
        None => format!("would write: {written} written, {deleted} gone"),
    });
    for (what, paths) in
        [("changed while it was read", &stats.fuzzy), ("was moving, its loss is not recorded", &stats.disputed)]
    {
        words.extend(paths.iter().map(|path| format!("{} {what}", path.below(target).display())));
    }
    if stats.unsettled {
        words.push("names never stood still while they were read; one that was being moved may be missing".to_owned());
    }
    if shown.paths {
        for (path, kind) in &stats.changes {
            let letter = match kind {
                ChangeKind::Written => 'W',
                ChangeKind::Deleted => 'D',
                ChangeKind::Reverted => 'R',
            };
            say(&format!("{letter} {}", path.below(target).display()));
        }
    }
    let outcome = if stats.is_exact() { Outcome::Done } else { Outcome::Partial };
    TargetReport {
        sequence: stats.sequence,
        written_bytes: stats.written_bytes,
        ..TargetReport::new(target, outcome, words.join("; "))
    }
}
