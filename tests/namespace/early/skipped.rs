//! What is left alone, or for later: not wanted, not fit for an overlay, or on a file system that is mounted later.

use std::fs;
use std::os::unix::fs::symlink;

use super::table::{assert_nothing_is_mounted, is_overlay, mount_at, mounts, mounts_below};
use super::{TWO, early, paths, said, state, with_a_pending_chain};
use crate::tools::{self, text};
use crate::world::{Disk, ETC, Fs, World, expect};
use test_support::snapshot;

pub(super) fn a_passthrough_that_is_missing_is_skipped_alone() {
    let world = World::new(&format!("{TWO}overlay.passthrough = ['/var/log/journal', '/var/log/here']"));
    fs::create_dir(world.at("var/log/here")).unwrap();
    let output = early(&world);
    expect(&output, 3);
    said(&output, "/var/log/journal skipped: it is in RAM with the rest of /var/log");
    assert!(is_overlay(&world, "etc") && is_overlay(&world, "var/log"));
    assert!(mount_at(&world, "var/log/here").is_some());
}

pub(super) fn a_target_for_logins_is_not_mounted_at_boot() {
    let (world, expected) = with_a_pending_chain(ETC);
    world.configure(&format!("{ETC}overlay.activate = 'login'"));
    let output = early(&world);
    assert!(matches!(tools::code(&output), 0 | 3), "{}", text(&output));
    assert!(!is_overlay(&world, "etc"));
    snapshot::assert_same(&expected, &snapshot::take(&world.at("etc")), "it was not merged");
}

pub(super) fn nothing_configured_mounts_nothing() {
    let world = World::new(&format!("{TWO}overlay.dirs = []"));
    world.boot();
    assert_nothing_is_mounted(&world);
    assert_eq!(state(&world).targets, []);
}

pub(super) fn a_symlink_is_skipped_alone() {
    let world = World::new(TWO);
    fs::rename(world.at("var/log"), world.at("var/elsewhere")).unwrap();
    symlink("elsewhere", world.at("var/log")).unwrap();
    let output = early(&world);
    expect(&output, 3);
    let reason = "it is a symlink, or below one; name the directory it leads to";
    said(&output, &format!("early: /var/log skipped: {reason}\n"));
    assert!(is_overlay(&world, "etc"));
    assert_eq!(mounts_below(&world.root).len(), 2, "only the overlay and its cover: {:?}", mounts(&world));
    let state = state(&world);
    assert_eq!(paths(state.targets.iter().map(|target| &target.path)), ["/etc"]);
    assert_eq!(paths(state.skipped.iter().map(|skipped| &skipped.path)), ["/var/log"]);
    assert_eq!(state.skipped[0].reason, reason);
}

pub(super) fn a_target_below_a_symlink_is_skipped() {
    let world = World::new(TWO);
    fs::rename(world.at("var"), world.at("data")).unwrap();
    // Absolute, so that it means another place outside this root.
    symlink("/data", world.at("var")).unwrap();
    let output = early(&world);
    expect(&output, 3);
    said(&output, "early: /var/log skipped: it is a symlink, or below one");
    assert!(is_overlay(&world, "etc"));
    assert_eq!(mounts_below(&world.root).len(), 2, "only the overlay and its cover: {:?}", mounts(&world));
}

pub(super) fn a_target_that_is_a_mount_point_is_skipped() {
    let world = World::new("");
    for path in ["var/log", "tmp"] {
        tools::run("mount", &["-t", "tmpfs", "somebody", world.at(path).to_str().unwrap()]);
    }
    let output = early(&world);
    expect(&output, 3);
    for path in ["/var/log", "/tmp"] {
        said(&output, &format!("early: {path} skipped: something is mounted there already\n"));
        assert_eq!(mount_at(&world, &path[1..]).unwrap().source, "somebody");
    }
    assert!(is_overlay(&world, "etc"));
    assert_eq!(mount_at(&world, "var/tmp").unwrap().kind, "tmpfs");
}

pub(super) fn a_target_that_is_no_directory_is_skipped() {
    let world = World::new(&format!("{TWO}overlay.dirs = ['/opt/none', '/opt/file', '/opt/file/below', '/etc']"));
    fs::create_dir(world.at("opt")).unwrap();
    fs::write(world.at("opt/file"), "x").unwrap();
    // Targets must not lie in one another.
    let output = early(&world);
    expect(&output, 1);
    world.configure(&format!("{TWO}overlay.dirs = ['/opt/none', '/opt/file', '/etc']"));
    let output = early(&world);
    expect(&output, 3);
    said(&output, "early: /opt/none skipped: there is no such directory\n");
    said(&output, "early: /opt/file skipped: it is not a directory\n");
    assert!(is_overlay(&world, "etc"));
    assert!(!world.at("opt/none").exists(), "it was made");
}

pub(super) fn a_target_that_fstab_mounts_later_is_deferred() {
    let world = World::new(TWO);
    fs::write(world.at("etc/fstab"), "# disks\nLABEL=root / ext4 rw 0 1\nLABEL=log\t/var/log ext4 rw 0 2\n").unwrap();
    let output = early(&world);
    expect(&output, 3);
    said(&output, "early: /var/log skipped: deferred: it is on /var/log, which is not mounted yet\n");
    assert!(is_overlay(&world, "etc"));
    assert_eq!(mounts_below(&world.root).len(), 2, "only the overlay and its cover: {:?}", mounts(&world));
    assert_eq!(paths(state(&world).skipped.iter().map(|skipped| &skipped.path)), ["/var/log"]);
    assert_eq!(paths(&state(&world).deferred), ["/var/log"]);
}

pub(super) fn a_target_on_a_disk_that_is_mounted_is_not_deferred() {
    let other = Disk::new(Fs::Ext4, 32);
    let world = World::new(TWO);
    fs::write(world.at("etc/fstab"), "LABEL=var /var ext4 rw 0 2\n").unwrap();
    fs::create_dir(other.path().join("log")).unwrap();
    fs::write(other.path().join("log/file"), "on the other disk").unwrap();
    tools::run("mount", &["--bind", other.path().to_str().unwrap(), world.at("var").to_str().unwrap()]);
    world.boot();
    assert!(is_overlay(&world, "var/log"));
    assert_eq!(fs::read_to_string(world.at("var/log/file")).unwrap(), "on the other disk");
}

pub(super) fn everything_is_deferred_when_the_store_is() {
    let world = World::new(TWO);
    fs::write(world.at("etc/fstab"), "LABEL=keep /persist ext4 rw 0 2\n").unwrap();
    let output = early(&world);
    expect(&output, 3);
    for target in ["/etc", "/var/log"] {
        let why = "deferred: the store is on /persist, which is not mounted yet";
        said(&output, &format!("early: {target} skipped: {why}\n"));
    }
    assert_nothing_is_mounted(&world);
    assert!(!world.at("persist/ephemeral-overlay").exists(), "a store was made below a mount point");
}

pub(super) fn a_tmpfs_that_fstab_mounts_is_left_to_it() {
    let world = World::new("");
    fs::write(world.at("etc/fstab"), "tmpfs /tmp tmpfs size=1G 0 0\n").unwrap();
    let output = early(&world);
    expect(&output, 3);
    said(&output, "early: /tmp skipped: fstab mounts it; remove one of the two\n");
    assert_eq!(mount_at(&world, "tmp"), None);
    assert_eq!(mount_at(&world, "var/tmp").unwrap().kind, "tmpfs");
}
