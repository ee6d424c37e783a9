//! `syncd user-cache`: brings `~/.cache` of a user into RAM before the first process of a session, and back to disk after
//! the last.

use std::path::Path;

use anyhow::bail;
use clap::Subcommand;
use ephemeral_overlay::cmdline::{KernelCmdline, Mode};
use ephemeral_overlay::error::At;
use ephemeral_overlay::state::Skipped;
use indicatif::{ProgressBar, ProgressStyle};
use syncd::Error;
use syncd::system::System;
use syncd::user_cache::{self, Done, Event, State, User};

use super::Outcome;
use super::report::{TargetReport, finish};

/// What is to be done.
#[derive(Debug, Subcommand)]
pub(crate) enum Action {
    /// Bring the cache into RAM
    Start {
        /// The user's number [default: everybody who may log in]
        uid: Option<u32>,
    },
    /// Bring the cache back to disk
    Stop {
        /// The user's number [default: everybody who may log in]
        uid: Option<u32>,
    },
}

pub(crate) fn run(system: &System, action: &Action, json: bool) -> anyhow::Result<Outcome> {
    let &(Action::Start { uid } | Action::Stop { uid }) = action;
    let users = match uid {
        Some(uid) => vec![User::find(&system.layout, uid)?.ok_or(Error::UnknownUser { uid })?],
        None => User::people(&system.layout)?,
    };
    if !system.live {
        bail!("{} is not the running system", system.layout.root().display());
    }
    if let Action::Start { .. } = action {
        if let Some(error) = &system.config_error {
            bail!("{error}; nothing is mounted");
        }
        if is_off(system)? {
            tracing::info!("nothing to do: the kernel command line says so");
            return finish(Vec::new(), json);
        }
    }
    let one = |user: &User| match action {
        Action::Start { .. } => start(system, user),
        Action::Stop { .. } => Ok(report(&user_cache::stop(system, user)?)),
    };
    if let (Some(_), [user]) = (uid, users.as_slice()) {
        let report = one(user)?;
        report.say();
        return finish(vec![report], json);
    }
    let reports = users.iter().map(|user| {
        // Whoever made of a cache what cannot be used keeps nobody else from theirs.
        let report = one(user).unwrap_or_else(|error| {
            TargetReport::new(&user.home.join(".cache"), Outcome::of_error(&error), format!("{error:#}"))
        });
        report.say();
        report
    });
    finish(reports.collect(), json)
}

/// Brings the cache of a user into RAM.
pub(super) fn start(system: &System, user: &User) -> anyhow::Result<TargetReport> {
    let bar = bar();
    Ok(report(&user_cache::start(system, user, &|event| show(&bar, event))?))
}

/// What became of a cache.
pub(super) fn report(done: &Done) -> TargetReport {
    let mut words = vec![done.state.to_string()];
    words.extend(done.left.iter().map(|Skipped { path, reason }| {
        if *path == done.path { reason.clone() } else { format!("{}: {reason}", path.display()) }
    }));
    let is_whole = done.left.is_empty() && done.state != State::InUse;
    let outcome = if is_whole { Outcome::Done } else { Outcome::Partial };
    TargetReport::new(&done.path, outcome, words.join("; "))
}

/// `ephemeral_overlay=off` is for all that we mount.
pub(super) fn is_off(system: &System) -> anyhow::Result<bool> {
    if system.layout.root() != Path::new("/") {
        return Ok(false);
    }
    let text = std::fs::read("/proc/cmdline").at("read", "/proc/cmdline")?;
    Ok(KernelCmdline::parse(&String::from_utf8_lossy(&text)).mode() != Mode::Normal)
}

/// Seen by people only: where standard error is no terminal it shows nothing.
fn bar() -> ProgressBar {
    let style = ProgressStyle::with_template("{bar:40} {binary_bytes} of {binary_total_bytes}, {eta} left");
    ProgressBar::no_length().with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

fn show(bar: &ProgressBar, event: Event<'_>) {
    match event {
        Event::Copy { from, to, bytes } => {
            let size = bytesize::ByteSize(bytes);
            tracing::info!("{}: copying {size} to {}", from.display(), to.display());
            bar.set_length(bytes);
            bar.set_position(0);
        }
        Event::Copied(bytes) => bar.inc(bytes),
        Event::End => bar.finish_and_clear(),
    }
}
