//! `early` as its user and an initramfs meet it: what it mounts and how, what it leaves alone, what it says, and that
//! whatever fails, every target is either mounted whole or on disk as if nothing had been tried.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use ephemeral_overlay::attributes::{Handle, Xattrs};
use ephemeral_overlay::mountinfo;
use ephemeral_overlay::state::BootState;
use ephemeral_overlay::token;
use rustix::mount::{UnmountFlags, unmount};

use crate::tools::{self, text};
use crate::world::{Disk, ETC, Fs, World, expect};
use test_support::model::set_times;
use test_support::snapshot;

pub(crate) const TESTS: &[(&str, fn())] = &[
    ("the_defaults_mount_two_overlays_and_three_tmpfs", the_defaults_mount_two_overlays_and_three_tmpfs),
    ("boot_json_says_what_was_mounted", boot_json_says_what_was_mounted),
    ("a_tmpfs_has_the_mode_and_owner_of_what_it_hides", a_tmpfs_has_the_mode_and_owner_of_what_it_hides),
    ("the_upper_root_is_like_the_lower_root", the_upper_root_is_like_the_lower_root),
    ("the_token_is_made_once_and_kept", the_token_is_made_once_and_kept),
    ("what_we_make_is_for_root_alone", what_we_make_is_for_root_alone),
    ("a_target_may_have_any_name", a_target_may_have_any_name),
    ("a_root_without_its_counterpart_stays_on_disk", a_root_without_its_counterpart_stays_on_disk),
    ("a_rescue_merges_and_mounts_nothing", a_rescue_merges_and_mounts_nothing),
    ("the_roots_own_init_may_be_named", the_roots_own_init_may_be_named),
    ("after_two_boots_that_never_reached_syncd_it_stays_on_disk", after_two_boots_that_never_reached_syncd),
    ("a_passthrough_stays_on_disk", a_passthrough_stays_on_disk),
    ("what_is_mounted_is_to_stay_until_the_last_stage", what_is_mounted_is_to_stay_until_the_last_stage),
    ("a_passthrough_that_is_missing_is_skipped_alone", a_passthrough_that_is_missing_is_skipped_alone),
    ("a_target_for_logins_is_not_mounted_at_boot", a_target_for_logins_is_not_mounted_at_boot),
    ("nothing_configured_mounts_nothing", nothing_configured_mounts_nothing),
    ("a_dry_run_prints_the_plan_and_changes_nothing", a_dry_run_prints_the_plan_and_changes_nothing),
    ("a_second_run_changes_nothing", a_second_run_changes_nothing),
    ("the_cache_starts_with_directories_and_no_files", the_cache_starts_with_directories_and_no_files),
    ("a_kept_cache_is_moved_once_and_bound", a_kept_cache_is_moved_once_and_bound),
    ("a_kept_cache_on_another_disk_stays_where_it_is", a_kept_cache_on_another_disk_stays_where_it_is),
    ("a_kept_cache_is_not_lost_when_the_tmpfs_fails", a_kept_cache_is_not_lost_when_the_tmpfs_fails),
    ("a_symlink_is_skipped_alone", a_symlink_is_skipped_alone),
    ("a_target_below_a_symlink_is_skipped", a_target_below_a_symlink_is_skipped),
    ("a_target_that_is_a_mount_point_is_skipped", a_target_that_is_a_mount_point_is_skipped),
    ("a_target_that_is_no_directory_is_skipped", a_target_that_is_no_directory_is_skipped),
    ("a_target_that_fstab_mounts_later_is_deferred", a_target_that_fstab_mounts_later_is_deferred),
    ("a_target_on_a_disk_that_is_mounted_is_not_deferred", a_target_on_a_disk_that_is_mounted_is_not_deferred),
    ("everything_is_deferred_when_the_store_is", everything_is_deferred_when_the_store_is),
    ("a_tmpfs_that_fstab_mounts_is_left_to_it", a_tmpfs_that_fstab_mounts_is_left_to_it),
    ("a_failing_target_is_undone_alone", a_failing_target_is_undone_alone),
    ("a_damaged_token_skips_its_target_alone", a_damaged_token_skips_its_target_alone),
    ("without_its_tmpfs_nothing_is_half_done", without_its_tmpfs_nothing_is_half_done),
    ("whichever_call_fails_a_target_is_whole_or_not_there", whichever_call_fails_a_target_is_whole_or_not_there),
    (
        "without_the_new_mount_calls_the_mounts_are_the_same_but_for_the_cover",
        without_the_new_mount_calls_the_mounts_are_the_same_but_for_the_cover,
    ),
    ("without_the_new_mount_calls_a_cache_is_kept_too", without_the_new_mount_calls_a_cache_is_kept_too),
    ("a_config_that_is_not_toml_mounts_nothing", a_config_that_is_not_toml_mounts_nothing),
    ("an_unknown_key_mounts_nothing_and_names_a_known_one", an_unknown_key_mounts_nothing_and_names_a_known_one),
    ("a_bad_config_does_not_keep_a_chain_from_being_merged", a_bad_config_does_not_keep_a_chain_from_being_merged),
    ("off_merges_and_mounts_nothing", off_merges_and_mounts_nothing),
    ("nomerge_touches_nothing", nomerge_touches_nothing),
    ("a_value_that_is_not_known_is_off_and_is_reported", a_value_that_is_not_known_is_off_and_is_reported),
    ("a_pending_chain_is_merged_before_the_mount", a_pending_chain_is_merged_before_the_mount),
    ("a_config_changed_in_ram_decides_the_next_boot", a_config_changed_in_ram_decides_the_next_boot),
    ("a_target_that_is_no_longer_configured_is_merged", a_target_that_is_no_longer_configured_is_merged),
    ("the_merge_uses_the_config_that_early_was_given", the_merge_uses_the_config_that_early_was_given),
    ("a_chain_that_cannot_be_merged_is_unpacked", a_chain_that_cannot_be_merged_is_unpacked),
    ("a_store_that_cannot_be_read_is_not_an_empty_one", a_store_that_cannot_be_read_is_not_an_empty_one),
    ("without_syncd_a_pending_chain_keeps_its_target_on_disk", without_syncd_a_pending_chain_keeps_its_target_on_disk),
    ("a_pending_chain_on_a_read_only_root_is_seen", a_pending_chain_on_a_read_only_root_is_seen),
    ("a_read_only_root_is_writable_for_a_merge_only", a_read_only_root_is_writable_for_a_merge_only),
    ("an_ordinary_boot_from_a_read_only_root", an_ordinary_boot_from_a_read_only_root),
    ("a_first_boot_from_a_read_only_root", a_first_boot_from_a_read_only_root),
    ("binds_of_a_read_only_root_become_writable_with_it", binds_of_a_read_only_root_become_writable_with_it),
    ("a_wrong_command_line_is_a_usage_error", a_wrong_command_line_is_a_usage_error),
    ("help_is_no_error", help_is_no_error),
    ("a_root_that_does_not_exist_boots_from_disk", a_root_that_does_not_exist_boots_from_disk),
    ("a_run_directory_that_overlayfs_cannot_name_is_refused", a_run_directory_that_overlayfs_cannot_name_is_refused),
    ("binds_are_private_on_a_shared_root", binds_are_private_on_a_shared_root),
];

/// `/etc` and `/var/log`, and no tmpfs.
const TWO: &str = "tmpfs = { '/tmp' = false, '/var/tmp' = false, '/var/cache' = false }\n";
/// `/var/cache`, and nothing else.
const CACHE: &str = "overlay.dirs = []\ntmpfs = { '/tmp' = false, '/var/tmp' = false }\n";

/// One line of mountinfo.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Mount {
    device: String,
    /// What of its file system it shows.
    root: PathBuf,
    point: PathBuf,
    options: BTreeSet<String>,
    /// `shared:1`, `master:2` and the like.
    propagation: Vec<String>,
    kind: String,
    source: String,
    settings: BTreeSet<String>,
}

impl Mount {
    fn setting(&self, key: &str) -> Option<&str> {
        self.settings.iter().find_map(|setting| setting.strip_prefix(key)?.strip_prefix('='))
    }
}

/// Every mount strictly below `path`, in the order in which they were made.
fn mounts_below(path: &Path) -> Vec<Mount> {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let mounts = text.lines().map(|line| {
        let mut fields = line.split(' ').map(str::to_owned).skip(2);
        let mut next = || fields.next().unwrap();
        let list = |text: String| text.split(',').map(str::to_owned).collect();
        let (device, root, point, options) = (next(), next(), next(), list(next()));
        let propagation = std::iter::from_fn(|| Some(next()).filter(|field| field != "-")).collect();
        let (kind, source, settings) = (next(), next(), list(next()));
        let plain = |text: String| mountinfo::unescape(text.as_bytes());
        Mount { device, root: plain(root), point: plain(point), options, propagation, kind, source, settings }
    });
    mounts.filter(|mount| mount.point.starts_with(path) && mount.point != path).collect()
}

/// Every mount of a world.
fn mounts(world: &World) -> Vec<Mount> {
    [mounts_below(&world.root), mounts_below(&world.run)].concat()
}

/// The one mount at a path of the system, if there is one. Below an overlay there is its cover.
fn mount_at(world: &World, path: &str) -> Option<Mount> {
    let point = world.at(path);
    let mut found = mounts_below(&world.root);
    found.retain(|mount| mount.point == point);
    let top = found.pop()?;
    let is_covered = top.kind == "overlay" && found.len() == 1 && found[0].options.contains("ro");
    assert!(is_covered || found.is_empty(), "mounted twice: {found:?}, {top:?}");
    Some(top)
}

/// The one mount at a path of the run directory, if there is one.
fn mount_in_run(world: &World, path: &str) -> Option<Mount> {
    let point = world.run.join(path);
    let mut found = mounts_below(&world.run);
    found.retain(|mount| mount.point == point);
    assert!(found.len() < 2, "mounted twice: {found:?}");
    found.pop()
}

fn is_overlay(world: &World, path: &str) -> bool {
    mount_at(world, path).is_some_and(|mount| mount.kind == "overlay")
}

fn assert_nothing_is_mounted(world: &World) {
    assert_eq!(mounts(world), []);
}

fn early(world: &World) -> Output {
    world.early_command("").output().unwrap()
}

/// `early` as an initramfs runs it: with the configuration of the root.
fn early_by_itself(world: &World) -> Output {
    tools::syncd();
    let mut command = Command::new(tools::early());
    command.arg("--root").arg(&world.root).arg("--run-dir").arg(&world.run).args(["--cmdline", ""]);
    command.output().unwrap()
}

/// `early`, with calls that fail as `faults` say (strace(1), inject).
fn early_with(world: &World, faults: &[&str]) -> Output {
    let early = world.early_command("");
    let mut command = Command::new("strace");
    command.args(["-f", "-o", "/dev/null"]);
    for fault in faults {
        command.args(["-e", &format!("inject={fault}")]);
    }
    command.arg(early.get_program()).args(early.get_args());
    command.output().unwrap()
}

fn said(output: &Output, part: &str) {
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(errors.contains(part), "{part:?} was not said:\n{}", text(output));
}

fn state(world: &World) -> BootState {
    BootState::read(&world.run.join("boot.json")).unwrap().expect("there is no boot.json")
}

fn paths<'a>(paths: impl IntoIterator<Item = &'a PathBuf>) -> Vec<&'a str> {
    paths.into_iter().map(|path| path.to_str().unwrap()).collect()
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().mode() & 0o7777
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

fn xattrs(path: &Path) -> Xattrs {
    Handle::of(File::open(path).unwrap().as_fd()).read_all().unwrap()
}

fn set_xattr(path: &Path, name: &str, value: &[u8]) {
    Handle::of(File::open(path).unwrap().as_fd()).write(name.as_bytes(), value).unwrap();
}

fn token(path: &Path) -> Option<Vec<u8>> {
    xattrs(path).get(token::XATTR.as_bytes()).cloned()
}

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

/// A system that lost its power with a checkpoint in the store, and what its `/etc` looked like at that checkpoint.
fn with_a_pending_chain(config: &str) -> (World, snapshot::Snapshot) {
    let world = World::new(config);
    fs::write(world.at("etc/changed"), "on disk").unwrap();
    fs::write(world.at("etc/removed"), "on disk").unwrap();
    fs::create_dir(world.at("etc/remade")).unwrap();
    fs::write(world.at("etc/remade/old"), "on disk").unwrap();
    world.boot();
    fs::write(world.at("etc/changed"), "in RAM").unwrap();
    fs::write(world.at("etc/made"), "in RAM").unwrap();
    fs::remove_file(world.at("etc/removed")).unwrap();
    fs::remove_dir_all(world.at("etc/remade")).unwrap();
    fs::create_dir(world.at("etc/remade")).unwrap();
    fs::write(world.at("etc/remade/new"), "in RAM").unwrap();
    world.checkpoint();
    let expected = snapshot::take(&world.at("etc"));
    world.cut();
    assert!(!world.at("etc/made").exists(), "it went to the disk without a merge");
    (world, expected)
}

/// The mount of the disk that the root is on, read-only or not.
fn remount(world: &World, how: &str) {
    let disk = world.root.parent().unwrap().to_str().unwrap();
    tools::run("mount", &["-o", &format!("remount,{how}"), disk]);
}

fn is_read_only(world: &World) -> bool {
    File::create(world.at("probe")).is_err_and(|error| error.kind() == std::io::ErrorKind::ReadOnlyFilesystem)
}

/// A disk with its write protection on: no remount makes it writable.
struct WriteProtected(String);

impl WriteProtected {
    fn new(world: &World) -> Self {
        remount(world, "ro");
        let disk = world.root.parent().unwrap();
        let mounts = mounts_below(disk.parent().unwrap());
        let device = mounts.iter().find(|mount| mount.point == disk).unwrap().source.clone();
        tools::run("blockdev", &["--setro", &device]);
        Self(device)
    }
}

impl Drop for WriteProtected {
    fn drop(&mut self) {
        // The flag stays on a loop device, and the next image would get it.
        tools::run("blockdev", &["--setrw", &self.0]);
    }
}

fn the_defaults_mount_two_overlays_and_three_tmpfs() {
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

fn boot_json_says_what_was_mounted() {
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

fn a_tmpfs_has_the_mode_and_owner_of_what_it_hides() {
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

fn the_upper_root_is_like_the_lower_root() {
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

fn the_token_is_made_once_and_kept() {
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

fn what_we_make_is_for_root_alone() {
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

fn a_target_may_have_any_name() {
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

fn a_passthrough_stays_on_disk() {
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
fn what_is_mounted_is_to_stay_until_the_last_stage() {
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
    assert_eq!(fs::read_to_string(utab).unwrap().lines().collect::<Vec<_>>(), expected);
}

fn a_passthrough_that_is_missing_is_skipped_alone() {
    let world = World::new(&format!("{TWO}overlay.passthrough = ['/var/log/journal', '/var/log/here']"));
    fs::create_dir(world.at("var/log/here")).unwrap();
    let output = early(&world);
    expect(&output, 3);
    said(&output, "/var/log/journal skipped: it is in RAM with the rest of /var/log");
    assert!(is_overlay(&world, "etc") && is_overlay(&world, "var/log"));
    assert!(mount_at(&world, "var/log/here").is_some());
}

fn a_target_for_logins_is_not_mounted_at_boot() {
    let (world, expected) = with_a_pending_chain(ETC);
    world.configure(&format!("{ETC}overlay.activate = 'login'"));
    let output = early(&world);
    assert!(matches!(tools::code(&output), 0 | 3), "{}", text(&output));
    assert!(!is_overlay(&world, "etc"));
    snapshot::assert_same(&expected, &snapshot::take(&world.at("etc")), "it was not merged");
}

fn nothing_configured_mounts_nothing() {
    let world = World::new(&format!("{TWO}overlay.dirs = []"));
    world.boot();
    assert_nothing_is_mounted(&world);
    assert_eq!(state(&world).targets, []);
}

fn a_dry_run_prints_the_plan_and_changes_nothing() {
    let (world, _) = with_a_pending_chain("");
    for cmdline in ["", "ephemeral_overlay=off"] {
        let before = snapshot::take(&world.root);
        let token_before = token(&world.at("etc"));
        let output = world.early_command(cmdline).arg("--dry-run").output().unwrap();
        expect(&output, 0);
        snapshot::assert_same(&before, &snapshot::take(&world.root), "a dry run changed the disk");
        assert_eq!(token(&world.at("etc")), token_before);
        assert_nothing_is_mounted(&world);
        assert!(!world.run.exists(), "it made the run directory");
        if cmdline.is_empty() {
            let plan = String::from_utf8(output.stdout).unwrap();
            for line in ["store: /persist/ephemeral-overlay", "private bind of /etc", "tmpfs on /tmp: 5368709120 bytes"]
            {
                assert!(plan.lines().any(|found| found == line), "{line:?} is not in the plan:\n{plan}");
            }
            assert!(plan.lines().any(|line| line.starts_with("overlay on /etc")), "{plan}");
        }
    }
    let fresh = World::new("");
    expect(&fresh.early_command("").arg("--dry-run").output().unwrap(), 0);
    assert_eq!(token(&fresh.at("etc")), None, "a dry run made a token");
    assert!(!fresh.at("persist/ephemeral-overlay").exists(), "a dry run made the store");
}

fn a_second_run_changes_nothing() {
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

fn the_cache_starts_with_directories_and_no_files() {
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

fn a_kept_cache_is_moved_once_and_bound() {
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

fn a_kept_cache_on_another_disk_stays_where_it_is() {
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

fn a_kept_cache_is_not_lost_when_the_tmpfs_fails() {
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

fn a_symlink_is_skipped_alone() {
    let world = World::new(TWO);
    fs::rename(world.at("var/log"), world.at("var/elsewhere")).unwrap();
    symlink("elsewhere", world.at("var/log")).unwrap();
    let output = early(&world);
    expect(&output, 3);
    let reason = "it is a symlink, or below one; name the directory it leads to";
    said(&output, &format!("early: /var/log skipped: {reason}\n"));
    assert!(is_overlay(&world, "etc"));
    assert_eq!(mounts_below(&world.root).len(), 2, "only the overlay and its cover: {:?}", mounts(&world));
    let state = state(&world);
    assert_eq!(paths(state.targets.iter().map(|target| &target.path)), ["/etc"]);
    assert_eq!(paths(state.skipped.iter().map(|skipped| &skipped.path)), ["/var/log"]);
    assert_eq!(state.skipped[0].reason, reason);
}

fn a_target_below_a_symlink_is_skipped() {
    let world = World::new(TWO);
    fs::rename(world.at("var"), world.at("data")).unwrap();
    // Absolute, so that it means another place outside this root.
    symlink("/data", world.at("var")).unwrap();
    let output = early(&world);
    expect(&output, 3);
    said(&output, "early: /var/log skipped: it is a symlink, or below one");
    assert!(is_overlay(&world, "etc"));
    assert_eq!(mounts_below(&world.root).len(), 2, "only the overlay and its cover: {:?}", mounts(&world));
}

fn a_target_that_is_a_mount_point_is_skipped() {
    let world = World::new("");
    for path in ["var/log", "tmp"] {
        tools::run("mount", &["-t", "tmpfs", "somebody", world.at(path).to_str().unwrap()]);
    }
    let output = early(&world);
    expect(&output, 3);
    for path in ["/var/log", "/tmp"] {
        said(&output, &format!("early: {path} skipped: something is mounted there already\n"));
        assert_eq!(mount_at(&world, &path[1..]).unwrap().source, "somebody");
    }
    assert!(is_overlay(&world, "etc"));
    assert_eq!(mount_at(&world, "var/tmp").unwrap().kind, "tmpfs");
}

fn a_target_that_is_no_directory_is_skipped() {
    let world = World::new(&format!("{TWO}overlay.dirs = ['/opt/none', '/opt/file', '/opt/file/below', '/etc']"));
    fs::create_dir(world.at("opt")).unwrap();
    fs::write(world.at("opt/file"), "x").unwrap();
    // Targets must not lie in one another.
    let output = early(&world);
    expect(&output, 1);
    world.configure(&format!("{TWO}overlay.dirs = ['/opt/none', '/opt/file', '/etc']"));
    let output = early(&world);
    expect(&output, 3);
    said(&output, "early: /opt/none skipped: there is no such directory\n");
    said(&output, "early: /opt/file skipped: it is not a directory\n");
    assert!(is_overlay(&world, "etc"));
    assert!(!world.at("opt/none").exists(), "it was made");
}

fn a_target_that_fstab_mounts_later_is_deferred() {
    let world = World::new(TWO);
    fs::write(world.at("etc/fstab"), "# disks\nLABEL=root / ext4 rw 0 1\nLABEL=log\t/var/log ext4 rw 0 2\n").unwrap();
    let output = early(&world);
    expect(&output, 3);
    said(&output, "early: /var/log skipped: deferred: it is on /var/log, which is not mounted yet\n");
    assert!(is_overlay(&world, "etc"));
    assert_eq!(mounts_below(&world.root).len(), 2, "only the overlay and its cover: {:?}", mounts(&world));
    assert_eq!(paths(state(&world).skipped.iter().map(|skipped| &skipped.path)), ["/var/log"]);
    assert_eq!(paths(&state(&world).deferred), ["/var/log"]);
}

fn a_target_on_a_disk_that_is_mounted_is_not_deferred() {
    let other = Disk::new(Fs::Ext4, 32);
    let world = World::new(TWO);
    fs::write(world.at("etc/fstab"), "LABEL=var /var ext4 rw 0 2\n").unwrap();
    fs::create_dir(other.path().join("log")).unwrap();
    fs::write(other.path().join("log/file"), "on the other disk").unwrap();
    tools::run("mount", &["--bind", other.path().to_str().unwrap(), world.at("var").to_str().unwrap()]);
    world.boot();
    assert!(is_overlay(&world, "var/log"));
    assert_eq!(fs::read_to_string(world.at("var/log/file")).unwrap(), "on the other disk");
}

fn everything_is_deferred_when_the_store_is() {
    let world = World::new(TWO);
    fs::write(world.at("etc/fstab"), "LABEL=keep /persist ext4 rw 0 2\n").unwrap();
    let output = early(&world);
    expect(&output, 3);
    for target in ["/etc", "/var/log"] {
        let why = "deferred: the store is on /persist, which is not mounted yet";
        said(&output, &format!("early: {target} skipped: {why}\n"));
    }
    assert_nothing_is_mounted(&world);
    assert!(!world.at("persist/ephemeral-overlay").exists(), "a store was made below a mount point");
}

fn a_tmpfs_that_fstab_mounts_is_left_to_it() {
    let world = World::new("");
    fs::write(world.at("etc/fstab"), "tmpfs /tmp tmpfs size=1G 0 0\n").unwrap();
    let output = early(&world);
    expect(&output, 3);
    said(&output, "early: /tmp skipped: fstab mounts it; remove one of the two\n");
    assert_eq!(mount_at(&world, "tmp"), None);
    assert_eq!(mount_at(&world, "var/tmp").unwrap().kind, "tmpfs");
}

/// Every target is mounted with all that belongs to it and known to syncd, or nothing of it is there.
fn assert_whole_or_absent(world: &World, what: &str) -> usize {
    let boot = BootState::read(&world.run.join("boot.json")).unwrap();
    let known: Vec<_> = boot.iter().flat_map(|boot| &boot.targets).map(|target| target.path.as_path()).collect();
    let targets = [("etc", "etc"), ("var/log", "var-log")];
    let whole = targets.into_iter().filter(|(target, name)| {
        let parts = [
            is_overlay(world, target),
            mount_in_run(world, &format!("lower/{name}")).is_some(),
            world.run.join("ram").join(name).exists(),
            known.contains(&Path::new("/").join(target).as_path()),
        ];
        assert!(parts == [true; 4] || parts == [false; 4], "{what}: /{target}: overlay, bind, RAM, known: {parts:?}");
        parts[0]
    });
    let whole = whole.count();
    for mount in mounts(world) {
        assert_eq!(mount.propagation, [""; 0], "{what}: {mount:?}");
    }
    whole
}

fn a_failing_target_is_undone_alone() {
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

fn a_damaged_token_skips_its_target_alone() {
    let world = World::new(TWO);
    set_xattr(&world.at("etc"), token::XATTR, b"not a token");
    let output = early(&world);
    expect(&output, 3);
    said(&output, "early: /etc skipped: ");
    assert_eq!(assert_whole_or_absent(&world, "a damaged token"), 1);
    assert_eq!(token(&world.run.join("lower/var-log")).map(|token| token.len()), Some(32));
}

fn without_its_tmpfs_nothing_is_half_done() {
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

fn whichever_call_fails_a_target_is_whole_or_not_there() {
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

const NO_NEW_CALLS: &str = "fsopen,fsconfig,fsmount,open_tree,move_mount:error=ENOSYS";

fn without_the_new_mount_calls_the_mounts_are_the_same_but_for_the_cover() {
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

fn without_the_new_mount_calls_a_cache_is_kept_too() {
    let world = World::new(CACHE);
    fs::create_dir(world.at("var/cache/pacman")).unwrap();
    fs::write(world.at("var/cache/pacman/one"), "1").unwrap();
    let output = early_with(&world, &[NO_NEW_CALLS]);
    expect(&output, 0);
    assert_eq!(mount_at(&world, "var/cache").unwrap().kind, "tmpfs");
    assert_eq!(fs::read_to_string(world.at("var/cache/pacman/one")).unwrap(), "1");
}

fn a_config_that_is_not_toml_mounts_nothing() {
    let world = World::new("");
    fs::write(world.at("etc/ephemeral-overlay.toml"), "[overlay]\nsize = \"50%\"\ndirs = [\"/etc\"\n[tmpfs]\n")
        .unwrap();
    let output = early_by_itself(&world);
    expect(&output, 1);
    said(&output, "/etc/ephemeral-overlay.toml:4: not valid TOML: ");
    said(&output, "; booting from disk\n");
    assert_nothing_is_mounted(&world);
    assert!(!world.run.join("boot.json").exists());
}

fn an_unknown_key_mounts_nothing_and_names_a_known_one() {
    let world = World::new("");
    fs::create_dir(world.at("etc/ephemeral-overlay.d")).unwrap();
    fs::write(world.at("etc/ephemeral-overlay.d/10-mine.toml"), "\n[overlay]\ndir = ['/etc']\n").unwrap();
    let output = early_by_itself(&world);
    expect(&output, 1);
    said(&output, "/etc/ephemeral-overlay.d/10-mine.toml:3: unknown key overlay.dir, did you mean dirs?");
    assert_nothing_is_mounted(&world);
}

fn a_bad_config_does_not_keep_a_chain_from_being_merged() {
    let (world, _) = with_a_pending_chain(ETC);
    fs::write(world.at("etc/ephemeral-overlay.toml"), "nonsense").unwrap();
    let output = early_by_itself(&world);
    expect(&output, 1);
    said(&output, "/etc/ephemeral-overlay.toml:1: not valid TOML: ");
    assert_nothing_is_mounted(&world);
    assert_eq!(fs::read_to_string(world.at("etc/made")).unwrap_or_default(), "in RAM", "it was not merged");
    assert!(!world.at("etc/removed").exists() && world.at("etc/remade/new").exists());
    assert!(world.checkpoints().is_empty());
    assert_eq!(fs::read_to_string(world.at("etc/ephemeral-overlay.toml")).unwrap(), "nonsense");
}

fn off_merges_and_mounts_nothing() {
    let (world, expected) = with_a_pending_chain(ETC);
    expect(&world.early_command("root=/dev/sda1 ephemeral_overlay=off quiet").output().unwrap(), 0);
    assert_nothing_is_mounted(&world);
    snapshot::assert_same(&expected, &snapshot::take(&world.at("etc")), "it was not merged");
    assert!(world.checkpoints().is_empty());
    assert!(!world.run.join("boot.json").exists(), "syncd would believe that the overlays are there");
}

fn nomerge_touches_nothing() {
    let (world, expected) = with_a_pending_chain(ETC);
    let before = snapshot::take(&world.root);
    expect(&world.early_command("ephemeral_overlay=nomerge").output().unwrap(), 0);
    assert_nothing_is_mounted(&world);
    snapshot::assert_same(&before, &snapshot::take(&world.root), "it touched the disk");
    assert_eq!(world.checkpoints().len(), 1);
    assert!(!world.run.exists());
    // Nothing is lost by it.
    world.boot();
    snapshot::assert_same(&expected, &snapshot::take(&world.at("etc")), "the boot after it");
}

fn a_value_that_is_not_known_is_off_and_is_reported() {
    let (world, expected) = with_a_pending_chain(ETC);
    let output = world.early_command("ephemeral_overlay=maybe").output().unwrap();
    assert_nothing_is_mounted(&world);
    snapshot::assert_same(&expected, &snapshot::take(&world.at("etc")), "it was not merged");
    said(&output, "maybe");
}

fn a_pending_chain_is_merged_before_the_mount() {
    let (world, expected) = with_a_pending_chain(ETC);
    world.boot();
    snapshot::assert_same(&expected, &snapshot::take(&world.at("etc")), "the view");
    snapshot::assert_same(&expected, &snapshot::take(&world.run.join("lower/etc")), "the disk");
    assert!(world.checkpoints().is_empty(), "the chain is still there");
    let names: Vec<_> = fs::read_dir(world.upper()).unwrap().collect();
    assert!(names.is_empty(), "upper does not start empty: {names:?}");
}

fn a_config_changed_in_ram_decides_the_next_boot() {
    let world = World::new("");
    fs::write(world.at("etc/ephemeral-overlay.toml"), TWO).unwrap();
    expect(&early_by_itself(&world), 0);
    assert!(is_overlay(&world, "var/log"));
    fs::write(world.at("etc/ephemeral-overlay.toml"), ETC).unwrap();
    world.checkpoint();
    world.cut();
    expect(&early_by_itself(&world), 0);
    assert!(is_overlay(&world, "etc") && mount_at(&world, "var/log").is_none(), "{:?}", mounts(&world));
}

fn a_target_that_is_no_longer_configured_is_merged() {
    let (world, expected) = with_a_pending_chain(ETC);
    world.configure(&format!("{TWO}overlay.dirs = ['/var/log']"));
    world.boot();
    assert!(is_overlay(&world, "var/log") && mount_at(&world, "etc").is_none(), "{:?}", mounts(&world));
    snapshot::assert_same(&expected, &snapshot::take(&world.at("etc")), "it was not merged");
    assert!(world.checkpoints().is_empty());
}

fn the_merge_uses_the_config_that_early_was_given() {
    let world = World::new(&format!("{ETC}persist.root = '/keep'"));
    world.boot();
    fs::write(world.at("etc/file"), "in RAM").unwrap();
    world.checkpoint();
    world.cut();
    assert!(world.at("keep/ephemeral-overlay/targets/etc").exists());
    world.boot();
    assert_eq!(fs::read_to_string(world.at("etc/file")).unwrap_or_default(), "in RAM", "the view");
    assert_eq!(fs::read_to_string(world.run.join("lower/etc/file")).unwrap_or_default(), "in RAM", "the disk");
}

fn a_chain_that_cannot_be_merged_is_unpacked() {
    // A root in a directory cannot be remounted at all, that of a disk with write protection is not.
    for is_mount in [false, true] {
        let (world, expected) = with_a_pending_chain(ETC);
        let disk = snapshot::take(&world.at("etc"));
        let store = snapshot::take(&world.store());
        let protected = WriteProtected::new(&world);
        if is_mount {
            make_mount_point(&world);
        }
        let output = early(&world);
        assert!(is_overlay(&world, "etc"), "{}", text(&output));
        snapshot::assert_same(&expected, &snapshot::take(&world.at("etc")), "the view");
        snapshot::assert_same(&disk, &snapshot::take(&world.run.join("lower/etc")), "the disk");
        snapshot::assert_same(&store, &snapshot::take(&world.store()), "the chain");
        said(&output, "merging pending checkpoints");
        let refused = String::from_utf8_lossy(&output.stderr).contains("mount -o remount,rw");
        assert_eq!(refused, is_mount, "{}", text(&output));
        expect(&output, 3);
        // With the disk as it was, it is merged as if nothing had happened.
        world.cut();
        drop(protected);
        remount(&world, "rw");
        world.boot();
        snapshot::assert_same(&expected, &snapshot::take(&world.run.join("lower/etc")), "the disk after the next boot");
        assert!(world.checkpoints().is_empty());
    }
}

fn a_store_that_cannot_be_read_is_not_an_empty_one() {
    for whole in [false, true] {
        let (world, expected) = with_a_pending_chain(ETC);
        let disk = snapshot::take(&world.at("etc"));
        let etc = world.store();
        let unreadable = if whole { etc.parent().unwrap() } else { &etc };
        let real = world.root.join("real");
        fs::rename(unreadable, &real).unwrap();
        // It leads to itself.
        symlink(unreadable.file_name().unwrap(), unreadable).unwrap();
        let output = early(&world);
        expect(&output, 3);
        assert!(!is_overlay(&world, "etc"), "mounted without its chain: {}", text(&output));
        said(&output, "etc skipped");
        snapshot::assert_same(&disk, &snapshot::take(&world.at("etc")), "the disk");
        world.cut();
        fs::remove_file(unreadable).unwrap();
        fs::rename(&real, unreadable).unwrap();
        world.boot();
        snapshot::assert_same(&expected, &snapshot::take(&world.at("etc")), "the view");
    }
}

/// Makes the root a mount of its own, as it is in every initramfs.
fn make_mount_point(world: &World) {
    let root = world.root.to_str().unwrap();
    tools::run("mount", &["--bind", root, root]);
}

fn a_read_only_root_is_writable_for_a_merge_only() {
    let (world, expected) = with_a_pending_chain(ETC);
    remount(&world, "ro");
    make_mount_point(&world);
    tools::run("mount", &["-o", "remount,bind,ro,nosuid,noatime", world.root.to_str().unwrap()]);
    let output = early(&world);
    expect(&output, 0);
    snapshot::assert_same(&expected, &snapshot::take(&world.at("etc")), "the view");
    snapshot::assert_same(&expected, &snapshot::take(&world.run.join("lower/etc")), "the disk");
    assert!(world.checkpoints().is_empty(), "it was not merged");
    assert!(is_read_only(&world), "the root was left writable");
    let flags = rustix::fs::statvfs(&world.root).unwrap().f_flag;
    for flag in [rustix::fs::StatVfsMountFlags::NOSUID, rustix::fs::StatVfsMountFlags::NOATIME] {
        assert!(flags.contains(flag), "a flag of the mount is gone: {flags:?}");
    }
    let other = world.root.with_file_name("probe");
    assert!(File::create(other).is_err(), "the file system was left writable");
}

fn without_syncd_a_pending_chain_keeps_its_target_on_disk() {
    let (world, expected) = with_a_pending_chain(TWO);
    let disk = snapshot::take(&world.at("etc"));
    let alone = tempfile::tempdir().unwrap();
    let copy = alone.path().join("early");
    tools::install(tools::early(), &copy);
    let mut command = Command::new(&copy);
    let output = command.args(world.early_command("").get_args()).env("PATH", alone.path()).output().unwrap();
    expect(&output, 3);
    said(&output, "merging pending checkpoints: execve ");
    said(&output, "early: /etc skipped: ");
    // Its overlay would show an older state, and a checkpoint of that would replace the newer one.
    assert_eq!(assert_whole_or_absent(&world, "no syncd"), 1);
    assert!(is_overlay(&world, "var/log"));
    snapshot::assert_same(&disk, &snapshot::take(&world.at("etc")), "the disk");
    assert_eq!(world.checkpoints().len(), 1);
    world.cut();
    world.boot();
    snapshot::assert_same(&expected, &snapshot::take(&world.at("etc")), "the view after the next boot");
}

fn a_pending_chain_on_a_read_only_root_is_seen() {
    let (world, expected) = with_a_pending_chain(ETC);
    remount(&world, "ro");
    let output = early(&world);
    assert!(is_overlay(&world, "etc"), "{}", text(&output));
    snapshot::assert_same(&expected, &snapshot::take(&world.at("etc")), "the view");
    assert!(is_read_only(&world), "the root was left writable");
}

fn an_ordinary_boot_from_a_read_only_root() {
    let world = World::new("");
    world.boot();
    world.cut();
    remount(&world, "ro");
    world.boot();
    assert!(is_overlay(&world, "etc") && is_overlay(&world, "var/log"));
    assert!(mount_in_run(&world, "store").is_some(), "the store is not bound");
    assert!(is_read_only(&world), "the root was left writable");
    fs::write(world.at("etc/file"), "in RAM").unwrap();
    // As systemd does before anything of the user starts.
    remount(&world, "rw");
    world.checkpoint();
    world.cut();
    world.boot();
    assert_eq!(fs::read_to_string(world.at("etc/file")).unwrap(), "in RAM");
}

fn a_first_boot_from_a_read_only_root() {
    let world = World::new(ETC);
    remount(&world, "ro");
    let output = early(&world);
    assert!(matches!(tools::code(&output), 0 | 3), "{}", text(&output));
    assert!(is_overlay(&world, "etc"), "{}", text(&output));
    assert!(is_read_only(&world), "the root was left writable");
    fs::write(world.at("etc/file"), "in RAM").unwrap();
    remount(&world, "rw");
    world.checkpoint();
    assert_eq!(mode(&world.at("persist/ephemeral-overlay")), 0o700);
    world.cut();
    world.boot();
    assert_eq!(fs::read_to_string(world.run.join("lower/etc/file")).unwrap(), "in RAM");
    assert!(token(&world.run.join("lower/etc")).is_some());
}

fn binds_of_a_read_only_root_become_writable_with_it() {
    let world = World::new(ETC);
    world.boot();
    world.cut();
    remount(&world, "ro");
    let output = early(&world);
    assert!(is_overlay(&world, "etc"), "{}", text(&output));
    fs::write(world.at("etc/file"), "in RAM").unwrap();
    remount(&world, "rw");
    world.checkpoint();
    unmount(world.at("etc"), UnmountFlags::empty()).unwrap();
    expect(&world.syncd(&["merge"]), 0);
    assert_eq!(fs::read_to_string(world.at("etc/file")).unwrap(), "in RAM");
}

fn a_wrong_command_line_is_a_usage_error() {
    let world = World::new(ETC);
    let root = world.root.to_str().unwrap();
    for (arguments, part) in [
        (vec![], "--root DIR is missing"),
        (vec!["--root"], "--root"),
        (vec!["--root", root, "--wipe"], "--wipe"),
        (vec!["--root", root, "extra"], "extra"),
        (vec!["--root", root, "--dry-run=yes"], "--dry-run"),
    ] {
        let output = Command::new(tools::early()).args(&arguments).output().unwrap();
        expect(&output, 2);
        said(&output, part);
        said(&output, "see early --help");
        assert!(output.stdout.is_empty());
    }
    assert_nothing_is_mounted(&world);
}

fn help_is_no_error() {
    for argument in ["--help", "-h"] {
        let output = Command::new(tools::early()).arg(argument).output().unwrap();
        expect(&output, 0);
        let help = String::from_utf8(output.stdout).unwrap();
        for option in ["--root", "--run-dir", "--config", "--cmdline", "--dry-run", "Exit status"] {
            assert!(help.contains(option), "{help}");
        }
        assert!(output.stderr.is_empty());
    }
}

fn a_root_that_does_not_exist_boots_from_disk() {
    let nowhere = tempfile::tempdir().unwrap();
    let (root, run) = (nowhere.path().join("root"), nowhere.path().join("run"));
    let mut command = Command::new(tools::early());
    let output = command.arg("--root").arg(&root).arg("--run-dir").arg(&run).args(["--cmdline", ""]).output().unwrap();
    expect(&output, 1);
    said(&output, root.to_str().unwrap());
    said(&output, "; booting from disk\n");
    assert!(!run.exists());
}

fn a_run_directory_that_overlayfs_cannot_name_is_refused() {
    let world = World::new(ETC);
    let run = world.run.with_file_name("a:b");
    let mut command = Command::new(tools::early());
    command.arg("--root").arg(&world.root).arg("--run-dir").arg(&run).args(["--cmdline", ""]);
    let output = command.output().unwrap();
    expect(&output, 1);
    said(&output, "must not contain");
    assert!(!run.exists());
    assert_nothing_is_mounted(&world);
}

fn binds_are_private_on_a_shared_root() {
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

fn a_root_without_its_counterpart_stays_on_disk() {
    let (world, expected) = with_a_pending_chain(ETC);
    fs::remove_file(world.at("usr/lib/ephemeral-overlay/counterpart")).unwrap();
    let output = early(&world);
    expect(&output, 1);
    said(&output, "nobody would save what is in RAM; booting from disk");
    assert_nothing_is_mounted(&world);
    snapshot::assert_same(&expected, &snapshot::take(&world.at("etc")), "it was not merged");
}

fn a_rescue_merges_and_mounts_nothing() {
    for cmdline in ["quiet emergency", "systemd.unit=rescue.target", "init=/bin/sh"] {
        let (world, expected) = with_a_pending_chain(ETC);
        let output = world.early_command(cmdline).output().unwrap();
        expect(&output, 1);
        said(&output, "booting from disk");
        assert_nothing_is_mounted(&world);
        snapshot::assert_same(&expected, &snapshot::take(&world.at("etc")), "it was not merged");
    }
}

fn the_roots_own_init_may_be_named() {
    for (name, target) in [("usr/lib/systemd/systemd", None), ("sbin/my-init", Some("/sbin/my-init"))] {
        let world = World::new(ETC);
        let path = world.at(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::create_dir_all(world.at("sbin")).unwrap();
        fs::write(&path, "").unwrap();
        if let Some(target) = target {
            // Absolute, as distributions make it: it must not lead to this machine's.
            std::os::unix::fs::symlink(target, world.at("sbin/init")).unwrap();
        }
        let output = world.early_command(&format!("init=/{name}")).output().unwrap();
        expect(&output, 0);
        assert!(is_overlay(&world, "etc"));
    }
}

fn after_two_boots_that_never_reached_syncd() {
    let world = World::new(ETC);
    for _ in 0..3 {
        // The first boot makes the store, in which the others are counted.
        world.boot();
        world.cut();
    }
    let output = early(&world);
    expect(&output, 1);
    said(&output, "the last 2 boots did not come as far as syncd");
    // This boot does: the next one is an ordinary one.
    expect(&world.syncd(&["booted"]), 0);
    world.boot();
    assert!(is_overlay(&world, "etc"));
    // To say so is no checkpoint, but the last one has its room from then on.
    fs::write(world.at("etc/new"), "new").unwrap();
    expect(&world.syncd(&["booted"]), 0);
    assert!(world.checkpoints().is_empty());
    assert!(world.at("persist/ephemeral-overlay/reserve").exists(), "there is no room for the last checkpoint");
}
