//! Paths that somebody changed on disk since the chain began: who wins, and where the loser's version goes.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::os::fd::AsFd;
use std::path::Path;

use ephemeral_overlay::error::At;
use ephemeral_overlay::token::Token;
use rustix::fs::{AtFlags, FileType, makedev, statat};
use rustix::io::Errno;

use crate::base;
use crate::chain::{Chain, Net};
use crate::content::{self, NoSink, Sink};
use crate::durable;
use crate::entry::{Base, Content, Kind, Node, State};
use crate::error::{Error, Result};
use crate::path::RelPath;
use crate::place::{Into, Place};
use crate::scan::{Object, View, scan_below};
use crate::store::TargetStore;
use crate::tree::Tree;

/// The store is ours alone: nobody guesses names in it.
const COPIES: Token = Token(0);

/// Whose version stays where both changed a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Winner {
    /// The checkpoints: the system ran with its overlays.
    Ram,
    /// The disk: the system ran from it while the chain was pending.
    Disk,
}

/// The paths of `net` that lower has otherwise than when they were captured, and otherwise than `net` wants them.
///
/// # Errors
/// Whatever reading lower says.
pub fn find(net: &Net, lower: &Tree, seed: u64) -> Result<Vec<RelPath>> {
    let mut found: Vec<RelPath> = Vec::new();
    // A conflict that is about a whole object covers what is below it.
    let mut covered: Option<&RelPath> = None;
    for (path, recorded) in &net.entries {
        let Some(base) = net.bases.get(path) else { continue };
        if *base == Base::Unknown || covered.is_some_and(|above| path.is_below(above)) {
            continue;
        }
        let hides = !matches!(base, Base::Dir { .. });
        if base::capture(lower, path, hides, seed)? != *base && !is_as_wanted(lower, path, &recorded.state, seed)? {
            found.push(path.clone());
            if hides || lower.open_dir(path).is_err() {
                covered = Some(path);
            }
        }
    }
    Ok(found)
}

/// Whether lower has at `path` what a merge would make.
fn is_as_wanted(lower: &Tree, path: &RelPath, state: &State, seed: u64) -> Result<bool> {
    let stat = lower.stat(path)?;
    let (Some(stat), State::Present(node)) = (stat, state) else {
        return Ok(stat.is_none() && *state == State::Deleted);
    };
    Ok(!node.is_opaque()
        && stat.st_mode & 0o7777 == node.meta.mode
        && (stat.st_uid, stat.st_gid) == (node.meta.uid, node.meta.gid)
        && has_kind_and_content(lower, path, node, seed)?)
}

/// Whether lower has an object of this kind at `path`, with this content.
///
/// # Errors
/// Whatever reading lower says.
pub fn has_kind_and_content(lower: &Tree, path: &RelPath, node: &Node, seed: u64) -> Result<bool> {
    let parent = lower.open_parent(path)?;
    let name = if path.is_root() { ".".as_ref() } else { path.name() };
    let shown = lower.show(path);
    let stat = match statat(&parent, name, AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT) => return Ok(false),
        other => other.at("fstatat", &shown)?,
    };
    Ok(match (&node.kind, FileType::from_raw_mode(stat.st_mode)) {
        (Kind::Dir { .. }, FileType::Directory) | (Kind::Fifo, FileType::Fifo) | (Kind::Socket, FileType::Socket) => {
            true
        }
        (Kind::Symlink { target }, FileType::Symlink) => {
            *target == crate::tree::read_link(parent.as_fd(), name, &shown)?
        }
        (Kind::Device { block: true, major, minor }, FileType::BlockDevice)
        | (Kind::Device { block: false, major, minor }, FileType::CharacterDevice) => {
            stat.st_rdev == makedev(*major, *minor)
        }
        (Kind::File(content), FileType::RegularFile) => {
            u64::try_from(stat.st_size) == Ok(content.size) && {
                let file = lower.open_file(path)?;
                content::read(&file, seed, &mut Vec::new(), &shown, &mut NoSink)?.digest == content.digest
            }
        }
        _ => false,
    })
}

/// Puts the versions that lose into the store, durably, with a list for people.
///
/// # Errors
/// Any failing call; a redo begins anew.
pub fn save(
    store: &TargetStore,
    conflicts: &[RelPath],
    winner: Winner,
    net: &Net,
    chain: &mut Chain,
    lower: &Tree,
) -> Result<()> {
    let last = chain.range().1;
    let place = store.conflicts(last);
    let temporary = store.directory().join(durable::temporary_name("conflicts"));
    if temporary.exists() {
        fs::remove_dir_all(&temporary).at("unlink", &temporary)?;
    }
    durable::create_directory(&temporary)?;
    let copies = Tree::open(&temporary)?;
    let mut list = String::new();
    for path in conflicts {
        let kept = match winner {
            Winner::Ram => {
                copy_from_disk(lower, path, net, &copies)?;
                "kept what was in RAM"
            }
            Winner::Disk => {
                copy_from_chain(chain, path, net, &copies)?;
                "kept what was on disk"
            }
        };
        // Writing to a string cannot fail.
        let _done = writeln!(list, "{} changed on disk and in RAM: {kept}", path.below(store.target()).display());
    }
    durable::publish_directory(&temporary, &place)?;
    let name = format!("{last}.list");
    let parent = place.parent().unwrap_or(Path::new("/"));
    durable::write_file(parent, &name, |file| {
        use std::io::Write;
        Ok(file.write_all(list.as_bytes()).at("write", parent.join(&name))?)
    })
}

fn copy_from_disk(lower: &Tree, path: &RelPath, net: &Net, copies: &Tree) -> Result<()> {
    let shows_through = |path: &RelPath| net.bases.get(path).is_some_and(|base| matches!(base, Base::Dir { .. }));
    if shows_through(path) && lower.open_dir(path).is_ok() {
        // Only its owner or mode differs, and the list says so.
        return Ok(());
    }
    let place = Place::new(copies, Into::Copy, COPIES);
    make_parents(&place, path)?;
    let mut contents = |path: &RelPath, _: &Content, sink: &mut dyn FnMut(u64, &[u8]) -> Result<()>| {
        let file = lower.open_file(path)?;
        content::read(&file, 0, &mut Vec::new(), &lower.show(path), &mut Forward(sink)).map(drop)
    };
    let found = scan_below(lower, View::Plain, path)?;
    for found in &found {
        match &found.object {
            Object::Other(Kind::Dir { .. }, _) => place.make_dir(&found.path)?,
            Object::Other(kind, meta) => {
                place.put(&found.path, &Node { kind: kind.clone(), meta: meta.clone(), group: 0 }, &mut contents)?;
            }
            Object::File(meta) => {
                let content = Content {
                    size: found.stamp.size,
                    digest: crate::digest::Digest(0),
                    fuzzy: false,
                    stretches: Vec::new(),
                };
                place.put(
                    &found.path,
                    &Node { kind: Kind::File(content), meta: meta.clone(), group: 0 },
                    &mut contents,
                )?;
            }
            Object::Whiteout => {}
        }
    }
    for found in found.iter().rev() {
        if let Object::Other(Kind::Dir { .. }, meta) = &found.object {
            place.finish_dir(&found.path, meta, false)?;
        }
    }
    Ok(())
}

fn copy_from_chain(chain: &mut Chain, path: &RelPath, net: &Net, copies: &Tree) -> Result<()> {
    let place = Place::new(copies, Into::Copy, COPIES);
    make_parents(&place, path)?;
    let here = net.entries.iter().filter(|(at, _)| *at == path || at.is_below(path));
    let mut directories = Vec::new();
    for (at, recorded) in here {
        let Some(node) = recorded.state.node() else { continue };
        if node.is_dir() {
            place.make_dir(at)?;
            directories.push((at, &node.meta));
        } else {
            let seq = recorded.seq;
            place.put(at, node, &mut |_, content, sink| chain.contents(seq, content, sink))?;
        }
    }
    directories.into_iter().rev().try_for_each(|(at, meta)| place.finish_dir(at, meta, false))
}

fn make_parents(place: &Place, path: &RelPath) -> Result<()> {
    let above: Vec<_> = path.ancestors().filter(|above| !above.is_root()).collect();
    above.iter().rev().try_for_each(|above| place.make_dir(above))
}

/// Hands what is read on to a function.
struct Forward<'a>(&'a mut dyn FnMut(u64, &[u8]) -> Result<()>);

impl Sink for Forward<'_> {
    fn begin(&mut self) {}
    fn data(&mut self, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        (self.0)(offset, bytes)
    }
}

/// Takes out of `net` what must stay as it is on disk; returns the directories of which only the metadata stays.
///
/// # Errors
/// Whatever looking at lower says.
pub fn leave_alone(net: &mut Net, paths: &[RelPath], lower: &Tree) -> Result<BTreeSet<RelPath>> {
    let mut only_metadata = BTreeSet::new();
    for path in paths {
        let shows_through = net.bases.get(path).is_some_and(|base| matches!(base, Base::Dir { .. }));
        let is_dir = shows_through && lower.open_dir(path).is_ok();
        if is_dir {
            only_metadata.insert(path.clone());
        } else {
            net.entries.retain(|at, _| at != path && !at.is_below(path));
        }
    }
    Ok(only_metadata)
}
