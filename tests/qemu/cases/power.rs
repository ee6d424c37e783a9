//! Boots, power cuts and clean shutdowns of a healthy machine.

use super::{
    CHANGE, CHECKPOINT, Case, LAST_STAGE, LOOK, expect_disk, expect_overlays, expect_pending, expect_view, machine,
    machine_with_checkpoint,
};
use crate::machine::{Boot, Machine, Setup};

pub(crate) const CASES: &[(&str, Case)] = &[
    ("a_fresh_boot_mounts_everything", fresh_boot),
    ("a_checkpoint_survives_a_power_cut", checkpoint_and_cut),
    ("without_a_checkpoint_a_power_cut_loses_it", cut_without_checkpoint),
    ("a_poweroff_without_the_last_stage_leaves_the_checkpoint", poweroff_without_last_stage),
    ("the_last_stage_leaves_nothing_pending", last_stage),
    ("the_device_below_the_root_is_closed", device_closed),
    ("a_read_only_root_is_written_to_for_the_merge_only", read_only_root),
    ("a_kernel_without_random_numbers_boots", no_entropy),
];

/// The overlays and the tmpfs folders are there before the root's init does anything; the disk keeps its contents.
fn fresh_boot(on: Setup) {
    let mut machine = machine(on, "fresh_boot");
    let console = machine.boot(Boot::default(), &format!("{LOOK}\nrun syncd status\nshutdown"));
    expect_overlays(&console);
    for path in ["/tmp", "/var/tmp", "/var/cache"] {
        console.expect(console.mounts(path).iter().any(|mount| mount.starts_with("tmpfs ")), path);
    }
    expect_view(&console, false);
    console.expect(console.exits() == ["0"], "syncd status has something to complain about");
    let disk = machine.disk();
    expect_disk(&disk, false);
    expect_pending(&disk, 0);
}

/// Cut: the disk is the old one. Next boot: exactly the checkpoint, on disk too, and nothing is pending.
fn checkpoint_and_cut(on: Setup) {
    let mut machine = machine(on, "checkpoint_and_cut");
    let script = format!("{CHANGE}\n{CHECKPOINT}\nwrite /etc/kept later\nwrite /etc/late later");
    let console = machine.boot_and_cut(Boot::default(), &script);
    console.expect(console.exits() == ["0"], "the checkpoint failed");
    let disk = machine.disk();
    expect_disk(&disk, false);
    expect_pending(&disk, 1);

    let console = machine.boot(Boot::default(), &format!("{LOOK}\ncat /etc/late"));
    expect_overlays(&console);
    expect_view(&console, true);
    assert_eq!(console.file("/etc/late"), None);
    let disk = machine.disk();
    expect_disk(&disk, true);
    expect_pending(&disk, 0);
}

/// Cut: the disk and the next boot are the old ones.
fn cut_without_checkpoint(on: Setup) {
    let mut machine = machine(on, "cut_without_checkpoint");
    machine.boot_and_cut(Boot::default(), &format!("{CHANGE}\nsync"));
    let console = machine.boot(Boot::default(), LOOK);
    expect_overlays(&console);
    expect_view(&console, false);
    expect_disk(&machine.disk(), false);
}

/// Nothing runs at the end: the disk is the old one, the checkpoint is pending, the next boot shows and merges it.
fn poweroff_without_last_stage(on: Setup) {
    let mut machine = machine(on, "poweroff_without_last_stage");
    let console = machine.boot(Boot::default(), &format!("{CHANGE}\n{CHECKPOINT}\nwrite /etc/late later\nshutdown"));
    console.expect(!console.says("BUSY"), "something could not be unmounted");
    let disk = machine.disk();
    expect_disk(&disk, false);
    expect_pending(&disk, 1);
    let console = machine.boot(Boot::default(), &format!("{LOOK}\ncat /etc/late\nshutdown"));
    expect_view(&console, true);
    assert_eq!(console.file("/etc/late"), None);
    expect_disk(&machine.disk(), true);
}

/// What was written last, without any checkpoint, is on disk; nothing is pending; a boot without us shows the same.
fn last_stage(on: Setup) {
    let files: Vec<_> = super::FILES.into_iter().chain([LAST_STAGE]).collect();
    let mut machine = Machine::new(on, "last_stage", &files);
    let script = format!("write /etc/kept earlier\n{CHECKPOINT}\nspawn busybox sleep 1000\n{CHANGE}\nshutdown");
    let console = machine.boot(Boot::default(), &script);
    console
        .expect(console.says("LAST /usr/lib/systemd/system-shutdown/ephemeral-overlay exit status: 0"), "last stage");
    let disk = machine.disk();
    expect_disk(&disk, true);
    expect_pending(&disk, 0);
    let boot = Boot { cmdline: "rw ephemeral_overlay=nomerge", ..Boot::default() };
    let console = machine.boot(boot, &format!("{LOOK}\nshutdown"));
    expect_view(&console, true);
}

/// The root is on a device-mapper device, as with LUKS and LVM: after the last stage nothing holds it, and it can be
/// closed. Everything is on the disk.
fn device_closed(on: Setup) {
    let files: Vec<_> = super::FILES.into_iter().chain([LAST_STAGE]).collect();
    let mut machine = Machine::new(on, "device_closed", &files);
    let boot = Boot { cmdline: "rw test.dm", ..Boot::default() };
    let console = machine.boot(boot, &format!("mounts\n{CHANGE}\nshutdown"));
    expect_overlays(&console);
    console.expect(console.says("shutdown: the root's device is closed"), "something holds the root's device");
    let disk = machine.disk();
    expect_disk(&disk, true);
    expect_pending(&disk, 0);
}

/// The root may be written to while it is merged into, and only then: the boot shows the checkpoint, the disk has it,
/// and what is started finds the root as read-only as the command line says.
fn read_only_root(on: Setup) {
    let mut machine = machine_with_checkpoint(on, "read_only_root");
    let console = machine.boot(Boot { cmdline: "ro", ..Boot::default() }, &format!("{LOOK}\nshutdown"));
    expect_overlays(&console);
    expect_view(&console, true);
    let root = console.mounts("/");
    let is_read_only = |mount: &&str| mount.split([' ', ',']).any(|word| word == "ro");
    console.expect(root.last().is_some_and(is_read_only), "the root is not read-only any more");
    let disk = machine.disk();
    expect_disk(&disk, true);
    expect_pending(&disk, 0);
}

/// The kernel's random numbers come late, or never: that is no reason to wait.
fn no_entropy(on: Setup) {
    let mut machine = machine(on, "no_entropy");
    let boot = Boot { entropy: false, ..Boot::default() };
    let console = machine.boot(boot, &format!("{CHANGE}\n{LOOK}\n{CHECKPOINT}\nshutdown"));
    expect_overlays(&console);
    expect_view(&console, true);
    console.expect(console.exits() == ["0"], "the checkpoint failed");
}
