//! `syncd status`: what is in RAM, what is in the store, and what a power cut would cost now.

use std::path::{Path, PathBuf};

use anyhow::bail;
use bytesize::ByteSize;
use comfy_table::{Table, presets};
use ephemeral_overlay::state;
use serde::Serialize;
use syncd::chain::Chain;
use syncd::checkpoint::own_log;
use syncd::room::{self, Fill, Room};
use syncd::store::Store;
use syncd::system::System;
use syncd::written::boot_id;
use syncd::{Error, release};

use super::report::{JSON_VERSION, TargetReport, count, in_words};
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
    /// What is wrong now, if anything is.
    problem: Option<String>,
}

#[allow(clippy::struct_excessive_bools, reason = "each is a key of the object")]
#[derive(Debug, Serialize)]
struct Target {
    #[serde(rename = "target")]
    path: PathBuf,
    /// An overlay is mounted on it.
    mounted: bool,
    /// It is on its way to the disk at this moment; what is not known then is `null`.
    being_released: bool,
    /// It waits for `activate`.
    deferred: bool,
    /// Paths that a power cut would cost now; `null` when they could not be counted.
    unsaved: Option<usize>,
    /// Checkpoints that wait for a merge; `null` when that is not known.
    pending: Option<usize>,
    /// Their length in bytes.
    pending_bytes: Option<u64>,
    /// Bytes that checkpoints and merges wrote to the disk in this boot; `null` when that is not known.
    written_in_boot_bytes: Option<u64>,
    /// The same, ever.
    written_in_all_bytes: Option<u64>,
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
    let is_full = status.ram.as_ref().is_some_and(|ram| ram.problem.is_some());
    Ok(if is_full || status.targets.iter().any(wrong) { Outcome::Partial } else { Outcome::Done })
}

fn look(system: &System) -> anyhow::Result<Status> {
    let path = system.store_path()?;
    let released = being_released(system)?;
    let mounted = system.mounted_targets(&[])?;
    let opened = match system.check_mounted("the store", system.persist()) {
        // What stands there else would look as if nothing were pending.
        Err(error @ Error::NotMounted { .. }) if mounted.is_empty() => Err(error),
        // A release has it to its end, which is not waited for.
        _ if !released.is_empty() => Ok(None),
        _ => Store::open_to_read(&path).map(|store| store.or_else(|| Some(Store::absent(&path)))),
    };
    // Whoever had the store until now may have mounted or released something; nobody does while we have it.
    let system = &system.now()?;
    let mounted = system.mounted_targets(&[])?;
    let listed = opened.and_then(|store| Ok((system.stored_targets(&Store::absent(&path), &[])?, store)));
    let (stored, store) = match listed {
        Ok((stored, store)) => (stored, Ok(store)),
        Err(error) => (Vec::new(), Err(in_words(error))),
    };
    let mut paths = [&mounted[..], &system.config.overlay.dirs, &stored].concat();
    paths.sort_unstable();
    paths.dedup();
    if let (Err(problem), true) = (&store, paths.is_empty()) {
        bail!("{problem}");
    }
    let store = store.as_ref().map(Option::as_ref);
    let target = |path: &PathBuf| target(system, store, path, mounted.contains(path), released.contains(path));
    let targets = paths.iter().map(target).collect();
    let ram = if mounted.is_empty() { None } else { Some(Ram::of(system)?) };
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

/// The targets whose overlay is not there because somebody is at work: a release unmounts it, merges, and mounts a new one.
fn being_released(system: &System) -> anyhow::Result<Vec<PathBuf>> {
    let mut unmounted = system.mounted_targets(&[])?;
    unmounted.retain(|path| !release::is_mounted(&system.layout, path).unwrap_or(true));
    Ok(if !unmounted.is_empty() && state::is_locked(system.layout.run_dir())? { unmounted } else { Vec::new() })
}

impl Ram {
    fn of(system: &System) -> anyhow::Result<Self> {
        let fill = Fill::of(system)?;
        let problem = (fill.percent() >= room::CRITICAL).then(|| {
            format!(
                "RAM is {} % full, and what finds no room fails with \"No space left on device\": remove files, enlarge \
                 overlay.size and have the daemon read it (SIGHUP), or end who uses a target, so that it can be released",
                fill.percent()
            )
        });
        Ok(Self { fill, last: room::last(system), problem })
    }
}

/// `store` is the store, if it can be looked at now, or why it cannot be looked at.
fn target(
    system: &System,
    store: Result<Option<&Store>, &String>,
    path: &Path,
    mounted: bool,
    being_released: bool,
) -> Target {
    let mut target = Target {
        path: path.to_path_buf(),
        mounted,
        being_released,
        deferred: system.boot.as_ref().is_some_and(|boot| boot.deferred.iter().any(|deferred| deferred == path)),
        unsaved: (!mounted).then_some(0),
        pending: None,
        pending_bytes: None,
        written_in_boot_bytes: None,
        written_in_all_bytes: None,
        merging: false,
        last: TargetReport::last(&system.layout, path).filter(|_| system.live),
        conflicts: Vec::new(),
        problem: None,
    };
    let mut problems: Vec<_> = system.boot.iter().filter_map(|boot| boot.target(path)?.pinned.clone()).collect();
    if mounted && !being_released && !release::is_mounted(&system.layout, path).unwrap_or(true) {
        problems.push("its overlay is not mounted; `syncd release` brings it to the disk".to_owned());
    }
    match store {
        Ok(Some(store)) => target.look_into(system, store, &mut problems),
        Ok(None) => {}
        Err(problem) => problems.push(problem.clone()),
    }
    problems.dedup();
    target.problem = (!problems.is_empty()).then(|| problems.join("; "));
    target
}

impl Target {
    /// Adds what the store has of it.
    fn look_into(&mut self, system: &System, store: &Store, problems: &mut Vec<String>) {
        if self.mounted {
            let own_log = own_log(&self.path, &system.config.log.file);
            match checkpoint::one(system, store, &self.path, true, own_log) {
                Ok(stats) => {
                    problems.extend(stats.healed);
                    self.unsaved = Some(stats.changes.len());
                }
                Err(error) => problems.push(in_words(error)),
            }
        }
        let part = store.target(&self.path);
        let written = match part.chain() {
            Ok(chain) => {
                self.pending = Some(chain.as_ref().map_or(0, |chain| chain.checkpoints().len()));
                self.pending_bytes = Some(chain.as_ref().map_or(0, Chain::bytes));
                part.written_up_to(chain.as_ref().map(Chain::last))
            }
            Err(error) => {
                problems.push(in_words(error));
                self.pending = part.sequences().ok().map(|all| all.len());
                part.written()
            }
        };
        let written = written.seen_from(&boot_id());
        (self.written_in_boot_bytes, self.written_in_all_bytes) = (Some(written.in_boot), Some(written.in_all));
        self.merging = part.marker().is_ok_and(|marker| marker.is_some());
        self.conflicts = part.all_conflicts().unwrap_or_default();
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
    lines.extend(status.ram.as_ref().and_then(|ram| ram.problem.clone()));
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    table.set_header(["TARGET", "STATE", "UNSAVED", "PENDING", "WRITTEN", "LAST"]);
    for target in &status.targets {
        let pending = match (target.pending, target.pending_bytes) {
            (None, _) => "?".to_owned(),
            (Some(0), _) => "-".to_owned(),
            (Some(count), None) => count.to_string(),
            (Some(count), Some(bytes)) => format!("{count} ({})", ByteSize(bytes)),
        };
        let written = match (target.written_in_boot_bytes, target.written_in_all_bytes) {
            (_, Some(0)) => "-".to_owned(),
            (Some(boot), Some(all)) => format!("{} ({} in all)", ByteSize(boot), ByteSize(all)),
            _ => "?".to_owned(),
        };
        let unsaved = target.unsaved.map_or("?".to_owned(), |number| match number {
            0 => "-".to_owned(),
            number => count(number, "path"),
        });
        let state = match target {
            Target { being_released: true, .. } => "being released",
            Target { mounted: true, .. } => "in RAM",
            Target { merging: true, .. } => "half merged",
            Target { deferred: true, .. } => "deferred",
            _ => "on disk",
        };
        let last = target.last.as_ref().map_or("-", |last| match last.status {
            0 => &last.message,
            1 => "failed",
            _ => "not all was done",
        });
        table.add_row([
            target.path.display().to_string(),
            state.to_owned(),
            unsaved,
            pending,
            written,
            last.to_owned(),
        ]);
    }
    lines.extend(table.lines().map(|line| line.trim_end().to_owned()));
    for target in &status.targets {
        if target.being_released {
            let path = target.path.display();
            lines.push(format!("{path}: it is being released; until that is done nothing can be written to it"));
        }
        let last = target.last.as_ref().filter(|last| last.status != 0).map(|last| &last.message);
        let problems = target.problem.iter().filter(|problem| Some(*problem) != last).chain(last);
        lines.extend(problems.map(|problem| format!("{}: {problem}", target.path.display())));
        lines.extend(target.conflicts.iter().map(|conflict| format!("conflict: {conflict}")));
    }
    lines.extend(status.skipped.iter().map(|skip| format!("skipped: {}: {}", skip.path.display(), skip.reason)));
    lines.join("\n")
}
