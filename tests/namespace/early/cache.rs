//! `/var/cache` in RAM: its directories, and the caches that are kept on disk.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, chown, symlink};
use std::path::Path;

use super::table::{assert_nothing_is_mounted, mount_at};
use super::{NO_NEW_CALLS, early_with, said, set_mode, set_xattr, xattrs};
use crate::tools;
use crate::world::{Disk, Fs, World, expect};
use test_support::snapshot;

/// `/var/cache`, and nothing else.
const CACHE: &str = "overlay.dirs = []\ntmpfs = { '/tmp' = false, '/var/tmp' = false }\n";

pub(super) fn the_cache_starts_with_directories_and_no_files() {
    let world = World::new(&format!("{CACHE}persist.var_cache = []"));
    let cache = world.at("var/cache");
    for (path, mode, owner) in
        [("man", 0o2755, 6), ("man/fr", 0o755, 6), ("private", 0o700, 33), ("private/deep", 0o1777, 0)]
    {
        fs::create_dir(cache.join(path)).unwrap();
        chown(cache.join(path), Some(owner), Some(owner + 1)).unwrap();
        set_mode(&cache.join(path), mode);
    }
    set_mode(&cache, 0o751);
    set_xattr(&cache.join("man"), "trusted.mine", b"x");
    for file in ["file", "man/index.db", "private/deep/file"] {
        fs::write(cache.join(file), "x").unwrap();
    }
    symlink("man", cache.join("link")).unwrap();
    world.boot();
    let mut found = BTreeMap::new();
    for path in snapshot::take(&cache).into_keys() {
        let stat = fs::symlink_metadata(cache.join(&path)).unwrap();
        assert!(stat.is_dir(), "{} is no directory", path.display());
        found.insert(path, (stat.mode() & 0o7777, stat.uid(), stat.gid()));
    }
    let expected = [
        ("", (0o751, 0, 0)),
        ("man", (0o2755, 6, 7)),
        ("man/fr", (0o755, 6, 7)),
        ("private", (0o700, 33, 34)),
        ("private/deep", (0o1777, 0, 1)),
    ];
    assert_eq!(found, expected.map(|(path, what)| (path.into(), what)).into());
    assert_eq!(xattrs(&cache.join("man")).get(b"trusted.mine".as_slice()), Some(&b"x".to_vec()));
    world.cut();
    assert!(cache.join("private/deep/file").exists(), "it is gone from the disk");
}

pub(super) fn a_kept_cache_is_moved_once_and_bound() {
    let world = World::new(CACHE);
    let (hidden, kept) = (world.at("var/cache/pacman"), world.at("persist/var/cache/pacman"));
    fs::create_dir_all(hidden.join("pkg")).unwrap();
    fs::write(hidden.join("pkg/one"), "1").unwrap();
    set_mode(&hidden, 0o750);
    let inode = fs::metadata(&hidden).unwrap().ino();
    let before = snapshot::take(&hidden);
    for boot in ["first", "second"] {
        world.boot();
        assert_eq!(mount_at(&world, "var/cache").unwrap().kind, "tmpfs");
        let bind = mount_at(&world, "var/cache/pacman").unwrap();
        assert_eq!(bind.root, Path::new("/root/persist/var/cache/pacman"), "{boot} boot");
        assert_eq!(fs::metadata(&hidden).unwrap().ino(), inode, "it is not the same directory");
        assert_eq!(fs::read_to_string(hidden.join("pkg/one")).unwrap(), "1");
        if boot == "first" {
            snapshot::assert_same(&before, &snapshot::take(&kept), "moving it changed it");
        }
        fs::write(hidden.join("pkg").join(boot), "x").unwrap();
        assert!(kept.join("pkg").join(boot).exists(), "a write does not reach the disk");
        fs::write(world.at("var/cache/else"), "in RAM").unwrap();
        world.cut();
        assert!(!hidden.exists(), "there are two of it");
        assert!(kept.join("pkg/first").exists() && !world.at("var/cache/else").exists());
    }
}

pub(super) fn a_kept_cache_on_another_disk_stays_where_it_is() {
    let other = Disk::new(Fs::Ext4, 32);
    let world = World::new(CACHE);
    tools::run("mount", &["--bind", other.path().to_str().unwrap(), world.at("persist").to_str().unwrap()]);
    let hidden = world.at("var/cache/pacman");
    fs::create_dir_all(hidden.join("pkg")).unwrap();
    fs::write(hidden.join("pkg/one"), "1").unwrap();
    let before = snapshot::take(&hidden);
    world.boot();
    assert_eq!(mount_at(&world, "var/cache").unwrap().kind, "tmpfs");
    assert_eq!(mount_at(&world, "var/cache/pacman").unwrap().root, Path::new("/root/var/cache/pacman"));
    snapshot::assert_same(&before, &snapshot::take(&hidden), "it changed");
    fs::write(hidden.join("pkg/two"), "2").unwrap();
    assert!(!other.path().join("var").exists(), "something was copied");
    world.cut();
    assert_eq!(fs::read_to_string(hidden.join("pkg/two")).unwrap(), "2", "a write did not reach the disk");
}

pub(super) fn a_kept_cache_is_not_lost_when_the_tmpfs_fails() {
    let world = World::new(CACHE);
    let hidden = world.at("var/cache/pacman");
    fs::create_dir_all(hidden.join("pkg")).unwrap();
    fs::write(hidden.join("pkg/one"), "1").unwrap();
    let output = early_with(&world, &["fsopen:error=EPERM"]);
    expect(&output, 3);
    said(&output, "/var/cache skipped: ");
    assert_nothing_is_mounted(&world);
    assert_eq!(fs::read_to_string(hidden.join("pkg/one")).unwrap_or_default(), "1", "the system does not find it");
}

pub(super) fn without_the_new_mount_calls_a_cache_is_kept_too() {
    let world = World::new(CACHE);
    fs::create_dir(world.at("var/cache/pacman")).unwrap();
    fs::write(world.at("var/cache/pacman/one"), "1").unwrap();
    let output = early_with(&world, &[NO_NEW_CALLS]);
    expect(&output, 0);
    assert_eq!(mount_at(&world, "var/cache").unwrap().kind, "tmpfs");
    assert_eq!(fs::read_to_string(world.at("var/cache/pacman/one")).unwrap(), "1");
}
