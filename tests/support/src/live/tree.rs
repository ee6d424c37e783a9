//! A tree as a value: read from a directory, and changed by operations as the kernel would change it.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use ephemeral_overlay::attributes::Handle;

use super::content::decode;
use super::op::{ATTRIBUTE, Op};

/// An object: the number of the operation that made it, or a number above all of these.
pub(super) type Id = u32;

/// The part itself.
pub(super) const ROOT: Id = 0;
/// The first number of what was there before.
const READ: Id = 1 << 31;

/// An object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Node {
    pub(super) kind: Kind,
    pub(super) meta: Meta,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Kind {
    Dir(BTreeMap<String, Id>),
    /// The operation that wrote each slot.
    File(Vec<u32>),
    Symlink(String),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Meta {
    pub(super) mode: u32,
    pub(super) owner: u32,
    pub(super) attribute: Option<u32>,
}

/// A tree.
#[derive(Debug, Clone)]
pub(super) struct Tree {
    pub(super) nodes: BTreeMap<Id, Node>,
    /// How many names an object has.
    names: BTreeMap<Id, usize>,
    /// The inode of what was read. Each name on disk is an object of its own: without an index overlayfs breaks hard
    /// links when it copies up.
    pub(super) inodes: BTreeMap<Id, u64>,
}

impl Tree {
    /// Reads a directory in which nobody writes.
    pub(super) fn read(root: &Path) -> Self {
        let mut tree = Self { nodes: BTreeMap::new(), names: BTreeMap::new(), inodes: BTreeMap::new() };
        let mut next = READ;
        tree.read_one(root, ROOT, &mut next);
        tree
    }

    fn read_one(&mut self, path: &Path, id: Id, next: &mut Id) {
        let stat = fs::symlink_metadata(path).unwrap();
        let kind = if stat.is_dir() {
            let mut entries: Vec<_> = fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()).collect();
            entries.sort();
            let mut children = BTreeMap::new();
            for entry in entries {
                *next += 1;
                children.insert(entry.file_name().unwrap().to_str().unwrap().to_owned(), *next);
                self.names.insert(*next, 1);
                self.read_one(&entry, *next, next);
            }
            Kind::Dir(children)
        } else if stat.is_symlink() {
            Kind::Symlink(fs::read_link(path).unwrap().to_str().unwrap().to_owned())
        } else {
            assert!(stat.is_file(), "{}: what is that?", path.display());
            Kind::File(decode(&fs::read(path).unwrap()))
        };
        let parent = fs::File::open(path.parent().unwrap()).unwrap();
        let attribute = Handle::child(parent.as_fd(), path.file_name().unwrap()).read(ATTRIBUTE).unwrap();
        let attribute = attribute.map(|value| String::from_utf8(value).unwrap().parse().unwrap());
        let meta = Meta { mode: stat.mode() & 0o7777, owner: stat.uid(), attribute };
        self.nodes.insert(id, Node { kind, meta });
        self.inodes.insert(id, stat.ino());
    }

    /// Every path with its object, directories before what is in them.
    pub(super) fn paths(&self) -> BTreeMap<String, Id> {
        let mut paths = BTreeMap::from([(String::new(), ROOT)]);
        let mut pending = vec![(String::new(), ROOT)];
        while let Some((path, id)) = pending.pop() {
            let Kind::Dir(children) = &self.nodes[&id].kind else { continue };
            for (name, &child) in children {
                let below = if path.is_empty() { name.clone() } else { format!("{path}/{name}") };
                paths.insert(below.clone(), child);
                pending.push((below, child));
            }
        }
        paths
    }

    /// The object at a path.
    pub(super) fn at(&self, path: &str) -> Id {
        let names = path.split('/').filter(|name| !name.is_empty());
        names.fold(ROOT, |id, name| match &self.nodes[&id].kind {
            Kind::Dir(children) => children[name],
            other => panic!("{path}: {other:?}"),
        })
    }

    /// The slots of a file.
    pub(super) fn slots(&self, id: Id) -> usize {
        match &self.nodes[&id].kind {
            Kind::File(slots) => slots.len(),
            _ => 0,
        }
    }

    /// What an operation that succeeded does; returns the objects that are no longer as they were.
    pub(super) fn apply(&mut self, number: u32, op: &Op) -> Vec<Id> {
        match op {
            Op::Create(path) => self.make(number, path, Kind::File(Vec::new()), 0o644),
            Op::Mkdir(path) => self.make(number, path, Kind::Dir(BTreeMap::new()), 0o755),
            Op::Symlink(path) => self.make(number, path, Kind::Symlink(format!("nowhere/{number}")), 0o777),
            Op::Write { path, at, count } | Op::Map { path, at, count, .. } => self.write(number, path, *at, *count),
            Op::Append { path, count } => self.write(number, path, self.slots(self.at(path)), *count),
            Op::Resize { path, count } => {
                let id = self.at(path);
                self.file(id).resize(*count, 0);
                vec![id]
            }
            Op::Rename(from, to) => {
                let id = self.at(from);
                if self.get(to) == Some(id) {
                    // Two names of one object: nothing happens.
                    return Vec::new();
                }
                self.remove(to);
                self.dir(from).remove(name(from));
                self.dir(to).insert(name(to).to_owned(), id);
                vec![id]
            }
            Op::Exchange(one, other) => {
                let (first, second) = (self.at(one), self.at(other));
                let parents = (self.at(parent(one)), self.at(parent(other)));
                self.children(parents.0).insert(name(one).to_owned(), second);
                self.children(parents.1).insert(name(other).to_owned(), first);
                vec![first, second]
            }
            Op::Link(from, to) => {
                let id = self.at(from);
                self.dir(to).insert(name(to).to_owned(), id);
                *self.names.entry(id).or_default() += 1;
                vec![id]
            }
            Op::Unlink(path) | Op::Rmdir(path) => {
                self.remove(path);
                Vec::new()
            }
            Op::Mode(path, mode) => self.change(path, |meta| meta.mode = *mode),
            Op::Owner(path, owner) => self.change(path, |meta| meta.owner = *owner),
            Op::SetAttribute(path) => self.change(path, |meta| meta.attribute = Some(number)),
            Op::RemoveAttribute(path) => self.change(path, |meta| meta.attribute = None),
        }
    }

    fn make(&mut self, number: u32, path: &str, kind: Kind, mode: u32) -> Vec<Id> {
        self.nodes.insert(number, Node { kind, meta: Meta { mode, owner: 0, attribute: None } });
        self.names.insert(number, 1);
        self.dir(path).insert(name(path).to_owned(), number);
        vec![number]
    }

    fn write(&mut self, number: u32, path: &str, at: usize, count: usize) -> Vec<Id> {
        let id = self.at(path);
        let slots = self.file(id);
        slots.resize(slots.len().max(at + count), 0);
        slots[at..at + count].fill(number);
        vec![id]
    }

    fn change(&mut self, path: &str, change: impl FnOnce(&mut Meta)) -> Vec<Id> {
        let id = self.at(path);
        change(&mut self.nodes.get_mut(&id).unwrap().meta);
        vec![id]
    }

    fn get(&self, path: &str) -> Option<Id> {
        match &self.nodes[&self.at(parent(path))].kind {
            Kind::Dir(children) => children.get(name(path)).copied(),
            _ => None,
        }
    }

    fn remove(&mut self, path: &str) {
        let Some(id) = self.dir(path).remove(name(path)) else { return };
        let names = self.names.get_mut(&id).unwrap();
        *names -= 1;
        if *names == 0 {
            self.nodes.remove(&id);
        }
    }

    /// The directory that holds a path.
    fn dir(&mut self, path: &str) -> &mut BTreeMap<String, Id> {
        let id = self.at(parent(path));
        self.children(id)
    }

    fn children(&mut self, id: Id) -> &mut BTreeMap<String, Id> {
        match &mut self.nodes.get_mut(&id).unwrap().kind {
            Kind::Dir(children) => children,
            other => panic!("{other:?}"),
        }
    }

    fn file(&mut self, id: Id) -> &mut Vec<u32> {
        match &mut self.nodes.get_mut(&id).unwrap().kind {
            Kind::File(slots) => slots,
            other => panic!("{other:?}"),
        }
    }
}

/// The directory of a path, the empty one for the part.
pub(super) fn parent(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(parent, _)| parent)
}

/// The last name of a path.
pub(super) fn name(path: &str) -> &str {
    path.rsplit_once('/').map_or(path, |(_, name)| name)
}
