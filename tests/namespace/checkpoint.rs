//! `syncd checkpoint`: what it sees, what it refuses, and that it never loses what was there.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use ephemeral_overlay::attributes::{CAPABILITY, Handle};
use rustix::fs::{FlockOperation, IFlags, fgetxattr, flistxattr, flock, ioctl_getflags, ioctl_setflags};
use rustix::io::Errno;
use syncd::tree::list;

use crate::sweep::copy;
use crate::tools::{self, text};
use crate::world::{Disk, ETC, Fs, World, expect};
use test_support::mapped::Mapping;
use test_support::model::set_times;
use test_support::snapshot;

pub(crate) const TESTS: &[(&str, fn())] = &[
    ("same_size_and_times_but_other_content_is_seen", same_size_and_times_but_other_content_is_seen),
    ("a_write_through_a_mapping_is_seen", a_write_through_a_mapping_is_seen),
    ("nothing_changed_writes_nothing", nothing_changed_writes_nothing),
    ("what_is_read_on_the_disk_is_not_written", what_is_read_on_the_disk_is_not_written),
    ("our_own_log_is_no_reason_to_write", our_own_log_is_no_reason_to_write),
    ("a_dry_run_writes_nothing", a_dry_run_writes_nothing),
    ("a_full_store_keeps_the_chain_and_fails", a_full_store_keeps_the_chain_and_fails),
    ("an_upper_full_of_bytes_is_checkpointed", an_upper_full_of_bytes_is_checkpointed),
    ("an_upper_full_of_inodes_is_checkpointed", an_upper_full_of_inodes_is_checkpointed),
    ("an_unknown_artefact_stops_it", an_unknown_artefact_stops_it),
    ("a_name_that_merely_vanished_from_upper_is_as_lower", a_name_that_merely_vanished_from_upper_is_as_lower),
    ("a_name_that_is_listed_twice_is_one", a_name_that_is_listed_twice_is_one),
    ("a_disputed_deletion_gives_3_and_is_not_recorded", a_disputed_deletion_gives_3_and_is_not_recorded),
    ("a_second_one_waits_for_the_first", a_second_one_waits_for_the_first),
    ("many_at_once_leave_one_chain", many_at_once_leave_one_chain),
    ("a_damaged_chain_is_superseded", a_damaged_chain_is_superseded),
    ("a_broken_configuration_does_not_keep_it_from_saving", a_broken_configuration_does_not_keep_it_from_saving),
    ("an_older_initramfs_is_not_written_for", an_older_initramfs_is_not_written_for),
    ("a_directory_that_became_opaque_is_a_change", a_directory_that_became_opaque_is_a_change),
    ("a_foreign_chain_stays_until_the_new_one_is_durable", a_foreign_chain_stays_until_the_new_one_is_durable),
    ("a_file_that_moves_is_saved_or_said_to_be_missing", a_file_that_moves_is_saved_or_said_to_be_missing),
    ("an_overlay_that_nobody_knows_is_an_error", an_overlay_that_nobody_knows_is_an_error),
    ("the_65th_supersedes_the_chain", the_65th_supersedes_the_chain),
    ("flags_of_chattr_are_kept", flags_of_chattr_are_kept),
    ("an_attribute_that_nobody_can_read_is_none", an_attribute_that_nobody_can_read_is_none),
    ("the_store_is_for_root_alone", the_store_is_for_root_alone),
    ("without_the_hook_there_is_nothing_to_do", without_the_hook_there_is_nothing_to_do),
    ("an_unknown_target_is_a_usage_error", an_unknown_target_is_a_usage_error),
    ("json_has_the_documented_keys", json_has_the_documented_keys),
    ("status_tells_what_a_cut_would_cost", status_tells_what_a_cut_would_cost),
];

/// Merges after a cut, and reads one file of `/etc`.
fn after_a_cut(world: &World, name: &str) -> Option<Vec<u8>> {
    world.cut();
    world.merge();
    fs::read(world.at("etc").join(name)).ok()
}

fn same_size_and_times_but_other_content_is_seen() {
    let world = World::new(ETC);
    world.boot();
    let path = world.at("etc/file");
    fs::write(&path, "old!").unwrap();
    world.checkpoint();
    let before = fs::metadata(&path).unwrap();
    File::options().write(true).open(&path).unwrap().write_all_at(b"new!", 0).unwrap();
    set_times(&path, before.mtime(), before.mtime_nsec());
    world.checkpoint();
    assert_eq!(after_a_cut(&world, "file").unwrap(), b"new!");
}

fn a_write_through_a_mapping_is_seen() {
    let world = World::new(ETC);
    world.boot();
    let path = world.at("etc/journal");
    fs::write(&path, "old! and more").unwrap();
    // The first write through a mapping changes the times; later ones, while it stands, do not.
    let mapping = Mapping::new(&File::options().read(true).write(true).open(&path).unwrap(), 4);
    mapping.write(b"old!");
    world.checkpoint();
    let raw = world.upper().join("journal");
    let before = fs::metadata(&raw).unwrap();
    mapping.write(b"new!");
    let after = fs::metadata(&raw).unwrap();
    assert_eq!((before.mtime_nsec(), before.ctime_nsec()), (after.mtime_nsec(), after.ctime_nsec()));
    world.checkpoint();
    drop(mapping);
    assert_eq!(after_a_cut(&world, "journal").unwrap(), b"new! and more");
}

/// Every file of the store with its contents.
fn store(world: &World) -> snapshot::Snapshot {
    snapshot::take(&world.at("persist"))
}

fn nothing_changed_writes_nothing() {
    let world = World::new(ETC);
    world.boot();
    expect(&world.syncd(&["checkpoint"]), 0);
    assert!(world.checkpoints().is_empty(), "a checkpoint of nothing");
    fs::write(world.at("etc/file"), "x").unwrap();
    world.checkpoint();
    let before = store(&world);
    for _ in 0..3 {
        let output = world.syncd(&["checkpoint"]);
        expect(&output, 0);
        assert!(text(&output).contains("nothing changed"), "{}", text(&output));
    }
    snapshot::assert_same(&before, &store(&world), "the store changed");
}

/// The time of the last access would be a write for each file whose old version is looked at.
fn what_is_read_on_the_disk_is_not_written() {
    let world = World::new(ETC);
    let names = ["file", "gone"];
    for name in names {
        fs::write(world.at("etc").join(name), "old").unwrap();
        set_times(&world.at("etc").join(name), 1, 0);
    }
    world.boot();
    let lower = world.run.join("lower/etc");
    let accessed = |name: &&str| fs::metadata(lower.join(name)).unwrap().accessed().unwrap();
    fs::write(world.at("etc/file"), "new").unwrap();
    fs::remove_file(world.at("etc/gone")).unwrap();
    let before: Vec<_> = names.iter().map(accessed).collect();
    world.checkpoint();
    assert_eq!(before, names.iter().map(accessed).collect::<Vec<_>>());
    let read = fs::read(lower.join("gone")).unwrap();
    assert_eq!(read, b"old");
    assert_ne!(before[1], accessed(&"gone"), "this disk keeps no such times");
}

fn our_own_log_is_no_reason_to_write() {
    let world = World::new(&format!("{ETC}log.file = '/etc/our.log'"));
    world.boot();
    fs::write(world.at("etc/our.log"), "one\n").unwrap();
    world.checkpoint();
    assert!(world.checkpoints().is_empty(), "our own log caused a checkpoint");
    fs::write(world.at("etc/other"), "x").unwrap();
    world.checkpoint();
    assert_eq!(after_a_cut(&world, "our.log").unwrap(), b"one\n", "with another change it is kept");
    // Whoever changes the directory itself means it.
    let world = World::new(&format!("{ETC}log.file = '/etc/our.log'"));
    world.boot();
    fs::set_permissions(world.at("etc"), fs::Permissions::from_mode(0o711)).unwrap();
    world.checkpoint();
    assert_eq!(world.checkpoints().len(), 1);
}

fn a_dry_run_writes_nothing() {
    let world = World::new(ETC);
    fs::write(world.at("etc/gone"), "x").unwrap();
    world.boot();
    fs::write(world.at("etc/file"), "x").unwrap();
    fs::remove_file(world.at("etc/gone")).unwrap();
    let before = store(&world);
    let output = world.syncd(&["checkpoint", "--dry-run"]);
    expect(&output, 0);
    let words = text(&output);
    assert!(words.contains("W /etc/file\n") && words.contains("D /etc/gone\n"), "{words}");
    snapshot::assert_same(&before, &store(&world), "the store changed");
}

fn fill(directory: &Path) -> std::path::PathBuf {
    let path = directory.join("filler");
    let mut file = File::create(&path).unwrap();
    let block = vec![0xaa; 1 << 20];
    while file.write_all(&block).is_ok() {}
    while file.write_all(&block[..512]).is_ok() {}
    path
}

pub(crate) fn noise(length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    fastrand::Rng::with_seed(1).fill(&mut bytes);
    bytes
}

fn a_full_store_keeps_the_chain_and_fails() {
    let world = World::new(ETC);
    world.boot();
    fs::write(world.at("etc/file"), "first").unwrap();
    world.checkpoint();
    let filler = fill(&world.at("persist"));
    let before = store(&world);
    fs::write(world.at("etc/big"), noise(3 << 20)).unwrap();
    let output = world.syncd(&["checkpoint"]);
    expect(&output, 1);
    assert!(text(&output).contains("No space left"), "{}", text(&output));
    let mut after = store(&world);
    let difference = snapshot::difference(&before, &after);
    // Making a temporary name and removing it again is all that may be seen.
    let times_of_store = Path::new("ephemeral-overlay/targets/etc");
    after.insert(times_of_store.into(), before[times_of_store].clone());
    assert_eq!(snapshot::difference(&before, &after), None, "{difference:?}");
    let status = world.syncd(&["status"]);
    expect(&status, 3);
    assert!(text(&status).contains("No space left"), "{}", text(&status));
    // With room again it works, and nothing was lost.
    fs::remove_file(filler).unwrap();
    world.checkpoint();
    world.cut();
    world.merge();
    assert_eq!(fs::read(world.at("etc/big")).unwrap(), noise(3 << 20));
    assert_eq!(fs::read(world.at("etc/file")).unwrap(), b"first");
}

fn an_upper_full_of_bytes_is_checkpointed() {
    let world = World::new(&format!("{ETC}overlay.size = '4M'"));
    world.boot();
    let etc = world.at("etc");
    let mut file = File::create(etc.join("file")).unwrap();
    while file.write_all(&noise(4096)).is_ok() {}
    let expected = snapshot::take(&etc);
    world.checkpoint();
    world.cut();
    world.merge();
    snapshot::assert_same(&expected, &snapshot::take(&etc), "the disk");
}

fn an_upper_full_of_inodes_is_checkpointed() {
    let world = World::new(&format!("{ETC}overlay.size = '4M'"));
    world.boot();
    let etc = world.at("etc");
    let made = (0..5000).take_while(|number| File::create(etc.join(format!("n{number}"))).is_ok()).count();
    assert!((100..5000).contains(&made), "{made} files before the inodes ran out");
    let expected = snapshot::take(&etc);
    world.checkpoint();
    world.cut();
    world.merge();
    snapshot::assert_same(&expected, &snapshot::take(&etc), "the disk");
}

fn an_unknown_artefact_stops_it() {
    let world = World::new(ETC);
    world.boot();
    fs::create_dir(world.at("etc/sub")).unwrap();
    world.checkpoint();
    let before = store(&world);
    let upper = File::open(world.upper()).unwrap();
    for (name, value) in [("redirect", "/elsewhere"), ("metacopy", ""), ("opaque", "x"), ("what", "y")] {
        let handle = Handle::child(upper.as_fd(), OsStr::new("sub"));
        let attribute = format!("trusted.overlay.{name}");
        handle.write(attribute.as_bytes(), value.as_bytes()).unwrap();
        let output = world.syncd(&["checkpoint"]);
        expect(&output, 1);
        let words = text(&output);
        assert!(words.contains("upper/sub") && words.contains(&attribute), "{words}");
        snapshot::assert_same(&before, &store(&world), "the store changed");
        let back = if name == "opaque" {
            handle.write(attribute.as_bytes(), b"y")
        } else {
            handle.remove(attribute.as_bytes())
        };
        back.unwrap();
    }
    expect(&world.syncd(&["checkpoint"]), 0);
}

fn a_name_that_merely_vanished_from_upper_is_as_lower() {
    let world = World::new(ETC);
    fs::create_dir(world.at("etc/sub")).unwrap();
    fs::write(world.at("etc/sub/file"), "lower").unwrap();
    world.boot();
    fs::write(world.at("etc/sub/file"), "upper").unwrap();
    fs::write(world.at("etc/sub/own"), "new").unwrap();
    world.checkpoint();
    // No whiteout was made: somebody took the file out of RAM, and lower's shows again.
    fs::remove_file(world.upper().join("sub/file")).unwrap();
    fs::remove_file(world.upper().join("sub/own")).unwrap();
    world.checkpoint();
    assert_eq!(after_a_cut(&world, "sub/file").unwrap(), b"lower");
    assert!(!world.at("etc/sub/own").exists());
}

struct StopAtEnd<'a>(&'a AtomicBool);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn a_name_that_is_listed_twice_is_one() {
    let world = World::new(ETC);
    world.boot();
    let upper = world.run.join("ram/etc/upper");
    for directory in ["a", "b"] {
        fs::create_dir(upper.join(directory)).unwrap();
    }
    let names: Vec<_> = (0..200).map(|number| format!("a file whose name is long enough {number}")).collect();
    for name in &names {
        fs::write(upper.join("a").join(name), "").unwrap();
    }
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _stop = StopAtEnd(&stop);
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                for (from, to) in [("a", "b"), ("b", "a")] {
                    for name in &names {
                        fs::rename(upper.join(from).join(name), upper.join(to).join(name)).unwrap();
                    }
                }
            }
        });
        for round in 0..2000 {
            let path = upper.join(["a", "b"][round % 2]);
            let listed = list(File::open(&path).unwrap().as_fd(), &path).unwrap();
            assert!(listed.windows(2).all(|pair| pair[0] < pair[1]), "round {round}: a name is listed twice");
        }
    });
}

fn a_disputed_deletion_gives_3_and_is_not_recorded() {
    let world = World::new(ETC);
    world.boot();
    let etc = world.at("etc");
    for directory in ["a", "b"] {
        fs::create_dir(etc.join(directory)).unwrap();
    }
    for number in 0..40 {
        fs::write(etc.join(format!("a/moving{number}")), "content").unwrap();
    }
    world.checkpoint();
    // Files jump from one directory to the other and back as fast as they can.
    let stop = AtomicBool::new(false);
    let (mut disputed, mut last) = (0, String::new());
    std::thread::scope(|scope| {
        // Also when an assertion fails: the scope waits for its threads.
        let _stop = StopAtEnd(&stop);
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                for (from, to) in [("a", "b"), ("b", "a")] {
                    for number in 0..40 {
                        let name = format!("moving{number}");
                        fs::rename(etc.join(from).join(&name), etc.join(to).join(&name)).unwrap();
                    }
                }
            }
        });
        let end = Instant::now() + Duration::from_secs(20);
        while disputed < 3 && Instant::now() < end {
            let output = world.syncd(&["checkpoint"]);
            last = text(&output);
            match tools::code(&output) {
                3 => disputed += usize::from(text(&output).contains("its loss is not recorded")),
                0 => {}
                other => panic!("{other}: {}", text(&output)),
            }
        }
    });
    assert!(disputed > 0, "no deletion was ever disputed");
    world.cut();
    world.merge();
    for number in 0..40 {
        let name = format!("moving{number}");
        let found = ["a", "b"].iter().filter(|directory| etc.join(directory).join(&name).exists()).count();
        // Where names never stood still it is said that one may be missing.
        let is_said = last.contains("one that was being moved may be missing");
        assert!(found > 0 || is_said, "{name} is gone, and the last checkpoint said: {last}");
    }
}

fn a_second_one_waits_for_the_first() {
    let world = World::new(ETC);
    world.boot();
    fs::write(world.at("etc/file"), "x").unwrap();
    world.checkpoint();
    let lock = File::open(world.at("persist/ephemeral-overlay/lock")).unwrap();
    flock(&lock, FlockOperation::LockExclusive).unwrap();
    fs::write(world.at("etc/file"), "before the call").unwrap();
    let mut waiting = world.syncd_command(&["checkpoint"]).stderr(Stdio::piped()).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(300));
    assert!(waiting.try_wait().unwrap().is_none(), "it did not wait");
    fs::write(world.at("etc/late"), "while it waited").unwrap();
    flock(&lock, FlockOperation::Unlock).unwrap();
    assert!(waiting.wait().unwrap().success());
    assert_eq!(after_a_cut(&world, "file").unwrap(), b"before the call");
    assert_eq!(fs::read(world.at("etc/late")).unwrap(), b"while it waited", "its pass began before its turn");
}

fn many_at_once_leave_one_chain() {
    let world = World::new(ETC);
    world.boot();
    for round in 0..4 {
        let mut running: Vec<_> = (0..4)
            .map(|number| {
                fs::write(world.at(&format!("etc/file{round}-{number}")), "x").unwrap();
                world.syncd_command(&["checkpoint", "-q"]).spawn().unwrap()
            })
            .collect();
        assert!(running.iter_mut().all(|child| child.wait().unwrap().success()));
    }
    let expected = snapshot::take(&world.at("etc"));
    world.cut();
    world.merge();
    snapshot::assert_same(&expected, &snapshot::take(&world.at("etc")), "the disk");
}

fn a_damaged_chain_is_superseded() {
    let world = World::new(ETC);
    world.boot();
    fs::write(world.at("etc/one"), "1").unwrap();
    world.checkpoint();
    fs::write(world.at("etc/two"), "2").unwrap();
    world.checkpoint();
    let newest = world.checkpoints().pop().unwrap();
    fs::write(&newest, b"not a checkpoint").unwrap();
    let status = world.syncd(&["status"]);
    expect(&status, 3);
    assert!(text(&status).contains("is damaged"), "{}", text(&status));
    // Upper still has everything: the next checkpoint is full and takes the chain's place.
    fs::write(world.at("etc/three"), "3").unwrap();
    let output = world.syncd(&["checkpoint"]);
    expect(&output, 0);
    assert!(text(&output).contains("replaced by a full one"), "{}", text(&output));
    assert_eq!(world.checkpoints().len(), 1);
    let expected = snapshot::take(&world.at("etc"));
    world.cut();
    world.merge();
    snapshot::assert_same(&expected, &snapshot::take(&world.at("etc")), "the disk");
}

fn a_broken_configuration_does_not_keep_it_from_saving() {
    let world = World::new(&format!("{ETC}persist.root = '/elsewhere'"));
    world.boot();
    fs::write(world.at("etc/file"), "x").unwrap();
    world.configure("nonsense = [");
    let output = world.syncd(&["checkpoint"]);
    expect(&output, 3);
    assert!(text(&output).contains("not valid TOML"), "{}", text(&output));
    assert!(world.at("elsewhere/ephemeral-overlay/targets/etc/0000000001.ckpt").exists(), "{}", text(&output));
}

fn an_older_initramfs_is_not_written_for() {
    let world = World::new(ETC);
    world.boot();
    fs::write(world.at("etc/file"), "x").unwrap();
    let boot = world.run.join("boot.json");
    let text = fs::read_to_string(&boot).unwrap();
    fs::write(&boot, text.replace("\"checkpoint_format\": 1", "\"checkpoint_format\": 0")).unwrap();
    let output = world.syncd(&["checkpoint"]);
    expect(&output, 1);
    assert!(
        crate::tools::text(&output).contains("reads checkpoints up to format 0"),
        "{}",
        crate::tools::text(&output)
    );
    assert!(world.checkpoints().is_empty());
}

fn a_directory_that_became_opaque_is_a_change() {
    // On the way to our own log the times of a directory do not count.
    let world = World::new(&format!("{ETC}log.file = '/etc/our.log'"));
    fs::create_dir(world.at("etc/d")).unwrap();
    fs::write(world.at("etc/d/secret"), "x").unwrap();
    world.boot();
    let times = fs::metadata(world.at("etc/d")).unwrap();
    fs::remove_dir_all(world.at("etc/d")).unwrap();
    fs::create_dir(world.at("etc/d")).unwrap();
    set_times(&world.at("etc/d"), times.mtime(), times.mtime_nsec());
    world.checkpoint();
    assert_eq!(after_a_cut(&world, "d/secret"), None, "what was deleted is back");
}

fn a_foreign_chain_stays_until_the_new_one_is_durable() {
    let world = World::new(ETC);
    world.boot();
    fs::write(world.at("etc/file"), "first").unwrap();
    world.checkpoint();
    // As after a roll-back of lower under a running system.
    let lower = File::open(world.run.join("lower/etc")).unwrap();
    ephemeral_overlay::token::Token(7).write(&Handle::of(lower.as_fd()), &world.run).unwrap();
    let filler = fill(&world.at("persist"));
    fs::write(world.at("etc/big"), noise(3 << 20)).unwrap();
    expect(&world.syncd(&["checkpoint"]), 1);
    assert_eq!(world.checkpoints().len(), 1, "the old chain is gone, and there is no new one");
    fs::remove_file(filler).unwrap();
    expect(&world.syncd(&["checkpoint"]), 3);
    assert!(world.store().join("aside/1-1/0000000001.ckpt").exists());
    assert_eq!(after_a_cut(&world, "file").unwrap(), b"first");
}

fn a_file_that_moves_is_saved_or_said_to_be_missing() {
    let world = World::new(ETC);
    world.boot();
    let etc = world.at("etc");
    // Enough between the two places that a scan takes its time.
    for directory in ["a", "b", "c"] {
        fs::create_dir(etc.join(directory)).unwrap();
    }
    for number in 0..300 {
        fs::write(etc.join(format!("b/n{number}")), "x").unwrap();
    }
    fs::write(etc.join("a/moving"), "content").unwrap();
    let disk = World::beside(&world, "copy");
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _stop = StopAtEnd(&stop);
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                fs::rename(etc.join("a/moving"), etc.join("c/moving")).unwrap();
                fs::rename(etc.join("c/moving"), etc.join("a/moving")).unwrap();
            }
        });
        for _ in 0..20 {
            let _the_first_of_its_chain = fs::remove_dir_all(world.store());
            let output = world.syncd(&["checkpoint"]);
            let words = text(&output);
            assert!(matches!(tools::code(&output), 0 | 3), "{words}");
            if ["never stood still", "was moving"].iter().any(|said| words.contains(said)) {
                continue;
            }
            // It stood still for the moment, and so it must be there, once.
            copy(&world.at("persist"), &disk.at("persist"));
            copy(&world.run.join("lower/etc"), &disk.at("etc"));
            disk.merge();
            let is_in = |directory: &&&str| disk.at("etc").join(directory).join("moving").exists();
            assert_eq!(["a", "c"].iter().filter(is_in).count(), 1, "{words}");
        }
    });
    expect(&world.syncd(&["checkpoint"]), 0);
    world.cut();
    world.merge();
    assert!(["a", "c"].iter().any(|directory| etc.join(directory).join("moving").exists()));
}

fn an_overlay_that_nobody_knows_is_an_error() {
    let world = World::new(ETC);
    world.boot();
    fs::write(world.at("etc/file"), "x").unwrap();
    fs::remove_file(world.run.join("boot.json")).unwrap();
    let output = world.syncd(&["checkpoint"]);
    expect(&output, 1);
    assert!(text(&output).contains("boot.json does not know them"), "{}", text(&output));
}

fn the_65th_supersedes_the_chain() {
    let world = World::new(ETC);
    world.boot();
    for number in 0..70 {
        fs::write(world.at("etc/file"), number.to_string()).unwrap();
        fs::write(world.at(&format!("etc/n{}", number % 7)), number.to_string()).unwrap();
        world.checkpoint();
        assert!(world.checkpoints().len() <= 64);
    }
    assert!(world.checkpoints().len() < 10, "{:?}", world.checkpoints());
    let expected = snapshot::take(&world.at("etc"));
    world.cut();
    world.merge();
    snapshot::assert_same(&expected, &snapshot::take(&world.at("etc")), "the disk");
    // Numbers go on after a merge.
    world.boot();
    fs::write(world.at("etc/file"), "again").unwrap();
    world.checkpoint();
    assert!(world.checkpoints()[0].ends_with("0000000071.ckpt"), "{:?}", world.checkpoints());
}

fn flags(path: &Path) -> IFlags {
    ioctl_getflags(File::open(path).unwrap()).unwrap() & (IFlags::IMMUTABLE | IFlags::APPEND)
}

fn set_flags(path: &Path, flags: IFlags) {
    let file = File::open(path).unwrap();
    let others = ioctl_getflags(&file).unwrap() - (IFlags::IMMUTABLE | IFlags::APPEND);
    // Through an overlay ext4's other flags (extents) are shown, and refused by the tmpfs that they would be set on.
    ioctl_setflags(&file, others | flags).or_else(|_| ioctl_setflags(&file, flags)).unwrap();
}

fn flags_of_chattr_are_kept() {
    let world = World::on(Disk::new(Fs::Ext4, 64), ETC);
    let etc = world.at("etc");
    for name in ["freed", "removed", "kept"] {
        fs::write(etc.join(name), "lower").unwrap();
        set_flags(&etc.join(name), IFlags::IMMUTABLE);
    }
    fs::create_dir(etc.join("dir")).unwrap();
    set_flags(&etc.join("dir"), IFlags::APPEND);
    world.boot();
    fs::write(etc.join("fixed"), "x").unwrap();
    set_flags(&etc.join("fixed"), IFlags::IMMUTABLE);
    fs::write(etc.join("log"), "x").unwrap();
    set_flags(&etc.join("log"), IFlags::APPEND);
    for name in ["freed", "removed"] {
        set_flags(&etc.join(name), IFlags::empty());
    }
    fs::write(etc.join("freed"), "upper").unwrap();
    fs::remove_file(etc.join("removed")).unwrap();
    set_flags(&etc.join("dir"), IFlags::empty());
    fs::write(etc.join("dir/inside"), "x").unwrap();
    set_flags(&etc.join("dir"), IFlags::IMMUTABLE);
    let expected = snapshot::take(&etc);
    world.checkpoint();
    world.cut();
    world.merge();
    snapshot::assert_same(&expected, &snapshot::take(&etc), "the disk");
    let all = ["fixed", "log", "freed", "kept", "dir"].map(|name| flags(&etc.join(name)));
    let wanted = [IFlags::IMMUTABLE, IFlags::APPEND, IFlags::empty(), IFlags::IMMUTABLE, IFlags::IMMUTABLE];
    assert_eq!(all, wanted);
    // Once more over protected objects.
    world.boot();
    set_flags(&etc.join("log"), IFlags::empty());
    fs::write(etc.join("log"), "rewritten").unwrap();
    world.checkpoint();
    assert_eq!(after_a_cut(&world, "log").unwrap(), b"rewritten");
    for name in ["fixed", "kept", "dir"] {
        set_flags(&etc.join(name), IFlags::empty());
    }
}

fn an_attribute_that_nobody_can_read_is_none() {
    let world = World::new(ETC);
    world.boot();
    fs::write(world.at("etc/program"), "a program").unwrap();
    let file = File::open(world.at("etc/program")).unwrap();
    Handle::open(file.as_fd()).write(CAPABILITY.as_bytes(), b"").unwrap();
    let mut names = [0; 100];
    let length = flistxattr(&file, &mut names).unwrap();
    assert_eq!(&names[..length], b"security.capability\0");
    assert_eq!(fgetxattr(&file, CAPABILITY, &mut [0; 100]), Err(Errno::INVAL));
    drop(file);
    world.checkpoint();
    assert_eq!(after_a_cut(&world, "program").unwrap(), b"a program");
}

fn the_store_is_for_root_alone() {
    let world = World::new(ETC);
    world.boot();
    fs::write(world.at("etc/shadow"), "secret").unwrap();
    world.checkpoint();
    for (path, object) in std::iter::once(world.at("persist/ephemeral-overlay"))
        .chain(world.checkpoints())
        .chain([world.store(), world.run.clone(), world.run.join("ram"), world.upper().parent().unwrap().to_path_buf()])
        .map(|path| (path.clone(), fs::symlink_metadata(path).unwrap()))
    {
        assert_eq!(object.mode() & 0o077, 0, "{} is {:o}", path.display(), object.mode());
    }
}

fn without_the_hook_there_is_nothing_to_do() {
    let world = World::new(ETC);
    let output = world.syncd(&["checkpoint"]);
    expect(&output, 0);
    assert!(text(&output).contains("the hook was not active"), "{}", text(&output));
    assert!(!world.at("persist/ephemeral-overlay").exists());
}

fn an_unknown_target_is_a_usage_error() {
    let world = World::new(ETC);
    world.boot();
    fs::write(world.at("etc/file"), "x").unwrap();
    for command in ["checkpoint", "merge"] {
        let output = world.syncd(&[command, "/nowhere"]);
        expect(&output, 2);
        assert!(text(&output).contains("/nowhere is not a target; known are: /etc"), "{}", text(&output));
    }
    expect(&world.syncd(&["checkpoint", "--no-such-option"]), 2);
    expect(&world.syncd(&["no-such-command"]), 2);
}

fn json(world: &World, args: &[&str]) -> serde_json::Value {
    serde_json::from_slice(&world.syncd(args).stdout).unwrap()
}

fn json_has_the_documented_keys() {
    let world = World::new(ETC);
    world.boot();
    fs::write(world.at("etc/file"), "x").unwrap();
    let report = json(&world, &["checkpoint", "--json"]);
    assert_eq!(report["version"], 1);
    assert_eq!((&report["targets"][0]["target"], &report["targets"][0]["sequence"]), (&"/etc".into(), &1.into()));
    assert_eq!(report["targets"][0]["status"], 0);
    assert!(report["targets"][0]["written_bytes"].as_u64().unwrap() > 0);
    let status = json(&world, &["status", "--json"]);
    assert_eq!((&status["version"], &status["active"]), (&1.into(), &true.into()));
    let target = &status["targets"][0];
    assert_eq!((&target["pending"], &target["unsaved"], &target["mounted"]), (&1.into(), &0.into(), &true.into()));
    assert_eq!(target["last"]["sequence"], 1);
    assert!(status["ram"]["used_bytes"].as_u64().unwrap() < status["ram"]["size_bytes"].as_u64().unwrap());
}

fn status_tells_what_a_cut_would_cost() {
    let world = World::new(ETC);
    world.boot();
    let unsaved = |world: &World| json(world, &["status", "--json"])["targets"][0]["unsaved"].as_u64().unwrap();
    assert_eq!(unsaved(&world), 0);
    fs::write(world.at("etc/file"), "x").unwrap();
    // The file, and the directory that it is new in.
    assert_eq!(unsaved(&world), 2);
    world.checkpoint();
    assert_eq!(unsaved(&world), 0);
    OpenOptions::new().append(true).open(world.at("etc/file")).unwrap().write_all(b"more").unwrap();
    assert_eq!(unsaved(&world), 1);
}
