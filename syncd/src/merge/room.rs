//! The room that a merge takes, asked for before anything is written.

use std::os::fd::AsFd;

use ephemeral_overlay::error::At;
use rayon::prelude::*;
use rustix::fs::fstatvfs;

use super::is_unchanged;
use crate::chain::Net;
use crate::entry::{Kind, Node, State};
use crate::error::{Error, Result};
use crate::existing::Existing;
use crate::path::RelPath;
use crate::scan::{Stamp, View, scan_below};
use crate::store::TargetStore;
use crate::tree::Tree;

/// Refuses a merge for which lower has no room, before anything is written. Removals come first; then new content stands
/// beside the old one until it is renamed over it, so the peak counts. What is changed in place takes less: that is not
/// counted, because not every file system can.
pub(super) fn reserve(net: &Net, lower: &Tree, seed: u64, store: &TargetStore) -> Result<()> {
    let stat = fstatvfs(lower.root()).at("fstatvfs", lower.path())?;
    let block = stat.f_frsize.max(1);
    let free = stat.f_bfree.saturating_mul(block);
    let present: Vec<_> =
        net.entries.iter().filter_map(|(path, recorded)| Some((path, recorded.state.node()?))).collect();
    let there = standing(&present, lower)?;
    let freed = removed(net, lower)?;
    let objects = || present.iter().copied().zip(there.iter().copied());
    let mut need = room(objects(), freed, block, &|_, _| Ok(false))?;
    if need > free {
        // Only now is it worth reading what only changed its metadata.
        need = room(objects(), freed, block, &|path, node| {
            let parent = lower.open_parent(path)?;
            match Existing::at(lower, parent.as_fd(), path)? {
                Some(existing) => is_unchanged(&existing, node, seed),
                None => Ok(false),
            }
        })?;
    }
    let inodes = there.iter().filter(|there| there.is_none()).count() as u64;
    // Some file systems make inodes as they go, and count none.
    let no_inodes = stat.f_files > 0 && inodes > stat.f_ffree;
    if need > free || no_inodes {
        return Err(Error::NoRoom { target: store.target().to_path_buf(), need, free, inodes });
    }
    Ok(())
}

/// What stands where the objects will be.
fn standing(present: &[(&RelPath, &Node)], lower: &Tree) -> Result<Vec<Option<Stamp>>> {
    let stat = |path| Ok(lower.stat(path)?.map(|stat| Stamp::of(&stat)));
    // Where there is no directory nothing is below, and a subtree is contiguous.
    let mut nothing: Option<&RelPath> = None;
    let mut is_known = Vec::with_capacity(present.len());
    for (path, node) in present {
        let is_below = nothing.is_some_and(|above| path.is_below(above));
        if !is_below && node.is_dir() && stat(path)?.is_none() {
            nothing = Some(path);
        }
        is_known.push(is_below);
    }
    let there = present.par_iter().zip(is_known);
    there.map(|((path, _), is_known)| if is_known { Ok(None) } else { stat(path) }).collect()
}

/// What the removals free.
fn removed(net: &Net, lower: &Tree) -> Result<i128> {
    let mut freed = 0;
    for (path, _) in net.entries.iter().filter(|(_, recorded)| recorded.state == State::Deleted) {
        let gone = scan_below(lower, View::Plain, path)?;
        freed += gone.iter().filter(|found| found.stamp.nlink == 1).map(|found| found.stamp.allocated()).sum::<i128>();
    }
    Ok(freed)
}

/// The most bytes that are needed at any moment of a merge, beyond what is free now. `objects` come with what stands
/// where they will be.
fn room<'a>(
    objects: impl Iterator<Item = ((&'a RelPath, &'a Node), Option<Stamp>)>,
    freed: i128,
    block: u64,
    is_unchanged: &dyn Fn(&RelPath, &Node) -> Result<bool>,
) -> Result<u64> {
    let round = |bytes: u64| i128::from(bytes.div_ceil(block)) * i128::from(block);
    let mut used = -freed;
    let mut peak = used;
    for ((path, node), old) in objects {
        let new = match &node.kind {
            Kind::File(_) if old.is_some() && is_unchanged(path, node)? => continue,
            Kind::File(content) => {
                let stretches: i128 = content.stretches.iter().map(|stretch| round(stretch.length)).sum();
                stretches.min(round(content.size))
            }
            Kind::Dir { .. } if old.is_none() => round(1),
            _ => 0,
        };
        peak = peak.max(used + new);
        let freed = old.filter(|old| old.nlink == 1 && !node.is_dir()).map_or(0, |old| old.allocated());
        used += new - freed;
    }
    Ok(u64::try_from(peak.max(used).max(0)).unwrap_or(u64::MAX))
}
