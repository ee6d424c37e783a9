//! The cleaner, as the daemon uses it: a pass every `cleanup.interval`, and one at the last logout, after which nothing
//! that is unused is of any use.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use bytesize::ByteSize;
use syncd::clean::{CleanOptions, CleanStats, Moment, Seen, pass};
use syncd::system::System;

use super::log;
use crate::cli::report::count;

/// What the cleaner knows from pass to pass.
#[derive(Debug)]
pub(super) struct Cleaner {
    seen: Seen,
    last: Instant,
    /// What could not be done, as it was said: once.
    said: BTreeSet<String>,
}

impl Cleaner {
    /// Goes on from what an earlier pass in this boot knew.
    pub(super) fn new(system: &System) -> Self {
        Self { seen: Seen::load(system.layout.run_dir()), last: Instant::now(), said: BTreeSet::new() }
    }

    /// When the next pass is due.
    pub(super) fn next(&self, system: &System) -> Instant {
        self.last + system.config.cleanup.interval
    }

    /// Removes what is stale, if it is time for that.
    pub(super) fn clean_what_is_due(&mut self, system: &System) {
        if Instant::now() >= self.next(system) {
            self.clean(system, system.config.cleanup.stale);
        }
    }

    /// Removes what nothing uses, whatever its age.
    pub(super) fn clean_what_is_unused(&mut self, system: &System) {
        // A pass ages only what one before it has met.
        self.clean(system, Duration::ZERO);
        self.clean(system, Duration::ZERO);
    }

    fn clean(&mut self, system: &System, stale: Duration) {
        let mut config = system.config.clone();
        config.cleanup.stale = stale;
        let options = CleanOptions { now: Moment::now(), dry_run: false };
        let done = pass(&system.layout, &config, &options, &mut self.seen, &mut |gone| {
            tracing::debug!(target: log::OWN, "{}: removed, {} s old", gone.path.display(), gone.age.as_secs());
        });
        let mut complaints = BTreeSet::new();
        match done {
            Ok(stats) => complaints.extend(tell(&stats)),
            Err(error) => drop(complaints.insert(format!("nothing was cleaned: {error}"))),
        }
        complaints.difference(&self.said).for_each(|complaint| tracing::warn!("{complaint}"));
        self.said = complaints;
        // Whoever cleans by hand, or the daemon after this one, goes on from there.
        if let Err(error) = self.seen.save(system.layout.run_dir()) {
            tracing::debug!("{error}");
        }
        self.last = Instant::now();
    }
}

/// Says what a pass removed, and returns what there is to complain about.
fn tell(stats: &CleanStats) -> Vec<String> {
    let mut complaints = Vec::new();
    if !stats.hidden.is_empty() {
        complaints.push(format!("even root cannot see what these processes use: {:?}", stats.hidden));
    }
    for folder in &stats.folders {
        let path = folder.path.display();
        let gone = folder.files + folder.directories;
        if gone > 0 {
            tracing::info!(target: log::OWN, "{path}: {} cleaned, {}", count(gone, "name"), ByteSize(folder.bytes));
        }
        complaints.extend(folder.errors.iter().map(|error| format!("{error}: {}", error.source)));
    }
    complaints
}
