//! `syncd run`: the daemon. It saves what is in RAM at the last logout, at intervals, before a suspend, when it is asked
//! to, and when it ends; it sees to it that there is room in RAM, cleans the tmpfs folders, and sees to the caches of users
//! where no systemd does.
//!
//! Threads of their own wait for signals and for sessions; all that is done is done here, one thing after the other. A
//! checkpoint never holds anything in a target open longer than it lasts, nor does the log.

mod caches;
mod cleaning;
pub(super) mod log;
mod ram;
mod watchdog;

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;
use caches::Caches;
use cleaning::Cleaner;
use ram::Pressure;
use sd_notify::NotifyState;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals;
use syncd::schedule::Schedule;
use syncd::sessions::{Change, Sessions, Turn};
use syncd::system::System;
use watchdog::Watchdog;

use super::Outcome;
use super::checkpoint::{self, Shown};
use super::report::{TargetReport, in_words, worst};

/// When logind is looked for again after it has gone: it may be on its way back.
const RETURN: Duration = Duration::from_secs(5);

/// What the daemon waits for.
#[derive(Debug)]
enum Event {
    Signal(i32),
    Session(Change),
}

struct Daemon {
    /// With the configuration that is in force.
    system: System,
    events: Receiver<Event>,
    sender: Sender<Event>,
    schedule: Schedule,
    sessions: Sessions,
    /// Has a suspend wait for us.
    delay: Option<OwnedFd>,
    /// When sessions are to be looked for again.
    find: Option<Instant>,
    /// What was said last about a target that is not well: it is said once.
    said: BTreeMap<PathBuf, String>,
    /// What systemd was told last.
    state: String,
    /// What is to be kept is known only from a configuration that is valid.
    is_config_valid: bool,
    cleaner: Cleaner,
    caches: Caches,
    pressure: Pressure,
    watchdog: Watchdog,
}

/// Runs until a signal ends it; the outcome is that of the last checkpoint.
pub(crate) fn run(system: System) -> anyhow::Result<Outcome> {
    if let Some(error) = &system.config_error {
        tracing::warn!("{error}; the defaults are used until a SIGHUP finds it mended");
    }
    let (sender, events) = mpsc::channel();
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP, SIGUSR1]).context("sigaction")?;
    let to = sender.clone();
    thread::spawn(move || signals.forever().all(|signal| to.send(Event::Signal(signal)).is_ok()));
    let sessions = find_sessions(&sender);
    let mut daemon = Daemon {
        delay: sessions.delay_sleep(),
        is_config_valid: system.config_error.is_none(),
        cleaner: Cleaner::new(&system),
        caches: Caches::default(),
        pressure: Pressure::none(),
        system,
        events,
        sender,
        schedule: Schedule::default(),
        sessions,
        find: None,
        said: BTreeMap::new(),
        state: String::new(),
        watchdog: Watchdog::start(),
    };
    if daemon.is_config_valid {
        Caches::start(&daemon.system);
    }
    daemon.look_at_sessions();
    daemon.say_state(&[NotifyState::Ready]);
    tracing::info!("{} is watched; sessions are told by {}", daemon.targets_in_words(), daemon.sessions.source());
    Ok(daemon.serve())
}

fn find_sessions(sender: &Sender<Event>) -> Sessions {
    let sender = sender.clone();
    // Nobody listens any more only when we end.
    Sessions::find(move |change| drop(sender.send(Event::Session(change))))
}

impl Daemon {
    fn serve(&mut self) -> Outcome {
        loop {
            self.find_sessions_again();
            self.save_what_is_due();
            self.make_room();
            if self.is_config_valid {
                let _busy = self.watchdog.busy();
                self.cleaner.clean_what_is_due(&self.system);
                self.caches.empty_what_is_due(&self.system);
            }
            let left = self.next_deadline().saturating_duration_since(Instant::now());
            let event = self.events.recv_timeout(left);
            let busy = self.watchdog.busy();
            match event {
                Ok(Event::Signal(SIGHUP)) => self.reload(),
                Ok(Event::Signal(SIGUSR1)) => drop(self.save("asked for by a signal")),
                Ok(Event::Signal(_)) | Err(RecvTimeoutError::Disconnected) => {
                    self.say_state(&[NotifyState::Stopping]);
                    return self.save("the end");
                }
                Ok(Event::Session(change)) => self.session(change),
                // A display that was killed left its socket behind, and nobody was told.
                Err(RecvTimeoutError::Timeout) if !self.sessions.tells_all() => self.look_at_sessions(),
                Err(RecvTimeoutError::Timeout) => {}
            }
            drop(busy);
        }
    }

    fn next_deadline(&self) -> Instant {
        let config = &self.system.config.checkpoint;
        let save = self.schedule.next(config).filter(|_| config.snapshot);
        let clean = Some(self.cleaner.next(&self.system)).filter(|_| self.is_config_valid);
        [save, clean, self.find, self.caches.next()].into_iter().flatten().fold(self.pressure.next(), Instant::min)
    }

    fn is_saving_at_intervals(&self) -> bool {
        self.system.config.checkpoint.snapshot
    }

    fn session(&mut self, change: Change) {
        match change {
            Change::Sessions => self.look_at_sessions(),
            Change::Sleep => {
                if self.is_saving_at_intervals() {
                    self.save("a suspend");
                }
                self.delay = None;
            }
            Change::Awake => self.delay = self.sessions.delay_sleep(),
            Change::Lost => {
                self.delay = None;
                self.find = Some(Instant::now() + RETURN);
            }
        }
    }

    fn find_sessions_again(&mut self) {
        if self.find.is_some_and(|when| Instant::now() >= when) {
            self.find = None;
            self.sessions = find_sessions(&self.sender).after(&self.sessions);
            self.delay = self.sessions.delay_sleep();
            tracing::info!("sessions are told by {}", self.sessions.source());
            self.look_at_sessions();
        }
    }

    fn look_at_sessions(&mut self) {
        let turn = self.sessions.look();
        if self.sessions.somebody_left() {
            self.caches.somebody_left(&self.system);
        }
        match turn {
            Turn::None => {}
            Turn::FirstLogin => {
                tracing::info!("the first login");
                self.at_the_first_login();
            }
            Turn::LastLogout => self.after_the_last_logout(),
        }
        let state = self.sessions.count().map_or("nobody knows who is logged in".to_owned(), |count| {
            format!("{} logged in", super::report::count(count, "user"))
        });
        if state != self.state {
            self.say_state(&[NotifyState::Status(&state)]);
            self.state = state;
        }
    }

    /// Saves everything, and says why.
    fn save(&mut self, why: &str) -> Outcome {
        tracing::info!("checkpoint: {why}");
        match self.in_ram() {
            Ok((system, targets)) => self.take(&system, &targets, TargetReport::say),
            Err(error) => {
                tracing::error!("{}", in_words(error));
                Outcome::Failed
            }
        }
    }

    /// Saves what has not been looked at for its interval. That is no news: what it comes to is said in our own log only,
    /// which is no reason for the next one. Else the journal would have something new each time.
    fn save_what_is_due(&mut self) {
        if !self.is_saving_at_intervals() {
            return;
        }
        let _busy = self.watchdog.busy();
        let mut said = std::mem::take(&mut self.said);
        match self.in_ram() {
            Ok((system, targets)) => {
                let due = self.schedule.due(&self.system.config.checkpoint, &targets, Instant::now());
                if !due.is_empty() {
                    self.take(&system, &due, |report| say_news(&mut said, report));
                }
            }
            Err(error) => {
                say_news(&mut said, &TargetReport::new(Path::new("/"), Outcome::Failed, in_words(error)));
            }
        }
        self.said = said;
    }

    /// The system at this moment, and what of it is in RAM.
    fn in_ram(&self) -> anyhow::Result<(System, Vec<PathBuf>)> {
        let system = self.system.now()?;
        let targets = checkpoint::mounted(&system, &[])?;
        Ok((system, targets))
    }

    fn take(&mut self, system: &System, targets: &[PathBuf], say: impl FnMut(&TargetReport)) -> Outcome {
        let reports =
            if targets.is_empty() { Vec::new() } else { checkpoint::take_all(system, targets, Shown::default(), say) };
        for target in targets {
            self.schedule.looked(target, Instant::now());
        }
        worst(&reports)
    }

    /// Saves everything under the old configuration, and goes on with the new one if it is valid.
    fn reload(&mut self) {
        self.say_state(&[NotifyState::Reloading]);
        self.save("a new configuration");
        match self.system.layout.load_config() {
            Ok(config) => {
                log::to_file(&self.system.layout.below_root(&config.log.file));
                self.system.config = config;
                self.is_config_valid = true;
                Caches::start(&self.system);
                tracing::info!("the configuration was read again");
            }
            Err(error) => tracing::error!("{error}; the configuration stays what it was"),
        }
        self.say_state(&[NotifyState::Ready]);
    }

    /// Tells systemd, if that started us.
    #[allow(clippy::unused_self, reason = "only a daemon has a state")]
    fn say_state(&self, state: &[NotifyState<'_>]) {
        if let Err(error) = sd_notify::notify(state) {
            tracing::debug!("sd_notify: {error}");
        }
    }

    fn targets_in_words(&self) -> String {
        let targets = self.system.mounted_targets(&[]).unwrap_or_default();
        let words: Vec<_> = targets.iter().map(|target| target.display().to_string()).collect();
        if words.is_empty() { "nothing in RAM".to_owned() } else { words.join(", ") }
    }
}

/// Says what an interval came to: to all where it is not well and was not said before, else to our log.
fn say_news(said: &mut BTreeMap<PathBuf, String>, report: &TargetReport) {
    let (target, message) = (&report.target, &report.message);
    if report.status == Outcome::Done.status() {
        if said.remove(target).is_some() {
            tracing::info!("{}: all is well again", target.display());
        }
        if report.sequence.is_some() {
            tracing::info!(target: log::OWN, "{}: {message}", target.display());
        }
    } else if said.insert(target.clone(), message.clone()).as_ref() != Some(message) {
        report.say();
    }
}

/// Where the daemon of a system logs to.
pub(super) fn log_file(system: &System) -> PathBuf {
    let file: &Path = &system.config.log.file;
    system.layout.below_root(file)
}
