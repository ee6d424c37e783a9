//! What is pending in the store: merged before the mounts, else unpacked, else its target stays on disk.

use std::fs;
use std::os::unix::fs::symlink;
use std::process::Command;

use super::table::{assert_whole_or_absent, is_overlay, mount_at, mounts, mounts_below};
use super::{TWO, early, early_by_itself, make_mount_point, remount, said, with_a_pending_chain};
use crate::tools::{self, text};
use crate::world::{ETC, World, expect};
use test_support::snapshot;

/// A disk with its write protection on: no remount makes it writable.
struct WriteProtected(String);

impl WriteProtected {
    fn new(world: &World) -> Self {
        remount(world, "ro");
        let disk = world.root.parent().unwrap();
        let mounts = mounts_below(disk.parent().unwrap());
        let device = mounts.iter().find(|mount| mount.point == disk).unwrap().source.clone();
        tools::run("blockdev", &["--setro", &device]);
        Self(device)
    }
}

impl Drop for WriteProtected {
    fn drop(&mut self) {
        // The flag stays on a loop device, and the next image would get it.
        tools::run("blockdev", &["--setrw", &self.0]);
    }
}

pub(super) fn a_pending_chain_is_merged_before_the_mount() {
    let (world, expected) = with_a_pending_chain(ETC);
    world.boot();
    snapshot::assert_same(&expected, &snapshot::take(&world.at("etc")), "the view");
    snapshot::assert_same(&expected, &snapshot::take(&world.run.join("lower/etc")), "the disk");
    assert!(world.checkpoints().is_empty(), "the chain is still there");
    let names: Vec<_> = fs::read_dir(world.upper()).unwrap().collect();
    assert!(names.is_empty(), "upper does not start empty: {names:?}");
}

pub(super) fn a_config_changed_in_ram_decides_the_next_boot() {
    let world = World::new("");
    fs::write(world.at("etc/ephemeral-overlay.toml"), TWO).unwrap();
    expect(&early_by_itself(&world), 0);
    assert!(is_overlay(&world, "var/log"));
    fs::write(world.at("etc/ephemeral-overlay.toml"), ETC).unwrap();
    world.checkpoint();
    world.cut();
    expect(&early_by_itself(&world), 0);
    assert!(is_overlay(&world, "etc") && mount_at(&world, "var/log").is_none(), "{:?}", mounts(&world));
}

pub(super) fn a_target_that_is_no_longer_configured_is_merged() {
    let (world, expected) = with_a_pending_chain(ETC);
    world.configure(&format!("{TWO}overlay.dirs = ['/var/log']"));
    world.boot();
    assert!(is_overlay(&world, "var/log") && mount_at(&world, "etc").is_none(), "{:?}", mounts(&world));
    snapshot::assert_same(&expected, &snapshot::take(&world.at("etc")), "it was not merged");
    assert!(world.checkpoints().is_empty());
}

pub(super) fn the_merge_uses_the_config_that_early_was_given() {
    let world = World::new(&format!("{ETC}persist.root = '/keep'"));
    world.boot();
    fs::write(world.at("etc/file"), "in RAM").unwrap();
    world.checkpoint();
    world.cut();
    assert!(world.at("keep/ephemeral-overlay/targets/etc").exists());
    world.boot();
    assert_eq!(fs::read_to_string(world.at("etc/file")).unwrap_or_default(), "in RAM", "the view");
    assert_eq!(fs::read_to_string(world.run.join("lower/etc/file")).unwrap_or_default(), "in RAM", "the disk");
}

pub(super) fn a_chain_that_cannot_be_merged_is_unpacked() {
    // A root in a directory cannot be remounted at all, that of a disk with write protection is not.
    for is_mount in [false, true] {
        let (world, expected) = with_a_pending_chain(ETC);
        let disk = snapshot::take(&world.at("etc"));
        let store = snapshot::take(&world.store());
        let protected = WriteProtected::new(&world);
        if is_mount {
            make_mount_point(&world);
        }
        let output = early(&world);
        assert!(is_overlay(&world, "etc"), "{}", text(&output));
        snapshot::assert_same(&expected, &snapshot::take(&world.at("etc")), "the view");
        snapshot::assert_same(&disk, &snapshot::take(&world.run.join("lower/etc")), "the disk");
        snapshot::assert_same(&store, &snapshot::take(&world.store()), "the chain");
        said(&output, "merging pending checkpoints");
        let refused = String::from_utf8_lossy(&output.stderr).contains("mount -o remount,rw");
        assert_eq!(refused, is_mount, "{}", text(&output));
        expect(&output, 3);
        // With the disk as it was, it is merged as if nothing had happened.
        world.cut();
        drop(protected);
        remount(&world, "rw");
        world.boot();
        snapshot::assert_same(&expected, &snapshot::take(&world.run.join("lower/etc")), "the disk after the next boot");
        assert!(world.checkpoints().is_empty());
    }
}

pub(super) fn a_store_that_cannot_be_read_is_not_an_empty_one() {
    for whole in [false, true] {
        let (world, expected) = with_a_pending_chain(ETC);
        let disk = snapshot::take(&world.at("etc"));
        let etc = world.store();
        let unreadable = if whole { etc.parent().unwrap() } else { &etc };
        let real = world.root.join("real");
        fs::rename(unreadable, &real).unwrap();
        // It leads to itself.
        symlink(unreadable.file_name().unwrap(), unreadable).unwrap();
        let output = early(&world);
        expect(&output, 3);
        assert!(!is_overlay(&world, "etc"), "mounted without its chain: {}", text(&output));
        said(&output, "etc skipped");
        snapshot::assert_same(&disk, &snapshot::take(&world.at("etc")), "the disk");
        world.cut();
        fs::remove_file(unreadable).unwrap();
        fs::rename(&real, unreadable).unwrap();
        world.boot();
        snapshot::assert_same(&expected, &snapshot::take(&world.at("etc")), "the view");
    }
}

pub(super) fn without_syncd_a_pending_chain_keeps_its_target_on_disk() {
    let (world, expected) = with_a_pending_chain(TWO);
    let disk = snapshot::take(&world.at("etc"));
    let alone = tempfile::tempdir().unwrap();
    let copy = alone.path().join("early");
    tools::install(tools::early(), &copy);
    let mut command = Command::new(&copy);
    let output = command.args(world.early_command("").get_args()).env("PATH", alone.path()).output().unwrap();
    expect(&output, 3);
    said(&output, "merging pending checkpoints: execve ");
    said(&output, "early: /etc skipped: ");
    // Its overlay would show an older state, and a checkpoint of that would replace the newer one.
    assert_eq!(assert_whole_or_absent(&world, "no syncd"), 1);
    assert!(is_overlay(&world, "var/log"));
    snapshot::assert_same(&disk, &snapshot::take(&world.at("etc")), "the disk");
    assert_eq!(world.checkpoints().len(), 1);
    world.cut();
    world.boot();
    snapshot::assert_same(&expected, &snapshot::take(&world.at("etc")), "the view after the next boot");
}
