//! `~/.cache` in RAM: what a session finds there, what is kept of it, and what a hostile user can make of it (nothing).

pub(crate) mod hostile;
mod race;

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::Output;

use ephemeral_overlay::mountinfo::{self, Mount};
use rustix::fs::{CWD, FileType, Mode, StatVfsMountFlags, XattrFlags, mknodat, setxattr, statvfs};
use rustix::mount::{UnmountFlags, unmount};
use test_support::snapshot::{self, Snapshot};

use crate::restart::sweep;
use crate::run::Daemon;
use crate::sweep::{copy, strace};
use crate::tools::{self, text};
use crate::world::{Disk, Fs, World, expect};

pub(crate) const TESTS: &[(&str, fn())] = &[
    ("a_cache_is_in_ram_for_a_session", a_cache_is_in_ram_for_a_session),
    ("all_of_it_is_there_where_mounts_are_shared", all_of_it_is_there_where_mounts_are_shared),
    ("a_missing_cache_is_made", a_missing_cache_is_made),
    ("a_folder_is_moved_once_and_kept", || a_folder_is_kept(Place::SameDisk)),
    ("a_folder_is_copied_once_and_kept", || a_folder_is_kept(Place::OtherDisk)),
    ("a_move_killed_anywhere_is_done_by_the_next", || killed_anywhere(Place::SameDisk)),
    ("a_copy_killed_anywhere_is_done_by_the_next", || killed_anywhere(Place::OtherDisk)),
    ("a_copy_that_fails_leaves_the_old_folder_in_use", a_copy_that_fails_leaves_the_old_folder_in_use),
    ("a_copy_that_was_cut_is_not_taken_for_what_is_gone", a_copy_that_was_cut_is_not_taken_for_what_is_gone),
    ("a_copy_that_has_no_room_is_not_begun", a_copy_that_has_no_room_is_not_begun),
    ("what_is_no_cache_of_the_user_is_left", what_is_no_cache_of_the_user_is_left),
    ("a_folder_that_is_not_the_users_is_left", a_folder_that_is_not_the_users_is_left),
    ("everybody_gets_one_at_once", everybody_gets_one_at_once),
    ("the_daemon_sees_to_them_where_no_systemd_does", the_daemon_sees_to_them_where_no_systemd_does),
    ("accounts_are_left_alone", accounts_are_left_alone),
    ("nothing_is_unmounted_that_is_in_use", nothing_is_unmounted_that_is_in_use),
    ("a_cache_that_is_moved_meanwhile_is_not_covered", race::a_cache_that_is_moved_meanwhile_is_not_covered),
    (ALONE[0], race::a_cache_that_is_moved_with_its_mount_is_the_only_one),
    ("a_folder_that_is_exchanged_meanwhile_is_given_back", race::a_folder_that_is_exchanged_meanwhile_is_given_back),
    ("a_folder_that_is_exchanged_during_its_copy_is_left", race::a_folder_that_is_exchanged_during_its_copy_is_left),
    ("a_file_that_is_changed_during_its_copy_is_left", race::a_file_that_is_changed_during_its_copy_is_left),
    (ALONE[1], hostile::a_hostile_user_reaches_nothing),
];

/// They copy the mount table.
pub(crate) const ALONE: [&str; 2] =
    ["a_cache_that_is_moved_with_its_mount_is_the_only_one", "a_hostile_user_reaches_nothing"];

const CONFIG: &str = "overlay.dirs = []\n\
    tmpfs = { '/tmp' = false, '/var/tmp' = false, '/var/cache' = false, user_cache = '8M' }\n\
    persist.user_cache = ['paru', 'nvidia']\n";

const PASSWD: &str = "root:x:0:0::/root:/bin/sh\ndaemon:x:2:2::/home/daemon:/bin/sh\n\
    alice:x:1000:1000::/home/alice:/bin/sh\nbob:x:1001:1001::/home/bob:/bin/sh\n\
    git:x:1002:1002::/home/git:/usr/bin/nologin\nlost:x:1003:1003::/home/lost:/bin/sh\n\
    nobody:x:65534:65534::/home/nobody:/bin/sh\n";

/// Every call by which a start changes something.
const CALLS: &str = "mkdirat,mknodat,symlinkat,linkat,renameat,renameat2,unlinkat,pwrite64,ftruncate,fchown,fchownat,\
    fchmod,chmod,setxattr,fsetxattr,utimensat,fsync,syncfs,open_tree,move_mount,fsmount,mount,umount2";

/// Where the homes are.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    SameDisk,
    OtherDisk,
}

/// A system with people.
pub(crate) struct People {
    pub(crate) world: World,
    homes: Option<Disk>,
}

impl People {
    fn new(place: Place) -> Self {
        Self::on(World::new(CONFIG), place)
    }

    fn on(world: World, place: Place) -> Self {
        fs::write(world.at("etc/passwd"), PASSWD).unwrap();
        fs::write(world.at("etc/group"), "cache:x:2000:alice\n").unwrap();
        fs::create_dir(world.at("home")).unwrap();
        // The users go through it.
        fs::set_permissions(world.disk().path().parent().unwrap(), Permissions::from_mode(0o711)).unwrap();
        let people = Self { world, homes: (place == Place::OtherDisk).then(|| Disk::new(Fs::Ext4, 32)) };
        people.mount_homes();
        for (name, uid) in [("alice", 1000), ("bob", 1001), ("git", 1002), ("daemon", 2), ("nobody", 65534)] {
            make(&people.world.at("home").join(name), uid);
        }
        people
    }

    fn mount_homes(&self) {
        if let Some(disk) = &self.homes {
            let (from, to) = (disk.path(), self.world.at("home"));
            tools::run("mount", &["--bind", from.to_str().unwrap(), to.to_str().unwrap()]);
        }
    }

    /// Of alice.
    pub(crate) fn cache(&self) -> PathBuf {
        self.world.at("home/alice/.cache")
    }

    pub(crate) fn kept(&self) -> PathBuf {
        self.world.at("persist/user-cache")
    }

    fn start(&self) -> Output {
        self.world.syncd(&["user-cache", "start", "1000"])
    }

    fn stop(&self) -> Output {
        self.world.syncd(&["user-cache", "stop", "1000"])
    }

    /// Stops, and expects that nothing is in use.
    fn stopped(&self) {
        for _ in 0..100 {
            // Another test's child may hold our descriptors for a moment, between its fork and its exec.
            if tools::code(&self.stop()) == 0 {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        expect(&self.stop(), 0);
    }

    /// All that is mounted in this system, lowest first.
    fn mounts(&self) -> Vec<PathBuf> {
        let mounts = [mounts(&self.world.root), mounts(&self.world.run)].concat();
        mounts.into_iter().map(|mount| mount.mount_point).collect()
    }

    /// Everything in RAM is gone.
    fn cut(&self) {
        self.world.cut();
        self.mount_homes();
    }
}

/// Makes a directory of a user.
fn make(path: &Path, uid: u32) {
    fs::create_dir(path).unwrap();
    chown(path, Some(uid), Some(uid)).unwrap();
}

/// Makes a cache with `paru` in it, which has everything that a folder can have.
fn fill(cache: &Path) -> Snapshot {
    for name in ["", "paru", "paru/dir", "paru/dir/read-only", "other"] {
        fs::create_dir(cache.join(name)).unwrap();
    }
    let paru = cache.join("paru");
    for name in ["file", "empty", "dir/linked", "dir/read-only/file"] {
        fs::write(paru.join(name), if name == "empty" { "" } else { name }).unwrap();
    }
    let sparse = File::create(paru.join("sparse")).unwrap();
    sparse.set_len(3 << 20).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&sparse, &[7; 5000], 1 << 20).unwrap();
    fs::hard_link(paru.join("dir/linked"), paru.join("link")).unwrap();
    symlink("/etc/shadow", paru.join("symlink")).unwrap();
    mknodat(CWD, paru.join("fifo"), FileType::Fifo, Mode::from_raw_mode(0o640), 0).unwrap();
    setxattr(paru.join("file"), "user.test", b"value", XattrFlags::empty()).unwrap();
    fs::write(cache.join("other/file"), "hidden").unwrap();
    tools::run("chown", &["-Rh", "1000:1000", cache.to_str().unwrap()]);
    // A group that alice is in.
    chown(paru.join("file"), None, Some(2000)).unwrap();
    fs::set_permissions(paru.join("file"), Permissions::from_mode(0o4755)).unwrap();
    fs::set_permissions(paru.join("dir/read-only"), Permissions::from_mode(0o555)).unwrap();
    fs::set_permissions(cache, Permissions::from_mode(0o750)).unwrap();
    chown(cache, None, Some(2000)).unwrap();
    snapshot::take(&paru)
}

/// What is mounted at a path and below, lowest first.
fn mounts(path: &Path) -> Vec<Mount> {
    let mut mounts = mountinfo::parse(&fs::read("/proc/self/mountinfo").unwrap());
    mounts.retain(|mount| mount.mount_point.starts_with(path));
    for mount in &mut mounts {
        // What was taken away and put back has another number.
        (mount.id, mount.parent) = (0, 0);
    }
    mounts
}

fn said(output: &Output, status: i32, part: &str) {
    expect(output, status);
    assert!(text(output).contains(part), "{part:?} was not said: {}", text(output));
}

/// What a user sees of a directory: owner, group, mode.
fn owner(path: &Path) -> (u32, u32, u32) {
    let stat = fs::symlink_metadata(path).unwrap();
    (stat.uid(), stat.gid(), stat.mode() & 0o7777)
}

fn a_cache_is_in_ram_for_a_session() {
    let people = People::new(Place::SameDisk);
    let cache = people.cache();
    fill(&cache);
    expect(&people.start(), 0);
    assert_eq!(owner(&cache), (1000, 2000, 0o750));
    let found = statvfs(&cache).unwrap();
    assert_eq!(found.f_blocks * found.f_frsize, 8 << 20);
    let restricted = StatVfsMountFlags::NOSUID | StatVfsMountFlags::NODEV;
    for path in [&cache, &cache.join("paru"), &cache.join("nvidia")] {
        assert!(statvfs(path).unwrap().f_flag.contains(restricted), "{}", path.display());
    }
    assert_eq!(
        mounts(&cache).iter().map(|mount| mount.fs_type.as_str()).collect::<Vec<_>>(),
        ["tmpfs", "ext4", "ext4"]
    );
    assert!(!cache.join("other").exists());
    fs::write(cache.join("new"), "RAM").unwrap();
    let before = people.mounts();

    // Twice is as good as once.
    said(&people.start(), 0, "in RAM already");
    assert_eq!(people.mounts(), before);
    assert!(cache.join("new").exists());

    people.stopped();
    assert!(mounts(&cache).is_empty());
    assert!(!cache.join("new").exists());
    assert_eq!(fs::read(cache.join("other/file")).unwrap(), b"hidden");
    assert_eq!(owner(&cache), (1000, 2000, 0o750));
    said(&people.stop(), 0, "it was not in RAM");
    assert!(mounts(&people.world.run).is_empty());

    people.world.configure(&CONFIG.replace("'8M'", "false"));
    said(&people.start(), 0, "tmpfs.user_cache is false");
    assert!(mounts(&cache).is_empty());
}

fn all_of_it_is_there_where_mounts_are_shared() {
    // As systemd has them: what is unmounted in one place goes in all that are shared with it.
    let people = People::new(Place::OtherDisk);
    let before = fill(&people.cache());
    fs::create_dir(&people.world.run).unwrap();
    let (run, root, homes) = (&people.world.run, people.world.disk().path(), people.world.at("home"));
    tools::run("mount", &["--bind", run.to_str().unwrap(), run.to_str().unwrap()]);
    for path in [run, &root, &homes] {
        tools::run("mount", &["--make-shared", path.to_str().unwrap()]);
    }
    let mounted = people.mounts();
    expect(&people.start(), 0);
    assert_eq!(mounts(&people.cache()).len(), 3);
    snapshot::assert_same(&before, &snapshot::take(&people.cache().join("paru")), "in RAM");
    people.stopped();
    assert_eq!(people.mounts(), mounted);
    unmount(run, UnmountFlags::DETACH).unwrap();
}

fn a_missing_cache_is_made() {
    let people = People::new(Place::SameDisk);
    // Not executable there, not executable here.
    let home = people.world.at("home");
    tools::run("mount", &["--bind", home.to_str().unwrap(), home.to_str().unwrap()]);
    tools::run("mount", &["-o", "remount,bind,noexec", home.to_str().unwrap()]);
    expect(&people.start(), 0);
    assert_eq!(owner(&people.cache()), (1000, 1000, 0o700));
    assert_eq!(owner(&people.cache().join("nvidia")), (1000, 1000, 0o700));
    for path in [people.cache(), people.cache().join("nvidia")] {
        assert!(statvfs(&path).unwrap().f_flag.contains(StatVfsMountFlags::NOEXEC), "{}", path.display());
    }
    people.stopped();
    assert_eq!(owner(&people.cache()), (1000, 1000, 0o700));
}

fn a_folder_is_kept(place: Place) {
    let people = People::new(place);
    let (cache, paru) = (people.cache(), people.cache().join("paru"));
    let before = fill(&cache);
    expect(&people.start(), 0);
    snapshot::assert_same(&before, &snapshot::take(&paru), "after the first start");
    fs::write(paru.join("new"), "kept").unwrap();
    let before = snapshot::take(&paru);
    people.stopped();
    let on_disk = fs::read_dir(&cache).unwrap().map(|entry| entry.unwrap().file_name());
    assert_eq!(on_disk.collect::<Vec<_>>(), ["other"], "the old folder is still there");
    nothing_is_under_way(&people);
    // Users must not reach one another's.
    for path in ["", "1000"] {
        assert_eq!(owner(&people.kept().join(path)), (0, 0, 0o700));
    }
    snapshot::assert_same(&before, &snapshot::take(&people.kept().join("1000/paru")), "where it is kept");
    expect(&people.start(), 0);
    snapshot::assert_same(&before, &snapshot::take(&paru), "after the second start");

    // What was made on disk without us is not taken for it, and not removed.
    people.stopped();
    make(&paru, 1000);
    said(&people.start(), 3, "another one");
    snapshot::assert_same(&before, &snapshot::take(&paru), "beside another one");
    people.stopped();
    assert!(paru.exists());
}

fn nothing_is_under_way(people: &People) {
    for stage in ["moved", "copies"] {
        let landing = people.kept().join(stage).join("1000");
        assert_eq!(fs::read_dir(&landing).unwrap().count(), 0, "{}", landing.display());
    }
}

fn killed_anywhere(place: Place) {
    let people = People::new(place);
    let (cache, paru) = (people.cache(), people.cache().join("paru"));
    let before = fill(&cache);
    let saved = people.world.at("saved cache");
    copy(&cache, &saved);
    let prepare = || {
        people.cut();
        if people.kept().exists() {
            fs::remove_dir_all(people.kept()).unwrap();
        }
        copy(&saved, &cache);
    };
    let command = people.world.syncd_command(&["user-cache", "start", "1000"]);
    let stride = if std::env::var("KILLS").is_ok_and(|value| value == "full") { 1 } else { 11 };
    let points = sweep(&command, CALLS, stride, &prepare, &|what| {
        let output = people.start();
        assert_eq!(tools::code(&output), 0, "{what}: {}", text(&output));
        snapshot::assert_same(&before, &snapshot::take(&paru), what);
        assert_eq!(mounts(&cache).len(), 3, "{what}");
        people.stopped();
        let on_disk = fs::read_dir(&cache).unwrap().map(|entry| entry.unwrap().file_name());
        assert_eq!(on_disk.collect::<Vec<_>>(), ["other"], "{what}: the old folder is still there");
        nothing_is_under_way(&people);
        assert!(mounts(&people.world.run).is_empty(), "{what}");
    });
    println!("{points} points");
    assert!(points * stride > 20, "only {points} points");
}

fn a_copy_that_fails_leaves_the_old_folder_in_use() {
    let people = People::new(Place::OtherDisk);
    let (cache, paru) = (people.cache(), people.cache().join("paru"));
    let before = fill(&cache);
    let command = people.world.syncd_command(&["user-cache", "start", "1000"]);
    people.world.configure(&CONFIG.replace(", 'nvidia'", ""));
    let (kept, copies) = (people.kept().join("1000"), people.kept().join("copies/1000/paru"));
    for (call, error, within, part) in [
        ("pwrite64", "ENOSPC", None, "No space left"),
        ("pwrite64", "EIO", None, "Input/output error"),
        ("pread64", "EIO", Some(&paru.join("file")), "Input/output error"),
        ("syncfs", "EIO", Some(&copies), "Input/output error"),
        ("renameat2", "EIO", Some(&cache), "Input/output error"),
        ("renameat2", "ENOSPC", Some(&kept), "No space left"),
        ("utimensat", "EIO", Some(&copies), "Input/output error"),
        ("fsetxattr", "ENOSPC", None, "file in it changed while it was copied"),
    ] {
        let inject = format!("inject={call}:error={error}");
        let mut options = vec!["-e", &inject, "-o", "/dev/null"];
        options.extend(within.iter().flat_map(|path| ["-P", path.to_str().unwrap()]));
        let output = strace(&command, &options);
        assert_eq!(tools::code(&output), 3, "{inject}: {}", text(&output));
        said(&output, 3, part);
        snapshot::assert_same(&before, &snapshot::take(&paru), call);
        assert_eq!(fs::read_dir(copies.parent().unwrap()).unwrap().count(), 0, "{call}: the copy is left");
        assert!(!kept.join("paru").exists(), "{call}");
        people.stopped();
        snapshot::assert_same(&before, &snapshot::take(&paru), call);
    }
    expect(&people.start(), 0);
    snapshot::assert_same(&before, &snapshot::take(&paru), "in the end");
}

fn a_copy_that_was_cut_is_not_taken_for_what_is_gone() {
    let people = People::new(Place::OtherDisk);
    let paru = people.cache().join("paru");
    fill(&people.cache());
    let command = people.world.syncd_command(&["user-cache", "start", "1000"]);
    let output = strace(&command, &["-e", "inject=syncfs:signal=KILL", "-o", "/dev/null"]);
    assert!(!output.status.success());
    assert!(people.kept().join("copies/1000/paru/file").exists());
    fs::remove_dir_all(&paru).unwrap();
    expect(&people.start(), 0);
    assert_eq!(fs::read_dir(&paru).unwrap().count(), 0);
}

fn a_copy_that_has_no_room_is_not_begun() {
    let people = People::new(Place::OtherDisk);
    let (cache, paru) = (people.cache(), people.cache().join("paru"));
    fill(&cache);
    fs::write(paru.join("large"), vec![1; 4 << 20]).unwrap();
    chown(paru.join("large"), Some(1000), Some(1000)).unwrap();
    let before = snapshot::take(&paru);
    let filler = people.world.at("filler");
    let free = statvfs(&people.world.root).map(|stat| stat.f_bavail * stat.f_frsize).unwrap();
    tools::run("fallocate", &["-l", &(free - (3 << 20)).to_string(), filler.to_str().unwrap()]);
    said(&people.start(), 3, "are free");
    snapshot::assert_same(&before, &snapshot::take(&paru), "in RAM");
    fs::write(paru.join("more"), "on disk").unwrap();
    chown(paru.join("more"), Some(1000), Some(1000)).unwrap();
    people.stopped();
    assert_eq!(fs::read(paru.join("more")).unwrap(), b"on disk");
    fs::remove_file(filler).unwrap();
    expect(&people.start(), 0);
    assert_eq!(fs::read(paru.join("more")).unwrap(), b"on disk");
}

fn what_is_no_cache_of_the_user_is_left() {
    let people = People::new(Place::SameDisk);
    let cache = people.cache();
    let left = |why: &str| {
        said(&people.start(), 3, why);
        assert!(!people.kept().join("1000").exists(), "{why}");
    };
    fill(&people.world.at("home/alice/elsewhere"));
    symlink("elsewhere", &cache).unwrap();
    left("it is a symlink");
    fs::remove_file(&cache).unwrap();
    fs::write(&cache, "").unwrap();
    left("it is not a directory");
    fs::remove_file(&cache).unwrap();
    fill(&cache);
    chown(&cache, Some(1001), Some(1001)).unwrap();
    // alice cannot even open it, or it belongs to somebody else.
    left("is left as it is");
    fs::set_permissions(&cache, Permissions::from_mode(0o755)).unwrap();
    left("it belongs to the user 1001");
    chown(&cache, Some(1000), Some(1000)).unwrap();
    for (at, why) in [(cache.join("paru"), "is mounted in it"), (cache.clone(), "something is mounted there already")] {
        tools::run("mount", &["-t", "tmpfs", "somebody", at.to_str().unwrap()]);
        let before = people.mounts();
        left(why);
        assert_eq!(people.mounts(), before);
        people.stopped();
        assert_eq!(people.mounts(), before);
    }
    unmount(&cache, UnmountFlags::empty()).unwrap();
    unmount(cache.join("paru"), UnmountFlags::empty()).unwrap();
    chown(people.world.at("home/alice"), Some(1001), None).unwrap();
    left("it belongs to the user 1001");
    chown(people.world.at("home/alice"), Some(1000), None).unwrap();
    expect(&people.start(), 0);
}

fn a_folder_that_is_not_the_users_is_left() {
    for place in [Place::SameDisk, Place::OtherDisk] {
        let people = People::new(place);
        let (cache, paru) = (people.cache(), people.cache().join("paru"));
        let before = fill(&cache);
        let not_kept = |why: &str| {
            said(&people.start(), 3, why);
            assert_eq!(mounts(&cache).len(), 2, "{why}");
            assert!(!people.kept().join("1000/paru").exists(), "{why}");
            people.stopped();
        };
        fs::rename(&paru, people.world.at("home/alice/elsewhere")).unwrap();
        symlink("../elsewhere", &paru).unwrap();
        not_kept("it is a symlink");
        fs::remove_file(&paru).unwrap();
        fs::rename(people.world.at("home/alice/elsewhere"), &paru).unwrap();
        chown(&paru, Some(1001), None).unwrap();
        not_kept("it belongs to the user 1001");
        chown(&paru, Some(1000), None).unwrap();
        snapshot::assert_same(&before, &snapshot::take(&paru), "it was left");
        if place == Place::OtherDisk {
            // Neither read nor given to the user: it stays where it is, and is used there.
            for mode in [0o644, 0o600] {
                fs::write(paru.join("dir/roots"), "secret").unwrap();
                fs::set_permissions(paru.join("dir/roots"), Permissions::from_mode(mode)).unwrap();
                let before = snapshot::take(&paru);
                said(&people.start(), 3, if mode == 0o644 { "belongs to the user 0" } else { "Permission denied" });
                snapshot::assert_same(&before, &snapshot::take(&paru), "it is used where it was");
                people.stopped();
                fs::remove_file(paru.join("dir/roots")).unwrap();
            }
        }
    }
}

/// One whose cache cannot be used keeps nobody else from theirs.
fn everybody_gets_one_at_once() {
    let people = People::new(Place::SameDisk);
    let before = people.mounts();
    let cache = |name: &str| people.world.at("home").join(name).join(".cache");
    symlink("/etc", cache("alice")).unwrap();
    let all = |action: &str| people.world.syncd(&["user-cache", action]);
    said(&all("start"), 3, "alice/.cache is left as it is: it is a symlink");
    assert!(mounts(&cache("alice")).is_empty());
    assert_eq!(mounts(&cache("bob")).len(), 3);
    for name in ["git", "daemon", "nobody"] {
        assert!(!cache(name).exists(), "{name}");
    }
    expect(&all("stop"), 0);
    assert_eq!(people.mounts(), before);
}

/// Where systemd runs a unit does it, for each session.
fn the_daemon_sees_to_them_where_no_systemd_does() {
    let people = People::new(Place::SameDisk);
    people.world.boot();
    let daemon = Daemon::start_with(people.world.syncd_command(&["run"]), |_| ());
    let is_ours = !Path::new("/run/systemd/system").exists();
    assert_eq!(mounts(&people.cache()).len(), if is_ours { 3 } else { 0 }, "{}", daemon.text());
    drop(daemon);
    people.stopped();
    // Without the hook nothing is in RAM.
    people.cut();
    let daemon = Daemon::start_with(people.world.syncd_command(&["run"]), |_| ());
    assert!(mounts(&people.cache()).is_empty(), "{}", daemon.text());
}

fn accounts_are_left_alone() {
    let people = People::new(Place::SameDisk);
    let before = people.mounts();
    let start = |uid: &str| people.world.syncd(&["user-cache", "start", uid]);
    for uid in ["0", "2", "65534"] {
        said(&start(uid), 0, "a user of the system");
    }
    said(&start("1002"), 0, "a user who does not log in");
    said(&start("1003"), 0, "there is no such home");
    said(&start("1004"), 2, "there is no user with the number 1004");
    assert_eq!(people.mounts(), before);
    for name in ["git", "daemon", "nobody"] {
        assert!(!people.world.at("home").join(name).join(".cache").exists(), "{name}");
    }
    assert!(!people.kept().exists());
}

fn nothing_is_unmounted_that_is_in_use() {
    let people = People::new(Place::OtherDisk);
    let cache = people.cache();
    let before = fill(&cache);
    expect(&people.start(), 0);
    snapshot::assert_same(&before, &snapshot::take(&cache.join("paru")), "before it all");
    let all = mounts(&cache);
    for name in ["plain", "paru/plain", "nvidia/plain"] {
        let file = File::create(cache.join(name)).unwrap();
        let output = people.stop();
        said(&output, 3, "it is in use");
        assert!(text(&output).contains("open for writing"), "{}", text(&output));
        let (mut now, mut all) = (mounts(&cache), all.clone());
        for mounts in [&mut now, &mut all] {
            mounts.sort_by(|a, b| a.mount_point.cmp(&b.mount_point));
        }
        assert_eq!(now, all, "{name}");
        assert!(cache.join(name).exists(), "{name}");
        drop(file);
        fs::remove_file(cache.join(name)).unwrap();
    }
    // What somebody else has mounted in it is in use, too.
    let own = cache.join("own");
    fs::create_dir(&own).unwrap();
    tools::run("mount", &["-t", "tmpfs", "somebody", own.to_str().unwrap()]);
    said(&people.stop(), 3, "it is in use");
    assert_eq!(mounts(&cache).len(), 4);
    unmount(&own, UnmountFlags::empty()).unwrap();
    let mut after = snapshot::take(&cache.join("paru"));
    // Files came and went.
    after.insert(PathBuf::new(), before[Path::new("")].clone());
    snapshot::assert_same(&before, &after, "after all that");
    people.stopped();
}
