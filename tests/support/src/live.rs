//! Checkpoints of a tree that is being written to, and what may be there after a cut.
//!
//! Two processes change the tree, each a part of its own and both a shared one, while checkpoints are taken without a
//! pause. What they do stands in a log outside of the tree: a line before each operation and one after it, so that the
//! order of the lines is the order of the world. At a random moment everything is killed and the RAM thrown away; then
//! the chain is merged, and [`judge`] tells whether the tree is one that the last checkpoint may have seen.

mod content;
mod judge;
mod log;
mod op;
mod system;
mod tree;
mod verdict;
mod writer;

use std::fmt;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use fastrand::Rng;

use judge::Judge;
use log::{Event, Log};
pub use system::System;
use tree::Tree;
use writer::Writer;
pub use writer::write_if_asked;

/// The parts of the tree: one for each writer, and the one that they share.
const PARTS: [&str; 3] = ["first", "second", "shared"];
/// How many writers there are.
const WRITERS: usize = 2;

/// What was done, and what came of it.
#[derive(Debug, Clone, Copy, Default)]
pub struct Figures {
    /// Operations that succeeded.
    pub operations: usize,
    /// Checkpoints that reported success, and how many of these called a file fuzzy, or a name moving.
    pub checkpoints: (usize, usize),
    /// Checkpoints that gave up, because nothing stood still.
    pub given_up: usize,
    /// Cuts; after each one the tree was judged.
    pub cuts: usize,
    /// Cuts after which the newest checkpoint was one that had not reported success yet.
    pub unreported: usize,
    /// Cuts after which all parts had to be of one moment.
    pub exact: usize,
    /// How long it took.
    pub seconds: u64,
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { operations, checkpoints: (checkpoints, inexact), given_up, cuts, unreported, exact, seconds } = self;
        write!(
            f,
            "{operations} operations, {checkpoints} checkpoints ({inexact} inexact, {given_up} given up), {cuts} cuts \
             ({exact} of one moment, {unreported} unreported), 0 wrong, {seconds} s"
        )
    }
}

/// Makes what a system has to have in its root.
pub fn prepare(root: &Path) {
    for directory in ["etc", "persist", "usr/lib/ephemeral-overlay"] {
        fs::create_dir_all(root.join(directory)).unwrap();
    }
    fs::write(root.join("usr/lib/ephemeral-overlay/counterpart"), "format = 1\n").unwrap();
}

/// Runs rounds on `system`, each of up to `round` operations and some more, until at least so many have been done.
///
/// # Panics
/// When something is wrong: then the log and the disk are still there.
#[must_use]
pub fn run(system: &System, seed: u64, operations: usize, round: usize) -> Figures {
    let mut rng = Rng::with_seed(seed);
    let begin = Instant::now();
    let mut figures = Figures::default();
    for part in PARTS {
        fs::create_dir_all(system.target().join(part)).unwrap();
    }
    let mut number = 1;
    while figures.operations < operations {
        let wanted = rng.usize(100..round).min(operations - figures.operations);
        let base = PARTS.map(|part| Tree::read(&system.target().join(part)));
        let mut log = Log::create(&system.log());
        play(system, &mut rng, &mut log, number, wanted);
        let newest = system.newest();
        system.merge();
        let judge = Judge::new(base, &log);
        number = judge.last_operation() + 1;
        judge.judge(&PARTS.map(|part| Tree::read(&system.target().join(part))), newest, &mut figures);
        names_are_parts(&system.target());
    }
    figures.seconds = begin.elapsed().as_secs();
    figures
}

/// Boots, writes and takes checkpoints, and cuts.
fn play(system: &System, rng: &mut Rng, log: &mut Log, number: u32, wanted: usize) {
    system.boot();
    let mut writers = writer::start(system, rng, number);
    let mut cut_at = None;
    let mut running = Vec::new();
    let (mut run, mut reported) = (0, 0);
    let enough = rng.usize(1..3);
    loop {
        log.catch_up();
        if cut_at.is_none() && log.done() >= wanted && reported >= enough {
            // At any moment of a checkpoint.
            cut_at = Some(Instant::now() + Duration::from_millis(rng.u64(..100)));
        }
        if cut_at.is_some_and(|at| Instant::now() >= at) {
            break;
        }
        assert!(writers.iter_mut().all(Writer::is_alive), "a writer has ended");
        running.retain_mut(|checkpoint: &mut system::Checkpoint| match checkpoint.ended() {
            None => true,
            Some(ended) => {
                log.append(&Event::Finish { run: checkpoint.run, ended });
                reported += 1;
                false
            }
        });
        if running.is_empty() {
            for _ in 0..if rng.u32(..4) == 0 { 2 } else { 1 } {
                run += 1;
                log.append(&Event::Start { run });
                running.push(system.checkpoint(run));
            }
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    drop(writers);
    drop(running);
    log.catch_up();
    system.cut();
}

/// Nothing else is in the target.
fn names_are_parts(target: &Path) {
    let mut names: Vec<_> =
        fs::read_dir(target).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert_eq!(names, PARTS, "the target has other names in it");
}
