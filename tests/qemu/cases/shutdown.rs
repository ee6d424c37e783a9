//! The end of a shutdown under systemd: the last words of everything that writes until it is stopped are on the disk.

use std::process::Command;

use super::Case;
use crate::console::Console;
use crate::disk::Disk;
use crate::machine::{Boot, MACHINE_ID, Machine, Setup};
use crate::tools;

pub(crate) const CASES: &[(&str, Case)] = &[
    ("last_words_and_a_clean_journal", |on| last_words(on, 2)),
    ("last_words_and_five_clean_journals", |on| last_words(on, 5)),
    ("last_words_are_kept_where_no_journal_holds_the_log", last_words_without_journal),
    ("a_survivor_is_left_pending_and_merged_at_the_next_boot", survivor),
    ("a_soft_reboot_keeps_what_is_in_ram", soft_reboot),
];

/// Writes to a log and to a file in `/etc` until it is stopped, and once more then.
pub(super) const WRITER: &str = "\
#!/bin/sh
say() { echo \"$1\" >>/var/log/$2; echo \"$1\" >>/etc/$2; }
trap 'say \"last words\" $1; logger --tag eo-test last words of $1; exit' TERM
while :; do say line $1; sleep 1; done
";
/// A service as any other: stopped while the system goes down. What it starts in its last moment is not killed.
pub(super) const ORDINARY: (&str, &str) = (
    "/etc/systemd/system/ordinary.service",
    "[Service]\nExecStart=/usr/local/bin/writer ordinary\nKillMode=mixed\n[Install]\nWantedBy=multi-user.target\n",
);
/// One that only the final kill ends.
pub(super) const LATE: (&str, &str) = (
    "/etc/systemd/system/late.service",
    "[Unit]\nDefaultDependencies=no\nAfter=sysinit.target\n[Service]\nExecStart=/usr/local/bin/writer late\n\
     KillMode=process\nSendSIGKILL=no\n[Install]\nWantedBy=multi-user.target\n",
);
/// One that nothing ends: systemd-shutdown leaves alone what has an `@` there.
const SURVIVOR: (&str, &str) = (
    "/etc/systemd/system/survivor.service",
    "[Unit]\nDefaultDependencies=no\nAfter=sysinit.target\n[Service]\nExecStart=@/usr/bin/sleep @sleep 100000\n\
     StandardOutput=append:/var/log/held\n[Install]\nWantedBy=multi-user.target\n",
);
/// The journal's own last words.
const JOURNAL_END: &str = "Journal stopped";

/// Each time: what a service writes when it is stopped, what one writes that only the final kill ends, and the
/// journal to its end are on the disk after the shutdown; the journal is sound, from outside and for the next boot; and
/// a plain system keeps no more of it.
fn last_words(on: Setup, boots: usize) {
    let files = [("/usr/local/bin/writer", WRITER), ORDINARY, LATE];
    let mut machine = Machine::new(on, &format!("last_words-{boots}"), &files);
    for number in 1..=boots {
        let script = "sh journalctl --boot --no-pager | grep --count 'uncleanly shut down'\nmounts\nshutdown";
        let console = machine.boot(Boot::default(), script);
        super::expect_overlays(&console);
        console.expect(console.says("guest: OUT 0"), "the journal was not closed by the shutdown before");
        let disk = machine.disk();
        expect_last_words(&disk, &console, number);
        assert!(["/etc", "/var/log"].iter().all(|target| disk.checkpoints(target).is_empty()), "something is pending");
    }
    let mut plain = Machine::new(on, &format!("last_words-{boots}-plain"), &files);
    let boot = Boot { cmdline: "rw ephemeral_overlay=nomerge", ..Boot::default() };
    let console = plain.boot(boot, "mounts\nshutdown");
    console.expect(console.mounts("/var/log").is_empty(), "this is no plain system");
    let (plain, ours) = (journal(&plain.disk()), journal(&machine.disk()));
    for words in ["last words of ordinary", JOURNAL_END] {
        let kept = |journal: &str| journal.contains(words);
        assert!(kept(&ours) || !kept(&plain), "a plain system keeps {words:?}");
    }
}

/// journald has its file in RAM only, so nothing is open in `/var/log` when systemd unmounts what it may. A service that
/// only the final kill ends writes into the overlay nevertheless.
fn last_words_without_journal(on: Setup) {
    let volatile = ("/etc/systemd/journald.conf.d/volatile.conf", "[Journal]\nStorage=volatile\n");
    let files = [("/usr/local/bin/writer", WRITER), ORDINARY, LATE, volatile];
    let mut machine = Machine::new(on, "last_words_without_journal", &files);
    let console = machine.boot(Boot::default(), "mounts\nsh sleep 3\nshutdown");
    super::expect_overlays(&console);
    let disk = machine.disk();
    for log in ["/var/log/ordinary", "/var/log/late"] {
        let text = disk.file(log).unwrap_or_default();
        console.expect(text.ends_with("last words"), &format!("{log} has lost its last words:\n{text}"));
    }
    assert!(disk.checkpoints("/var/log").is_empty(), "something is pending");
}

#[track_caller]
fn expect_last_words(disk: &Disk, console: &Console, number: usize) {
    for log in ["/var/log/ordinary", "/var/log/late", "/etc/ordinary", "/etc/late"] {
        let text = disk.file(log).unwrap_or_default();
        let ends = text.lines().filter(|line| *line == "last words").count();
        console.expect(
            text.ends_with("last words") && ends == number,
            &format!("{log} has lost its last words: {ends} in {number} boots"),
        );
    }
    let names = std::fs::read_dir(disk.at("/var/log/journal").join(MACHINE_ID)).unwrap();
    let names: Vec<_> = names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    console.expect(!names.iter().any(|name| name.ends_with('~')), &format!("a corrupted journal: {names:?}"));
    let verified = journalctl(disk, &["--verify"]).output().unwrap();
    console.expect(verified.status.success(), &tools::text(&verified));
    let text = journal(disk);
    console.expect(
        text.contains("last words of ordinary"),
        &format!("the journal has not what a service said at its end:\n{text}"),
    );
}

/// The release's own journalctl: an older one does not know the newer file format.
fn journalctl(disk: &Disk, words: &[&str]) -> Command {
    disk.mount_proc();
    let mut command = tools::command("chroot").unwrap();
    command.arg(disk.at("/")).arg("journalctl").args(words).arg("--directory").arg("/var/log/journal");
    command
}

/// The messages of the last boot in the journal on a disk.
fn journal(disk: &Disk) -> String {
    let text = tools::finish(&mut journalctl(disk, &["--no-pager", "--boot", "--output", "cat"])).unwrap();
    String::from_utf8_lossy(&text).into_owned()
}

/// What systemd must not kill (its first argument begins with `@`) holds a file of the overlay to the end. The overlay
/// is not dead, so nothing of that target is written to the disk; but all of it was saved, and the next boot has it.
fn survivor(on: Setup) {
    let mut machine = Machine::new(on, "survivor", &[("/etc/kept", "disk\n"), SURVIVOR]);
    let script = "write /etc/kept ram\nwrite /var/log/log ram\nshutdown";
    let console = machine.boot(Boot::default(), script);
    console.expect(console.says("/var/log: left pending for the next boot"), "nothing was said of it");
    let disk = machine.disk();
    assert_eq!(disk.file("/etc/kept").as_deref(), Some("ram"));
    assert_eq!(disk.file("/var/log/log"), None, "lower was written to under a living overlay");
    assert!(!disk.checkpoints("/var/log").is_empty(), "it was not saved");
    let console = machine.boot_and_cut(Boot::default(), "cat /var/log/log");
    console.expect(console.file("/var/log/log").as_deref() == Some("ram"), "it is lost");
    assert_eq!(machine.disk().file("/var/log/log").as_deref(), Some("ram"), "it was not merged");
}

/// The overlays live on through it, with all that is in them; syncd goes on with them, and a shutdown afterwards brings
/// everything to the disk.
fn soft_reboot(on: Setup) {
    let mut machine = Machine::new(on, "soft_reboot", &[("/etc/kept", "disk\n")]);
    let script = "\
        write /etc/kept ram\nrun syncd checkpoint\nwrite /etc/before ram\nsoft-reboot\nmounts\ncat /etc/kept\ncat /etc/before\n\
        write /etc/after ram\nrun syncd checkpoint\nrun syncd status\nshutdown";
    let console = machine.boot(Boot::default(), script);
    console.expect(console.exits().iter().all(|status| *status == "0"), "syncd has something to complain about");
    super::expect_overlays(&console);
    for path in ["/etc/kept", "/etc/before"] {
        console.expect(console.file(path).as_deref() == Some("ram"), "it is lost");
    }
    let disk = machine.disk();
    for path in ["/etc/kept", "/etc/before", "/etc/after"] {
        assert_eq!(disk.file(path).as_deref(), Some("ram"), "{path} on disk");
    }
    assert!(disk.checkpoints("/etc").is_empty(), "something is pending");
}
