//! `syncd release` and `deactivate`: what nothing uses goes to the disk while the system runs, and what is seen stays what
//! it is.

mod holders;
mod race;
mod room;
mod status;
mod trouble;

use std::fs;

use ephemeral_overlay::state::BootState;
use rustix::fs::statvfs;
use rustix::mount::{UnmountFlags, unmount};
use test_support::snapshot;

use crate::sweep::three_checkpoints;
use crate::tools::{is_overlay, mounts_on, text};
use crate::world::{ETC, World, expect};

pub(crate) const TESTS: &[(&str, fn())] = &[
    ("what_nothing_uses_goes_to_the_disk_and_its_ram_is_free", what_nothing_uses_goes_to_the_disk),
    ("it_can_be_done_again_and_again", it_can_be_done_again_and_again),
    ("what_is_deactivated_stays_on_disk_until_it_is_activated", what_is_deactivated_stays_on_disk),
    ("what_is_activated_at_login_is_released_at_logout", what_is_activated_at_login),
    ("who_holds_it_is_named_and_nothing_changes", holders::who_holds_it_is_named),
    ("what_is_mounted_in_it_or_elsewhere_is_named", holders::what_is_mounted_is_named),
    (holders::ALONE[0], holders::another_namespace_is_named),
    (holders::ALONE[1], holders::a_copy_that_follows_is_no_reason),
    ("what_is_found_by_the_unmount_alone_leaves_it_too", holders::what_is_found_by_the_unmount_alone),
    ("journald_is_asked_for_its_files", holders::journald_is_asked),
    ("what_lives_on_in_secret_is_mounted_again_and_pinned", trouble::what_lives_on_is_mounted_again),
    ("without_room_for_the_merge_it_is_as_before", trouble::without_room_it_is_as_before),
    ("a_release_that_fails_anywhere_shows_the_same", trouble::a_release_that_fails_anywhere),
    ("a_release_killed_anywhere_is_as_a_cut", trouble::a_release_killed_anywhere),
    ("what_a_writer_saw_succeed_is_there", race::what_a_writer_saw_succeed_is_there),
    ("status_says_that_it_is_being_released", status::it_is_being_released),
    ("status_waits_for_a_release_that_begins", status::a_release_that_begins),
    ("a_full_tmpfs_grows_and_asks_for_a_release", room::a_full_tmpfs_grows),
];

/// The tests that must run alone, because they copy the mount table.
pub(crate) const ALONE: &[&str] = &holders::ALONE;

fn boot_state(world: &World) -> BootState {
    BootState::read(&world.run.join("boot.json")).unwrap().expect("there is no boot.json")
}

/// What is in RAM, in bytes.
fn in_ram(world: &World) -> u64 {
    let stat = statvfs(world.run.join("ram")).unwrap();
    (stat.f_blocks - stat.f_bfree) * stat.f_frsize
}

fn said(output: &std::process::Output, part: &str) {
    assert!(text(output).contains(part), "{part:?} was not said: {}", text(output));
}

fn what_nothing_uses_goes_to_the_disk() {
    let world = World::new(ETC);
    three_checkpoints(&world, &mut Vec::new());
    let etc = world.at("etc");
    fs::write(etc.join("large"), vec![7; 20 << 20]).unwrap();
    let expected = snapshot::take(&etc);
    let before = in_ram(&world);
    let output = world.syncd(&["release"]);
    expect(&output, 0);
    said(&output, "of RAM freed; in RAM anew");
    let after = in_ram(&world);
    println!("{before} bytes in RAM before, {after} after");
    assert!(before > 20 << 20 && after < 1 << 20, "{before} bytes in RAM before, {after} after");
    assert!(is_overlay(&etc));
    snapshot::assert_same(&expected, &snapshot::take(&etc), "the view");
    snapshot::assert_same(&expected, &snapshot::take(&world.run.join("lower/etc")), "the disk");
    assert!(world.checkpoints().is_empty() && !world.store().join("merging").exists());
    expect(&world.syncd(&["status"]), 0);
    world.cut();
    snapshot::assert_same(&expected, &snapshot::take(&etc), "the disk after a cut");
    world.boot();
    snapshot::assert_same(&expected, &snapshot::take(&etc), "the next boot");
}

fn it_can_be_done_again_and_again() {
    let world = World::new(ETC);
    let etc = world.at("etc");
    fs::write(etc.join("file"), "on disk").unwrap();
    world.boot();
    for round in 0..4 {
        for name in ["file", "other", &format!("new {round}")] {
            fs::write(etc.join(name), format!("{round}")).unwrap();
        }
        let expected = snapshot::take(&etc);
        expect(&world.syncd(&["release", "/etc"]), 0);
        snapshot::assert_same(&expected, &snapshot::take(&etc), "the view");
        snapshot::assert_same(&expected, &snapshot::take(&world.run.join("lower/etc")), "the disk");
        // The cover, and the overlay on it: no more of them each time.
        assert_eq!(mounts_on(&etc).len(), 2);
        assert_eq!(mounts_on(&world.run.join("lower/etc")).len(), 1);
    }
    let utab = fs::read_to_string(world.run.join("utab")).unwrap();
    assert_eq!(utab.lines().count(), 1, "{utab}");
    let output = world.syncd(&["release"]);
    expect(&output, 0);
    said(&output, "nothing of it is in RAM");
    // By hand: the disk is the disk again.
    fs::write(etc.join("by hand"), "in RAM").unwrap();
    unmount(&etc, UnmountFlags::empty()).unwrap();
    let output = world.syncd(&["status"]);
    expect(&output, 3);
    said(&output, "its overlay is not mounted");
    expect(&world.syncd(&["merge"]), 0);
    assert!(mounts_on(&etc).is_empty());
    fs::write(etc.join("by hand"), "on disk").unwrap();
    expect(&world.syncd(&["activate", "/etc"]), 0);
    assert_eq!(fs::read_to_string(etc.join("by hand")).unwrap(), "on disk");
    // What is written from here on is saved and merged as ever.
    fs::write(etc.join("last"), "in RAM").unwrap();
    fs::remove_file(etc.join("other")).unwrap();
    let expected = snapshot::take(&etc);
    world.checkpoint();
    world.cut();
    world.boot();
    snapshot::assert_same(&expected, &snapshot::take(&etc), "the next boot");
    expect(&world.syncd(&["release", "/opt"]), 2);
    expect(&world.offline(&["release"]), 0);
}

fn what_is_deactivated_stays_on_disk() {
    let world = World::new(ETC);
    let etc = world.at("etc");
    world.boot();
    for round in ["first", "second"] {
        fs::write(etc.join("file"), vec![7; 4 << 20]).unwrap();
        let expected = snapshot::take(&etc);
        let output = world.syncd(&["deactivate"]);
        expect(&output, 0);
        said(&output, "on disk now");
        assert!(mounts_on(&etc).is_empty(), "{:?}", mounts_on(&etc));
        snapshot::assert_same(&expected, &snapshot::take(&etc), "the view");
        assert!(in_ram(&world) < 1 << 20);
        // It is the disk, and can be written to.
        fs::write(etc.join("on disk"), round).unwrap();
        assert!(world.run.join("lower/etc/on disk").exists());
        let output = world.syncd(&["deactivate"]);
        expect(&output, 0);
        said(&output, "nothing of it is in RAM");
        expect(&world.syncd(&["checkpoint"]), 0);
        expect(&world.syncd(&["activate", "/etc"]), 0);
        assert!(is_overlay(&etc));
        assert_eq!(fs::read_to_string(etc.join("on disk")).unwrap(), round);
    }
    // Somebody who reads through the cover keeps what he has, and can write.
    let child = crate::activate::user_of(&etc, "cd $1; echo ready; read line; echo 1 >in-cwd", &["sh", "-c"]);
    expect(&world.syncd(&["deactivate"]), 3);
    crate::activate::end(child);
    expect(&world.syncd(&["deactivate"]), 0);
    assert!(mounts_on(&etc).is_empty());
}

fn what_is_activated_at_login() {
    let world = World::new(&ETC.replace("overlay.dirs", "overlay.activate = 'login'\noverlay.dirs"));
    let etc = world.at("etc");
    let output = world.early_command("").output().unwrap();
    expect(&output, 3);
    said(&output, "it is activated at login");
    assert!(!is_overlay(&etc));
    for round in ["first", "second"] {
        let writer = crate::activate::user_of(&etc, "exec 3>$1/held; echo ready; read line", &["sh", "-c"]);
        let output = world.syncd(&["activate", "/etc"]);
        expect(&output, 3);
        said(&output, &format!("process {} (", writer.id()));
        crate::activate::end(writer);
        expect(&world.syncd(&["activate", "/etc"]), 0);
        assert!(is_overlay(&etc));
        fs::write(etc.join("file"), round).unwrap();
        let output = world.syncd(&["release"]);
        expect(&output, 0);
        said(&output, "on disk now");
        assert!(mounts_on(&etc).is_empty());
        assert_eq!(fs::read_to_string(etc.join("file")).unwrap(), round);
    }
    assert!(boot_state(&world).targets.iter().all(|state| state.released && state.cover.is_none()));
}
