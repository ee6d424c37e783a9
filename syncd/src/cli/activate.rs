//! `syncd activate`: what `early` deferred, because its file system was not mounted in the initramfs, comes into RAM by
//! the very same code. The difference: the system runs already, so nothing is covered that is in use.

use std::path::{Path, PathBuf};

use anyhow::bail;
use early::apply::{apply, create_run_dir, new_state};
use early::cover;
use early::facts::observe;
use early::plan::{Plan, Step, plan};
use ephemeral_overlay::config::{Activate, Config};
use ephemeral_overlay::state::{BootState, Skipped};
use syncd::progress::Progress;
use syncd::store::Store;
use syncd::system::{System, check_known};
use syncd::{Error, in_use, release};

use super::report::{TargetReport, finish};
use super::{Outcome, merge};

pub(crate) fn run(system: &System, named: &[PathBuf], progress: &Progress, json: bool) -> anyhow::Result<Outcome> {
    let paths = wanted(system, named)?;
    if paths.is_empty() {
        let why = if system.boot.is_some() { "nothing is deferred" } else { "the hook was not active in this boot" };
        tracing::info!("nothing to do: {why}");
        return finish(Vec::new(), json);
    }
    if !system.live {
        bail!("{} is not the running system", system.layout.root().display());
    }
    if system.boot.is_none() && system.layout.boot_state().exists() {
        bail!("{} is of another root", system.layout.boot_state().display());
    }
    if let Some(error) = &system.config_error {
        bail!("{error}; nothing is mounted");
    }
    let is_target = |path: &PathBuf| system.config.overlay.dirs.contains(path);
    // It is locked until the end: nobody else merges, or activates the same.
    let store = if paths.iter().any(is_target) { Some(open_store(system)) } else { None };
    let activation = Activation { system, store: store.as_ref().map(Result::as_ref), progress };
    let mut reports = Vec::new();
    for path in paths {
        let report = activation.one(&path).unwrap_or_else(|error| {
            let report = TargetReport::new(&path, Outcome::Failed, format!("{error:#}"));
            activation.note_disk_boot(&path);
            report
        });
        report.say();
        report.keep(&system.layout);
        reports.push(report);
    }
    finish(reports, json)
}

fn wanted(system: &System, named: &[PathBuf]) -> anyhow::Result<Vec<PathBuf>> {
    let deferred = system.boot.iter().flat_map(|boot| &boot.deferred);
    if named.is_empty() {
        return Ok(deferred.cloned().collect());
    }
    let active = system.boot.iter().flat_map(|boot| &boot.targets).map(|state| &state.path);
    let known = system.config.overlay.dirs.iter().chain(system.config.tmpfs.mounts.keys()).chain(active);
    check_known(named, &known.chain(deferred).cloned().collect::<Vec<_>>())?;
    Ok(named.to_vec())
}

fn open_store(system: &System) -> syncd::Result<Store> {
    system.check_mounted("the store", system.persist())?;
    Store::open(&system.store_path()?)
}

struct Activation<'a> {
    system: &'a System,
    /// The store, or why it cannot be used; `None` where no target needs it.
    store: Option<Result<&'a Store, &'a Error>>,
    progress: &'a Progress,
}

impl Activation<'_> {
    fn one(&self, path: &Path) -> anyhow::Result<TargetReport> {
        let layout = &self.system.layout;
        let done = |words: &str| Ok(TargetReport::new(path, Outcome::Done, words.to_owned()));
        if is_active(BootState::read(&layout.boot_state())?.as_ref(), path) {
            return done("in RAM already");
        }
        let Some(before) = plan_of(self.system, path)? else {
            // What is pending is merged whether it is configured or not.
            let merged = self.merge(path)?.unwrap_or((Outcome::Done, "nothing is pending".to_owned()));
            return Ok(TargetReport::new(path, merged.0, format!("not configured any more; {}", merged.1)));
        };
        if before.steps.is_empty() {
            return self.leave(path, before);
        }
        let is_target = before.steps.iter().any(|step| matches!(step, Step::Overlay { .. }));
        if let Some(users) = self.users(path)? {
            return self.leave(path, refusal(path, users));
        }
        let mut words = Vec::new();
        let mut outcome = Outcome::Done;
        if is_target && let Some((result, said)) = self.merge(path)? {
            outcome = result;
            words.push(said);
        }
        // The merge may have brought another configuration to the disk, and has taken its time.
        let Some(plan) = plan_of(self.system, path)? else { return done("not configured any more") };
        if let Some(users) = self.users(path)? {
            return self.leave(path, refusal(path, users));
        }
        let unpack = |target: &Path| {
            merge::unpack_into(self.system, self.store()?, target, &layout.upper(target), self.progress)
        };
        let left = carry_out(self.system, path, plan, &unpack)?;
        let boot = BootState::read(&layout.boot_state())?;
        if is_active(boot.as_ref(), path) {
            words.push("in RAM now".to_owned());
        } else {
            self.note_disk_boot(path);
            outcome = Outcome::Partial;
            words.push("left on disk".to_owned());
        }
        for Skipped { path: what, reason } in left {
            outcome = Outcome::Partial;
            words.push(if what == path { reason } else { format!("{}: {reason}", what.display()) });
        }
        Ok(TargetReport::new(path, outcome, words.join("; ")))
    }

    /// Who uses `path`, in words.
    fn users(&self, path: &Path) -> anyhow::Result<Option<String>> {
        let search = in_use::search(&self.system.layout, path)?;
        warn_of_hidden(path, &search);
        Ok(search.words())
    }

    /// Merges what is pending, as a boot through the hook does. What cannot be merged is in the next plan.
    fn merge(&self, target: &Path) -> anyhow::Result<Option<(Outcome, String)>> {
        if self.store.is_none() {
            return Ok(None);
        }
        let store = self.store()?;
        // Until now it waited for its file system; what is there was not used in this boot.
        let unused = self.system.boot.as_ref().is_some_and(|boot| boot.deferred.iter().any(|path| path == target));
        match merge::one(self.system, store, target, unused, false, self.progress) {
            Ok(report) => Ok(report.map(|report| {
                let outcome = if report.status == 0 { Outcome::Done } else { Outcome::Partial };
                (outcome, report.message)
            })),
            // Somebody has an overlay on it: no place for another one.
            Err(error @ Error::Alive { .. }) => Err(error.into()),
            Err(error) => Ok(Some((Outcome::Partial, format!("{:#}", anyhow::Error::from(error))))),
        }
    }

    /// Leaves `path` on disk, and says so to `status` and to the next boot.
    fn leave(&self, path: &Path, plan: Plan) -> anyhow::Result<TargetReport> {
        let layout = &self.system.layout;
        // What is not mounted was not used either.
        if !plan.deferred.iter().any(|deferred| deferred == path) {
            self.note_disk_boot(path);
        }
        let reasons: Vec<_> = plan.skipped.iter().map(|skipped| skipped.reason.clone()).collect();
        if let Some(mut state) = BootState::read(&layout.boot_state())? {
            state.skipped.retain(|skipped| skipped.path != path);
            state.skipped.extend(plan.skipped);
            state.write(&layout.boot_state())?;
        }
        Ok(TargetReport::new(path, Outcome::Partial, format!("left on disk: {}", reasons.join("; "))))
    }

    /// From here on the disk's version is in use, and newer than what is pending.
    fn note_disk_boot(&self, path: &Path) {
        let Some(Ok(store)) = self.store else { return };
        let part = store.target(path);
        let noted = part.sequences().and_then(|all| if all.is_empty() { Ok(()) } else { part.note_disk_boot() });
        if let Err(error) = noted {
            // A conflict is then decided for RAM; the disk's version is kept beside it.
            tracing::warn!("{}: {:#}", path.display(), anyhow::Error::from(error));
        }
    }

    fn store(&self) -> anyhow::Result<&Store> {
        match self.store {
            Some(Ok(store)) => Ok(store),
            Some(Err(error)) => bail!("{error}"),
            None => bail!("it has no store"),
        }
    }
}

/// The plan for `path` alone, whenever it is to be mounted; `None` when it is not configured.
pub(super) fn plan_of(system: &System, path: &Path) -> anyhow::Result<Option<Plan>> {
    let mut config: Config = system.layout.load_config()?;
    config.overlay.activate = Activate::Boot;
    config.overlay.dirs.retain(|dir| dir == path);
    config.tmpfs.mounts.retain(|mount, _| mount == path);
    config.persist.root = system.persist().to_path_buf();
    if config.overlay.dirs.is_empty() && config.tmpfs.mounts.is_empty() {
        return Ok(None);
    }
    let mut facts = observe(&system.layout, &config)?;
    if let Some(boot) = BootState::read(&system.layout.boot_state())?
        && cover::is_covered(&system.layout, path, &boot)?
    {
        // The disk itself, on which the overlay may lie.
        let top = facts.mounted.iter().rposition(|mount| mount.mount_point == path);
        top.map(|index| facts.mounted.remove(index));
    }
    Ok(Some(plan(&config, &facts)))
}

/// Carries out the plan for `path`; returns what was not done.
pub(super) fn carry_out(
    system: &System,
    path: &Path,
    plan: Plan,
    unpack: early::apply::Unpack<'_>,
) -> anyhow::Result<Vec<Skipped>> {
    let layout = &system.layout;
    let mut state = if let Some(state) = BootState::read(&layout.boot_state())? {
        state
    } else {
        create_run_dir(layout.run_dir())?;
        new_state(layout, system.persist())?
    };
    state.skipped.retain(|skipped| !skipped.path.starts_with(path));
    if state.targets.iter().any(|entry| entry.path == path && entry.released) {
        // A cut may have left a part of the upper directory that was merged.
        release::remove_upper(layout, path)?;
    }
    apply(layout, plan, state, unpack)
}

/// Says of which processes nothing is known.
pub(super) fn warn_of_hidden(path: &Path, search: &in_use::Search) {
    if !search.hidden.is_empty() {
        tracing::warn!("{}: even root cannot see what these processes use: {:?}", path.display(), search.hidden);
    }
}

pub(super) fn is_active(boot: Option<&BootState>, path: &Path) -> bool {
    boot.is_some_and(|boot| boot.target(path).is_some() || boot.tmpfs.iter().any(|mounted| mounted == path))
}

/// A plan to do nothing, because of somebody.
fn refusal(path: &Path, users: String) -> Plan {
    let skipped = vec![Skipped { path: path.to_path_buf(), reason: users }];
    Plan { steps: Vec::new(), deferred: Vec::new(), skipped }
}
