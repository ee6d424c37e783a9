//! The end of a shutdown: the overlays are unmounted, the root is read-only, our tmpfs is still there.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use ephemeral_overlay::mountinfo;
use rustix::fs::{StatVfsMountFlags, statvfs};
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_remount, unmount};

use crate::tools::{is_overlay, mounts_on, text};
use crate::world::{Disk, ETC, Fs, World, expect};
use test_support::snapshot;

pub(crate) const TESTS: &[(&str, fn())] = &[
    ("the_last_stage_leaves_the_disk_whole_and_nothing_pending", the_last_stage_leaves_the_disk_whole),
    ("a_survivor_is_left_pending_with_all_that_it_wrote", a_survivor_is_left_pending_with_all_that_it_wrote),
    ("the_last_stage_unmounts_what_no_init_has", the_last_stage_unmounts_what_no_init_has),
    ("what_an_init_unmounted_is_found_again", what_an_init_unmounted_is_found_again),
    ("an_empty_directory_is_not_taken_for_the_disk", an_empty_directory_is_not_taken_for_the_disk),
    ("the_last_stage_has_nothing_to_do_without_the_hook", the_last_stage_has_nothing_to_do_without_the_hook),
];

fn running() -> (World, std::path::PathBuf) {
    let disk = Disk::new(Fs::Ext4, 64);
    let path = disk.path();
    let world = World::on(disk, &ETC.replace("['/etc']", "['/etc', '/var/log']"));
    fs::write(world.at("etc/old"), "old").unwrap();
    world.boot();
    fs::write(world.at("etc/new"), "new").unwrap();
    fs::remove_file(world.at("etc/old")).unwrap();
    fs::write(world.at("var/log/log"), "line\n").unwrap();
    (world, path)
}

fn is_read_only(path: &Path) -> bool {
    statvfs(path).unwrap().f_flag.contains(StatVfsMountFlags::RDONLY)
}

fn mounts_below(path: &Path) -> usize {
    let mounts = mountinfo::parse(&fs::read("/proc/self/mountinfo").unwrap());
    mounts.iter().filter(|mount| mount.mount_point.starts_with(path)).count()
}

fn the_last_stage_leaves_the_disk_whole() {
    let (world, disk) = running();
    world.checkpoint();
    // After the unit's checkpoint: what only the final kill ended.
    fs::OpenOptions::new().append(true).open(world.at("var/log/log")).unwrap().write_all(b"last words\n").unwrap();
    let expected = (snapshot::take(&world.at("etc")), snapshot::take(&world.at("var/log")));
    for target in ["etc", "var/log"] {
        unmount(world.at(target), UnmountFlags::empty()).unwrap();
    }
    mount_remount(&disk, MountFlags::RDONLY, c"").unwrap();
    expect(&world.syncd(&["last-stage"]), 0);
    snapshot::assert_same(&expected.0, &snapshot::take(&world.at("etc")), "/etc");
    snapshot::assert_same(&expected.1, &snapshot::take(&world.at("var/log")), "/var/log");
    assert!(world.checkpoints().is_empty());
    assert!(is_read_only(&disk), "the root is left writable");
    assert_eq!(mounts_below(&world.run), 0, "our mounts would keep the disk busy");
    // And so the disk can be let go.
    unmount(&disk, UnmountFlags::empty()).unwrap();
}

fn a_survivor_is_left_pending_with_all_that_it_wrote() {
    let (world, disk) = running();
    let mut survivor = File::options().append(true).open(world.at("var/log/log")).unwrap();
    for target in ["etc", "var/log"] {
        unmount(world.at(target), UnmountFlags::DETACH).unwrap();
    }
    survivor.write_all(b"still here\n").unwrap();
    let output = world.syncd(&["last-stage"]);
    expect(&output, 3);
    assert!(text(&output).contains("/var/log: left pending for the next boot"), "{}", text(&output));
    assert!(!world.at("var/log/log").exists(), "lower was written under a living overlay");
    assert!(world.at("etc/new").exists(), "the other target was not merged");
    drop(survivor);
    world.cut();
    assert!(!is_read_only(&disk));
    world.merge();
    assert_eq!(fs::read(world.at("var/log/log")).unwrap(), b"line\nstill here\n");
}

/// `/var/log` is unmounted with what is mounted in it; `/etc` is in use, and stays.
fn the_last_stage_unmounts_what_no_init_has() {
    let (world, _) = running();
    fs::create_dir(world.at("var/log/inner")).unwrap();
    mount("tmpfs", world.at("var/log/inner"), "tmpfs", MountFlags::empty(), None).unwrap();
    let user = File::open(world.at("etc/new")).unwrap();
    let output = world.syncd(&["last-stage"]);
    expect(&output, 3);
    assert!(text(&output).contains("/etc: left pending for the next boot"), "{}", text(&output));
    assert!(is_overlay(&world.at("etc")) && !is_overlay(&world.at("var/log")), "{}", text(&output));
    assert_eq!(fs::read(world.at("var/log/log")).unwrap(), b"line\n");
    drop(user);
    world.cut();
    world.merge();
    assert_eq!(fs::read(world.at("etc/new")).unwrap(), b"new");
    assert!(!world.at("etc/old").exists());
}

/// Everything but the tmpfs is unmounted, as `umount -a` does where it is told nothing of us.
fn what_an_init_unmounted_is_found_again() {
    let (world, _) = running();
    world.checkpoint();
    fs::write(world.at("etc/last"), "last").unwrap();
    for target in ["etc", "var/log"] {
        while !mounts_on(&world.at(target)).is_empty() {
            unmount(world.at(target), UnmountFlags::empty()).unwrap();
        }
    }
    for bind in ["lower/etc", "lower/var-log", "store"] {
        unmount(world.run.join(bind), UnmountFlags::empty()).unwrap();
    }
    expect(&world.syncd(&["last-stage"]), 0);
    assert!(world.checkpoints().is_empty());
    for (path, contents) in [("etc/new", "new"), ("etc/last", "last"), ("var/log/log", "line\n")] {
        assert_eq!(fs::read_to_string(world.at(path)).unwrap(), contents, "{path}");
    }
    assert!(!world.at("etc/old").exists());
    assert_eq!(mounts_below(&world.run), 0, "our mounts would keep the disk busy");
}

/// What stands below a bind that somebody unmounted is empty: it would have everything deleted.
fn an_empty_directory_is_not_taken_for_the_disk() {
    let (world, _) = running();
    world.checkpoint();
    let before = world.checkpoints();
    fs::write(world.at("etc/last"), "last").unwrap();
    let user = File::open(world.at("etc/new")).unwrap();
    unmount(world.run.join("lower/etc"), UnmountFlags::empty()).unwrap();
    for command in ["checkpoint", "last-stage"] {
        let output = world.syncd(&[command]);
        expect(&output, 1);
        assert!(text(&output).contains("somebody unmounted the bind"), "{}", text(&output));
    }
    assert_eq!(world.checkpoints(), before, "the chain was touched");
    drop(user);
    // The overlay can be unmounted now, and the directory on disk be found below it.
    expect(&world.syncd(&["last-stage"]), 0);
    assert_eq!(fs::read(world.at("etc/last")).unwrap(), b"last");
    assert!(!world.at("etc/old").exists());
}

fn the_last_stage_has_nothing_to_do_without_the_hook() {
    let world = World::new(ETC);
    expect(&world.syncd(&["last-stage"]), 0);
    assert!(!world.at("persist/ephemeral-overlay").exists());
}
