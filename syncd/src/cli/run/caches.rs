//! The caches of users, where no systemd starts one before the first process of each session. They are in RAM before
//! anybody logs in (the service's start has seen to it; whoever was added later follows), and are emptied when nothing of
//! their user runs any more after somebody has left. To make one only at a login would come too late: that is known only
//! when processes of the user run.

use std::path::Path;
use std::time::{Duration, Instant};

use syncd::system::System;
use syncd::user_cache::{self, State, User};

use crate::cli::Outcome;
use crate::cli::report::TargetReport;
use crate::cli::user_cache::{is_off, report, start};

/// What tells that systemd runs (`sd_booted(3)`).
const SYSTEMD: &str = "/run/systemd/system";
/// How often it is looked whether the processes of somebody who left have ended.
const LOOK: Duration = Duration::from_secs(5);
/// For how long. What runs on after that may run for days.
const PATIENCE: Duration = Duration::from_secs(60);

/// What is known of them.
#[derive(Debug, Default)]
pub(super) struct Caches {
    /// Whose caches are to be emptied, as soon as nothing of theirs runs any more.
    waiting: Vec<User>,
    /// When it is looked for that, and until when.
    next: Option<(Instant, Instant)>,
}

impl Caches {
    /// When they are to be looked at.
    pub(super) fn next(&self) -> Option<Instant> {
        self.next.map(|(next, _)| next)
    }

    /// Somebody left, whose processes are about to end. Who it was only some of those know that tell.
    pub(super) fn somebody_left(&mut self, system: &System) {
        if are_ours(system) {
            let now = Instant::now();
            self.waiting = people(system);
            self.next = Some((now, now + PATIENCE));
        }
    }

    /// Brings those into RAM that are not there.
    pub(super) fn start(system: &System) {
        if are_ours(system) {
            for user in people(system) {
                say(&user, start(system, &user));
            }
        }
    }

    /// Empties those of which nobody is left, if it is time to look.
    pub(super) fn empty_what_is_due(&mut self, system: &System) {
        let now = Instant::now();
        let Some((_, until)) = self.next.filter(|(next, _)| *next <= now) else { return };
        let (busy, idle) = std::mem::take(&mut self.waiting).into_iter().partition(|user| {
            // Whoever cannot be looked at keeps what is there.
            user.runs_anything().unwrap_or(true)
        });
        self.waiting = busy;
        for user in &idle {
            say(user, empty(system, user));
        }
        self.next = Some((now + LOOK, until)).filter(|(next, until)| next <= until && !self.waiting.is_empty());
    }
}

/// Whether it is for us to see to them.
fn are_ours(system: &System) -> bool {
    system.boot.is_some() && !Path::new(SYSTEMD).exists() && !is_off(system).unwrap_or(true)
}

/// What was in RAM is gone; an empty one takes its place at once, for the next login.
fn empty(system: &System, user: &User) -> anyhow::Result<TargetReport> {
    let stopped = user_cache::stop(system, user)?;
    if stopped.state == State::InUse { Ok(report(&stopped)) } else { start(system, user) }
}

fn people(system: &System) -> Vec<User> {
    User::people(&system.layout).unwrap_or_else(|error| {
        tracing::warn!("the caches of users: {:#}", anyhow::Error::from(error));
        Vec::new()
    })
}

/// Says what is not well.
fn say(user: &User, done: anyhow::Result<TargetReport>) {
    match done {
        Ok(report) if report.status == Outcome::Done.status() => {
            tracing::debug!("{}: {}", report.target.display(), report.message);
        }
        Ok(report) => report.say(),
        Err(error) => tracing::warn!("the cache of user {}: {error:#}", user.uid),
    }
}
