//! Killed at every call that changes something, and started again: always the old state or the new one.
//!
//! strace kills the process at the N-th call of a kind, for every kind and every N there is. One rayon thread, because
//! strace counts for each thread.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use crate::differential;
use crate::tools::{run, text};
use crate::world::{ETC, World};
use test_support::snapshot::{self, Snapshot};

pub(crate) const TESTS: &[(&str, fn())] = &[
    ("a_merge_killed_anywhere_is_done_by_the_next", a_merge_killed_anywhere_is_done_by_the_next),
    ("a_checkpoint_killed_anywhere_leaves_the_old_chain_or_the_new", a_checkpoint_killed_anywhere),
];

/// Every call by which a checkpoint or a merge changes something, or makes it durable; of openat(2) most only look.
const CALLS: &str = "openat,mkdir,mkdirat,mknodat,symlinkat,linkat,rename,renameat,renameat2,unlink,unlinkat,rmdir,\
    write,pwrite64,ftruncate,fallocate,fchown,fchownat,chmod,fchmod,fchmodat,setxattr,lsetxattr,fsetxattr,removexattr,\
    lremovexattr,fremovexattr,utimensat,fsync,fdatasync,syncfs,ioctl";

/// How often one thread makes each kind of call.
fn kinds(command: &Command) -> BTreeMap<String, usize> {
    let log = tempfile::NamedTempFile::new().unwrap();
    let output = strace(command, &["-e", &format!("trace={CALLS}"), "-o", log.path().to_str().unwrap()]);
    assert!(output.status.success(), "{}", text(&output));
    let mut by_thread: BTreeMap<(String, String), usize> = BTreeMap::new();
    for line in fs::read_to_string(log.path()).unwrap().lines() {
        // `1234 rename("a", "b") = 0`
        let (thread, call) = line.split_once(' ').unwrap();
        if let Some((name, _)) = call.trim_start().split_once('(') {
            *by_thread.entry((name.to_owned(), thread.to_owned())).or_default() += 1;
        }
    }
    let mut counts = BTreeMap::new();
    for ((name, _), count) in by_thread {
        let most = counts.entry(name).or_insert(0);
        *most = count.max(*most);
    }
    counts
}

fn strace(command: &Command, options: &[&str]) -> std::process::Output {
    Command::new("strace")
        .args(["-f", "-qq"])
        .args(options)
        .arg(command.get_program())
        .args(command.get_args())
        .env("RAYON_NUM_THREADS", "1")
        .output()
        .unwrap()
}

/// Runs `command` once for every point at which it can be killed; `prepare` makes the state before it anew, `check`
/// looks at what the kill left.
fn sweep(command: &Command, prepare: &dyn Fn(), check: &dyn Fn(&str)) -> usize {
    prepare();
    let mut points = 0;
    for (call, count) in kinds(command) {
        for number in 1..=count {
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

/// Makes the tree `to` a copy of `from`, in everything that counts.
pub(crate) fn copy(from: &Path, to: &Path) {
    if to.exists() {
        fs::remove_dir_all(to).unwrap();
    }
    run("cp", &["-a", from.to_str().unwrap(), to.to_str().unwrap()]);
}

/// A life with everything in it that has an order to get wrong: three checkpoints.
fn three_checkpoints(world: &World, views: &mut Vec<Snapshot>) {
    let etc = world.at("etc");
    let at = |name: &str| etc.join(name);
    for name in ["patched", "log", "log.1", "grouped", "plain"] {
        fs::write(at(name), format!("lower {name}")).unwrap();
    }
    fs::hard_link(at("grouped"), at("grouped.link")).unwrap();
    // Long enough to be changed in place.
    let mut long: Vec<u8> = (0..3 << 20).map(|index: u32| (index / 13).to_le_bytes()[0]).collect();
    fs::write(at("long"), &long).unwrap();
    for name in ["dir/sub", "remade"] {
        fs::create_dir_all(at(name)).unwrap();
    }
    fs::write(at("dir/sub/file"), "lower").unwrap();
    fs::write(at("remade/old"), "lower").unwrap();
    world.boot();
    fs::write(at("patched"), "patched in RAM").unwrap();
    fs::write(at("group"), "one inode").unwrap();
    fs::hard_link(at("group"), at("group.link")).unwrap();
    fs::remove_dir_all(at("remade")).unwrap();
    fs::create_dir(at("remade")).unwrap();
    fs::write(at("remade/new"), "upper").unwrap();
    long[200_000..300_000].fill(7);
    long.truncate(2 << 20);
    fs::write(at("long"), &long).unwrap();
    world.checkpoint();
    views.push(snapshot::take(&etc));

    fs::rename(at("log"), at("log.1")).unwrap();
    fs::write(at("log"), "begun anew").unwrap();
    fs::remove_dir_all(at("dir")).unwrap();
    fs::write(at("dir"), "a file now").unwrap();
    fs::write(at("group"), "changed in both").unwrap();
    long[1 << 20..][..5000].fill(8);
    fs::write(at("long"), &long).unwrap();
    std::os::unix::fs::symlink("plain", at("symlink")).unwrap();
    world.checkpoint();
    views.push(snapshot::take(&etc));

    fs::remove_file(at("patched")).unwrap();
    fs::remove_file(at("group.link")).unwrap();
    std::os::unix::fs::chown(at("plain"), Some(1000), Some(1000)).unwrap();
    fs::write(at("grouped"), "broken off").unwrap();
    world.checkpoint();
    views.push(snapshot::take(&etc));
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
    let points = sweep(&command, &|| parts.iter().for_each(|part| copy(&saved(part), &world.at(part))), &|what| {
        // The next boot can show what it must, even if it cannot finish.
        differential::unpacked_is(&world, &views[2]);
        world.merge();
        snapshot::assert_same(&views[2], &snapshot::take(&world.at("etc")), what);
        assert!(world.checkpoints().is_empty(), "{what}: the chain is still there");
        assert!(!world.store().join("merging").exists(), "{what}: the mark is still there");
    });
    println!("{points} points");
    assert!(points > 110, "only {points} points");
}

fn a_checkpoint_killed_anywhere() {
    let world = World::new(ETC);
    let mut views = Vec::new();
    three_checkpoints(&world, &mut views);
    fs::write(world.at("etc/last"), "change").unwrap();
    fs::remove_file(world.at("etc/plain")).unwrap();
    let new = snapshot::take(&world.at("etc"));
    // It is made anew, too.
    fs::remove_file(world.at("persist/ephemeral-overlay/reserve")).unwrap();
    let saved = (world.at("saved persist"), world.run.join("lower/etc"));
    copy(&world.at("persist"), &saved.0);
    // What the next boot would show, found out on a copy of the disk.
    let disk = World::beside(&world, "copy");
    let command = world.syncd_command(&["checkpoint"]);
    let points = sweep(&command, &|| copy(&saved.0, &world.at("persist")), &|what| {
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
    assert!(points > 50, "only {points} points");
}
