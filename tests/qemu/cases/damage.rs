//! Boots with something broken: the machine comes up, says what it is, and loses nothing.

use super::{CHANGE, CHECKPOINT, Case, LOOK, expect_disk, expect_overlays, expect_pending, expect_view, machine};
use crate::machine::{Boot, Setup};

pub(crate) const CASES: &[(&str, Case)] = &[
    ("a_damaged_checkpoint_is_not_merged", damaged_checkpoint),
    ("a_full_disk_shows_the_checkpoint_from_ram", full_disk),
];

/// The target with the damage is as the disk has it, and its chain stays; the other one is merged.
fn damaged_checkpoint(on: Setup) {
    let mut machine = machine(on, "damaged_checkpoint");
    let damage = "sh for f in /persist/ephemeral-overlay/targets/etc/*.ckpt; do \
                  busybox dd if=/dev/zero of=$f bs=1 seek=200 count=8 conv=notrunc; done; sync";
    let console = machine.boot_and_cut(Boot::default(), &format!("{CHANGE}\n{CHECKPOINT}\n{damage}"));
    console.expect(console.exits() == ["0", "0"], "the damage was not done");
    let console = machine.boot(Boot::default(), &format!("{LOOK}\nshutdown"));
    console.expect(console.file("/etc/kept").as_deref() == Some("disk"), "/etc is not as on disk");
    console.expect(console.file("/etc/new").is_none(), "/etc is not as on disk");
    console.expect(console.file("/var/log/log").as_deref() == Some("ram"), "/var/log is not merged");
    console.expect(console.says("/etc"), "nothing was said of it");
    let disk = machine.disk();
    assert_eq!(disk.file("/etc/kept").as_deref(), Some("disk"));
    assert_eq!(disk.file("/var/log/log").as_deref(), Some("ram"));
    assert_eq!(disk.checkpoints("/etc").len(), 1, "the damaged checkpoint is gone");
}

/// The merge has no room: the boot shows the checkpoint from RAM. Once there is room, the next boot merges it.
fn full_disk(on: Setup) {
    let mut machine = machine(on, "full_disk");
    // Something that needs room, and then no room.
    let fill = "sh busybox dd if=/dev/urandom of=/etc/big bs=1M count=4; syncd checkpoint; \
                busybox dd if=/dev/zero of=/persist/fill bs=64k; busybox dd if=/dev/zero of=/persist/rest bs=1k; sync";
    machine.boot_and_cut(Boot::default(), &format!("{CHANGE}\n{fill}"));
    expect_pending(&machine.disk(), 1);
    let console = machine.boot(Boot::default(), &format!("{LOOK}\nshutdown"));
    expect_overlays(&console);
    expect_view(&console, true);
    expect_pending(&machine.disk(), 1);
    let free = "remove /persist/fill\nremove /persist/rest\nsync\nshutdown";
    machine.boot(Boot { cmdline: "rw ephemeral_overlay=nomerge", ..Boot::default() }, free);
    let console = machine.boot(Boot::default(), &format!("{LOOK}\nshutdown"));
    expect_view(&console, true);
    let disk = machine.disk();
    expect_disk(&disk, true);
    expect_pending(&disk, 0);
}
