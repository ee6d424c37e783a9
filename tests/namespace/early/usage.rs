//! The command line, and the dry run.

use std::process::Command;

use super::table::assert_nothing_is_mounted;
use super::{said, token, with_a_pending_chain};
use crate::tools;
use crate::world::{ETC, World, expect};
use test_support::snapshot;

pub(super) fn a_dry_run_prints_the_plan_and_changes_nothing() {
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

pub(super) fn a_wrong_command_line_is_a_usage_error() {
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

pub(super) fn help_is_no_error() {
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

pub(super) fn a_root_that_does_not_exist_boots_from_disk() {
    let nowhere = tempfile::tempdir().unwrap();
    let (root, run) = (nowhere.path().join("root"), nowhere.path().join("run"));
    let mut command = Command::new(tools::early());
    let output = command.arg("--root").arg(&root).arg("--run-dir").arg(&run).args(["--cmdline", ""]).output().unwrap();
    expect(&output, 1);
    said(&output, root.to_str().unwrap());
    said(&output, "; booting from disk\n");
    assert!(!run.exists());
}

pub(super) fn a_run_directory_that_overlayfs_cannot_name_is_refused() {
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
