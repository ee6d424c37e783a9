//! `cargo xtask`: what needs more than cargo. See CONTRIBUTING.md.

mod bench;
mod build;
mod disk;
mod edits;
mod machine;
mod namespace;
mod packages;
mod say;
mod shell;
mod snapshot;
mod test;
mod try_it;

use std::process::ExitCode;

use clap::{Parser, Subcommand, ValueEnum};

/// Tasks of this repository. Each installs the packages that it misses.
#[derive(Debug, Parser)]
struct Args {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Show the whole way of the data on a copy of this machine's /etc and /var/log, with a power cut in between
    Try,
    /// Run all tests; none that can run here is skipped
    Test {
        /// Boot virtual machines, too, which takes minutes
        #[arg(long)]
        boot: bool,
        /// Arguments for `cargo test`
        #[arg(last = true)]
        args: Vec<String>,
    },
    /// Measure
    Bench {
        /// What to measure
        what: Bench,
    },
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Bench {
    /// The time that `early` takes to mount everything, against a shell script
    Early,
}

fn main() -> ExitCode {
    let done = match Args::parse().task {
        Task::Try => try_it::run().map(|()| ExitCode::SUCCESS),
        Task::Test { boot, args } => test::run(boot, &args),
        Task::Bench { what: Bench::Early } => bench::run().map(|()| ExitCode::SUCCESS),
    };
    done.unwrap_or_else(|error| {
        say::error(&format!("{error:#}"));
        ExitCode::FAILURE
    })
}
