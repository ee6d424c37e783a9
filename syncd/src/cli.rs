//! The command line: arguments, exit status, and the few words that go to standard output.

mod activate;
mod checkpoint;
mod clean;
mod export;
mod generator;
mod last_stage;
mod merge;
mod release;
mod report;
mod run;
mod status;
mod user_cache;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{ArgAction, Args as Arguments, Parser, Subcommand};
use ephemeral_overlay::Layout;
use release::Then;
use syncd::Error;
use syncd::progress::Progress;
use syncd::system::System;
use tracing_subscriber::Layer;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// Brings what the overlays keep in RAM back to disk: checkpoints while they are mounted, merges once they are not.
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = "Exit status: 0 done; 1 failed, nothing changed; 2 usage; 3 done, but something was left or is fuzzy (said on standard error)."
)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    common: Common,
}

#[derive(Debug, Arguments)]
struct Common {
    /// The system's root
    #[arg(long, global = true, value_name = "DIR", default_value = "/")]
    root: PathBuf,
    /// The run directory, not relative to --root [default: /run/initramfs/ephemeral-overlay]
    #[arg(long, global = true, value_name = "DIR")]
    run_dir: Option<PathBuf>,
    /// The configuration [default: etc/ephemeral-overlay.toml below --root]
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where to leave a sign of life, for who limits a merge that does not get on
    #[arg(long, global = true, value_name = "FILE", hide = true)]
    progress: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long, global = true)]
    json: bool,
    /// Say more
    #[arg(short, long, global = true, action = ArgAction::Count, conflicts_with = "quiet")]
    verbose: u8,
    /// Say only what went wrong
    #[arg(short, long, global = true)]
    quiet: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// The daemon: checkpoints at the last logout, at intervals, before a suspend, on SIGUSR1, and at its end
    Run,
    /// Write what changed in RAM to the store; durable when it returns 0
    Checkpoint {
        /// Targets, for example /etc [default: all]
        targets: Vec<PathBuf>,
        /// Say what would be written, and write nothing
        #[arg(long)]
        dry_run: bool,
    },
    /// Bring the checkpoints of targets that are not mounted to their directories
    Merge {
        /// Targets, for example /etc [default: all]
        targets: Vec<PathBuf>,
        /// Merge what stands before a damaged checkpoint, and set the rest aside
        #[arg(long, conflicts_with = "set_aside")]
        accept_prefix: bool,
        /// Merge nothing: move the checkpoints away, into `aside` in the store
        #[arg(long)]
        set_aside: bool,
    },
    /// Bring into RAM what had to wait for a file system
    Activate {
        /// Targets or tmpfs folders, for example /var/log [default: all that wait]
        targets: Vec<PathBuf>,
    },
    /// Free the RAM of what nothing uses: save it, unmount it, merge it, and mount it again with nothing in RAM
    Release {
        /// Targets, for example /etc [default: all]
        targets: Vec<PathBuf>,
    },
    /// The same, and leave it on disk until it is activated, or until the next boot
    Deactivate {
        /// Targets, for example /etc [default: all]
        targets: Vec<PathBuf>,
    },
    /// Write what the checkpoints hold as an OCI image layer: a tar archive with zstd
    Export {
        /// Targets, for example /etc [default: all]
        targets: Vec<PathBuf>,
        /// As it was at this checkpoint of the one target that is named [default: the newest]
        #[arg(long, value_name = "N")]
        seq: Option<u64>,
        /// Where to; `-` is standard output
        #[arg(long, short, value_name = "FILE")]
        output: PathBuf,
    },
    /// Remove what nobody has touched for a while from the tmpfs folders
    Clean {
        /// List what would go, with its age, and remove nothing
        #[arg(long)]
        dry_run: bool,
    },
    /// What is in RAM, what is in the store
    Status,
    /// For systemd: this boot came as far as here
    #[command(hide = true)]
    Booted,
    /// At the end of a shutdown: a last checkpoint of what is in RAM, and merge everything
    #[command(hide = true)]
    LastStage,
    /// For systemd: keep the file systems below our overlays mounted until the end of a shutdown
    #[command(hide = true)]
    Generator {
        /// Where generated units go
        directory: PathBuf,
        /// Where those go that come before or after others
        others: Vec<PathBuf>,
    },
    /// For systemd: the cache of a user in RAM, for a session
    #[command(hide = true)]
    UserCache {
        #[command(subcommand)]
        action: user_cache::Action,
    },
    /// For `early`: unpack a chain that cannot be merged into an upper directory
    #[command(hide = true)]
    Unpack {
        target: PathBuf,
        #[arg(long)]
        upper: PathBuf,
    },
}

impl Command {
    /// Whether it mounts or frees something, which one at a time may do.
    fn changes_boot_state(&self) -> bool {
        matches!(
            self,
            Self::Merge { .. }
                | Self::Activate { .. }
                | Self::Release { .. }
                | Self::Deactivate { .. }
                | Self::LastStage
        )
    }
}

/// What a command came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Outcome {
    /// Everything was done.
    Done,
    /// Something was left, or is fuzzy; it was said.
    Partial,
    /// The command line names something that does not exist.
    Usage,
    /// It failed; what was there before is untouched.
    Failed,
}

impl Outcome {
    /// The exit status, which scripts rely on.
    pub(crate) fn status(self) -> u8 {
        match self {
            Self::Done => 0,
            Self::Failed => 1,
            Self::Usage => 2,
            Self::Partial => 3,
        }
    }

    /// What an error means for the exit status.
    pub(crate) fn of_error(error: &anyhow::Error) -> Self {
        match error.downcast_ref() {
            Some(Error::UnknownTarget { .. } | Error::UnknownUser { .. }) => Self::Usage,
            Some(Error::Alive { .. } | Error::NotMounted { .. } | Error::Left { .. }) => Self::Partial,
            _ => Self::Failed,
        }
    }
}

impl From<Outcome> for ExitCode {
    fn from(outcome: Outcome) -> Self {
        Self::from(outcome.status())
    }
}

/// Runs the command.
pub(crate) fn run(args: &Args) -> anyhow::Result<Outcome> {
    let Common { root, run_dir, config, progress, json, .. } = &args.common;
    let progress = Progress::new(progress.as_deref());
    // It must not need what the others need.
    if let Command::Generator { directory, .. } = &args.command {
        return generator::run(&Layout::new(root, run_dir.as_deref(), config.as_deref()), directory);
    }
    let mut system = System::open(root, run_dir.as_deref(), config.as_deref())?;
    if let Command::Run = &args.command {
        run::log::to_file(&run::log_file(&system));
        return run::run(system);
    }
    let _state = if args.command.changes_boot_state() { system.lock()? } else { None };
    let outcome = match &args.command {
        Command::Checkpoint { targets, dry_run } => checkpoint::run(&system, targets, *dry_run, *json),
        Command::Merge { targets, set_aside: true, .. } => merge::set_aside(&system, targets, *json),
        Command::Merge { targets, accept_prefix, .. } => merge::run(&system, targets, *accept_prefix, &progress, *json),
        Command::Activate { targets } => activate::run(&system, targets, &progress, *json),
        Command::Release { targets } => release::run(&system, targets, Then::InRam, &progress, *json),
        Command::Deactivate { targets } => release::run(&system, targets, Then::OnDisk, &progress, *json),
        Command::Export { targets, seq, output } => export::run(&system, targets, *seq, output),
        Command::Clean { dry_run } => clean::run(&system, *dry_run, *json),
        Command::Status => status::run(&system, *json),
        Command::Booted => checkpoint::booted(&system),
        Command::LastStage => last_stage::run(&system, &progress, *json),
        Command::UserCache { action } => user_cache::run(&system, action, *json),
        // They returned above.
        Command::Generator { .. } | Command::Run => Ok(Outcome::Done),
        Command::Unpack { target, upper } => merge::unpack(&system, target, upper, &progress),
    }?;
    let Some(error) = system.config_error else { return Ok(outcome) };
    tracing::warn!("{error}; the defaults were used");
    Ok(outcome.max(Outcome::Partial))
}

/// Messages go to standard error, without time stamps: whoever keeps them adds those. Those of the daemon go to its own
/// log as well.
pub(crate) fn log(args: &Args) {
    let level = match (args.common.quiet, args.common.verbose) {
        (true, _) => LevelFilter::ERROR,
        (false, 0) => LevelFilter::INFO,
        (false, 1) => LevelFilter::DEBUG,
        (false, _) => LevelFilter::TRACE,
    };
    // Not what others have to say, the D-Bus library for one.
    let ours = Targets::new().with_target("syncd", level);
    let layer = || {
        // A message that cannot be written, to a log on a full disk perhaps, must not end what it is about.
        fmt::layer().log_internal_errors(false).with_target(false).with_ansi(false)
    };
    let mut layers = vec![layer().with_writer(std::io::stderr).without_time().with_filter(ours.clone()).boxed()];
    if let Command::Run = args.command {
        let all = ours.with_target(run::log::OWN, level);
        layers.push(layer().with_writer(run::log::LogFile).with_filter(all).boxed());
    }
    tracing_subscriber::registry().with(layers).init();
}

/// Whoever limits us by a sign of life must be able to end us: nothing is written any more once it is gone.
pub(crate) fn end_with_parent(args: &Args) {
    if args.common.progress.is_some()
        && let Err(error) = rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
    {
        tracing::warn!("prctl PR_SET_PDEATHSIG: {error}");
    }
}

/// Prints a line, or a whole report.
#[allow(clippy::print_stdout, reason = "the one place that writes to standard output")]
fn say(text: &str) {
    println!("{text}");
}
