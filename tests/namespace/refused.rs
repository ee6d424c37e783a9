//! Lower is never written while anything has its overlay, in whatever form it lives on.

use std::fs::{self, File};
use std::io::Write;
use std::process::{Child, Command, Stdio};

use rustix::mount::{UnmountFlags, unmount};

use crate::tools::text;
use crate::world::{ETC, World, expect};
use test_support::snapshot;

pub(crate) const TESTS: &[(&str, fn())] = &[
    ("a_mounted_overlay", || refused(|_| {})),
    ("a_mounted_overlay_whose_boot_state_is_gone", a_mounted_overlay_whose_boot_state_is_gone),
    (ALONE, an_overlay_that_only_another_namespace_has),
    ("a_lazily_unmounted_overlay_with_an_open_file", a_lazily_unmounted_overlay_with_an_open_file),
];

/// The test that must run alone, because it copies the mount table.
pub(crate) const ALONE: &str = "an_overlay_that_only_another_namespace_has";

/// A running system with a pending checkpoint.
fn pending() -> World {
    let world = World::new(ETC);
    fs::write(world.at("etc/file"), "old").unwrap();
    world.boot();
    fs::write(world.at("etc/file"), "new").unwrap();
    world.checkpoint();
    world
}

/// Expects both forms of merge to leave the raw lower as it is.
fn is_refused(world: &World, forms: &[&str]) {
    let lower = world.run.join("lower/etc");
    let before = (snapshot::take(&lower), world.checkpoints());
    for form in forms {
        let output = if *form == "live" { world.syncd(&["merge"]) } else { world.offline(&["merge"]) };
        expect(&output, 3);
        assert!(text(&output).contains("/etc is not merged"), "{}", text(&output));
        snapshot::assert_same(&before.0, &snapshot::take(&lower), "lower was written");
        assert_eq!(before.1, world.checkpoints());
    }
}

fn refused(change: impl Fn(&World)) {
    let world = pending();
    change(&world);
    is_refused(&world, &["live", "offline"]);
    assert_eq!(fs::read(world.at("etc/file")).unwrap(), b"new", "the view changed");
}

fn a_mounted_overlay_whose_boot_state_is_gone() {
    refused(|world| fs::remove_file(world.run.join("boot.json")).unwrap());
}

/// A process that holds on to a copy of the mount table.
fn other_namespace() -> Child {
    let mut child = Command::new("unshare")
        .args(["-m", "--propagation", "private", "sh", "-c", "echo ready; read line"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    let stdout = child.stdout.take().unwrap();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(stdout), &mut line).unwrap();
    child
}

fn an_overlay_that_only_another_namespace_has() {
    let world = pending();
    let mut other = other_namespace();
    unmount(world.at("etc"), UnmountFlags::empty()).unwrap();
    is_refused(&world, &["live", "offline"]);
    other.stdin.take().unwrap().write_all(b"go\n").unwrap();
    other.wait().unwrap();
    expect(&world.syncd(&["merge"]), 0);
    assert_eq!(fs::read(world.at("etc/file")).unwrap(), b"new");
}

fn a_lazily_unmounted_overlay_with_an_open_file() {
    let world = pending();
    let mut file = File::options().append(true).open(world.at("etc/file")).unwrap();
    unmount(world.at("etc"), UnmountFlags::DETACH).unwrap();
    // No mount table shows it any more: only the running system, which knows the upper directory, can tell.
    is_refused(&world, &["live"]);
    file.write_all(b" and more").unwrap();
    drop(file);
    expect(&world.syncd(&["merge"]), 0);
    assert_eq!(fs::read(world.at("etc/file")).unwrap(), b"new and more");
}
