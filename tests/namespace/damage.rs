//! Damaged, hostile and strange chains, as far as merging them goes: nothing beside lower is touched whatever they say,
//! and lower not at all where they are refused. That reading refuses them is tested in syncd/tests/damage.rs.

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::symlink;
use std::process::Command;

use ephemeral_overlay::attributes::Handle;
use ephemeral_overlay::token::Token;
use forge::cases::{self, Case};
use forge::file::Forge;
use forge::fuzz;
use forge::sample;
use forge::scratch::Scratch;
use rustix::fs::{IFlags, ioctl_getflags, ioctl_setflags};
use syncd::conflict::Winner;
use syncd::entry::{Base, Kind, Node, State};
use syncd::merge::{MergeOptions, MergeStats};
use test_support::snapshot;

use crate::tools::{code, text};
use crate::world::{ETC, World, expect};

pub(crate) const TESTS: &[(&str, fn())] = &[
    ("hostile_chains_change_nothing", hostile_chains_change_nothing),
    ("huge_claims_take_no_memory", huge_claims_take_no_memory),
    ("symlinks_of_lower_are_replaced_and_not_followed", symlinks_of_lower_are_replaced_and_not_followed),
    ("attributes_that_cannot_be_are_left", attributes_that_cannot_be_are_left),
    ("what_cannot_be_saved_from_a_conflict_is_kept_aside", what_cannot_be_saved_from_a_conflict_is_kept_aside),
    ("a_conflict_in_a_hidden_directory_is_one_of_all_of_it", a_conflict_in_a_hidden_directory_is_one_of_all_of_it),
    ("flags_of_what_has_none_are_passed_over", flags_of_what_has_none_are_passed_over),
    ("a_directory_of_the_disk_keeps_its_flags", a_directory_of_the_disk_keeps_its_flags),
    ("a_protected_root_is_merged_and_stays_protected", a_protected_root_is_merged_and_stays_protected),
    ("the_corpus_of_the_merge", the_corpus_of_the_merge),
];

const RAM: MergeOptions = MergeOptions { winner: Winner::Ram, accept_prefix: false };

/// A lower directory with things to lose, among them ways out of it.
fn populated() -> Scratch {
    let scratch = Scratch::new();
    let at = |name: &str| scratch.at("lower").join(name);
    fs::create_dir_all(at("dir/sub")).unwrap();
    fs::write(at("dir/sub/file"), "lower").unwrap();
    fs::write(at("x"), "lower").unwrap();
    for (name, target) in [("a", "../canary"), ("b", "../canary/file"), ("out", "../canary/dir")] {
        symlink(target, at(name)).unwrap();
    }
    scratch
}

fn put(scratch: &Scratch, file: &[u8]) {
    fs::write(scratch.store().directory().join("0000000001.ckpt"), file).unwrap();
}

fn merged(scratch: &Scratch, forge: &Forge, winner: Winner) -> MergeStats {
    put(scratch, &forge.build());
    scratch.merge(MergeOptions { winner, ..RAM }).unwrap().unwrap()
}

fn full() -> Forge {
    Forge::new(&sample::header(1, sample::FULL)).change(b"", sample::dir(), None)
}

fn hostile_chains_change_nothing() {
    let all = cases::all();
    assert!(all.len() > 200, "{} cases", all.len());
    for case in all {
        let scratch = populated();
        case.write(scratch.store().directory());
        // That lower and what is beside it are as before is seen to there.
        assert!(scratch.merge(RAM).is_err(), "{}: it was accepted", case.name);
        assert_eq!(scratch.store().marker().unwrap(), None, "{}: a merge has begun", case.name);
        let kept = scratch.store().sequences().unwrap();
        assert_eq!(kept, case.files.iter().map(|(number, _)| *number).collect::<Vec<_>>(), "{}", case.name);
    }
}

/// Each of these files has some hundred bytes and says that it holds up to 2^64.
fn huge_claims_take_no_memory() {
    let world = World::new(ETC);
    Token::write(sample::TOKEN, &Handle::of(fs::File::open(world.at("etc")).unwrap().as_fd()), &world.at("etc"))
        .unwrap();
    fs::create_dir_all(world.store()).unwrap();
    let merge = |case: &Case| {
        case.write(&world.store());
        let syncd = world.offline_command(&["merge"]);
        let mut limited = Command::new("prlimit");
        limited.arg("--as=268435456").arg(syncd.get_program()).args(syncd.get_args()).env("RAYON_NUM_THREADS", "1");
        limited.output().unwrap()
    };
    let good = Case { name: "good".to_owned(), files: vec![(1, full().build())], blame: 1, says: "" };
    expect(&merge(&good), 0);
    let claims = ["4294967295", "1099511627776", "1152921504606846976", "18446744073709551615", "2^60", "2^64"];
    let huge: Vec<_> =
        cases::all().into_iter().filter(|case| claims.iter().any(|text| case.name.contains(text))).collect();
    assert!(huge.len() > 30, "{} cases", huge.len());
    for case in huge {
        for old in world.checkpoints() {
            fs::remove_file(old).unwrap();
        }
        let output = merge(&case);
        assert_eq!(code(&output), 1, "{}: {}", case.name, text(&output));
        assert!(text(&output).contains(case.says), "{}: {}", case.name, text(&output));
    }
}

fn symlinks_of_lower_are_replaced_and_not_followed() {
    let scratch = populated();
    let file = || sample::file(b"upper", 0);
    let forge = full()
        .frame(b"upper")
        .change(b"a", sample::dir(), None)
        .change(b"a/dir", sample::dir(), None)
        .change(b"a/dir/file", file(), None)
        .change(b"a/file", State::Deleted, None)
        .change(b"b", file(), None)
        .change(b"out", sample::present(Kind::Dir { opaque: true }), None)
        .change(b"out/file", State::Deleted, None);
    assert!(merged(&scratch, &forge, Winner::Ram).is_exact());
    let lower = scratch.at("lower");
    assert_eq!(fs::read(lower.join("a/dir/file")).unwrap(), b"upper");
    assert_eq!(fs::read(lower.join("b")).unwrap(), b"upper");
    for name in ["a", "b", "out"] {
        assert!(!lower.join(name).is_symlink(), "{name} is still a symlink");
    }
}

fn with(kind: Kind, change: impl FnOnce(&mut Node)) -> State {
    let mut node = sample::node(kind);
    change(&mut node);
    State::Present(node)
}

/// What no file system takes must not keep all the rest from the disk for ever.
fn attributes_that_cannot_be_are_left() {
    let attribute = |kind, name: &str| {
        with(kind, |node| drop(node.meta.xattrs.insert(name.as_bytes().to_vec(), b"nonsense".to_vec())))
    };
    let plain = || Kind::file(sample::content(b"", 0, 0));
    let symlink = || Kind::Symlink { target: b"x".to_vec() };
    let bad = [
        ("a kind that has none", attribute(symlink(), "user.a")),
        ("a kind that has none", attribute(Kind::Fifo, "user.a")),
        ("no such class", attribute(plain(), "odd")),
        ("no name behind the class", attribute(plain(), "user.")),
        ("no list", attribute(plain(), "system.posix_acl_access")),
        ("no capability", attribute(plain(), "security.capability")),
        ("too long", attribute(plain(), &format!("user.{}", "n".repeat(300)))),
    ];
    for ((what, state), replaces) in bad.iter().flat_map(|bad| [(bad, false), (bad, true)]) {
        let scratch = populated();
        if replaces {
            fs::write(scratch.at("lower/bad"), "lower").unwrap();
        }
        let bad = full().frame(b"upper").change(b"bad", state.clone(), None);
        let stats = merged(&scratch, &bad.change(b"good", sample::file(b"upper", 0), None), Winner::Ram);
        assert_eq!(stats.left.len(), 1, "{what}: {:?}", stats.left);
        assert!(stats.set_aside.is_some(), "{what}: the only place that has it is gone");
        assert_eq!(fs::read(scratch.at("lower/good")).unwrap(), b"upper", "{what}");
        let mut names = fs::read_dir(scratch.at("lower")).unwrap().map(|entry| entry.unwrap().file_name());
        let is_ours = |name: std::ffi::OsString| name.as_encoded_bytes().starts_with(b".ephemeral-overlay");
        assert!(!names.any(is_ours), "{what}: something unfinished is left in lower");
    }
}

/// In the store as little as on the disk.
fn what_cannot_be_saved_from_a_conflict_is_kept_aside() {
    let scratch = populated();
    let long = State::Present(sample::node(Kind::Symlink { target: vec![b'x'; 5000] }));
    let forge =
        full().frame(b"upper").change(b"good", sample::file(b"upper", 0), None).change(b"x", long, Some(Base::Absent));
    let stats = merged(&scratch, &forge, Winner::Disk);
    assert_eq!((stats.conflicts.len(), stats.left.len()), (1, 1), "{:?}", stats.left);
    assert!(stats.set_aside.unwrap().join("0000000001.ckpt").exists(), "the only place that has it is gone");
    assert_eq!(fs::read(scratch.at("lower/x")).unwrap(), b"lower");
    assert_eq!(fs::read(scratch.at("lower/good")).unwrap(), b"upper");
}

/// What hides lower's directory removes what is in it: the disk cannot have one name of it and RAM the rest.
fn a_conflict_in_a_hidden_directory_is_one_of_all_of_it() {
    let scratch = populated();
    let hidden = || sample::present(Kind::Dir { opaque: true });
    let sub = sample::file(b"upper", 0);
    let forge = full().frame(b"upper");
    let forge = forge.change(b"dir", hidden(), Some(Base::Unknown)).change(b"dir/sub", sub, Some(Base::Absent));
    let stats = merged(&scratch, &forge, Winner::Disk);
    assert_eq!(stats.conflicts.len(), 1);
    assert_eq!(fs::read(scratch.at("lower/dir/sub/file")).unwrap(), b"lower", "the disk's version is nowhere");
}

/// To ask a device whether it has flags is to open it.
fn flags_of_what_has_none_are_passed_over() {
    let symlink = Kind::Symlink { target: b"x".to_vec() };
    let device = Kind::Device { block: false, major: 1, minor: 3 };
    for kind in [Kind::Fifo, Kind::Socket, symlink, device] {
        let scratch = populated();
        let forge = full().change(b"odd", with(kind, |node| node.meta.immutable = true), None);
        assert!(merged(&scratch, &forge, Winner::Ram).is_exact());
    }
}

fn flags(path: &std::path::Path) -> IFlags {
    ioctl_getflags(fs::File::open(path).unwrap()).unwrap() & (IFlags::IMMUTABLE | IFlags::APPEND)
}

fn a_directory_of_the_disk_keeps_its_flags() {
    let scratch = populated();
    let changed = Some(Base::Dir { owner: (0o700, 7, 7) });
    let dir = with(Kind::Dir { opaque: false }, |node| node.meta.immutable = true);
    let stats = merged(&scratch, &full().change(b"dir", dir, changed), Winner::Disk);
    assert_eq!(stats.conflicts.len(), 1);
    assert_eq!(flags(&scratch.at("lower/dir")), IFlags::empty(), "what was in RAM was set");
}

/// A root that cannot be changed can have no new token either.
fn a_protected_root_is_merged_and_stays_protected() {
    let world = World::new(ETC);
    let etc = world.at("etc");
    world.boot();
    fs::write(etc.join("file"), "upper").unwrap();
    let protect = |flags| {
        let root = fs::File::open(&etc).unwrap();
        let others = ioctl_getflags(&root).unwrap() - (IFlags::IMMUTABLE | IFlags::APPEND);
        ioctl_setflags(&root, others | flags).or_else(|_| ioctl_setflags(&root, flags)).unwrap();
    };
    protect(IFlags::IMMUTABLE);
    let expected = snapshot::take(&etc);
    world.checkpoint();
    world.cut();
    world.merge();
    snapshot::assert_same(&expected, &snapshot::take(&etc), "the disk");
    assert_eq!(flags(&etc), IFlags::IMMUTABLE);
    assert!(world.checkpoints().is_empty(), "the chain is still there");
    protect(IFlags::empty());
}

fn the_corpus_of_the_merge() {
    let corpus = fuzz::corpus("merge");
    assert!(corpus.len() > 10, "{} files", corpus.len());
    for (name, bytes) in corpus {
        println!("{name}");
        fuzz::merge::merge_bytes(&bytes);
    }
}
