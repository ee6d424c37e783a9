//! A user who exchanges everything in the home all the time, while root starts and stops the cache: with symlinks, hard
//! links, renames and exchanges, and out of an older mount namespace, in which nothing is mounted on the cache.
//!
//! What the user may not touch is compared and watched, and its secrets are looked for in all that root made. `HOSTILE_SECONDS=600`
//! for a long run.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use fastrand::Rng;
use rustix::fs::inotify::WatchFlags;
use rustix::fs::{AtFlags, CWD, FileType, Mode, RenameFlags, linkat, mkdirat, mknodat, renameat_with, unlinkat};
use test_support::snapshot;
use test_support::watch::Watch;

use super::{People, Place, fill, make, mounts};
use crate::tools::{code, text};

/// Asks the test program to be the hostile user in its working directory, with this seed.
const ASK: &str = "EPHEMERAL_OVERLAY_HOSTILE";
/// Nobody but root may read it.
const SECRET: &[u8] = b"nobody but root may read this";
const BOBS: &[u8] = b"nobody but bob may read this";

/// What is renamed, linked and made.
const NAMES: [&str; 14] = [
    ".cache",
    ".cache",
    ".cache/paru",
    ".cache/paru",
    ".cache/nvidia",
    ".cache/.ephemeral-overlay-moved-paru",
    ".cache/paru/a",
    ".cache/paru/d",
    ".cache/paru/d/a",
    "x",
    "y",
    "x/paru",
    "stash/root",
    "stash/bob",
];
/// Where symlinks lead.
const TARGETS: [&str; 8] = [
    "../../canary",
    "../bob",
    "../bob/.cache",
    "../../persist/user-cache/1001",
    "../../canary/secret",
    "x",
    "..",
    "stash",
];

/// Is the hostile user, if this process was asked to be; does not return then.
pub(crate) fn act_if_asked() {
    let Ok(seed) = std::env::var(ASK) else { return };
    let mut rng = Rng::with_seed(seed.parse().unwrap());
    if rng.bool() {
        // A mount table of its own, from before: there the cache is no mount point, and can be renamed.
        let _refused = nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWUSER | nix::sched::CloneFlags::CLONE_NEWNS);
    }
    loop {
        std::thread::sleep(Duration::from_micros(rng.u64(..400)));
        if rng.bool() {
            // Or root would never get beyond the first look.
            let _is_none = fs::remove_file(".cache").is_err() && fs::remove_file(".cache/paru").is_err();
            let _are_there = ["", "paru", "paru/d"].map(|name| fs::create_dir(Path::new(".cache").join(name)).is_err());
        }
        let (a, b) = (NAMES[rng.usize(..NAMES.len())], NAMES[rng.usize(..NAMES.len())]);
        let target = TARGETS[rng.usize(..TARGETS.len())];
        // Nearly all of it fails, as the names happen to be.
        let _failed = match rng.u8(..12) {
            0 => symlink(target, a).is_ok(),
            1 | 2 => renameat_with(CWD, a, CWD, b, RenameFlags::EXCHANGE).is_ok(),
            3 | 4 => renameat_with(CWD, a, CWD, b, RenameFlags::empty()).is_ok(),
            5 | 6 => mkdirat(CWD, a, Mode::from_raw_mode(0o755)).is_ok(),
            7 => linkat(CWD, a, CWD, b, AtFlags::empty()).is_ok(),
            8 => unlinkat(CWD, a, AtFlags::empty()).is_ok(),
            9 => unlinkat(CWD, a, AtFlags::REMOVEDIR).is_ok(),
            10 => is_file_or_nothing(a) && fs::write(a, "mine").is_ok(),
            _ => mknodat(CWD, a, FileType::Fifo, Mode::from_raw_mode(0o644), 0).is_ok(),
        };
    }
}

fn is_file_or_nothing(path: &str) -> bool {
    fs::symlink_metadata(path).map_or(true, |found| found.is_file())
}

fn hostile(people: &People, seed: u64) -> Child {
    Command::new("/proc/self/exe")
        .env(ASK, seed.to_string())
        .current_dir(people.world.at("home/alice"))
        .uid(1000)
        .gid(1000)
        .spawn()
        .unwrap()
}

pub(crate) fn a_hostile_user_reaches_nothing() {
    let seconds = std::env::var("HOSTILE_SECONDS").map_or(2, |text| text.parse().unwrap());
    let begin = Instant::now();
    let (mut rounds, mut calls, mut mounted, mut kept) = (0, 0, 0, 0);
    let mut rng = Rng::new();
    let is_told = |mounted: usize, kept: usize| mounted > 0 && kept > 0;
    while begin.elapsed() < Duration::from_secs(seconds)
        // A busy machine gets nowhere in so short a time.
        || !is_told(mounted, kept) && begin.elapsed() < Duration::from_secs(60)
    {
        let place = if rounds % 2 == 0 { Place::SameDisk } else { Place::OtherDisk };
        let people = People::new(place);
        let canary = Canary::new(&people);
        let until = Duration::from_secs(seconds.div_ceil(4).min(10));
        let round = Instant::now();
        while round.elapsed() < until {
            let seed = rng.u64(..);
            reset(&people);
            let mut child = hostile(&people, seed);
            for _ in 0..8 {
                let action = if rng.u8(..3) < 2 { "start" } else { "stop" };
                let output = people.world.syncd(&["user-cache", action, "1000"]);
                assert!([0, 1, 3].contains(&code(&output)), "{}", text(&output));
                assert!(!text(&output).contains("panicked"), "{}", text(&output));
                calls += 1;
                mounted += usize::from(text(&output).contains("in RAM now"));
            }
            child.kill().unwrap();
            child.wait().unwrap();
            canary.check(&people, seed);
            kept += usize::from(people.kept().join("1000/paru").exists());
        }
        rounds += 1;
    }
    println!("{calls} calls, {mounted} mounted, {kept} times a folder was kept, {} s", begin.elapsed().as_secs());
    assert!(is_told(mounted, kept), "the user kept everything from being done: the test says nothing");
}

/// A home as it was; nothing is mounted in it.
fn reset(people: &People) {
    let at = |path: &str| people.world.at(path);
    fs::remove_dir_all(at("home/alice")).unwrap();
    for path in ["1000", "moved/1000", "copies/1000"] {
        let path = people.kept().join(path);
        if path.exists() {
            fs::remove_dir_all(path).unwrap();
        }
    }
    make(&at("home/alice"), 1000);
    fill(&people.cache());
    make(&at("home/alice/stash"), 1000);
    // What a system without protected_hardlinks lets a user do.
    for (name, of) in [("root", "home/roots/secret"), ("bob", "home/bob/file")] {
        fs::hard_link(at(of), at("home/alice/stash").join(name)).unwrap();
    }
}

/// What the user may not touch.
struct Canary {
    paths: Vec<PathBuf>,
    before: Vec<snapshot::Snapshot>,
    /// Its files that alice has under another name.
    inodes: Vec<(u64, u64)>,
    /// The kernel tells who so much as opens any of it: the users cannot.
    watch: Watch,
}

impl Canary {
    fn new(people: &People) -> Self {
        let at = |path: &str| people.world.at(path);
        let homes = at("home/bob");
        fs::create_dir_all(at("canary/dir")).unwrap();
        fs::write(at("canary/secret"), SECRET).unwrap();
        fs::write(at("canary/dir/secret"), SECRET).unwrap();
        // Of the disk that the homes are on, so that there can be links to it.
        fs::create_dir(at("home/roots")).unwrap();
        fs::write(at("home/roots/secret"), SECRET).unwrap();
        fs::create_dir(homes.join(".cache")).unwrap();
        for name in ["file", ".cache/file"] {
            fs::write(homes.join(name), BOBS).unwrap();
        }
        fs::create_dir_all(people.kept().join("1001/paru")).unwrap();
        fs::write(people.kept().join("1001/paru/file"), BOBS).unwrap();
        for path in ["home/bob/file", "home/bob/.cache", "home/bob/.cache/file"] {
            chown(at(path), Some(1001), Some(1001)).unwrap();
        }
        for path in ["canary/secret", "canary/dir/secret", "home/roots/secret", "home/bob/file", "home/bob/.cache/file"]
        {
            fs::set_permissions(at(path), Permissions::from_mode(0o600)).unwrap();
        }
        let paths = vec![at("canary"), at("home/roots"), homes, people.kept().join("1001")];
        let before = paths.iter().map(|path| snapshot::take(path)).collect();
        let inode = |path: &str| fs::metadata(at(path)).map(|stat| (stat.dev(), stat.ino())).unwrap();
        let inodes = ["home/roots/secret", "home/bob/file"].map(inode).to_vec();
        let mut watch = Watch::new();
        for path in &paths {
            watch.tree(path);
        }
        for path in ["home/roots/secret", "home/bob/file"] {
            // A new name of it changes its status.
            watch.file(&at(path), WatchFlags::OPEN | WatchFlags::ACCESS | WatchFlags::MODIFY | WatchFlags::DELETE_SELF);
        }
        drop(fs::File::open(at("home/roots/secret")).unwrap());
        assert!(watch.told().iter().any(|line| line.contains("home/roots/secret")), "it is deaf");
        Self { paths, before, inodes, watch }
    }

    /// Nothing of it was changed, and nothing of it is where root put something.
    fn check(&self, people: &People, seed: u64) {
        let told = self.watch.told();
        assert!(told.is_empty(), "seed {seed}: {told:#?}");
        for path in [people.kept(), people.world.at("home/alice")] {
            self.search(&path, seed);
        }
        let home = people.world.at("home/alice");
        let root = people.world.root.clone();
        let elsewhere = mounts(&root).into_iter().filter(|mount| {
            let point = &mount.mount_point;
            *point != root && *point != people.world.at("home") && !point.starts_with(&home)
        });
        assert_eq!(elsewhere.map(|mount| mount.mount_point).collect::<Vec<_>>(), Vec::<PathBuf>::new(), "seed {seed}");
        // Its own processes are gone.
        people.cut();
        self.search(&home, seed);
        for (path, before) in self.paths.iter().zip(&self.before) {
            snapshot::assert_same(before, &snapshot::take(path), &format!("seed {seed}"));
        }
        self.watch.forget();
    }

    /// Below `path` no secret is in a file that is not the canary itself, and nothing belongs to anybody else.
    fn search(&self, path: &Path, seed: u64) {
        let stat = fs::symlink_metadata(path).unwrap();
        if self.paths.iter().any(|canary| path.starts_with(canary)) || self.inodes.contains(&(stat.dev(), stat.ino())) {
            return;
        }
        if stat.is_dir() {
            for entry in fs::read_dir(path).unwrap() {
                self.search(&entry.unwrap().path(), seed);
            }
        } else if stat.is_file() {
            let content = fs::read(path).unwrap();
            let found = [SECRET, BOBS].iter().any(|secret| content.windows(secret.len()).any(|part| part == *secret));
            assert!(!found, "seed {seed}: {} has a secret", path.display());
        }
        let is_places = stat.is_dir() && path.ancestors().any(|path| path.ends_with("user-cache"));
        let allowed: &[u32] = if is_places { &[0, 1000] } else { &[1000] };
        assert!(allowed.contains(&stat.uid()), "seed {seed}: {} belongs to {}", path.display(), stat.uid());
    }
}
