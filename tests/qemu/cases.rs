//! The boots. Each test says the end state that it wants.

pub(crate) mod cost;
mod cut;
mod damage;
mod deferred;
mod exact;
mod harness;
mod inits;
mod live;
mod openrc;
mod power;
mod refusal;
mod sessions;
mod shutdown;
mod systemd;

use crate::console::Console;
use crate::disk::Disk;
use crate::machine::{Boot, Machine, Setup};

/// A test, wherever it boots.
pub(crate) type Case = fn(Setup);

/// Those of a small system, with the module that each is in.
pub(crate) const MINIMAL: [(&str, &[(&str, Case)]); 8] = [
    ("harness", harness::CASES),
    ("power", power::CASES),
    ("refusal", refusal::CASES),
    ("damage", damage::CASES),
    ("exact", exact::CASES),
    ("cut", cut::CASES),
    ("inits", inits::CASES),
    ("live", live::CASES),
];
/// Those of a release of Debian with OpenRC.
pub(crate) const OPENRC: (&str, &[(&str, Case)]) = ("openrc", openrc::CASES);
/// Those of a release of Debian.
pub(crate) const DEBIAN: [(&str, &[(&str, Case)]); 4] = [
    ("systemd", systemd::CASES),
    ("shutdown", shutdown::CASES),
    ("deferred", deferred::CASES),
    ("sessions", sessions::CASES),
];

/// What is in `/etc` of a fresh disk.
const FILES: [(&str, &str); 2] = [("/etc/kept", "disk\n"), ("/etc/removed", "disk\n")];
/// Changes of every kind.
const CHANGE: &str = "write /etc/kept ram\nwrite /etc/new ram\nremove /etc/removed\nwrite /var/log/log ram";
/// Shows what `CHANGE` changes.
const LOOK: &str = "mounts\ncat /etc/kept\ncat /etc/new\ncat /etc/removed\ncat /var/log/log";
/// Takes a checkpoint.
const CHECKPOINT: &str = "run syncd checkpoint";

/// What runs last in a shutdown.
const LAST_STAGE: (&str, &str) =
    ("/usr/lib/systemd/system-shutdown/ephemeral-overlay", include_str!("../../systemd/system-shutdown.sh"));

/// A machine with `FILES` on its disk.
fn machine(on: Setup, name: &str) -> Machine {
    Machine::new(on, name, &FILES)
}

/// A machine that was cut off with a checkpoint pending: its disk is the old one, the checkpoint has `CHANGE`.
fn machine_with_checkpoint(on: Setup, name: &str) -> Machine {
    let mut machine = machine(on, name);
    let console = machine.boot_and_cut(Boot::default(), &format!("{CHANGE}\n{CHECKPOINT}"));
    console.expect(console.exits() == ["0"], "the checkpoint failed");
    machine
}

/// The overlays are there, each on its cover.
#[track_caller]
fn expect_overlays(console: &Console) {
    for target in ["/etc", "/var/log"] {
        let mounts = console.mounts(target);
        console.expect(
            matches!(mounts[..], [cover, overlay] if cover.contains(" ro") && overlay.starts_with("overlay ")),
            &format!("{target}: no overlay, or not one: {mounts:?}"),
        );
    }
}

/// Nothing of ours is mounted.
#[track_caller]
fn expect_nothing_mounted(console: &Console) {
    for path in ["/etc", "/var/log", "/tmp", "/var/tmp", "/var/cache"] {
        let mounts = console.mounts(path);
        console.expect(mounts.is_empty(), &format!("something is mounted on {path}: {mounts:?}"));
    }
}

/// What the system saw is the disk of the beginning, or that with `CHANGE`.
#[track_caller]
fn expect_view(console: &Console, changed: bool) {
    let files = ["/etc/kept", "/etc/new", "/etc/removed", "/var/log/log"].map(|path| console.file(path));
    console.expect(files.each_ref().map(Option::as_deref) == state(changed), &format!("it saw {files:?}"));
}

/// What is on the disk is the state of the beginning, or that with `CHANGE`.
#[track_caller]
fn expect_disk(disk: &Disk, changed: bool) {
    let files = ["/etc/kept", "/etc/new", "/etc/removed", "/var/log/log"].map(|path| disk.file(path));
    assert_eq!(files.each_ref().map(Option::as_deref), state(changed), "on disk");
}

fn state(changed: bool) -> [Option<&'static str>; 4] {
    if changed { [Some("ram"), Some("ram"), None, Some("ram")] } else { [Some("disk"), None, Some("disk"), None] }
}

/// How many checkpoints wait for each target.
#[track_caller]
fn expect_pending(disk: &Disk, count: usize) {
    let pending = ["/etc", "/var/log"].map(|target| disk.checkpoints(target).len());
    assert_eq!(pending, [count; 2], "pending checkpoints of /etc and /var/log");
}
