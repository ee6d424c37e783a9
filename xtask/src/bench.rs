//! `cargo xtask bench`: measurements, each beside a peer that does the same in the same run. All of them together are
//! `docs/benchmarks.md`; a single one is only shown.

mod boot;
mod clean;
mod day;
mod early;
mod engine;
mod machine;
mod measured;
mod overlay;
mod report;

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::ValueEnum;
pub(crate) use engine::bare::copy as bare;
pub(crate) use measured::measured;
use report::Section;

use crate::say::say;

/// Where the report goes.
const REPORT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/benchmarks.md");

/// What it begins with.
const HEAD: &str = "# Benchmarks

Written by `cargo xtask bench`, which measures all of it anew. The times are those of one machine; what holds elsewhere \
                    are the ratios, each between things that were measured in turns in the same run.";

/// What can be measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum What {
    /// The time that `early` takes to mount everything, against a shell script, and with checkpoints to be merged
    Early,
    /// What the hook adds to a boot, in a virtual machine
    Boot,
    /// What checkpoints and merges cost, against rsync, cp, tar and one large write
    Engine,
    /// What a pass of the cleaner takes of the processor, against find and lsof
    Clean,
    /// What a write costs through the overlay, against the disk, a tmpfs and a plain overlay
    Overlay,
}

/// Measures one thing and shows it, or everything and writes the report.
pub(crate) fn run(what: Option<What>, only: Option<&str>, rounds: usize) -> Result<()> {
    if let Some(what) = what {
        for section in measure(what, only, rounds)? {
            say(&format!("\n{section}"));
        }
        return Ok(());
    }
    let mut parts = vec![HEAD.to_owned(), machine::describe()?.to_string()];
    for what in [What::Engine, What::Overlay, What::Clean, What::Early, What::Boot] {
        say(&format!("measuring: {what:?}"));
        parts.extend(measure(what, None, rounds)?.iter().map(ToString::to_string));
    }
    fs::write(REPORT, parts.join("\n\n") + "\n").context("writing docs/benchmarks.md")?;
    say("written: docs/benchmarks.md");
    Ok(())
}

fn measure(what: What, only: Option<&str>, rounds: usize) -> Result<Vec<Section>> {
    match what {
        What::Early => Ok(vec![early::measure()?]),
        What::Boot => Ok(vec![boot::measure()?]),
        What::Engine => engine::measure_all(only, rounds),
        What::Clean => Ok(vec![clean::measure(rounds)?]),
        What::Overlay => Ok(vec![overlay::measure(rounds)?]),
    }
}

fn median<T: Copy + Ord>(mut values: Vec<T>) -> T {
    values.sort_unstable();
    values[values.len() / 2]
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}
