//! Whatever a checkpoint was written of, it can be read: also a tree that compresses like nothing else.

#![allow(clippy::unwrap_used, reason = "tests may unwrap")]

use std::fs::{self, File};
use std::path::Path;
use std::time::SystemTime;

use rustix::fs::{Mode, OFlags, mkdirat, openat};
use syncd::checkpoint::{CheckpointOptions, take};
use syncd::store::Store;
use syncd::tree::Tree;

/// How deep.
const LEVELS: usize = 200;

/// Anybody who may write to a directory of a target can make this one: each path says again what the one before said.
#[test]
fn a_deep_tree_of_long_names_is_read_back() {
    let place = tempfile::tempdir().unwrap();
    let at = |name: &str| place.path().join(name);
    for name in ["upper", "lower", "store"] {
        fs::create_dir(at(name)).unwrap();
    }
    let name = "d".repeat(255);
    let mut directory = File::open(at("upper")).unwrap();
    let mut above = Vec::new();
    for _ in 0..LEVELS {
        mkdirat(&directory, &name, Mode::RWXU).unwrap();
        above.push(directory.try_clone().unwrap());
        directory = openat(&directory, &name, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap().into();
    }
    for directory in &above {
        directory.set_modified(SystemTime::UNIX_EPOCH).unwrap();
    }
    let options = CheckpointOptions { dry_run: false, compression: 3, own_log: None };
    let store = Store::open(&at("store")).unwrap();
    let target = store.target(Path::new("/etc"));
    let (upper, lower) = (Tree::open(&at("upper")).unwrap(), Tree::open(&at("lower")).unwrap());
    take(&target, &upper, &lower, &options).unwrap();
    let net = target.chain().unwrap().unwrap().compose().unwrap();
    assert_eq!(net.entries.len(), LEVELS + 1);
}
