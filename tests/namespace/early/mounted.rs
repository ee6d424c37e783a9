//! What is mounted, how, and what is made for it.

use std::fs;
use std::os::unix::fs::{MetadataExt, chown};
use std::path::Path;
use std::process::Command;

use super::table::{Mount, is_overlay, mount_at, mount_in_run, mounts, mounts_below};
use super::{TWO, early, mode, paths, said, set_mode, set_xattr, state, token, xattrs};
use crate::tools;
use crate::world::{ETC, World, expect};
use test_support::model::set_times;
use test_support::snapshot;

/// An access control list (version 2, `linux/posix_acl_xattr.h`) that lets one more user read and enter.
fn acl() -> Vec<u8> {
    let mut bytes = 2u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in
        [(1u16, 7u16, u32::MAX), (2, 5, 4321), (4, 5, u32::MAX), (16, 5, u32::MAX), (32, 5, u32::MAX)]
    {
        bytes.extend_from_slice(&tag.to_le_bytes());
        bytes.extend_from_slice(&permissions.to_le_bytes());
        bytes.extend_from_slice(&id.to_le_bytes());
    }
    bytes
}

pub(super) fn the_defaults_mount_two_overlays_and_three_tmpfs() {
    let world = World::new("");
    set_mode(&world.at("tmp"), 0o1777);
    world.boot();
    let (root, run) = (&world.root, &world.run);
    let all = mounts(&world);
    let mut found: Vec<_> = all.iter().map(|mount| (mount.point.clone(), mount.kind.as_str())).collect();
    found.sort();
    // Below each overlay its cover.
    let mut expected = vec![
        (root.join("etc"), "ext4"),
        (root.join("etc"), "overlay"),
        (root.join("var/log"), "ext4"),
        (root.join("var/log"), "overlay"),
        (root.join("tmp"), "tmpfs"),
        (root.join("var/tmp"), "tmpfs"),
        (root.join("var/cache"), "tmpfs"),
        (run.join("ram"), "tmpfs"),
        (run.join("store"), "ext4"),
        (run.join("lower/etc"), "ext4"),
        (run.join("lower/var-log"), "ext4"),
    ];
    expected.sort();
    assert_eq!(found, expected);

    for (target, name) in [("etc", "etc"), ("var/log", "var-log")] {
        let overlay = mount_at(&world, target).unwrap();
        assert_eq!(overlay.source, "ephemeral-overlay");
        let place = |kind: &str| run.join(kind).to_str().unwrap().to_owned();
        assert_eq!(overlay.setting("lowerdir").unwrap(), place(&format!("lower/{name}")));
        assert_eq!(overlay.setting("upperdir").unwrap(), place(&format!("ram/{name}/upper")));
        assert_eq!(overlay.setting("workdir").unwrap(), place(&format!("ram/{name}/work")));
        assert_eq!(overlay.setting("redirect_dir"), Some("nofollow"));
        assert_eq!(overlay.setting("xino"), Some("on"));
        // Shown only where they differ from the kernel's default.
        for key in ["metacopy", "index", "nfs_export"] {
            assert!(matches!(overlay.setting(key), None | Some("off")), "{overlay:?}");
        }
        assert!(!overlay.settings.contains("userxattr") && !overlay.settings.contains("volatile"), "{overlay:?}");
        assert!(overlay.options.contains("rw"), "{overlay:?}");
        let lower = mount_in_run(&world, &format!("lower/{name}")).unwrap();
        assert_eq!(lower.root, Path::new("/root").join(target));
    }
    assert_eq!(mount_in_run(&world, "store").unwrap().root, Path::new("/root/persist/ephemeral-overlay"));

    for (path, gigabytes) in [("tmp", 5), ("var/tmp", 1), ("var/cache", 2)] {
        let tmpfs = mount_at(&world, path).unwrap();
        assert_eq!(tmpfs.source, "ephemeral-overlay");
        // strictatime is the absence of the others.
        assert_eq!(tmpfs.options, ["nodev", "nosuid", "rw"].map(str::to_owned).into());
        assert_eq!(tmpfs.setting("size"), Some(format!("{}k", gigabytes << 20).as_str()), "{tmpfs:?}");
    }
    assert_eq!(mode(&world.at("tmp")), 0o1777);

    let ram = mount_in_run(&world, "ram").unwrap();
    let info = rustix::system::sysinfo();
    let bytes = info.totalram * u64::from(info.mem_unit) * 9 / 10;
    assert_eq!(ram.setting("size"), Some(format!("{}k", bytes.div_ceil(4096) * 4).as_str()), "{ram:?}");
    assert_eq!(ram.setting("nr_inodes"), Some((bytes / 16384).to_string().as_str()), "{ram:?}");
    assert_eq!(ram.setting("mode"), Some("700"), "{ram:?}");
}

pub(super) fn boot_json_says_what_was_mounted() {
    let world = World::new("");
    world.boot();
    let state = state(&world);
    assert_eq!((state.version, state.checkpoint_format), (1, 1));
    assert_eq!(paths(state.targets.iter().map(|target| &target.path)), ["/etc", "/var/log"]);
    for target in &state.targets {
        let overlay = mount_at(&world, target.path.strip_prefix("/").unwrap().to_str().unwrap()).unwrap();
        assert_eq!(target.device, overlay.device);
        assert!(!target.released);
    }
    assert_eq!(paths(&state.tmpfs), ["/tmp", "/var/cache", "/var/tmp"]);
    assert_eq!(state.skipped, []);
    assert!(!world.run.join("boot.json.new").exists());
}

pub(super) fn a_tmpfs_has_the_mode_and_owner_of_what_it_hides() {
    let world = World::new("");
    set_mode(&world.at("tmp"), 0o1777);
    chown(world.at("var/tmp"), Some(1234), Some(4321)).unwrap();
    set_mode(&world.at("var/tmp"), 0o3770);
    fs::write(world.at("tmp/hidden"), "x").unwrap();
    set_times(&world.at("tmp"), 1_000_000_000, 5);
    world.boot();
    assert_eq!(mode(&world.at("tmp")), 0o1777);
    assert!(!world.at("tmp/hidden").exists(), "it is not hidden");
    assert_eq!(fs::metadata(world.at("tmp")).unwrap().mtime(), 1_000_000_000);
    let stat = fs::metadata(world.at("var/tmp")).unwrap();
    assert_eq!((stat.mode() & 0o7777, stat.uid(), stat.gid()), (0o3770, 1234, 4321));
    world.cut();
    assert!(world.at("tmp/hidden").exists(), "it is gone from the disk");
}

pub(super) fn the_upper_root_is_like_the_lower_root() {
    let world = World::new(ETC);
    let etc = world.at("etc");
    chown(&etc, Some(7), Some(8)).unwrap();
    set_mode(&etc, 0o2751);
    set_xattr(&etc, "user.note", b"a user's");
    set_xattr(&etc, "trusted.mine", b"root's");
    set_xattr(&etc, "system.posix_acl_access", &acl());
    set_xattr(&etc, "system.posix_acl_default", &acl());
    set_times(&etc, 1_234_567_890, 987_654_321);
    let expected = snapshot::take(&etc);
    let mut attributes = xattrs(&etc);
    assert_eq!(attributes.len(), 4);
    world.boot();
    snapshot::assert_same(&expected, &snapshot::take(&etc), "the view is not what the disk has");
    assert_eq!(token(&etc), None, "the token is seen through the overlay");

    let upper = world.upper();
    let stat = fs::metadata(&upper).unwrap();
    // The group's permissions are the mask of the list.
    assert_eq!((stat.mode() & 0o7777, stat.uid(), stat.gid()), (0o2755, 7, 8));
    assert_eq!((stat.mtime(), stat.mtime_nsec()), (1_234_567_890, 987_654_321));
    let mut found = xattrs(&upper);
    found.retain(|name, _| !name.starts_with(b"trusted.overlay."));
    if !found.contains_key(b"user.note".as_slice()) {
        // tmpfs has user.* only since 6.6.
        attributes.remove(b"user.note".as_slice());
    }
    assert_eq!(found, attributes);
}

pub(super) fn the_token_is_made_once_and_kept() {
    let world = World::new(ETC);
    assert_eq!(token(&world.at("etc")), None);
    world.boot();
    let first = token(&world.run.join("lower/etc")).expect("the lower root has no token");
    assert_eq!(first.len(), 32);
    world.cut();
    assert_eq!(token(&world.at("etc")), Some(first.clone()));
    world.boot();
    world.cut();
    assert_eq!(token(&world.at("etc")), Some(first), "an ordinary boot changed it");
}

pub(super) fn what_we_make_is_for_root_alone() {
    let world = World::new("");
    set_mode(&world.at("persist"), 0o755);
    world.boot();
    for path in ["", "ram", "ram/etc", "lower", "store"] {
        let path = world.run.join(path);
        let stat = fs::metadata(&path).unwrap();
        assert_eq!((stat.mode() & 0o7777, stat.uid(), stat.gid()), (0o700, 0, 0), "{}", path.display());
    }
    assert_eq!(mode(&world.at("persist/ephemeral-overlay")), 0o700);
    assert_eq!(mode(&world.at("persist")), 0o755, "this one is the user's");
    world.cut();
    // A store that somebody opened up is closed again.
    set_mode(&world.at("persist/ephemeral-overlay"), 0o755);
    world.boot();
    assert_eq!(mode(&world.at("persist/ephemeral-overlay")), 0o700);
}

pub(super) fn a_target_may_have_any_name() {
    let name = "srv/with space, comma: colon and -dash%";
    let world = World::new(&format!("{TWO}overlay.dirs = ['/{name}']"));
    fs::create_dir_all(world.at(name)).unwrap();
    fs::write(world.at(name).join("file"), "x").unwrap();
    world.boot();
    assert!(is_overlay(&world, name), "{:?}", mounts(&world));
    fs::write(world.at(name).join("file"), "y").unwrap();
    world.checkpoint();
    world.cut();
    world.boot();
    assert_eq!(fs::read_to_string(world.at(name).join("file")).unwrap(), "y");
}

pub(super) fn a_passthrough_stays_on_disk() {
    let world = World::new(&format!("{TWO}overlay.passthrough = ['/var/log/journal']"));
    let journal = world.at("var/log/journal");
    fs::create_dir(&journal).unwrap();
    set_mode(&journal, 0o2755);
    world.boot();
    assert_eq!(mount_at(&world, "var/log/journal").unwrap().root, Path::new("/root/var/log/journal"));
    fs::write(journal.join("file"), "on disk").unwrap();
    fs::write(world.at("var/log/other"), "in RAM").unwrap();
    assert_eq!(mode(&journal), 0o2755);
    world.cut();
    assert_eq!(fs::read_to_string(journal.join("file")).unwrap(), "on disk");
    assert!(!world.at("var/log/other").exists());
}

/// systemd unmounts at once what has no such line: the boots of tests/qemu show what is lost then.
pub(super) fn what_is_mounted_is_to_stay_until_the_last_stage() {
    let world = World::new(&format!("{TWO}overlay.passthrough = ['/var/log/my journal']"));
    fs::create_dir(world.at("var/log/my journal")).unwrap();
    fs::create_dir_all(&world.run).unwrap();
    let utab = world.run.join("utab");
    fs::write(&utab, "SRC=/dev/x TARGET=/x ROOT=/ OPTS=x\n").unwrap();
    world.boot();
    let mut expected = vec!["SRC=/dev/x TARGET=/x ROOT=/ OPTS=x".to_owned()];
    for (path, field) in [("etc", "/etc"), ("var/log/my journal", "/var/log/my\\040journal"), ("var/log", "/var/log")] {
        let Mount { source, root, .. } = mount_at(&world, path).unwrap();
        let root = root.display().to_string().replace(' ', "\\040");
        expected.push(format!("SRC={source} TARGET={field} ROOT={root} OPTS=x-initrd.mount"));
    }
    assert_eq!(fs::read_to_string(&utab).unwrap().lines().collect::<Vec<_>>(), expected);
    // Every user's mount(8) and findmnt(8) read it, whatever umask the unit has.
    world.cut();
    let early = world.early_command("");
    let mut shell = Command::new("sh");
    shell.args(["-c", "umask 77; exec \"$0\" \"$@\""]).arg(early.get_program()).args(early.get_args());
    expect(&shell.output().unwrap(), 0);
    for file in [&utab, &utab.with_extension("lock"), &utab.with_extension("event")] {
        assert_eq!(mode(file), 0o644, "{}", file.display());
    }
}

pub(super) fn a_second_run_changes_nothing() {
    let world = World::new("");
    world.boot();
    fs::write(world.at("etc/file"), "in RAM").unwrap();
    let (mounted, boot) = (mounts(&world), state(&world));
    let output = early(&world);
    expect(&output, 0);
    said(&output, "already active");
    assert_eq!(mounts(&world), mounted);
    assert_eq!(fs::read_to_string(world.at("etc/file")).unwrap(), "in RAM");
    // syncd knows from it what is in RAM.
    assert_eq!(state(&world), boot);
}

pub(super) fn binds_are_private_on_a_shared_root() {
    // In a systemd initramfs every mount is shared, that of the run directory too.
    let world = World::new(TWO);
    let disk = world.root.parent().unwrap().to_str().unwrap();
    fs::create_dir(&world.run).unwrap();
    let run = world.run.to_str().unwrap();
    tools::run("mount", &["-t", "tmpfs", "-o", "mode=0700", "run", run]);
    tools::run("mount", &["--make-shared", disk]);
    tools::run("mount", &["--make-shared", run]);
    world.boot();
    let mut found = Vec::new();
    for mount in mounts_below(&world.run) {
        assert_eq!(mount.propagation, [""; 0], "{mount:?}");
        found.push(mount.point.strip_prefix(&world.run).unwrap().to_path_buf());
    }
    found.sort();
    // Nothing was propagated into them.
    assert_eq!(paths(&found), ["lower/etc", "lower/var-log", "ram", "store"]);
    fs::write(world.at("etc/file"), "in RAM").unwrap();
    assert!(!world.run.join("lower/etc/file").exists(), "the bind shows the overlay");
    assert!(is_overlay(&world, "etc") && is_overlay(&world, "var/log"));
}
