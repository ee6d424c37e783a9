//! `syncd clean`: one pass of the cleaner.
//!
//! A pass ages nothing that no earlier one has met, because a clock that was set, or a night of suspend, would age
//! everything. So the first one in a boot removes nothing; it notes in the run directory what it met, and one that comes
//! later than `cleanup.stale`, by hand or by the daemon, goes on from there.

use std::time::Duration;

use anyhow::bail;
use bytesize::ByteSize;
use early::apply::create_run_dir;
use serde::Serialize;
use syncd::clean::{CleanOptions, CleanStats, FolderStats, Moment, Seen, pass};
use syncd::system::System;

use super::report::{JSON_VERSION, count};
use super::{Outcome, say};

/// The object that `--json` prints.
#[derive(Debug, Serialize)]
struct Report {
    version: u32,
    /// Nothing was removed.
    dry_run: bool,
    /// One for each tmpfs folder.
    folders: Vec<Folder>,
    /// What was removed, or would be, in the order in which it went.
    removed: Vec<Removed>,
    /// Processes that could not be looked at: what only they use is not known to be in use.
    hidden_processes: Vec<u32>,
}

#[derive(Debug, Serialize)]
struct Folder {
    path: String,
    /// Files and symlinks that were removed.
    files: usize,
    /// Directories that were removed.
    directories: usize,
    /// What that freed.
    bytes: u64,
    /// Names that are old enough and in use.
    in_use: usize,
    /// Names that are old enough by their times, and not known for long enough.
    waiting: usize,
    /// Names that could not be looked at or removed.
    failed: usize,
    /// Why, of the first ten.
    errors: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Removed {
    /// What is no UTF-8 in it is U+FFFD.
    path: String,
    /// `file` (or symlink) or `directory`.
    kind: &'static str,
    /// Seconds for which nobody had touched it.
    age: u64,
    /// What that freed.
    bytes: u64,
}

pub(crate) fn run(system: &System, dry_run: bool, json: bool) -> anyhow::Result<Outcome> {
    if !system.live {
        bail!("{} is not the running system", system.layout.root().display());
    }
    if let Some(error) = &system.config_error {
        bail!("{error}; what is to be kept is not known, nothing is removed");
    }
    let run_dir = system.layout.run_dir();
    let mut seen = Seen::load(run_dir);
    let (mut removed, mut lines) = (Vec::new(), String::new());
    // What lies together is often of one age, in seconds, which is formatted once.
    let (mut seconds, mut shown) = (0, age(Duration::ZERO));
    let options = CleanOptions { now: Moment::now(), dry_run };
    let stats = pass(&system.layout, &system.config, &options, &mut seen, &mut |gone| {
        let path = gone.path.to_string_lossy();
        if json {
            let kind = if gone.is_dir { "directory" } else { "file" };
            removed.push(Removed { path: path.into_owned(), kind, age: gone.age.as_secs(), bytes: gone.bytes });
        } else if dry_run {
            if gone.age.as_secs() != seconds {
                (seconds, shown) = (gone.age.as_secs(), age(gone.age));
            }
            lines.extend([&path, " (", &shown, ")\n"]);
        } else {
            tracing::debug!("{path}: removed ({})", age(gone.age));
        }
    })?;
    if let Some(lines) = lines.strip_suffix('\n') {
        say(lines);
    }
    if !dry_run {
        create_run_dir(run_dir)?;
        seen.save(run_dir)?;
    }
    tell(&stats, dry_run);
    let outcome = if stats.is_exact() { Outcome::Done } else { Outcome::Partial };
    if json {
        let CleanStats { folders, hidden } = stats;
        let folders = folders.into_iter().map(Folder::from).collect();
        let report = Report { version: JSON_VERSION, dry_run, folders, removed, hidden_processes: hidden };
        say(&serde_json::to_string_pretty(&report)?);
    }
    Ok(outcome)
}

/// `1h 2m 3s`.
fn age(age: Duration) -> String {
    humantime::format_duration(Duration::from_secs(age.as_secs())).to_string()
}

fn tell(stats: &CleanStats, dry_run: bool) {
    if stats.folders.is_empty() {
        tracing::info!("nothing to clean: none of the folders in [tmpfs] is a tmpfs");
    }
    if !stats.hidden.is_empty() {
        let hidden = &stats.hidden;
        tracing::warn!("even root cannot see what these processes use: {hidden:?}");
    }
    let would = if dry_run { "would be " } else { "" };
    for folder in &stats.folders {
        let path = folder.path.display();
        let mut words = vec![format!(
            "{} and {} {would}removed, {}",
            count(folder.files, "file"),
            if folder.directories == 1 {
                "1 directory".to_owned()
            } else {
                format!("{} directories", folder.directories)
            },
            ByteSize(folder.bytes)
        )];
        if folder.in_use > 0 {
            words.push(format!("{} in use", folder.in_use));
        }
        if folder.waiting > 0 {
            words.push(format!("{} old, but not known for long enough: run it again later", folder.waiting));
        }
        tracing::info!("{path}: {}", words.join("; "));
        if folder.failed > 0 {
            tracing::warn!("{path}: {} could not be removed:", folder.failed);
        }
        for error in &folder.errors {
            tracing::warn!("{error}: {}", error.source);
        }
    }
}

impl From<FolderStats> for Folder {
    fn from(stats: FolderStats) -> Self {
        let errors = stats.errors.iter().map(|error| format!("{error}: {}", error.source));
        Self {
            path: stats.path.to_string_lossy().into_owned(),
            files: stats.files,
            directories: stats.directories,
            bytes: stats.bytes,
            in_use: stats.in_use,
            waiting: stats.waiting,
            failed: stats.failed,
            errors: errors.collect(),
        }
    }
}
