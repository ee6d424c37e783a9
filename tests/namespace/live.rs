//! Checkpoints while two processes write, and a cut at any moment.
//!
//! `LIVE_OPERATIONS=N` sets the number of operations, `LIVE_SEED=N` what they are. Their timing is that of the machine.

use std::fs;

use test_support::live::{self, System};

use crate::tools;
use crate::world::{Disk, ETC, Fs};

pub(crate) const TESTS: &[(&str, fn())] = &[("what_is_written_to_is_as_it_was_during_the_checkpoint", two_writers)];

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

fn two_writers() {
    let disk = Disk::new(Fs::Ext4, 1024);
    let beside = tempfile::tempdir().unwrap();
    let root = disk.path().join("root");
    live::prepare(&root);
    let system = System {
        root,
        run: beside.path().join("run"),
        config: beside.path().join("config"),
        beside: beside.path().to_path_buf(),
        early: tools::early().to_path_buf(),
        syncd: tools::syncd().to_path_buf(),
    };
    fs::write(&system.config, ETC).unwrap();
    let seed = number("LIVE_SEED", 1);
    println!("seed {seed}");
    let operations = usize::try_from(number("LIVE_OPERATIONS", 8000)).unwrap();
    println!("{}", live::run(&system, seed, operations, 2000));
}
