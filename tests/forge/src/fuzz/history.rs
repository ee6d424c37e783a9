//! A lower directory and a chain over it, made of what a fuzzer says: most of it well, some of it not.

use std::collections::{BTreeMap, BTreeSet};

use arbitrary::Arbitrary;
use syncd::digest::{BLOCK, Block, of_file};
use syncd::entry::{Base, Content, Kind, Meta, Node, State, Stretch};
use syncd::format::Relation;
use syncd::path::RelPath;

use crate::file::{Forge, digest};
use crate::sample::{FULL, SEED, header};

/// The most that a file is long.
const LONGEST: u64 = 3 << 20;
/// Names of files. Those at the end are none.
const NAMES: [&[u8]; 16] = [
    b"a",
    b"b",
    b"c",
    b"d",
    b"link",
    b"a-b",
    b"a.b",
    b"\xff\xfe\n",
    &[b'n'; 255],
    b"e",
    b".ephemeral-overlay.tmp.",
    b"f",
    b"..",
    b".",
    b"",
    b"a\0b",
];
/// How many of them are names.
const GOOD: u8 = 12;

/// A lower directory and a chain over it.
#[derive(Debug, Clone, Arbitrary)]
pub struct History {
    /// What stands in lower, by path.
    pub lower: Vec<(Path, Thing)>,
    /// The chain.
    pub steps: Vec<Step>,
    /// The disk's version stays in a conflict.
    pub disk_wins: bool,
    /// What stands before a damaged checkpoint is enough.
    pub accept_prefix: bool,
    /// The second time, the merge is one that had begun.
    pub redo: bool,
}

/// A path: at most four names.
#[derive(Debug, Clone, Arbitrary)]
pub struct Path {
    names: [u8; 4],
    depth: u8,
    /// It may be a bad one.
    hostile: bool,
}

/// An object of lower.
#[derive(Debug, Clone, Copy, Arbitrary)]
pub enum Thing {
    /// A regular file with so many bytes, and another name beside it.
    File(Length, bool),
    /// A directory.
    Dir,
    /// A symlink that leads out.
    Out(bool),
    /// A FIFO.
    Fifo,
    /// A device.
    Device,
}

/// A length out of those that matter.
#[derive(Debug, Clone, Copy, Arbitrary)]
pub enum Length {
    /// Itself.
    Short(u8),
    /// Some pages.
    Pages(u8),
    /// A block, and one byte less or more.
    Block(u8),
    /// Enough to be changed in place.
    Long,
}

/// A checkpoint.
#[derive(Debug, Clone, Arbitrary)]
pub struct Step {
    full: bool,
    data: Vec<(u8, Length, bool)>,
    changes: Vec<Entry>,
    /// Nothing is put right that makes no tree.
    wild: bool,
}

/// A change.
#[derive(Debug, Clone, Arbitrary)]
struct Entry {
    path: Path,
    what: What,
    meta: Look,
    group: u8,
    base: Option<Ground>,
}

#[derive(Debug, Clone, Arbitrary)]
enum What {
    File { pieces: Vec<Piece>, tail: Option<Length> },
    Dir { opaque: bool },
    Symlink { out: bool, long: bool },
    Fifo,
    Socket,
    Device { block: bool, odd: Option<(u32, u32)> },
    Deleted,
    AsLower,
}

#[derive(Debug, Clone, Arbitrary)]
struct Piece {
    hole: Option<Length>,
    length: Length,
    back: u8,
    data: u16,
    /// In place of all that.
    wild: Option<(u64, u64, u64, u64)>,
}

#[derive(Debug, Clone, Arbitrary)]
struct Look {
    mode: u16,
    owner: u8,
    mtime: i64,
    nanoseconds: u32,
    flags: u8,
    attributes: Vec<(u8, Vec<u8>)>,
}

#[derive(Debug, Clone, Copy, Arbitrary)]
enum Ground {
    Right,
    Absent,
    Dir,
    Whole,
    Unknown,
}

impl Path {
    /// Its bytes.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        let among = if self.hostile { NAMES.len() } else { GOOD.into() };
        let depth = usize::from(self.depth % 5);
        let names: Vec<_> = self.names[..depth].iter().map(|&name| NAMES[usize::from(name) % among]).collect();
        names.join(&b'/')
    }

    /// Itself, where it is one that may be.
    #[must_use]
    pub fn parsed(&self) -> Option<RelPath> {
        RelPath::parse(&self.bytes())
    }
}

impl Length {
    /// In bytes.
    #[must_use]
    pub fn bytes(self) -> u64 {
        match self {
            Self::Short(length) => length.into(),
            Self::Pages(number) => u64::from(number % 16) * 4096,
            Self::Block(number) => BLOCK as u64 * u64::from(number / 4 % 3 + 1) + u64::from(number % 4) - 1,
            Self::Long => (1 << 20) + 5,
        }
    }
}

/// What has been said so far.
#[derive(Default)]
struct Upper {
    /// The data of the chain's checkpoints, oldest first.
    data: Vec<Vec<u8>>,
    /// What upper has: whether it is a directory.
    paths: BTreeMap<RelPath, bool>,
}

impl History {
    /// The files of the chain, from number 1. `capture` says what lower has at a path.
    #[must_use]
    pub fn files(&self, capture: &dyn Fn(&RelPath, bool) -> Option<Base>) -> Vec<Vec<u8>> {
        let mut upper = Upper::default();
        let mut files: Vec<Vec<u8>> = Vec::new();
        for (step, sequence) in self.steps.iter().take(4).zip(1..) {
            let relation = match files.last() {
                Some(before) if !step.full => Relation::Delta { predecessor: digest(before) },
                _ => FULL,
            };
            if relation == FULL {
                upper = Upper::default();
            }
            files.push(step.file(Forge::new(&header(sequence, relation)), &mut upper, capture));
        }
        files
    }
}

impl Step {
    fn file(&self, forge: Forge, upper: &mut Upper, capture: &dyn Fn(&RelPath, bool) -> Option<Base>) -> Vec<u8> {
        let forge = self.put_data(forge, upper);
        let mut changes: BTreeMap<RelPath, (State, Option<Base>)> = BTreeMap::new();
        let mut wild = Vec::new();
        let mut groups: BTreeMap<u8, Node> = BTreeMap::new();
        for entry in self.changes.iter().take(24) {
            let state = entry.state(&upper.data, &mut groups);
            match entry.path.parsed() {
                Some(path) => {
                    let hides = !matches!(&state, State::Present(node) if node.is_dir() && !node.is_opaque());
                    let base = entry.base.and_then(|ground| ground.base(&path, hides, capture));
                    changes.insert(path, (state, base));
                }
                None => wild.push((entry.path.bytes(), state)),
            }
        }
        if !self.wild {
            put_right(&mut changes, &mut upper.paths);
        }
        let forge = changes.into_iter().fold(forge, |forge, (path, (state, base))| {
            let bytes =
                if path.is_root() { Vec::new() } else { path.as_path().as_os_str().as_encoded_bytes().to_vec() };
            forge.change(&bytes, state, base)
        });
        wild.into_iter().fold(forge, |forge, (path, state)| forge.change(&path, state, None)).build()
    }

    fn put_data(&self, mut forge: Forge, upper: &mut Upper) -> Forge {
        let mut data = Vec::new();
        for &(byte, length, packed) in self.data.iter().take(3) {
            let length = usize::try_from(length.bytes().min(1 << 20)).unwrap();
            let bytes: Vec<u8> = (0..length).map(|at| byte.wrapping_add((at / 5000).to_le_bytes()[0])).collect();
            let small = zstd::bulk::compress(&bytes, 1).unwrap();
            if length == 0 {
                continue;
            }
            forge = if packed && small.len() < length {
                forge.packed_frame(u32::try_from(length).unwrap(), &small)
            } else {
                forge.frame(&bytes)
            };
            data.extend(bytes);
        }
        upper.data.push(data);
        forge
    }
}

/// Makes a tree of it: what stands in no directory is left out, or taken back.
fn put_right(changes: &mut BTreeMap<RelPath, (State, Option<Base>)>, paths: &mut BTreeMap<RelPath, bool>) {
    let dir = || State::Present(crate::sample::node(Kind::Dir { opaque: false }));
    changes.entry(RelPath::root()).or_insert_with(|| (dir(), None));
    if !matches!(&changes[&RelPath::root()].0, State::Present(node) if node.is_dir()) {
        changes.insert(RelPath::root(), (dir(), None));
    }
    let needed: BTreeSet<RelPath> = changes.keys().flat_map(RelPath::ancestors).collect();
    for path in needed {
        if !changes.contains_key(&path) && paths.get(&path) != Some(&true) {
            changes.insert(path, (dir(), None));
        }
    }
    for (path, (state, _)) in &*changes {
        match state {
            State::Present(node) => paths.insert(path.clone(), node.is_dir()),
            State::Deleted => paths.insert(path.clone(), false),
            State::AsLower => paths.remove(path),
        };
    }
    for path in paths.keys().cloned().collect::<Vec<_>>() {
        let Some(parent) = path.parent() else { continue };
        if paths.get(&parent) != Some(&true) {
            paths.remove(&path);
            changes.insert(path, (State::AsLower, None));
        }
    }
}

impl Entry {
    fn state(&self, data: &[Vec<u8>], groups: &mut BTreeMap<u8, Node>) -> State {
        let kind = match &self.what {
            What::Deleted => return State::Deleted,
            What::AsLower => return State::AsLower,
            What::File { pieces, tail } => Kind::file(content(pieces, *tail, data)),
            What::Dir { opaque } => Kind::Dir { opaque: *opaque },
            What::Symlink { long: true, .. } => Kind::Symlink { target: vec![b'x'; 5000] },
            What::Symlink { out, .. } => {
                Kind::Symlink { target: if *out { b"../canary/dir" } else { &b"a"[..] }.to_vec() }
            }
            What::Fifo => Kind::Fifo,
            What::Socket => Kind::Socket,
            // What Linux cannot have is refused, and never made.
            What::Device { block, odd: Some((major, minor)) } => {
                Kind::Device { block: *block, major: major | 1 << 12, minor: *minor }
            }
            What::Device { block, odd: None } => Kind::Device { block: *block, major: 1, minor: 3 },
        };
        let is_dir = matches!(kind, Kind::Dir { .. });
        let node = Node { kind, meta: self.meta.meta(), group: 0 };
        match self.group % 8 {
            group @ 1..=3 if !is_dir => {
                State::Present(groups.entry(group).or_insert(Node { group: group.into(), ..node }).clone())
            }
            _ => State::Present(node),
        }
    }
}

fn content(pieces: &[Piece], tail: Option<Length>, data: &[Vec<u8>]) -> Content {
    let (mut bytes, mut stretches) = (Vec::new(), Vec::new());
    for piece in pieces.iter().take(6) {
        if let Some((offset, length, back, data)) = piece.wild {
            stretches.push(Stretch { offset, length, back, data });
            continue;
        }
        let hole = piece.hole.map_or(0, Length::bytes);
        let back = usize::from(piece.back) % data.len();
        let from = &data[data.len() - 1 - back];
        let at = usize::from(piece.data).min(from.len());
        let length = usize::try_from(piece.length.bytes()).unwrap().min(from.len() - at);
        if length == 0 || bytes.len() as u64 + hole + length as u64 > LONGEST {
            continue;
        }
        bytes.resize(bytes.len() + usize::try_from(hole).unwrap(), 0);
        let offset = bytes.len() as u64;
        stretches.push(Stretch { offset, length: length as u64, back: back as u64, data: at as u64 });
        bytes.extend_from_slice(&from[at..at + length]);
    }
    bytes.resize(bytes.len() + tail.map_or(0, |tail| usize::try_from(tail.bytes()).unwrap()), 0);
    let size = bytes.len() as u64;
    let mut blocks: Vec<_> =
        bytes.chunks(BLOCK).zip(0..).filter_map(|(bytes, at)| Block::of(at, bytes, SEED)).collect();
    let digest = of_file(size, &blocks, SEED);
    if size <= BLOCK as u64 {
        blocks.clear();
    }
    Content { size, digest, fuzzy: false, stretches, blocks }
}

impl Look {
    fn meta(&self) -> Meta {
        const ATTRIBUTES: [&[u8]; 12] = [
            b"user.a",
            b"user.b",
            b"trusted.c",
            b"security.capability",
            b"system.posix_acl_access",
            b"system.posix_acl_default",
            b"trusted.overlay.opaque",
            b"trusted.overlay.own",
            b"odd",
            b"user.",
            b"security.d",
            b"trusted.ephemeral_overlay.token",
        ];
        let xattrs = self.attributes.iter().take(4);
        let xattrs = xattrs.map(|(name, value)| (ATTRIBUTES[usize::from(*name) % 12].to_vec(), value.clone()));
        let owner = [0, 1000, 65_534, u32::MAX - 1, u32::MAX];
        let pick = |byte: u8| if byte == u8::MAX { owner[4] } else { owner[usize::from(byte % 4)] };
        Meta {
            mode: u32::from(self.mode & 0o7777),
            uid: pick(self.owner),
            gid: pick(self.owner / 4),
            mtime: self.mtime,
            mtime_nsec: self.nanoseconds % 1_000_000_000,
            immutable: self.flags & 1 != 0,
            append_only: self.flags & 2 != 0,
            xattrs: xattrs.collect(),
        }
    }
}

impl Ground {
    fn base(self, path: &RelPath, hides: bool, capture: &dyn Fn(&RelPath, bool) -> Option<Base>) -> Option<Base> {
        Some(match self {
            Self::Right => return capture(path, hides),
            Self::Absent => Base::Absent,
            Self::Dir => Base::Dir { owner: (0o755, 0, 0) },
            Self::Whole => Base::Whole { digest: syncd::digest::Digest(1) },
            Self::Unknown => Base::Unknown,
        })
    }
}
