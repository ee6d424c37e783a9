//! A root that is mounted read-only, as the kernel does without `rw`.

use std::fs::{self, File};

use rustix::mount::{UnmountFlags, unmount};

use super::table::{is_overlay, mount_in_run};
use super::{early, is_read_only, make_mount_point, mode, remount, token, with_a_pending_chain};
use crate::tools::{self, text};
use crate::world::{ETC, World, expect};
use test_support::snapshot;

pub(super) fn a_read_only_root_is_writable_for_a_merge_only() {
    let (world, expected) = with_a_pending_chain(ETC);
    remount(&world, "ro");
    make_mount_point(&world);
    tools::run("mount", &["-o", "remount,bind,ro,nosuid,noatime", world.root.to_str().unwrap()]);
    let output = early(&world);
    expect(&output, 0);
    snapshot::assert_same(&expected, &snapshot::take(&world.at("etc")), "the view");
    snapshot::assert_same(&expected, &snapshot::take(&world.run.join("lower/etc")), "the disk");
    assert!(world.checkpoints().is_empty(), "it was not merged");
    assert!(is_read_only(&world), "the root was left writable");
    let flags = rustix::fs::statvfs(&world.root).unwrap().f_flag;
    for flag in [rustix::fs::StatVfsMountFlags::NOSUID, rustix::fs::StatVfsMountFlags::NOATIME] {
        assert!(flags.contains(flag), "a flag of the mount is gone: {flags:?}");
    }
    let other = world.root.with_file_name("probe");
    assert!(File::create(other).is_err(), "the file system was left writable");
}

pub(super) fn a_pending_chain_on_a_read_only_root_is_seen() {
    let (world, expected) = with_a_pending_chain(ETC);
    remount(&world, "ro");
    let output = early(&world);
    assert!(is_overlay(&world, "etc"), "{}", text(&output));
    snapshot::assert_same(&expected, &snapshot::take(&world.at("etc")), "the view");
    assert!(is_read_only(&world), "the root was left writable");
}

pub(super) fn an_ordinary_boot_from_a_read_only_root() {
    let world = World::new("");
    world.boot();
    world.cut();
    remount(&world, "ro");
    world.boot();
    assert!(is_overlay(&world, "etc") && is_overlay(&world, "var/log"));
    assert!(mount_in_run(&world, "store").is_some(), "the store is not bound");
    assert!(is_read_only(&world), "the root was left writable");
    fs::write(world.at("etc/file"), "in RAM").unwrap();
    // As systemd does before anything of the user starts.
    remount(&world, "rw");
    world.checkpoint();
    world.cut();
    world.boot();
    assert_eq!(fs::read_to_string(world.at("etc/file")).unwrap(), "in RAM");
}

pub(super) fn a_first_boot_from_a_read_only_root() {
    let world = World::new(ETC);
    remount(&world, "ro");
    let output = early(&world);
    assert!(matches!(tools::code(&output), 0 | 3), "{}", text(&output));
    assert!(is_overlay(&world, "etc"), "{}", text(&output));
    assert!(is_read_only(&world), "the root was left writable");
    fs::write(world.at("etc/file"), "in RAM").unwrap();
    remount(&world, "rw");
    world.checkpoint();
    assert_eq!(mode(&world.at("persist/ephemeral-overlay")), 0o700);
    world.cut();
    world.boot();
    assert_eq!(fs::read_to_string(world.run.join("lower/etc/file")).unwrap(), "in RAM");
    assert!(token(&world.run.join("lower/etc")).is_some());
}

pub(super) fn binds_of_a_read_only_root_become_writable_with_it() {
    let world = World::new(ETC);
    world.boot();
    world.cut();
    remount(&world, "ro");
    let output = early(&world);
    assert!(is_overlay(&world, "etc"), "{}", text(&output));
    fs::write(world.at("etc/file"), "in RAM").unwrap();
    remount(&world, "rw");
    world.checkpoint();
    unmount(world.at("etc"), UnmountFlags::empty()).unwrap();
    expect(&world.syncd(&["merge"]), 0);
    assert_eq!(fs::read_to_string(world.at("etc/file")).unwrap(), "in RAM");
}
