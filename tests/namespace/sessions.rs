//! Sessions where no logind answers: a real `login` with utmp, and a real X server.

use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use rustix::process::Signal;

use crate::run::{CONFIG, Daemon, until};
use crate::world::World;

pub(crate) const TESTS: &[(&str, fn())] = &[
    ("utmp_tells_of_the_last_logout", utmp_tells_of_the_last_logout),
    ("a_display_that_closes_is_a_logout", a_display_that_closes_is_a_logout),
    ("a_logout_may_release_what_is_in_ram", a_logout_may_release_what_is_in_ram),
    ("targets_may_be_in_ram_for_logins_only", targets_may_be_in_ram_for_logins_only),
];

/// Places of their own for what tells of sessions: those of the machine that the tests run on are none of ours. The
/// overlays are mounted there as well, and nowhere else: 3 says that they are not mounted before a login.
const OWN: &str = "\
mount -t tmpfs tmpfs /run && mkdir /run/user && : >/run/utmp && mount -t tmpfs tmpfs /var/log &&
mkdir -p -m 1777 /tmp/.X11-unix && mount -t tmpfs -o mode=1777 tmpfs /tmp/.X11-unix &&
{ $EARLY || [ $? = 3 ]; } && exec \"$@\"";

/// A system that saves nothing by the clock, and a daemon that sees sessions of its own.
fn started(more: &str) -> (World, Daemon) {
    let config = CONFIG.replace("300ms", "1h").replace("\"/tmp\" = false", "\"/tmp\" = \"64M\"");
    let world = World::new(&format!("{config}{more}"));
    fs::create_dir_all(world.at("var/log")).unwrap();
    let (early, syncd) = (world.early_command(""), world.syncd_command(&["run"]));
    let words: Vec<_> =
        [early.get_program()].into_iter().chain(early.get_args()).map(|word| word.to_str().unwrap()).collect();
    let mut command = Command::new("unshare");
    command.args(["--mount", "--net", "--propagation", "private", "sh", "-c", OWN, "sh"]);
    command.arg(syncd.get_program()).args(syncd.get_args());
    // The last word is an empty command line of the kernel.
    command.env("EARLY", words[..words.len() - 2].join(" "));
    let daemon = Daemon::start_with(command, |_| ());
    (world, daemon)
}

/// A path of the system, as the daemon has it.
fn inside(daemon: &Daemon, world: &World, path: &str) -> PathBuf {
    let path = world.at(path);
    PathBuf::from(format!("/proc/{}/root", daemon.process())).join(path.strip_prefix("/").unwrap())
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
    let (world, daemon) = started("");
    let mut login = beside(&daemon, &["script", "--quiet", "--return", "--command", "login -f root", "/dev/null"]);
    let mut keyboard = login.stdin.take().unwrap();
    let here = world.at("etc/here");
    writeln!(keyboard, "echo here >{}", here.display()).unwrap();
    until("nobody could log in", || inside(&daemon, &world, "etc/here").exists());
    let is_known = has_utmp(&daemon);
    if is_known {
        daemon.hears("STATUS=1 user logged in");
    }
    fs::write(inside(&daemon, &world, "etc/file"), "text").unwrap();
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
    let (world, daemon) = started("");
    let mut display = beside(&daemon, &["Xvfb", ":4711"]);
    daemon.hears("STATUS=1 user logged in");
    fs::write(inside(&daemon, &world, "etc/file"), "text").unwrap();
    let _held = fs::File::create(inside(&daemon, &world, "tmp/used")).unwrap();
    fs::write(inside(&daemon, &world, "tmp/unused"), "").unwrap();
    assert!(world.checkpoints().is_empty(), "{}", daemon.text());
    rustix::process::kill_process(rustix::process::Pid::from_child(&display), Signal::TERM).unwrap();
    display.wait().unwrap();
    until("the logout saved nothing", || world.checkpoints().len() == 1);
    assert!(daemon.text().contains("checkpoint: the last logout"), "{}", daemon.text());
    until("what nothing uses was not cleaned", || !inside(&daemon, &world, "tmp/unused").exists());
    assert!(inside(&daemon, &world, "tmp/used").exists());
}

/// Somebody logs in, does something, and logs out.
fn log_in_and_out(daemon: &Daemon, act: impl FnOnce()) {
    let mut display = beside(daemon, &["Xvfb", ":4711"]);
    daemon.hears("STATUS=1 user logged in");
    act();
    rustix::process::kill_process(rustix::process::Pid::from_child(&display), Signal::TERM).unwrap();
    display.wait().unwrap();
    daemon.hears("STATUS=0 users logged in");
}

/// Whether an overlay is on `/etc` where the daemon is.
fn is_in_ram(daemon: &Daemon, world: &World) -> bool {
    let mounts = fs::read_to_string(format!("/proc/{}/mounts", daemon.process())).unwrap();
    let etc = world.at("etc").display().to_string();
    mounts.lines().any(|line| line.split(' ').nth(1) == Some(&etc) && line.split(' ').nth(2) == Some("overlay"))
}

/// The file on disk: nothing lies over it where the tests are.
fn on_disk(world: &World) -> Option<String> {
    fs::read_to_string(world.at("etc/file")).ok()
}

fn a_logout_may_release_what_is_in_ram() {
    let (world, daemon) = started("checkpoint.on_logout = 'release'\n");
    log_in_and_out(&daemon, || fs::write(inside(&daemon, &world, "etc/file"), "text").unwrap());
    until("it was not released", || on_disk(&world).as_deref() == Some("text"));
    until("it is not in RAM anew", || is_in_ram(&daemon, &world));
    assert!(world.checkpoints().is_empty(), "{}", daemon.text());
}

fn targets_may_be_in_ram_for_logins_only() {
    let (world, daemon) = started("overlay.activate = 'login'\n");
    assert!(!is_in_ram(&daemon, &world), "{}", daemon.text());
    log_in_and_out(&daemon, || {
        until("it is not in RAM", || is_in_ram(&daemon, &world));
        fs::write(inside(&daemon, &world, "etc/file"), "text").unwrap();
        assert_eq!(on_disk(&world), None);
    });
    until("it was not released", || !is_in_ram(&daemon, &world));
    assert_eq!(fs::read_to_string(inside(&daemon, &world, "etc/file")).unwrap(), "text");
    assert!(world.checkpoints().is_empty(), "{}", daemon.text());
}
