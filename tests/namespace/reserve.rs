//! The reserve of the store: a full disk does not cost what is in RAM at the end of a shutdown.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use rustix::fs::{statvfs, syncfs};
use rustix::mount::{UnmountFlags, unmount};

use crate::checkpoint::noise;
use crate::tools::{self, code, text};
use crate::world::{Disk, ETC, Fs, World, expect};
use test_support::snapshot::{self, Snapshot};

pub(crate) const TESTS: &[(&str, fn())] = &[
    ("the_last_stage_saves_on_a_full_ext4", || a_full_disk_costs_nothing(Fs::Ext4, "last-stage")),
    ("the_last_stage_saves_on_a_full_btrfs", || a_full_disk_costs_nothing(Fs::Btrfs, "last-stage")),
    ("the_last_stage_saves_on_a_full_xfs", || a_full_disk_costs_nothing(Fs::Xfs, "last-stage")),
    ("a_merge_saves_what_was_in_ram_on_a_full_disk", || a_full_disk_costs_nothing(Fs::Ext4, "merge")),
    ("a_disk_without_inodes_costs_nothing", a_disk_without_inodes_costs_nothing),
    ("no_merge_takes_the_room_of_another_targets_checkpoint", no_merge_takes_the_room_of_another),
    ("what_does_not_fit_into_the_reserve_fails", what_does_not_fit_into_the_reserve_fails),
    ("an_idle_checkpoint_leaves_the_reserve_alone", an_idle_checkpoint_leaves_the_reserve_alone),
    ("it_grows_with_what_is_in_ram", it_grows_with_what_is_in_ram),
    ("a_nearly_full_disk_gets_none", a_nearly_full_disk_gets_none),
];

/// The smallest reserve.
const MIN: u64 = 4 << 20;
const TWO: [&str; 2] = ["etc", "var/log"];

fn reserve(world: &World) -> PathBuf {
    world.at("persist/ephemeral-overlay/reserve")
}

/// What of the disk the reserve takes; 0 where there is none.
fn reserved(world: &World) -> u64 {
    fs::metadata(reserve(world)).map_or(0, |file| file.blocks() * 512)
}

/// A running system on a disk of its own, with a checkpoint and so a reserve.
fn running(fs: Fs) -> World {
    let megabytes = match fs {
        Fs::Ext4 => 64,
        Fs::Btrfs => 256,
        Fs::Xfs => 320,
    };
    let world = World::on(Disk::new(fs, megabytes), &ETC.replace("['/etc']", "['/etc', '/var/log']"));
    fs::write(world.at("etc/old"), "old").unwrap();
    world.boot();
    fs::write(world.at("etc/file"), "saved").unwrap();
    fs::write(world.at("var/log/log"), "line\n").unwrap();
    world.checkpoint();
    let file = fs::metadata(reserve(&world)).unwrap();
    assert_eq!((file.len(), file.mode() & 0o7777), (MIN, 0o600));
    assert!(reserved(&world) >= MIN, "only {} bytes are allocated", reserved(&world));
    world
}

/// Fills the disk to the last block, but for `free` bytes.
pub(crate) fn fill(world: &World, free: u64) {
    let mut file = File::create(world.at("filler")).unwrap();
    let block = vec![0xaa; 1 << 20];
    // What was set aside for a write that came to less is there again after a sync.
    for _ in 0..3 {
        for length in [block.len(), 4096, 1] {
            while file.write_all(&block[..length]).is_ok() {}
        }
        syncfs(&file).unwrap();
    }
    let length = file.metadata().unwrap().len();
    file.set_len(length - free).unwrap();
    syncfs(&file).unwrap();
}

fn unmount_targets(world: &World) {
    for target in TWO {
        unmount(world.at(target), UnmountFlags::empty()).unwrap();
    }
}

fn views(world: &World) -> [Snapshot; 2] {
    TWO.map(|target| snapshot::take(&world.at(target)))
}

fn assert_views(world: &World, expected: &[Snapshot; 2], what: &str) {
    for (target, expected) in TWO.iter().zip(expected) {
        snapshot::assert_same(expected, &snapshot::take(&world.at(target)), &format!("{target} {what}"));
    }
}

/// The power goes, and the machine boots on the full disk: it shows what was in RAM. With room, all goes on as ever.
fn assert_saved(world: &World, expected: &[Snapshot; 2]) {
    world.cut();
    let boot = world.early_command("").output().unwrap();
    assert_views(world, expected, &format!("after the next boot\n{}", text(&boot)));
    assert_eq!(code(&boot), 3, "{}", text(&boot));
    tools::run("rm", &["-r", world.at("filler").to_str().unwrap()]);
    fs::write(world.at("etc/later"), "later").unwrap();
    world.checkpoint();
    assert!(reserved(world) >= MIN, "the reserve did not come back");
    let expected = views(world);
    world.cut();
    world.merge();
    assert_views(world, &expected, "on disk");
}

fn a_full_disk_costs_nothing(fs: Fs, command: &str) {
    let world = running(fs);
    fs::write(world.at("etc/big"), noise(3 << 20)).unwrap();
    fs::write(world.at("etc/file"), "not saved yet").unwrap();
    fs::remove_file(world.at("etc/old")).unwrap();
    fs::write(world.at("var/log/log"), "line\nlast words\n").unwrap();
    let expected = views(&world);
    fill(&world, 0);
    // What can be done again later is not given the reserve.
    let output = world.syncd(&["checkpoint", "/etc"]);
    expect(&output, 1);
    assert!(text(&output).contains("No space left"), "{}", text(&output));
    assert!(reserved(&world) >= MIN, "an ordinary checkpoint took the reserve");

    unmount_targets(&world);
    let output = world.syncd(&[command]);
    // There is no room for a merge.
    expect(&output, 1);
    let words = text(&output);
    assert!(words.contains("the last checkpoint is given the reserve") && !words.contains(".ckpt"), "{words}");
    assert!(!reserve(&world).exists(), "{words}");
    assert_saved(&world, &expected);
}

fn a_disk_without_inodes_costs_nothing() {
    let world = running(Fs::Ext4);
    fs::write(world.at("etc/new"), "not saved yet").unwrap();
    let expected = views(&world);
    fs::create_dir(world.at("filler")).unwrap();
    let made = (0..100_000).take_while(|number| File::create(world.at(&format!("filler/{number}"))).is_ok()).count();
    assert!((1000..100_000).contains(&made), "{made} files");
    expect(&world.syncd(&["checkpoint"]), 1);
    unmount_targets(&world);
    let output = world.syncd(&["last-stage"]);
    expect(&output, 1);
    assert!(text(&output).contains("the last checkpoint is given the reserve"), "{}", text(&output));
    assert_saved(&world, &expected);
}

fn no_merge_takes_the_room_of_another() {
    let world = running(Fs::Ext4);
    // Next to nothing in a checkpoint, and three quarters of the reserve on disk.
    fs::write(world.at("etc/big"), vec![b'a'; 3 << 20]).unwrap();
    fs::write(world.at("var/log/noise"), noise(5 << 19)).unwrap();
    let expected = views(&world);
    fill(&world, 0);
    unmount_targets(&world);
    let output = world.syncd(&["last-stage"]);
    expect(&output, 1);
    assert!(!text(&output).contains(".ckpt"), "{}", text(&output));
    assert_saved(&world, &expected);
}

fn what_does_not_fit_into_the_reserve_fails() {
    let world = running(Fs::Ext4);
    let before = views(&world);
    fs::write(world.at("etc/big"), noise(6 << 20)).unwrap();
    fill(&world, 0);
    unmount_targets(&world);
    let output = world.syncd(&["last-stage"]);
    expect(&output, 1);
    assert!(text(&output).contains("No space left"), "{}", text(&output));
    world.cut();
    fs::remove_file(world.at("filler")).unwrap();
    world.merge();
    assert_views(&world, &before, "is not the checkpoint before");
}

/// Every object of the store, with everything that a write would change.
fn stamps(world: &World) -> Vec<(PathBuf, u64, u64, (i64, i64))> {
    let store = world.at("persist/ephemeral-overlay");
    let stamp = |path: PathBuf| {
        let stat = fs::symlink_metadata(store.join(&path)).unwrap();
        (path, stat.ino(), stat.blocks(), (stat.ctime(), stat.ctime_nsec()))
    };
    snapshot::take(&store).into_keys().map(stamp).collect()
}

fn an_idle_checkpoint_leaves_the_reserve_alone() {
    let world = running(Fs::Ext4);
    let before = stamps(&world);
    for _ in 0..2 {
        expect(&world.syncd(&["checkpoint"]), 0);
    }
    assert_eq!(before, stamps(&world), "something was written");
    // Neither does one that is too small come to that.
    fs::remove_file(reserve(&world)).unwrap();
    let before = stamps(&world);
    expect(&world.syncd(&["checkpoint"]), 0);
    assert_eq!(before, stamps(&world), "something was written");
    // A small change changes nothing of a reserve that is large enough.
    fs::write(world.at("etc/file"), "1").unwrap();
    world.checkpoint();
    let inode = fs::metadata(reserve(&world)).unwrap().ino();
    fs::write(world.at("etc/file"), "2").unwrap();
    world.checkpoint();
    assert_eq!(fs::metadata(reserve(&world)).unwrap().ino(), inode, "it was made anew");
}

fn it_grows_with_what_is_in_ram() {
    let world = running(Fs::Ext4);
    fs::write(world.at("etc/big"), vec![b'a'; 5 << 20]).unwrap();
    world.checkpoint();
    assert_eq!(fs::metadata(reserve(&world)).unwrap().len(), 2 * MIN);
    // There is no room for the 32 MiB that this would take, and half of that would not leave as much to others.
    fs::write(world.at("etc/big"), vec![b'a'; 17 << 20]).unwrap();
    fill(&world, 16 << 20);
    world.checkpoint();
    assert_eq!(fs::metadata(reserve(&world)).unwrap().len(), 2 * MIN);
    fs::remove_file(world.at("etc/big")).unwrap();
    world.checkpoint();
    assert_eq!(fs::metadata(reserve(&world)).unwrap().len(), 2 * MIN, "it never shrinks");
}

fn a_nearly_full_disk_gets_none() {
    let world = World::new(ETC);
    world.boot();
    fill(&world, 0);
    // Blocks that are for root alone are nothing that others could be left with.
    let filler = File::options().write(true).open(world.at("filler")).unwrap();
    let free = || statvfs(&world.root).map(|stat| stat.f_bavail * stat.f_frsize).unwrap();
    while free() < 2 * MIN - (1 << 20) {
        filler.set_len(filler.metadata().unwrap().len() - (1 << 19)).unwrap();
        syncfs(&filler).unwrap();
    }
    fs::write(world.at("etc/file"), "saved").unwrap();
    let output = world.syncd(&["checkpoint"]);
    expect(&output, 0);
    assert_eq!(world.checkpoints().len(), 1);
    assert!(!reserve(&world).exists(), "it takes more than it leaves");
    assert!(free() > MIN, "what was left is gone");
    // With a little more there is one.
    filler.set_len(filler.metadata().unwrap().len() - MIN).unwrap();
    syncfs(&filler).unwrap();
    fs::write(world.at("etc/file"), "saved again").unwrap();
    world.checkpoint();
    assert!(reserved(&world) >= MIN && free() >= MIN);
}
