//! Makes a net state true: removals, then objects from above, then directories from below. The files of a directory are
//! made by several threads; nothing depends on their order but hard links, which come after what they lead to.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::os::fd::{AsFd, BorrowedFd};

use ephemeral_overlay::error::At;
use rayon::prelude::*;
use rustix::fs::{Advice, fadvise};

use super::writeback::Portions;
use super::{Shape, extras, is_unchanged};
use crate::chain::{Chain, FrameCache, Recorded};
use crate::entry::{Node, State};
use crate::error::Result;
use crate::existing::Existing;
use crate::path::RelPath;
use crate::per_thread::PerThread;
use crate::place::{Contents, Place};
use crate::progress::Progress;
use crate::tree::Tree;

/// A file of at least this length is changed in place, if lower has it.
const IN_PLACE: u64 = 1 << 20;

/// What lower's file system cannot hold, with what it said.
pub(super) type Left = BTreeMap<RelPath, String>;

/// Makes a net state true.
pub(super) struct Apply<'a> {
    pub(super) shape: &'a Shape<'a>,
    pub(super) chain: &'a Chain,
    pub(super) place: &'a Place<'a>,
    pub(super) lower: &'a Tree,
    pub(super) seed: u64,
    pub(super) only_metadata: &'a BTreeSet<RelPath>,
    /// A cut may have left something unfinished.
    pub(super) redo: bool,
    pub(super) progress: &'a Progress,
    pub(super) portions: &'a Portions,
}

impl Apply<'_> {
    pub(super) fn run(&self) -> Result<Left> {
        for (path, recorded) in &self.shape.net.entries {
            if recorded.state == State::Deleted {
                self.place.remove(path)?;
            }
        }
        let mut left = Left::new();
        // Those that were not there: nothing is in them.
        let mut new = HashSet::new();
        for (path, _) in self.directories() {
            self.progress.step();
            let done = self.directory(path).map(|is_new| new.extend(is_new.then_some(path)));
            left.extend(self.place.unless_impossible(path, done)?);
        }
        let Shape { leaders, parts, .. } = self.shape;
        let frames = PerThread::<FrameCache>::new();
        let made = parts.par_iter().with_max_len(1).enumerate().map(|(number, (parent, files))| {
            let files = files.iter().filter(|(path, _)| leaders.get(*path).is_none_or(|leader| leader == path));
            let is_new = new.contains(*parent);
            frames.with(|frames| self.files(&self.place.part(number), parent, is_new, files.copied(), frames))
        });
        left.extend(made.collect::<Result<Vec<_>>>()?.into_iter().flatten());
        for (path, leader) in leaders.iter().filter(|(path, leader)| path != leader) {
            let done = match left.get(*leader) {
                None => self.place.unless_impossible(path, self.place.link(leader, path))?,
                Some(why) => Some(((*path).clone(), why.clone())),
            };
            left.extend(done);
        }
        // Below first: making or removing a name changes the times of its directory.
        for (path, node) in self.directories().rev().filter(|(path, _)| !self.only_metadata.contains(*path)) {
            let done = self.place.finish_dir(path, &node.meta, node.is_opaque());
            left.extend(self.place.unless_impossible(path, done)?);
        }
        Ok(left)
    }

    fn directories(&self) -> impl DoubleEndedIterator<Item = (&RelPath, &Node)> {
        let nodes = self.shape.net.entries.iter().filter_map(|(path, recorded)| Some((path, recorded.state.node()?)));
        nodes.filter(|(_, node)| node.is_dir())
    }

    /// Makes a directory, with nothing in it that must not be; whether it was not there.
    fn directory(&self, path: &RelPath) -> Result<bool> {
        if !path.is_root() && self.place.make_dir(path)? {
            return Ok(true);
        }
        if self.redo {
            self.place.sweep(path)?;
        }
        if self.shape.hidden.contains(path) {
            extras(self.shape.net, self.lower, path)?.iter().try_for_each(|extra| self.place.remove(extra))?;
        }
        Ok(false)
    }

    /// Makes files of one directory, which is empty where it `is_new`.
    fn files<'e>(
        &self,
        place: &Place,
        parent: &RelPath,
        is_new: bool,
        files: impl Iterator<Item = (&'e RelPath, &'e Recorded)>,
        frames: &mut FrameCache,
    ) -> Result<Left> {
        let mut left = Left::new();
        let mut dir = None;
        for (path, Recorded { state, seq }) in files {
            let Some(node) = state.node() else { continue };
            let dir = match &dir {
                Some(dir) => dir,
                None => dir.insert(self.lower.open_dir(parent)?),
            };
            self.progress.step();
            let mut contents = |_: &RelPath, content: &_, sink: &mut dyn FnMut(u64, &[u8]) -> Result<()>| {
                self.chain.contents(*seq, content, frames, &mut |at, bytes| {
                    self.progress.step();
                    self.portions.look(place.written());
                    sink(at, bytes)
                })
            };
            let done = if is_new {
                place.put_new(dir.as_fd(), path, node, &mut contents)
            } else {
                self.file(place, dir.as_fd(), path, node, &mut contents)
            };
            left.extend(place.unless_impossible(path, done)?);
        }
        Ok(left)
    }

    fn file(
        &self,
        place: &Place,
        dir: BorrowedFd<'_>,
        path: &RelPath,
        node: &Node,
        contents: &mut Contents,
    ) -> Result<()> {
        let Some(existing) = Existing::at(self.lower, dir, path)? else {
            return place.put_new(dir, path, node, contents);
        };
        if let (true, Some(file)) = (self.redo, &existing.file) {
            // What a disk failed to take stays in the page cache as if it had: only what comes from the disk counts.
            fadvise(file, 0, None, Advice::DontNeed).at("fadvise64", self.lower.show(path))?;
        }
        let is_linked = self.shape.leaders.contains_key(path);
        if let (Some(content), Some(file), false) = (node.content(), &existing.file, is_linked) {
            if is_unchanged(&existing, node, self.seed)? {
                return place.finish_file(file, &node.meta, dir, path);
            }
            // A file that has other names keeps its content under those.
            if content.size >= IN_PLACE && existing.stat.st_nlink == 1 {
                return place.update(file, node, dir, path, contents);
            }
        }
        place.put_in(dir, path, node, contents)
    }
}
