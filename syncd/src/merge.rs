//! Merges a chain into lower: a replay that can be cut at any instruction and started again.
//!
//! verify all → compose → conflicts → reserve → mark → apply → syncfs → compare → new token → forget the chain. Up to
//! the mark lower is only read. From the mark on every step makes something true that it may find true already, and
//! nothing in the store is removed before lower has been synced and compared.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs::File;
use std::os::fd::AsFd;
use std::path::PathBuf;

use ephemeral_overlay::attributes::Handle;
use ephemeral_overlay::error::{At, SystemError};
use ephemeral_overlay::token::Token;
use rayon::prelude::*;
use rustix::fs::{Advice, FileType, fadvise, fstat, fstatvfs, syncfs};
use rustix::io::Errno;

use crate::chain::{Chain, Net, Recorded};
use crate::conflict::{self, Winner, has_kind_and_content};
use crate::entry::{Kind, Meta, Node, State};
use crate::error::{Error, Result};
use crate::path::RelPath;
use crate::place::{Into, Place, temporary_name};
use crate::progress::Progress;
use crate::scan::{self, Stamp, View, scan_below};
use crate::store::{Marker, TargetStore};
use crate::tree::{Tree, list};

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
    /// Objects that lower's file system cannot hold, with what it said.
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
    let root = Handle::of(lower.root());
    let token = Token::read(&root, lower.path())?;
    if let Some(marker) = marker.as_ref().filter(|marker| token == Some(marker.next_token)) {
        // Lower has everything; a cut came before the cleaning up.
        store.end_merge(marker.last)?;
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
    } else {
        stats.conflicts = conflict::find(&net, lower, seed)?;
        if !stats.conflicts.is_empty() {
            conflict::save(store, &stats.conflicts, options.winner, &net, &mut chain, lower)?;
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
    let mut apply = Apply {
        net: &net,
        chain: &mut chain,
        place: &place,
        lower,
        seed,
        only_metadata: &only_metadata,
        hidden: net.hidden_directories(),
        left: BTreeMap::new(),
        progress,
    };
    apply.run()?;
    let left = apply.left;
    syncfs(lower.root()).at("syncfs", lower.path())?;
    verify(&net, lower, seed, &|path| only_metadata.contains(path), &|path| left.contains_key(path), progress)?;
    for (path, recorded) in net.entries.iter().filter(|(path, _)| !left.contains_key(path)) {
        if let Some(node) = recorded.state.node() {
            place.protect(path, &node.meta)?;
        }
    }
    if !left.is_empty() {
        // Before lower says that it has everything: the chain is the only place that does.
        stats.set_aside = store.set_aside_before(last + 1)?;
        stats.left = left.into_iter().collect();
    }
    next.next_token.write(&root, lower.path())?;
    syncfs(lower.root()).at("syncfs", lower.path())?;

    stats.checkpoints = chain.checkpoints().len();
    stats.paths = net.entries.len();
    store.end_merge(last)?;
    Ok(Some(stats))
}

/// Refuses a merge for which lower has no room, before anything is written. Removals come first; then new content stands
/// beside the old one until it is renamed over it, so the peak counts.
fn reserve(net: &Net, lower: &Tree, seed: u64, store: &TargetStore) -> Result<()> {
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

/// Makes `net` true.
struct Apply<'a> {
    net: &'a Net,
    chain: &'a mut Chain,
    place: &'a Place<'a>,
    lower: &'a Tree,
    seed: u64,
    only_metadata: &'a BTreeSet<RelPath>,
    /// The directories of which nothing of lower shows through.
    hidden: HashSet<&'a RelPath>,
    /// What lower's file system cannot hold, with what it said.
    left: BTreeMap<RelPath, String>,
    progress: &'a Progress,
}

impl Apply<'_> {
    fn run(&mut self) -> Result<()> {
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

/// Whether only metadata differs, so that nothing has to be written. A file with several names is always made anew:
/// upper broke it off from the others.
fn is_unchanged(lower: &Tree, path: &RelPath, node: &Node, seed: u64) -> Result<bool> {
    let Some(content) = node.content() else { return Ok(false) };
    let Some(stat) = lower.stat(path)? else { return Ok(false) };
    Ok(stat.st_nlink == 1
        && FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile
        && u64::try_from(stat.st_size) == Ok(content.size)
        && has_kind_and_content(lower, path, node, seed)?)
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

/// The first member of the link group that a path belongs to.
fn leaders(net: &Net) -> BTreeMap<&RelPath, &RelPath> {
    let groups = net.groups();
    groups
        .into_values()
        .flat_map(|members| members.clone().into_iter().map(move |member| (member, members[0])))
        .collect()
}

/// What lower has in the directory at `path`, of which nothing shows through, and upper does not.
fn extras(net: &Net, lower: &Tree, path: &RelPath) -> Result<Vec<RelPath>> {
    let dir = lower.open_dir(path)?;
    let names = list(dir.as_fd(), &lower.show(path))?;
    let is_extra = |child: &RelPath| net.entries.get(child).is_none_or(|recorded| recorded.state.node().is_none());
    Ok(names.iter().map(|name| path.child(name)).filter(is_extra).collect())
}

/// Reads back what was written, from the disk, and compares.
fn verify(
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

/// Unpacks the net state of a chain that could not be merged into an upper directory that is not mounted yet. It
/// masks every path that the merge touches, so the view is exact although lower may be half merged. The chain and
/// the mark stay.
///
/// # Errors
/// Anything that goes wrong; upper is then of no use.
pub fn unpack(store: &TargetStore, lower: &Tree, upper: &Tree, progress: &Progress) -> Result<()> {
    let marker = store.marker()?;
    let token = Token::read(&Handle::of(lower.root()), lower.path())?;
    if marker.as_ref().is_some_and(|marker| token == Some(marker.next_token)) {
        // Lower has everything; only the cleaning up could not be done.
        return Ok(());
    }
    let Some(mut chain) = store.chain()? else { return Ok(()) };
    if chain.token() != token {
        return Err(Error::Foreign { target: store.target().to_path_buf() });
    }
    chain.verify(progress)?;
    let mut net = chain.compose()?;
    let left_alone = match &marker {
        Some(marker) if chain.range().0 <= marker.last => marker.left_alone.clone(),
        // Lower is untouched, and newer.
        None if store.booted_from_disk() => conflict::find(&net, lower, chain.seed())?,
        _ => Vec::new(),
    };
    let only_metadata = conflict::leave_alone(&mut net, &left_alone, lower)?;
    let place = Place::new(upper, Into::Upper, Token::random().at("getrandom", upper.path())?);
    let leaders = leaders(&net);
    for (path, Recorded { state, seq }) in &net.entries {
        progress.step();
        match (state.node(), leaders.get(path)) {
            (None, _) => place.whiteout(path)?,
            (Some(node), _) if node.is_dir() && path.is_root() => {}
            (Some(node), _) if node.is_dir() => place.make_dir(path)?,
            (Some(_), Some(leader)) if *leader != path => place.link(leader, path)?,
            (Some(node), _) => place.put(path, node, &mut |_, content, sink| chain.contents(*seq, content, sink))?,
        }
    }
    for (path, recorded) in net.entries.iter().rev() {
        let Some(node) = recorded.state.node().filter(|node| node.is_dir()) else { continue };
        if let Some(marker) = &marker {
            mask_temporary(lower, &place, path, node, marker.next_token)?;
        }
        if only_metadata.contains(path) {
            place.finish_dir(path, &meta_of(lower, path)?, false)?;
        } else {
            place.finish_dir(path, &node.meta, node.is_opaque())?;
        }
    }
    Ok(())
}

/// The metadata of a directory of lower.
fn meta_of(lower: &Tree, path: &RelPath) -> Result<Meta> {
    let shown = lower.show(path);
    let dir = lower.open_dir(path)?;
    let raw = Handle::of(dir.as_fd()).read_all().at("listxattr", &shown)?;
    Ok(scan::meta(&fstat(&dir).at("fstat", &shown)?, raw, View::Plain, &shown)?.0)
}

/// Hides the temporary file that a cut left in a directory of lower.
fn mask_temporary(lower: &Tree, place: &Place, path: &RelPath, node: &Node, token: Token) -> Result<()> {
    let name = path.child(&temporary_name(token));
    if node.is_opaque() || lower.stat(&name)?.is_none() { Ok(()) } else { place.whiteout(&name) }
}
