//! Hostile users race against the cleaner: with symlinks, exchanges, mount points and hard links. Two trees are watched
//! by the kernel: nothing in them is so much as opened.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::inotify::WatchFlags;
use syncd::clean::Moment;
use test_support::hold::{Holder, How};
use test_support::snapshot;
use test_support::watch::Watch;

use super::cases::below;
use super::{Cleaner, HOUR, TMP, later, world};

/// Two processes exchange directories and files of `/tmp` for symlinks to trees that are not to be cleaned, as fast as
/// they can, a third one mounts such trees and makes hard links. `HOSTILE_SECONDS` sets for how long.
pub(super) fn hostile_races_do_not_lead_out() {
    let seconds = std::env::var("HOSTILE_SECONDS").map_or(4.0, |text| text.parse().unwrap());
    let world = world("");
    let tmp = world.at("tmp");
    // One on the same file system, so that no difference between devices protects it, and one on the disk.
    let (near, far) = (tmp.join("keep-canary"), world.at("canary"));
    for directory in ["a", "a/b", "a/b/c"] {
        for name in 0..100 {
            below(&near.join(directory).join(name.to_string()));
            below(&far.join(directory).join(name.to_string()));
        }
    }
    let linked = tmp.join("keep-linked");
    (0..10).for_each(|name| drop(below(&linked.join(name.to_string()))));
    let trees = [&near, &far, &linked];
    let before = trees.map(|tree| snapshot::take(tree));
    let watch = watch(&[&near, &far], &linked);

    let exchanging = [("first", &near), ("second", &far)].map(|(at, to)| How::Exchange(tmp.join(at), to.clone()));
    let mut exchanging = exchanging.map(|how| Holder::new(&how));
    let mut mounting = Holder::new(&How::Mount(tmp.join("third"), vec![near.clone(), far.clone()], linked.clone()));
    let mut cleaner = Cleaner::new(&world, &format!("{TMP}cleanup = {{ stale = '1ms', exclude = ['/tmp/keep-*'] }}\n"));
    let (begun, mut now) = (Instant::now(), Moment::now());
    let (mut passes, mut removed) = (0, 0);
    while begun.elapsed() < Duration::from_secs_f64(seconds) {
        // Everything is old.
        now = later(now, HOUR);
        let stats = cleaner.pass(now);
        passes += 1;
        removed += stats.folders[0].files + stats.folders[0].directories;
        let told = watch.told();
        assert!(told.is_empty(), "pass {passes}, after {} s: {told:#?}", begun.elapsed().as_secs());
    }
    let number = |holder: &mut Holder| holder.end().parse::<usize>().unwrap();
    let (exchanged, mounted) = (exchanging.iter_mut().map(number).sum::<usize>(), number(&mut mounting));
    let told = watch.told();
    assert!(told.is_empty(), "{told:#?}");
    println!("{exchanged} exchanges, {mounted} mounts, {passes} passes, {removed} names removed");
    for (tree, before) in trees.into_iter().zip(&before) {
        snapshot::assert_same(before, &snapshot::take(tree), "a tree that is to be kept");
    }
    let is_race = removed > 100 && exchanged > 1000 && mounted > 100;
    assert!(is_race, "{exchanged} exchanges, {mounted} mounts, {removed} names removed: this was no race");
}

/// Watches the trees for everything, and the files that have more names for what is not the loss of one of them.
fn watch(trees: &[&PathBuf], linked: &Path) -> Watch {
    let mut watch = Watch::new();
    for tree in trees {
        watch.tree(tree);
    }
    for entry in fs::read_dir(linked).unwrap() {
        let what = WatchFlags::ACCESS | WatchFlags::MODIFY | WatchFlags::CLOSE_WRITE | WatchFlags::DELETE_SELF;
        watch.file(&entry.unwrap().path(), what);
    }
    // It is not deaf.
    drop(File::open(trees[0].join("a/b")).unwrap());
    drop(File::open(trees[1].join("a/b/7")).unwrap());
    let told = watch.told();
    assert!(["a/b: ", "a/b/7: "].iter().all(|path| told.iter().any(|line| line.contains(path))), "{told:?}");
    watch
}
