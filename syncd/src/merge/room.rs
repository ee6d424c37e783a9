//! The room that a merge takes, asked for before anything is written.

use ephemeral_overlay::error::At;
use rustix::fs::fstatvfs;

use super::is_unchanged;
use crate::chain::Net;
use crate::entry::{Kind, Node, State};
use crate::error::{Error, Result};
use crate::path::RelPath;
use crate::scan::{Stamp, View, scan_below};
use crate::store::TargetStore;
use crate::tree::Tree;

/// Refuses a merge for which lower has no room, before anything is written. Removals come first; then new content stands
/// beside the old one until it is renamed over it, so the peak counts.
pub(super) fn reserve(net: &Net, lower: &Tree, seed: u64, store: &TargetStore) -> Result<()> {
    let stat = fstatvfs(lower.root()).at("fstatvfs", lower.path())?;
    let block = stat.f_frsize.max(1);
    let free = stat.f_bfree.saturating_mul(block);
    let mut need = room(net, lower, block, &|_, _| Ok(false))?;
    if need > free {
        // Only now is it worth reading what only changed its metadata.
        need = room(net, lower, block, &|path, node| is_unchanged(lower, path, node, seed))?;
    }
    let created = net.entries.iter().filter(|(_, recorded)| recorded.state.node().is_some()).map(|(path, _)| path);
    let inodes = created.map(|path| Ok(u64::from(lower.stat(path)?.is_none()))).sum::<Result<u64>>()?;
    // Some file systems make inodes as they go, and count none.
    let no_inodes = stat.f_files > 0 && inodes > stat.f_ffree;
    if need > free || no_inodes {
        return Err(Error::NoRoom { target: store.target().to_path_buf(), need, free, inodes });
    }
    Ok(())
}

/// The most bytes that are needed at any moment of a merge, beyond what is free now.
fn room(net: &Net, lower: &Tree, block: u64, is_unchanged: &dyn Fn(&RelPath, &Node) -> Result<bool>) -> Result<u64> {
    let round = |bytes: u64| i128::from(bytes.div_ceil(block)) * i128::from(block);
    let mut used: i128 = 0;
    for (path, _) in net.entries.iter().filter(|(_, recorded)| recorded.state == State::Deleted) {
        let freed = scan_below(lower, View::Plain, path)?;
        used -= freed.iter().filter(|found| found.stamp.nlink == 1).map(|found| found.stamp.allocated()).sum::<i128>();
    }
    let mut peak = used;
    for (path, recorded) in &net.entries {
        let Some(node) = recorded.state.node() else { continue };
        let old = lower.stat(path)?.map(|stat| Stamp::of(&stat));
        let new = match &node.kind {
            Kind::File(_) if is_unchanged(path, node)? => continue,
            Kind::File(content) => content.stretches.iter().map(|stretch| round(stretch.length)).sum(),
            Kind::Dir { .. } if old.is_none() => round(1),
            _ => 0,
        };
        peak = peak.max(used + new);
        let freed = old.filter(|old| old.nlink == 1 && !node.is_dir()).map_or(0, |old| old.allocated());
        used += new - freed;
    }
    Ok(u64::try_from(peak.max(used).max(0)).unwrap_or(u64::MAX))
}
