//! Calls that fail, or that the kernel does not have: a target is mounted whole, or on disk as if nothing had been tried.

use std::fs;

use super::table::{Mount, assert_whole_or_absent, is_overlay, mount_at, mounts};
use super::{NO_NEW_CALLS, TWO, early, early_with, mode, paths, said, set_mode, set_xattr, state, token};
use crate::tools::{self, text};
use crate::world::{World, expect};
use test_support::snapshot;

pub(super) fn a_failing_target_is_undone_alone() {
    let world = World::new(TWO);
    fs::write(world.at("etc/file"), "on disk").unwrap();
    // The RAM, the store, two binds, then the first overlay.
    let output = early_with(&world, &["move_mount:error=EPERM:when=5"]);
    expect(&output, 3);
    said(&output, "early: /etc skipped: ");
    said(&output, "move_mount");
    assert_eq!(assert_whole_or_absent(&world, "one failed"), 1);
    assert!(is_overlay(&world, "var/log"));
    assert_eq!(mount_at(&world, "etc"), None);
    assert_eq!(fs::read_to_string(world.at("etc/file")).unwrap(), "on disk");
    let state = state(&world);
    assert_eq!(paths(state.skipped.iter().map(|skipped| &skipped.path)), ["/etc"]);
}

pub(super) fn a_damaged_token_skips_its_target_alone() {
    let world = World::new(TWO);
    set_xattr(&world.at("etc"), token::XATTR, b"not a token");
    let output = early(&world);
    expect(&output, 3);
    said(&output, "early: /etc skipped: ");
    assert_eq!(assert_whole_or_absent(&world, "a damaged token"), 1);
    assert_eq!(token(&world.run.join("lower/var-log")).map(|token| token.len()), Some(32));
}

pub(super) fn without_its_tmpfs_nothing_is_half_done() {
    let world = World::new("tmpfs = { '/var/cache' = false, '/var/tmp' = false }\n");
    let output = early_with(&world, &["fsopen:error=EPERM:when=1"]);
    expect(&output, 3);
    said(&output, "fsopen");
    for target in ["/etc", "/var/log"] {
        said(&output, &format!("early: {target} skipped: "));
    }
    assert_eq!(mount_at(&world, "tmp").unwrap().kind, "tmpfs", "this one could be had");
    assert_eq!(assert_whole_or_absent(&world, "no RAM"), 0);
}

pub(super) fn whichever_call_fails_a_target_is_whole_or_not_there() {
    let new = ["fsopen", "fsmount", "move_mount", "open_tree", "mount", "fchown"].map(|call| (None, call));
    let old = ["mount", "fchown"].map(|call| (Some(NO_NEW_CALLS), call));
    let world = World::new(TWO);
    world.boot();
    world.cut();
    let tries = world.at("persist/ephemeral-overlay/tries");
    for (missing, call) in new.into_iter().chain(old) {
        for number in 1.. {
            let what = format!("{call}, the {number}. time, {} missing", missing.unwrap_or("nothing"));
            let fault = format!("{call}:error=EIO:when={number}");
            // As if every one of these boots had reached syncd.
            let _none_yet = fs::remove_file(&tries);
            let output = early_with(&world, &missing.into_iter().chain([fault.as_str()]).collect::<Vec<_>>());
            let whole = assert_whole_or_absent(&world, &what);
            if tools::code(&output) == 0 {
                assert_eq!(whole, 2, "{what}: {}", text(&output));
                assert!(number > 1, "{call} is not called at all");
                world.cut();
                break;
            }
            assert_eq!(tools::code(&output), 3, "{what}: {}", text(&output));
            said(&output, "skipped: ");
            world.cut();
        }
    }
}

/// What can be compared between two boots.
fn comparable(world: &World) -> Vec<Mount> {
    let mut all = mounts(world);
    for mount in &mut all {
        if mount.kind != "ext4" {
            mount.device.clear();
        }
    }
    all.sort_by(|a, b| a.point.cmp(&b.point));
    all
}

pub(super) fn without_the_new_mount_calls_the_mounts_are_the_same_but_for_the_cover() {
    let world = World::new("persist.var_cache = []");
    set_mode(&world.at("tmp"), 0o1777);
    fs::create_dir(world.at("var/cache/man")).unwrap();
    fs::write(world.at("etc/file"), "x").unwrap();
    world.boot();
    let (mut expected, etc, cache) =
        (comparable(&world), snapshot::take(&world.at("etc")), mode(&world.at("var/cache/man")));
    world.cut();
    let output = early_with(&world, &[NO_NEW_CALLS]);
    expect(&output, 0);
    let is_target = |mount: &Mount| [world.at("etc"), world.at("var/log")].contains(&mount.point);
    expected.retain(|mount| !is_target(mount) || mount.kind == "overlay");
    assert_eq!(comparable(&world), expected);
    snapshot::assert_same(&etc, &snapshot::take(&world.at("etc")), "the view differs");
    assert_eq!((mode(&world.at("tmp")), mode(&world.at("var/cache/man"))), (0o1777, cache));
    assert_eq!(paths(state(&world).targets.iter().map(|target| &target.path)), ["/etc", "/var/log"]);
    fs::write(world.at("etc/file"), "in RAM").unwrap();
    let output = world.syncd(&["release"]);
    expect(&output, 3);
    said(&output, "/etc: not released: no cover lies under its overlay");
    world.checkpoint();
    world.cut();
    world.merge();
    assert_eq!(fs::read_to_string(world.at("etc/file")).unwrap(), "in RAM");
}
