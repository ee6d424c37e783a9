//! What brings things into RAM and frees it: logins, logouts, and a tmpfs that fills up.

use std::time::{Duration, Instant};

use ephemeral_overlay::config::{Activate, OnLogout};
use syncd::progress::Progress;
use syncd::room::{self, Action, Fill};
use syncd::system::System;

use super::Daemon;
use crate::cli::release::{self, Then};
use crate::cli::{Outcome, activate};

/// How often the tmpfs is looked at: a program may fill it in a moment.
const LOOK: Duration = Duration::from_secs(5);
/// How long it is given before more is tried.
const PAUSE: Duration = Duration::from_secs(60);

/// What is known of the tmpfs.
#[derive(Debug)]
pub(super) struct Pressure {
    looked: Instant,
    /// What was done about it, and when; nothing while there is room.
    done: Option<(Vec<Action>, Instant)>,
}

impl Pressure {
    pub(super) fn none() -> Self {
        Self { looked: Instant::now(), done: None }
    }

    /// When it is looked at next.
    pub(super) fn next(&self) -> Instant {
        self.looked + LOOK
    }

    /// Whether that is news, or has been going on for too long.
    fn is_due(&self, actions: &[Action]) -> bool {
        let Some((done, when)) = &self.done else { return true };
        *done != actions || actions.contains(&Action::Release) && when.elapsed() >= PAUSE
    }
}

impl Daemon {
    pub(super) fn at_the_first_login(&mut self) {
        if self.system.config.overlay.activate == Activate::Login {
            let targets = self.system.config.overlay.dirs.clone();
            self.change("activate", |system| activate::run(system, &targets, &Progress::new(None), false));
        }
    }

    pub(super) fn after_the_last_logout(&mut self) {
        self.save("the last logout");
        if self.system.config.overlay.activate == Activate::Login {
            self.release(Then::OnDisk);
        } else if self.system.config.checkpoint.on_logout == OnLogout::Release {
            self.release(Then::InRam);
        }
        if self.is_config_valid {
            self.cleaner.clean_what_is_unused(&self.system);
        }
    }

    /// Sees to it that the targets can be written to.
    pub(super) fn make_room(&mut self) {
        if Instant::now() < self.pressure.next() {
            return;
        }
        self.pressure.looked = Instant::now();
        let looked = self.system.now().and_then(|system| Ok((Fill::of(&system)?, room::look(&system)?)));
        // Before it grows.
        let (fill, actions) = match looked {
            Ok(looked) => looked,
            // The next checkpoint says what is wrong.
            Err(error) => return tracing::debug!("{error}"),
        };
        if actions.is_empty() {
            self.pressure.done = None;
        } else if self.pressure.is_due(&actions) {
            tracing::warn!("the tmpfs of the targets is {} % full", fill.percent());
            self.save("it is nearly full");
            if actions.contains(&Action::Release) {
                self.release(Then::InRam);
            }
            self.pressure.done = Some((actions, Instant::now()));
        }
    }

    fn release(&mut self, then: Then) {
        self.change("release", |system| release::run(system, &[], then, &Progress::new(None), false));
    }

    /// Does something that one at a time may do.
    fn change(&self, what: &str, act: impl FnOnce(&System) -> anyhow::Result<Outcome>) {
        let done = (|| {
            let mut system = self.system.now()?;
            let _state = system.lock()?;
            act(&system)
        })();
        if let Err(error) = done {
            tracing::error!("{what}: {error:#}");
        }
    }
}
