//! A chain that was written once and is kept: whoever changes the format must notice, and once a version is released
//! its files must be read for ever.
//!
//! `WRITE_GOLDEN=1 cargo test -p syncd --test golden` writes them anew, for a format that is not released yet.

#![allow(clippy::unwrap_used, reason = "tests may unwrap")]

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use ephemeral_overlay::token::Token;
use rayon::prelude::*;
use syncd::chain::{Chain, FrameCache};
use syncd::digest::{BLOCK, Block, Digest, of_file};
use syncd::entry::{Base, Change, Content, Kind, Meta, Node, State, Stretch};
use syncd::format::read::Checkpoint;
use syncd::format::write::{Packer, Writer};
use syncd::format::{FRAME, Header, Relation};
use syncd::path::RelPath;
use syncd::progress::Progress;

const SEED: u64 = 0x0123_4567_89ab_cdef;

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

fn path(bytes: &[u8]) -> RelPath {
    RelPath::parse(bytes).unwrap()
}

fn meta(mode: u32) -> Meta {
    let xattrs = BTreeMap::from([(b"user.word".to_vec(), b"value\0\xff".to_vec())]);
    Meta {
        mode,
        uid: 1000,
        gid: 65_534,
        mtime: -1,
        mtime_nsec: 999_999_999,
        immutable: false,
        append_only: true,
        xattrs,
    }
}

fn change(at: &[u8], kind: Kind, group: u32, base: Option<Base>) -> Change {
    Change { path: path(at), state: State::Present(Node { kind, meta: meta(0o4755), group }), base }
}

/// Bytes for more than one frame, which compress well.
fn long_content() -> Vec<u8> {
    (0..FRAME + 3 * BLOCK + 5).map(|at| u8::try_from(at / 7 % 251).unwrap()).collect()
}

/// A file of some bytes behind a hole of whole blocks.
fn content(bytes: &[u8], hole: u64, back: u64, data: u64) -> Content {
    let size = hole + bytes.len() as u64;
    let first = hole / BLOCK as u64;
    let mut blocks: Vec<_> =
        bytes.chunks(BLOCK).zip(first..).filter_map(|(bytes, number)| Block::of(number, bytes, SEED)).collect();
    let digest = of_file(size, &blocks, SEED);
    if size <= BLOCK as u64 {
        blocks.clear();
    }
    let stretches = vec![Stretch { offset: hole, length: bytes.len() as u64, back, data }];
    Content { size, digest, fuzzy: false, stretches, blocks }
}

fn header(sequence: u64, relation: Relation) -> Header {
    Header {
        target: "/var/log".into(),
        token: Some(Token(0xfeed)),
        sequence,
        relation,
        boot_id: "01234567-89ab-cdef-0123-456789abcdef".to_owned(),
        written_in_boot: 8192,
        written_in_all: 1 << 40,
        seed: SEED,
        user_xattrs: true,
    }
}

/// Every kind of object, of state and of base.
fn full() -> (Header, Vec<u8>, Vec<Change>) {
    let long = long_content();
    let data = [&long[..], b"short"].concat();
    let dir = |opaque| Kind::Dir { opaque };
    let digest = Digest(u128::MAX / 3);
    let changes = vec![
        change(b"", dir(false), 0, Some(Base::Dir { owner: (0o755, 0, 0) })),
        Change { path: path(b".gone"), state: State::Deleted, base: Some(Base::Whole { digest }) },
        change(b"block", Kind::Device { block: true, major: 8, minor: 1 << 18 }, 0, Some(Base::Absent)),
        change(b"char", Kind::Device { block: false, major: 1, minor: 3 }, 0, Some(Base::Absent)),
        change(b"dir", dir(true), 0, Some(Base::Absent)),
        change(b"dir/socket", Kind::Socket, 0, None),
        change(b"dir/\xff\xfe\n", Kind::Fifo, 0, None),
        change(b"link", Kind::Symlink { target: b"../\xff where".to_vec() }, 0, Some(Base::Absent)),
        change(b"long", Kind::file(content(&long, 0, 0, 0)), 0, Some(Base::Absent)),
        change(b"one", Kind::file(content(b"short", 1 << 30, 0, long.len() as u64)), 1, Some(Base::Absent)),
        change(b"two", Kind::file(content(b"short", 1 << 30, 0, long.len() as u64)), 1, Some(Base::Absent)),
    ];
    (header(41, Relation::Full { supersedes: Some(40) }), data, changes)
}

/// A file that moved, one that is new, one that is empty.
fn delta(predecessor: Digest) -> (Header, Vec<u8>, Vec<Change>) {
    let mut empty = Content { fuzzy: true, ..content(b"", 0, 0, 0) };
    empty.stretches.clear();
    let changes = vec![
        Change { path: path(b"long"), state: State::AsLower, base: None },
        change(b"long.1", Kind::file(content(&long_content(), 0, 1, 0)), 0, None),
        change(b"one", Kind::file(content(b"other", 0, 0, 0)), 0, None),
        change(b"two", Kind::file(empty), 0, None),
    ];
    (header(42, Relation::Delta { predecessor }), b"other".to_vec(), changes)
}

fn write(name: &str, (header, data, changes): (Header, Vec<u8>, Vec<Change>)) -> Digest {
    let path = directory().join(name);
    let mut file = File::create(&path).unwrap();
    let mut writer = Writer::new(&mut file, &path, &header).unwrap();
    let mut packer = Packer::new(3).unwrap();
    for piece in data.chunks(FRAME) {
        writer.frame(&packer.pack(piece.to_vec(), Vec::new()).unwrap().0).unwrap();
    }
    writer.finish(changes.into_par_iter().map(Some), 3).unwrap().digest
}

#[test]
fn the_kept_chain_reads_as_it_was_written() {
    if std::env::var_os("WRITE_GOLDEN").is_some() {
        let predecessor = write("v1-full.ckpt", full());
        write("v1-delta.ckpt", delta(predecessor));
    }
    let open = |name: &str| Checkpoint::open(&directory().join(name)).unwrap();
    let (first, second) = (open("v1-full.ckpt"), open("v1-delta.ckpt"));
    let (full_header, _, full_changes) = full();
    let (delta_header, _, delta_changes) = delta(first.digest);
    assert_eq!((&first.header, &first.changes), (&full_header, &full_changes));
    assert_eq!((&second.header, &second.changes), (&delta_header, &delta_changes));

    let mut chain = Chain::new(vec![first, second], Path::new("/var/log")).unwrap().unwrap();
    chain.verify(&Progress::new(None)).unwrap();
    let net = chain.compose().unwrap();
    assert!(!net.entries.contains_key(&path(b"long")), "the delta gave it back to lower");
    assert_eq!(net.entries[&path(b"one")].seq, 42);

    let read = |seq, change: &Change| {
        let mut bytes = Vec::new();
        let content = change.state.node().unwrap().content().unwrap();
        chain
            .contents(seq, content, &mut FrameCache::default(), &mut |at, piece| {
                bytes.resize(usize::try_from(at).unwrap(), 0);
                bytes.extend_from_slice(piece);
                Ok(())
            })
            .unwrap();
        bytes
    };
    assert!(read(41, &full_changes[8]) == long_content(), "data over two frames");
    assert!(read(42, &delta_changes[1]) == long_content(), "data of the checkpoint before");
    assert_eq!(read(42, &delta_changes[2]), b"other");
}
