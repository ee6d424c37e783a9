//! `syncd merge`: what it believes, what it refuses, and who wins.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;
use std::time::UNIX_EPOCH;

use ephemeral_overlay::attributes::Handle;
use ephemeral_overlay::token::Token;
use rustix::mount::{MountFlags, mount_remount};

use crate::tools::text;
use crate::world::{Disk, ETC, Fs, World, expect};
use test_support::snapshot::{self, Snapshot};

pub(crate) const TESTS: &[(&str, fn())] = &[
    ("a_damaged_middle_of_a_chain_stops_everything", a_damaged_middle_of_a_chain_stops_everything),
    ("a_damaged_chain_can_be_set_aside", a_damaged_chain_can_be_set_aside),
    ("damaged_data_is_found_before_the_first_write", damaged_data_is_found_before_the_first_write),
    ("a_missing_checkpoint_stops_everything", a_missing_checkpoint_stops_everything),
    ("a_newer_format_is_refused", a_newer_format_is_refused),
    ("a_chain_of_another_state_of_the_disk_is_set_aside", a_chain_of_another_state_of_the_disk_is_set_aside),
    ("every_merge_renews_the_token", every_merge_renews_the_token),
    ("in_a_conflict_ram_wins_after_a_boot_through_the_hook", in_a_conflict_ram_wins_after_a_boot_through_the_hook),
    ("in_a_conflict_the_disk_wins_after_a_boot_from_it", in_a_conflict_the_disk_wins_after_a_boot_from_it),
    ("what_was_changed_in_a_half_merged_directory_is_kept", what_was_changed_in_a_half_merged_directory_is_kept),
    ("the_same_change_on_both_sides_is_no_conflict", the_same_change_on_both_sides_is_no_conflict),
    ("a_full_lower_is_refused_before_the_first_write", a_full_lower_is_refused_before_the_first_write),
    ("a_read_only_lower_changes_nothing", a_read_only_lower_changes_nothing),
    ("an_overlay_that_was_unmounted_is_merged_with_what_was_in_ram", an_overlay_that_was_unmounted_is_merged),
    ("other_links_of_a_changed_file_keep_their_content", other_links_of_a_changed_file_keep_their_content),
    ("a_file_that_only_changed_its_owner_is_not_written_again", a_file_that_only_changed_its_owner_is_not_written),
    ("a_name_like_ours_is_the_users", a_name_like_ours_is_the_users),
    ("a_directory_that_became_a_file_on_disk_is_saved", a_directory_that_became_a_file_on_disk_is_saved),
    ("what_the_disk_cannot_hold_does_not_stop_the_rest", what_the_disk_cannot_hold_does_not_stop_the_rest),
    ("a_long_symlink_does_not_stop_the_rest_on_xfs", a_long_symlink_does_not_stop_the_rest_on_xfs),
    ("room_that_the_merge_itself_makes_counts", room_that_the_merge_itself_makes_counts),
    ("damaged_records_stop_nothing", damaged_records_stop_nothing),
    ("a_target_in_ram_is_not_set_aside", a_target_in_ram_is_not_set_aside),
    ("a_tree_with_very_many_levels_is_carried", a_tree_with_very_many_levels_is_carried),
    ("setuid_and_capabilities_outlive_a_change_of_owner", setuid_and_capabilities_outlive_a_change_of_owner),
    ("holes_stay_holes", holes_stay_holes),
    ("a_mount_below_a_target_is_never_entered", a_mount_below_a_target_is_never_entered),
    ("deep_trees_are_carried", deep_trees_are_carried),
    ("one_target_alone_can_be_merged", one_target_alone_can_be_merged),
    ("two_targets_are_released_at_once", two_targets_are_released_at_once),
    ("a_superseded_checkpoint_may_be_damaged", a_superseded_checkpoint_may_be_damaged),
    ("a_prefix_that_was_accepted_is_kept_to_after_a_cut", a_prefix_that_was_accepted_is_kept_to_after_a_cut),
];

fn etc(world: &World) -> Snapshot {
    snapshot::take(&world.at("etc"))
}

/// A system that was cut after three checkpoints, and its views at each.
fn three_checkpoints() -> (World, Vec<Snapshot>) {
    let world = World::new(ETC);
    fs::write(world.at("etc/old"), "old").unwrap();
    world.boot();
    let mut views = Vec::new();
    for number in 1..=3 {
        fs::write(world.at(&format!("etc/file{number}")), format!("content {number}").repeat(2000)).unwrap();
        fs::write(world.at("etc/old"), format!("version {number}")).unwrap();
        world.checkpoint();
        views.push(etc(&world));
    }
    world.cut();
    (world, views)
}

/// Expects a refusal that changes neither the disk nor the store.
fn refuses(world: &World, args: &[&str], status: i32, words: &str) {
    let before = (etc(world), snapshot::take(&world.at("persist")));
    let output = world.offline(args);
    expect(&output, status);
    assert!(text(&output).contains(words), "{}", text(&output));
    snapshot::assert_same(&before.0, &etc(world), "the disk changed");
    snapshot::assert_same(&before.1, &snapshot::take(&world.at("persist")), "the store changed");
}

fn flip(path: &Path, at: u64) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
}

fn a_damaged_middle_of_a_chain_stops_everything() {
    let (world, views) = three_checkpoints();
    let middle = &world.checkpoints()[1];
    flip(middle, fs::metadata(middle).unwrap().len() - 100);
    refuses(&world, &["merge"], 1, "0000000002.ckpt is damaged");
    // The documented way on: what stands before it, and the rest set aside.
    let output = world.offline(&["merge", "--accept-prefix"]);
    expect(&output, 3);
    snapshot::assert_same(&views[0], &etc(&world), "not the first checkpoint");
    assert!(world.checkpoints().is_empty());
    for name in ["0000000002.ckpt", "0000000003.ckpt"] {
        assert!(world.store().join("aside/2-3").join(name).exists(), "{}", text(&output));
    }
}

fn a_damaged_chain_can_be_set_aside() {
    let (world, _) = three_checkpoints();
    let before = etc(&world);
    flip(&world.checkpoints()[0], 40);
    refuses(&world, &["merge"], 1, "is damaged");
    expect(&world.offline(&["merge", "--set-aside"]), 0);
    assert_eq!(fs::read_dir(world.store().join("aside/1-3")).unwrap().count(), 3);
    expect(&world.offline(&["merge"]), 0);
    snapshot::assert_same(&before, &etc(&world), "the disk changed");
}

fn damaged_data_is_found_before_the_first_write() {
    let (world, _) = three_checkpoints();
    // Right behind the header, where only the digest over every byte looks.
    let last = &world.checkpoints()[2];
    let header = fs::read(last).unwrap()[12];
    flip(last, 16 + u64::from(header) + 12);
    refuses(&world, &["merge"], 1, "0000000003.ckpt is damaged");
}

fn a_missing_checkpoint_stops_everything() {
    let (world, _) = three_checkpoints();
    fs::remove_file(&world.checkpoints()[1]).unwrap();
    refuses(&world, &["merge"], 1, "does not follow the checkpoint before it");
    let (world, _) = three_checkpoints();
    fs::remove_file(&world.checkpoints()[0]).unwrap();
    refuses(&world, &["merge"], 1, "the full checkpoint before it is missing");
}

fn a_newer_format_is_refused() {
    let (world, _) = three_checkpoints();
    let file = File::options().write(true).open(&world.checkpoints()[2]).unwrap();
    file.write_all_at(&99u32.to_le_bytes(), 8).unwrap();
    refuses(&world, &["merge"], 1, "has format 99");
}

fn token(world: &World) -> Option<Token> {
    let directory = File::open(world.at("etc")).unwrap();
    Token::read(&Handle::of(directory.as_fd()), &world.at("etc")).unwrap()
}

fn a_chain_of_another_state_of_the_disk_is_set_aside() {
    let (world, _) = three_checkpoints();
    // The root was rolled back, or is another system's.
    let directory = File::open(world.at("etc")).unwrap();
    Token(7).write(&Handle::of(directory.as_fd()), &world.at("etc")).unwrap();
    let before = etc(&world);
    let output = world.offline(&["merge"]);
    expect(&output, 3);
    assert!(text(&output).contains("do not belong to this state of the disk"), "{}", text(&output));
    snapshot::assert_same(&before, &etc(&world), "the disk changed");
    assert_eq!(token(&world), Some(Token(7)));
    assert_eq!(fs::read_dir(world.store().join("aside/1-3")).unwrap().count(), 3);
    // Nothing is in the way of what comes after.
    world.boot();
    fs::write(world.at("etc/next"), "x").unwrap();
    world.checkpoint();
    assert!(world.checkpoints()[0].ends_with("0000000004.ckpt"));
}

fn every_merge_renews_the_token() {
    let (world, _) = three_checkpoints();
    let before = token(&world);
    assert!(before.is_some(), "the first boot gives a token");
    world.merge();
    assert!(token(&world).is_some_and(|after| Some(after) != before));
}

/// Somebody edits the disk while a chain is pending.
fn edited_on_disk() -> (World, Vec<Snapshot>) {
    let world = World::new(ETC);
    for name in ["both", "removed on disk", "removed in ram", "only ram"] {
        fs::write(world.at("etc").join(name), "original").unwrap();
    }
    for name in ["tree/sub", "mode"] {
        fs::create_dir_all(world.at("etc").join(name)).unwrap();
    }
    fs::write(world.at("etc/tree/sub/file"), "original").unwrap();
    world.boot();
    let edit = |word: &str, removed: &str, tree: &str| {
        fs::write(world.at("etc/both"), format!("by {word}")).unwrap();
        fs::write(world.at("etc/new on both"), format!("new by {word}")).unwrap();
        fs::remove_file(world.at("etc").join(removed)).unwrap();
        fs::write(world.at("etc").join(tree), format!("by {word}")).unwrap();
    };
    edit("ram", "removed in ram", "only ram");
    fs::write(world.at("etc/removed on disk"), "by ram").unwrap();
    fs::remove_dir_all(world.at("etc/tree")).unwrap();
    fs::set_permissions(world.at("etc/mode"), fs::Permissions::from_mode(0o700)).unwrap();
    world.checkpoint();
    let in_ram = etc(&world);
    world.cut();
    edit("disk", "removed on disk", "removed in ram");
    fs::write(world.at("etc/tree/sub/file"), "by disk").unwrap();
    fs::set_permissions(world.at("etc/mode"), fs::Permissions::from_mode(0o711)).unwrap();
    let on_disk = etc(&world);
    (world, vec![in_ram, on_disk])
}

const CONFLICTS: [&str; 6] = ["both", "mode", "new on both", "removed in ram", "removed on disk", "tree"];

fn in_a_conflict_ram_wins_after_a_boot_through_the_hook() {
    let (world, views) = edited_on_disk();
    let output = world.offline(&["merge"]);
    expect(&output, 3);
    for name in CONFLICTS {
        assert!(
            text(&output).contains(&format!("/etc/{name} was changed on disk and in RAM: what was in RAM")),
            "{}",
            text(&output)
        );
    }
    assert!(!text(&output).contains("only ram"), "{}", text(&output));
    snapshot::assert_same(&views[0], &etc(&world), "the disk is not what was in RAM");
    let lost = world.store().join("conflicts/1");
    assert_eq!(fs::read(lost.join("both")).unwrap(), b"by disk");
    assert_eq!(fs::read(lost.join("new on both")).unwrap(), b"new by disk");
    assert_eq!(fs::read(lost.join("removed in ram")).unwrap(), b"by disk");
    assert_eq!(fs::read(lost.join("tree/sub/file")).unwrap(), b"by disk");
    assert!(!lost.join("removed on disk").exists());
    let status = world.offline(&["status"]);
    expect(&status, 3);
    assert!(
        text(&status).contains("conflict: /etc/both changed on disk and in RAM: kept what was in RAM"),
        "{}",
        text(&status)
    );
}

fn in_a_conflict_the_disk_wins_after_a_boot_from_it() {
    let (world, views) = edited_on_disk();
    // The system runs without the hook while the chain is pending: its own syncd notes that.
    expect(&world.syncd(&["checkpoint"]), 0);
    let output = world.offline(&["merge"]);
    expect(&output, 3);
    for name in CONFLICTS {
        assert!(
            text(&output).contains(&format!("/etc/{name} was changed on disk and in RAM: what was on disk")),
            "{}",
            text(&output)
        );
    }
    // What only RAM changed is merged all the same.
    let mut expected = views[1].clone();
    for name in ["only ram", ""] {
        expected.insert(name.into(), views[0][Path::new(name)].clone());
    }
    snapshot::assert_same(&expected, &etc(&world), "the disk is not what it was");
    let lost = world.store().join("conflicts/1");
    assert_eq!(fs::read(lost.join("both")).unwrap(), b"by ram");
    assert_eq!(fs::read(lost.join("new on both")).unwrap(), b"new by ram");
    assert_eq!(fs::read(lost.join("removed on disk")).unwrap(), b"by ram");
    assert!(world.checkpoints().is_empty());
}

/// A merge is cut, the system is used from its disk, and then the merge is done: RAM wins, because half of it stands
/// there already, but what was written in between is not lost.
fn what_was_changed_in_a_half_merged_directory_is_kept() {
    let (world, views) = three_checkpoints();
    let merge = world.offline_command(&["merge"]);
    let cut = Command::new("strace")
        .args(["-f", "-qq", "-o", "/dev/null", "-e", "inject=syncfs:signal=KILL:when=1"])
        .arg(merge.get_program())
        .args(merge.get_args())
        .output()
        .unwrap();
    assert!(!cut.status.success() && world.store().join("merging").exists(), "the merge was not cut");
    fs::write(world.at("etc/file2"), "by the system that ran from disk").unwrap();
    expect(&world.syncd(&["checkpoint"]), 0);
    expect(&world.offline(&["merge"]), 3);
    snapshot::assert_same(&views[2], &etc(&world), "the disk is not the last checkpoint");
    let kept = fs::read_to_string(world.store().join("conflicts/3/file2")).unwrap();
    assert_eq!(kept, "by the system that ran from disk");
    assert!(world.checkpoints().is_empty());
}

fn the_same_change_on_both_sides_is_no_conflict() {
    let world = World::new(ETC);
    fs::write(world.at("etc/file"), "original").unwrap();
    fs::write(world.at("etc/gone"), "original").unwrap();
    let edit = || {
        fs::write(world.at("etc/file"), "the same").unwrap();
        fs::remove_file(world.at("etc/gone")).unwrap();
    };
    world.boot();
    edit();
    world.checkpoint();
    world.cut();
    edit();
    world.merge();
    assert_eq!(fs::read(world.at("etc/file")).unwrap(), b"the same");
}

fn a_full_lower_is_refused_before_the_first_write() {
    let disk = Disk::new(Fs::Ext4, 64);
    let store = Disk::new(Fs::Ext4, 64);
    let world = World::on(disk, ETC);
    // The store has a disk of its own, so that only lower is full.
    crate::tools::run("mount", &["--bind", store.path().to_str().unwrap(), world.at("persist").to_str().unwrap()]);
    fs::write(world.at("etc/file"), "old").unwrap();
    world.boot();
    let noise: Vec<u8> = std::iter::repeat_with(|| fastrand::u8(..)).take(8 << 20).collect();
    fs::write(world.at("etc/big"), &noise).unwrap();
    fs::write(world.at("etc/file"), "new").unwrap();
    world.checkpoint();
    let expected = etc(&world);
    crate::tools::run("umount", &["-l", world.at("etc").to_str().unwrap()]);
    let filler = world.at("filler");
    let mut file = File::create(&filler).unwrap();
    let block = vec![0xaa; 1 << 20];
    while file.write_all(&block).is_ok() {}
    refuses(&world, &["merge"], 1, "make room");
    drop(file);
    fs::remove_file(filler).unwrap();
    // A child that another test is starting may hold the file for a moment longer.
    let free = || rustix::fs::statvfs(&world.root).map(|stat| stat.f_bfree * stat.f_frsize).unwrap();
    for _ in 0..500 {
        if free() > 16 << 20 {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    expect(&world.syncd(&["merge"]), 0);
    snapshot::assert_same(&expected, &etc(&world), "the disk");
    crate::tools::run("umount", &["-l", world.at("persist").to_str().unwrap()]);
}

fn a_read_only_lower_changes_nothing() {
    let disk = Disk::new(Fs::Ext4, 64);
    let path = disk.path();
    let world = World::on(disk, ETC);
    world.boot();
    fs::write(world.at("etc/file"), "new").unwrap();
    world.checkpoint();
    let expected = etc(&world);
    world.cut();
    mount_remount(&path, MountFlags::RDONLY, "").unwrap();
    refuses(&world, &["merge"], 1, "Read-only file system");
    mount_remount(&path, MountFlags::empty(), "").unwrap();
    world.merge();
    snapshot::assert_same(&expected, &etc(&world), "the disk");
}

fn an_overlay_that_was_unmounted_is_merged() {
    let world = World::new(ETC);
    world.boot();
    fs::write(world.at("etc/saved"), "1").unwrap();
    world.checkpoint();
    fs::write(world.at("etc/unsaved"), "2").unwrap();
    let expected = etc(&world);
    crate::tools::run("umount", &[world.at("etc").to_str().unwrap()]);
    expect(&world.syncd(&["merge"]), 0);
    snapshot::assert_same(&expected, &etc(&world), "the disk");
    assert!(!world.upper().exists(), "its RAM is still taken");
    // And again: there is nothing left to do, and what is on disk now is nobody's conflict.
    fs::write(world.at("etc/later"), "3").unwrap();
    expect(&world.syncd(&["merge"]), 0);
    expect(&world.syncd(&["checkpoint"]), 0);
    assert!(world.checkpoints().is_empty());
}

fn other_links_of_a_changed_file_keep_their_content() {
    let world = World::new(ETC);
    fs::write(world.at("etc/one"), "shared").unwrap();
    fs::hard_link(world.at("etc/one"), world.at("etc/two")).unwrap();
    // A partner outside of the target is nobody's business.
    fs::hard_link(world.at("etc/one"), world.at("outside")).unwrap();
    world.boot();
    fs::write(world.at("etc/one"), "changed").unwrap();
    world.checkpoint();
    world.cut();
    world.merge();
    assert_eq!(fs::read(world.at("etc/one")).unwrap(), b"changed");
    assert_eq!(fs::read(world.at("etc/two")).unwrap(), b"shared");
    assert_eq!(fs::read(world.at("outside")).unwrap(), b"shared");
}

fn a_file_that_only_changed_its_owner_is_not_written() {
    let world = World::new(ETC);
    fs::write(world.at("etc/file"), "content").unwrap();
    let before = fs::metadata(world.at("etc/file")).unwrap();
    world.boot();
    std::os::unix::fs::chown(world.at("etc/file"), Some(1000), None).unwrap();
    world.checkpoint();
    world.cut();
    world.merge();
    let after = fs::metadata(world.at("etc/file")).unwrap();
    assert_eq!((after.uid(), after.ino()), (1000, before.ino()));
}

fn a_name_like_ours_is_the_users() {
    let (world, mut views) = three_checkpoints();
    let name = ".ephemeral-overlay.tmp.0123";
    fs::write(world.at("etc").join(name), "mine").unwrap();
    fs::write(world.store().join(".tmp-abc"), "half").unwrap();
    world.merge();
    let found = etc(&world);
    views[2].insert(name.into(), found[Path::new(name)].clone());
    snapshot::assert_same(&views[2], &found, "the disk");
    assert!(!world.store().join(".tmp-abc").exists(), "in the store that name is ours");
}

fn setuid_and_capabilities_outlive_a_change_of_owner() {
    let world = World::new(ETC);
    fs::write(world.at("etc/lower"), "x").unwrap();
    world.boot();
    fs::write(world.at("etc/new"), "x").unwrap();
    for name in ["lower", "new"] {
        let path = world.at("etc").join(name);
        std::os::unix::fs::chown(&path, Some(1000), Some(1000)).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o6755)).unwrap();
        let directory = File::open(world.at("etc")).unwrap();
        // Version 2, effective: cap_net_bind_service.
        let capability = [&[1, 0, 0, 2, 0, 4, 0, 0][..], &[0; 12]].concat();
        Handle::child(directory.as_fd(), name.as_ref()).write(b"security.capability", &capability).unwrap();
    }
    let expected = etc(&world);
    world.checkpoint();
    world.cut();
    world.merge();
    snapshot::assert_same(&expected, &etc(&world), "the disk");
}

fn holes_stay_holes() {
    let world = World::new(ETC);
    world.boot();
    let file = File::create(world.at("etc/sparse")).unwrap();
    file.set_len(1 << 30).unwrap();
    file.write_all_at(b"data", 500 << 20).unwrap();
    world.checkpoint();
    assert!(fs::metadata(&world.checkpoints()[0]).unwrap().len() < 10_000);
    drop(file);
    world.cut();
    // The disk has 64 MiB.
    world.merge();
    let stat = fs::metadata(world.at("etc/sparse")).unwrap();
    assert_eq!(stat.len(), 1 << 30);
    assert!(stat.blocks() * 512 < 1 << 20, "{} blocks", stat.blocks());
    let mut bytes = [0; 6];
    File::open(world.at("etc/sparse")).unwrap().read_exact_at(&mut bytes, (500 << 20) - 1).unwrap();
    assert_eq!(&bytes, b"\0data\0");
}

fn a_mount_below_a_target_is_never_entered() {
    let world = World::new(ETC);
    fs::create_dir_all(world.at("etc/sub")).unwrap();
    fs::write(world.at("etc/sub/file"), "x").unwrap();
    world.boot();
    fs::remove_dir_all(world.at("etc/sub")).unwrap();
    world.checkpoint();
    world.cut();
    let other = Disk::new(Fs::Ext4, 16);
    fs::write(other.path().join("precious"), "x").unwrap();
    crate::tools::run("mount", &["--bind", other.path().to_str().unwrap(), world.at("etc/sub").to_str().unwrap()]);
    let output = world.offline(&["merge"]);
    expect(&output, 1);
    assert!(other.path().join("precious").exists(), "another file system was emptied");
    crate::tools::run("umount", &[world.at("etc/sub").to_str().unwrap()]);
    world.merge();
    assert!(!world.at("etc/sub").exists());
}

fn deep_trees_are_carried() {
    let world = World::new(ETC);
    world.boot();
    // Deeper than PATH_MAX in bytes: made step by step.
    let name = "d".repeat(200);
    let mut directory = File::open(world.at("etc")).unwrap();
    for _ in 0..30 {
        rustix::fs::mkdirat(&directory, &name, rustix::fs::Mode::RWXU).unwrap();
        let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::DIRECTORY;
        directory = rustix::fs::openat(&directory, &name, flags, rustix::fs::Mode::empty()).unwrap().into();
    }
    rustix::fs::symlinkat("bottom", &directory, "end").unwrap();
    drop(directory);
    world.checkpoint();
    world.cut();
    world.merge();
    let mut directory = File::open(world.at("etc")).unwrap();
    for _ in 0..30 {
        let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::DIRECTORY;
        directory = rustix::fs::openat(&directory, &name, flags, rustix::fs::Mode::empty()).unwrap().into();
    }
    assert_eq!(rustix::fs::readlinkat(&directory, "end", Vec::new()).unwrap().to_bytes(), b"bottom");
}

fn one_target_alone_can_be_merged() {
    let config = ETC.replace("['/etc']", "['/etc', '/var/log']");
    let world = World::new(&config);
    world.boot();
    fs::write(world.at("etc/file"), "x").unwrap();
    fs::write(world.at("var/log/file"), "y").unwrap();
    symlink("file", world.at("var/log/link")).unwrap();
    world.checkpoint();
    world.cut();
    expect(&world.offline(&["merge", "/var/log"]), 0);
    assert!(world.at("var/log/file").exists() && !world.at("etc/file").exists());
    assert!(fs::metadata(world.at("var/log/file")).unwrap().modified().unwrap() > UNIX_EPOCH);
    world.merge();
    assert!(world.at("etc/file").exists());
}

fn two_targets_are_released_at_once() {
    let config = ETC.replace("['/etc']", "['/etc', '/var/log']");
    let world = World::new(&config);
    world.boot();
    for name in ["etc/file", "var/log/file"] {
        fs::write(world.at(name), "x").unwrap();
    }
    for name in ["etc", "var/log"] {
        crate::tools::run("umount", &[world.at(name).to_str().unwrap()]);
    }
    expect(&world.syncd(&["merge"]), 0);
    let status = world.syncd(&["status"]);
    expect(&status, 0);
    assert!(!text(&status).contains("in RAM"), "{}", text(&status));
    assert!(world.at("etc/file").exists() && world.at("var/log/file").exists());
}

fn a_superseded_checkpoint_may_be_damaged() {
    let world = World::new(ETC);
    world.boot();
    fs::write(world.at("etc/file"), "1").unwrap();
    world.checkpoint();
    let first = world.checkpoints()[0].clone();
    // Its successor finds it damaged, and is full.
    fs::write(&first, "damaged").unwrap();
    fs::write(world.at("etc/file"), "2").unwrap();
    world.checkpoint();
    // A cut came before the superseded one was removed.
    fs::write(&first, "damaged").unwrap();
    let expected = etc(&world);
    world.cut();
    world.merge();
    snapshot::assert_same(&expected, &etc(&world), "the disk");
    assert!(!first.exists());
}

fn a_prefix_that_was_accepted_is_kept_to_after_a_cut() {
    let (world, views) = three_checkpoints();
    flip(&world.checkpoints()[2], 40);
    // Killed when the second object in lower is nearly finished.
    let command = world.offline_command(&["merge", "--accept-prefix"]);
    let output = std::process::Command::new("strace")
        .args(["-f", "-o", "/dev/null", "-e", "trace=utimensat", "-e", "inject=utimensat:signal=KILL:when=2"])
        .arg(command.get_program())
        .args(command.get_args())
        .env("RAYON_NUM_THREADS", "1")
        .output()
        .unwrap();
    assert!(!output.status.success(), "{}", text(&output));
    assert!(world.store().join("merging").exists(), "it was cut too early for this test");
    world.merge();
    snapshot::assert_same(&views[1], &etc(&world), "not the second checkpoint");
    assert!(world.store().join("aside/3-3/0000000003.ckpt").exists());
}

fn a_directory_that_became_a_file_on_disk_is_saved() {
    let world = World::new(ETC);
    fs::create_dir(world.at("etc/d")).unwrap();
    fs::write(world.at("etc/d/x"), "original").unwrap();
    world.boot();
    fs::write(world.at("etc/d/x"), "by ram").unwrap();
    world.checkpoint();
    let expected = etc(&world);
    world.cut();
    fs::remove_dir_all(world.at("etc/d")).unwrap();
    fs::write(world.at("etc/d"), "by disk").unwrap();
    expect(&world.offline(&["merge"]), 3);
    snapshot::assert_same(&expected, &etc(&world), "the disk");
    assert_eq!(fs::read(world.store().join("conflicts/1/d")).unwrap(), b"by disk");
}

/// Merges a chain of which some objects cannot be on the disk.
fn all_but_the_impossible(world: &World, impossible: &[&str]) {
    fs::write(world.at("etc/a possible"), "x").unwrap();
    fs::write(world.at("etc/z possible"), "x").unwrap();
    world.checkpoint();
    world.cut();
    let output = world.offline(&["merge"]);
    expect(&output, 3);
    for name in impossible {
        assert!(text(&output).contains(&format!("/etc/{name} cannot be on this disk")), "{}", text(&output));
        assert!(fs::symlink_metadata(world.at("etc").join(name)).is_err());
    }
    for name in ["a possible", "z possible"] {
        assert!(world.at("etc").join(name).exists());
    }
    // It is lost nowhere, and in nobody's way.
    assert!(world.store().join("aside/1-1/0000000001.ckpt").exists());
    world.merge();
    assert!(world.checkpoints().is_empty() && !world.store().join("merging").exists());
}

fn what_the_disk_cannot_hold_does_not_stop_the_rest() {
    let world = World::new(ETC);
    world.boot();
    // An exabyte of hole: nobody may read it byte by byte.
    File::create(world.at("etc/huge")).unwrap().set_len(1 << 60).unwrap();
    fs::hard_link(world.at("etc/huge"), world.at("etc/huge.link")).unwrap();
    fs::write(world.at("etc/attribute"), "x").unwrap();
    let directory = File::open(world.at("etc")).unwrap();
    Handle::child(directory.as_fd(), "attribute".as_ref()).write(b"trusted.large", &[7; 8000]).unwrap();
    drop(directory);
    all_but_the_impossible(&world, &["huge", "huge.link", "attribute"]);
}

fn a_long_symlink_does_not_stop_the_rest_on_xfs() {
    let world = World::on(Disk::new(Fs::Xfs, 512), ETC);
    world.boot();
    symlink("s".repeat(2000), world.at("etc/link")).unwrap();
    all_but_the_impossible(&world, &["link"]);
}

fn room_that_the_merge_itself_makes_counts() {
    let world = World::new(ETC);
    let noise: Vec<u8> = std::iter::repeat_with(|| fastrand::u8(..)).take(20 << 20).collect();
    fs::create_dir(world.at("etc/z")).unwrap();
    fs::write(world.at("etc/z/removed"), &noise).unwrap();
    fs::write(world.at("etc/owner"), &noise[..10 << 20]).unwrap();
    world.boot();
    fs::remove_dir_all(world.at("etc/z")).unwrap();
    std::os::unix::fs::chown(world.at("etc/owner"), Some(7), None).unwrap();
    // It compresses to nothing: the store shares the disk.
    fs::write(world.at("etc/a"), vec![b'a'; 15 << 20]).unwrap();
    let expected = etc(&world);
    world.checkpoint();
    world.cut();
    let mut filler = File::create(world.at("filler")).unwrap();
    let block = vec![0xaa; 1 << 20];
    let free = |world: &World| rustix::fs::statvfs(&world.root).map(|stat| stat.f_bfree * stat.f_frsize).unwrap();
    while free(&world) > 8 << 20 && filler.write_all(&block).is_ok() {}
    world.merge();
    snapshot::assert_same(&expected, &etc(&world), "the disk");
}

fn damaged_records_stop_nothing() {
    let (world, views) = three_checkpoints();
    fs::write(world.store().join("merging"), "damaged").unwrap();
    fs::write(world.store().join("sequence"), "damaged").unwrap();
    world.merge();
    snapshot::assert_same(&views[2], &etc(&world), "the disk");
    fs::write(world.store().join("sequence"), "damaged").unwrap();
    world.boot();
    fs::write(world.at("etc/next"), "x").unwrap();
    world.checkpoint();
    assert_eq!(world.checkpoints().len(), 1);
}

fn a_target_in_ram_is_not_set_aside() {
    let world = World::new(ETC);
    world.boot();
    fs::write(world.at("etc/file"), "x").unwrap();
    world.checkpoint();
    let output = world.syncd(&["merge", "--set-aside"]);
    expect(&output, 3);
    assert!(text(&output).contains("it is in RAM"), "{}", text(&output));
    assert_eq!(world.checkpoints().len(), 1);
}

fn a_tree_with_very_many_levels_is_carried() {
    let world = World::new(ETC);
    // More levels than a process may have open files by default.
    let deep: std::path::PathBuf = std::iter::repeat_n("d", 1500).collect();
    fs::create_dir_all(world.at("etc/old").join(&deep)).unwrap();
    world.boot();
    fs::create_dir_all(world.at("etc/new").join(&deep)).unwrap();
    fs::write(world.at("etc/new").join(&deep).join("file"), "x").unwrap();
    fs::remove_dir_all(world.at("etc/old")).unwrap();
    world.checkpoint();
    world.cut();
    world.merge();
    assert!(world.at("etc/new").join(&deep).join("file").exists() && !world.at("etc/old").exists());
}
