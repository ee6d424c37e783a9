//! What `syncd status` says was written to the disk, against the disk itself: the blocks of the checkpoint, and what the
//! kernel counted for the device.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use rustix::fs::{major, minor, syncfs};

use crate::checkpoint::noise;
use crate::tools;
use crate::world::{ETC, World, expect};

pub(crate) const TESTS: &[(&str, fn())] = &[
    ("status_counts_what_reaches_the_disk", status_counts_what_reaches_the_disk),
    ("what_is_set_aside_was_written_too", what_is_set_aside_was_written_too),
];

const MIB: u64 = 1 << 20;
/// What the file system writes for itself, at the most: inodes, bitmaps, and all of that once more in its journal.
const OWN: u64 = MIB;

/// A system with `/etc` in RAM, on a disk that nothing writes to in the background.
fn running() -> World {
    let world = World::new(ETC);
    let disk = world.root.parent().unwrap();
    // ext4 clears the rest of its inode tables after it is mounted.
    tools::run("mount", &["-o", "remount,noinit_itable", disk.to_str().unwrap()]);
    world.boot();
    world
}

/// Bytes that reached the device so far (Documentation/block/stat.rst: sectors are the seventh number).
fn device(world: &World) -> u64 {
    let root = fs::File::open(&world.root).unwrap();
    syncfs(&root).unwrap();
    let device = root.metadata().unwrap().dev();
    let path = format!("/sys/dev/block/{}:{}/stat", major(device), minor(device));
    let text = fs::read_to_string(path).unwrap();
    text.split_whitespace().nth(6).unwrap().parse::<u64>().unwrap() * 512
}

/// What `status` says was written for `/etc`: in this boot, and in all.
fn said(world: &World) -> (u64, u64) {
    let output = world.syncd(&["status", "--json"]);
    let status: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let target = &status["targets"][0];
    let number = |key: &str| target[key].as_u64().unwrap_or_else(|| panic!("no {key} in {status}"));
    (number("written_in_boot_bytes"), number("written_in_all_bytes"))
}

/// Does something; returns what `status` says it wrote, and what reached the device.
fn counted(world: &World, act: impl FnOnce()) -> (u64, u64) {
    // In this order: `status` reads, and the first to read a new file changes the time of its last access.
    let (boot_before, all_before) = said(world);
    let device_before = device(world);
    act();
    let device = device(world) - device_before;
    let (boot, all) = said(world);
    // One kernel, one boot.
    assert_eq!(boot - boot_before, all - all_before);
    (all - all_before, device)
}

#[track_caller]
fn assert_close((said, device): (u64, u64), least: u64) {
    println!("said {said}, device {device}");
    assert!(said >= least, "{said} bytes are said to be written, which is less than the contents alone, {least}");
    assert!((said..=said + OWN).contains(&device), "{said} bytes are said to be written, {device} reached the device");
}

/// Expects `said` to be what the files have of the disk, whose blocks may be shorter than a page.
#[track_caller]
fn assert_blocks(said: u64, files: &[PathBuf]) {
    let blocks: u64 = files.iter().map(|path| fs::metadata(path).unwrap().blocks() * 512).sum();
    let most = blocks + files.len() as u64 * 4096;
    assert!((blocks..most).contains(&said), "{said} bytes are said to be written, the checkpoints take {blocks}");
}

fn status_counts_what_reaches_the_disk() {
    let world = running();
    assert_eq!(said(&world), (0, 0));
    fs::write(world.at("etc/noise"), noise(8 << 20)).unwrap();
    let first = counted(&world, || world.checkpoint());
    assert_close(first, 8 * MIB);
    assert_blocks(first.0, &world.checkpoints());

    assert_eq!(counted(&world, || world.checkpoint()), (0, 0), "nothing changed, and something was written");

    fs::write(world.at("etc/more"), noise(3 << 20).into_iter().map(|byte| !byte).collect::<Vec<_>>()).unwrap();
    fs::write(world.at("etc/small"), "small").unwrap();
    let delta = counted(&world, || world.checkpoint());
    assert_close(delta, 3 * MIB);
    assert_blocks(first.0 + delta.0, &world.checkpoints());

    let text = tools::text(&world.syncd(&["status"]));
    assert!(text.contains("11.0 MiB (11.0 MiB in all)"), "{text}");

    world.cut();
    assert_close(counted(&world, || world.merge()), 11 * MIB);
    assert!(world.checkpoints().is_empty());
    // Nothing of the chain is left, and the sum goes on.
    world.boot();
    let merged = said(&world);
    assert!(merged.1 >= first.0 + delta.0 + 11 * MIB, "{merged:?}");
    fs::write(world.at("etc/noise"), noise(2 << 20)).unwrap();
    assert_close(counted(&world, || world.checkpoint()), 2 * MIB);
    // A merge that changes a few pages of a long file says no more than that.
    let mut long = fs::read(world.at("etc/noise")).unwrap();
    world.cut();
    world.merge();
    world.boot();
    long[1 << 20..][..8192].fill(7);
    fs::write(world.at("etc/noise"), &long).unwrap();
    world.checkpoint();
    world.cut();
    let (said, device) = counted(&world, || world.merge());
    assert_eq!(said, 8192, "two pages");
    assert!((said..=said + OWN).contains(&device), "{said} bytes are said to be written, {device} reached the device");
}

fn what_is_set_aside_was_written_too() {
    let world = running();
    fs::write(world.at("etc/noise"), noise(1 << 20)).unwrap();
    world.checkpoint();
    let before = said(&world);
    world.cut();
    expect(&world.offline(&["merge", "--set-aside"]), 0);
    assert_eq!(said(&world), before);
    // It is known from the record alone now.
    fs::write(world.store().join("sequence"), "damaged").unwrap();
    assert_eq!(said(&world), (0, 0));
    world.boot();
    fs::write(world.at("etc/noise"), noise(1 << 20)).unwrap();
    world.checkpoint();
    assert_blocks(said(&world).1, &world.checkpoints());
}
