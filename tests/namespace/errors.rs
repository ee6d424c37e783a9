//! Every call that changes something fails, once or for good: the command says so, with the call and its path, and
//! nothing is lost. The next run, without errors, ends as if there had been none.
//!
//! A choice of the points is tried. `ERRORS=full` tries all of them; `ERRORS_AT=fsync` only those of one call.

mod injection;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::checkpoint::noise;
use crate::differential;
use crate::sweep::{copy, one_more_change, three_checkpoints};
use crate::tools::text;
use crate::world::{ETC, World, expect};
use injection::{Case, Verdict, sweep};
use test_support::snapshot::{self, Snapshot};

pub(crate) const TESTS: &[(&str, fn())] = &[
    ("a_merge_that_fails_is_done_by_the_next", a_merge),
    ("a_merge_with_conflicts_that_fails_is_done_by_the_next", || a_merge_with_conflicts(false)),
    ("a_merge_in_which_the_disk_wins_that_fails_is_done_by_the_next", || a_merge_with_conflicts(true)),
    ("a_merge_of_what_no_disk_holds_that_fails_loses_nothing", a_merge_of_the_impossible),
    ("a_checkpoint_that_fails_leaves_the_old_chain_or_the_new", a_checkpoint),
    ("a_first_checkpoint_that_fails_is_taken_by_the_next", a_first_checkpoint),
    ("a_full_checkpoint_that_fails_leaves_the_old_chain_or_the_new", a_full_checkpoint),
];

/// The parts of a disk that a merge changes.
const PARTS: [&str; 2] = ["etc", "persist"];

/// Every name in the store, with the contents of what is nowhere else. Whether there is a reserve is left open.
type Store = BTreeMap<PathBuf, Vec<u8>>;

fn store(world: &World) -> Store {
    let store = world.at("persist/ephemeral-overlay");
    let content = |path: &Path| {
        let is_nowhere_else = ["conflicts", "aside"].iter().any(|part| path.iter().any(|name| name == *part));
        let is_file = fs::symlink_metadata(store.join(path)).unwrap().is_file();
        if is_file && is_nowhere_else { fs::read(store.join(path)).unwrap() } else { Vec::new() }
    };
    let paths = snapshot::take(&store).into_keys().filter(|path| path != Path::new("reserve"));
    paths.map(|path| (path.clone(), content(&path))).collect()
}

fn assert_store(world: &World, expected: &Store) {
    let found = store(world);
    let names = |store: &Store| store.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(expected), names(&found), "the names in the store");
    assert!(*expected == found, "what was kept in the store is not what it was");
}

/// Sweeps over a merge of this disk, which ends with `usual`. Until it is done, a boot shows `view`, if one is given.
fn sweep_merge(name: &str, world: &World, usual: i32, view: Option<&Snapshot>) {
    let (etc, saved) = (world.at("etc"), |part: &str| world.at(&format!("saved {part}")));
    for part in PARTS {
        copy(&world.at(part), &saved(part));
    }
    expect(&world.offline(&["merge"]), usual);
    let (tree, kept) = (snapshot::take(&etc), store(world));
    let check = |verdict: &Verdict| {
        match verdict {
            Verdict::Done => {}
            Verdict::Partly(words) => return assert_rest(world, &tree, words),
            Verdict::Failed => {
                if let Some(view) = view {
                    // The next boot can show what it must, even if it cannot finish.
                    let shown = differential::unpacked(world);
                    let is_done = snapshot::difference(&tree, &shown).is_none();
                    if is_done && snapshot::difference(view, &tree).is_some() {
                        assert_aside(world);
                    } else {
                        snapshot::assert_same(view, &shown, "what a boot shows that cannot merge");
                    }
                }
                let output = world.offline(&["merge"]);
                assert!([Some(0), Some(usual)].contains(&output.status.code()), "{}", text(&output));
            }
        }
        snapshot::assert_same(&tree, &snapshot::take(&etc), "the disk");
        assert_store(world, &kept);
    };
    sweep(&Case {
        name,
        lower: &etc,
        command: &world.offline_command(&["merge"]),
        usual,
        prepare: &|| PARTS.iter().for_each(|part| copy(&saved(part), &world.at(part))),
        check: &check,
    });
}

/// What a disk is said to be unable to hold is in checkpoints that were set aside, and all the rest is on the disk.
fn assert_rest(world: &World, tree: &Snapshot, words: &str) {
    let is_said =
        |path: &Path| words.contains(&format!("{} cannot be on this disk", Path::new("/etc").join(path).display()));
    let rest = |tree: Snapshot| tree.into_iter().filter(|(path, _)| !is_said(path)).collect::<Snapshot>();
    snapshot::assert_same(&rest(tree.clone()), &rest(snapshot::take(&world.at("etc"))), "the rest");
    assert_aside(world);
}

/// All checkpoints are where somebody can look at them.
fn assert_aside(world: &World) {
    let checkpoints = |store: &Path| -> BTreeMap<_, _> {
        let paths =
            snapshot::take(store).into_keys().filter(|path| path.extension().is_some_and(|name| name == "ckpt"));
        paths.map(|path| (path.file_name().unwrap().to_owned(), fs::read(store.join(path)).unwrap())).collect()
    };
    let saved = checkpoints(&world.at("saved persist"));
    assert!(saved == checkpoints(&world.store().join("aside")), "the checkpoints are not aside");
}

fn a_merge() {
    let world = World::new(ETC);
    let mut views = Vec::new();
    three_checkpoints(&world, &mut views);
    world.cut();
    sweep_merge("merge", &world, 0, Some(&views[2]));
}

/// Somebody changed on disk what was changed in RAM.
fn a_merge_with_conflicts(from_disk: bool) {
    let world = World::new(ETC);
    let etc = world.at("etc");
    for name in ["both", "deleted in RAM", "dir/file", "dir/deleted/file", "owned/file", "left"] {
        fs::create_dir_all(etc.join(name).parent().unwrap()).unwrap();
        fs::write(etc.join(name), "lower").unwrap();
    }
    world.boot();
    for name in ["both", "dir/file", "dir/new", "only in RAM"] {
        fs::write(etc.join(name), "by RAM").unwrap();
    }
    std::os::unix::fs::chown(etc.join("owned"), Some(1000), Some(1000)).unwrap();
    fs::remove_file(etc.join("deleted in RAM")).unwrap();
    fs::remove_dir_all(etc.join("dir/deleted")).unwrap();
    world.checkpoint();
    let view = snapshot::take(&etc);
    world.cut();
    if from_disk {
        // A boot without the hook.
        fs::create_dir_all(&world.run).unwrap();
        world.syncd(&["checkpoint"]);
        assert!(world.store().join("disk-boot").exists());
    }
    for name in ["both", "deleted in RAM", "dir/deleted/file", "dir/new", "left"] {
        fs::write(etc.join(name), "by disk").unwrap();
    }
    std::os::unix::fs::chown(etc.join("owned"), Some(2000), Some(2000)).unwrap();
    // What somebody made on disk since, where RAM has nothing, shows through.
    let mut view = view;
    view.insert("left".into(), snapshot::take(&etc)[Path::new("left")].clone());
    let name = if from_disk { "merge, the disk wins" } else { "merge, RAM wins" };
    sweep_merge(name, &world, 3, Some(&view).filter(|_| !from_disk));
}

fn a_merge_of_the_impossible() {
    let world = World::new(ETC);
    world.boot();
    let etc = world.at("etc");
    fs::write(etc.join("possible"), "1").unwrap();
    world.checkpoint();
    // More than a block of a small ext4 takes.
    std::os::unix::fs::symlink("x".repeat(2000), etc.join("impossible")).unwrap();
    world.checkpoint();
    fs::write(etc.join("possible"), "3").unwrap();
    world.checkpoint();
    let view = snapshot::take(&etc);
    world.cut();
    sweep_merge("merge of the impossible", &world, 3, Some(&view));
}

/// Sweeps over a checkpoint of this running system, after which a boot shows what it shows now, and before which `old`.
fn sweep_checkpoint(name: &str, world: &World, old: &Snapshot) {
    let (persist, saved, lower) = (world.at("persist"), world.at("saved persist"), world.run.join("lower/etc"));
    let new = snapshot::take(&world.at("etc"));
    copy(&persist, &saved);
    world.checkpoint();
    let kept = store(world);
    // What the next boot would show, found out on a copy of the disk.
    let disk = World::beside(world, "copy");
    let next_boot = || {
        copy(&persist, &disk.at("persist"));
        copy(&lower, &disk.at("etc"));
        disk.merge();
        snapshot::take(&disk.at("etc"))
    };
    let check = |verdict: &Verdict| {
        match verdict {
            Verdict::Done => {}
            Verdict::Partly(words) => panic!("{words}"),
            Verdict::Failed => {
                let found = next_boot();
                let is_one = [old, &new].iter().any(|state| snapshot::difference(state, &found).is_none());
                assert!(is_one, "neither the old state nor the new");
                world.checkpoint();
            }
        }
        assert_store(world, &kept);
        snapshot::assert_same(&new, &next_boot(), "what the next boot shows");
    };
    sweep(&Case {
        name,
        lower: &lower,
        command: &world.syncd_command(&["checkpoint"]),
        usual: 0,
        prepare: &|| copy(&saved, &persist),
        check: &check,
    });
}

fn a_checkpoint() {
    let world = World::new(ETC);
    let mut views = Vec::new();
    three_checkpoints(&world, &mut views);
    one_more_change(&world);
    sweep_checkpoint("checkpoint", &world, &views[2]);
}

fn a_first_checkpoint() {
    let world = World::new(ETC);
    world.boot();
    let old = snapshot::take(&world.at("etc"));
    fs::write(world.at("etc/file"), "change").unwrap();
    sweep_checkpoint("first checkpoint", &world, &old);
}

fn a_full_checkpoint() {
    let world = World::new(ETC);
    world.boot();
    let etc = world.at("etc");
    fs::write(etc.join("file"), "1").unwrap();
    world.checkpoint();
    fs::write(etc.join("long"), noise(3 << 19)).unwrap();
    world.checkpoint();
    let old = snapshot::take(&etc);
    fs::remove_file(etc.join("long")).unwrap();
    sweep_checkpoint("full checkpoint", &world, &old);
    assert_eq!(world.checkpoints().len(), 1, "it was no full one");
}
