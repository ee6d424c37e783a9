//! What goes wrong during a release: the target shows the exact state, in this boot and in the next.

use std::fs::{self, File};
use std::io::{IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::Command;

use rustix::fs::syncfs;
use rustix::mount::{UnmountFlags, unmount};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType, sendmsg, socketpair,
};
use test_support::snapshot::{self, Snapshot};

use super::{boot_state, in_ram, is_overlay, said};
use crate::checkpoint::noise;
use crate::sweep::{CALLS, copy, strace, trace};
use crate::tools::{self, text};
use crate::world::{Disk, ETC, Fs, World, expect};

/// Opens a file where no look into `/proc` finds it: through a copy of the mount that is gone, by a descriptor that is on
/// its way from one socket to another.
fn hide(world: &World, file: &str) -> (OwnedFd, OwnedFd) {
    let copy = world.at("copy");
    fs::create_dir(&copy).unwrap();
    tools::run("mount", &["--bind", world.at("etc").to_str().unwrap(), copy.to_str().unwrap()]);
    let open = File::open(copy.join(Path::new(file).file_name().unwrap())).unwrap();
    let (from, to) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut message = SendAncillaryBuffer::new(&mut space);
    let files = [open.as_fd()];
    assert!(message.push(SendAncillaryMessage::ScmRights(&files)));
    sendmsg(&from, &[IoSlice::new(b"x")], &mut message, SendFlags::empty()).unwrap();
    drop(open);
    unmount(&copy, UnmountFlags::DETACH).unwrap();
    fs::remove_dir(&copy).unwrap();
    (from, to)
}

pub(super) fn what_lives_on_is_mounted_again() {
    let world = World::new(ETC);
    let etc = world.at("etc");
    fs::write(etc.join("file"), "on disk").unwrap();
    world.boot();
    fs::write(etc.join("file"), "in RAM").unwrap();
    fs::create_dir(etc.join("dir")).unwrap();
    let hold = hide(&world, "etc/file");
    let expected = snapshot::take(&etc);
    let lower = snapshot::take(&world.run.join("lower/etc"));
    for _ in 0..2 {
        let output = world.syncd(&["release"]);
        expect(&output, 3);
        said(&output, "something still uses its overlay");
        assert!(is_overlay(&etc));
        snapshot::assert_same(&expected, &snapshot::take(&etc), "the view");
        snapshot::assert_same(&lower, &snapshot::take(&world.run.join("lower/etc")), "the disk");
        assert!(boot_state(&world).targets[0].pinned.is_some());
        let output = world.syncd(&["status"]);
        expect(&output, 3);
        said(&output, "something still uses its overlay");
    }
    drop(hold);
    // It stays: of two overlays on one upper directory the kernel remembers one.
    expect(&world.syncd(&["release"]), 3);
    fs::write(etc.join("dir/new"), "after that").unwrap();
    fs::remove_file(etc.join("file")).unwrap();
    let expected = snapshot::take(&etc);
    world.checkpoint();
    unmount(&etc, UnmountFlags::empty()).unwrap();
    let output = world.syncd(&["merge"]);
    expect(&output, 3);
    said(&output, "/etc is not merged");
    snapshot::assert_same(&lower, &snapshot::take(&world.run.join("lower/etc")), "the disk");
    world.cut();
    world.boot();
    snapshot::assert_same(&expected, &snapshot::take(&etc), "the next boot");
    assert!(world.checkpoints().is_empty());
}

pub(super) fn without_room_it_is_as_before() {
    let world = World::on(Disk::new(Fs::Ext4, 128), ETC);
    let etc = world.at("etc");
    world.boot();
    fs::write(etc.join("large"), noise(12 << 20)).unwrap();
    fs::create_dir(etc.join("dir")).unwrap();
    fs::write(etc.join("dir/file"), "in RAM").unwrap();
    world.checkpoint();
    // Its checkpoint is there, but it fits no second time.
    let mut filler = File::create(world.at("filler")).unwrap();
    let block = vec![0xaa; 1 << 20];
    while filler.write_all(&block).is_ok() {}
    let length = filler.metadata().unwrap().len();
    filler.set_len(length - (4 << 20)).unwrap();
    syncfs(&filler).unwrap();
    let expected = snapshot::take(&etc);
    for _ in 0..2 {
        let output = world.syncd(&["release"]);
        expect(&output, 1);
        said(&output, "merging needs");
        said(&output, "it is in RAM as before");
        assert!(is_overlay(&etc));
        snapshot::assert_same(&expected, &snapshot::take(&etc), "the view");
    }
    fs::write(etc.join("dir/later"), "in RAM").unwrap();
    drop(filler);
    fs::remove_file(world.at("filler")).unwrap();
    let expected = snapshot::take(&etc);
    expect(&world.syncd(&["release"]), 0);
    assert!(in_ram(&world) < 1 << 20);
    snapshot::assert_same(&expected, &snapshot::take(&etc), "the view");
    snapshot::assert_same(&expected, &snapshot::take(&world.run.join("lower/etc")), "the disk");
}

/// How many points of a release are tried.
const SAMPLE: usize = 3;

/// Mounts and unmounts as well: they are a part of it.
fn calls() -> String {
    format!("{CALLS},umount2,move_mount,open_tree,mount,fsconfig,fsopen,fsmount")
}

/// The one call that is tried, at all of its points.
fn only_at() -> Option<String> {
    std::env::var("RELEASE_AT").ok()
}

/// A time that is the same each time.
fn stamp() -> std::time::SystemTime {
    std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000)
}

/// A system that is made anew for each point: its disk is a copy.
struct Again {
    world: World,
    /// As it was at the checkpoint before the release.
    saved: Snapshot,
    /// As it was when the release began.
    expected: Snapshot,
}

impl Again {
    fn new() -> Self {
        let world = World::new(ETC);
        let etc = world.at("etc");
        for name in ["changed", "removed", "dir/file", "remade/old", "log"] {
            fs::create_dir_all(etc.join(name).parent().unwrap()).unwrap();
            fs::write(etc.join(name), format!("on disk {name}")).unwrap();
        }
        for part in ["etc", "persist"] {
            copy(&world.at(part), &world.at(&format!("saved {part}")));
        }
        let mut again = Self { world, saved: Snapshot::new(), expected: Snapshot::new() };
        again.saved = again.prepare();
        again.expected = again.view();
        again
    }

    /// The state before the release: a checkpoint, and more in RAM. Returns how it was at the checkpoint.
    fn prepare(&self) -> Snapshot {
        let world = &self.world;
        world.cut();
        for part in ["etc", "persist"] {
            copy(&world.at(&format!("saved {part}")), &world.at(part));
        }
        let etc = world.at("etc");
        world.boot();
        fs::write(etc.join("changed"), "in RAM").unwrap();
        fs::remove_dir_all(etc.join("remade")).unwrap();
        fs::create_dir(etc.join("remade")).unwrap();
        fs::write(etc.join("remade/new"), "in RAM").unwrap();
        // What differs from one time to the next is only when.
        let settle = |names: &[&str]| {
            for name in names {
                File::open(etc.join(name)).unwrap().set_modified(stamp()).unwrap();
            }
        };
        settle(&["changed", "remade/new", "remade", ""]);
        world.checkpoint();
        let saved = self.view();
        fs::remove_file(etc.join("removed")).unwrap();
        fs::rename(etc.join("log"), etc.join("log.1")).unwrap();
        fs::write(etc.join("dir/new"), "in RAM").unwrap();
        fs::hard_link(etc.join("dir/new"), etc.join("link")).unwrap();
        settle(&["dir/new", "log.1", "dir", ""]);
        saved
    }

    fn view(&self) -> Snapshot {
        snapshot::take(&self.world.at("etc"))
    }
}

/// The numbers of the calls that are tried: a choice, or with `RELEASE=full` all.
fn points(command: &Command) -> Vec<(String, usize)> {
    let mut all = Vec::new();
    for (call, lines) in trace(command, &calls(), &[]) {
        // Most of what is opened is in /proc.
        let is_ours = |lines: &[String]| lines.iter().any(|line| call != "openat" || line.contains("/eo-test-"));
        let numbers = lines.iter().enumerate().filter(|(_, lines)| is_ours(lines)).map(|(index, _)| index + 1);
        all.extend(numbers.map(|number| (call.clone(), number)));
    }
    let only = only_at();
    all.retain(|(call, _)| only.as_ref().is_none_or(|only| only == call));
    let is_full = only.is_some() || std::env::var("RELEASE").is_ok_and(|value| value == "full");
    let stride = if is_full { 1 } else { (all.len() / SAMPLE) | 1 };
    // What is mounted and unmounted is tried always, and where something temporary is left.
    let is_always = |call: &str| ["umount2", "move_mount", "renameat"].contains(&call);
    let chosen = all.into_iter().enumerate();
    chosen
        .filter(|(index, (call, _))| index % stride == stride / 2 || is_always(call))
        .map(|(_, point)| point)
        .collect()
}

pub(super) fn a_release_that_fails_anywhere() {
    let again = Again::new();
    let command = again.world.syncd_command(&["release"]);
    let (mut tried, mut failed) = (0, 0);
    for (index, (call, number)) in points(&command).into_iter().enumerate() {
        let (errno, more) = [("EIO", ""), ("ENOSPC", "+"), ("EROFS", ""), ("EIO", "+")][index % 4];
        // Where nothing can be opened, written or mounted any more nothing can be shown.
        let needed =
            ["openat", "write", "mount", "open_tree", "move_mount", "umount2", "fsopen", "fsconfig", "fsmount"];
        let more = if needed.contains(&call.as_str()) { "" } else { more };
        again.prepare();
        let inject = format!("inject={call}:error={errno}:when={number}{more}");
        let output = strace(&command, &["-e", &format!("trace={call}"), "-e", &inject, "-o", "/dev/null"]);
        let what = format!("{inject}: {}", text(&output));
        let code = output.status.code().unwrap_or_else(|| panic!("{what}"));
        if code == 127 {
            continue;
        }
        tried += 1;
        failed += usize::from(code != 0);
        assert!([0, 1, 3].contains(&code), "{what}");
        println!("{what}");
        snapshot::assert_same(&again.expected, &again.view(), &format!("the view: {what}"));
        // It goes on: saved by a checkpoint, or on the disk already.
        fs::write(again.world.at("etc/later"), "in RAM or on disk").unwrap();
        expect(&again.world.syncd(&["checkpoint"]), 0);
        let after = again.view();
        again.world.cut();
        again.world.boot();
        snapshot::assert_same(&after, &again.view(), &format!("the next boot: {what}"));
    }
    println!("{tried} points, {failed} failed");
    assert!(only_at().is_some() || tried >= SAMPLE && failed >= 3, "{tried} points, {failed} failed");
}

pub(super) fn a_release_killed_anywhere() {
    let again = Again::new();
    let command = again.world.syncd_command(&["release"]);
    let (mut killed, mut saved) = (0, 0);
    for (call, number) in points(&command) {
        again.prepare();
        let inject = format!("inject={call}:signal=KILL:when={number}");
        let output = strace(&command, &["-e", &format!("trace={call}"), "-e", &inject, "-o", "/dev/null"]);
        if output.status.success() {
            continue;
        }
        killed += 1;
        println!("{inject}: {}", text(&output));
        let goes_on = killed % 2 == 0 || call == "renameat" || only_at().is_some();
        if goes_on {
            // The same boot goes on: on a disk that fails, and then on one that does not.
            let failing = again.world.syncd_command(&["release"]);
            let inject = "inject=fsync,syncfs:error=EIO:when=1+";
            let output = strace(&failing, &["-e", "trace=fsync,syncfs", "-e", inject, "-o", "/dev/null"]);
            println!("{}", text(&output));
            assert!(output.status.code().is_some(), "{}", text(&output));
            snapshot::assert_same(
                &again.expected,
                &again.view(),
                &format!("the view after {inject} after {call} {number}"),
            );
            expect(&again.world.syncd(&["release"]), 0);
            snapshot::assert_same(&again.expected, &again.view(), &format!("the view after {inject}"));
            assert!(is_overlay(&again.world.at("etc")), "{inject}");
            fs::write(again.world.at("etc/later"), "in RAM").unwrap();
            again.world.checkpoint();
            fs::remove_file(again.world.at("etc/later")).unwrap();
            File::open(again.world.at("etc")).unwrap().set_modified(stamp()).unwrap();
            again.world.checkpoint();
        }
        again.world.cut();
        again.world.boot();
        // Before its own checkpoint was durable it is a cut as any other.
        let is_saved = !goes_on && snapshot::difference(&again.saved, &again.view()).is_none();
        saved += usize::from(is_saved);
        if !is_saved {
            snapshot::assert_same(&again.expected, &again.view(), &format!("the next boot after {inject}"));
        }
        assert!(again.world.checkpoints().is_empty(), "{inject}");
    }
    println!("{killed} points, {saved} before the checkpoint");
    assert!(
        only_at().is_some() || killed >= SAMPLE && saved < killed / 2,
        "{killed} points, {saved} before the checkpoint"
    );
}
