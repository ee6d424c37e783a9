//! Files that are good by themselves and do not belong together, and what only the sum of a chain shows.

use syncd::digest::Digest;
use syncd::entry::{Content, Kind, State, Stretch};
use syncd::format::{Header, Relation};

use super::{Case, full};
use crate::file::{Forge, digest};
use crate::sample::{FULL, after, content, dir, file, header, present};

pub(super) fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    order(&mut all);
    strangers(&mut all);
    references(&mut all);
    tree(&mut all);
    all
}

/// Three checkpoints that follow one another.
fn three() -> [Vec<u8>; 3] {
    let first = full().frame(b"0123456789").change(b"x", file(b"01234", 0), None).build();
    let second = after(2, &first).change(b"x", State::Deleted, None).build();
    let third = after(3, &second).change(b"x", State::AsLower, None).build();
    [first, second, third]
}

fn order(all: &mut Vec<Case>) {
    let [first, second, third] = three();
    let mut case = |name: &str, files: &[(u64, &Vec<u8>)], blame, says| {
        let files = files.iter().map(|&(number, file)| (number, file.clone())).collect();
        all.push(Case { name: name.to_owned(), files, blame, says });
    };
    let name = "under another name";
    case("the last two swapped", &[(1, &first), (2, &third), (3, &second)], 3, name);
    case("the first two swapped", &[(1, &second), (2, &first), (3, &third)], 2, name);
    case("the same file twice", &[(1, &first), (2, &first)], 2, name);
    let follow = "it does not follow the checkpoint before it";
    case("a gap", &[(1, &first), (3, &third)], 3, follow);
    case("no full checkpoint", &[(2, &second), (3, &third)], 2, "the full checkpoint before it is missing");
    let again = Forge::new(&header(3, Relation::Delta { predecessor: digest(&first) })).build();
    case("a fork", &[(1, &first), (2, &second), (3, &again)], 3, follow);
    let itself = Forge::new(&header(2, Relation::Delta { predecessor: Digest(0) })).build();
    case("a delta on nothing", &[(1, &first), (2, &itself)], 2, follow);
}

fn strangers(all: &mut Vec<Case>) {
    let [first, ..] = three();
    let delta = || header(2, Relation::Delta { predecessor: digest(&first) });
    let mut case = |name: &str, header: &Header, says| {
        all.push(Case::second(name, first.clone(), Forge::new(header).build(), says));
    };
    let follow = "it does not follow the checkpoint before it";
    let target = "it belongs to another target";
    case("a delta with another token", &Header { token: None, ..delta() }, follow);
    case("a delta with another seed", &Header { seed: 1, ..delta() }, follow);
    case("a delta of another target", &Header { target: "/var/log".into(), ..delta() }, target);
    let other = Forge::new(&header(1, FULL)).frame(b"other").change(b"", dir(), None).build();
    let stranger = Header { relation: Relation::Delta { predecessor: digest(&other) }, ..delta() };
    case("a delta of another store", &stranger, follow);
    case("a full one of another target", &Header { target: "/etc/x".into(), ..header(2, FULL) }, target);
    case("a target above", &Header { target: "/".into(), ..header(2, FULL) }, target);
    case("a target that is none", &Header { target: "etc".into(), ..header(2, FULL) }, target);
}

fn references(all: &mut Vec<Case>) {
    let [first, ..] = three();
    let mut case = |name: &str, back, data, length| {
        let stretches = vec![Stretch { offset: 0, length, back, data }];
        let content = Content { size: 1 << 62, stretches, ..content(b"", 0, 0) };
        let second = after(2, &first).change(b"x", present(Kind::file(content)), None).build();
        all.push(Case::second(name, first.clone(), second, "it takes data from where there is none"));
    };
    case("data from before the chain", 2, 0, 1);
    case("data from 2^32 checkpoints ago", 1 << 32, 0, 1);
    case("data from 2^64 checkpoints ago", u64::MAX, 0, 1);
    case("more data than the one before has", 1, 0, 11);
    case("data behind what the one before has", 1, 10, 1);
    case("2^60 bytes of the one before", 1, 0, 1 << 60);
    let stretches = vec![Stretch { offset: 0, length: 1, back: 1, data: 0 }];
    let content = Content { size: 1, stretches, ..content(b"", 0, 0) };
    let alone = full().change(b"x", present(Kind::file(content)), None).build();
    all.push(Case::one("data from before the first", alone, "it takes data from where there is none"));
    // A full checkpoint ends what was before it, for those after it.
    let again = Forge::new(&header(2, FULL)).change(b"", dir(), None).build();
    let stretches = vec![Stretch { offset: 0, length: 1, back: 2, data: 0 }];
    let content = Content { size: 1, stretches, ..crate::sample::content(b"", 0, 0) };
    let third = after(3, &again).change(b"x", present(Kind::file(content)), None).build();
    all.push(Case {
        name: "data from before the last full one".to_owned(),
        files: vec![(1, first), (2, again), (3, third)],
        blame: 3,
        says: "it takes data from where there is none",
    });
}

/// What is no tree.
fn tree(all: &mut Vec<Case>) {
    let none = "stands in no directory";
    let mut case = |name: &str, forge: Forge, says| all.push(Case::one(name, forge.build(), says));
    let child = |parent| full().change(b"a", parent, None).change(b"a/b", file(b"", 0), None);
    case("a child of a file", child(file(b"", 0)), none);
    case("a child of a symlink", child(present(Kind::Symlink { target: b"../canary".to_vec() })), none);
    case("a child of a FIFO", child(present(Kind::Fifo)), none);
    case("a child of what was removed", child(State::Deleted), none);
    case("a child of what is as on disk", child(State::AsLower), none);
    case("a child of nothing", full().change(b"a/b", file(b"", 0), None), none);
    case("a removal in nothing", full().change(b"a/b", State::Deleted, None), none);
    let without = || Forge::new(&header(1, FULL));
    case("a child without a root", without().change(b"a", dir(), None), none);
    let root = "is the root and no directory";
    case("a root that is a file", without().change(b"", file(b"", 0), None), root);
    case(
        "a root that is a symlink",
        without().change(b"", present(Kind::Symlink { target: b"x".to_vec() }), None),
        root,
    );
    case("a root that was removed", without().change(b"", State::Deleted, None), root);
    let first = full().change(b"a", dir(), None).change(b"a/b", dir(), None).build();
    let second = after(2, &first).change(b"a", file(b"", 0), None).build();
    let mut later = Case::second("a directory with children that becomes a file", first, second, none);
    // The child is to blame, which the first one has.
    later.blame = 1;
    all.push(later);
}
