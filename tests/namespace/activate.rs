//! What `early` deferred, because its file system was not mounted before the pivot, and what `syncd activate` makes of
//! it once it is: the same as a boot would have, and nothing at all where somebody uses the directory.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use ephemeral_overlay::state::BootState;
use rustix::mount::{MountFlags, UnmountFlags, mount_remount, unmount};
use test_support::mapped::Mapping;
use test_support::snapshot;

use crate::tools::{self, is_overlay, mounts_on, text};
use crate::world::{Disk, Fs, World, expect};

pub(crate) const TESTS: &[(&str, fn())] = &[
    ("a_target_on_a_separate_var_comes_into_ram", a_target_on_a_separate_var_comes_into_ram),
    ("its_chain_waits_for_the_disk_it_belongs_to", its_chain_waits_for_the_disk_it_belongs_to),
    ("a_store_of_its_own_and_its_chain", a_store_of_its_own_and_its_chain),
    ("a_store_that_is_unmounted_too_soon_is_written_to_still", a_store_that_is_unmounted_too_soon),
    ("a_stale_store_below_the_mount_point_counts_for_nothing", a_stale_store_below_the_mount_point),
    ("a_target_that_is_a_mount_point_itself", a_target_that_is_a_mount_point_itself),
    ("tmpfs_folders_wait_too", tmpfs_folders_wait_too),
    ("a_passthrough_stays_on_its_disk", a_passthrough_stays_on_its_disk),
    ("the_last_stage_brings_it_to_its_disk", the_last_stage_brings_it_to_its_disk),
    ("a_merge_that_fails_is_unpacked", a_merge_that_fails_is_unpacked),
    ("a_damaged_chain_leaves_its_target_on_disk", a_damaged_chain_leaves_its_target_on_disk),
    ("nothing_is_covered_that_is_written_to", nothing_is_covered_that_is_written_to),
    (ALONE, nothing_is_covered_that_another_namespace_has),
    ("nothing_is_covered_that_has_a_mount_in_it", nothing_is_covered_that_has_a_mount_in_it),
    ("what_ran_from_disk_wins_over_what_was_pending", what_ran_from_disk_wins_over_what_was_pending),
    ("a_second_time_there_is_nothing_to_do", a_second_time_there_is_nothing_to_do),
    ("without_the_hook_only_what_is_named", without_the_hook_only_what_is_named),
    ("the_generator_keeps_the_file_systems_below", the_generator_keeps_the_file_systems_below),
];

/// It copies the mount table.
pub(crate) const ALONE: &str = "nothing_is_covered_that_another_namespace_has";

/// `/var/log`, and no tmpfs.
const LOG: &str = "overlay.dirs = ['/var/log']\ntmpfs = { '/tmp' = false, '/var/tmp' = false, '/var/cache' = false }\n";

/// A system and a disk of it that the initramfs does not mount.
struct Late {
    world: World,
    disk: Disk,
    /// Where the disk belongs.
    point: &'static str,
}

impl Late {
    /// The disk gets `directories`; it is not mounted.
    fn new(config: &str, point: &'static str, directories: &[&str]) -> Self {
        let world = World::new(config);
        fs::write(world.at("etc/fstab"), format!("/dev/a / ext4\n/dev/b /{point} ext4\n")).unwrap();
        let disk = Disk::new(Fs::Ext4, 32);
        for directory in directories {
            fs::create_dir(disk.path().join(directory)).unwrap();
        }
        unmount(disk.path(), UnmountFlags::empty()).unwrap();
        Self { world, disk, point }
    }

    /// Boots as far as the pivot, and expects that something was skipped.
    fn boot(&self) {
        let output = self.world.early_command("").output().unwrap();
        expect(&output, 3);
        assert!(text(&output).contains("skipped: deferred: "), "{}", text(&output));
    }

    /// Mounts the disk, as the system does after the pivot.
    fn mount(&self) {
        let image = self.disk.path().with_file_name("image");
        let point = self.world.at(self.point);
        tools::run("mount", &["-o", "loop", image.to_str().unwrap(), point.to_str().unwrap()]);
    }

    fn activate(&self) -> Output {
        self.world.syncd(&["activate"])
    }

    /// Boots, mounts and activates, and expects it to be exact.
    fn run(&self) {
        self.boot();
        self.mount();
        expect(&self.activate(), 0);
    }

    fn boot_state(&self) -> BootState {
        BootState::read(&self.world.run.join("boot.json")).unwrap().expect("there is no boot.json")
    }

    fn chain(&self, store: &str, target: &str) -> usize {
        let Ok(names) = fs::read_dir(self.world.at(store).join("ephemeral-overlay/targets").join(target)) else {
            return 0;
        };
        names.filter(|name| name.as_ref().unwrap().path().extension().is_some_and(|kind| kind == "ckpt")).count()
    }
}

fn deferred(late: &Late) -> Vec<PathBuf> {
    late.boot_state().deferred
}

fn said(output: &Output, part: &str) {
    assert!(text(output).contains(part), "{part:?} was not said: {}", text(output));
}

fn a_target_on_a_separate_var_comes_into_ram() {
    let late = Late::new(&LOG.replace("['/var/log']", "['/etc', '/var/log']"), "var", &["log"]);
    let (log, etc) = (late.world.at("var/log"), late.world.at("etc"));
    // What the root has there is something else.
    fs::remove_dir(&log).unwrap();
    late.boot();
    assert!(is_overlay(&etc));
    assert_eq!(deferred(&late), [Path::new("/var/log")]);
    let before = late.boot_state();

    // Too soon.
    let output = late.activate();
    expect(&output, 3);
    said(&output, "/var/log: left on disk: deferred: it is on /var, which is not mounted yet");
    assert_eq!(deferred(&late), [Path::new("/var/log")]);
    expect(&late.world.syncd(&["status"]), 3);
    said(&late.world.syncd(&["status"]), "deferred");

    late.mount();
    fs::write(log.join("old"), "on disk").unwrap();
    let output = late.world.syncd(&["activate", "--json"]);
    expect(&output, 0);
    said(&output, "\"version\": 1");
    said(&output, "\"target\": \"/var/log\"");
    assert!(is_overlay(&log));
    assert_eq!(fs::read_to_string(log.join("old")).unwrap(), "on disk");
    let state = late.boot_state();
    assert_eq!((state.deferred.len(), state.skipped.len()), (0, 0), "{state:?}");
    assert_eq!(state.targets[0], before.targets[0], "another target's entry changed");
    assert_eq!(state.targets[1].path, Path::new("/var/log"));
    assert_eq!(state.targets[1].device, mounts_on(&log).last().unwrap().device);
    let utab = fs::read_to_string(late.world.run.join("utab")).unwrap();
    assert!(utab.lines().any(|line| line.ends_with("TARGET=/var/log ROOT=/ OPTS=x-initrd.mount")), "{utab}");
    expect(&late.world.syncd(&["status"]), 0);

    fs::write(log.join("new"), "in RAM").unwrap();
    assert!(!late.world.run.join("lower/var-log/new").exists(), "it went to the disk");
    late.world.checkpoint();
    assert_eq!(late.chain("persist", "var-log"), 1);
}

fn its_chain_waits_for_the_disk_it_belongs_to() {
    let late = Late::new(LOG, "var", &["log"]);
    let log = late.world.at("var/log");
    late.run();
    fs::write(log.join("old"), "1").unwrap();
    late.world.checkpoint();
    fs::write(log.join("new"), "2").unwrap();
    late.world.checkpoint();
    let expected = snapshot::take(&log);
    late.world.cut();

    // The directory of the same name on the root is not the target.
    assert!(log.is_dir());
    for _ in 0..2 {
        let output = late.world.offline(&["merge"]);
        expect(&output, 3);
        said(&output, "/var, which is not mounted");
        assert_eq!(late.chain("persist", "var-log"), 2, "the chain is gone");
    }
    late.boot();
    assert_eq!(late.chain("persist", "var-log"), 2, "the chain is gone");
    assert!(!log.join("new").exists());
    // The unit that runs before activation.
    expect(&late.world.syncd(&["checkpoint"]), 0);
    late.mount();
    assert!(!log.join("new").exists());
    let output = late.activate();
    expect(&output, 0);
    said(&output, "2 checkpoints merged");
    snapshot::assert_same(&expected, &snapshot::take(&log), "the view");
    snapshot::assert_same(&expected, &snapshot::take(&late.world.run.join("lower/var-log")), "the disk");
    assert_eq!(late.chain("persist", "var-log"), 0);
    assert!(fs::read_dir(late.world.run.join("ram/var-log/upper")).unwrap().next().is_none(), "upper is not empty");
}

fn a_store_of_its_own_and_its_chain() {
    let late = Late::new(&LOG.replace("/var/log", "/etc"), "persist", &[]);
    let etc = late.world.at("etc");
    late.run();
    fs::write(etc.join("new"), "in RAM").unwrap();
    late.world.checkpoint();
    assert_eq!(late.chain("persist", "etc"), 1);
    let expected = snapshot::take(&etc);
    late.world.cut();

    late.boot();
    assert_eq!(deferred(&late), [Path::new("/etc")]);
    let output = late.world.syncd(&["status"]);
    expect(&output, 3);
    said(&output, "/etc: the store is on /persist, which is not mounted");
    let output = late.world.syncd(&["merge"]);
    expect(&output, 3);
    said(&output, "the store is on /persist");
    expect(&late.world.syncd(&["checkpoint"]), 0);
    assert!(!late.world.at("persist/ephemeral-overlay").exists(), "a store was made below the mount point");
    late.mount();
    expect(&late.activate(), 0);
    snapshot::assert_same(&expected, &snapshot::take(&etc), "the view");
    snapshot::assert_same(&expected, &snapshot::take(&late.world.run.join("lower/etc")), "the disk");
    assert_eq!(late.chain("persist", "etc"), 0);
    assert_eq!(mounts_on(&late.world.run.join("store")).len(), 1, "the store is not bound");
}

fn a_store_that_is_unmounted_too_soon() {
    let late = Late::new(LOG, "persist", &[]);
    late.run();
    unmount(late.world.at("persist"), UnmountFlags::empty()).unwrap();
    fs::write(late.world.at("var/log/new"), "in RAM").unwrap();
    late.world.checkpoint();
    assert!(!late.world.at("persist/ephemeral-overlay").exists(), "a store was made below the mount point");
    late.world.cut();
    late.mount();
    assert_eq!(late.chain("persist", "var-log"), 1);
    late.world.merge();
    assert_eq!(fs::read_to_string(late.world.at("var/log/new")).unwrap(), "in RAM");
}

fn a_stale_store_below_the_mount_point() {
    let late = Late::new(LOG, "persist", &[]);
    let stale = late.world.at("persist/ephemeral-overlay");
    fs::create_dir_all(stale.join("targets/var-log")).unwrap();
    fs::write(stale.join("targets/var-log/0000000001.ckpt"), "of another time").unwrap();
    fs::write(stale.join("tries"), "2\n").unwrap();
    let before = snapshot::take(&stale);
    for _ in 0..3 {
        late.boot();
        expect(&late.world.syncd(&["checkpoint"]), 0);
        late.mount();
        expect(&late.activate(), 0);
        assert!(is_overlay(&late.world.at("var/log")));
        late.world.cut();
    }
    snapshot::assert_same(&before, &snapshot::take(&stale), "it was touched");
}

fn a_target_that_is_a_mount_point_itself() {
    let late = Late::new(LOG, "var/log", &["journal"]);
    let log = late.world.at("var/log");
    late.run();
    fs::write(log.join("new"), "in RAM").unwrap();
    late.world.checkpoint();
    let expected = snapshot::take(&log);
    late.world.cut();
    late.run();
    // The disk, the cover, the overlay.
    assert_eq!(mounts_on(&log).len(), 3);
    snapshot::assert_same(&expected, &snapshot::take(&log), "the view");
    snapshot::assert_same(&expected, &snapshot::take(&late.world.run.join("lower/var-log")), "the disk");
    late.world.cut();
    // Somebody else's overlay on top of it is left alone.
    late.boot();
    late.mount();
    let options = format!("lowerdir={}:{}", log.display(), late.world.at("etc").display());
    tools::run("mount", &["-t", "overlay", "-o", &options, "confext", log.to_str().unwrap()]);
    let output = late.activate();
    expect(&output, 3);
    said(&output, "something is mounted there already");
    assert_eq!(mounts_on(&log).last().unwrap().source, Path::new("confext"));
}

fn tmpfs_folders_wait_too() {
    let late = Late::new("overlay.dirs = []\n", "var", &["tmp", "cache", "cache/pacman", "cache/man"]);
    fs::remove_dir(late.world.at("var/tmp")).unwrap();
    late.boot();
    assert_eq!(deferred(&late), [Path::new("/var/cache"), Path::new("/var/tmp")]);
    assert_eq!(late.boot_state().tmpfs, [Path::new("/tmp")]);
    late.mount();
    fs::write(late.world.at("var/cache/pacman/package"), "x").unwrap();
    expect(&late.activate(), 0);
    for path in ["var/tmp", "var/cache"] {
        assert_eq!(mounts_on(&late.world.at(path)).last().unwrap().fs_type, "tmpfs");
    }
    assert!(late.world.at("var/cache/man").is_dir() && late.world.at("var/cache/pacman/package").exists());
    assert_eq!(late.boot_state().tmpfs, ["/tmp", "/var/cache", "/var/tmp"].map(PathBuf::from));
    assert!(deferred(&late).is_empty());
    assert!(!late.world.at("persist/ephemeral-overlay").exists(), "nobody needs a store");
}

fn a_passthrough_stays_on_its_disk() {
    let config = LOG.replace("dirs =", "passthrough = ['/var/log/journal', '/var/log/none']\noverlay.dirs =");
    let late = Late::new(&config, "var", &["log", "log/journal"]);
    late.boot();
    late.mount();
    let output = late.activate();
    expect(&output, 3);
    said(&output, "in RAM now; /var/log/none: it is in RAM with the rest of /var/log");
    let journal = late.world.at("var/log/journal");
    fs::write(journal.join("file"), "on disk").unwrap();
    fs::write(late.world.at("var/log/other"), "in RAM").unwrap();
    late.world.cut();
    late.mount();
    assert!(journal.join("file").exists() && !late.world.at("var/log/other").exists());
}

fn the_last_stage_brings_it_to_its_disk() {
    let late = Late::new(LOG, "var", &["log"]);
    let log = late.world.at("var/log");
    late.run();
    fs::write(log.join("new"), "in RAM").unwrap();
    let expected = snapshot::take(&log);
    for _overlay_and_cover in 0..2 {
        unmount(&log, UnmountFlags::empty()).unwrap();
    }
    // As systemd-shutdown leaves what it cannot unmount, because of our bind.
    mount_remount(late.world.at("var"), MountFlags::RDONLY, c"").unwrap();
    unmount(late.world.at("var"), UnmountFlags::empty()).unwrap();
    let output = late.world.syncd(&["last-stage"]);
    expect(&output, 0);
    assert!(!log.join("new").exists(), "it went to the root");
    late.mount();
    snapshot::assert_same(&expected, &snapshot::take(&log), "the disk");
    assert_eq!(late.chain("persist", "var-log"), 0);
}

fn a_merge_that_fails_is_unpacked() {
    let late = Late::new(LOG, "var", &["log"]);
    let log = late.world.at("var/log");
    late.run();
    fs::write(log.join("new"), "in RAM").unwrap();
    late.world.checkpoint();
    let expected = snapshot::take(&log);
    late.world.cut();
    late.boot();
    late.mount();
    let disk = snapshot::take(&log);
    mount_remount(late.world.at("var"), MountFlags::RDONLY, c"").unwrap();
    let output = late.activate();
    expect(&output, 3);
    said(&output, "they are kept in RAM until they can be");
    assert!(is_overlay(&log));
    snapshot::assert_same(&expected, &snapshot::take(&log), "the view");
    snapshot::assert_same(&disk, &snapshot::take(&late.world.run.join("lower/var-log")), "the disk");
    assert_eq!(late.chain("persist", "var-log"), 1);
    assert!(deferred(&late).is_empty());
    late.world.cut();
    late.run();
    snapshot::assert_same(&expected, &snapshot::take(&late.world.run.join("lower/var-log")), "the next boot");
}

fn a_damaged_chain_leaves_its_target_on_disk() {
    let late = Late::new(LOG, "var", &["log"]);
    let log = late.world.at("var/log");
    late.run();
    fs::write(log.join("new"), "in RAM").unwrap();
    late.world.checkpoint();
    late.world.cut();
    let part = late.world.at("persist/ephemeral-overlay/targets/var-log");
    let file = part.join("0000000001.ckpt");
    let mut bytes = fs::read(&file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&file, bytes).unwrap();
    late.boot();
    late.mount();
    let output = late.activate();
    expect(&output, 3);
    said(&output, "is damaged");
    said(&output, "left on disk");
    assert!(!is_overlay(&log) && !log.join("new").exists());
    assert_eq!(mounts_on(&late.world.run.join("lower/var-log")).len(), 0);
    assert_eq!(late.chain("persist", "var-log"), 1);
    assert!(part.join("disk-boot").exists(), "it is not noted that the system runs from disk");
}

/// Something that uses a file or directory below `/var/log`, as long as it lives.
pub(crate) fn user_of(log: &Path, script: &str, options: &[&str]) -> Child {
    let mut command = Command::new(options[0]);
    command.args(&options[1..]).args([script, "sh", log.to_str().unwrap()]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    child
}

pub(crate) fn end(mut child: Child) {
    child.stdin.take().unwrap().write_all(b"go\n").unwrap();
    child.wait().unwrap();
}

/// Expects that the target is left as it is, that the process is named with what it has, and that it is activated as
/// soon as the process is gone.
fn assert_refused(late: &Late, process: u32, words: &str) {
    let log = late.world.at("var/log");
    let mounts = mounts_on(&log);
    let output = late.activate();
    expect(&output, 3);
    said(&output, "/var/log: left on disk: ");
    said(&output, &format!("process {process} ("));
    said(&output, words);
    assert_eq!(mounts_on(&log), mounts, "something was mounted");
    assert_eq!(mounts_on(&late.world.run.join("lower/var-log")), []);
    let state = late.boot_state();
    assert_eq!(state.deferred, [Path::new("/var/log")]);
    assert!(state.targets.is_empty());
    assert!(state.skipped[0].reason.contains(&format!("process {process} (")), "{state:?}");
}

fn nothing_is_covered_that_is_written_to() {
    let late = Late::new(LOG, "var", &["log", "log/dir"]);
    let log = late.world.at("var/log");
    late.boot();
    late.mount();
    fs::write(log.join("file"), vec![0; 4096]).unwrap();
    for (script, words) in [
        ("exec 3>>$1/file; echo ready; read line", "var/log/file open for writing"),
        ("exec 3<$1/dir; echo ready; read line", "var/log/dir open"),
        ("cd $1/dir; echo ready; read line", "var/log/dir as its working directory"),
    ] {
        let child = user_of(&log, script, &["sh", "-c"]);
        assert_refused(&late, child.id(), words);
        end(child);
    }
    let file = File::options().read(true).write(true).open(log.join("file")).unwrap();
    let mapping = Mapping::new(&file, 4096);
    drop(file);
    assert_refused(&late, std::process::id(), "var/log/file mapped for writing");
    drop(mapping);
    // Reading is no reason, nor is what lies beside it.
    let reader = user_of(&log, "exec 3<$1/file 4>>$1/../beside; echo ready; read line", &["sh", "-c"]);
    expect(&late.activate(), 0);
    assert!(is_overlay(&log));
    end(reader);
}

fn nothing_is_covered_that_another_namespace_has() {
    let late = Late::new(LOG, "var", &["log", "log/dir"]);
    let log = late.world.at("var/log");
    late.boot();
    late.mount();
    let unshare = ["unshare", "-m", "--propagation", "private", "sh", "-c"];
    for (script, words) in [
        // As ProtectSystem= does.
        ("mount --bind $1 $1; echo ready; read line", "var/log mounted for itself"),
        ("mount -t tmpfs x $1/dir; echo ready; read line", "var/log/dir mounted for itself"),
        ("mount --bind $1/dir /mnt; echo ready; read line", "/mnt mounted for itself"),
    ] {
        let child = user_of(&log, script, &unshare);
        assert_refused(&late, child.id(), words);
        end(child);
    }
    // One that has nothing of its own there is no reason.
    let child = user_of(&log, "echo ready; read line", &unshare);
    expect(&late.activate(), 0);
    end(child);
}

fn nothing_is_covered_that_has_a_mount_in_it() {
    let late = Late::new(LOG, "var", &["log", "log/journal"]);
    let log = late.world.at("var/log");
    late.boot();
    late.mount();
    let journal = log.join("journal");
    tools::run("mount", &["-t", "tmpfs", "journal", journal.to_str().unwrap()]);
    let output = late.activate();
    expect(&output, 3);
    said(&output, "var/log/journal is a mount of its own");
    assert!(!is_overlay(&log));
    unmount(&journal, UnmountFlags::empty()).unwrap();
    // A bind elsewhere would be a way to the disk under the overlay.
    let elsewhere = late.world.at("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    tools::run("mount", &["--bind", journal.to_str().unwrap(), elsewhere.to_str().unwrap()]);
    let output = late.activate();
    expect(&output, 3);
    said(&output, "elsewhere is a mount of its own");
    unmount(&elsewhere, UnmountFlags::empty()).unwrap();
    expect(&late.activate(), 0);
}

fn what_ran_from_disk_wins_over_what_was_pending() {
    let late = Late::new(LOG, "var", &["log"]);
    let log = late.world.at("var/log");
    let conflict = |note: bool, winner: &str| {
        late.run();
        fs::write(log.join("file"), format!("in RAM, {winner}")).unwrap();
        late.world.checkpoint();
        late.world.cut();
        late.boot();
        // Before activation it is not decided yet.
        expect(&late.world.syncd(&["checkpoint"]), 0);
        late.mount();
        if note {
            let writer = user_of(&log, "exec 3>>$1/other; echo ready; read line", &["sh", "-c"]);
            expect(&late.activate(), 3);
            end(writer);
        }
        fs::write(log.join("file"), format!("on disk, {winner}")).unwrap();
        let output = late.activate();
        expect(&output, 3);
        said(&output, "was changed on disk and in RAM");
        assert!(is_overlay(&log));
        assert_eq!(fs::read_to_string(log.join("file")).unwrap(), format!("{winner}, {winner}"));
        late.world.cut();
    };
    conflict(false, "in RAM");
    conflict(true, "on disk");
}

fn a_second_time_there_is_nothing_to_do() {
    let late = Late::new(LOG, "var", &["log"]);
    let log = late.world.at("var/log");
    late.run();
    fs::write(log.join("file"), "in RAM").unwrap();
    let before = (mounts_on(&log), late.boot_state());
    let output = late.activate();
    expect(&output, 0);
    said(&output, "nothing is deferred");
    let output = late.world.syncd(&["activate", "/var/log"]);
    expect(&output, 0);
    said(&output, "in RAM already");
    assert_eq!(before, (mounts_on(&log), late.boot_state()));
    expect(&late.world.syncd(&["activate", "/opt"]), 2);
    // Released, and again.
    unmount(&log, UnmountFlags::empty()).unwrap();
    expect(&late.world.syncd(&["merge"]), 0);
    assert_eq!(fs::read_to_string(log.join("file")).unwrap(), "in RAM");
    expect(&late.world.syncd(&["activate", "/var/log"]), 0);
    assert!(is_overlay(&log));
    assert_eq!(mounts_on(&late.world.run.join("lower/var-log")).len(), 1);
    assert_eq!(late.boot_state().targets.len(), 1);
    fs::write(log.join("file"), "in RAM again").unwrap();
    late.world.checkpoint();
    assert_eq!(late.chain("persist", "var-log"), 1);
}

fn without_the_hook_only_what_is_named() {
    let world = World::new(LOG);
    let output = world.early_command("ephemeral_overlay=off").output().unwrap();
    expect(&output, 0);
    let output = world.syncd(&["activate"]);
    expect(&output, 0);
    said(&output, "the hook was not active in this boot");
    assert!(!is_overlay(&world.at("var/log")));
    expect(&world.syncd(&["activate", "/var/log"]), 0);
    assert!(is_overlay(&world.at("var/log")));
    fs::write(world.at("var/log/file"), "in RAM").unwrap();
    world.checkpoint();
    world.cut();
    world.merge();
    assert_eq!(fs::read_to_string(world.at("var/log/file")).unwrap(), "in RAM");
    // A system that does not run has nothing to activate.
    expect(&world.offline(&["activate", "/var/log"]), 1);
}

fn the_generator_keeps_the_file_systems_below() {
    let late = Late::new(&LOG.replace("/var/log", "/var/lib/a-b"), "var/lib/a-b", &[]);
    fs::create_dir_all(late.world.at("var/lib/a-b")).unwrap();
    let generate = || {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().to_str().unwrap();
        expect(&late.world.syncd(&["generator", path, path, path]), 0);
        let unit = directory.path().join(r"var-lib-a\x2db.mount.d/ephemeral-overlay.conf");
        (fs::read_to_string(unit).ok(), fs::read_dir(directory.path()).unwrap().count())
    };
    let fstab = late.world.at("etc/fstab");
    let plain = fs::read_to_string(&fstab).unwrap();
    fs::write(&fstab, format!("{plain}/dev/c /persist ext4\n")).unwrap();
    assert_eq!(generate().1, 2, "the store's file system is unmounted while it is written to");
    fs::write(&fstab, plain).unwrap();
    let (text, number) = generate();
    assert!(text.is_some_and(|text| text.contains("DefaultDependencies=no")), "there is no drop-in");
    assert_eq!(number, 1);
    late.run();
    // What is in RAM counts, whatever the configuration says since.
    late.world.configure("overlay.dirs = []");
    assert!(generate().0.is_some());
    late.world.cut();
    assert_eq!(generate(), (None, 0));
    fs::remove_file(fstab).unwrap();
    late.world.configure("nonsense");
    assert_eq!(generate(), (None, 0));
}
