//! Makes a net state true: removals, then objects from above, then directories from below.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use ephemeral_overlay::error::{At, SystemError};
use rustix::fs::fstatvfs;
use rustix::io::Errno;

use super::{extras, is_unchanged, leaders};
use crate::chain::{Chain, Net, Recorded};
use crate::entry::{Node, State};
use crate::error::{Error, Result};
use crate::path::RelPath;
use crate::place::Place;
use crate::progress::Progress;
use crate::tree::Tree;

/// Makes `net` true.
pub(super) struct Apply<'a> {
    pub(super) net: &'a Net,
    pub(super) chain: &'a mut Chain,
    pub(super) place: &'a Place<'a>,
    pub(super) lower: &'a Tree,
    pub(super) seed: u64,
    pub(super) only_metadata: &'a BTreeSet<RelPath>,
    /// The directories of which nothing of lower shows through.
    pub(super) hidden: HashSet<&'a RelPath>,
    /// What lower's file system cannot hold, with what it said.
    pub(super) left: BTreeMap<RelPath, String>,
    pub(super) progress: &'a Progress,
}

impl Apply<'_> {
    pub(super) fn run(&mut self) -> Result<()> {
        for (path, recorded) in &self.net.entries {
            if recorded.state == State::Deleted {
                self.place.remove(path)?;
            }
        }
        let leaders = leaders(self.net);
        for (path, Recorded { state, seq }) in &self.net.entries {
            let Some(node) = state.node() else { continue };
            self.progress.step();
            let done = match leaders.get(path) {
                _ if node.is_dir() => self.directory(path),
                Some(leader) if *leader != path => match self.left.get(*leader) {
                    None => self.place.link(leader, path),
                    Some(why) => {
                        let why = why.clone();
                        self.left.insert(path.clone(), why);
                        continue;
                    }
                },
                None if is_unchanged(self.lower, path, node, self.seed)? => self.place.finish_file(path, &node.meta),
                _ => self.put(path, node, *seq),
            };
            self.unless_impossible(path, done)?;
        }
        // Below first: making or removing a name changes the times of its directory.
        for (path, recorded) in self.net.entries.iter().rev() {
            let node = recorded.state.node().filter(|node| node.is_dir() && !self.only_metadata.contains(path));
            if let Some(node) = node {
                let done = self.place.finish_dir(path, &node.meta, node.is_opaque());
                self.unless_impossible(path, done)?;
            }
        }
        Ok(())
    }

    fn put(&mut self, path: &RelPath, node: &Node, seq: u64) -> Result<()> {
        let (chain, progress) = (&mut *self.chain, self.progress);
        self.place.put(path, node, &mut |_, content, sink| {
            chain.contents(seq, content, &mut |at, bytes| {
                progress.step();
                sink(at, bytes)
            })
        })
    }

    /// What a tmpfs can hold and this file system cannot is left, and must not keep all the rest from being merged:
    /// anybody who may write to a directory of a target can make such an object.
    fn unless_impossible(&mut self, path: &RelPath, done: Result<()>) -> Result<()> {
        match done {
            Err(Error::System(error)) if is_impossible(&error, self.lower)? => {
                self.left.insert(path.clone(), format!("{}: {}", error.call, error.source));
                Ok(())
            }
            other => other,
        }
    }

    fn directory(&self, path: &RelPath) -> Result<()> {
        if !path.is_root() {
            self.place.make_dir(path)?;
        }
        self.place.sweep(path)?;
        if self.hidden.contains(path) {
            extras(self.net, self.lower, path)?.iter().try_for_each(|extra| self.place.remove(extra))?;
        }
        Ok(())
    }
}

/// Whether an error is about this one object: too long a name or link, too large a file or attribute, too many links.
fn is_impossible(error: &SystemError, lower: &Tree) -> Result<bool> {
    Ok(match error.errno() {
        Some(Errno::NAMETOOLONG | Errno::FBIG | Errno::MLINK | Errno::TOOBIG | Errno::RANGE) => true,
        Some(Errno::NOTSUP) => error.call == "setxattr",
        // ext4 says so of an attribute that does not fit beside the others, with all the room of the disk left.
        Some(Errno::NOSPC | Errno::DQUOT) if error.call == "setxattr" => {
            fstatvfs(lower.root()).at("fstatvfs", lower.path())?.f_bavail > 0
        }
        _ => false,
    })
}
