//! The operations: each is one system call that changes one thing, after the file was opened for it.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, lchown, symlink};
use std::path::Path;

use ephemeral_overlay::attributes::Handle;
use rustix::fs::{CWD, OFlags, RenameFlags, renameat_with};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::content::{SLOT, encode};
use crate::mapped::Mapping;

/// The attribute that files are given. tmpfs has those of the class `user` only since 6.6.
pub(super) const ATTRIBUTE: &str = "trusted.live";
/// How many mappings a writer keeps: what is written through one that was written through before changes no times.
const MAPPINGS: usize = 4;

/// An operation. Paths are below a part, lengths and places in slots.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Op {
    Create(String),
    Mkdir(String),
    Symlink(String),
    Write {
        path: String,
        at: usize,
        count: usize,
    },
    Append {
        path: String,
        count: usize,
    },
    /// Through a shared mapping.
    Map {
        path: String,
        at: usize,
        count: usize,
        sync: bool,
    },
    Resize {
        path: String,
        count: usize,
    },
    Rename(String, String),
    Exchange(String, String),
    Link(String, String),
    Unlink(String),
    Rmdir(String),
    Mode(String, u32),
    Owner(String, u32),
    SetAttribute(String),
    RemoveAttribute(String),
}

impl Op {
    /// Whether it changes what stands at a name.
    pub(super) fn moves(&self) -> bool {
        matches!(
            self,
            Self::Create(_)
                | Self::Mkdir(_)
                | Self::Symlink(_)
                | Self::Unlink(_)
                | Self::Rmdir(_)
                | Self::Rename(..)
                | Self::Exchange(..)
                | Self::Link(..)
        )
    }

    /// Whether the kernel refuses it whatever else is there: a directory cannot go into itself.
    pub(super) fn is_impossible(&self) -> bool {
        let is_below = |path: &str, above: &str| path.strip_prefix(above).is_some_and(|rest| rest.starts_with('/'));
        match self {
            Self::Rename(one, other) | Self::Exchange(one, other) => is_below(one, other) || is_below(other, one),
            _ => false,
        }
    }
}

/// Does operations in one part.
#[derive(Debug, Default)]
pub(super) struct Hands {
    mappings: BTreeMap<u64, (Mapping, usize)>,
}

impl Hands {
    /// Does one; whether it did anything. What is possible is left to the kernel, but nothing else may fail.
    pub(super) fn perform(&mut self, root: &Path, number: u32, op: &Op) -> bool {
        match self.attempt(root, number, op) {
            Ok(()) => true,
            Err(error) => {
                let errno = Errno::from_io_error(&error);
                let is_impossible = matches!(
                    (op, errno),
                    (Op::Rename(..) | Op::Exchange(..), Some(Errno::XDEV | Errno::INVAL | Errno::NOTEMPTY))
                );
                assert!(is_impossible, "{op:?}: {error}");
                false
            }
        }
    }

    fn attempt(&mut self, root: &Path, number: u32, op: &Op) -> std::io::Result<()> {
        let at = |path: &str| root.join(path);
        match op {
            Op::Create(path) => options().create_new(true).open(at(path)).map(drop),
            Op::Mkdir(path) => fs::create_dir(at(path)),
            Op::Symlink(path) => symlink(format!("nowhere/{number}"), at(path)),
            Op::Write { path, at: place, count } => {
                let bytes = encode(number, *place, *count);
                let written = options().open(at(path))?.write_at(&bytes, (place * SLOT) as u64)?;
                assert_eq!(written, bytes.len(), "a write was cut");
                Ok(())
            }
            Op::Append { path, count } => {
                let mut file = options().append(true).open(at(path))?;
                let bytes = encode(number, slots(&file), *count);
                let written = file.write(&bytes)?;
                assert_eq!(written, bytes.len(), "a write was cut");
                Ok(())
            }
            Op::Map { path, at: place, count, sync } => {
                let file = options().open(at(path))?;
                self.mapping(&file, place + count)?.write_at(place * SLOT, &encode(number, *place, *count));
                if *sync {
                    self.mapping(&file, place + count)?.sync();
                }
                Ok(())
            }
            Op::Resize { path, count } => options().open(at(path))?.set_len((count * SLOT) as u64),
            Op::Rename(from, to) => fs::rename(at(from), at(to)),
            Op::Exchange(one, other) => Ok(renameat_with(CWD, at(one), CWD, at(other), RenameFlags::EXCHANGE)?),
            Op::Link(from, to) => fs::hard_link(at(from), at(to)),
            Op::Unlink(path) => fs::remove_file(at(path)),
            Op::Rmdir(path) => fs::remove_dir(at(path)),
            Op::Mode(path, mode) => fs::set_permissions(at(path), fs::Permissions::from_mode(*mode)),
            Op::Owner(path, owner) => lchown(at(path), Some(*owner), Some(*owner)),
            Op::SetAttribute(path) => {
                attribute(&at(path), |handle| handle.write(ATTRIBUTE.as_bytes(), number.to_string().as_bytes()))
            }
            Op::RemoveAttribute(path) => attribute(&at(path), |handle| handle.remove(ATTRIBUTE.as_bytes())),
        }
    }

    /// A mapping of the start of a file, kept for the next time.
    fn mapping(&mut self, file: &File, count: usize) -> std::io::Result<&Mapping> {
        let inode = file.metadata()?.ino();
        if self.mappings.get(&inode).is_none_or(|(_, length)| *length < count) {
            if self.mappings.len() >= MAPPINGS {
                self.mappings.pop_first();
            }
            self.mappings.insert(inode, (Mapping::new(file, slots(file) * SLOT), slots(file)));
        }
        Ok(&self.mappings[&inode].0)
    }
}

fn slots(file: &File) -> usize {
    usize::try_from(file.metadata().unwrap().len()).unwrap() / SLOT
}

fn options() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(i32::try_from(OFlags::NOFOLLOW.bits()).unwrap());
    options
}

fn attribute(path: &Path, change: impl FnOnce(&Handle<'_>) -> rustix::io::Result<()>) -> std::io::Result<()> {
    let parent = File::open(path.parent().unwrap())?;
    Ok(change(&Handle::child(parent.as_fd(), path.file_name().unwrap()))?)
}
