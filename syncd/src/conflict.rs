//! Paths that somebody changed on disk since the chain began: who wins, and where the loser's version goes.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use ephemeral_overlay::error::At;
use rayon::prelude::*;
use rustix::io::Errno;

use crate::base;
use crate::chain::{Chain, FrameCache, Net, Recorded};
use crate::copy;
use crate::durable;
use crate::entry::{Base, State};
use crate::error::Result;
use crate::existing::Existing;
use crate::path::RelPath;
use crate::place::Place;
use crate::scan::{View, scan_below};
use crate::store::TargetStore;
use crate::tree::{Tree, is_nothing};

/// Whose version stays where both changed a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Winner {
    /// The checkpoints: the system ran with its overlays.
    Ram,
    /// The disk: the system ran from it while the chain was pending.
    Disk,
}

/// The paths of `net` that lower has otherwise than when they were captured, and otherwise than `net` wants them. Below a
/// directory that hides all of lower's it is that directory: one can have it, or the other.
///
/// # Errors
/// Whatever reading lower says.
pub fn find(net: &Net, lower: &Tree, seed: u64) -> Result<Vec<RelPath>> {
    let with_base: Vec<_> = net.entries.iter().filter(|(path, _)| net.bases.contains_key(*path)).collect();
    let differs = |(path, recorded): &(&RelPath, &Recorded)| {
        let base = &net.bases[*path];
        let hides = !matches!(base, Base::Dir { .. });
        Ok(*base != Base::Unknown
            && base::capture(lower, path, hides, seed)? != *base
            && !is_as_wanted(lower, path, &recorded.state, seed)?)
    };
    let differing: Vec<bool> = with_base.par_iter().map(differs).collect::<Result<_>>()?;
    let hidden = net.hidden_directories();
    let mut found: Vec<RelPath> = Vec::new();
    // A conflict that is about a whole object covers what is below it.
    let mut covered: Option<&RelPath> = None;
    for ((path, _), _) in with_base.iter().zip(differing).filter(|(_, differs)| *differs) {
        if covered.is_some_and(|above| path.is_below(above)) {
            continue;
        }
        // Its base was the whole of what it hides, which differs then itself, unless it could not be read.
        let hides = path.ancestors().filter(|above| hidden.contains(above)).last();
        if let Some((hides, _)) = hides.and_then(|hides| net.entries.get_key_value(&hides)) {
            found.push(hides.clone());
            covered = Some(hides);
            continue;
        }
        found.push((*path).clone());
        if !matches!(net.bases[*path], Base::Dir { .. }) || !has_dir(lower, path)? {
            covered = Some(path);
        }
    }
    Ok(found)
}

/// Whether lower has a directory at `path`. That it cannot be read is no answer.
fn has_dir(lower: &Tree, path: &RelPath) -> Result<bool> {
    match lower.open_dir(path) {
        Ok(_) => Ok(true),
        Err(error) if is_nothing(error.errno()) || error.errno() == Some(Errno::XDEV) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Whether lower has at `path` what a merge would make.
fn is_as_wanted(lower: &Tree, path: &RelPath, state: &State, seed: u64) -> Result<bool> {
    let parent = match lower.open_parent(path) {
        Err(error) if is_nothing(error.errno()) => return Ok(*state == State::Deleted),
        other => other?,
    };
    match (Existing::at(lower, parent.as_fd(), path)?, state) {
        (None, state) => Ok(*state == State::Deleted),
        (Some(existing), State::Present(node)) => Ok(!node.is_opaque()
            && node.has_permissions(existing.stat.st_mode)
            && (existing.stat.st_uid, existing.stat.st_gid) == (node.meta.uid, node.meta.gid)
            && existing.has_kind_and_content(node, seed)?),
        _ => Ok(false),
    }
}

/// What the store's file system cannot hold, each with the reason.
pub type Left = Vec<(RelPath, String)>;

/// Puts the versions that lose into the directory `place` of the store, durably, with a list for people beside it. What
/// was there before is replaced. Returns what of a chain cannot be there: the chain itself has to be kept for it.
///
/// # Errors
/// Any failing call; a redo begins anew.
pub fn save(
    place: &Path,
    store: &TargetStore,
    conflicts: &[RelPath],
    winner: Winner,
    net: &Net,
    chain: &Chain,
    lower: &Tree,
) -> Result<Left> {
    let temporary = store.directory().join(durable::temporary_name("conflicts"));
    if durable::exists(&temporary)? {
        fs::remove_dir_all(&temporary).at("unlink", &temporary)?;
    }
    durable::create_directory(&temporary)?;
    let copies = Tree::open(&temporary)?;
    let (mut list, mut left) = (String::new(), Left::new());
    for path in conflicts {
        let kept = match winner {
            Winner::Ram => {
                copy_from_disk(lower, path, net, &copies)?;
                "kept what was in RAM"
            }
            Winner::Disk => {
                left.extend(copy_from_chain(chain, path, net, &copies)?);
                "kept what was on disk"
            }
        };
        // Writing to a string cannot fail.
        let _done = writeln!(list, "{} changed on disk and in RAM: {kept}", path.below(store.target()).display());
    }
    durable::publish_directory(&temporary, place)?;
    let path = list_of(place);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    durable::write_file(path.parent().unwrap_or(Path::new("/")), &name, |file| {
        use std::io::Write;
        Ok(file.write_all(list.as_bytes()).at("write", &path)?)
    })?;
    Ok(left)
}

/// The list for people that stands beside the directory `place`; it is written last.
#[must_use]
pub fn list_of(place: &Path) -> PathBuf {
    place.with_file_name(format!("{}.list", place.file_name().unwrap_or_default().display()))
}

fn copy_from_disk(lower: &Tree, path: &RelPath, net: &Net, copies: &Tree) -> Result<()> {
    let shows_through = |path: &RelPath| net.bases.get(path).is_some_and(|base| matches!(base, Base::Dir { .. }));
    if shows_through(path) && has_dir(lower, path)? {
        // Only its owner or mode differs, and the list says so.
        return Ok(());
    }
    let place = copy::place(copies);
    make_parents(&place, path)?;
    let found = scan_below(lower, View::Plain, path)?;
    copy::copy(lower, &found, &place, &mut |_, _| Ok(true), &mut |_| {})
}

fn copy_from_chain(chain: &Chain, path: &RelPath, net: &Net, copies: &Tree) -> Result<Left> {
    let place = copy::place(copies);
    make_parents(&place, path)?;
    let here = net.entries.iter().filter(|(at, _)| *at == path || at.is_below(path));
    let (mut directories, mut left) = (Vec::new(), Left::new());
    let mut frames = FrameCache::default();
    for (at, recorded) in here {
        let Some(node) = recorded.state.node() else { continue };
        if node.is_dir() {
            place.make_dir(at)?;
            directories.push((at, &node.meta));
        } else {
            let seq = recorded.seq;
            let put = place.put(at, node, &mut |_, content, sink| chain.contents(seq, content, &mut frames, sink));
            left.extend(place.unless_impossible(at, put)?);
        }
    }
    directories.into_iter().rev().try_for_each(|(at, meta)| place.finish_dir(at, meta, false))?;
    Ok(left)
}

fn make_parents(place: &Place, path: &RelPath) -> Result<()> {
    let above: Vec<_> = path.ancestors().filter(|above| !above.is_root()).collect();
    above.iter().rev().try_for_each(|above| place.make_dir(above).map(drop))
}

/// Takes out of `net` what must stay as it is on disk; returns the directories of which only the metadata stays.
///
/// # Errors
/// Whatever looking at lower says.
pub fn leave_alone(net: &mut Net, paths: &[RelPath], lower: &Tree) -> Result<BTreeSet<RelPath>> {
    let mut only_metadata = BTreeSet::new();
    for path in paths {
        let shows_through = net.bases.get(path).is_some_and(|base| matches!(base, Base::Dir { .. }));
        if shows_through && has_dir(lower, path)? {
            only_metadata.insert(path.clone());
        } else {
            net.entries.retain(|at, _| at != path && !at.is_below(path));
        }
    }
    Ok(only_metadata)
}
