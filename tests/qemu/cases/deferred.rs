//! Targets on file systems that the initramfs does not mount: they come into RAM late, and go back to their own disk.

use anyhow::Context;

use super::Case;
use super::shutdown::{LATE, ORDINARY, WRITER};
use crate::console::Console;
use crate::disk::{Disk, Fs};
use crate::initramfs::Initramfs;
use crate::machine::{Boot, Machine, Setup};
use crate::tools;

pub(crate) const CASES: &[(&str, Case)] = &[
    ("a_separate_log_is_activated_late", separate_log),
    ("a_separate_var_is_activated_late", separate_var),
    ("with_a_separate_store_everything_is_activated_late", separate_store),
];

/// What is written before the checkpoint.
const CHANGE: &str = "write /etc/kept ram\nwrite /var/log/log ram\nrun logger --tag eo-test a message in RAM\n\
    run journalctl --sync\nrun syncd checkpoint";
/// Shows it.
const LOOK: &str = "mounts\ncat /etc/kept\ncat /var/log/log\nrun syncd status\n\
    sh journalctl --no-pager --output cat --identifier eo-test";

/// A machine with a second disk, mounted by this line of fstab.
fn machine(on: Setup, name: &str, fstab: &str) -> Machine {
    let files = [("/etc/kept", "disk\n"), ("/etc/fstab", fstab), ("/usr/local/bin/writer", WRITER), ORDINARY, LATE];
    Machine::new(on, name, &files)
}

/// A checkpoint and a cut, then a boot that shows it, and a shutdown. Neither disk was written to while the overlays
/// were there; afterwards each has what belongs to it, to the last words, and nothing is pending. `log` is where
/// `/var/log` is on the second disk, if it is there.
fn runs(mut machine: Machine, fs: Fs, log: Option<&str>) {
    let initramfs = Initramfs { also: Some(fs), ..Initramfs::default() };
    let boot = Boot { initramfs, ..Boot::default() };
    let console = machine.boot_and_cut(boot, &format!("{CHANGE}\n{LOOK}"));
    expect_overlays(&console);
    console.expect(console.exits().iter().all(|status| *status == "0"), "something failed");
    let text = |machine: &Machine, name: &str| match log {
        Some(log) => machine.other_disk(fs).file(&format!("{log}/{name}")),
        None => machine.disk().file(&format!("/var/log/{name}")),
    };
    assert_eq!(text(&machine, "log"), None, "it is on the disk already");
    assert_eq!(machine.disk().file("/etc/kept").as_deref(), Some("disk"));

    let console = machine.boot(boot, &format!("{LOOK}\nwrite /var/log/later later\nshutdown"));
    expect_overlays(&console);
    console.expect(console.file("/etc/kept").as_deref() == Some("ram"), "/etc is not as it was");
    console.expect(console.file("/var/log/log").as_deref() == Some("ram"), "/var/log is not as it was");
    console.expect(console.says("guest: OUT a message in RAM"), "the journal's message is not seen");
    assert_eq!(machine.disk().file("/etc/kept").as_deref(), Some("ram"));
    assert_eq!(text(&machine, "log").as_deref(), Some("ram"));
    assert_eq!(text(&machine, "later").as_deref(), Some("later"));
    for writer in ["ordinary", "late"] {
        let text = text(&machine, writer).unwrap_or_default();
        console.expect(text.ends_with("last words"), &format!("{writer} has lost its last words"));
    }
    for disk in [machine.disk(), machine.other_disk(fs)] {
        let pending = ["/etc", "/var/log"].map(|target| disk.checkpoints(target).len());
        assert_eq!(pending, [0, 0], "something is pending");
    }
}

/// They lie on top; a target that is a mount point itself has that below.
#[track_caller]
fn expect_overlays(console: &Console) {
    for target in ["/etc", "/var/log"] {
        let mounts = console.mounts(target);
        console.expect(
            mounts.last().is_some_and(|mount| mount.starts_with("overlay ")),
            &format!("{target}: no overlay: {mounts:?}"),
        );
    }
}

/// `/var/log` is a subvolume of its own, as archinstall makes it.
fn separate_log(on: Setup) {
    let mut machine = machine(on, "separate_log", "/dev/vdc /var/log btrfs subvol=@log 0 0\n");
    machine.add_disk(Fs::Btrfs, 256, |root| {
        let subvolume = root.join("@log");
        tools::run("btrfs", &["subvolume".as_ref(), "create".as_ref(), subvolume.as_os_str()])?;
        std::fs::create_dir(subvolume.join("journal")).context("mkdir journal")
    });
    runs(machine, Fs::Btrfs, Some("/@log"));
}

/// `/var` is on a disk of its own, and with it the tmpfs folders in it.
fn separate_var(on: Setup) {
    let mut machine = machine(on, "separate_var", "/dev/vdc /var ext4 defaults 0 0\n");
    let var = |disk: &Disk| disk.at("/var/.");
    let root = machine.disk();
    machine.add_disk(Fs::Ext4, 256, |disk| tools::run("cp", &["-a".into(), var(&root), disk.to_path_buf()]).map(drop));
    drop(root);
    runs(machine, Fs::Ext4, Some("/log"));
}

/// The store is on a disk of its own: nothing can be mounted before that is there.
fn separate_store(on: Setup) {
    let mut machine = machine(on, "separate_store", "/dev/vdc /persist ext4 defaults 0 0\n");
    machine.add_disk(Fs::Ext4, 128, |_| Ok(()));
    runs(machine, Fs::Ext4, None);
}
