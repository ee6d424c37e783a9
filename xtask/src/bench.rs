//! `cargo xtask bench`: measurements, each as a ratio against a peer that does the same in the same run.

mod early;
mod engine;
mod measured;

use std::time::Duration;

use anyhow::Result;

pub(crate) use measured::measured;

/// The time that `early` takes.
pub(crate) fn early() -> Result<()> {
    early::run()
}

/// What checkpoints and merges cost.
pub(crate) fn engine(only: Option<&str>, rounds: usize) -> Result<()> {
    engine::run(only, rounds)
}

fn median<T: Copy + Ord>(mut values: Vec<T>) -> T {
    values.sort_unstable();
    values[values.len() / 2]
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}
