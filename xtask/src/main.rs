//! `cargo xtask`: what needs more than cargo. See CONTRIBUTING.md.

mod bench;
mod build;
mod crash;
mod disk;
mod edits;
mod machine;
mod namespace;
mod package;
mod packages;
mod say;
mod shell;
mod snapshot;
mod test;
mod try_it;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Tasks of this repository. Each installs the packages that it misses.
#[derive(Debug, Parser)]
struct Args {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Show the whole way of the data on a copy of this machine's /etc and /var/log, with a power cut in between
    Try {
        /// With real boots of a Debian system in a virtual machine, which takes minutes
        #[arg(long)]
        vm: bool,
    },
    /// Run all tests; none that can run here is skipped
    Test {
        /// Boot every case on every kernel and file system, which takes hours
        #[arg(long)]
        full: bool,
        /// Arguments for `cargo test`
        #[arg(last = true)]
        args: Vec<String>,
    },
    /// Cut the power at every moment of a recorded disk, and boot from what it may hold then
    Crash(crash::Options),
    /// Build everything and put it where it belongs, below target/package
    Package,
    /// Measure
    Bench {
        /// What to measure and to show [default: all, and write docs/benchmarks.md]
        what: Option<bench::What>,
        /// How often each is timed; the median counts
        #[arg(long, default_value_t = 5)]
        rounds: usize,
        /// Only this workload of `engine`: W1, W2 or W3
        #[arg(long)]
        only: Option<String>,
    },
    /// Make the same directories and files, and nothing else of them
    #[command(hide = true)]
    Bare {
        /// What there is
        from: PathBuf,
        /// An empty directory
        to: PathBuf,
    },
    /// Run a command line and tell what it took
    #[command(hide = true)]
    Measured {
        /// For `sh`
        line: String,
    },
}

fn main() -> ExitCode {
    let done = match Args::parse().task {
        Task::Try { vm: false } => try_it::run().map(|()| ExitCode::SUCCESS),
        Task::Try { vm: true } => test::one_boot("the_main_job_from_a_systemd_initramfs", &[("NARRATE", "1")]),
        Task::Test { full, args } => test::run(full, &args),
        Task::Crash(options) => crash::run(&options),
        Task::Package => package::run().map(|()| ExitCode::SUCCESS),
        Task::Bench { what, only, rounds } => bench::run(what, only.as_deref(), rounds).map(|()| ExitCode::SUCCESS),
        Task::Bare { from, to } => bench::bare(&from, &to).map(|()| ExitCode::SUCCESS),
        Task::Measured { line } => bench::measured(&line),
    };
    done.unwrap_or_else(|error| {
        say::error(&format!("{error:#}"));
        ExitCode::FAILURE
    })
}
