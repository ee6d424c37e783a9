//! `syncd release` and `syncd deactivate`: what nothing uses goes from RAM to the disk while the system runs.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::bail;
use bytesize::ByteSize;
use early::cover;
use ephemeral_overlay::config::Activate;
use ephemeral_overlay::error::At;
use ephemeral_overlay::state::{BootState, Skipped};
use rustix::fs::statvfs;
use syncd::progress::Progress;
use syncd::store::Store;
use syncd::system::System;
use syncd::{Error, in_use, release};

use super::activate::{carry_out, is_active, plan_of, warn_of_hidden};
use super::report::{TargetReport, finish};
use super::{Outcome, checkpoint, merge};

/// How journald's process is called, in the 15 bytes that the kernel keeps.
const JOURNALD: &str = "systemd-journal";

/// What is on a target afterwards.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Then {
    /// An overlay with nothing in it, where the configuration mounts it at boot.
    InRam,
    /// The disk.
    OnDisk,
}

/// Releases targets; the caller has locked the boot state.
pub(crate) fn run(
    system: &System,
    named: &[PathBuf],
    then: Then,
    progress: &Progress,
    json: bool,
) -> anyhow::Result<Outcome> {
    let mut targets = system.mounted_targets(named)?;
    targets.extend(left_covered(system, named)?);
    if targets.is_empty() {
        tracing::info!("nothing to do: nothing of it is in RAM");
        return finish(Vec::new(), json);
    }
    if let Some(error) = &system.config_error {
        bail!("{error}; nothing is released");
    }
    let store = Store::open(&system.store_path()?)?;
    let mut reports = Vec::new();
    for target in targets {
        let release = Release { system, store: &store, target: &target, then, progress };
        let report = release.run().unwrap_or_else(|error| {
            let outcome = Outcome::of_error(&error);
            TargetReport::new(&target, outcome, format!("{error:#}"))
        });
        report.say();
        report.keep(&system.layout);
        reports.push(report);
    }
    finish(reports, json)
}

/// The targets of which a release was cut when everything was merged: they are on disk, and nobody can write to them.
fn left_covered(system: &System, named: &[PathBuf]) -> anyhow::Result<Vec<PathBuf>> {
    let Some(boot) = &system.boot else { return Ok(Vec::new()) };
    let mut left = Vec::new();
    for entry in boot.targets.iter().filter(|entry| entry.released) {
        let is_wanted = named.is_empty() || named.contains(&entry.path);
        if is_wanted && cover::is_covered(&system.layout, &entry.path, boot)? {
            left.push(entry.path.clone());
        }
    }
    Ok(left)
}

struct Release<'a> {
    system: &'a System,
    store: &'a Store,
    target: &'a Path,
    then: Then,
    progress: &'a Progress,
}

impl Release<'_> {
    fn run(&self) -> anyhow::Result<TargetReport> {
        let layout = &self.system.layout;
        let Some(mut boot) = BootState::read(&layout.boot_state())? else { bail!("boot.json is gone; reboot") };
        if let Some(why) = boot.target(self.target).and_then(|state| state.pinned.as_ref()) {
            return Ok(self.left(why));
        }
        if boot.target(self.target).is_none() {
            let (outcome, place) = self.settle(&mut boot)?;
            return Ok(TargetReport::new(self.target, outcome, format!("a release was cut; {place}")));
        }
        let mut _journal = None;
        if release::is_mounted(layout, self.target)? {
            let stats = checkpoint::one(self.system, self.store, self.target, false, None)?;
            if !stats.is_exact() {
                let saved = checkpoint::report(self.target, &stats, checkpoint::Shown::default());
                return Ok(self.left(&format!("not everything could be saved: {}", saved.message)));
            }
            let part = self.store.target(self.target);
            if self.stays_in_ram()? && stats.changes.is_empty() && part.sequences()?.is_empty() {
                let words = "nothing of it is in RAM".to_owned();
                return Ok(TargetReport::new(self.target, Outcome::Done, words));
            }
            let search = in_use::overlay::search(layout, self.target)?;
            warn_of_hidden(self.target, &search);
            if !search.users.is_empty() && search.users.iter().all(|user| user.is_called(JOURNALD)) {
                _journal = Some(Journal::relinquish());
            }
        }
        if let Some(users) = release::take_down(layout, self.target, &mut boot, &self.store.target(self.target))? {
            return Ok(self.left(&users));
        }
        let before = used(self.system)?;
        let merged = merge::one(self.system, self.store, self.target, false, false, self.progress);
        // The merge has its own words for boot.json.
        let Some(mut boot) = BootState::read(&layout.boot_state())? else { bail!("boot.json is gone; reboot") };
        let merged = match merged {
            Err(error) if boot.target(self.target).is_some() => return self.put_back(&mut boot, error),
            Err(error) => TargetReport::new(self.target, Outcome::Failed, format!("{:#}", anyhow::Error::from(error))),
            Ok(merged) => merged.unwrap_or_else(|| TargetReport::new(self.target, Outcome::Done, String::new())),
        };
        let freed = before.saturating_sub(used(self.system)?);
        let (outcome, place) = self.settle(&mut boot)?;
        let words = [&merged.message, &format!("{} of RAM freed", ByteSize(freed)), &place];
        let words: Vec<_> = words.into_iter().filter(|words| !words.is_empty()).map(String::as_str).collect();
        let failed = [merged.status, outcome.status()].contains(&Outcome::Failed.status());
        let partial = [merged.status, outcome.status()].contains(&Outcome::Partial.status());
        let outcome = if failed {
            Outcome::Failed
        } else if partial {
            Outcome::Partial
        } else {
            Outcome::Done
        };
        Ok(TargetReport { status: outcome.status(), message: words.join("; "), ..merged })
    }

    /// Whether there is to be an overlay afterwards.
    fn stays_in_ram(&self) -> anyhow::Result<bool> {
        Ok(self.then == Then::InRam && self.system.layout.load_config()?.overlay.activate == Activate::Boot)
    }

    /// It is left as it is, because of `why`.
    fn left(&self, why: &str) -> TargetReport {
        TargetReport::new(self.target, Outcome::Partial, format!("not released: {why}"))
    }

    /// Shows what was shown before, and says why.
    fn put_back(&self, boot: &mut BootState, error: Error) -> anyhow::Result<TargetReport> {
        let layout = &self.system.layout;
        let is_alive = matches!(error, Error::Alive { .. });
        let mut words = vec![format!("{:#}", anyhow::Error::from(error))];
        if is_alive {
            // Before there are two overlays on it, of which the kernel can only tell one.
            release::pin(layout, self.target, boot, &words[0])?;
        }
        match release::put_back(layout, self.target, boot, &self.store.target(self.target))? {
            None => words.push("it is in RAM as before".to_owned()),
            Some(error) => words.push(format!(
                "it is in RAM as before, but what a merge leaves may be seen, or a later shutdown be surprised: {:#}",
                anyhow::Error::from(error)
            )),
        }
        let words = words.join("; ");
        Ok(if is_alive { self.left(&words) } else { TargetReport::new(self.target, Outcome::Failed, words) })
    }

    /// Mounts what is to be there from now on. Where that fails it is the disk, and can be written to.
    fn settle(&self, boot: &mut BootState) -> anyhow::Result<(Outcome, String)> {
        let layout = &self.system.layout;
        let mounted = self.mount_anew();
        *boot = BootState::read(&layout.boot_state())?.unwrap_or_else(|| boot.clone());
        if is_active(Some(boot), self.target) {
            let skipped = mounted?.unwrap_or_default();
            let outcome = if skipped.is_empty() { Outcome::Done } else { Outcome::Partial };
            return Ok((outcome, with_reasons("in RAM anew", skipped)));
        }
        cover::uncover(layout, self.target, boot)?;
        Ok(match mounted {
            Ok(None) => (Outcome::Done, "on disk now".to_owned()),
            Ok(Some(skipped)) => (Outcome::Partial, with_reasons("on disk now", skipped)),
            Err(error) => (Outcome::Failed, format!("on disk now; {error:#}")),
        })
    }

    /// Mounts an overlay with nothing in it, where there is to be one; returns what was not done.
    fn mount_anew(&self) -> anyhow::Result<Option<Vec<Skipped>>> {
        // The merge may have brought another configuration to the disk.
        let plan = if self.stays_in_ram()? { plan_of(self.system, self.target)? } else { None };
        let Some(plan) = plan else { return Ok(None) };
        if let Some(reason) = release::wait_until_unused(&self.system.layout, self.target)? {
            // Whoever came to the disk in the meantime would keep it under the overlay.
            return Ok(Some(vec![Skipped { path: self.target.to_path_buf(), reason }]));
        }
        carry_out(self.system, self.target, plan, &|_| bail!("nothing is pending")).map(Some)
    }
}

fn with_reasons(words: &str, skipped: Vec<Skipped>) -> String {
    let reasons = skipped.into_iter().map(|skipped| skipped.reason);
    std::iter::once(words.to_owned()).chain(reasons).collect::<Vec<_>>().join("; ")
}

/// How much of the tmpfs is in use, in bytes.
fn used(system: &System) -> anyhow::Result<u64> {
    let path = system.layout.ram();
    let stat = statvfs(&path).at("statvfs", &path)?;
    Ok((stat.f_blocks - stat.f_bfree) * stat.f_frsize)
}

/// journald without its files in `/var/log/journal`, until this is dropped.
struct Journal;

impl Journal {
    fn relinquish() -> Self {
        journalctl("--relinquish-var");
        Self
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        journalctl("--flush");
    }
}

/// Asks journald; what it keeps open all the same is found by the next look.
fn journalctl(argument: &str) {
    let called = Command::new("journalctl").arg(argument).stdin(Stdio::null()).stdout(Stdio::null()).output();
    match called {
        Ok(output) if output.status.success() => {}
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr);
            tracing::warn!("journalctl {argument}: {}: {}", output.status, said.trim());
        }
        Err(error) => tracing::debug!("journalctl {argument}: {error}"),
    }
}
