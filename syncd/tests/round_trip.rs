//! Any changes that are written are read again, and the sum of any chain is what its checkpoints say one after the other.

#![allow(clippy::unwrap_used, reason = "tests may unwrap")]

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::Path;

use forge::sample;
use proptest::collection::{btree_map, vec};
use proptest::prelude::*;
use rayon::prelude::*;
use syncd::chain::{Chain, FrameCache, Net};
use syncd::digest::{Block, Digest};
use syncd::entry::{Base, Change, Content, Kind, Meta, Node, State, Stretch};
use syncd::format::read::Checkpoint;
use syncd::format::write::{Packer, Writer};
use syncd::format::{Header, Relation};
use syncd::path::RelPath;
use syncd::progress::Progress;

/// The bytes of a checkpoint, which its files have in any order.
type Data = Vec<Vec<u8>>;

fn path() -> impl Strategy<Value = RelPath> {
    let name = prop_oneof![
        4 => prop::sample::select(vec!["a", "b", "a-b", "a.b"]).prop_map(|name| name.as_bytes().to_vec()),
        1 => vec(any::<u8>().prop_filter("a separator", |byte| ![0, b'/'].contains(byte)), 3..=255),
    ];
    vec(name.prop_filter("no name", |name| !matches!(&name[..], b"." | b"..")), 0..4)
        .prop_map(|names| RelPath::parse(&names.join(&b'/')).unwrap())
}

fn meta() -> impl Strategy<Value = Meta> {
    let name = vec(1..=u8::MAX, 1..40).prop_map(|name| [b"user.", &name[..]].concat());
    let numbers = (0..=0o7777u32, 0..u32::MAX, 0..u32::MAX, any::<i64>(), 0..1_000_000_000u32);
    (numbers, any::<(bool, bool)>(), btree_map(name, vec(any::<u8>(), 0..40), 0..3)).prop_map(
        |((mode, uid, gid, mtime, mtime_nsec), (immutable, append_only), xattrs)| Meta {
            mode,
            uid,
            gid,
            mtime,
            mtime_nsec,
            immutable,
            append_only,
            xattrs,
        },
    )
}

/// A file out of pieces of this checkpoint's data, which has `length` bytes.
fn content(length: u64) -> impl Strategy<Value = Content> {
    let piece = (0..200_000u64, 0..=length, 0..=length);
    (vec(piece, 0..4), 0..1u64 << 40, any::<(u128, bool)>()).prop_map(|(pieces, tail, (digest, fuzzy))| {
        let mut at = 0;
        let mut stretches = Vec::new();
        for (hole, from, to) in pieces.into_iter().filter(|(_, from, to)| from < to) {
            stretches.push(Stretch { offset: at + hole, length: to - from, back: 0, data: from });
            at += hole + to - from;
        }
        let size = at + tail;
        let blocks = if size > 128 << 10 { vec![Block { number: 0, digest: Digest(digest) }] } else { Vec::new() };
        Content { size, digest: Digest(digest), fuzzy, stretches, blocks }
    })
}

fn state(length: u64) -> impl Strategy<Value = State> {
    let kind = prop_oneof![
        4 => content(length).prop_map(Kind::file),
        2 => any::<bool>().prop_map(|opaque| Kind::Dir { opaque }),
        1 => vec(1..=u8::MAX, 1..300).prop_map(|target| Kind::Symlink { target }),
        1 => Just(Kind::Fifo),
        1 => Just(Kind::Socket),
        1 => (any::<bool>(), 1..1u32 << 12, 0..1u32 << 20)
            .prop_map(|(block, major, minor)| Kind::Device { block, major, minor }),
    ];
    prop_oneof![
        6 => (kind, meta()).prop_map(|(kind, meta)| State::Present(Node { kind, meta, group: 0 })),
        2 => Just(State::Deleted),
        2 => Just(State::AsLower),
    ]
}

fn base() -> impl Strategy<Value = Option<Base>> {
    prop_oneof![
        3 => Just(None),
        1 => Just(Some(Base::Absent)),
        1 => any::<(u32, u32, u32)>().prop_map(|owner| Some(Base::Dir { owner })),
        1 => any::<u128>().prop_map(|digest| Some(Base::Whole { digest: Digest(digest) })),
        1 => Just(Some(Base::Unknown)),
    ]
}

/// Data and changes of a checkpoint.
fn checkpoint() -> impl Strategy<Value = (Data, Vec<Change>)> {
    vec(vec(any::<u8>(), 1..500), 0..3).prop_flat_map(|data| {
        let length = data.iter().map(|piece| piece.len() as u64).sum();
        let change = (state(length), base());
        (Just(data), btree_map(path(), change, 0..12)).prop_map(|(data, changes)| {
            let change = |(path, (state, base))| Change { path, state, base };
            (data, changes.into_iter().map(change).collect())
        })
    })
}

fn write(at: &Path, header: &Header, data: &Data, changes: &[Change]) -> Checkpoint {
    let mut file = File::create(at).unwrap();
    let mut writer = Writer::new(&mut file, at, header).unwrap();
    let mut packer = Packer::new(1).unwrap();
    for piece in data {
        writer.frame(&packer.pack(piece.clone(), Vec::new()).unwrap().0).unwrap();
    }
    writer.finish(changes.to_vec().into_par_iter().map(Some), 1).unwrap();
    Checkpoint::open(at).unwrap()
}

/// What upper has, said as simply as can be: the states, and the words on lower.
#[derive(Default)]
struct Model {
    states: BTreeMap<RelPath, (State, u64)>,
    bases: BTreeMap<RelPath, Base>,
}

impl Model {
    fn apply(&mut self, sequence: u64, full: bool, changes: &[Change]) {
        if full {
            self.states.clear();
        }
        for Change { path, state, base } in changes {
            self.states.remove(path);
            if *state != State::AsLower {
                self.states.insert(path.clone(), (state.clone(), sequence));
            }
            let known = self.bases.get(path).cloned();
            let counts = match (&known, base) {
                (None, Some(_)) => true,
                (Some(Base::Dir { .. }), Some(base)) => matches!(base, Base::Whole { .. } | Base::Unknown),
                _ => false,
            };
            if counts {
                self.bases.extend(base.clone().map(|base| (path.clone(), base)));
            }
        }
    }

    fn is(&self, net: &Net) -> bool {
        let entries: BTreeMap<_, _> =
            net.entries.iter().map(|(path, recorded)| (path.clone(), (recorded.state.clone(), recorded.seq))).collect();
        entries == self.states && net.bases == self.bases
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_is_written_is_read((data, changes) in checkpoint()) {
        let directory = tempfile::tempdir().unwrap();
        let header = sample::header(1, sample::FULL);
        let read = write(&directory.path().join("1"), &header, &data, &changes);
        read.verify(&Progress::new(None)).unwrap();
        prop_assert_eq!(&read.header, &header);
        prop_assert_eq!(&read.changes, &changes);
        let chain = Chain::new(vec![read], Path::new(sample::TARGET)).unwrap().unwrap();
        let data = data.concat();
        for content in changes.iter().filter_map(|change| change.state.node()?.content()) {
            let mut pieces = Vec::new();
            chain
                .contents(1, content, &mut FrameCache::default(), &mut |_, bytes| {
                    pieces.extend_from_slice(bytes);
                    Ok(())
                })
                .unwrap();
            let part = |stretch: &Stretch| {
                let at = usize::try_from(stretch.data).unwrap();
                data[at..at + usize::try_from(stretch.length).unwrap()].to_vec()
            };
            prop_assert_eq!(pieces, content.stretches.iter().flat_map(part).collect::<Vec<_>>());
        }
    }

    #[test]
    fn the_sum_of_a_chain_is_what_it_says_step_by_step(
        steps in vec((checkpoint(), prop::bool::weighted(0.2)), 1..5),
    ) {
        let directory = tempfile::tempdir().unwrap();
        let (mut model, mut net) = (Model::default(), Net::default());
        let mut before = None;
        for (sequence, ((data, changes), full)) in (1..).zip(&steps) {
            let relation = before.filter(|_| !full).map_or(sample::FULL, |predecessor| Relation::Delta { predecessor });
            let full = relation == sample::FULL;
            let at = directory.path().join(sequence.to_string());
            let checkpoint = write(&at, &sample::header(sequence, relation), data, changes);
            before = Some(checkpoint.digest);
            model.apply(sequence, full, changes);
            net.apply(sequence, full, checkpoint.changes);
            prop_assert!(model.is(&net));
            let groups = net.groups();
            prop_assert!(groups.is_empty());
        }
        // A chain is its newest full checkpoint and what follows; the words on lower of those before are repeated there.
        let first = steps.iter().rposition(|(_, full)| *full).unwrap_or(0);
        let mut rest = Model::default();
        for (sequence, ((_, changes), _)) in (1..).zip(&steps).skip(first) {
            rest.apply(sequence, sequence == first as u64 + 1, changes);
        }
        let names = 1..=steps.len();
        let files = names.map(|number| Checkpoint::open(&directory.path().join(number.to_string())).unwrap()).collect();
        let mut chain = Chain::new(files, Path::new(sample::TARGET)).unwrap().unwrap();
        let is_tree = rest.states.iter().all(|(path, (state, _))| match path.parent() {
            None => state.node().is_some_and(Node::is_dir),
            Some(parent) => rest.states.get(&parent).is_some_and(|(state, _)| state.node().is_some_and(Node::is_dir)),
        });
        match chain.compose() {
            Ok(net) => prop_assert!(is_tree && rest.is(&net)),
            Err(_) => prop_assert!(!is_tree),
        }
        fs::remove_dir_all(directory.path()).unwrap();
    }
}
