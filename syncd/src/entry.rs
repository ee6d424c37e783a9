//! One object of an upper directory, as a value: what a checkpoint holds and what a merge makes true.
//!
//! These types are the checkpoint format's body (docs/format.md): a change here is a change of the format.

use std::ops::Range;

use ephemeral_overlay::attributes::Xattrs;
use serde::{Deserialize, Serialize};

use crate::digest::{BLOCK, Block, Digest};
use crate::path::RelPath;

/// What a checkpoint says about one path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// The path, below the target's root.
    pub path: RelPath,
    /// What it is now.
    pub state: State,
    /// What lower had there when the path was first captured in this chain; `None` where an earlier checkpoint of
    /// the chain says it.
    pub base: Option<Base>,
}

/// What a path is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum State {
    /// Upper holds this object.
    Present(Node),
    /// Upper hides what lower has.
    Deleted,
    /// Upper says nothing any more: as lower.
    AsLower,
}

/// An object with its metadata.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// What kind of object.
    pub kind: Kind,
    /// Its metadata.
    pub meta: Meta,
    /// The link group in this checkpoint, or 0 for an object with one name. Every member of a group is in the same
    /// checkpoint, and all of them say the same.
    pub group: u32,
}

/// The kinds of objects.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// A regular file.
    File(Box<Content>),
    /// A directory; `opaque` hides lower's directory of the same name.
    Dir {
        /// Nothing of lower shows through.
        opaque: bool,
    },
    /// A symlink.
    Symlink {
        /// Where it leads.
        #[serde(with = "serde_bytes")]
        target: Vec<u8>,
    },
    /// A FIFO.
    Fifo,
    /// A socket. Only its name is restored; nobody listens.
    Socket,
    /// A device node.
    Device {
        /// A block device, else a character device.
        block: bool,
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
}

/// The contents of a regular file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Content {
    /// Length in bytes.
    pub size: u64,
    /// Digest of the contents.
    pub digest: Digest,
    /// The file changed while it was read, again and again: it is whole, but of no single instant.
    pub fuzzy: bool,
    /// Where the bytes are; what no stretch covers is a hole.
    pub stretches: Vec<Stretch>,
    /// The blocks that hold anything but zeros, for a file of more than one block: what the next checkpoint compares.
    pub blocks: Vec<Block>,
}

/// A run of a file's bytes in the data of a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stretch {
    /// Where it begins in the file.
    pub offset: u64,
    /// Its length in bytes, not zero.
    pub length: u64,
    /// How many checkpoints back in the chain its data is; 0 for the checkpoint that says so.
    pub back: u64,
    /// Where it begins in that checkpoint's data.
    pub data: u64,
}

impl Content {
    /// The blocks by number and digest; for a file of one block its digest is the file's.
    pub fn all_blocks(&self) -> impl Iterator<Item = Block> {
        let only = (1..=BLOCK as u64).contains(&self.size).then_some(Block { number: 0, digest: self.digest });
        self.blocks.iter().copied().chain(only)
    }

    /// The stretches in a range of the file, cut to it.
    pub fn within(&self, range: Range<u64>) -> impl Iterator<Item = Stretch> {
        let first = self.stretches.partition_point(|stretch| stretch.offset + stretch.length <= range.start);
        let stretches = self.stretches[first..].iter().copied();
        stretches.take_while(move |stretch| stretch.offset < range.end).map(move |stretch| stretch.cut(&range))
    }
}

impl Stretch {
    /// The part of it that lies in a range of the file, which it meets.
    fn cut(self, range: &Range<u64>) -> Self {
        let offset = self.offset.max(range.start);
        let end = (self.offset + self.length).min(range.end);
        Self { offset, length: end - offset, data: self.data + (offset - self.offset), ..self }
    }

    /// Its first `length` bytes, and the rest, if there is any.
    #[must_use]
    pub fn split(self, length: u64) -> (Self, Option<Self>) {
        let middle = self.offset + length.min(self.length);
        let end = self.offset + self.length;
        (self.cut(&(self.offset..middle)), (middle < end).then(|| self.cut(&(middle..end))))
    }

    /// Adds it to stretches that end where it begins, or before.
    pub fn append_to(self, stretches: &mut Vec<Self>) {
        match stretches.last_mut() {
            Some(last)
                if last.back == self.back
                    && last.offset + last.length == self.offset
                    && last.data + last.length == self.data =>
            {
                last.length += self.length;
            }
            _ => stretches.push(self),
        }
    }
}

/// The metadata that is carried.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Meta {
    /// Permission bits with setuid, setgid and sticky (07777).
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Time of last modification: seconds since the epoch.
    pub mtime: i64,
    /// Nanoseconds of the time of last modification.
    pub mtime_nsec: u32,
    /// `chattr +i`.
    pub immutable: bool,
    /// `chattr +a`.
    pub append_only: bool,
    /// Extended attributes, ACLs and capabilities among them, as a set.
    pub xattrs: Xattrs,
}

/// What lower had at a path when it was first captured: enough to see that someone changed it on disk since.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Base {
    /// Nothing.
    Absent,
    /// A directory that shows through: what is below it is judged by itself.
    Dir {
        /// Its mode, owner and group.
        owner: (u32, u32, u32),
    },
    /// Anything that the change replaces or hides, with everything below it if it is a directory.
    Whole {
        /// Digest of kinds, metadata, names and contents.
        digest: Digest,
    },
    /// It could not be read. What replaces it must be saved all the same.
    Unknown,
}

impl Kind {
    /// A regular file with these contents. They stand apart: lists of many thousand objects are moved and grow.
    #[must_use]
    pub fn file(content: Content) -> Self {
        Self::File(Box::new(content))
    }

    /// The contents, for a regular file.
    #[must_use]
    pub fn content(&self) -> Option<&Content> {
        match self {
            Self::File(content) => Some(content),
            _ => None,
        }
    }
}

impl Node {
    /// The contents, for a regular file.
    #[must_use]
    pub fn content(&self) -> Option<&Content> {
        self.kind.content()
    }

    /// Whether this is a directory.
    #[must_use]
    pub fn is_dir(&self) -> bool {
        matches!(self.kind, Kind::Dir { .. })
    }

    /// Whether an object with this `st_mode` has the permissions of this one; a symlink's are the kernel's.
    #[must_use]
    pub fn has_permissions(&self, mode: u32) -> bool {
        matches!(self.kind, Kind::Symlink { .. }) || mode & 0o7777 == self.meta.mode
    }

    /// Whether this is a directory that hides lower's.
    #[must_use]
    pub fn is_opaque(&self) -> bool {
        matches!(self.kind, Kind::Dir { opaque: true })
    }
}

impl State {
    /// The object, where there is one.
    #[must_use]
    pub fn node(&self) -> Option<&Node> {
        match self {
            Self::Present(node) => Some(node),
            _ => None,
        }
    }
}
