//! What stands at a path of a tree, looked at once, and whether it is what it should be.

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::BorrowedFd;

use ephemeral_overlay::error::At;
use rustix::fs::{AtFlags, FileType, OFlags, Stat, fstat, makedev, statat};
use rustix::io::Errno;

use crate::content;
use crate::entry::{Kind, Node};
use crate::error::Result;
use crate::path::RelPath;
use crate::scan::Stamp;
use crate::tree::{Tree, open_child_file};

/// What stands at a path.
#[derive(Debug)]
pub struct Existing<'a> {
    lower: &'a Tree,
    parent: BorrowedFd<'a>,
    path: &'a RelPath,
    /// A regular file is open.
    pub file: Option<File>,
    /// Its status.
    pub stat: Stat,
}

impl<'a> Existing<'a> {
    /// Looks at `path`, whose directory is open; `None` where nothing stands there.
    ///
    /// # Errors
    /// Whatever openat2(2), fstat(2) or fstatat(2) says.
    pub fn at(lower: &'a Tree, parent: BorrowedFd<'a>, path: &'a RelPath) -> Result<Option<Self>> {
        let shown = lower.show(path);
        let name = if path.is_root() { OsStr::new(".") } else { path.name() };
        let stat = match statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => return Ok(None),
            other => other.at("fstatat", &shown)?,
        };
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Ok(Some(Self { lower, parent, path, file: None, stat }));
        }
        let file = open_child_file(parent, name, OFlags::RDONLY).at("openat2", &shown)?;
        Self::opened(lower, parent, path, file).map(Some)
    }

    /// The same where a regular file is expected, which is opened without a look at what it is.
    ///
    /// # Errors
    /// As [`Existing::at`].
    pub fn file_at(lower: &'a Tree, parent: BorrowedFd<'a>, path: &'a RelPath) -> Result<Option<Self>> {
        match open_child_file(parent, path.name(), OFlags::RDONLY) {
            Ok(file) => Self::opened(lower, parent, path, file).map(Some),
            Err(Errno::NOENT) => Ok(None),
            // It is something else.
            Err(_) => Self::at(lower, parent, path),
        }
    }

    fn opened(lower: &'a Tree, parent: BorrowedFd<'a>, path: &'a RelPath, file: File) -> Result<Self> {
        let stat = fstat(&file).at("fstat", lower.show(path))?;
        let is_file = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
        Ok(Self { lower, parent, path, file: is_file.then_some(file), stat })
    }

    /// Whether it is of this kind, and has this content. Nobody else changes it.
    ///
    /// # Errors
    /// Whatever reading it says.
    pub fn has_kind_and_content(&self, node: &Node, seed: u64) -> Result<bool> {
        let shown = self.lower.show(self.path);
        Ok(match (&node.kind, FileType::from_raw_mode(self.stat.st_mode)) {
            (Kind::Dir { .. }, FileType::Directory)
            | (Kind::Fifo, FileType::Fifo)
            | (Kind::Socket, FileType::Socket) => true,
            (Kind::Symlink { target }, FileType::Symlink) => {
                *target == crate::tree::read_link(self.parent, self.path.name(), &shown)?
            }
            (Kind::Device { block: true, major, minor }, FileType::BlockDevice)
            | (Kind::Device { block: false, major, minor }, FileType::CharacterDevice) => {
                self.stat.st_rdev == makedev(*major, *minor)
            }
            (Kind::File(content), FileType::RegularFile) => match &self.file {
                Some(file) if u64::try_from(self.stat.st_size) == Ok(content.size) => {
                    content::digest(file, &Stamp::of(&self.stat), seed, &shown)? == content.digest
                }
                _ => false,
            },
            _ => false,
        })
    }
}
