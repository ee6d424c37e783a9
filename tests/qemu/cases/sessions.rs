//! The daemon under systemd, with logind's real sessions.

use std::fs::File;
use std::os::unix::fs::MetadataExt;

use rustix::fs::{IFlags, ioctl_getflags, makedev};

use super::Case;
use super::systemd::suite;
use crate::disk::Disk;
use crate::initramfs::{Flavour, Initramfs};
use crate::machine::{Boot, Machine, Setup};

pub(crate) const CASES: &[(&str, Case)] = &[
    ("the_last_logout_and_a_suspend_save_what_is_in_ram", logout_and_suspend),
    ("a_shutdown_after_releases_leaves_nothing_pending", shutdown_after_releases),
    ("the_units_may_do_what_they_are_for_and_no_more", sandbox),
    ("a_day_of_logs_and_packages_leaves_the_daemon_as_it_was", day),
];

/// Nothing is saved by the clock.
const CONFIG: (&str, &str) =
    ("/etc/ephemeral-overlay.toml", "[checkpoint]\ninterval = \"1h\"\nper_target = { \"/etc\" = \"1h\" }\n");
/// What a user's manager writes when it ends, 10 s after the session did.
const MANAGER: (&str, &str) = (
    "/etc/systemd/system/user@.service.d/late.conf",
    "[Service]\nExecStopPost=+/bin/sh -c 'echo late >/etc/late-%i'\n",
);
/// logind does all that belongs to a suspend; only the kernel stays awake.
const SUSPEND: (&str, &str) =
    ("/etc/systemd/system/systemd-suspend.service.d/short.conf", "[Service]\nExecStart=\nExecStart=/usr/bin/sleep 2\n");
/// A session without a terminal: a service that logs in.
const LOGIN: &str = "\
#!/bin/sh
systemd-run --quiet --unit=\"login-$1\" -p User=\"$1\" -p PAMName=login -p Environment=XDG_SESSION_TYPE=tty \\
    -p Environment=XDG_SESSION_CLASS=user sleep 1000
until loginctl show-user \"$1\" >/dev/null 2>&1; do sleep 0.2; done
";
/// Logs out, and waits until nothing of the user is left.
const LOGOUT: &str = "\
#!/bin/sh
systemctl stop \"login-$1\"
while loginctl show-user \"$1\" >/dev/null 2>&1; do sleep 0.2; done
";
/// The checkpoints of `/etc`, as they stand on the disk; waits for a number of them.
const CHECKPOINTS: &str = "\
#!/bin/sh
count() { ls /persist/ephemeral-overlay/targets/etc 2>/dev/null | grep -c ckpt; }
for _ in $(seq 150); do [ \"$(count)\" -ge \"$1\" ] && break; sleep 0.2; done
echo \"checkpoints: $(count)\"
";

fn logout_and_suspend(on: Setup) {
    let programs = [
        ("/usr/local/bin/login-as", LOGIN),
        ("/usr/local/bin/logout-as", LOGOUT),
        ("/usr/local/bin/checkpoints", CHECKPOINTS),
    ];
    let files: Vec<_> = [CONFIG, MANAGER, SUSPEND].into_iter().chain(programs).collect();
    let mut machine = Machine::new(on, "logout", &files);
    let script = "\
        sh useradd --create-home anna; useradd --create-home bert\n\
        sh systemctl is-active ephemeral-overlay-syncd.service\n\
        sh systemctl restart systemd-logind; sleep 8; echo threads: $(ls /proc/$(pidof syncd)/task | wc -l)\n\
        sh systemctl restart systemd-logind; sleep 8; echo threads: $(ls /proc/$(pidof syncd)/task | wc -l)\n\
        write /etc/suspended ram\n\
        sh systemctl suspend && checkpoints 1; sleep 5\n\
        sh systemd-inhibit --list --no-legend | grep -c 'Ephemeral Overlay'\n\
        sh login-as anna; login-as bert\n\
        sh echo cache of anna: $(findmnt --noheadings --output FSTYPE --mountpoint /home/anna/.cache)\n\
        write /etc/first ram\n\
        sh logout-as anna; sleep 2; checkpoints 1\n\
        sh echo cache of anna now: $(findmnt --noheadings --output FSTYPE --mountpoint /home/anna/.cache)\n\
        write /etc/second ram\n\
        sh logout-as bert; checkpoints 2\n\
        sh journalctl --no-pager --output cat --unit ephemeral-overlay-syncd.service";
    let console = machine.boot_and_cut(Boot::default(), script);
    console.expect(console.says("guest: OUT active"), "the daemon does not run");
    let threads: Vec<_> = console.lines.iter().filter_map(|line| line.strip_prefix("guest: OUT threads: ")).collect();
    console.expect(threads.len() == 2 && threads[0] == threads[1], "each restart of logind leaves threads behind");
    let counts = console.lines.iter().filter_map(|line| line.strip_prefix("guest: OUT checkpoints: "));
    console.expect(
        counts.eq(["1", "1", "2"]),
        "not saved by the suspend, by the first of two logouts, or not by the last",
    );
    console.expect(console.says("guest: OUT cache of anna: tmpfs"), "the cache of a user was on disk");
    console
        .expect(console.lines.iter().any(|line| line == "guest: OUT cache of anna now:"), "it stayed after the logout");
    console.expect(console.says("checkpoint: a suspend"), "it was saved for another reason");
    console.expect(console.says("guest: OUT 1"), "the next suspend would not wait");

    let console = machine.boot_and_cut(Boot::default(), "cat /etc/suspended\ncat /etc/second\ncat /etc/late-1001");
    for path in ["/etc/suspended", "/etc/second"] {
        console.expect(console.file(path).as_deref() == Some("ram"), &format!("{path} is lost"));
    }
    console
        .expect(console.file("/etc/late-1001").as_deref() == Some("late"), "it was saved before the logout was over");
}

/// A target that nothing uses is released twice; `/etc`, which systemd itself watches, is not. To systemd a shutdown is one
/// as any other.
fn shutdown_after_releases(on: Setup) {
    let config = format!("{}[overlay]\ndirs = [\"/etc\", \"/var/log\", \"/srv/data\"]\n", CONFIG.1);
    let files = [(CONFIG.0, config.as_str()), ("/srv/data/first", "disk\n")];
    let mut machine = Machine::new(on, "releases", &files);
    let script = "\
        write /srv/data/first ram\nrun syncd release /srv/data\n\
        write /srv/data/second ram\nrun syncd release /srv/data\n\
        write /srv/data/third ram\nwrite /etc/new ram\nrun syncd release /etc\n\
        mounts\nsh systemctl --failed --no-legend | wc -l\nshutdown";
    let console = machine.boot(Boot::default(), script);
    console
        .expect(console.exits() == ["0", "0", "3", "0"], "a release went wrong, or one of what is in use went through");
    console.expect(console.says("/etc: not released:"), "nobody was named");
    super::expect_overlays(&console);
    let mounts = console.mounts("/srv/data");
    console.expect(mounts.len() == 2 && mounts[1].starts_with("overlay "), &format!("no cover: {mounts:?}"));
    let disk = machine.disk();
    for path in ["/srv/data/first", "/srv/data/second", "/srv/data/third", "/etc/new"] {
        console.expect(disk.file(path).as_deref() == Some("ram"), &format!("{path} is not on the disk"));
    }
    for target in ["/etc", "/var/log", "/srv/data"] {
        console.expect(disk.checkpoints(target).is_empty(), &format!("{target}: something is pending"));
    }
}

/// What only root may make, and a merge has to make again: devices, what runs as somebody else, what cannot be changed.
const PRIVILEGED: &str = "\
#!/bin/sh
set -e
mkdir \"$1\"
cd \"$1\"
mknod zero c 1 5
mknod loop b 7 0
echo ram >program
chown 1000:1000 program
chmod 6751 program
echo ram >protected
perl -e 'open F, \"protected\"; $flags = pack \"l\", 16; ioctl F, 0x40086602, $flags or die \"FS_IOC_SETFLAGS: $!\"'
";
/// What the daemon says of a release, when it has come to an end.
const RELEASED: &str = "\
#!/bin/sh
said() { journalctl --output cat --unit ephemeral-overlay-syncd.service; }
for _ in $(seq 150); do said | grep -q '/srv/data: .* RAM' && break; sleep 0.2; done
said | tail -n 2
";
/// What systemd makes of each unit, at the most (`systemd-analyze security`). Without a sandbox it is 9.5 and more.
const EXPOSURE: [(&str, f32); 5] = [
    ("ephemeral-overlay.service", 2.7),
    ("ephemeral-overlay-early.service", 4.3),
    ("ephemeral-overlay-late.service", 4.2),
    ("ephemeral-overlay-syncd.service", 4.5),
    ("ephemeral-overlay-user-cache@1000.service", 4.5),
];

/// Each unit does what it is for: the daemon releases at the last logout, with all that a merge may come to; a user's cache
/// is in RAM, with a folder that is kept; what the shutdown stops saves; and the initramfs merges that. Each has a sandbox,
/// as narrow as it was once.
fn sandbox(on: Setup) {
    let config = "[overlay]\ndirs = [\"/etc\", \"/srv/data\"]\n[persist]\nuser_cache = [\"kept\"]\n\
        [checkpoint]\ninterval = \"1h\"\nper_target = { \"/etc\" = \"1h\" }\non_logout = \"release\"\n";
    let files = [
        (CONFIG.0, config),
        ("/srv/data/first", "disk\n"),
        ("/usr/local/bin/privileged", PRIVILEGED),
        ("/usr/local/bin/released", RELEASED),
        ("/usr/local/bin/login-as", LOGIN),
        ("/usr/local/bin/logout-as", LOGOUT),
        ("/usr/local/bin/checkpoints", CHECKPOINTS),
    ];
    let mut machine = Machine::new(on, "sandbox", &files);
    let units = EXPOSURE.map(|(unit, _)| unit).join(" ");
    let script = format!(
        "\
        sh systemd-analyze security --no-pager {units} | grep Overall\n\
        sh useradd --create-home anna; su anna -c 'mkdir -p ~/.cache/kept; echo disk >~/.cache/kept/file'\n\
        run login-as anna\n\
        sh echo cache: $(findmnt --noheadings --output FSTYPE --submounts /home/anna/.cache)\n\
        cat /home/anna/.cache/kept/file\n\
        run privileged /srv/data/released\n\
        sh logout-as anna; checkpoints 1\n\
        run released\n\
        write /etc/new ram\n\
        run privileged /srv/data/saved\n\
        run systemctl stop ephemeral-overlay.service\n\
        run checkpoints 2\n\
        sh systemctl --failed --no-legend | wc -l"
    );
    let console = machine.boot_and_cut(Boot::default(), &script);
    for (unit, bound) in EXPOSURE {
        let found = console.lines.iter().find_map(|line| line.split_once(&format!(" level for {unit}: ")));
        let level = found.and_then(|(_, level)| level.split(' ').next()?.parse::<f32>().ok());
        console.expect(level.is_some_and(|level| level <= bound), &format!("{unit}: {level:?}, not {bound}"));
    }
    console.expect(console.exits().iter().all(|status| *status == "0"), "something failed");
    console.expect(console.says("guest: OUT cache: tmpfs ext4"), "the cache of a user was on disk");
    console.expect(console.file("/home/anna/.cache/kept/file").as_deref() == Some("disk"), "what is kept is not there");
    console.expect(console.says("in RAM anew"), "the daemon did not release");
    console.expect(console.says("guest: OUT checkpoints: 2"), "the service of the shutdown did not save");
    console.expect(console.says("guest: OUT 0"), "a unit failed");
    expect_privileged(&machine.disk(), "/srv/data/released");
    let initramfs = Initramfs { flavour: Flavour::Systemd(suite(on)), ..Initramfs::default() };
    machine.boot_and_cut(Boot { initramfs, ..Boot::default() }, "mounts");
    expect_privileged(&machine.disk(), "/srv/data/saved");
}

/// What `PRIVILEGED` makes was merged.
#[track_caller]
fn expect_privileged(disk: &Disk, directory: &str) {
    let directory = disk.at(directory);
    let found = ["zero", "loop", "program", "protected"].map(|name| {
        let stat = std::fs::symlink_metadata(directory.join(name)).ok()?;
        Some((stat.mode(), stat.uid(), stat.rdev()))
    });
    let expected =
        [(0o20_644, 0, makedev(1, 5)), (0o60_644, 0, makedev(7, 0)), (0o106_751, 1000, 0), (0o100_644, 0, 0)];
    assert_eq!(found, expected.map(Some), "what was merged");
    let protected = File::open(directory.join("protected")).expect("open");
    assert!(ioctl_getflags(protected).expect("FS_IOC_GETFLAGS").contains(IFlags::IMMUTABLE), "it can be changed");
}

/// What a day brings, hour after hour: settings, packages that come and go, logs, their rotation; each checkpoint is asked
/// for, and waited for. What the daemon takes is said after 20, after half, and in the end.
const DAY: &str = "\
#!/bin/sh
daemon=$(pidof syncd)
newest() { ls /persist/ephemeral-overlay/targets/etc | grep ckpt | tail -n 1; }
takes() {
    set -- \"$1\" $(awk '/RssAnon/ { print $2 }' /proc/$daemon/status) $(ls /proc/$daemon/fd | wc -l)
    echo \"takes $*\"
}
for hour in $(seq \"$1\"); do
    echo \"$hour\" >/etc/setting
    case $((hour % 10)) in
        1) mkdir /etc/package; for file in $(seq 100); do echo \"$hour $file\" >/etc/package/$file; done ;;
        6) rm -r /etc/package ;;
    esac
    seq \"$hour\" $((hour + 50)) | tee -a /var/log/app.log | systemd-cat -t app
    [ $((hour % 20)) = 0 ] && logrotate --force /etc/logrotate.conf && journalctl --quiet --rotate
    last=$(newest)
    kill -USR1 $daemon
    for _ in $(seq 300); do [ \"$(newest)\" != \"$last\" ] && break; sleep 0.1; done
    [ \"$(newest)\" != \"$last\" ] || echo \"hour $hour: not saved\"
    case $hour in 20|150|\"$1\") takes $hour ;; esac
done
";
/// For what is no program's of ours.
const ROTATED: (&str, &str) = ("/etc/logrotate.d/app", "/var/log/app.log {\n    rotate 30\n    compress\n}\n");

fn day(on: Setup) {
    let files = [CONFIG, ROTATED, ("/usr/local/bin/day", DAY), ("/var/log/journal/.kept", "")];
    let mut machine = Machine::new(on, "day", &files);
    let script = "\
        sh day 300\n\
        sh logrotate --version 2>&1 | head -n 1; ls /var/log | tr '\\n' ' '\n\
        sh journalctl --verify --quiet && echo the journal is whole\n\
        sh cat /var/log/app.log* | wc -c; journalctl --quiet -t app --output cat | wc -l\n\
        sh syncd checkpoint";
    let console = machine.boot_and_cut(Boot { patience: 5, ..Boot::default() }, script);
    console.expect(!console.says("not saved"), "a checkpoint is missing");
    console.expect(console.says("guest: OUT the journal is whole"), "the journal is damaged");
    let takes = console.lines.iter().filter_map(|line| line.strip_prefix("guest: OUT takes "));
    let takes: Vec<Vec<u64>> =
        takes.map(|line| line.split(' ').map(|number| number.parse().expect("a number")).collect()).collect();
    let (early, late) = (&takes[0], &takes[2]);
    console.expect(late[2] <= early[2], "descriptors are left open");
    // A chain of up to 64 checkpoints takes more than one of 20.
    console.expect(late[1] <= early[1] + (8 << 10), "memory grows");
    for log in ["app.log.15.gz", "ramoverlay.log.1"] {
        console.expect(console.says(log), &format!("{log} is missing: it was not rotated"));
    }
    let console =
        machine.boot_and_cut(Boot::default(), "cat /etc/setting\nsh journalctl --verify --quiet && echo whole");
    console.expect(console.file("/etc/setting").as_deref() == Some("300"), "the last hour is lost");
    console.expect(console.says("guest: OUT whole"), "the journal of that boot is damaged");
}
