//! A target's checkpoints since its last merge, and their pure composition into one net state.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::iter::Peekable;
use std::path::Path;

use ephemeral_overlay::token::Token;

use crate::digest::Digest;
use crate::entry::{Base, Change, Content, State, Stretch};
use crate::error::{Error, Result};
use crate::format::Relation;
use crate::format::read::{Checkpoint, Unpacker};
use crate::path::RelPath;
use crate::progress::Progress;

/// What a path is after a whole chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recorded {
    /// Present or deleted, never as lower.
    pub state: State,
    /// The checkpoint that says so, and that holds the data.
    pub seq: u64,
}

/// The sum of a chain: what upper held at its last checkpoint, path by path.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Net {
    /// What upper held.
    pub entries: BTreeMap<RelPath, Recorded>,
    /// What lower had when each path was first captured.
    pub bases: BTreeMap<RelPath, Base>,
}

impl Net {
    /// Adds the changes of one checkpoint.
    pub fn apply(&mut self, seq: u64, full: bool, changes: Vec<Change>) {
        if full {
            self.entries.clear();
        }
        let is_first = self.entries.is_empty();
        let recorded = changes.into_iter().filter_map(|Change { path, state, base }| {
            if let Some(base) = base {
                self.add_base(&path, base);
            }
            match state {
                State::AsLower => {
                    self.entries.remove(&path);
                    None
                }
                state => Some((path, Recorded { state, seq })),
            }
        });
        // In the memory of the list that it was.
        let entries: Vec<_> = recorded.collect();
        if is_first {
            // In path order already.
            self.entries = entries.into_iter().collect();
        } else {
            self.entries.extend(entries);
        }
    }

    /// Remembers what lower had. The first word counts, save that a directory which only showed through at first
    /// and is hidden later is then recorded whole.
    fn add_base(&mut self, path: &RelPath, base: Base) {
        let known = self.bases.get(path);
        if known.is_none() || matches!((known, &base), (Some(Base::Dir { .. }), Base::Whole { .. } | Base::Unknown)) {
            self.bases.insert(path.clone(), base);
        }
    }

    /// The directories of which nothing of lower shows through: opaque ones, and all below them.
    #[must_use]
    pub fn hidden_directories(&self) -> HashSet<&RelPath> {
        let mut hidden = HashSet::new();
        // A subtree is contiguous, so the last opaque directory that was met is the only one that can matter.
        let mut opaque: Option<&RelPath> = None;
        for (path, recorded) in &self.entries {
            let Some(node) = recorded.state.node().filter(|node| node.is_dir()) else { continue };
            if opaque.is_some_and(|above| path.is_below(above)) {
                hidden.insert(path);
            } else if node.is_opaque() {
                hidden.insert(path);
                opaque = Some(path);
            }
        }
        hidden
    }

    /// Checks what no single checkpoint can show: that everything stands in a directory.
    ///
    /// # Errors
    /// When it does not.
    pub fn check(&self) -> Result<()> {
        // Those above the path that is looked at: a subtree is contiguous.
        let mut directories: Vec<&RelPath> = Vec::new();
        for (path, recorded) in &self.entries {
            let wrong = |what| Err(Error::Inconsistent { seq: recorded.seq, path: path.clone(), what });
            let is_dir = recorded.state.node().is_some_and(super::entry::Node::is_dir);
            while directories.last().is_some_and(|above| !path.is_below(above)) {
                directories.pop();
            }
            if path.is_root() {
                if !is_dir {
                    return wrong("is the root and no directory");
                }
            } else if !directories.last().is_some_and(|above| path.is_in(above)) {
                return wrong("stands in no directory");
            }
            if is_dir {
                directories.push(path);
            }
        }
        Ok(())
    }

    /// The link groups: the members of each, in path order.
    #[must_use]
    pub fn groups(&self) -> BTreeMap<(u64, u32), Vec<&RelPath>> {
        let mut groups: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for (path, recorded) in &self.entries {
            if let Some(node) = recorded.state.node().filter(|node| node.group != 0) {
                groups.entry((recorded.seq, node.group)).or_default().push(path);
            }
        }
        groups
    }
}

/// Walks, in path order, along the paths at which it is known what lower had there and everywhere below.
pub(crate) struct Covers<'a, Known: Iterator> {
    /// Those of a chain that are still ahead.
    known: Peekable<Known>,
    /// The last one that was come to. A subtree is contiguous: it is the only one that can hold the path that is next.
    last: Option<&'a RelPath>,
}

/// Those of a chain's bases that are known.
pub(crate) fn covers(net: &Net) -> Covers<'_, impl Iterator<Item = &RelPath>> {
    let known = net.bases.iter().filter(|(_, base)| !matches!(base, Base::Dir { .. })).map(|(path, _)| path);
    Covers { known: known.peekable(), last: None }
}

impl<'a, Known: Iterator<Item = &'a RelPath>> Covers<'a, Known> {
    /// Whether `path` is one of them, or below one. It must not come before one that was asked for earlier.
    pub(crate) fn has(&mut self, path: &RelPath) -> bool {
        while let Some(next) = self.known.next_if(|next| *next <= path) {
            if !self.last.is_some_and(|last| next.is_below(last)) {
                self.last = Some(next);
            }
        }
        self.last.is_some_and(|cover| cover == path || path.is_below(cover))
    }

    /// Adds the path that was asked for last.
    pub(crate) fn add(&mut self, path: &'a RelPath) {
        self.last = Some(path);
    }
}

/// The valid checkpoints of a target, from the newest full one on.
#[derive(Debug)]
pub struct Chain {
    checkpoints: Vec<Checkpoint>,
}

impl Chain {
    /// Takes checkpoints in the order of their numbers and keeps those from the newest full one on; `None` if there
    /// is none at all.
    ///
    /// # Errors
    /// When they do not follow one another: a gap, a foreign file, a delta whose predecessor is not the one it names.
    pub fn new(mut checkpoints: Vec<Checkpoint>, target: &Path) -> Result<Option<Self>> {
        let damaged = |checkpoint: &Checkpoint, what: &str| Error::Damaged {
            path: checkpoint.path().to_path_buf(),
            what: what.to_owned(),
        };
        let Some(first) = checkpoints.first() else { return Ok(None) };
        let newest_full =
            checkpoints.iter().rposition(|checkpoint| matches!(checkpoint.header.relation, Relation::Full { .. }));
        let Some(newest_full) = newest_full else {
            return Err(damaged(first, "the full checkpoint before it is missing"));
        };
        checkpoints.drain(..newest_full);
        for checkpoint in &checkpoints {
            if checkpoint.header.target != target {
                return Err(damaged(checkpoint, "it belongs to another target"));
            }
        }
        let mut pairs = checkpoints.iter().zip(checkpoints.iter().skip(1));
        if let Some((_, after)) = pairs.find(|(before, after)| !follows(before, after)) {
            return Err(damaged(after, "it does not follow the checkpoint before it"));
        }
        let chain = Self { checkpoints };
        chain.check_references()?;
        Ok(Some(chain))
    }

    /// Checks that whatever a file takes from an earlier checkpoint is there.
    fn check_references(&self) -> Result<()> {
        for (index, checkpoint) in self.checkpoints.iter().enumerate() {
            let nodes = checkpoint.changes.iter().filter_map(|change| change.state.node()?.content());
            for stretch in nodes.flat_map(|content| &content.stretches).filter(|stretch| stretch.back > 0) {
                let from = usize::try_from(stretch.back).ok().and_then(|back| index.checked_sub(back));
                let there = from.map_or(0, |from| self.checkpoints[from].data_len());
                if stretch.data.saturating_add(stretch.length) > there {
                    return Err(checkpoint.damaged("it takes data from where there is none"));
                }
            }
        }
        Ok(())
    }

    /// The checkpoints, oldest first; never empty.
    #[must_use]
    pub fn checkpoints(&self) -> &[Checkpoint] {
        &self.checkpoints
    }

    /// The newest checkpoint.
    #[must_use]
    pub fn last(&self) -> &Checkpoint {
        &self.checkpoints[self.checkpoints.len() - 1]
    }

    /// The first and the last sequence number.
    #[must_use]
    pub fn range(&self) -> (u64, u64) {
        (self.checkpoints[0].header.sequence, self.last().header.sequence)
    }

    /// Lower's token at the time.
    #[must_use]
    pub fn token(&self) -> Option<Token> {
        self.last().header.token
    }

    /// The seed of the content digests.
    #[must_use]
    pub fn seed(&self) -> u64 {
        self.last().header.seed
    }

    /// The length of all its files in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.checkpoints.iter().map(Checkpoint::bytes).sum()
    }

    /// The digest that the next delta has to name.
    #[must_use]
    pub fn digest(&self) -> Digest {
        self.last().digest
    }

    /// Reads every byte of every checkpoint and checks all digests.
    ///
    /// # Errors
    /// The first that is damaged.
    pub fn verify(&self, progress: &Progress) -> Result<()> {
        self.checkpoints.iter().try_for_each(|checkpoint| checkpoint.verify(progress))
    }

    /// The sum of the chain. Its checkpoints give their changes away: what is left of them is their data.
    ///
    /// # Errors
    /// When the sum contradicts itself.
    pub fn compose(&mut self) -> Result<Net> {
        self.compose_until(u64::MAX)
    }

    /// The sum of the chain up to checkpoint `last`.
    ///
    /// # Errors
    /// When the sum contradicts itself.
    pub fn compose_until(&mut self, last: u64) -> Result<Net> {
        let mut net = Net::default();
        for checkpoint in self.checkpoints.iter_mut().filter(|checkpoint| checkpoint.header.sequence <= last) {
            let full = matches!(checkpoint.header.relation, Relation::Full { .. });
            net.apply(checkpoint.header.sequence, full, std::mem::take(&mut checkpoint.changes));
        }
        net.check().map_err(|error| self.blame(error))?;
        Ok(net)
    }

    /// Names the file of the checkpoint that an inconsistency is in.
    fn blame(&self, error: Error) -> Error {
        match error {
            Error::Inconsistent { seq, path, what } => {
                self.checkpoints[self.index(seq)].damaged(&format!("{path} {what}"))
            }
            other => other,
        }
    }

    /// Hands out the bytes of a file as checkpoint `seq` has it, each piece with its offset in the file.
    ///
    /// # Errors
    /// When they cannot be read, or `sink` fails.
    pub fn contents(
        &self,
        seq: u64,
        content: &Content,
        frames: &mut FrameCache,
        sink: &mut dyn FnMut(u64, &[u8]) -> Result<()>,
    ) -> Result<()> {
        self.stretches(seq, content.stretches.iter().copied(), frames, sink)
    }

    /// The same, of some stretches of a file.
    ///
    /// # Errors
    /// As [`Chain::contents`].
    pub fn stretches(
        &self,
        seq: u64,
        stretches: impl Iterator<Item = Stretch>,
        frames: &mut FrameCache,
        sink: &mut dyn FnMut(u64, &[u8]) -> Result<()>,
    ) -> Result<()> {
        for stretch in stretches {
            let from = &self.checkpoints[self.index(seq - stretch.back)];
            let mut done = 0;
            while done < stretch.length {
                let at = stretch.data + done;
                let Some((number, begins)) = from.frame_of(at) else {
                    return Err(from.damaged("a stretch lies outside its data"));
                };
                let bytes = frames.get(from, number)?;
                let within = usize::try_from(at - begins).unwrap_or(usize::MAX);
                let left = usize::try_from(stretch.length - done).unwrap_or(usize::MAX);
                let piece = &bytes[within..];
                let piece = &piece[..piece.len().min(left)];
                sink(stretch.offset + done, piece)?;
                done += piece.len() as u64;
            }
        }
        Ok(())
    }

    /// Where checkpoint `seq`, which the chain has, is in it.
    fn index(&self, seq: u64) -> usize {
        // The numbers are contiguous: checked when the chain was put together.
        usize::try_from(seq - self.checkpoints[0].header.sequence).unwrap_or(usize::MAX)
    }
}

/// The frames that one thread read last: a file's changed pages lie between those of an earlier checkpoint.
#[derive(Debug, Default)]
pub struct FrameCache {
    /// The last ones, the newest first, each with its checkpoint and number.
    frames: VecDeque<(u64, usize, Vec<u8>)>,
    unpacker: Unpacker,
}

impl FrameCache {
    const MAX: usize = 4;

    fn get(&mut self, checkpoint: &Checkpoint, number: usize) -> Result<&[u8]> {
        let key = (checkpoint.header.sequence, number);
        let found = self.frames.iter().position(|(seq, number, _)| (*seq, *number) == key);
        if let Some(entry) = found.and_then(|at| self.frames.remove(at)) {
            self.frames.push_front(entry);
        } else {
            let oldest = if self.frames.len() < Self::MAX { None } else { self.frames.pop_back() };
            let mut data = oldest.map(|(_, _, data)| data).unwrap_or_default();
            checkpoint.read_frame(number, &mut self.unpacker, &mut data)?;
            self.frames.push_front((key.0, key.1, data));
        }
        Ok(&self.frames[0].2)
    }
}

/// Whether `after` is the delta that comes next after `before`.
#[must_use]
pub fn follows(before: &Checkpoint, after: &Checkpoint) -> bool {
    after.header.relation == Relation::Delta { predecessor: before.digest }
        && after.header.sequence == before.header.sequence + 1
        && after.header.seed == before.header.seed
        && after.header.token == before.header.token
}
