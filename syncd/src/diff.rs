//! What changed in upper since the last checkpoint: a pure function of the recorded state and a scan.

use std::collections::{BTreeMap, BTreeSet};

use crate::chain::Net;
use crate::content::Read;
use crate::entry::{Kind, Meta, Node, State};
use crate::path::RelPath;
use crate::scan::{Found, Object};

/// What has to be recorded about a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Draft<'a> {
    /// This object, in this link group (0 for none).
    Present(&'a Found, u32),
    /// Lower's object is hidden.
    Deleted,
    /// Upper says nothing any more.
    AsLower,
}

/// What came of a file that was read because it had to be compared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Looked {
    /// It is what is recorded.
    Same,
    /// It changed, its metadata or its contents, which were these.
    Changed(Box<Read>),
}

impl Looked {
    /// Compares a file, as it was read, with what is recorded.
    #[must_use]
    pub fn of(recorded: &State, meta: &Meta, read: Read) -> Self {
        let is_same = recorded.node().is_some_and(|node| {
            node.meta == *meta && node.content().is_some_and(|content| content.digest == read.digest)
        });
        if is_same { Self::Same } else { Self::Changed(Box::new(read)) }
    }
}

/// A scan beside what is recorded, paired once: to compare many thousand paths costs more than what is done with each.
#[derive(Debug)]
pub struct Beside<'a> {
    net: &'a Net,
    scan: &'a [Found],
    /// What is recorded of each that was found.
    recorded: Vec<Option<&'a State>>,
    /// What is recorded and was not found.
    gone: Vec<(&'a RelPath, &'a State)>,
}

impl<'a> Beside<'a> {
    /// Pairs them: both are in path order.
    #[must_use]
    pub fn new(net: &'a Net, scan: &'a [Found]) -> Self {
        let mut gone = Vec::new();
        let mut entries = net.entries.iter().map(|(path, recorded)| (path, &recorded.state)).peekable();
        let mut of = |found: &Found| {
            loop {
                let (path, state) = *entries.peek()?;
                // Most are the same, which is sooner told than an order.
                if *path == found.path {
                    entries.next();
                    return Some(state);
                }
                if *path > found.path {
                    return None;
                }
                entries.next();
                gone.push((path, state));
            }
        };
        let recorded = scan.iter().map(&mut of).collect();
        gone.extend(entries);
        Self { net, scan, recorded, gone }
    }

    fn pairs(&self) -> impl Iterator<Item = (&'a Found, Option<&'a State>)> {
        self.scan.iter().zip(self.recorded.iter().copied())
    }

    /// The files whose contents have to be compared: recorded with the same length. All others changed for certain.
    #[must_use]
    pub fn to_hash(&self) -> Vec<(&'a Found, &'a State)> {
        let is_same_size = |found: &Found, state: &State| {
            found.object == Object::File
                && state.node().and_then(Node::content).is_some_and(|content| content.size == found.stamp.size)
        };
        let with_state = self.pairs().filter_map(|(found, state)| Some((found, state?)));
        with_state.filter(|(found, state)| is_same_size(found, state)).collect()
    }

    /// The changes, in path order. `looked` has those of [`Self::to_hash`], in path order too; paths in `held` and what is
    /// below them keep what is recorded.
    #[must_use]
    pub fn diff(&self, looked: &[(&'a Found, Looked)], held: &BTreeSet<RelPath>) -> Vec<(&'a RelPath, Draft<'a>)> {
        let is_below_held = |path: &RelPath| {
            !held.is_empty() && (held.contains(path) || path.ancestors().any(|above| held.contains(&above)))
        };
        let groups = Groups::of(self.net, self.scan);
        // A link group is recorded whole or not at all.
        let is_held = |path: &RelPath| {
            is_below_held(path)
                || !held.is_empty()
                    && groups.now.get(path).is_some_and(|members| members.iter().any(|member| is_below_held(member)))
        };
        let mut looked = looked.iter().peekable();
        let is_changed = |(found, recorded): (&Found, Option<&State>)| {
            let looked = looked.next_if(|(at, _)| std::ptr::eq(*at, found));
            let is_same = match (&found.object, recorded) {
                (Object::Whiteout, Some(State::Deleted)) => true,
                (Object::Other(kind, meta), Some(State::Present(node))) => *kind == node.kind && **meta == node.meta,
                (Object::File, Some(State::Present(_))) => matches!(looked, Some((_, Looked::Same))),
                _ => false,
            };
            let stays = is_held(&found.path) || is_same && groups.is_same(&found.path);
            !stays
        };
        let changed: Vec<bool> = self.pairs().map(is_changed).collect();
        let found = || self.scan.iter().zip(&changed);
        let numbers = groups.numbers(found().filter(|(_, changed)| **changed).map(|(found, _)| &found.path));
        let present = found().filter_map(|(found, &changed)| {
            // Of a group of which one member changed, all are recorded.
            let number = numbers.get(&found.path).copied();
            let draft = match found.object {
                Object::Whiteout => Draft::Deleted,
                _ => Draft::Present(found, number.unwrap_or(0)),
            };
            (changed || number.is_some()).then_some((&found.path, draft))
        });
        let gone = self.gone.iter().filter(|(path, _)| !is_held(path)).map(|(path, _)| (*path, Draft::AsLower));
        let mut drafts: Vec<_> = present.chain(gone).collect();
        if !self.gone.is_empty() {
            // Two runs that are in order.
            drafts.sort_by_key(|(path, _)| *path);
        }
        drafts
    }

    /// What the scan would take away from the view: recorded objects that are gone, and objects of lower that are newly
    /// hidden. `lower_is_dir` tells whether lower has a directory at a path.
    #[must_use]
    pub fn losses(&self, lower_is_dir: impl Fn(&RelPath) -> bool) -> BTreeSet<RelPath> {
        let gone = self.gone.iter().filter(|(_, state)| **state != State::Deleted);
        // Where lower has no directory it has none below, and a subtree is contiguous.
        let mut nothing: Option<&RelPath> = None;
        let hidden = self.pairs().filter(|(found, recorded)| {
            let was_dir = recorded.and_then(State::node).is_some_and(|node| !node.is_opaque() && node.is_dir());
            match &found.object {
                Object::Whiteout => *recorded != Some(&State::Deleted),
                Object::Other(Kind::Dir { opaque: false }, _) => false,
                // Newly hiding: not recorded at all, or as a directory that lower showed through.
                _ if recorded.is_some() && !was_dir || nothing.is_some_and(|above| found.path.is_below(above)) => false,
                _ if lower_is_dir(&found.path) => true,
                _ => {
                    nothing = Some(&found.path);
                    false
                }
            }
        });
        gone.map(|(path, _)| (*path).clone()).chain(hidden.map(|(found, _)| found.path.clone())).collect()
    }
}

/// Who shares an inode with whom, recorded and now.
struct Groups<'a> {
    /// The members of the group that a path belongs to now.
    now: BTreeMap<&'a RelPath, Vec<&'a RelPath>>,
    recorded: BTreeMap<&'a RelPath, Vec<&'a RelPath>>,
}

impl<'a> Groups<'a> {
    fn of(net: &'a Net, scan: &'a [Found]) -> Self {
        let mut by_inode: BTreeMap<u64, Vec<&RelPath>> = BTreeMap::new();
        // Whiteouts share an inode too, but say nothing by it; directories cannot be linked.
        let linkable = |found: &&Found| match &found.object {
            Object::Whiteout | Object::Other(Kind::Dir { .. }, _) => false,
            _ => found.stamp.nlink > 1,
        };
        for found in scan.iter().filter(linkable) {
            by_inode.entry(found.stamp.ino).or_default().push(&found.path);
        }
        Self {
            now: by_member(by_inode.into_values().filter(|members| members.len() > 1)),
            recorded: by_member(net.groups().into_values()),
        }
    }

    fn is_same(&self, path: &RelPath) -> bool {
        self.now.get(path) == self.recorded.get(path)
    }

    /// The numbers of the groups of which one of the `changed` is a member, for each member.
    fn numbers<'s>(&self, changed: impl Iterator<Item = &'s RelPath>) -> BTreeMap<&'a RelPath, u32> {
        let leaders: BTreeSet<&RelPath> =
            changed.filter_map(|path| self.now.get(path)).map(|members| members[0]).collect();
        let members = leaders
            .into_iter()
            .zip(1..)
            .flat_map(|(leader, number)| self.now[leader].iter().map(move |member| (*member, number)));
        members.collect()
    }
}

fn by_member<'a>(groups: impl Iterator<Item = Vec<&'a RelPath>>) -> BTreeMap<&'a RelPath, Vec<&'a RelPath>> {
    groups.flat_map(|members| members.clone().into_iter().map(move |member| (member, members.clone()))).collect()
}

/// Whether two scans saw the same names and nothing was renamed, created or removed in any directory between them.
#[must_use]
pub fn is_stable(before: &[Found], after: &[Found]) -> bool {
    let signature = |found: &Found| {
        let is_dir = matches!(found.object, Object::Other(Kind::Dir { .. }, _));
        (found.path.clone(), found.stamp.ino, is_dir.then_some((found.stamp.mtime, found.stamp.ctime)))
    };
    before.len() == after.len() && before.iter().map(signature).eq(after.iter().map(signature))
}

/// What must be held so that the `disputed` losses are not recorded: they themselves, and whatever now stands where
/// one of their directories was.
#[must_use]
pub fn held(disputed: &BTreeSet<RelPath>, scan: &[Found]) -> BTreeSet<RelPath> {
    let mut held = disputed.clone();
    for found in scan {
        let is_dir = matches!(found.object, Object::Other(Kind::Dir { .. }, _));
        if !is_dir && disputed.iter().any(|lost| lost.is_below(&found.path)) {
            held.insert(found.path.clone());
        }
    }
    held
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chain::Recorded;
    use crate::digest::Digest;
    use crate::entry::Content;
    use crate::scan::Stamp;

    fn path(text: &str) -> RelPath {
        RelPath::parse(text.as_bytes()).unwrap()
    }

    fn meta() -> Meta {
        Meta {
            mode: 0o644,
            uid: 0,
            gid: 0,
            mtime: 5,
            mtime_nsec: 0,
            immutable: false,
            append_only: false,
            xattrs: BTreeMap::new(),
        }
    }

    fn stamp(ino: u64, nlink: u64) -> Stamp {
        Stamp { ino, nlink, size: 1, blocks: 8, mtime: (5, 0), ctime: (5, 0) }
    }

    fn file(at: &str, ino: u64, nlink: u64) -> Found {
        Found { path: path(at), object: Object::File, stamp: stamp(ino, nlink) }
    }

    fn dir(at: &str, opaque: bool) -> Found {
        Found { path: path(at), object: Object::Other(Kind::Dir { opaque }, Box::new(meta())), stamp: stamp(1, 2) }
    }

    fn whiteout(at: &str) -> Found {
        Found { path: path(at), object: Object::Whiteout, stamp: stamp(9, 40) }
    }

    const DIGEST: Digest = Digest(77);

    /// The state that a checkpoint of `scan` leaves.
    fn recorded(scan: &[Found]) -> Net {
        let mut net = Net::default();
        let nothing = Net::default();
        let groups = Groups::of(&nothing, scan).now;
        for found in scan {
            let group = groups.get(&found.path).map_or(0, |members| u32::try_from(members.len()).unwrap());
            let node = |kind| State::Present(Node { kind, meta: meta(), group });
            let state = match &found.object {
                Object::Whiteout => State::Deleted,
                Object::Other(kind, _) => node(kind.clone()),
                Object::File => node(Kind::file(Content {
                    size: 1,
                    digest: DIGEST,
                    fuzzy: false,
                    stretches: Vec::new(),
                    blocks: Vec::new(),
                })),
            };
            net.entries.insert(found.path.clone(), Recorded { state, seq: 1 });
        }
        net
    }

    /// What a file with this digest turns out to be.
    fn looked(recorded: &State, meta: &Meta, digest: Digest) -> Looked {
        let read = Read { stamp: stamp(0, 1), size: 1, digest, blocks: Vec::new(), fuzzy: false };
        Looked::of(recorded, meta, read)
    }

    fn changes(net: &Net, scan: &[Found], digest: Digest, held: &[&str]) -> Vec<(String, &'static str)> {
        let all = Beside::new(net, scan).to_hash().into_iter();
        let all: Vec<_> = all.map(|(found, recorded)| (found, looked(recorded, &meta(), digest))).collect();
        changes_with(net, scan, &all, held)
    }

    fn changes_with<'a>(
        net: &'a Net,
        scan: &'a [Found],
        looked: &[(&'a Found, Looked)],
        held: &[&str],
    ) -> Vec<(String, &'static str)> {
        let held = held.iter().map(|held| path(held)).collect();
        let drafts = Beside::new(net, scan).diff(looked, &held);
        drafts
            .into_iter()
            .map(|(path, draft)| {
                let what = match draft {
                    Draft::Present(_, 0) => "present",
                    Draft::Present(..) => "linked",
                    Draft::Deleted => "deleted",
                    Draft::AsLower => "as lower",
                };
                (path.to_string(), what)
            })
            .collect()
    }

    fn pairs(expected: &[(&str, &'static str)]) -> Vec<(String, &'static str)> {
        expected.iter().map(|(path, what)| ((*path).to_owned(), *what)).collect()
    }

    #[test]
    fn nothing_changed_is_nothing() {
        let scan = [dir("", false), file("a", 2, 2), file("b", 2, 2), whiteout("c")];
        assert_eq!(changes(&recorded(&scan), &scan, DIGEST, &[]), pairs(&[]));
    }

    #[test]
    fn content_decides() {
        let scan = [dir("", false), file("a", 2, 1)];
        assert_eq!(changes(&recorded(&scan), &scan, Digest(78), &[]), pairs(&[("a", "present")]));
    }

    #[test]
    fn a_change_in_a_group_brings_in_every_member() {
        let scan = [dir("", false), file("a", 2, 3), file("b", 2, 3), file("c", 2, 3), file("d", 3, 1)];
        let net = recorded(&scan);
        let other = Meta { mode: 0o600, ..meta() };
        let all = Beside::new(&net, &scan).to_hash().into_iter().map(|(found, recorded)| {
            let meta = if found.path == path("b") { &other } else { &meta() };
            (found, looked(recorded, meta, DIGEST))
        });
        let all: Vec<_> = all.collect();
        assert_eq!(changes_with(&net, &scan, &all, &[]), pairs(&[("a", "linked"), ("b", "linked"), ("c", "linked")]));
        // One member leaves: the others change, because their group did.
        let after = [dir("", false), file("a", 2, 2), file("b", 2, 2), file("c", 4, 1), file("d", 3, 1)];
        assert_eq!(changes(&net, &after, DIGEST, &[]), pairs(&[("a", "linked"), ("b", "linked"), ("c", "present")]));
    }

    #[test]
    fn what_vanished_is_as_lower_and_a_whiteout_is_a_deletion() {
        let net = recorded(&[dir("", false), file("a", 2, 1), file("b", 3, 1)]);
        let scan = [dir("", false), whiteout("a")];
        assert_eq!(changes(&net, &scan, DIGEST, &[]), pairs(&[("a", "deleted"), ("b", "as lower")]));
        assert_eq!(changes(&net, &scan, DIGEST, &["a", "b"]), pairs(&[]));
        let lost: Vec<_> = Beside::new(&net, &scan).losses(|_| false).into_iter().collect();
        assert_eq!(lost, [path("a"), path("b")]);
    }

    #[test]
    fn hiding_a_directory_of_lower_is_a_loss_and_a_new_one_is_not() {
        let net = recorded(&[dir("", false), dir("d", false)]);
        let scan = [dir("", false), dir("d", true), dir("new", true), file("f", 4, 1)];
        let lost: Vec<_> =
            Beside::new(&net, &scan).losses(|at| *at == path("d") || *at == path("f")).into_iter().collect();
        assert_eq!(lost, [path("d"), path("f")]);
    }

    #[test]
    fn a_held_loss_holds_what_replaced_its_directory() {
        let net = recorded(&[dir("", false), dir("d", true), file("d/x", 2, 1)]);
        let scan = [dir("", false), file("d", 5, 1)];
        let held: Vec<_> = held(&Beside::new(&net, &scan).losses(|_| false), &scan).into_iter().collect();
        assert_eq!(held, [path("d"), path("d/x")]);
        assert_eq!(changes(&net, &scan, DIGEST, &["d", "d/x"]), pairs(&[]));
    }
}
