//! Sessions where no logind answers: a real `login` with utmp, and a real X server.

use std::fs;
use std::io::Write;
use std::process::{Child, Command, Stdio};

use rustix::process::Signal;

use crate::run::{CONFIG, Daemon, running, until};
use crate::world::World;

pub(crate) const TESTS: &[(&str, fn())] = &[
    ("utmp_tells_of_the_last_logout", utmp_tells_of_the_last_logout),
    ("a_display_that_closes_is_a_logout", a_display_that_closes_is_a_logout),
];

/// Places of their own for what tells of sessions: those of the machine that the tests run on are none of ours.
const OWN: &str = "\
mount -t tmpfs tmpfs /run && mkdir /run/user && : >/run/utmp && mount -t tmpfs tmpfs /var/log &&
mkdir -p -m 1777 /tmp/.X11-unix && mount -t tmpfs -o mode=1777 tmpfs /tmp/.X11-unix && exec \"$@\"";

/// A system that saves nothing by the clock, and a daemon that sees sessions of its own.
fn started() -> (World, Daemon) {
    let world = running(&CONFIG.replace("300ms", "1h").replace("\"/tmp\" = false", "\"/tmp\" = \"64M\""));
    let syncd = world.syncd_command(&["run"]);
    let mut command = Command::new("unshare");
    command.args(["--mount", "--net", "--propagation", "private", "sh", "-c", OWN, "sh"]);
    command.arg(syncd.get_program()).args(syncd.get_args());
    let daemon = Daemon::start_with(command, |_| ());
    (world, daemon)
}

/// A program where the daemon sees it.
fn beside(daemon: &Daemon, words: &[&str]) -> Child {
    let mut command = Command::new("nsenter");
    command.args(["--mount", "--net", "--target", &daemon.process().to_string()]).args(words);
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

/// Whether utmp has anything there.
fn has_utmp(daemon: &Daemon) -> bool {
    fs::metadata(format!("/proc/{}/root/run/utmp", daemon.process())).unwrap().len() > 0
}

fn utmp_tells_of_the_last_logout() {
    let (world, daemon) = started();
    let mut login = beside(&daemon, &["script", "--quiet", "--return", "--command", "login -f root", "/dev/null"]);
    let mut keyboard = login.stdin.take().unwrap();
    let here = world.at("etc/here");
    writeln!(keyboard, "echo here >{}", here.display()).unwrap();
    until("nobody could log in", || here.exists());
    let is_known = has_utmp(&daemon);
    if is_known {
        daemon.hears("STATUS=1 user logged in");
    }
    fs::write(world.at("etc/file"), "text").unwrap();
    assert!(world.checkpoints().is_empty(), "{}", daemon.text());
    writeln!(keyboard, "exit").unwrap();
    login.wait().unwrap();
    if is_known {
        until("the logout saved nothing", || world.checkpoints().len() == 1);
        assert!(daemon.text().contains("checkpoint: the last logout"), "{}", daemon.text());
    } else {
        // util-linux without utmp: nobody knows of the login, and so of no logout.
        std::thread::sleep(std::time::Duration::from_secs(1));
        assert!(world.checkpoints().is_empty(), "{}", daemon.text());
    }
}

fn a_display_that_closes_is_a_logout() {
    let (world, daemon) = started();
    let mut display = beside(&daemon, &["Xvfb", ":4711"]);
    daemon.hears("STATUS=1 user logged in");
    fs::write(world.at("etc/file"), "text").unwrap();
    let _held = fs::File::create(world.at("tmp/used")).unwrap();
    fs::write(world.at("tmp/unused"), "").unwrap();
    assert!(world.checkpoints().is_empty(), "{}", daemon.text());
    rustix::process::kill_process(rustix::process::Pid::from_child(&display), Signal::TERM).unwrap();
    display.wait().unwrap();
    until("the logout saved nothing", || world.checkpoints().len() == 1);
    assert!(daemon.text().contains("checkpoint: the last logout"), "{}", daemon.text());
    until("what nothing uses was not cleaned", || !world.at("tmp/unused").exists());
    assert!(world.at("tmp/used").exists());
}
