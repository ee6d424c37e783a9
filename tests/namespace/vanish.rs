//! A disk that really fails: it vanishes in the middle and comes back, or takes names but no contents.
//!
//! ext4's shutdown ioctl cuts a mounted file system off from its disk: what the journal has stays, everything else is
//! gone, and every call fails. On a thin device without room what is written fails when it comes to the disk, which is
//! long after write(2) said that all is well.

use std::fs;
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::Duration;

use rustix::fs::syncfs;
use rustix::process::{Pid, Signal, kill_process};

use crate::checkpoint::noise;
use crate::differential;
use crate::sweep::{strace, strace_command, three_checkpoints, trace};
use crate::tools::{code, text};
use crate::world::{Disk, ETC, World, expect};
use test_support::snapshot::{self, Snapshot};

pub(crate) const TESTS: &[(&str, fn())] = &[
    ("a_disk_that_vanishes_under_a_checkpoint_has_the_old_chain_or_the_new", a_disk_that_vanishes_under_a_checkpoint),
    ("a_disk_that_vanishes_under_a_merge_is_merged_when_it_is_back", a_disk_that_vanishes_under_a_merge),
    ("what_is_called_saved_is_on_the_disk_whatever_failed_before", what_is_called_saved_is_on_the_disk),
    ("what_a_disk_did_not_take_is_written_again_by_the_next_merge", what_a_disk_did_not_take_is_written_again),
    ("a_checkpoint_that_the_disk_did_not_take_is_not_called_saved", a_checkpoint_that_the_disk_did_not_take),
];

/// The calls after which the disk vanishes.
const CALLS: &str = "write,pwrite64,fsync,syncfs,rename,renameat,unlink";
/// How many of them are tried, unless it is to be all.
const SAMPLE: usize = 4;

/// The points at which the disk vanishes under `command`: the call and its number.
fn points(command: &Command) -> Vec<(String, usize)> {
    let lines = trace(command, CALLS, &[]);
    let all: Vec<_> =
        lines.iter().flat_map(|(call, all)| (1..=all.len()).map(|number| (call.clone(), number))).collect();
    let is_full = std::env::var("ERRORS").is_ok_and(|value| value == "full");
    let stride = if is_full { 1 } else { all.len() / SAMPLE };
    all.into_iter().step_by(stride).collect()
}

/// Runs a command under which the disk vanishes; nothing if it ends before.
fn vanishing(world: &World, command: &Command, call: &str, number: usize) -> Option<Output> {
    let log = tempfile::NamedTempFile::new().unwrap();
    let inject = format!("inject={call}:signal=STOP:when={number}");
    let mut strace = strace_command(command, &["-e", &inject, "-o", log.path().to_str().unwrap()]);
    let mut child = strace.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let stopped = loop {
        let log = fs::read_to_string(log.path()).unwrap();
        if let Some(line) = log.lines().find(|line| line.contains("stopped by SIGSTOP")) {
            break line.split(' ').next().unwrap().parse().unwrap();
        }
        if child.try_wait().unwrap().is_some() {
            return None;
        }
        thread::sleep(Duration::from_millis(5));
    };
    world.disk().vanish();
    kill_process(Pid::from_raw(stopped).unwrap(), Signal::CONT).unwrap();
    Some(child.wait_with_output().unwrap())
}

/// What the next boot shows once the disk is back.
fn back(world: &World) -> Snapshot {
    world.cut();
    world.disk().come_back();
    world.merge();
    let names =
        fs::read_dir(world.at("persist/ephemeral-overlay")).unwrap().chain(fs::read_dir(world.store()).unwrap());
    let unfinished: Vec<_> = names
        .map(|entry| entry.unwrap().file_name())
        .filter(|name| name.to_string_lossy().starts_with(".tmp"))
        .collect();
    assert!(unfinished.is_empty(), "{unfinished:?} is still there");
    snapshot::take(&world.at("etc"))
}

/// A running system with a checkpoint and something that is not in it; what the checkpoint has, and what there is.
fn running() -> (World, Snapshot, Snapshot) {
    let world = World::new(ETC);
    world.boot();
    let etc = world.at("etc");
    fs::write(etc.join("file"), "saved").unwrap();
    world.checkpoint();
    let old = snapshot::take(&etc);
    fs::write(etc.join("file"), "changed").unwrap();
    fs::write(etc.join("long"), noise(200_000)).unwrap();
    let new = snapshot::take(&etc);
    (world, old, new)
}

/// What the tests themselves wrote is on the disk.
pub(crate) fn sync(world: &World) {
    syncfs(fs::File::open(world.disk().path()).unwrap()).unwrap();
}

fn a_disk_that_vanishes_under_a_checkpoint() {
    let points = points(&running().0.syncd_command(&["checkpoint"]));
    let mut failed = 0;
    for (call, number) in &points {
        let (world, old, new) = running();
        let Some(output) = vanishing(&world, &world.syncd_command(&["checkpoint"]), call, *number) else { continue };
        let what = format!("the disk vanished after {call} number {number}\n{}", text(&output));
        let found = back(&world);
        if code(&output) == 0 {
            snapshot::assert_same(&new, &found, &what);
        } else {
            assert!(code(&output) == 1 && text(&output).contains("Input/output error"), "{what}");
            let is_one = [&old, &new].iter().any(|state| snapshot::difference(state, &found).is_none());
            assert!(is_one, "neither the old state nor the new: {what}");
            failed += 1;
        }
    }
    println!("{} points, {failed} failed", points.len());
    assert!(failed > 2, "only {failed} failed");
}

fn a_disk_that_vanishes_under_a_merge() {
    let prepared = || {
        let world = World::new(ETC);
        let mut views = Vec::new();
        three_checkpoints(&world, &mut views);
        world.cut();
        sync(&world);
        (world, views.remove(2))
    };
    let points = points(&prepared().0.offline_command(&["merge"]));
    let mut failed = 0;
    for (call, number) in &points {
        let (world, view) = prepared();
        let Some(output) = vanishing(&world, &world.offline_command(&["merge"]), call, *number) else { continue };
        let what = format!("the disk vanished after {call} number {number}\n{}", text(&output));
        // Its last words come after everything.
        if code(&output) != 0 {
            assert!(code(&output) == 1 && text(&output).contains("Input/output error"), "{what}");
            failed += 1;
        }
        world.disk().come_back();
        differential::unpacked_is(&world, &view);
        snapshot::assert_same(&view, &back(&world), &what);
        assert!(world.checkpoints().is_empty() && !world.store().join("merging").exists(), "{what}");
    }
    println!("{} points, {failed} failed", points.len());
    assert!(failed > 2, "only {failed} failed");
}

/// A call that makes something durable fails, and the next checkpoint finds nothing left to do.
fn what_is_called_saved_is_on_the_disk() {
    let syncs = trace(&running().0.syncd_command(&["checkpoint"]), "fsync", &[])["fsync"].len();
    let mut failed = 0;
    for number in 1..=syncs {
        let (world, _, new) = running();
        let inject = format!("inject=fsync:error=EIO:when={number}");
        let output = strace(&world.syncd_command(&["checkpoint"]), &["-e", &inject, "-o", "/dev/null"]);
        if code(&output) != 0 {
            failed += 1;
            world.checkpoint();
        }
        world.disk().vanish();
        snapshot::assert_same(&new, &back(&world), &format!("fsync number {number} failed\n{}", text(&output)));
    }
    assert!(failed > 1, "only {failed} of {syncs} failed");
}

/// A device that takes names and a little more; what it has of a file it does not have is in the page cache only.
fn what_a_disk_did_not_take_is_written_again() {
    let world = World::on(Disk::thin(64), ETC);
    let etc = world.at("etc");
    let mut long = noise(3 << 20);
    fs::write(etc.join("in place"), &long).unwrap();
    world.boot();
    for number in 0..8 {
        fs::write(etc.join(format!("file {number}")), noise(300_000 + number)).unwrap();
    }
    long.extend_from_slice(&noise(1 << 20));
    fs::write(etc.join("in place"), &long).unwrap();
    world.checkpoint();
    let view = snapshot::take(&etc);
    world.cut();
    fs::remove_file(world.at("persist/ephemeral-overlay/reserve")).unwrap();
    sync(&world);
    world.disk().take_room(256 << 10);
    let output = world.offline(&["merge"]);
    expect(&output, 1);
    assert!(text(&output).contains(&format!("syncfs {}", etc.display())), "{}", text(&output));
    differential::unpacked_is(&world, &view);
    world.disk().give_room();
    world.merge();
    snapshot::assert_same(&view, &snapshot::take(&etc), "the page cache");
    assert!(world.checkpoints().is_empty());
    world.disk().come_back();
    snapshot::assert_same(&view, &snapshot::take(&etc), "the disk");
}

fn a_checkpoint_that_the_disk_did_not_take() {
    let world = World::on(Disk::thin(64), ETC);
    let etc = world.at("etc");
    world.boot();
    fs::write(etc.join("file"), "saved").unwrap();
    world.checkpoint();
    fs::write(etc.join("long"), noise(6 << 20)).unwrap();
    let new = snapshot::take(&etc);
    world.disk().take_room(256 << 10);
    let output = world.syncd(&["checkpoint"]);
    expect(&output, 1);
    assert!(text(&output).contains("fsync "), "{}", text(&output));
    let saved = world.checkpoints().len();
    assert_eq!(saved, 1, "{}", text(&output));
    world.disk().give_room();
    world.checkpoint();
    world.disk().vanish();
    snapshot::assert_same(&new, &back(&world), "the disk");
}
