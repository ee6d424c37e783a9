//! Merges a chain into lower: a replay that can be cut at any instruction and started again.
//!
//! verify all → compose → conflicts → reserve → mark → apply → syncfs, compare → new token → forget the chain. Up to
//! the mark lower is only read. From the mark on every step makes something true that it may find true already, and
//! nothing in the store is removed before lower has been synced and compared.

mod apply;
mod room;
mod unpack;
mod verify;
mod writeback;

use std::collections::{BTreeMap, HashSet};
use std::os::fd::AsFd;
use std::path::PathBuf;

use apply::Apply;
use ephemeral_overlay::attributes::Handle;
use ephemeral_overlay::error::At;
use ephemeral_overlay::token::Token;
use room::reserve;
use rustix::fs::{fsync, syncfs};
pub use unpack::{hide_unfinished, unpack};
use verify::Verify;

use crate::chain::{Net, Recorded};
use crate::conflict::{self, Winner};
use crate::entry::Node;
use crate::error::Result;
use crate::existing::Existing;
use crate::path::RelPath;
use crate::place::{Into, Place};
use crate::progress::Progress;
use crate::store::{Marker, TargetStore};
use crate::tree::{Tree, list};
use crate::written::boot_id;

/// How a chain is merged.
#[derive(Debug, Clone, Copy)]
pub struct MergeOptions {
    /// Whose version stays where both changed a path.
    pub winner: Winner,
    /// Apply what stands before a damaged checkpoint, and set the rest aside.
    pub accept_prefix: bool,
}

/// What a merge came to.
#[derive(Debug, Clone, Default)]
pub struct MergeStats {
    /// How many checkpoints were merged.
    pub checkpoints: usize,
    /// How many paths were made as they are in RAM.
    pub paths: usize,
    /// Paths that were changed on disk and in RAM.
    pub conflicts: Vec<RelPath>,
    /// The chain, or its damaged rest, was moved here.
    pub set_aside: Option<PathBuf>,
    /// Objects that lower's file system cannot hold, or, of those that lost, the store's, with what it said.
    pub left: Vec<(RelPath, String)>,
    /// An earlier merge had begun with checkpoints that are set aside now: what they alone held stays where it got to.
    pub mixed: bool,
}

impl MergeStats {
    /// Whether everything was merged and nothing was in conflict.
    #[must_use]
    pub fn is_exact(&self) -> bool {
        self.conflicts.is_empty() && self.set_aside.is_none() && self.left.is_empty() && !self.mixed
    }
}

/// Merges the chain of `store` into `lower`; `None` when nothing is pending. The caller has locked the store and
/// proved that the target's overlay is dead.
///
/// # Errors
/// Anything that goes wrong. The chain is then still there, and the next call redoes the merge.
pub fn merge(
    store: &TargetStore,
    lower: &Tree,
    options: MergeOptions,
    progress: &Progress,
) -> Result<Option<MergeStats>> {
    let marker = store.marker()?;
    if marker.is_none() && store.sequences()?.is_empty() {
        return Ok(None);
    }
    let mut stats = MergeStats::default();
    store.prepare()?;
    let token = Token::read(&Handle::of(lower.root()), lower.path())?;
    if let Some(marker) = marker.as_ref().filter(|marker| token == Some(marker.next_token)) {
        // Lower has everything; a cut came before the cleaning up. Whether the token is on the disk nobody said.
        protect_root(store, lower, marker)?;
        syncfs(lower.root()).at("syncfs", lower.path())?;
        store.end_merge(marker.last, &store.written())?;
        return Ok(Some(stats));
    }
    let chain = if options.accept_prefix { store.valid_chain(progress)? } else { store.chain()? };
    let Some(mut chain) = chain else {
        stats.set_aside = Some(store.set_aside()?);
        return Ok(Some(stats));
    };
    if chain.token() != token {
        stats.set_aside = Some(store.set_aside()?);
        return Ok(Some(stats));
    }
    if !options.accept_prefix {
        chain.verify(progress)?;
    }
    let mut net = chain.compose()?;
    let (first, last) = chain.range();
    let seed = chain.seed();

    let mut next =
        Marker { first, last, next_token: Token::random().at("getrandom", lower.path())?, left_alone: Vec::new() };
    let redo = marker.is_some();
    if let Some(marker) = marker {
        // A redo meets its own changes: what was decided then holds.
        next.next_token = marker.next_token;
        stats.mixed = options.accept_prefix && marker.last > last && marker.last != u64::MAX;
        // A chain that was begun since has seen what was left alone.
        if first <= marker.last {
            next.left_alone = marker.left_alone;
        }
        if store.booted_from_disk()? {
            // What was half merged was used. What differs from both sides is somebody's work, and nowhere else.
            stats.conflicts = conflict::find(&net, lower, seed)?;
            stats.conflicts.retain(|path| !next.left_alone.contains(path));
            if !stats.conflicts.is_empty() {
                let place = store.more_conflicts(last)?;
                conflict::save(&place, store, &stats.conflicts, Winner::Ram, &net, &chain, lower)?;
            }
        }
    } else {
        stats.conflicts = conflict::find(&net, lower, seed)?;
        if !stats.conflicts.is_empty() {
            let place = store.conflicts(last);
            stats.left = conflict::save(&place, store, &stats.conflicts, options.winner, &net, &chain, lower)?;
            if !stats.left.is_empty() {
                // Before the mark: a redo saves nothing anew.
                stats.set_aside = store.keep_aside(last)?;
            }
            if options.winner == Winner::Disk {
                next.left_alone.clone_from(&stats.conflicts);
            }
        }
    }
    if options.accept_prefix {
        // Before the mark: from then on the chain has to be one that any redo can read.
        stats.set_aside = store.set_aside_after(last)?;
    }
    let only_metadata = conflict::leave_alone(&mut net, &next.left_alone, lower)?;
    if !redo {
        reserve(&net, lower, seed, store)?;
    }
    store.begin_merge(&next)?;

    let keep_user_xattrs = !chain.last().header.user_xattrs;
    let place = Place::new(lower, Into::Lower { keep_user_xattrs }, next.next_token);
    let shape = Shape::of(&net);
    let left = writeback::beside(lower, |portions| {
        let (shape, chain, place, only_metadata) = (&shape, &chain, &place, &only_metadata);
        Apply { shape, chain, place, lower, seed, only_metadata, redo, progress, portions }.run()
    })?;
    let stays = |path: &RelPath| left.contains_key(path) || only_metadata.contains(path);
    for (path, recorded) in net.entries.iter().filter(|(path, _)| !stays(path)) {
        if let Some(node) = recorded.state.node() {
            place.protect(path, node)?;
        }
    }
    settle(lower, &Verify { shape: &shape, lower, seed, only_metadata: &only_metadata, left: &left, progress })?;
    if !left.is_empty() {
        // Before lower says that it has everything: the chain is the only place that does.
        stats.set_aside = store.keep_aside(last)?;
        stats.left.extend(left);
    }
    place.write_token(next.next_token)?;
    fsync(lower.root()).at("fsync", lower.path())?;

    stats.checkpoints = chain.checkpoints().len();
    stats.paths = net.entries.len();
    let written = store.written_up_to(Some(chain.last())).seen_from(&boot_id()).and(place.written());
    store.end_merge(last, &written)?;
    Ok(Some(stats))
}

/// Has the disk take everything, and compares it with what it should be. The comparison reads what is in memory, and what
/// the disk did not take is an error of syncfs(2): neither waits for the other.
fn settle(lower: &Tree, verify: &Verify<'_>) -> Result<()> {
    let (synced, compared) = rayon::join(|| syncfs(lower.root()).at("syncfs", lower.path()), || verify.run());
    synced?;
    compared
}

/// Protects lower's root again: it cannot be while the token is written, and the cut may have come right after that.
fn protect_root(store: &TargetStore, lower: &Tree, marker: &Marker) -> Result<()> {
    let root = RelPath::root();
    // What is left of a chain of which some is removed already is of no use here.
    let Ok(Some(mut chain)) = store.chain() else { return Ok(()) };
    if chain.range().1 > marker.last || marker.left_alone.contains(&root) {
        return Ok(());
    }
    let place = Place::new(lower, Into::Lower { keep_user_xattrs: false }, marker.next_token);
    match chain.compose()?.entries.get(&root).and_then(|recorded| recorded.state.node()) {
        Some(node) => place.protect(&root, node),
        None => Ok(()),
    }
}

/// Whether only metadata differs, so that nothing has to be written. A file with several names is always made anew:
/// upper broke it off from the others.
fn is_unchanged(existing: &Existing, node: &Node, seed: u64) -> Result<bool> {
    Ok(existing.file.is_some() && existing.stat.st_nlink == 1 && existing.has_kind_and_content(node, seed)?)
}

/// How many files one thread takes at a time.
const PART: usize = 64;

/// Entries that stand in the same directory.
type Part<'a> = (&'a RelPath, Vec<(&'a RelPath, &'a Recorded)>);

/// A net state as it is made and compared: looked through once.
struct Shape<'a> {
    net: &'a Net,
    /// The directories of which nothing of lower shows through.
    hidden: HashSet<&'a RelPath>,
    /// Of what has several names, the first of them.
    leaders: BTreeMap<&'a RelPath, &'a RelPath>,
    /// The entries that are no directories, in parts.
    parts: Vec<Part<'a>>,
}

impl<'a> Shape<'a> {
    fn of(net: &'a Net) -> Self {
        Self { net, hidden: net.hidden_directories(), leaders: leaders(net), parts: parts(net) }
    }
}

/// The first member of the link group that a path belongs to.
fn leaders(net: &Net) -> BTreeMap<&RelPath, &RelPath> {
    let groups = net.groups().into_values();
    groups.flat_map(|members| members.clone().into_iter().map(move |member| (member, members[0]))).collect()
}

/// The parts of a state in which everything stands in a directory.
fn parts(net: &Net) -> Vec<Part<'_>> {
    let mut parts: Vec<Part> = Vec::new();
    // The directories above the path that is looked at, with what stands in them: a subtree is contiguous.
    let mut open: Vec<Part> = Vec::new();
    for (path, recorded) in &net.entries {
        while open.last().is_some_and(|(above, _)| !path.is_below(above)) {
            parts.extend(open.pop());
        }
        if recorded.state.node().is_some_and(Node::is_dir) {
            open.push((path, Vec::new()));
        } else if let Some((parent, all)) = open.last_mut() {
            all.push((path, recorded));
            if all.len() == PART {
                parts.push((*parent, std::mem::take(all)));
            }
        }
    }
    parts.extend(open);
    parts.retain(|(_, all)| !all.is_empty());
    parts
}

/// What lower has in the directory at `path`, of which nothing shows through, and upper does not.
fn extras(net: &Net, lower: &Tree, path: &RelPath) -> Result<Vec<RelPath>> {
    let dir = lower.open_dir(path)?;
    let names = list(dir.as_fd(), &lower.show(path))?;
    let is_extra = |child: &RelPath| net.entries.get(child).is_none_or(|recorded| recorded.state.node().is_none());
    Ok(names.iter().map(|name| path.child(name)).filter(is_extra).collect())
}
