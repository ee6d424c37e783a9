//! Boots with something broken: the machine comes up, says what it is, and loses nothing.

use super::{
    CHANGE, CHECKPOINT, Case, FILES, LAST_STAGE, LOOK, expect_disk, expect_overlays, expect_pending, expect_view,
    machine, machine_with_checkpoint,
};
use crate::initramfs::Initramfs;
use crate::machine::{Boot, Machine, Setup};
use crate::tools;
use crate::vm::Fault;

pub(crate) const CASES: &[(&str, Case)] = &[
    ("a_damaged_checkpoint_is_not_merged", damaged_checkpoint),
    ("a_full_disk_shows_the_checkpoint_from_ram", full_disk),
    ("a_full_store_has_room_for_the_last_checkpoint", full_store),
    ("a_merge_that_stalls_is_shown_from_ram", stalled_merge),
    ("a_newer_format_is_left_alone", newer_format),
    ("a_checkpoint_of_another_state_of_the_disk_is_set_aside", restored_image),
    ("a_disk_that_refuses_writes_shows_the_checkpoint_from_ram", disk_refuses_writes),
    ("a_checkpoint_that_cannot_be_read_is_kept", checkpoint_cannot_be_read),
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
    // On XFS there was no room for the second one's name.
    let free = "sh busybox rm -f /persist/fill /persist/rest\nsync\nshutdown";
    machine.boot(Boot { cmdline: "rw ephemeral_overlay=nomerge", ..Boot::default() }, free);
    let console = machine.boot(Boot::default(), &format!("{LOOK}\nshutdown"));
    expect_view(&console, true);
    let disk = machine.disk();
    expect_disk(&disk, true);
    expect_pending(&disk, 0);
}

/// The merge does not get on for half a minute: it is given up, and the boot shows the checkpoint from RAM. The next one
/// merges it.
fn stalled_merge(on: Setup) {
    let mut machine = machine_with_checkpoint(on, "stalled_merge");
    let script = "#!/bin/sh\n[ \"$1\" = merge ] && exec sleep 100000\nexec \"$0.real\" \"$@\"\n";
    let initramfs = Initramfs { replaced: Some(("syncd", script)), ..Initramfs::default() };
    let console = machine.boot(Boot { initramfs, ..Boot::default() }, &format!("{LOOK}\nshutdown"));
    console.expect(console.says("no progress for 30 seconds"), "nothing was said of it");
    expect_overlays(&console);
    expect_view(&console, true);
    let disk = machine.disk();
    expect_disk(&disk, false);
    expect_pending(&disk, 1);
    let console = machine.boot(Boot::default(), &format!("{LOOK}\nshutdown"));
    expect_view(&console, true);
    expect_pending(&machine.disk(), 0);
}

/// A checkpoint of a newer format: the target stays as on disk, the checkpoint stays, and it is said what to do.
fn newer_format(on: Setup) {
    let mut machine = machine_with_checkpoint(on, "newer_format");
    edit_checkpoints(&machine, |bytes| bytes[8..12].copy_from_slice(&u32::MAX.to_le_bytes()));
    let console = machine.boot(Boot::default(), &format!("{LOOK}\nshutdown"));
    console.expect(console.file("/etc/kept").as_deref() == Some("disk"), "/etc is not as on disk");
    console.expect(console.says("newer"), "nothing was said of it");
    let disk = machine.disk();
    expect_disk(&disk, false);
    expect_pending(&disk, 1);
}

/// `/etc` alone was restored from an older image: the checkpoint of the newer state is not merged into it, but kept.
fn restored_image(on: Setup) {
    let mut machine = machine(on, "restored_image");
    // The first boot gives the disk its token.
    machine.boot(Boot::default(), "sync\nshutdown");
    let older = machine.copy("older");
    machine.boot_and_cut(Boot::default(), &format!("write /etc/kept earlier\n{CHECKPOINT}"));
    // Merged: the disk has another token now, and the next checkpoint names it.
    machine.boot_and_cut(Boot::default(), &format!("{CHANGE}\n{CHECKPOINT}"));
    let older = older.disk();
    machine.edit(|root| {
        tools::run("rm", &["-r".into(), root.join("etc")])?;
        tools::run("cp", &["-a".into(), older.at("/etc"), root.join("etc")]).map(drop)
    });
    let console = machine.boot(Boot::default(), &format!("{LOOK}\nshutdown"));
    console.expect(console.file("/etc/kept").as_deref() == Some("disk"), "/etc is not as it was restored");
    console.expect(console.file("/etc/new").is_none(), "/etc is not as it was restored");
    console.expect(console.file("/var/log/log").as_deref() == Some("ram"), "/var/log is not merged");
    let disk = machine.disk();
    assert_eq!(disk.file("/etc/kept").as_deref(), Some("disk"));
    expect_pending(&disk, 0);
    let aside = std::fs::read_dir(disk.store("/etc").join("aside")).map(Iterator::count);
    assert_eq!(aside.ok(), Some(1), "the checkpoint was not kept");
}

/// The disk takes no write at all: the boot shows the checkpoint from RAM, and the disk is what it was.
fn disk_refuses_writes(on: Setup) {
    let mut machine = machine_with_checkpoint(on, "disk_refuses_writes");
    // Without a log to be replayed it can be mounted all the same.
    machine.edit(|_| Ok(()));
    let boot = Boot { faults: &[Fault::Writes], cmdline: "ro", ..Boot::default() };
    let console = machine.try_boot(boot, LOOK);
    expect_overlays(&console);
    expect_view(&console, true);
    let console = machine.boot(Boot::default(), &format!("{LOOK}\nshutdown"));
    expect_view(&console, true);
    let disk = machine.disk();
    expect_disk(&disk, true);
    expect_pending(&disk, 0);
}

/// The checkpoint of `/etc` cannot be read: that target stays as on disk, with its checkpoint. The other one is merged.
fn checkpoint_cannot_be_read(on: Setup) {
    let mut machine = machine(on, "checkpoint_cannot_be_read");
    // Large enough to have sectors of its own on every file system.
    let large = "sh busybox dd if=/dev/urandom of=/etc/large bs=64k count=1";
    machine.boot_and_cut(Boot::default(), &format!("{CHANGE}\n{large}\n{CHECKPOINT}"));
    let disk = machine.disk();
    let checkpoint = std::fs::read(disk.store("/etc").join(&disk.checkpoints("/etc")[0])).unwrap();
    let sectors = machine.sectors_with(&checkpoint[..512]);
    assert!(!sectors.is_empty(), "the checkpoint is not found on the disk");
    let faults: Vec<_> = sectors.into_iter().map(|sector| Fault::Reads { sector }).collect();
    let boot = Boot { faults: &faults, ..Boot::default() };
    let console = machine.try_boot(boot, &format!("{LOOK}\nshutdown"));
    console.expect(console.file("/etc/kept").as_deref() == Some("disk"), "/etc is not as on disk");
    console.expect(console.file("/var/log/log").as_deref() == Some("ram"), "/var/log is not merged");
    let disk = machine.disk();
    assert_eq!(disk.file("/etc/kept").as_deref(), Some("disk"));
    assert_eq!(disk.checkpoints("/etc").len(), 1, "the checkpoint is gone");
    // A disk that can be read again has lost nothing.
    let console = machine.boot(Boot::default(), &format!("{LOOK}\nshutdown"));
    expect_view(&console, true);
}

/// The disk is full while the system runs: a checkpoint fails, loudly, and loses nothing; the last one, at shutdown,
/// takes the room that was kept for it, and the next boot shows everything.
fn full_store(on: Setup) {
    let files: Vec<_> = FILES.into_iter().chain([LAST_STAGE]).collect();
    let mut machine = Machine::new(on, "full_store", &files);
    let fill =
        "sh busybox dd if=/dev/zero of=/persist/fill bs=64k; busybox dd if=/dev/zero of=/persist/rest bs=1k; sync";
    let script = format!(
        "write /etc/kept earlier\n{CHECKPOINT}\n{fill}\n{CHANGE}\n\
         sh busybox dd if=/dev/urandom of=/etc/big bs=1M count=1\n{CHECKPOINT}\nshutdown"
    );
    let console = machine.boot(Boot::default(), &script);
    console.expect(console.exits().last() == Some(&"1"), "the checkpoint had room");
    console.expect(console.says("No space left on device"), "nothing was said of it");
    let console = machine.boot(Boot::default(), &format!("{LOOK}\nsh wc -c </etc/big"));
    expect_view(&console, true);
    console.expect(console.says("OUT 1048576"), "what was written last is lost");
}

/// Changes the bytes of every checkpoint on a machine's disk.
fn edit_checkpoints(machine: &Machine, change: impl Fn(&mut [u8])) {
    machine.edit(|root| {
        for target in ["etc", "var-log"] {
            for entry in std::fs::read_dir(root.join("persist/ephemeral-overlay/targets").join(target))? {
                let path = entry?.path();
                if path.extension().is_some_and(|extension| extension == "ckpt") {
                    let mut bytes = std::fs::read(&path)?;
                    change(&mut bytes);
                    std::fs::write(&path, bytes)?;
                }
            }
        }
        Ok(())
    });
}
