//! The order of the calls that a power cut cares about, as the kernel saw them.

use std::fs;
use std::process::Command;

use crate::sweep::strace;
use crate::tools::text;
use crate::world::{Disk, ETC, Fs, World, expect};
use test_support::snapshot;

pub(crate) const TESTS: &[(&str, fn())] = &[
    ("a_checkpoint_is_synced_before_it_has_its_name_and_the_name_after", a_checkpoint_is_synced),
    ("a_chain_is_deleted_only_after_lower_was_synced", a_chain_is_deleted_only_after_lower_was_synced),
    ("the_disk_begins_while_a_long_merge_goes_on", the_disk_begins_while_a_long_merge_goes_on),
    ("what_the_disk_says_while_a_merge_goes_on_is_heard", what_the_disk_says_while_a_merge_goes_on_is_heard),
];

/// Runs `command` under strace and returns the calls that change or sync something, in order.
fn trace(command: &Command) -> Vec<String> {
    let log = tempfile::NamedTempFile::new().unwrap();
    let calls = "trace=fsync,fdatasync,syncfs,rename,renameat,renameat2,unlink,unlinkat,utimensat,setxattr";
    let output = Command::new("strace")
        .args(["-f", "-y", "-qq", "-s", "64", "-e", calls, "-o"])
        .arg(log.path())
        .arg(command.get_program())
        .args(command.get_args())
        .env("RAYON_NUM_THREADS", "1")
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", text(&output));
    let log = fs::read_to_string(log.path()).unwrap();
    log.lines().filter(|line| line.contains(" = 0") || !line.contains(" = ")).map(str::to_owned).collect()
}

/// Where the first call that has all of `words` stands.
fn position(calls: &[String], words: &[&str]) -> usize {
    let found = calls.iter().position(|call| words.iter().all(|word| call.contains(word)));
    found.unwrap_or_else(|| panic!("no call with {words:?} in\n{}", calls.join("\n")))
}

fn a_checkpoint_is_synced() {
    let world = World::new(ETC);
    world.boot();
    fs::write(world.at("etc/file"), "x").unwrap();
    let calls = trace(&world.syncd_command(&["checkpoint"]));
    let renamed = position(&calls, &["rename", "0000000001.ckpt"]);
    let contents = position(&calls, &["fsync(", "/targets/etc/.tmp-"]);
    let after = &calls[renamed..];
    let name = renamed + position(after, &["fsync(", "/targets/etc>"]);
    assert!(contents < renamed && renamed < name, "{}", calls.join("\n"));
    // The token that it names is on the disk before it is.
    assert!(position(&calls, &["fsync(", "/lower/etc>"]) < renamed, "{}", calls.join("\n"));
    // The directories that were made for it are durable, too.
    for directory in ["/persist>", "/ephemeral-overlay>", "/targets>"] {
        assert!(position(&calls, &["fsync(", directory]) < renamed, "{directory}\n{}", calls.join("\n"));
    }
}

fn a_chain_is_deleted_only_after_lower_was_synced() {
    let world = World::new(ETC);
    world.boot();
    fs::write(world.at("etc/file"), "x").unwrap();
    world.checkpoint();
    world.cut();
    let calls = trace(&world.offline_command(&["merge"]));
    let marked = position(&calls, &["rename", "/merging"]);
    let placed = position(&calls, &["utimensat", "/root/etc/file>"]);
    let token = position(&calls, &["setxattr", "trusted.ephemeral_overlay.token"]);
    let deleted = position(&calls, &["unlink", ".ckpt"]);
    let between = |from: usize, to: usize, what: &[&str]| {
        calls[from..to].iter().any(|call| what.iter().all(|part| call.contains(part)))
    };
    assert!(marked < placed && placed < token && token < deleted, "{}", calls.join("\n"));
    assert!(
        between(placed, token, &["syncfs("]),
        "the token is new before what it stands for is on disk\n{}",
        calls.join("\n")
    );
    assert!(
        between(token, deleted, &["fsync(", "/root/etc>"]),
        "the chain is gone before the token is on disk\n{}",
        calls.join("\n")
    );
    let unmarked = position(&calls, &["unlink", "/merging"]);
    assert!(deleted < unmarked, "{}", calls.join("\n"));
}

/// A system that was cut after a checkpoint of more than the disk is given at once.
fn more_than_a_portion() -> World {
    let world = World::on(Disk::new(Fs::Ext4, 192), ETC);
    world.boot();
    for number in 0..40 {
        fs::write(world.at(&format!("etc/{number}")), format!("line {number}\n").repeat(140_000)).unwrap();
    }
    world.checkpoint();
    world
}

fn the_disk_begins_while_a_long_merge_goes_on() {
    let world = more_than_a_portion();
    world.cut();
    let calls = trace(&world.offline_command(&["merge"]));
    let placed = position(&calls, &["utimensat", "/root/etc/0>"]);
    let token = position(&calls, &["setxattr", "trusted.ephemeral_overlay.token"]);
    let syncs = calls[placed..token].iter().filter(|call| call.contains("syncfs(")).count();
    assert!(syncs > 1, "{}", calls.join("\n"));
}

fn what_the_disk_says_while_a_merge_goes_on_is_heard() {
    let world = more_than_a_portion();
    let expected = snapshot::take(&world.at("etc"));
    world.cut();
    let log = tempfile::NamedTempFile::new().unwrap();
    let failing = ["-e", "trace=syncfs", "-e", "inject=syncfs:error=EIO:when=1", "-o", log.path().to_str().unwrap()];
    let output = strace(&world.offline_command(&["merge"]), &failing);
    assert!(!output.status.success() && text(&output).contains("syncfs"), "{}", text(&output));
    // The kernel tells of a failure once: whoever asked again would hear of none. strace fails the first of each thread.
    let log = fs::read_to_string(log.path()).unwrap();
    assert_eq!(log.matches("syncfs(").count(), 1, "{log}");
    expect(&world.offline(&["merge"]), 0);
    snapshot::assert_same(&expected, &snapshot::take(&world.at("etc")), "the redo");
}
