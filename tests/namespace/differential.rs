//! Random histories against what the kernel itself showed: after a cut and a merge the disk is the merged view of the
//! last checkpoint, in everything that can be seen.
//!
//! `DIFFERENTIAL_SEEDS=N` sets the number of seeds for each file system, `DIFFERENTIAL_FIRST=N` the first one.

use std::fs;
use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use ephemeral_overlay::overlay;
use rustix::fs::CWD;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, UnmountFlags, fsconfig_create, fsconfig_set_string,
    fsmount, fsopen, move_mount, unmount,
};

use crate::tools;
use crate::world::{Disk, ETC, Fs, World, expect};
use test_support::model::Model;
use test_support::snapshot::{self, Snapshot};

pub(crate) const TESTS: &[(&str, fn())] = &[
    ("random_histories_on_ext4", || run(Fs::Ext4)),
    ("random_histories_on_btrfs", || run(Fs::Btrfs)),
    ("random_histories_on_xfs", || run(Fs::Xfs)),
];

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

fn run(fs: Fs) {
    let first = number("DIFFERENTIAL_FIRST", 0);
    let disk = Disk::new(fs, 512);
    for seed in first..first + number("DIFFERENTIAL_SEEDS", 70) {
        let result = catch_unwind(AssertUnwindSafe(|| history(&disk, seed)));
        if let Err(panic) = result {
            eprintln!("seed {seed} on {fs:?}: DIFFERENTIAL_FIRST={seed} DIFFERENTIAL_SEEDS=1 runs it alone");
            resume_unwind(panic);
        }
    }
}

/// One life of a system.
fn history(disk: &Disk, seed: u64) {
    let world = World::within(disk, &format!("seed{seed}"), ETC);
    let etc = world.at("etc");
    let mut model = Model::new(&etc, seed);
    model.populate();
    world.boot();
    model.mounted = true;
    let mut expected = snapshot::take(&etc);
    for _ in 0..=model.below(5) {
        for _ in 0..model.below(30) {
            model.step();
        }
        world.checkpoint();
        expected = snapshot::take(&etc);
    }
    for _ in 0..model.below(10) {
        // Lost with the power.
        model.step();
    }
    world.cut();
    if seed.is_multiple_of(4) {
        unpacked_is(&world, &expected);
    }
    world.merge();
    snapshot::assert_same(&expected, &snapshot::take(&etc), "the disk is not the last checkpoint");
    assert!(world.checkpoints().is_empty(), "the chain is still there");
    drop(world);
    fs::remove_dir_all(disk.path().join(format!("seed{seed}"))).unwrap();
}

/// Where a merge is impossible, the chain in an upper directory gives the same view.
pub(crate) fn unpacked_is(world: &World, expected: &Snapshot) {
    snapshot::assert_same(expected, &unpacked(world), "the unpacked chain is not the last checkpoint");
}

/// What a boot shows that cannot merge.
pub(crate) fn unpacked(world: &World) -> Snapshot {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    for name in ["upper", "work", "view"] {
        fs::create_dir(at(name)).unwrap();
    }
    // An upper directory that can hold everything, as the one in the run directory can.
    mount("tmpfs", &[], directory.path().to_str().unwrap());
    for name in ["upper", "work", "view"] {
        fs::create_dir(at(name)).unwrap();
    }
    // As `early` does.
    let reference = format!("--reference={}", world.at("etc").display());
    for program in ["chown", "chmod", "touch"] {
        tools::run(program, &[&reference, &at("upper")]);
    }
    expect(&world.offline(&["unpack", "/etc", "--upper", &at("upper")]), 0);
    let lower = world.at("etc").to_str().unwrap().to_owned();
    let mut options = vec![("lowerdir", lower), ("upperdir", at("upper")), ("workdir", at("work"))];
    options.extend(overlay::OPTIONS.map(|(key, value)| (key, value.to_owned())));
    mount("overlay", &options, &at("view"));
    let found = snapshot::take(at("view").as_ref());
    // Lazily: another test's child may hold our descriptors for a moment, between its fork and its exec.
    unmount(at("view"), UnmountFlags::DETACH).unwrap();
    unmount(directory.path(), UnmountFlags::DETACH).unwrap();
    found
}

fn mount(kind: &str, options: &[(&str, String)], at: &str) {
    let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC).unwrap();
    for (key, value) in options {
        fsconfig_set_string(context.as_fd(), *key, value.as_str()).unwrap();
    }
    fsconfig_create(context.as_fd()).unwrap();
    let mount = fsmount(context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty()).unwrap();
    move_mount(mount, "", CWD, at, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH).unwrap();
}
