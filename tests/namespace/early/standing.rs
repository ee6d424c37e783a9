//! Whether anything is mounted at all: what the kernel's command line, the configuration and the root say of it.

use std::fs;

use super::table::{assert_nothing_is_mounted, is_overlay};
use super::{early, early_by_itself, said, with_a_pending_chain};
use crate::world::{ETC, World, expect};
use test_support::snapshot;

pub(super) fn a_config_that_is_not_toml_mounts_nothing() {
    let world = World::new("");
    fs::write(world.at("etc/ephemeral-overlay.toml"), "[overlay]\nsize = \"50%\"\ndirs = [\"/etc\"\n[tmpfs]\n")
        .unwrap();
    let output = early_by_itself(&world);
    expect(&output, 1);
    said(&output, "/etc/ephemeral-overlay.toml:4: not valid TOML: ");
    said(&output, "; booting from disk\n");
    assert_nothing_is_mounted(&world);
    assert!(!world.run.join("boot.json").exists());
}

pub(super) fn an_unknown_key_mounts_nothing_and_names_a_known_one() {
    let world = World::new("");
    fs::create_dir(world.at("etc/ephemeral-overlay.d")).unwrap();
    fs::write(world.at("etc/ephemeral-overlay.d/10-mine.toml"), "\n[overlay]\ndir = ['/etc']\n").unwrap();
    let output = early_by_itself(&world);
    expect(&output, 1);
    said(&output, "/etc/ephemeral-overlay.d/10-mine.toml:3: unknown key overlay.dir, did you mean dirs?");
    assert_nothing_is_mounted(&world);
}

pub(super) fn a_bad_config_does_not_keep_a_chain_from_being_merged() {
    let (world, _) = with_a_pending_chain(ETC);
    fs::write(world.at("etc/ephemeral-overlay.toml"), "nonsense").unwrap();
    let output = early_by_itself(&world);
    expect(&output, 1);
    said(&output, "/etc/ephemeral-overlay.toml:1: not valid TOML: ");
    assert_nothing_is_mounted(&world);
    assert_eq!(fs::read_to_string(world.at("etc/made")).unwrap_or_default(), "in RAM", "it was not merged");
    assert!(!world.at("etc/removed").exists() && world.at("etc/remade/new").exists());
    assert!(world.checkpoints().is_empty());
    assert_eq!(fs::read_to_string(world.at("etc/ephemeral-overlay.toml")).unwrap(), "nonsense");
}

pub(super) fn off_merges_and_mounts_nothing() {
    let (world, expected) = with_a_pending_chain(ETC);
    expect(&world.early_command("root=/dev/sda1 ephemeral_overlay=off quiet").output().unwrap(), 0);
    assert_nothing_is_mounted(&world);
    snapshot::assert_same(&expected, &snapshot::take(&world.at("etc")), "it was not merged");
    assert!(world.checkpoints().is_empty());
    assert!(!world.run.join("boot.json").exists(), "syncd would believe that the overlays are there");
}

pub(super) fn nomerge_touches_nothing() {
    let (world, expected) = with_a_pending_chain(ETC);
    let before = snapshot::take(&world.root);
    expect(&world.early_command("ephemeral_overlay=nomerge").output().unwrap(), 0);
    assert_nothing_is_mounted(&world);
    snapshot::assert_same(&before, &snapshot::take(&world.root), "it touched the disk");
    assert_eq!(world.checkpoints().len(), 1);
    assert!(!world.run.exists());
    // Nothing is lost by it.
    world.boot();
    snapshot::assert_same(&expected, &snapshot::take(&world.at("etc")), "the boot after it");
}

pub(super) fn a_value_that_is_not_known_is_off_and_is_reported() {
    let (world, expected) = with_a_pending_chain(ETC);
    let output = world.early_command("ephemeral_overlay=maybe").output().unwrap();
    assert_nothing_is_mounted(&world);
    snapshot::assert_same(&expected, &snapshot::take(&world.at("etc")), "it was not merged");
    said(&output, "maybe");
}

pub(super) fn a_root_without_its_counterpart_stays_on_disk() {
    let (world, expected) = with_a_pending_chain(ETC);
    fs::remove_file(world.at("usr/lib/ephemeral-overlay/counterpart")).unwrap();
    let output = early(&world);
    expect(&output, 1);
    said(&output, "nobody would save what is in RAM; booting from disk");
    assert_nothing_is_mounted(&world);
    snapshot::assert_same(&expected, &snapshot::take(&world.at("etc")), "it was not merged");
}

pub(super) fn a_rescue_merges_and_mounts_nothing() {
    for cmdline in ["quiet emergency", "systemd.unit=rescue.target", "init=/bin/sh"] {
        let (world, expected) = with_a_pending_chain(ETC);
        let output = world.early_command(cmdline).output().unwrap();
        expect(&output, 1);
        said(&output, "booting from disk");
        assert_nothing_is_mounted(&world);
        snapshot::assert_same(&expected, &snapshot::take(&world.at("etc")), "it was not merged");
    }
}

pub(super) fn the_roots_own_init_may_be_named() {
    for (name, target) in [("usr/lib/systemd/systemd", None), ("sbin/my-init", Some("/sbin/my-init"))] {
        let world = World::new(ETC);
        let path = world.at(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::create_dir_all(world.at("sbin")).unwrap();
        fs::write(&path, "").unwrap();
        if let Some(target) = target {
            // Absolute, as distributions make it: it must not lead to this machine's.
            std::os::unix::fs::symlink(target, world.at("sbin/init")).unwrap();
        }
        let output = world.early_command(&format!("init=/{name}")).output().unwrap();
        expect(&output, 0);
        assert!(is_overlay(&world, "etc"));
    }
}

pub(super) fn after_two_boots_that_never_reached_syncd() {
    let world = World::new(ETC);
    for _ in 0..3 {
        // The first boot makes the store, in which the others are counted.
        world.boot();
        world.cut();
    }
    let output = early(&world);
    expect(&output, 1);
    said(&output, "the last 2 boots did not come as far as syncd");
    // This boot does: the next one is an ordinary one.
    expect(&world.syncd(&["booted"]), 0);
    world.boot();
    assert!(is_overlay(&world, "etc"));
    // To say so is no checkpoint, but the last one has its room from then on.
    fs::write(world.at("etc/new"), "new").unwrap();
    expect(&world.syncd(&["booted"]), 0);
    assert!(world.checkpoints().is_empty());
    assert!(world.at("persist/ephemeral-overlay/reserve").exists(), "there is no room for the last checkpoint");
}
