//! `syncd status`: what is in RAM, what is in the store, and what a power cut would cost now.

use std::path::{Path, PathBuf};

use bytesize::ByteSize;
use comfy_table::{Table, presets};
use serde::Serialize;
use syncd::chain::Chain;
use syncd::checkpoint::own_log;
use syncd::room::{self, Fill, Room};
use syncd::store::Store;
use syncd::system::System;
use syncd::written::boot_id;
use syncd::{Error, release};

use super::report::{JSON_VERSION, TargetReport, count};
use super::{Outcome, checkpoint, say};

/// The object that `--json` prints.
#[derive(Debug, Serialize)]
struct Status {
    version: u32,
    /// It is the system that runs.
    live: bool,
    /// The hook was active in this boot.
    active: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    ram: Option<Ram>,
    targets: Vec<Target>,
    /// What `early` skipped, and why.
    skipped: Vec<Skipped>,
}

/// The tmpfs that all upper directories share.
#[derive(Debug, Serialize)]
struct Ram {
    #[serde(flatten)]
    fill: Fill,
    /// When it was too full, and what was done then.
    #[serde(skip_serializing_if = "Option::is_none")]
    last: Option<Room>,
}

#[derive(Debug, Serialize)]
struct Target {
    #[serde(rename = "target")]
    path: PathBuf,
    /// An overlay is mounted on it.
    mounted: bool,
    /// It waits for `activate`.
    deferred: bool,
    /// Paths that a power cut would cost now; `null` when they could not be counted.
    unsaved: Option<usize>,
    /// Checkpoints that wait for a merge.
    pending: usize,
    /// Their length in bytes.
    pending_bytes: u64,
    /// Bytes that checkpoints and merges wrote to the disk in this boot.
    written_in_boot_bytes: u64,
    /// The same, ever.
    written_in_all_bytes: u64,
    /// A merge has begun and not ended.
    merging: bool,
    /// What the last command on it came to.
    last: Option<TargetReport>,
    /// Versions that lost, until somebody removes them from the store.
    conflicts: Vec<String>,
    /// What is wrong, if anything is.
    problem: Option<String>,
}

#[derive(Debug, Serialize)]
struct Skipped {
    path: PathBuf,
    reason: String,
}

pub(crate) fn run(system: &System, json: bool) -> anyhow::Result<Outcome> {
    let status = look(system)?;
    if json {
        say(&serde_json::to_string_pretty(&status)?);
    } else {
        say(&table(&status));
    }
    let wrong = |target: &Target| {
        target.problem.is_some()
            || !target.conflicts.is_empty()
            || target.last.as_ref().is_some_and(|last| last.status != 0)
    };
    Ok(if status.targets.iter().any(wrong) { Outcome::Partial } else { Outcome::Done })
}

fn look(system: &System) -> anyhow::Result<Status> {
    let path = system.store_path()?;
    let mounted = system.mounted_targets(&[])?;
    // What stands there else would look as if nothing were pending.
    let hidden = match system.check_mounted("the store", system.persist()) {
        Err(error @ Error::NotMounted { .. }) if mounted.is_empty() => Some(error.to_string()),
        _ => None,
    };
    let store = if hidden.is_some() { None } else { Store::open_to_read(&path)? };
    let mut paths = mounted.clone();
    paths.extend(system.config.overlay.dirs.iter().cloned());
    if let Some(store) = &store {
        paths.extend(system.stored_targets(store, &[])?);
    }
    paths.sort_unstable();
    paths.dedup();
    let store = store.unwrap_or_else(|| Store::absent(&path));
    let mut targets: Vec<_> = paths.iter().map(|path| target(system, &store, path, mounted.contains(path))).collect();
    for target in &mut targets {
        target.problem = hidden.clone().or(target.problem.take());
    }
    let ram = if mounted.is_empty() { None } else { Some(Ram { fill: Fill::of(system)?, last: room::last(system) }) };
    let skipped = system.boot.iter().flat_map(|boot| &boot.skipped);
    Ok(Status {
        version: JSON_VERSION,
        live: system.live,
        active: system.boot.is_some(),
        ram,
        targets,
        skipped: skipped.map(|skip| Skipped { path: skip.path.clone(), reason: skip.reason.clone() }).collect(),
    })
}

fn target(system: &System, store: &Store, path: &Path, mounted: bool) -> Target {
    let part = store.target(path);
    let mut problems: Vec<_> = system.boot.iter().filter_map(|boot| boot.target(path)?.pinned.clone()).collect();
    if mounted && !release::is_mounted(&system.layout, path).unwrap_or(true) {
        problems.push("its overlay is not mounted; `syncd release` brings it to the disk".to_owned());
    }
    let unsaved = mounted
        .then(|| checkpoint::one(system, store, path, true, own_log(path, &system.config.log.file)))
        .and_then(|result| match result {
            Ok(stats) => {
                problems.extend(stats.healed);
                Some(stats.changes.len())
            }
            Err(error) => {
                problems.push(format!("{:#}", anyhow::Error::from(error)));
                None
            }
        });
    let (pending, pending_bytes, written) = match part.chain() {
        Ok(chain) => {
            let written = part.written_up_to(chain.as_ref().map(Chain::last));
            let (pending, bytes) = chain.map_or((0, 0), |chain| (chain.checkpoints().len(), chain.bytes()));
            (pending, bytes, written)
        }
        Err(error) => {
            problems.push(error.to_string());
            (part.sequences().map_or(0, |all| all.len()), 0, part.written())
        }
    };
    let written = written.seen_from(&boot_id());
    problems.dedup();
    Target {
        path: path.to_path_buf(),
        mounted,
        deferred: system.boot.as_ref().is_some_and(|boot| boot.deferred.iter().any(|deferred| deferred == path)),
        unsaved: if mounted { unsaved } else { Some(0) },
        pending,
        pending_bytes,
        written_in_boot_bytes: written.in_boot,
        written_in_all_bytes: written.in_all,
        merging: part.marker().is_ok_and(|marker| marker.is_some()),
        last: TargetReport::last(&system.layout, path).filter(|_| system.live),
        conflicts: part.all_conflicts().unwrap_or_default(),
        problem: (!problems.is_empty()).then(|| problems.join("; ")),
    }
}

fn table(status: &Status) -> String {
    let mut lines = Vec::new();
    lines.push(match &status.ram {
        Some(Ram { fill, .. }) => format!(
            "RAM: {} of {} used, {} of {} inodes ({} % full)",
            ByteSize(fill.used_bytes),
            ByteSize(fill.size_bytes),
            fill.used_inodes,
            fill.size_inodes,
            fill.percent()
        ),
        None if status.active => "RAM: nothing is mounted".to_owned(),
        None if status.live => "RAM: the hook was not active in this boot".to_owned(),
        None => "RAM: this system is not running".to_owned(),
    });
    if let Some(room) = status.ram.as_ref().and_then(|ram| ram.last.as_ref()) {
        let actions: Vec<_> = room.actions.iter().map(ToString::to_string).collect();
        lines.push(format!("RAM was {} % full: {}", room.fill.percent(), actions.join(", ")));
    }
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    table.set_header(["TARGET", "STATE", "UNSAVED", "PENDING", "WRITTEN", "LAST"]);
    for target in &status.targets {
        let pending = match target.pending {
            0 => "-".to_owned(),
            count => format!("{count} ({})", ByteSize(target.pending_bytes)),
        };
        let written = match (target.written_in_boot_bytes, target.written_in_all_bytes) {
            (_, 0) => "-".to_owned(),
            (boot, all) => format!("{} ({} in all)", ByteSize(boot), ByteSize(all)),
        };
        let unsaved = target.unsaved.map_or("?".to_owned(), |number| match number {
            0 => "-".to_owned(),
            number => count(number, "path"),
        });
        let state = match target {
            Target { mounted: true, .. } => "in RAM",
            Target { merging: true, .. } => "half merged",
            Target { deferred: true, .. } => "deferred",
            _ => "on disk",
        };
        let last = target.last.as_ref().map_or("-".to_owned(), |last| last.message.clone());
        table.add_row([target.path.display().to_string(), state.to_owned(), unsaved, pending, written, last]);
    }
    lines.extend(table.lines().map(|line| line.trim_end().to_owned()));
    for target in &status.targets {
        lines.extend(target.problem.iter().map(|problem| format!("{}: {problem}", target.path.display())));
        lines.extend(target.conflicts.iter().map(|conflict| format!("conflict: {conflict}")));
    }
    lines.extend(status.skipped.iter().map(|skip| format!("skipped: {}: {}", skip.path.display(), skip.reason)));
    lines.join("\n")
}
