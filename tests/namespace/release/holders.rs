//! Whoever uses the overlay keeps it, is named, and sees no change.

use std::fs::{self, File};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use rustix::fs::{CWD, Mode, OFlags, inotify, openat};
use rustix::mount::{UnmountFlags, unmount};
use test_support::mapped::Mapping;
use test_support::snapshot;

use super::{boot_state, is_overlay, mounts_on, said};
use crate::activate::{end, user_of};
use crate::tools::{self, text};
use crate::world::{ETC, World, expect};

pub(crate) const ALONE: [&str; 2] =
    ["another_mount_namespace_is_named", "a_copy_that_goes_with_the_unmount_is_no_reason"];

/// A process that is ended with the test.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        // An error means that it has ended.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// A running system with something in RAM.
fn running() -> World {
    let world = World::new(ETC);
    fs::create_dir(world.at("etc/dir")).unwrap();
    fs::write(world.at("etc/file"), "on disk").unwrap();
    world.boot();
    fs::write(world.at("etc/file"), "in RAM").unwrap();
    world
}

/// Expects that nothing is released, and that it is said why.
fn assert_left(world: &World, words: &[&str]) {
    let (etc, lower) = (world.at("etc"), world.run.join("lower/etc"));
    let before = (mounts_on(&etc), boot_state(world), snapshot::take(&etc), snapshot::take(&lower));
    let output = world.syncd(&["release"]);
    assert_eq!(tools::code(&output), 3, "{words:?}: {}", text(&output));
    said(&output, "/etc: not released: ");
    for words in words {
        said(&output, words);
    }
    assert_eq!(before.0, mounts_on(&etc), "{words:?}: the mounts changed");
    assert_eq!(before.1, boot_state(world));
    snapshot::assert_same(&before.2, &snapshot::take(&etc), "the view");
    snapshot::assert_same(&before.3, &snapshot::take(&lower), "the disk");
}

/// Expects that nobody is in the way any more.
fn assert_released(world: &World) {
    let output = world.syncd(&["release"]);
    expect(&output, 0);
    assert_eq!(fs::read_to_string(world.run.join("lower/etc/file")).unwrap(), "in RAM");
}

pub(super) fn who_holds_it_is_named() {
    let world = running();
    let etc = world.at("etc");
    let file = etc.join("file");
    for (script, words) in [
        ("exec 3<$1/file; echo ready; read line", "etc/file open"),
        ("exec 3>>$1/file; echo ready; read line", "etc/file open for writing"),
        ("exec 3<$1/dir; echo ready; read line", "etc/dir open"),
        ("cd $1/dir; echo ready; read line", "etc/dir as its working directory"),
    ] {
        let child = user_of(&etc, script, &["sh", "-c"]);
        assert_left(&world, &[&format!("process {} (sh)", child.id()), words]);
        end(child);
    }
    let us = format!("process {} (", std::process::id());
    let held = openat(CWD, &file, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
    assert_left(&world, &[&us, "etc/file open"]);
    drop(held);

    let gone = etc.join("gone");
    fs::write(&gone, "x").unwrap();
    let held = File::open(&gone).unwrap();
    fs::remove_file(&gone).unwrap();
    assert_left(&world, &[&us, "etc/gone (deleted) open"]);
    drop(held);

    let mapping = Mapping::new(&File::options().read(true).write(true).open(&file).unwrap(), 4);
    assert_left(&world, &[&us, "etc/file mapped"]);
    drop(mapping);

    for watched in [&etc, &file] {
        let watch = inotify::init(inotify::CreateFlags::CLOEXEC).unwrap();
        inotify::add_watch(&watch, watched, inotify::WatchFlags::MODIFY).unwrap();
        assert_left(&world, &[&us, "etc watched"]);
    }

    let socket = UnixListener::bind(etc.join("socket")).unwrap();
    assert_left(&world, &[&us, "etc/socket bound as a socket"]);
    drop(socket);
    fs::remove_file(etc.join("socket")).unwrap();

    let program = etc.join("program");
    tools::install(Path::new("/bin/sleep"), &program);
    let child = Killed(Command::new(&program).arg("100").spawn().unwrap());
    assert_left(&world, &[&format!("process {} (program)", child.0.id()), "etc/program as its program"]);
    drop(child);
    fs::remove_file(&program).unwrap();
    assert_released(&world);
}

pub(super) fn what_is_mounted_is_named() {
    let world = running();
    let (etc, elsewhere) = (world.at("etc"), world.at("elsewhere"));
    fs::create_dir(&elsewhere).unwrap();
    let dir = etc.join("dir");
    let path = |path: &Path| path.to_str().unwrap().to_owned();
    tools::run("mount", &["-t", "tmpfs", "x", &path(&dir)]);
    assert_left(&world, &["etc/dir is a mount of its own"]);
    unmount(&dir, UnmountFlags::empty()).unwrap();
    tools::run("mount", &["--bind", &path(&dir), &path(&elsewhere)]);
    assert_left(&world, &["elsewhere is a mount of its own"]);
    unmount(&elsewhere, UnmountFlags::empty()).unwrap();
    assert_released(&world);
}

pub(super) fn another_namespace_is_named() {
    let world = running();
    let etc = world.at("etc");
    let unshare = ["unshare", "-m", "--propagation", "private", "sh", "-c"];
    for script in ["echo ready; read line", "mount --bind $1 /mnt; umount $1; echo ready; read line"] {
        let child = user_of(&etc, script, &unshare);
        assert_left(&world, &[&format!("process {} (sh)", child.id()), "mounted for itself"]);
        end(child);
    }
    assert_released(&world);
}

pub(super) fn a_copy_that_follows_is_no_reason() {
    let world = running();
    let etc = world.at("etc");
    tools::run("mount", &["--make-rshared", world.disk().path().to_str().unwrap()]);
    // As a service has it that is in a sandbox of its own.
    let slave = ["unshare", "-m", "--propagation", "slave", "sh", "-c"];
    let child = user_of(&etc, "exec 3<$1/file; echo ready; read line", &slave);
    assert_left(&world, &[&format!("process {} (sh)", child.id()), "etc/file open"]);
    end(child);
    let child = user_of(&etc, "mount --bind $1 $1; echo ready; read line", &slave);
    assert_left(&world, &[&format!("process {} (sh)", child.id()), "etc mounted for itself"]);
    end(child);
    let seen = format!("echo ready; read line; cp $1/file {}", world.at("seen").display());
    let child = user_of(&etc, &seen, &slave);
    assert_released(&world);
    fs::write(etc.join("file"), "in RAM anew").unwrap();
    end(child);
    assert_eq!(fs::read_to_string(world.at("seen")).unwrap(), "in RAM anew");
}

pub(super) fn what_is_found_by_the_unmount_alone() {
    let world = running();
    let image = world.at("etc/image");
    File::create(&image).unwrap().set_len(1 << 20).unwrap();
    // The kernel holds the file, and no process does.
    let device = tools::run("losetup", &["--find", "--show", image.to_str().unwrap()]);
    assert_left(&world, &["umount2 ", "somebody uses it"]);
    tools::run("losetup", &["--detach", device.trim()]);
    fs::remove_file(image).unwrap();
    assert_released(&world);
}

/// A process by the name of journald that has a file open, and a `journalctl` beside it that tells it to close that.
fn journald(world: &World, beside: &Path) -> Killed {
    let program = beside.join("systemd-journald");
    tools::install(Path::new("/bin/sh"), &program);
    let script =
        "trap 'exec 3>&-; touch $2/closed' USR1; exec 3>>$1/journal; touch $2/open; while :; do sleep 0.02 3>&-; done";
    let mut child = Command::new(&program);
    child.args(["-c", script, "sh"]).arg(world.at("etc")).arg(beside).stdout(Stdio::null());
    let child = Killed(child.spawn().unwrap());
    let id = child.0.id();
    let text = format!(
        "#!/bin/sh\nd={}\necho $1 >>$d/calls\n\
         [ $1 = --relinquish-var ] || exit 0\nkill -USR1 {id}\nwhile [ ! -e $d/closed ]; do sleep 0.01; done\n",
        beside.display()
    );
    let script = beside.join("script");
    fs::write(&script, text).unwrap();
    tools::install(&script, &beside.join("journalctl"));
    while !beside.join("open").exists() {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    child
}

pub(super) fn journald_is_asked() {
    let world = running();
    let beside = tempfile::tempdir().unwrap();
    let _journald = journald(&world, beside.path());
    let mut command = world.syncd_command(&["release"]);
    let path = std::env::var("PATH").unwrap();
    command.env("PATH", format!("{}:{path}", beside.path().display()));
    let calls = || fs::read_to_string(beside.path().join("calls")).unwrap_or_default();
    // Somebody else has it, too: journald is left alone.
    let other = user_of(&world.at("etc"), "exec 3<$1/file; echo ready; read line", &["sh", "-c"]);
    expect(&command.output().unwrap(), 3);
    assert_eq!(calls(), "");
    end(other);
    expect(&command.output().unwrap(), 0);
    assert_eq!(calls(), "--relinquish-var\n--flush\n");
    assert!(is_overlay(&world.at("etc")));
}
