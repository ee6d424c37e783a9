//! The daemon in trouble: its tmpfs is full, in bytes or in inodes; its disk is full, read-only, or gone. What an
//! application sees, what the daemon says, what `status` says, and that all goes on by itself once the cause is gone.
//! Nothing that was called saved is lost by a cut, in the middle of the trouble or after it.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use test_support::snapshot::{self, Snapshot};

use crate::checkpoint::noise;
use crate::reserve;
use crate::run::{CONFIG, Daemon, LONG, until};
use crate::tools::{code, is_overlay, text};
use crate::vanish::sync;
use crate::world::{Disk, Fs, World, expect};

pub(crate) const TESTS: &[(&str, fn())] = &[
    ("a_tmpfs_full_in_bytes", || a_full_tmpfs(Room::Bytes)),
    ("a_tmpfs_full_in_inodes", || a_full_tmpfs(Room::Inodes)),
    ("a_tmpfs_full_in_bytes_that_nothing_uses_frees_itself", || a_full_tmpfs_frees_itself(Room::Bytes)),
    ("a_tmpfs_full_in_inodes_that_nothing_uses_frees_itself", || a_full_tmpfs_frees_itself(Room::Inodes)),
    ("a_target_is_shown_again_on_a_full_tmpfs", a_target_is_shown_again_on_a_full_tmpfs),
    ("a_full_disk", a_full_disk),
    ("a_thin_disk_that_is_full", a_thin_disk_that_is_full),
    ("a_disk_remounted_read_only", a_disk_remounted_read_only),
    ("a_disk_with_an_error_that_the_kernel_made_read_only", a_disk_with_an_error),
    ("a_disk_that_fails_for_a_while", a_disk_that_fails_for_a_while),
    ("a_disk_that_is_gone", a_disk_that_is_gone),
];

/// What a tmpfs may run out of.
#[derive(Clone, Copy, PartialEq)]
enum Room {
    Bytes,
    Inodes,
}

impl Room {
    /// The key of `status --json` for the most that there may be.
    fn size(self) -> &'static str {
        if self == Self::Bytes { "size_bytes" } else { "size_inodes" }
    }

    /// The most that a tmpfs of `megabytes` can have.
    fn of(self, megabytes: u64) -> u64 {
        (megabytes << 20) / if self == Self::Bytes { 1 } else { 4096 }
    }
}

/// Of all of `/etc`.
fn view(world: &World) -> Snapshot {
    snapshot::take(&world.at("etc"))
}

/// What `status --json` says, and its exit status.
fn status(world: &World) -> (i32, Value) {
    let output = world.syncd(&["status", "--json"]);
    (code(&output), serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {}", text(&output))))
}

/// What `status` says of `/etc`.
fn of_etc(status: &Value) -> &Value {
    status["targets"].as_array().unwrap().iter().find(|target| target["target"] == "/etc").unwrap()
}

/// Waits until all of `/etc` is called saved; what that is.
#[track_caller]
fn saved(world: &World, daemon: &Daemon) -> Snapshot {
    let is_saved = || {
        let (_, status) = status(world);
        let etc = of_etc(&status);
        etc["unsaved"] == 0 && etc["problem"].is_null() && etc["last"]["status"] == 0
    };
    until(&format!("it is not saved: {}", daemon.text()), is_saved);
    view(world)
}

/// Waits until `status` has nothing to complain of.
#[track_caller]
fn is_well(world: &World, daemon: &Daemon) {
    let begun = Instant::now();
    while status(world).0 != 0 {
        assert!(begun.elapsed() < LONG, "{}\n{}", text(&world.syncd(&["status"])), daemon.text());
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// A cut at which the disk stays as it is, with all its trouble, and what the next boot shows.
fn after_a_cut(world: &World) -> Snapshot {
    world.cut();
    let boot = world.early_command("").output().unwrap();
    // 3 where there is no room, or no right, to merge: it is unpacked into RAM.
    assert!([0, 3].contains(&code(&boot)), "{}", text(&boot));
    println!("the next boot: {}", text(&boot));
    view(world)
}

/// A power cut, at which the disk loses what did not come to it, and what the next boot shows.
fn after_a_power_cut(world: &World) -> Snapshot {
    world.disk().vanish();
    world.cut();
    world.disk().come_back();
    world.boot();
    view(world)
}

/// The errors of the daemon about a target.
fn errors(daemon: &Daemon, target: &str) -> Vec<String> {
    let is_one = |line: &&str| line.contains("ERROR") && line.contains(&format!("{target}: "));
    daemon.text().lines().filter(is_one).map(str::to_owned).collect()
}

/// Waits until the daemon complains of `/etc` as it should, once; and `status` does.
#[track_caller]
fn complains(world: &World, daemon: &Daemon, words: &[&str]) {
    until("nothing is said", || !errors(daemon, "/etc").is_empty());
    // Several intervals.
    std::thread::sleep(Duration::from_secs(1));
    let said = errors(daemon, "/etc");
    println!("the daemon: {said:?}");
    assert_eq!(said.len(), 1, "{said:#?}");
    let store = world.at("persist/ephemeral-overlay");
    let words = [words, &["/etc: ", store.to_str().unwrap()]].concat();
    let (number, json) = status(world);
    let output = world.syncd(&["status"]);
    println!("status: {}", text(&output));
    assert_eq!((number, code(&output)), (3, 3), "{}", text(&output));
    let last = &of_etc(&json)["last"];
    assert_eq!(last["status"], 1, "{json}");
    for word in words {
        for said in [&said[0], &text(&output)] {
            assert!(said.contains(word), "{word:?} is not in {said}");
        }
        assert!(word == "/etc: " || last["message"].as_str().unwrap().contains(word), "{word:?} is not in {last}");
    }
}

/// The checkpoints of `/etc`, with all that is in them.
fn chain(world: &World) -> Vec<(PathBuf, Vec<u8>)> {
    world.checkpoints().into_iter().map(|path| (path.clone(), fs::read(path).unwrap())).collect()
}

fn small(size: &str) -> String {
    format!("overlay.size = '{size}'\n{CONFIG}")
}

/// Writes until nothing fits any more.
fn fill(etc: &Path, room: Room) {
    match room {
        Room::Bytes => {
            let mut file = File::options().create(true).append(true).open(etc.join("filler")).unwrap();
            for length in [1 << 20, 4096] {
                let block = vec![b'x'; length];
                while file.write_all(&block).is_ok() {}
            }
        }
        Room::Inodes => {
            fs::create_dir_all(etc.join("many")).unwrap();
            let make = |number| File::create(etc.join(format!("many/{number}")));
            let begin = fs::read_dir(etc.join("many")).unwrap().count();
            let error = (begin..1_000_000).find_map(|number| make(number).err()).unwrap();
            assert_eq!(error.kind(), ErrorKind::StorageFull);
        }
    }
}

/// What an application sees of a full tmpfs: errors for what is new, and everything that is there.
fn application_gets_errors(etc: &Path, app: &mut File, room: Room) {
    let is_full = |result: std::io::Result<()>, what: &str| {
        assert_eq!(result.expect_err(what).kind(), ErrorKind::StorageFull, "{what}");
    };
    match room {
        Room::Bytes => is_full(app.write_all(&vec![b'x'; 1 << 16]), "a write"),
        Room::Inodes => {
            app.write_all(b"a line more\n").unwrap();
            is_full(File::create(etc.join("new")).map(drop), "a new file");
            is_full(fs::remove_file(etc.join("on disk")), "a removal of what is on disk");
        }
    }
    is_full(File::options().append(true).open(etc.join("long")).map(drop), "a change of what is on disk");
    assert_eq!(fs::read(etc.join("on disk")).unwrap(), b"on disk");
    assert_eq!(fs::read(etc.join("long")).unwrap(), noise(100_000));
}

fn application_can_write(etc: &Path, app: &mut File) {
    app.write_all(&vec![b'x'; 1 << 16]).unwrap();
    File::options().append(true).open(etc.join("long")).unwrap();
    fs::write(etc.join("new"), "new").unwrap();
}

/// A world with something on disk, and a tmpfs of 8 MiB over it.
fn small_world() -> World {
    let world = World::new(&small("8M"));
    fs::write(world.at("etc/on disk"), "on disk").unwrap();
    fs::write(world.at("etc/long"), noise(100_000)).unwrap();
    world.boot();
    sync(&world);
    world
}

fn a_full_tmpfs(room: Room) {
    let world = small_world();
    let daemon = Daemon::start(&world);
    let etc = world.at("etc");
    let mut app = File::create(etc.join("app")).unwrap();
    app.write_all(b"a line\n").unwrap();
    is_well(&world, &daemon);
    let size = |status: &Value| status["ram"][room.size()].as_u64().unwrap();
    fill(&etc, room);
    // At the boot there is half an inode for each of the most that there may be.
    until("it does not grow", || size(&status(&world).1) >= room.of(8));
    fill(&etc, room);
    application_gets_errors(&etc, &mut app, room);
    // What is in RAM comes to the disk as ever.
    let full = saved(&world, &daemon);
    until("nothing is said", || daemon.text().contains("the tmpfs of the targets is 100 % full"));
    // It belongs to an application, and so it stays.
    until("nobody is named", || daemon.text().contains("/etc/app open"));
    let (number, json) = status(&world);
    let output = world.syncd(&["status"]);
    println!("status: {}", text(&output));
    assert_eq!((number, code(&output)), (3, 3), "{}", text(&output));
    for word in ["RAM is ", "No space left on device", "overlay.size", "RAM was 100 % full"] {
        assert!(text(&output).contains(word), "{word:?} is not in {}", text(&output));
    }
    assert!(json["ram"]["problem"].as_str().unwrap().contains("No space left"), "{json}");
    // More room, without a boot: by the configuration.
    world.configure(&small("16M"));
    daemon.signal(Signal::HUP);
    until("it does not grow", || size(&status(&world).1) >= room.of(16));
    application_can_write(&etc, &mut app);
    let grown = saved(&world, &daemon);
    assert_ne!(full, grown);
    // Full again, at its ceiling.
    fill(&etc, room);
    until("it is not full", || status(&world).0 == 3);
    // Whoever removes something can write again at once.
    if room == Room::Bytes {
        fs::remove_file(etc.join("filler")).unwrap();
    } else {
        fs::remove_dir_all(etc.join("many")).unwrap();
    }
    application_can_write(&etc, &mut app);
    is_well(&world, &daemon);
    let last = saved(&world, &daemon);
    drop((app, daemon));
    snapshot::assert_same(&last, &after_a_power_cut(&world), "the next boot");
}

fn a_full_tmpfs_frees_itself(room: Room) {
    let world = small_world();
    let daemon = Daemon::start(&world);
    let etc = world.at("etc");
    fill(&etc, room);
    let full = view(&world);
    let is_written = || fs::write(etc.join("first"), "x").is_ok() && fs::read(etc.join("first")).unwrap() == b"x";
    until("nothing is released", is_written);
    println!("{}", daemon.text());
    fs::remove_file(etc.join("first")).unwrap();
    let names = |view: &Snapshot| view.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&full), names(&view(&world)), "what was released is not there");
    application_can_write(&etc, &mut File::create(etc.join("app")).unwrap());
    let last = saved(&world, &daemon);
    is_well(&world, &daemon);
    drop(daemon);
    snapshot::assert_same(&last, &after_a_power_cut(&world), "the next boot");
}

/// A release takes an overlay away and has to bring it back, while somebody takes every inode that there is.
fn a_target_is_shown_again_on_a_full_tmpfs() {
    let world = small_world();
    let (etc, log) = (world.at("etc"), world.at("var/log"));
    fs::write(log.join("log"), "in RAM").unwrap();
    world.checkpoint();
    // It cannot be merged, and so it is mounted again.
    reserve::fill(&world, 0);
    fill(&etc, Room::Inodes);
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut number = 0;
            while !over.load(Ordering::Relaxed) {
                number += usize::from(File::create(etc.join(format!("more {number}"))).is_ok());
            }
        });
        let refused = world.syncd(&["release", "/var/log"]);
        let is_shown = is_overlay(&log);
        fs::remove_file(world.at("filler")).unwrap();
        // Now it can, and one with nothing in it takes its place.
        let released = world.syncd(&["release", "/var/log"]);
        over.store(true, Ordering::Relaxed);
        println!("{}{}", text(&refused), text(&released));
        assert!(
            is_shown && code(&refused) == 1 && text(&refused).contains("it is in RAM as before"),
            "{}",
            text(&refused)
        );
        assert!(is_overlay(&log) && code(&released) == 0, "{}", text(&released));
    });
    assert_eq!(fs::read(log.join("log")).unwrap(), b"in RAM");
    fs::remove_dir_all(etc.join("many")).unwrap();
    fs::write(log.join("log"), "written").unwrap();
    world.checkpoint();
    let (last, log_then) = (view(&world), snapshot::take(&log));
    snapshot::assert_same(&last, &after_a_power_cut(&world), "the next boot");
    snapshot::assert_same(&log_then, &snapshot::take(&log), "the next boot");
}

/// Writes as an application does that knows nothing of any disk; returns what is seen then.
fn application_goes_on(world: &World, what: &str) -> Snapshot {
    let etc = world.at("etc");
    fs::write(etc.join("file"), what).unwrap();
    // Of other contents each time: the store would have them already.
    let mut long = noise(3 << 20);
    for byte in &mut long {
        *byte ^= what.len().to_le_bytes()[0];
    }
    fs::write(etc.join(format!("new {what}")), long).unwrap();
    fs::rename(etc.join("renamed"), etc.join("renamed again")).unwrap();
    fs::rename(etc.join("renamed again"), etc.join("renamed")).unwrap();
    fs::write(world.at("var/log/log"), what).unwrap();
    view(world)
}

/// A world and a daemon that has saved once; what that is.
fn saved_once(disk: Option<Disk>) -> (World, Daemon, Snapshot) {
    let world = World::on(disk.unwrap_or_else(|| Disk::new(Fs::Ext4, 64)), CONFIG);
    fs::write(world.at("var/log/on disk"), "on disk").unwrap();
    world.boot();
    sync(&world);
    let daemon = Daemon::start(&world);
    fs::write(world.at("etc/renamed"), "renamed").unwrap();
    application_goes_on(&world, "saved");
    let old = saved(&world, &daemon);
    (world, daemon, old)
}

/// What can happen to a disk, and be over again.
struct Trouble {
    disk: fn() -> Option<Disk>,
    /// What it gives away is dropped when the trouble is over.
    begin: fn(&World, &Daemon) -> Option<Blocked>,
    end: fn(&World),
    /// Nobody can save, and not only the daemon cannot.
    is_for_all: bool,
    /// What is said.
    words: &'static [&'static str],
}

impl Trouble {
    /// It comes and goes, and the daemon goes on.
    fn comes_and_goes(&self) {
        let (world, mut daemon, _) = saved_once((self.disk)());
        let before = chain(&world);
        let begun = (self.begin)(&world, &daemon);
        let new = application_goes_on(&world, "in trouble");
        complains(&world, &daemon, self.words);
        assert_eq!(before, chain(&world), "what was saved is not what it was");
        snapshot::assert_same(&new, &view(&world), "the view");
        daemon.signal(Signal::USR1);
        until("it does not try", || errors(&daemon, "/etc").len() == 2);
        if self.is_for_all {
            // By hand it is no better.
            expect(&world.syncd(&["checkpoint"]), 1);
        }
        drop(begun);
        (self.end)(&world);
        until("it did not get well", || daemon.text().contains("/etc: all is well again"));
        snapshot::assert_same(&new, &saved(&world, &daemon), "what is saved");
        is_well(&world, &daemon);
        let names = fs::read_dir(world.store()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        assert_eq!(names.filter(|name| name.starts_with(".tmp")).collect::<Vec<_>>(), Vec::<String>::new());
        assert_eq!(daemon.end(Signal::TERM), Some(0), "{}", daemon.text());
        drop(daemon);
        snapshot::assert_same(&new, &after_a_power_cut(&world), "the boot after it");
    }

    /// The daemon ends, and the power is cut, in the middle of it.
    fn does_not_go(&self) {
        let (world, mut daemon, old) = saved_once((self.disk)());
        let begun = (self.begin)(&world, &daemon);
        application_goes_on(&world, "in trouble");
        until("nothing is said", || !errors(&daemon, "/etc").is_empty());
        // Its end tells systemd that not all is saved.
        assert_eq!(daemon.end(Signal::TERM), Some(1), "{}", daemon.text());
        drop((daemon, begun));
        snapshot::assert_same(&old, &after_a_cut(&world), "a boot in the middle of it");
        (self.end)(&world);
        application_goes_on(&world, "after it");
        world.checkpoint();
        let last = view(&world);
        snapshot::assert_same(&last, &after_a_power_cut(&world), "the boot after it");
    }

    fn run(&self) {
        self.comes_and_goes();
        self.does_not_go();
    }
}

fn a_full_disk() {
    Trouble {
        disk: || None,
        begin: |world, _| {
            reserve::fill(world, 0);
            None
        },
        end: |world| fs::remove_file(world.at("filler")).unwrap(),
        is_for_all: true,
        words: &["write ", "No space left on device", "make room on the disk"],
    }
    .run();
}

/// A disk that takes names and no contents, which is said when they come to it.
fn a_thin_disk_that_is_full() {
    Trouble {
        disk: || Some(Disk::thin(64)),
        begin: |world, _| {
            world.disk().take_room(64 << 10);
            None
        },
        end: |world| world.disk().give_room(),
        is_for_all: true,
        words: &["fsync ", "No space left on device", "make room on the disk"],
    }
    .run();
}

fn a_disk_remounted_read_only() {
    Trouble {
        disk: || None,
        begin: |world, _| {
            world.disk().remount("ro");
            None
        },
        end: |world| world.disk().remount("rw"),
        is_for_all: true,
        words: &["open ", "Read-only file system", "the disk is read-only"],
    }
    .run();
}

fn a_disk_that_fails_for_a_while() {
    Trouble {
        disk: || None,
        begin: |_, daemon| Some(Blocked::new(daemon)),
        end: |_| (),
        is_for_all: false,
        words: &["fsync ", "Input/output error", "the disk fails"],
    }
    .run();
}

/// A daemon for whom nothing comes to the disk: each fsync(2) fails, as where a cable is loose.
struct Blocked(Child);

impl Blocked {
    fn new(daemon: &Daemon) -> Self {
        let mut strace = Command::new("strace");
        strace.args(["-f", "-qqq", "-e", "trace=fsync", "-e", "inject=fsync:error=EIO", "-o", "/dev/null", "-p"]);
        let child = strace.arg(daemon.process().to_string()).spawn().unwrap();
        let status = format!("/proc/{}/status", daemon.process());
        until("it is not traced", || {
            fs::read_to_string(&status).unwrap().contains(&format!("TracerPid:\t{}\n", child.id()))
        });
        Self(child)
    }
}

impl Drop for Blocked {
    fn drop(&mut self) {
        kill_process(Pid::from_child(&self.0), Signal::INT).unwrap();
        self.0.wait().unwrap();
    }
}

/// What `begin` does is over with a reboot only.
fn until_a_reboot(begin: fn(&World), words: &[&str]) {
    let (world, mut daemon, old) = saved_once(None);
    begin(&world);
    let new = application_goes_on(&world, "in trouble");
    complains(&world, &daemon, words);
    snapshot::assert_same(&new, &view(&world), "the view");
    expect(&world.syncd(&["checkpoint"]), 1);
    assert_eq!(daemon.end(Signal::TERM), Some(1), "{}", daemon.text());
    drop(daemon);
    snapshot::assert_same(&old, &after_a_power_cut(&world), "the next boot");
    // All is as ever.
    let daemon = Daemon::start(&world);
    application_goes_on(&world, "after it");
    let last = saved(&world, &daemon);
    is_well(&world, &daemon);
    drop(daemon);
    snapshot::assert_same(&last, &after_a_power_cut(&world), "the boot after it");
}

fn a_disk_with_an_error() {
    let begin = |world: &World| {
        world.disk().fail();
        let remount = Command::new("mount").args(["-o", "remount,rw"]).arg(world.disk().path()).output().unwrap();
        assert!(!remount.status.success(), "it can be mended without a boot");
    };
    until_a_reboot(begin, &["open ", "Read-only file system", "the disk is read-only", "reboot"]);
}

fn a_disk_that_is_gone() {
    let begin = |world: &World| {
        world.disk().vanish();
        // What is not in RAM an application cannot have.
        let error = fs::read(world.at("var/log/on disk")).expect_err("a disk that is gone was read");
        assert_eq!(error.raw_os_error(), Some(Errno::IO.raw_os_error()));
    };
    until_a_reboot(begin, &["open ", "Input/output error", "the disk fails", "reboot"]);
}
