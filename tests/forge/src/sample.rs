//! Parts of which checkpoints are made, all of them well.

use std::collections::BTreeMap;

use ephemeral_overlay::token::Token;
use syncd::digest::{BLOCK, Block, of_file};
use syncd::entry::{Base, Content, Kind, Meta, Node, State, Stretch};
use syncd::format::{Header, Relation};

use crate::file::{self, Forge};

/// The target of everything here.
pub const TARGET: &str = "/etc";
/// The token of its lower.
pub const TOKEN: Token = Token(0xfeed);
/// The seed of the content digests.
pub const SEED: u64 = 0x0123_4567_89ab_cdef;
/// The relation of a first checkpoint.
pub const FULL: Relation = Relation::Full { supersedes: None };

/// The header of checkpoint `sequence`.
#[must_use]
pub fn header(sequence: u64, relation: Relation) -> Header {
    Header {
        target: TARGET.into(),
        token: Some(TOKEN),
        sequence,
        relation,
        boot_id: "01234567-89ab-cdef-0123-456789abcdef".to_owned(),
        seed: SEED,
        user_xattrs: true,
        written_in_boot: 0,
        written_in_all: 0,
    }
}

/// A checkpoint after the one with these bytes.
#[must_use]
pub fn after(sequence: u64, before: &[u8]) -> Forge {
    Forge::new(&header(sequence, Relation::Delta { predecessor: file::digest(before) }))
}

/// Metadata that every kind of object can have.
#[must_use]
pub fn meta(mode: u32) -> Meta {
    Meta { mode, uid: 1000, gid: 100, mtime: 1_234_567_890, mtime_nsec: 7, ..Meta::default() }
}

/// An object with one name.
#[must_use]
pub fn node(kind: Kind) -> Node {
    Node { meta: meta(if matches!(kind, Kind::Dir { .. }) { 0o755 } else { 0o644 }), kind, group: 0 }
}

/// An object as a state.
#[must_use]
pub fn present(kind: Kind) -> State {
    State::Present(node(kind))
}

/// A directory.
#[must_use]
pub fn dir() -> State {
    present(Kind::Dir { opaque: false })
}

/// The contents of a file that has `bytes` behind a hole of some whole blocks, in this checkpoint's data from `data` on.
#[must_use]
pub fn content(bytes: &[u8], hole: u64, data: u64) -> Content {
    let size = hole + bytes.len() as u64;
    let first = hole / BLOCK as u64;
    let blocks = bytes.chunks(BLOCK).zip(first..);
    let mut blocks: Vec<_> = blocks.filter_map(|(bytes, number)| Block::of(number, bytes, SEED)).collect();
    let digest = of_file(size, &blocks, SEED);
    if size <= BLOCK as u64 {
        blocks.clear();
    }
    let stretches = match bytes.len() as u64 {
        0 => Vec::new(),
        length => vec![Stretch { offset: hole, length, back: 0, data }],
    };
    Content { size, digest, fuzzy: false, stretches, blocks }
}

/// A file of [`small`]'s data.
#[must_use]
pub fn file(bytes: &[u8], data: u64) -> State {
    present(Kind::file(content(bytes, 0, data)))
}

/// A full checkpoint of some hundred bytes with every kind of object, of state and of base.
#[must_use]
pub fn small() -> Forge {
    let packed = zstd::bulk::compress(&[b'x'; 300], 3).unwrap();
    let mut with_attributes = node(Kind::file(content(b"short", 0, 0)));
    with_attributes.meta.xattrs = BTreeMap::from([(b"user.word".to_vec(), b"value\0\xff".to_vec())]);
    with_attributes.meta.append_only = true;
    let linked = Node { group: 1, ..node(Kind::file(content(b"or", BLOCK as u64, 2))) };
    Forge::new(&header(1, FULL))
        .frame(b"short")
        .packed_frame(300, &packed)
        .change(b"", dir(), Some(Base::Dir { owner: (0o755, 0, 0) }))
        .change(b"attributes", State::Present(with_attributes), Some(Base::Absent))
        .change(b"device", present(Kind::Device { block: false, major: 1, minor: 3 }), Some(Base::Unknown))
        .change(b"dir", present(Kind::Dir { opaque: true }), Some(Base::Absent))
        .change(b"dir/socket", present(Kind::Socket), None)
        .change(b"dir/\xff\xfe\n", present(Kind::Fifo), None)
        .change(b"gone", State::Deleted, Some(Base::Absent))
        .change(b"lower", State::AsLower, None)
        .change(b"packed", file(&[b'x'; 300], 5), None)
        .change(b"sparse", State::Present(linked.clone()), None)
        .change(b"sparse.link", State::Present(linked), None)
        .change(b"symlink", present(Kind::Symlink { target: b"../canary/file".to_vec() }), None)
}
