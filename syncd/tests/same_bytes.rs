//! The same tree gives the same bytes, however many threads there are.

#![allow(clippy::unwrap_used, reason = "tests may unwrap")]

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use syncd::checkpoint::{CheckpointOptions, take};
use syncd::store::Store;
use syncd::tree::Tree;

/// Text that differs from file to file, and compresses.
fn text(number: usize, length: usize) -> Vec<u8> {
    (0..length).map(|at| u8::try_from((at / 11 + number * at / 5) % 251).unwrap()).collect()
}

fn checkpoint(store: &Path, upper: &Path, lower: &Path, threads: usize) -> PathBuf {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    let options = CheckpointOptions { dry_run: false, compression: 3, own_log: None };
    let store = Store::open(store).unwrap();
    let target = store.target(Path::new("/etc"));
    let (upper, lower) = (Tree::open(upper).unwrap(), Tree::open(lower).unwrap());
    let sequence = pool.install(|| take(&target, &upper, &lower, &options)).unwrap().sequence.unwrap();
    target.directory().join(format!("{sequence:010}.ckpt"))
}

#[test]
fn the_same_tree_gives_the_same_bytes() {
    let place = tempfile::tempdir().unwrap();
    let at = |name: &str| place.path().join(name);
    for name in ["upper/copies", "upper/many", "upper/tiny", "lower", "one", "four"] {
        fs::create_dir_all(at(name)).unwrap();
    }
    for number in 0..300 {
        fs::write(at("upper/many").join(number.to_string()), text(number, 20_000 + number * 100)).unwrap();
    }
    // More than are packed at once.
    for number in 0..2100 {
        fs::write(at("upper/tiny").join(number.to_string()), number.to_string()).unwrap();
    }
    fs::write(at("upper/long"), text(7, 20 << 20)).unwrap();
    // The seed is the chain's: both go on from the same checkpoint.
    checkpoint(&at("one"), &at("upper"), &at("lower"), 2);
    assert!(Command::new("cp").arg("-r").arg(at("one/.")).arg(at("four")).status().unwrap().success());

    fs::rename(at("upper/long"), at("upper/long.1")).unwrap();
    fs::write(at("upper/long"), text(8, 12 << 20)).unwrap();
    for number in (0..300).step_by(3) {
        fs::write(at("upper/many").join(number.to_string()), text(number + 1, 30_000)).unwrap();
    }
    // What was captured a moment ago may be referred to, or not yet.
    for number in 0..60 {
        fs::write(at("upper/copies").join(number.to_string()), text(9, 300_000)).unwrap();
    }
    let changed = fs::OpenOptions::new().write(true).open(at("upper/long.1")).unwrap();
    changed.write_all_at(b"changed", 5 << 20).unwrap();
    let [one, four] =
        [("one", 1), ("four", 4)].map(|(store, threads)| checkpoint(&at(store), &at("upper"), &at("lower"), threads));
    assert_eq!(one.file_name(), four.file_name());
    assert!(fs::read(&one).unwrap() == fs::read(&four).unwrap(), "other bytes with more threads");
}
