//! The races that a user may win, each at the one moment that counts: a start is stopped there by strace.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::symlink;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use test_support::snapshot;

use super::{CONFIG, People, Place, fill, make, mounts, said};
use crate::sweep::strace_command;
use crate::world::expect;

/// Starts the cache; when `inject` stops it, behind a call, does `act`.
fn meanwhile(people: &People, inject: &[&str], act: impl FnOnce()) -> Output {
    let log = tempfile::NamedTempFile::new().unwrap();
    let command = people.world.syncd_command(&["user-cache", "start", "1000"]);
    let options = [inject, &["-o", log.path().to_str().unwrap()]].concat();
    let mut strace = strace_command(&command, &options);
    let child = strace.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let stopped = (0..500).find_map(|_| {
        std::thread::sleep(Duration::from_millis(10));
        let text = fs::read_to_string(log.path()).unwrap();
        // `1234 --- stopped by SIGSTOP ---`
        let line = text.lines().find(|line| line.contains("stopped by SIGSTOP"))?;
        line.split(' ').next()?.parse().ok()
    });
    let pid = Pid::from_raw(stopped.expect("it was not stopped")).unwrap();
    act();
    kill_process(pid, Signal::CONT).unwrap();
    child.wait_with_output().unwrap()
}

/// With `paru` only.
fn people(place: Place) -> People {
    let people = People::new(place);
    people.world.configure(&CONFIG.replace(", 'nvidia'", ""));
    people
}

/// Behind the look at the folder.
fn at_the_look(people: &People) -> [String; 4] {
    let cache = people.cache().to_str().unwrap().to_owned();
    ["-e".into(), "inject=openat2:signal=STOP:when=1".into(), "-P".into(), cache]
}

pub(super) fn a_cache_that_is_moved_meanwhile_is_not_covered() {
    let people = people(Place::SameDisk);
    let (cache, moved) = (people.cache(), people.world.at("home/alice/moved"));
    fill(&cache);
    let before = people.mounts();
    // The last call before the cache is attached.
    let output = meanwhile(&people, &["-e", "inject=umount2:signal=STOP:when=1"], || {
        fs::rename(&cache, &moved).unwrap();
        make(&cache, 1000);
    });
    said(&output, 3, "it was moved");
    assert_eq!(people.mounts(), before);
    assert!(moved.join("other/file").exists());
}

pub(super) fn a_cache_that_is_moved_with_its_mount_is_the_only_one() {
    let people = people(Place::SameDisk);
    let (cache, moved) = (people.cache(), people.world.at("home/alice/moved"));
    fill(&cache);
    // There nothing is mounted on it.
    let mut older = Command::new("unshare")
        .args(["-m", "--propagation", "private", "sh", "-c", "echo ready; read line; exec mv \"$0\" \"$1\""])
        .args([&cache, &moved])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(older.stdout.take().unwrap()).read_line(&mut line).unwrap();
    expect(&people.start(), 0);
    older.stdin.take().unwrap().write_all(b"go\n").unwrap();
    assert!(older.wait().unwrap().success());
    assert_eq!(mounts(&moved).len(), 2, "the kernel forbids it now");
    make(&cache, 1000);
    for _ in 0..2 {
        said(&people.start(), 3, "it was moved to");
        said(&people.stop(), 0, "it was not in RAM");
    }
    assert!(mounts(&cache).is_empty());
    assert_eq!(mounts(&moved).len(), 2);
}

pub(super) fn a_folder_that_is_exchanged_meanwhile_is_given_back() {
    let people = people(Place::SameDisk);
    let (paru, mine) = (people.cache().join("paru"), people.cache().join("mine"));
    let before = fill(&people.cache());
    let options = at_the_look(&people);
    let output = meanwhile(&people, &options.each_ref().map(String::as_str), || {
        fs::rename(&paru, &mine).unwrap();
        symlink("../../bob", &paru).unwrap();
    });
    said(&output, 3, "it stays where it was");
    people.stopped();
    assert!(fs::symlink_metadata(&paru).unwrap().is_symlink());
    assert!(!people.kept().join("1000/paru").exists());
    assert_eq!(fs::read_dir(people.kept().join("moved/1000")).unwrap().count(), 0);
    snapshot::assert_same(&before, &snapshot::take(&mine), "what was moved away");
}

pub(super) fn a_folder_that_is_exchanged_during_its_copy_is_left() {
    let people = people(Place::OtherDisk);
    let (paru, mine) = (people.cache().join("paru"), people.cache().join("mine"));
    let before = fill(&people.cache());
    let options = at_the_look(&people);
    let output = meanwhile(&people, &options.each_ref().map(String::as_str), || {
        fs::rename(&paru, &mine).unwrap();
        make(&paru, 1000);
        fs::write(paru.join("other"), "another one").unwrap();
    });
    said(&output, 3, "it was exchanged while it was copied");
    people.stopped();
    assert_eq!(fs::read(paru.join("other")).unwrap(), b"another one");
    assert!(!people.kept().join("1000/paru").exists());
    snapshot::assert_same(&before, &snapshot::take(&mine), "what was moved away");
}

pub(super) fn a_file_that_is_changed_during_its_copy_is_left() {
    let people = people(Place::OtherDisk);
    let paru = people.cache().join("paru");
    let file = paru.join("dir/linked");
    fill(&people.cache());
    let times = fs::metadata(&file).unwrap().modified().unwrap();
    let output = meanwhile(&people, &["-e", "inject=syncfs:signal=STOP:when=1"], || {
        let length = fs::metadata(&file).unwrap().len();
        fs::write(&file, vec![b'!'; usize::try_from(length).unwrap()]).unwrap();
        // Sizes and times alone say nothing.
        fs::File::options().write(true).open(&file).unwrap().set_modified(times).unwrap();
    });
    said(&output, 3, "dir/linked in it changed while it was copied");
    let before = snapshot::take(&paru);
    people.stopped();
    assert!(people.cache().join("paru/file").exists());
    expect(&people.start(), 0);
    snapshot::assert_same(&before, &snapshot::take(&paru), "copied by the next start");
}
