//! Killed at every call that changes something, and started again: always the old state or the new one.
//!
//! strace kills the process at the N-th call of a kind, for every kind and every N there is.

use std::fs;
use std::process::Command;

use crate::differential;
use crate::sweep::{CALLS, copy, one_more_change, strace, three_checkpoints, trace};
use crate::tools::text;
use crate::world::{ETC, World};
use test_support::snapshot;

pub(crate) const TESTS: &[(&str, fn())] = &[
    ("a_merge_killed_anywhere_is_done_by_the_next", a_merge_killed_anywhere_is_done_by_the_next),
    ("a_checkpoint_killed_anywhere_leaves_the_old_chain_or_the_new", a_checkpoint_killed_anywhere),
];

/// Runs `command` once for each of the points among `calls` at which it can be killed, or for every `stride`-th of them;
/// `prepare` makes the state before it anew, `check` looks at what the kill left.
pub(crate) fn sweep(command: &Command, calls: &str, stride: usize, prepare: &dyn Fn(), check: &dyn Fn(&str)) -> usize {
    prepare();
    let (mut points, mut seen) = (0, 0);
    for (call, lines) in trace(command, calls, &[]) {
        let count = lines.len();
        for number in 1..=count {
            seen += 1;
            if seen % stride != 0 {
                continue;
            }
            prepare();
            let inject = format!("inject={call}:signal=KILL:when={number}");
            let output = strace(command, &["-e", &inject, "-o", "/dev/null"]);
            if output.status.success() && number > count / 2 {
                // How many files of /proc are opened depends on what else the machine runs.
                break;
            }
            assert!(!output.status.success(), "{call} {number} was not reached: {}", text(&output));
            check(&format!("killed at {call} number {number}"));
            points += 1;
        }
    }
    points
}

fn a_merge_killed_anywhere_is_done_by_the_next() {
    let world = World::new(ETC);
    let mut views = Vec::new();
    three_checkpoints(&world, &mut views);
    world.cut();
    let parts = ["etc", "persist"];
    let saved = |part: &str| world.at(&format!("saved {part}"));
    for part in parts {
        copy(&world.at(part), &saved(part));
    }
    let command = world.offline_command(&["merge"]);
    let points =
        sweep(&command, CALLS, 1, &|| parts.iter().for_each(|part| copy(&saved(part), &world.at(part))), &|what| {
            // The next boot can show what it must, even if it cannot finish.
            differential::unpacked_is(&world, &views[2]);
            world.merge();
            snapshot::assert_same(&views[2], &snapshot::take(&world.at("etc")), what);
            assert!(world.checkpoints().is_empty(), "{what}: the chain is still there");
            assert!(!world.store().join("merging").exists(), "{what}: the mark is still there");
        });
    println!("{points} points");
    assert!(points > 90, "only {points} points");
}

fn a_checkpoint_killed_anywhere() {
    let world = World::new(ETC);
    let mut views = Vec::new();
    three_checkpoints(&world, &mut views);
    one_more_change(&world);
    let new = snapshot::take(&world.at("etc"));
    let saved = (world.at("saved persist"), world.run.join("lower/etc"));
    copy(&world.at("persist"), &saved.0);
    // What the next boot would show, found out on a copy of the disk.
    let disk = World::beside(&world, "copy");
    let command = world.syncd_command(&["checkpoint"]);
    let points = sweep(&command, CALLS, 1, &|| copy(&saved.0, &world.at("persist")), &|what| {
        copy(&world.at("persist"), &disk.at("persist"));
        copy(&saved.1, &disk.at("etc"));
        disk.merge();
        let found = snapshot::take(&disk.at("etc"));
        let is_old = snapshot::difference(&views[2], &found).is_none();
        assert!(is_old || snapshot::difference(&new, &found).is_none(), "{what}: neither the old state nor the new");
        // And the running system goes on.
        world.checkpoint();
        let names =
            fs::read_dir(world.at("persist/ephemeral-overlay")).unwrap().map(|entry| entry.unwrap().file_name());
        let unfinished: Vec<_> = names.filter(|name| name.to_string_lossy().starts_with('.')).collect();
        assert!(unfinished.is_empty(), "{what}: {unfinished:?} keeps its room for ever");
        copy(&world.at("persist"), &disk.at("persist"));
        copy(&saved.1, &disk.at("etc"));
        disk.merge();
        snapshot::assert_same(&new, &snapshot::take(&disk.at("etc")), what);
    });
    println!("{points} points");
    assert!(points > 40, "only {points} points");
}
