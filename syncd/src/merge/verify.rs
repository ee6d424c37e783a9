//! Compares what a merge made with what it should have made. That it is on the disk is what syncfs(2) said: the files
//! are not read from there once more, which would take a slow disk as long as the merge itself.

use std::collections::BTreeSet;
use std::os::fd::AsFd;

use rayon::prelude::*;

use super::apply::Left;
use super::{Shape, extras};
use crate::chain::Recorded;
use crate::entry::Node;
use crate::error::{Error, Result};
use crate::existing::Existing;
use crate::path::RelPath;
use crate::progress::Progress;
use crate::tree::{Tree, is_nothing};

/// Compares what was made.
pub(super) struct Verify<'a> {
    pub(super) shape: &'a Shape<'a>,
    pub(super) lower: &'a Tree,
    pub(super) seed: u64,
    pub(super) only_metadata: &'a BTreeSet<RelPath>,
    /// What lower cannot hold.
    pub(super) left: &'a Left,
    pub(super) progress: &'a Progress,
}

impl Verify<'_> {
    pub(super) fn run(&self) -> Result<()> {
        let Shape { net, hidden, leaders, parts } = self.shape;
        let is_left = |path: &RelPath| self.left.contains_key(path);
        let directories: Vec<_> =
            net.entries.iter().filter(|(_, recorded)| recorded.state.node().is_some_and(Node::is_dir)).collect();
        directories.par_iter().try_for_each(|(path, recorded)| {
            if !is_left(path) {
                let parent = self.lower.open_parent(path)?;
                self.one(Existing::at(self.lower, parent.as_fd(), path)?, path, recorded, None)?;
            }
            if hidden.contains(path) && !extras(net, self.lower, path)?.is_empty() {
                return self.mismatch(path, "names that should be gone");
            }
            Ok(())
        })?;
        parts.par_iter().with_max_len(1).try_for_each(|(parent, all)| {
            let dir = match self.lower.open_dir(parent) {
                // What was deleted with its directory is gone.
                Err(error) if is_nothing(error.errno()) => None,
                other => Some(other?),
            };
            all.iter().filter(|(path, _)| !is_left(path)).try_for_each(|(path, recorded)| {
                let is_file = recorded.state.node().is_some_and(|node| node.content().is_some());
                let look = if is_file { Existing::file_at } else { Existing::at };
                let existing = match &dir {
                    Some(dir) => look(self.lower, dir.as_fd(), path)?,
                    None => None,
                };
                self.one(existing, path, recorded, leaders.get(*path).copied())
            })
        })
    }

    fn one(
        &self,
        existing: Option<Existing>,
        path: &RelPath,
        recorded: &Recorded,
        leader: Option<&RelPath>,
    ) -> Result<()> {
        self.progress.step();
        let (existing, node) = match (existing, recorded.state.node()) {
            (None, None) => return Ok(()),
            (Some(_), None) => return self.mismatch(path, "it should be gone"),
            (None, Some(_)) => return self.mismatch(path, "it is missing"),
            (Some(existing), Some(node)) => (existing, node),
        };
        let stat = &existing.stat;
        if !existing.has_kind_and_content(node, self.seed)? {
            return self.mismatch(path, "kind or contents");
        }
        if self.only_metadata.contains(path) {
            return Ok(());
        }
        if (stat.st_uid, stat.st_gid) != (node.meta.uid, node.meta.gid) {
            return self.mismatch(path, "owner");
        }
        if !node.has_permissions(stat.st_mode) {
            return self.mismatch(path, "mode");
        }
        match leader {
            Some(leader) if self.lower.stat(leader)?.map(|stat| stat.st_ino) != Some(stat.st_ino) => {
                self.mismatch(path, "link group")
            }
            _ => Ok(()),
        }
    }

    fn mismatch(&self, path: &RelPath, what: &'static str) -> Result<()> {
        Err(Error::Mismatch { path: self.lower.show(path).to_path_buf(), what })
    }
}
