//! OpenRC: the services, real logins, and a shutdown that leaves everything on the disk.

use super::{Case, LOOK};
use crate::machine::{Boot, Machine, Setup};

pub(crate) const CASES: &[(&str, Case)] =
    &[("a_day_with_openrc_ends_on_the_disk", day), ("with_openrc_what_cannot_be_merged_is_saved", saved)];

/// Nothing is saved by the clock.
const CONFIG: (&str, &str) =
    ("/etc/ephemeral-overlay.toml", "[checkpoint]\ninterval = \"1h\"\nper_target = { \"/etc\" = \"1h\" }\n");
/// A session on a terminal of its own: types the lines in a file (again and again: `login` may throw away what was typed
/// before), and ends with a file's appearance.
const LOGIN: (&str, &str) = (
    "/usr/local/bin/session",
    "\
#!/bin/sh
until [ -e /run/logout ]; do cat /run/lines; sleep 1; done |
    script --quiet --command 'busybox login -f anna' /dev/null >/run/session 2>&1
",
);
/// The checkpoints of `/etc` on the disk; waits for a number of them.
const CHECKPOINTS: (&str, &str) = (
    "/usr/local/bin/checkpoints",
    "\
#!/bin/sh
count() { ls /persist/ephemeral-overlay/targets/etc 2>/dev/null | grep -c ckpt; }
for _ in $(seq 150); do [ \"$(count)\" -ge \"$1\" ] && break; sleep 0.2; done
echo \"checkpoints: $(count)\"
",
);
/// Waits for a command to succeed.
const UNTIL: (&str, &str) =
    ("/usr/local/bin/wait-until", "#!/bin/sh\nfor _ in $(seq 150); do sh -c \"$1\" && exit; sleep 0.2; done; exit 1\n");
/// An ordinary service, which writes when it is stopped.
const SERVICE: (&str, &str) = (
    "/etc/init.d/late",
    "#!/sbin/openrc-run\nstart() { :; }\nstop() { echo stopped >/etc/stopped; echo stopped >/var/log/stopped; }\n",
);
/// What no service knows of: writes when all that is left is ended.
const STRAY: (&str, &str) = (
    "/usr/local/bin/stray",
    "#!/bin/sh\ntrap 'echo ended >/etc/ended; echo ended >/var/log/ended; exit' TERM\nwhile :; do sleep 0.1; done\n",
);
/// Keeps `/etc` in use to the very end: nothing of its session is killed.
const HOLDER: (&str, &str) = (
    "/etc/init.d/holder",
    "#!/sbin/openrc-run\ndepend() { after killprocs; before ephemeral-overlay-shutdown; }\n\
    start() { cd /etc; sleep 1000 & cd /; }\n",
);

/// The daemon is started, told, stopped; a user logs in and out; then everything is shut down.
fn day(on: Setup) {
    let files =
        [("/etc/kept", "disk\n"), ("/etc/removed", "disk\n"), CONFIG, LOGIN, CHECKPOINTS, UNTIL, SERVICE, STRAY];
    let mut machine = Machine::new(on, "day", &files);
    let cache = "sh echo cache: $(stat --file-system --format %T /home/anna/.cache), $(ls /home/anna/.cache | grep -c mine) of hers";
    let script = format!(
        "{LOOK}\n\
        run rc-service ephemeral-overlay status\n\
        run rc-service ephemeral-overlay-syncd status\n\
        {cache}\n\
        write /etc/kept ram\n\
        run rc-service ephemeral-overlay-syncd reload\n\
        sh checkpoints 1\n\
        write /etc/new ram\n\
        run rc-service ephemeral-overlay-syncd stop\n\
        sh checkpoints 2\n\
        run rc-service ephemeral-overlay-syncd start\n\
        sh wait-until 'test $(grep -c is.watched /var/log/ramoverlay.log) = 2'\n\
        sh echo 'echo mine >~/.cache/mine; id -un >/tmp/new && mv /tmp/new /tmp/who' >/run/lines\n\
        spawn /usr/local/bin/session\n\
        sh wait-until 'test -e /tmp/who' && echo logged in: $(cat /tmp/who)\n\
        sh cat /run/session\n\
        sh wait-until 'grep -q the.first.login /var/log/ramoverlay.log'\n\
        {cache}\n\
        write /var/log/log ram\n\
        write /etc/session ram\n\
        sh checkpoints 2\n\
        sh touch /run/logout; checkpoints 3\n\
        sh wait-until '! test -e /home/anna/.cache/mine'\n\
        {cache}\n\
        sh rc-service late start\n\
        spawn /usr/local/bin/stray\n\
        remove /etc/removed\n\
        shutdown"
    );
    let console = machine.boot(Boot::default(), &script);
    console.expect(console.exits().iter().all(|status| *status == "0"), "a command failed");
    super::expect_overlays(&console);
    let said = |what: &str| -> Vec<&str> {
        console.lines.iter().filter_map(|line| line.strip_prefix("guest: OUT ")?.strip_prefix(what)).collect()
    };
    console.expect(
        said("checkpoints: ") == ["1", "2", "2", "3"],
        "not saved by the reload, by the stop or by the logout, or saved at another time",
    );
    console.expect(said("logged in: ") == ["anna"], "nobody logged in");
    console.expect(
        said("cache: ") == ["tmpfs, 0 of hers", "tmpfs, 1 of hers", "tmpfs, 0 of hers"],
        "the cache of a user was on disk, or was not emptied",
    );
    let disk = machine.disk();
    for path in ["/etc/kept", "/etc/new", "/etc/session", "/var/log/log"] {
        assert_eq!(disk.file(path).as_deref(), Some("ram"), "{path} on disk");
    }
    for what in ["stopped", "ended"] {
        for directory in ["/etc", "/var/log"] {
            assert_eq!(disk.file(&format!("{directory}/{what}")).as_deref(), Some(what), "in {directory}");
        }
    }
    assert_eq!(disk.file("/etc/removed"), None, "/etc/removed");
    super::expect_pending(&disk, 0);
}

/// A power cut costs what was written since the last checkpoint; a target that is in use at the end of a shutdown is
/// merged by the next boot.
fn saved(on: Setup) {
    let mut machine = Machine::new(on, "saved", &[("/etc/kept", "disk\n"), CONFIG, CHECKPOINTS, HOLDER]);
    let console = machine.boot_and_cut(
        Boot::default(),
        "write /etc/kept ram\nrun rc-service ephemeral-overlay-syncd restart\nwrite /etc/lost ram\nsync",
    );
    console.expect(console.exits() == ["0"], "the daemon was not restarted");
    let disk = machine.disk();
    assert_eq!(disk.file("/etc/kept").as_deref(), Some("disk"), "it was written to below the overlay");
    drop(disk);

    let script = "cat /etc/kept\ncat /etc/lost\nrun rc-update add holder shutdown\nwrite /etc/new ram\n\
        write /var/log/log ram\nshutdown";
    let console = machine.boot(Boot::default(), script);
    console.expect(console.file("/etc/kept").as_deref() == Some("ram"), "what was saved is lost");
    console.expect(console.file("/etc/lost").is_none(), "what was not saved is there");
    let disk = machine.disk();
    assert_eq!(disk.file("/var/log/log").as_deref(), Some("ram"), "what was not in use");
    assert_eq!(disk.file("/etc/new"), None, "/etc was merged while it was in use");
    assert!(!disk.checkpoints("/etc").is_empty(), "what was in RAM was not saved");
    drop(disk);

    let console = machine.boot(Boot::default(), "cat /etc/new\nrun rc-update del holder shutdown\nshutdown");
    console.expect(console.file("/etc/new").as_deref() == Some("ram"), "the next boot does not show it");
    let disk = machine.disk();
    assert_eq!(disk.file("/etc/new").as_deref(), Some("ram"), "on disk");
    super::expect_pending(&disk, 0);
}
