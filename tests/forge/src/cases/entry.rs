//! What a single change may not say.

use ephemeral_overlay::attributes::CAPABILITY;
use syncd::digest::{BLOCK, Block, Digest};
use syncd::entry::{Content, Kind, Meta, Node, State, Stretch};

use super::{Case, full};
use crate::sample::{content, dir, file, meta, node, present};

pub(super) fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    paths(&mut all);
    metadata(&mut all);
    kinds(&mut all);
    groups(&mut all);
    stretches(&mut all);
    blocks(&mut all);
    all
}

fn paths(all: &mut Vec<Case>) {
    let long = [b'x'; 256];
    let below_long = [b"dir/", &long[..], b"/x"].concat();
    let bad: [&[u8]; 18] = [
        b"..",
        b"../x",
        b"dir/..",
        b"dir/../x",
        b"dir/../../canary/file",
        b".",
        b"./x",
        b"dir/./x",
        b"/",
        b"/x",
        b"/etc/passwd",
        b"x/",
        b"dir//x",
        b"\0",
        b"a\0b",
        b"dir/a\0b",
        &long,
        &below_long,
    ];
    for path in bad {
        let name: String = String::from_utf8_lossy(path).chars().take(30).collect();
        for (what, state) in [("file", file(b"", 0)), ("removal", State::Deleted), ("directory", dir())] {
            let chain = full().change(b"dir", dir(), None).change(path, state, None);
            let says = "its index is malformed";
            all.push(Case::one(&format!("{what} {name:?}"), chain.build(), says));
        }
    }
    let order = "its changes are not in path order";
    let twice = full().change(b"x", dir(), None).change(b"x", dir(), None);
    all.push(Case::one("a path twice", twice.build(), order));
    let two = full().change(b"x", dir(), None).change(b"x", State::Deleted, None);
    all.push(Case::one("a path there and gone", two.build(), order));
    let unsorted = full().change(b"b", dir(), None).change(b"a", dir(), None);
    all.push(Case::one("paths out of order", unsorted.build(), order));
    let bytes = full().change(b"a", dir(), None).change(b"a-b", dir(), None).change(b"a/b", dir(), None);
    all.push(Case::one("paths in the order of their bytes", bytes.build(), order));
}

fn metadata(all: &mut Vec<Case>) {
    let mut case = |name: &str, meta: Meta, says| {
        let node = Node { kind: Kind::file(content(b"", 0, 0)), meta, group: 0 };
        all.push(Case::one(name, full().change(b"x", State::Present(node), None).build(), says));
    };
    let range = "a mode, an owner or a time is out of range";
    case("a mode with a kind", meta(0o100_644), range);
    case("a mode of all bits", meta(u32::MAX), range);
    case("a second of nanoseconds", Meta { mtime_nsec: 1_000_000_000, ..meta(0o644) }, range);
    // UTIME_NOW and UTIME_OMIT
    case("nanoseconds that mean now", Meta { mtime_nsec: (1 << 30) - 1, ..meta(0o644) }, range);
    case("nanoseconds that mean nothing", Meta { mtime_nsec: (1 << 30) - 2, ..meta(0o644) }, range);
    // To chown(2) it means: leave it.
    case("owner -1", Meta { uid: u32::MAX, ..meta(0o644) }, range);
    case("group -1", Meta { gid: u32::MAX, ..meta(0o644) }, range);
    let empty = Meta { xattrs: [(CAPABILITY.as_bytes().to_vec(), Vec::new())].into(), ..meta(0o644) };
    case("a capability that nobody can read", empty, "an attribute has an impossible value");
    let mut attribute = |name: &str, key: &[u8]| {
        let meta = Meta { xattrs: [(key.to_vec(), b"value".to_vec())].into(), ..meta(0o644) };
        case(name, meta, "an attribute has an impossible name");
    };
    attribute("an attribute without a name", b"");
    attribute("an attribute with a NUL", b"user.a\0b");
    attribute("lower's token", b"trusted.ephemeral_overlay.token");
    attribute("XFS' copy of an ACL", b"trusted.SGI_ACL_FILE");
}

fn kinds(all: &mut Vec<Case>) {
    let mut case = |name: &str, kind, says| {
        all.push(Case::one(name, full().change(b"x", present(kind), None).build(), says));
    };
    let symlink = "a symlink leads to an impossible name";
    case("a symlink to nothing", Kind::Symlink { target: Vec::new() }, symlink);
    case("a symlink with a NUL", Kind::Symlink { target: b"a\0b".to_vec() }, symlink);
    let device = "a device has an impossible number";
    case("a major of 13 bits", Kind::Device { block: false, major: 1 << 12, minor: 3 }, device);
    case("a minor of 21 bits", Kind::Device { block: true, major: 1, minor: 1 << 20 }, device);
    case("numbers of 32 bits", Kind::Device { block: false, major: u32::MAX, minor: u32::MAX }, device);
    case("a whiteout as a device", Kind::Device { block: false, major: 0, minor: 0 }, device);
    for kind in [6u8, 127] {
        let mut index = full().change(b"x", present(Kind::Fifo), None).index();
        // frames, changes, the root, then: path, state, kind
        let at = full().index().len() + 3;
        assert_eq!(index[at - 3..=at], [1, b'x', 0, 3]);
        index[at] = kind;
        all.push(Case::one(&format!("an object of kind {kind}"), full().build_with(&index), "its index is malformed"));
    }
}

fn groups(all: &mut Vec<Case>) {
    let says = "the names of a file say different things";
    let linked = |kind, meta| State::Present(Node { kind, meta, group: 1 });
    let mut case = |name: &str, first, second| {
        all.push(Case::one(name, full().change(b"a", first, None).change(b"b", second, None).build(), says));
    };
    let empty = || Kind::file(content(b"", 0, 0));
    case("names of different kinds", linked(empty(), meta(0o644)), linked(Kind::Fifo, meta(0o644)));
    case("names with different modes", linked(empty(), meta(0o644)), linked(empty(), meta(0o600)));
    let longer = Content { size: 1, ..content(b"", 0, 0) };
    case("names with different contents", linked(empty(), meta(0o644)), linked(Kind::file(longer), meta(0o644)));
    let dir = || Kind::Dir { opaque: false };
    case("two names of a directory", linked(dir(), meta(0o755)), linked(dir(), meta(0o755)));
}

fn stretches(all: &mut Vec<Case>) {
    let mut case = |name: &str, size: u64, stretches: &[[u64; 3]]| {
        let stretches = stretches.iter().map(|&[offset, length, data]| Stretch { offset, length, back: 0, data });
        let content = Content { size, stretches: stretches.collect(), ..content(b"", 0, 0) };
        let forge = full().frame(b"0123456789").change(b"x", present(Kind::file(content)), None);
        all.push(Case::one(name, forge.build(), "a file's stretches do not fit"));
    };
    let top = u64::MAX;
    case("a stretch of nothing", 10, &[[0, 0, 0]]);
    case("a stretch behind the end of the file", 10, &[[10, 1, 0]]);
    case("a stretch over the end of the file", 10, &[[5, 6, 0]]);
    case("a stretch without a file", 0, &[[0, 1, 0]]);
    case("a stretch over the end of the data", 10, &[[0, 6, 5]]);
    case("a stretch behind the end of the data", 10, &[[0, 1, 10]]);
    case("a stretch of 2^60 bytes", 1 << 62, &[[0, 1 << 60, 0]]);
    case("overlapping stretches", 10, &[[0, 5, 0], [4, 5, 5]]);
    case("descending stretches", 10, &[[5, 5, 0], [0, 5, 5]]);
    case("the same stretch twice", 10, &[[0, 5, 0], [0, 5, 0]]);
    case("an offset that overflows", 10, &[[top, 1, 0]]);
    case("a length that overflows", 10, &[[1, top, 0]]);
    case("a place in the data that overflows", 10, &[[0, 1, top]]);
    let size = |size| {
        let file = State::Present(node(Kind::file(Content { size, ..content(b"", 0, 0) })));
        full().change(b"x", file, None).build()
    };
    for length in [1 << 63, u64::MAX] {
        all.push(Case::one(&format!("a file of {length} bytes"), size(length), "a file is longer than one can be"));
    }
}

fn blocks(all: &mut Vec<Case>) {
    let mut case = |name: &str, size: u64, numbers: &[u64]| {
        let blocks = numbers.iter().map(|&number| Block { number, digest: Digest(1) }).collect();
        let content = Content { size, blocks, ..content(b"", 0, 0) };
        let forge = full().change(b"x", present(Kind::file(content)), None);
        all.push(Case::one(name, forge.build(), "a file's blocks do not fit"));
    };
    let block = BLOCK as u64;
    case("a block behind the end", 2 * block, &[2]);
    case("a block of an empty file", 0, &[0]);
    case("a block of a file of one", block, &[0]);
    case("a block twice", 3 * block, &[1, 1]);
    case("descending blocks", 3 * block, &[1, 0]);
    case("the last block of all", 3 * block, &[u64::MAX]);
    case("a block whose place overflows", 3 * block, &[u64::MAX / block]);
}
