//! Reads back what a merge wrote.

use std::fs::File;

use rayon::prelude::*;
use rustix::fs::{Advice, FileType, fadvise};

use super::{extras, leaders};
use crate::chain::Net;
use crate::conflict::has_kind_and_content;
use crate::entry::Kind;
use crate::error::{Error, Result};
use crate::path::RelPath;
use crate::progress::Progress;
use crate::tree::Tree;

/// Reads back what was written, from the disk, and compares.
pub(super) fn verify(
    net: &Net,
    lower: &Tree,
    seed: u64,
    only_metadata: &(dyn Fn(&RelPath) -> bool + Sync),
    left: &(dyn Fn(&RelPath) -> bool + Sync),
    progress: &Progress,
) -> Result<()> {
    let (leaders, hidden) = (leaders(net), net.hidden_directories());
    net.entries.par_iter().filter(|(path, _)| !left(path)).try_for_each(|(path, recorded)| {
        progress.step();
        let mismatch = |what| Err(Error::Mismatch { path: lower.show(path), what });
        let (stat, node) = match (lower.stat(path)?, recorded.state.node()) {
            (None, None) => return Ok(()),
            (Some(_), None) => return mismatch("it should be gone"),
            (None, Some(_)) => return mismatch("it is missing"),
            (Some(stat), Some(node)) => (stat, node),
        };
        if node.content().is_some() && FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile {
            // Out of the page cache, so that the disk is asked. It is advice: the comparison is right without it.
            drop_from_cache(&lower.open_file(path)?);
        }
        if !has_kind_and_content(lower, path, node, seed)? {
            return mismatch("kind or contents");
        }
        if hidden.contains(path) && !extras(net, lower, path)?.is_empty() {
            return mismatch("names that should be gone");
        }
        if only_metadata(path) {
            return Ok(());
        }
        if (stat.st_uid, stat.st_gid) != (node.meta.uid, node.meta.gid) {
            return mismatch("owner");
        }
        if !matches!(node.kind, Kind::Symlink { .. }) && stat.st_mode & 0o7777 != node.meta.mode {
            return mismatch("mode");
        }
        match leaders.get(path) {
            Some(leader) if lower.stat(leader)?.map(|stat| stat.st_ino) != Some(stat.st_ino) => mismatch("link group"),
            _ => Ok(()),
        }
    })
}

fn drop_from_cache(file: &File) {
    let _advice = fadvise(file, 0, None, Advice::DontNeed);
}
