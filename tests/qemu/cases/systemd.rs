//! Boots of a release of Debian with its systemd.

use super::Case;
use crate::console::Console;
use crate::debian::Suite;
use crate::disk::Disk;
use crate::initramfs::{Flavour, Initramfs};
use crate::machine::{Boot, MACHINE_ID, Machine, Setup, System};
use crate::narrate::step;

pub(crate) const CASES: &[(&str, Case)] = &[
    ("the_main_job_from_a_busybox_initramfs", |on| main_job(on, Flavour::Busybox)),
    ("the_main_job_from_a_systemd_initramfs", |on| main_job(on, Flavour::Systemd(suite(on)))),
    ("a_hanging_early_in_a_systemd_initramfs_is_given_up", hanging_early),
];

pub(super) fn suite(on: Setup) -> Suite {
    match on.system {
        System::Debian(suite) => suite,
        System::Minimal | System::OpenRc(_) => panic!("this is about a release of Debian"),
    }
}

/// What an administrator and the system change, all of it in `/etc` and `/var/log`.
const CHANGE: &str = "\
write /etc/kept ram
remove /etc/removed
run useradd --create-home anna
run logger --tag eo-test a message in RAM
run journalctl --sync";
/// Shows what is in RAM, and when the overlays came: before the root's own systemd.
const LOOK: &str = "\
mounts
cat /etc/kept
cat /etc/removed
sh grep '^anna:' /etc/passwd
sh journalctl --no-pager --output cat --identifier eo-test
sh echo overlays at $(stat --format %.6Y /run/initramfs/ephemeral-overlay/boot.json)
sh echo systemd at $(date +%s.%6N --date \"$(systemctl show --timestamp=us+utc --property UserspaceTimestamp --value)\")";

/// What was changed is in RAM only; a checkpoint survives a power cut; a clean shutdown leaves everything on disk and
/// nothing pending.
fn main_job(on: Setup, flavour: Flavour) {
    let files = [("/etc/kept", "disk\n"), ("/etc/removed", "disk\n")];
    step(&format!("1. A disk with Debian {}, our package in it, and an initramfs with the hook", suite(on).name()));
    let mut machine = Machine::new(on, &format!("main_job-{flavour:?}"), &files);
    let boot = Boot { initramfs: Initramfs { flavour, ..Initramfs::default() }, ..Boot::default() };
    step("2. The first boot. Everything that is changed goes to RAM. Then the power goes, without a checkpoint");
    let console = machine.boot_and_cut(boot, &format!("{CHANGE}\n{LOOK}\nsync"));
    expect_overlays_before_systemd(&console);
    expect_changed(&console);
    expect_disk(&machine.disk(), false);
    step("   Nothing of it is on the disk: the image was looked at from outside.");

    step("3. The same once more, with a checkpoint before the power goes");
    let console = machine.boot_and_cut(boot, &format!("{CHANGE}\nrun syncd checkpoint\n{LOOK}"));
    console.expect(!console.exits().contains(&"1"), "something failed");
    let disk = machine.disk();
    expect_disk(&disk, false);
    assert!(["/etc", "/var/log"].iter().all(|target| !disk.checkpoints(target).is_empty()), "no checkpoints");
    step("   /etc and /var/log on the disk are the old ones; the checkpoints are in the store.");

    step("4. The next boot shows all of it. A clean shutdown");
    let console = machine.boot(boot, &format!("{LOOK}\nwrite /etc/late later\nrun systemctl --failed\nshutdown"));
    expect_overlays_before_systemd(&console);
    expect_changed(&console);
    let disk = machine.disk();
    expect_disk(&disk, true);
    assert_eq!(disk.file("/etc/late").as_deref(), Some("later"), "what was written after the checkpoint");
    assert!(["/etc", "/var/log"].iter().all(|target| disk.checkpoints(target).is_empty()), "something is pending");
    step("   The disk has everything, to the last file; nothing is pending in the store.");
}

#[track_caller]
fn expect_overlays_before_systemd(console: &Console) {
    super::expect_overlays(console);
    let time = |what: &str| -> f64 {
        let line = console.lines.iter().find_map(|line| line.strip_prefix(&format!("guest: OUT {what} at ")));
        line.and_then(|text| text.trim().parse().ok()).unwrap_or_else(|| panic!("when {what} came{console}"))
    };
    console.expect(time("overlays") < time("systemd"), "the overlays came after systemd");
}

#[track_caller]
fn expect_changed(console: &Console) {
    console.expect(console.file("/etc/kept").as_deref() == Some("ram"), "the edit is not seen");
    console.expect(console.file("/etc/removed").is_none(), "the deletion is not seen");
    console.expect(console.says("guest: OUT anna:"), "the user is not seen");
    console.expect(console.says("guest: OUT a message in RAM"), "the journal's message is not seen");
}

#[track_caller]
fn expect_disk(disk: &Disk, changed: bool) {
    assert_eq!(disk.file("/etc/kept").as_deref(), Some(if changed { "ram" } else { "disk" }));
    assert_eq!(disk.file("/etc/removed").is_none(), changed, "/etc/removed");
    assert_eq!(disk.file("/etc/passwd").unwrap().contains("anna:"), changed, "the user");
    assert_eq!(journal_has(disk, "a message in RAM"), changed, "the journal's message");
}

/// Whether the journal on a disk has some text. Short messages are not compressed.
fn journal_has(disk: &Disk, text: &str) -> bool {
    let Ok(entries) = std::fs::read_dir(disk.at("/var/log/journal").join(MACHINE_ID)) else { return false };
    entries.flatten().any(|entry| {
        let bytes = std::fs::read(entry.path()).unwrap();
        bytes.windows(text.len()).any(|window| window == text.as_bytes())
    })
}

/// Says what the kernel knows of its sandbox, and then nothing any more. There is no program beside the shell for it.
const HANGING: &str = "\
#!/bin/sh
while read -r key value; do echo \"$key $value\"; done </proc/self/status >/run/status
exec sleep 100000
";

/// `early` does nothing for a minute: systemd ends it and goes on with the boot, from disk. The checkpoint stays.
fn hanging_early(on: Setup) {
    let mut machine = Machine::new(on, "hanging_early", &[("/etc/kept", "disk\n")]);
    machine.boot_and_cut(Boot::default(), "write /etc/kept ram\nrun syncd checkpoint");
    let flavour = Flavour::Systemd(suite(on));
    let initramfs = Initramfs { flavour, replaced: Some(("early", HANGING)), ..Initramfs::default() };
    let ended = "sh journalctl --boot --no-pager --unit ephemeral-overlay-early.service | grep --count 'timed out'";
    let console = machine.boot(
        Boot { initramfs, ..Boot::default() },
        &format!("mounts\ncat /etc/kept\ncat /run/status\n{ended}\nshutdown"),
    );
    console.expect(console.exits() == ["0"], "it was not systemd that ended it");
    for line in ["NoNewPrivs: 1", "Seccomp: 2"] {
        console.expect(console.says(line), "the initramfs has no sandbox for it");
    }
    console.expect(console.mounts("/etc").is_empty(), "there is an overlay");
    console.expect(console.file("/etc/kept").as_deref() == Some("disk"), "the disk is not what it was");
    assert!(!machine.disk().checkpoints("/etc").is_empty(), "the checkpoint is gone");
}
