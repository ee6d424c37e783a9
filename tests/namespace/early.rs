//! `early` as its user and an initramfs meet it: what it mounts and how, what it leaves alone, what it says, and that
//! whatever fails, every target is either mounted whole or on disk as if nothing had been tried.

mod cache;
mod chains;
mod faults;
mod mounted;
mod read_only;
mod skipped;
mod standing;
mod table;
mod usage;

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use ephemeral_overlay::attributes::{Handle, Xattrs};
use ephemeral_overlay::state::BootState;
use ephemeral_overlay::token;

use crate::tools::{self, text};
use crate::world::World;
use test_support::snapshot;

pub(crate) const TESTS: &[(&str, fn())] = &[
    ("the_defaults_mount_two_overlays_and_three_tmpfs", mounted::the_defaults_mount_two_overlays_and_three_tmpfs),
    ("boot_json_says_what_was_mounted", mounted::boot_json_says_what_was_mounted),
    ("a_tmpfs_has_the_mode_and_owner_of_what_it_hides", mounted::a_tmpfs_has_the_mode_and_owner_of_what_it_hides),
    ("the_upper_root_is_like_the_lower_root", mounted::the_upper_root_is_like_the_lower_root),
    ("the_token_is_made_once_and_kept", mounted::the_token_is_made_once_and_kept),
    ("what_we_make_is_for_root_alone", mounted::what_we_make_is_for_root_alone),
    ("a_target_may_have_any_name", mounted::a_target_may_have_any_name),
    ("a_root_without_its_counterpart_stays_on_disk", standing::a_root_without_its_counterpart_stays_on_disk),
    ("a_rescue_merges_and_mounts_nothing", standing::a_rescue_merges_and_mounts_nothing),
    ("the_roots_own_init_may_be_named", standing::the_roots_own_init_may_be_named),
    ("after_two_boots_that_never_reached_syncd_it_stays_on_disk", standing::after_two_boots_that_never_reached_syncd),
    ("a_passthrough_stays_on_disk", mounted::a_passthrough_stays_on_disk),
    ("what_is_mounted_is_to_stay_until_the_last_stage", mounted::what_is_mounted_is_to_stay_until_the_last_stage),
    ("a_passthrough_that_is_missing_is_skipped_alone", skipped::a_passthrough_that_is_missing_is_skipped_alone),
    ("a_target_for_logins_is_not_mounted_at_boot", skipped::a_target_for_logins_is_not_mounted_at_boot),
    ("nothing_configured_mounts_nothing", skipped::nothing_configured_mounts_nothing),
    ("a_dry_run_prints_the_plan_and_changes_nothing", usage::a_dry_run_prints_the_plan_and_changes_nothing),
    ("a_second_run_changes_nothing", mounted::a_second_run_changes_nothing),
    ("the_cache_starts_with_directories_and_no_files", cache::the_cache_starts_with_directories_and_no_files),
    ("a_kept_cache_is_moved_once_and_bound", cache::a_kept_cache_is_moved_once_and_bound),
    ("a_kept_cache_on_another_disk_stays_where_it_is", cache::a_kept_cache_on_another_disk_stays_where_it_is),
    ("a_kept_cache_is_not_lost_when_the_tmpfs_fails", cache::a_kept_cache_is_not_lost_when_the_tmpfs_fails),
    ("a_symlink_is_skipped_alone", skipped::a_symlink_is_skipped_alone),
    ("a_target_below_a_symlink_is_skipped", skipped::a_target_below_a_symlink_is_skipped),
    ("a_target_that_is_a_mount_point_is_skipped", skipped::a_target_that_is_a_mount_point_is_skipped),
    ("a_target_that_is_no_directory_is_skipped", skipped::a_target_that_is_no_directory_is_skipped),
    ("a_target_that_fstab_mounts_later_is_deferred", skipped::a_target_that_fstab_mounts_later_is_deferred),
    ("a_target_on_a_disk_that_is_mounted_is_not_deferred", skipped::a_target_on_a_disk_that_is_mounted_is_not_deferred),
    ("everything_is_deferred_when_the_store_is", skipped::everything_is_deferred_when_the_store_is),
    ("a_tmpfs_that_fstab_mounts_is_left_to_it", skipped::a_tmpfs_that_fstab_mounts_is_left_to_it),
    ("a_failing_target_is_undone_alone", faults::a_failing_target_is_undone_alone),
    ("a_damaged_token_skips_its_target_alone", faults::a_damaged_token_skips_its_target_alone),
    ("without_its_tmpfs_nothing_is_half_done", faults::without_its_tmpfs_nothing_is_half_done),
    (
        "whichever_call_fails_a_target_is_whole_or_not_there",
        faults::whichever_call_fails_a_target_is_whole_or_not_there,
    ),
    (
        "without_the_new_mount_calls_the_mounts_are_the_same_but_for_the_cover",
        faults::without_the_new_mount_calls_the_mounts_are_the_same_but_for_the_cover,
    ),
    ("without_the_new_mount_calls_a_cache_is_kept_too", cache::without_the_new_mount_calls_a_cache_is_kept_too),
    ("a_config_that_is_not_toml_mounts_nothing", standing::a_config_that_is_not_toml_mounts_nothing),
    (
        "an_unknown_key_mounts_nothing_and_names_a_known_one",
        standing::an_unknown_key_mounts_nothing_and_names_a_known_one,
    ),
    (
        "a_bad_config_does_not_keep_a_chain_from_being_merged",
        standing::a_bad_config_does_not_keep_a_chain_from_being_merged,
    ),
    ("off_merges_and_mounts_nothing", standing::off_merges_and_mounts_nothing),
    ("nomerge_touches_nothing", standing::nomerge_touches_nothing),
    ("a_value_that_is_not_known_is_off_and_is_reported", standing::a_value_that_is_not_known_is_off_and_is_reported),
    ("a_pending_chain_is_merged_before_the_mount", chains::a_pending_chain_is_merged_before_the_mount),
    ("a_config_changed_in_ram_decides_the_next_boot", chains::a_config_changed_in_ram_decides_the_next_boot),
    ("a_target_that_is_no_longer_configured_is_merged", chains::a_target_that_is_no_longer_configured_is_merged),
    ("the_merge_uses_the_config_that_early_was_given", chains::the_merge_uses_the_config_that_early_was_given),
    ("a_chain_that_cannot_be_merged_is_unpacked", chains::a_chain_that_cannot_be_merged_is_unpacked),
    ("a_store_that_cannot_be_read_is_not_an_empty_one", chains::a_store_that_cannot_be_read_is_not_an_empty_one),
    (
        "without_syncd_a_pending_chain_keeps_its_target_on_disk",
        chains::without_syncd_a_pending_chain_keeps_its_target_on_disk,
    ),
    ("a_pending_chain_on_a_read_only_root_is_seen", read_only::a_pending_chain_on_a_read_only_root_is_seen),
    ("a_read_only_root_is_writable_for_a_merge_only", read_only::a_read_only_root_is_writable_for_a_merge_only),
    ("an_ordinary_boot_from_a_read_only_root", read_only::an_ordinary_boot_from_a_read_only_root),
    ("a_first_boot_from_a_read_only_root", read_only::a_first_boot_from_a_read_only_root),
    ("binds_of_a_read_only_root_become_writable_with_it", read_only::binds_of_a_read_only_root_become_writable_with_it),
    ("a_wrong_command_line_is_a_usage_error", usage::a_wrong_command_line_is_a_usage_error),
    ("help_is_no_error", usage::help_is_no_error),
    ("a_root_that_does_not_exist_boots_from_disk", usage::a_root_that_does_not_exist_boots_from_disk),
    (
        "a_run_directory_that_overlayfs_cannot_name_is_refused",
        usage::a_run_directory_that_overlayfs_cannot_name_is_refused,
    ),
    ("binds_are_private_on_a_shared_root", mounted::binds_are_private_on_a_shared_root),
];

/// `/etc` and `/var/log`, and no tmpfs.
const TWO: &str = "tmpfs = { '/tmp' = false, '/var/tmp' = false, '/var/cache' = false }\n";

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

const NO_NEW_CALLS: &str = "fsopen,fsconfig,fsmount,open_tree,move_mount:error=ENOSYS";

/// Makes the root a mount of its own, as it is in every initramfs.
fn make_mount_point(world: &World) {
    let root = world.root.to_str().unwrap();
    tools::run("mount", &["--bind", root, root]);
}
