//! `syncd run`: when it saves, what a signal does, and that its own words are no reason to write.
//!
//! `DAY_CHECKPOINTS=N` sets for how many checkpoints the day of one lasts.

use std::fs;
use std::io::Write;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::tools;
use crate::world::{World, expect};

pub(crate) const TESTS: &[(&str, fn())] = &[
    ("what_changed_is_saved_at_the_next_interval", what_changed_is_saved_at_the_next_interval),
    ("ten_idle_intervals_write_nothing", ten_idle_intervals_write_nothing),
    ("each_signal_saves_what_is_in_ram", each_signal_saves_what_is_in_ram),
    ("a_valid_configuration_is_taken_and_another_one_is_not", a_valid_configuration_is_taken_and_another_one_is_not),
    ("without_snapshots_only_an_end_saves", without_snapshots_only_an_end_saves),
    ("what_is_not_well_is_said_once", what_is_not_well_is_said_once),
    ("systemd_is_told_how_it_is", systemd_is_told_how_it_is),
    ("a_rotated_log_goes_on_in_a_new_file", a_rotated_log_goes_on_in_a_new_file),
    ("it_keeps_nothing_of_a_target_in_use", it_keeps_nothing_of_a_target_in_use),
    ("what_is_stale_goes_and_what_is_used_stays", what_is_stale_goes_and_what_is_used_stays),
    ("a_day_of_it_leaves_it_as_it_was", a_day_of_it_leaves_it_as_it_was),
];

/// `/etc` and `/var/log` in RAM, looked at several times a second.
pub(crate) const CONFIG: &str = r#"
overlay.dirs = ["/etc", "/var/log"]
tmpfs = { "/tmp" = false, "/var/tmp" = false, "/var/cache" = false }
checkpoint.interval = "300ms"
checkpoint.per_target = { "/etc" = "300ms" }
"#;
/// Longer than anything takes here.
pub(crate) const LONG: Duration = Duration::from_secs(30);

/// A daemon, and the socket where it tells systemd how it is.
pub(crate) struct Daemon {
    child: Child,
    socket: UnixDatagram,
    _directory: tempfile::TempDir,
    /// Where what it says on standard error goes.
    said: PathBuf,
}

impl Daemon {
    /// Starts it, and waits until it is ready.
    pub(crate) fn start(world: &World) -> Self {
        Self::start_with(world.syncd_command(&["run"]), |_| ())
    }

    pub(crate) fn start_with(mut command: Command, more: impl Fn(&mut Command)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let address = directory.path().join("notify");
        let socket = UnixDatagram::bind(&address).unwrap();
        socket.set_read_timeout(Some(LONG)).unwrap();
        let said = directory.path().join("said");
        // The sessions of the machine that the tests run on are none of ours.
        command.env("DBUS_SYSTEM_BUS_ADDRESS", "unix:path=/nowhere").env("NOTIFY_SOCKET", &address);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(fs::File::create(&said).unwrap());
        more(&mut command);
        let daemon = Self { child: command.spawn().unwrap(), socket, _directory: directory, said };
        daemon.hears("READY=1");
        daemon
    }

    /// Waits until systemd is told something.
    pub(crate) fn hears(&self, what: &str) {
        let mut buffer = [0; 1024];
        loop {
            let length =
                self.socket.recv(&mut buffer).unwrap_or_else(|error| panic!("no {what}: {error}; {}", self.text()));
            if String::from_utf8_lossy(&buffer[..length]).lines().any(|line| line == what) {
                return;
            }
        }
    }

    pub(crate) fn text(&self) -> String {
        fs::read_to_string(&self.said).unwrap()
    }

    /// Its number.
    pub(crate) fn process(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Ends it by a signal; returns its exit status.
    pub(crate) fn end(&mut self, signal: Signal) -> Option<i32> {
        self.signal(signal);
        self.child.wait().unwrap().code()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ended = self.child.kill();
        let _status = self.child.wait();
    }
}

#[track_caller]
pub(crate) fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < LONG, "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn running(config: &str) -> World {
    let world = World::new(config);
    fs::create_dir_all(world.at("var/log")).unwrap();
    world.boot();
    world
}

/// The checkpoints of all targets, with what they are.
fn all_checkpoints(world: &World) -> Vec<(PathBuf, u64)> {
    let targets = world.store().parent().unwrap().to_path_buf();
    let Ok(targets) = fs::read_dir(targets) else { return Vec::new() };
    let files =
        targets.flat_map(|target| fs::read_dir(target.unwrap().path()).unwrap()).map(|file| file.unwrap().path());
    let checkpoints = files.filter(|path| path.extension().is_some_and(|extension| extension == "ckpt"));
    let mut all: Vec<_> = checkpoints.map(|path| (path.clone(), fs::metadata(path).unwrap().len())).collect();
    all.sort();
    all
}

/// What a boot after a power cut at this moment would show of a file of `/etc`.
fn after_a_cut(world: &World, name: &str) -> Option<String> {
    world.cut();
    world.merge();
    fs::read_to_string(world.at("etc").join(name)).ok()
}

fn what_changed_is_saved_at_the_next_interval() {
    let world = running(CONFIG);
    let daemon = Daemon::start(&world);
    fs::write(world.at("etc/file"), "one").unwrap();
    until("no checkpoint", || world.checkpoints().len() == 1);
    fs::write(world.at("etc/file"), "two").unwrap();
    until("no second checkpoint", || world.checkpoints().len() == 2);
    drop(daemon);
    assert_eq!(after_a_cut(&world, "file").as_deref(), Some("two"));
}

/// Our log is in a target, and grows when something was saved.
fn ten_idle_intervals_write_nothing() {
    let world = running(CONFIG);
    let daemon = Daemon::start(&world);
    fs::write(world.at("etc/file"), "one").unwrap();
    fs::write(world.at("var/log/file"), "one").unwrap();
    until("no checkpoints", || all_checkpoints(&world).len() == 2);
    let log = fs::metadata(world.at("var/log/ramoverlay.log")).unwrap().len();
    assert!(log > 0);
    let before = all_checkpoints(&world);
    std::thread::sleep(Duration::from_millis(3300));
    assert_eq!(all_checkpoints(&world), before, "{}", daemon.text());
    assert!(
        !daemon.text().contains("nothing changed"),
        "every word of ours would be in the journal: {}",
        daemon.text()
    );
}

fn each_signal_saves_what_is_in_ram() {
    for (signal, ends) in [(Signal::TERM, true), (Signal::INT, true), (Signal::USR1, false), (Signal::HUP, false)] {
        let world = running(&CONFIG.replace("300ms", "1h"));
        let mut daemon = Daemon::start(&world);
        fs::write(world.at("etc/file"), format!("{signal:?}")).unwrap();
        if ends {
            assert_eq!(daemon.end(signal), Some(0), "{}", daemon.text());
        } else {
            daemon.signal(signal);
            until("no checkpoint", || world.checkpoints().len() == 1);
            assert_eq!(daemon.child.try_wait().unwrap(), None, "{signal:?} ended it");
        }
        drop(daemon);
        assert_eq!(after_a_cut(&world, "file"), Some(format!("{signal:?}")));
    }
}

fn a_valid_configuration_is_taken_and_another_one_is_not() {
    let long = CONFIG.replace("300ms", "1h");
    let world = running(&long);
    let daemon = Daemon::start(&world);
    world.configure(&format!("{long}\nodd = 1"));
    daemon.signal(Signal::HUP);
    until("nothing was said", || daemon.text().contains("the configuration stays what it was"));
    assert!(daemon.text().contains("odd"), "{}", daemon.text());
    daemon.hears("READY=1");
    world.configure(CONFIG);
    daemon.signal(Signal::HUP);
    until("nothing was said", || daemon.text().contains("the configuration was read again"));
    let before = world.checkpoints().len();
    fs::write(world.at("etc/file"), "new interval").unwrap();
    until("no checkpoint at the new interval", || world.checkpoints().len() > before);
}

fn without_snapshots_only_an_end_saves() {
    let world = running(&format!("{CONFIG}checkpoint.snapshot = false\n"));
    let mut daemon = Daemon::start(&world);
    fs::write(world.at("etc/file"), "text").unwrap();
    std::thread::sleep(Duration::from_secs(1));
    assert!(world.checkpoints().is_empty());
    assert_eq!(daemon.end(Signal::TERM), Some(0));
    assert_eq!(after_a_cut(&world, "file").as_deref(), Some("text"));
}

/// A disk that takes nothing is said when it begins and when it ends, and fails the last checkpoint.
fn what_is_not_well_is_said_once() {
    let world = running(CONFIG);
    world.checkpoint();
    let remount = |how: &str| {
        let bind = world.run.join("store");
        let disk = world.root.parent().unwrap().to_path_buf();
        for path in [disk, bind] {
            let mut mount = Command::new("mount");
            mount.args(["-o", &format!("remount,bind,{how}")]).arg(path);
            // It is busy while something is written.
            until("no remount", || mount.output().unwrap().status.success());
        }
    };
    remount("ro");
    let mut daemon = Daemon::start(&world);
    fs::write(world.at("etc/file"), "text").unwrap();
    std::thread::sleep(Duration::from_millis(1500));
    let failures = || daemon.text().lines().filter(|line| line.contains("/etc: ") && line.contains("ERROR")).count();
    assert_eq!(failures(), 1, "{}", daemon.text());
    let status = world.syncd(&["status"]);
    expect(&status, 3);
    assert!(tools::text(&status).contains("Read-only file system"), "{}", tools::text(&status));
    remount("rw");
    until("it did not get well", || daemon.text().contains("/etc: all is well again"));
    remount("ro");
    fs::write(world.at("etc/file"), "lost").unwrap();
    assert_eq!(daemon.end(Signal::TERM), Some(1), "{}", daemon.text());
    remount("rw");
    assert_eq!(after_a_cut(&world, "file").as_deref(), Some("text"));
}

fn systemd_is_told_how_it_is() {
    let world = running(&CONFIG.replace("300ms", "1h"));
    let mut daemon = Daemon::start_with(world.syncd_command(&["run"]), |command| {
        command.env("WATCHDOG_USEC", "100000");
    });
    daemon.hears("WATCHDOG=1");
    daemon.hears("WATCHDOG=1");
    daemon.signal(Signal::HUP);
    daemon.hears("RELOADING=1");
    daemon.hears("READY=1");
    daemon.signal(Signal::TERM);
    daemon.hears("STOPPING=1");
    assert!(daemon.child.wait().unwrap().success());
}

fn a_rotated_log_goes_on_in_a_new_file() {
    let world = running(&CONFIG.replace("300ms", "1h"));
    let daemon = Daemon::start(&world);
    let log = world.at("var/log/ramoverlay.log");
    until("no log", || log.exists());
    fs::rename(&log, log.with_extension("log.1")).unwrap();
    daemon.signal(Signal::USR1);
    until("no new log", || fs::read_to_string(&log).is_ok_and(|text| text.contains("checkpoint 1 (full)")));
    let text = fs::read_to_string(&log).unwrap();
    assert!(text.starts_with("20"), "no time: {text}");
    assert!(!fs::read_to_string(log.with_extension("log.1")).unwrap().contains("checkpoint 1"));
}

/// Else no target could ever be released.
fn it_keeps_nothing_of_a_target_in_use() {
    let world = running(CONFIG);
    let daemon = Daemon::start(&world);
    fs::write(world.at("etc/file"), "text").unwrap();
    until("no checkpoint", || world.checkpoints().len() == 1);
    // While it looks it has them.
    until("it keeps something open", || {
        let descriptors = fs::read_dir(format!("/proc/{}/fd", daemon.process())).unwrap();
        let mut open = descriptors.filter_map(|entry| fs::read_link(entry.unwrap().path()).ok());
        open.all(|path| !path.starts_with(&world.root) && !path.starts_with(&world.run))
    });
}

fn what_is_stale_goes_and_what_is_used_stays() {
    let config = CONFIG.replace("300ms", "1h").replace("\"/tmp\" = false", "\"/tmp\" = \"64M\"");
    let good = format!("{config}cleanup = {{ interval = '200ms', stale = '1s' }}\n");
    let world = World::new(&good);
    fs::create_dir_all(world.at("var/log")).unwrap();
    fs::create_dir_all(world.at("tmp")).unwrap();
    world.boot();
    let [used, unused] = ["tmp/used", "tmp/unused"].map(|path| world.at(path));
    let held = fs::File::create(&used).unwrap();
    fs::write(&unused, "").unwrap();
    // With a configuration that is not valid nobody knows what is to be kept.
    world.configure(&format!("{good}odd = 1\n"));
    let daemon = Daemon::start(&world);
    std::thread::sleep(Duration::from_secs(2));
    assert!(unused.exists(), "{}", daemon.text());
    world.configure(&good);
    daemon.signal(Signal::HUP);
    until("what is stale stays", || !unused.exists());
    std::thread::sleep(Duration::from_millis(500));
    assert!(used.exists(), "{}", daemon.text());
    drop(held);
    until("what is not used any more stays", || !used.exists());
}

/// What a process takes: KiB of memory that are its own, and descriptors.
fn takes(process: u32) -> (u64, usize) {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    let memory = line.trim().trim_end_matches(" kB").parse().unwrap();
    (memory, fs::read_dir(format!("/proc/{process}/fd")).unwrap().count())
}

/// Packages come and go, a log grows and is rotated, settings are edited.
fn a_day_of_it_leaves_it_as_it_was() {
    let checkpoints = std::env::var("DAY_CHECKPOINTS").map_or(60, |text| text.parse().unwrap());
    let world = running(&CONFIG.replace("300ms", "1h"));
    let daemon = Daemon::start(&world);
    let (etc, log) = (world.at("etc"), world.at("var/log"));
    let mut early = None;
    for number in 1..=checkpoints {
        fs::write(etc.join("setting"), number.to_string()).unwrap();
        let package = etc.join("package");
        if number % 10 == 1 {
            fs::create_dir_all(&package).unwrap();
            (0..300).for_each(|file| fs::write(package.join(file.to_string()), vec![b'x'; 3000]).unwrap());
        } else if number % 10 == 6 {
            fs::remove_dir_all(&package).unwrap();
        }
        let mut lines = fs::File::options().create(true).append(true).open(log.join("syslog")).unwrap();
        (0..300).for_each(|line| writeln!(lines, "a line of this hour: {number}.{line}").unwrap());
        if number % 20 == 0 {
            fs::rename(log.join("syslog"), log.join("syslog.1")).unwrap();
        }
        let marker = format!("checkpoint {number} (");
        daemon.signal(Signal::USR1);
        until("no checkpoint", || daemon.text().matches(&marker).count() == 2);
        if number == 20 {
            early = Some(takes(daemon.process()));
        }
    }
    let (early, late) = (early.unwrap(), takes(daemon.process()));
    println!("{checkpoints} checkpoints; KiB and descriptors after 20: {early:?}, at the end: {late:?}");
    assert!(late.1 <= early.1, "descriptors are left open: {early:?} {late:?}");
    // A chain of 64 checkpoints takes more than one of 20, and that is all of it (1200 of them: 5 MiB more than after 20).
    let more = u64::min(128 * (checkpoints - 20), 8 << 10);
    assert!(late.0 <= early.0 + more, "memory grows: {early:?} {late:?} KiB");
}
