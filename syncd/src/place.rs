//! Makes an object exist: in lower, in an upper directory, or as a plain copy. Everything is relative to directory
//! descriptors. What replaces something appears by temporary name and rename, so a name is the old object or the new
//! one, whole; [`Place::put_new`] and [`Place::update`] are for a merge, which is done again after a cut.
//!
//! Order within an object: owner (clears setuid and capabilities), attributes it must not have, mode, attributes,
//! times. Made twice, the result is the same: this is what lets a merge be cut anywhere and redone.

mod patch;

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ephemeral_overlay::attributes::{Handle, Xattrs};
use ephemeral_overlay::error::{At, SystemError};
use ephemeral_overlay::overlay::{Artefacts, express, is_never_data};
use ephemeral_overlay::token::Token;
use patch::Patch;
use rustix::fs::{
    AtFlags, FileType, Gid, IFlags, Mode, OFlags, RawMode, Timespec, Timestamps, Uid, fstat, fstatvfs, ioctl_getflags,
    ioctl_setflags, linkat, makedev, mkdirat, mknodat, openat, renameat, statat, symlinkat, unlinkat, utimensat,
};
use rustix::io::Errno;
use rustix::process::geteuid;

use crate::entry::{Content, Kind, Meta, Node};
use crate::error::{Error, Result};
use crate::path::RelPath;
use crate::tree::{Tree, is_nothing, list, open_child_dir, open_child_file};
use crate::written::pages;

/// What a temporary name begins with; a token follows, which nobody can guess and which is the same in every redo.
const TEMPORARY: &str = ".ephemeral-overlay.tmp.";

/// What kind of tree objects are made in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Into {
    /// A target's real directory.
    Lower {
        /// The objects come from an upper that could not hold `user.*`: what is there keeps its own.
        keep_user_xattrs: bool,
    },
    /// The upper directory of an overlay that is not mounted.
    Upper,
    /// A copy for somebody to look at: what its file system cannot hold of the attributes is left out.
    Copy,
}

/// Where the contents of files come from: hands out the bytes of the file at a path, each piece with its offset.
pub type Contents<'a> = dyn FnMut(&RelPath, &Content, &mut dyn FnMut(u64, &[u8]) -> Result<()>) -> Result<()> + 'a;

/// Makes objects in one tree.
#[derive(Debug, Clone)]
pub struct Place<'a> {
    tree: &'a Tree,
    into: Into,
    /// What is unfinished has this name.
    temporary: OsString,
    /// The bytes of contents that were written, in whole pages; one count for all parts.
    written: Arc<AtomicU64>,
}

impl<'a> Place<'a> {
    /// Makes objects in `tree`; `token` makes the temporary names that are used in it.
    #[must_use]
    pub fn new(tree: &'a Tree, into: Into, token: Token) -> Self {
        Self { tree, into, temporary: temporary_name(token), written: Arc::default() }
    }

    /// The same with temporary names of its own, for one of several threads that work in one directory.
    #[must_use]
    pub fn part(&self, number: usize) -> Self {
        let mut temporary = self.temporary.clone();
        temporary.push(format!(".{number}"));
        Self { temporary, ..self.clone() }
    }

    /// How many bytes of contents were written so far, in whole pages.
    #[must_use]
    pub fn written(&self) -> u64 {
        self.written.load(Ordering::Relaxed)
    }

    /// What a tmpfs can hold and this file system cannot is left, and must not keep all the rest from being merged:
    /// anybody who may write to a directory of a target can make such an object.
    ///
    /// # Errors
    /// What was `done`, if its error is about anything but this one object; returned is why it cannot be there.
    pub fn unless_impossible(&self, path: &RelPath, done: Result<()>) -> Result<Option<(RelPath, String)>> {
        match done {
            Err(Error::System(error)) if self.is_impossible(&error)? => {
                Ok(Some((path.clone(), format!("{}: {}", error.call, error.source))))
            }
            other => other.map(|()| None),
        }
    }

    /// Whether an error is about this one object: too long a name or link, too large a file or attribute, too many links.
    fn is_impossible(&self, error: &SystemError) -> Result<bool> {
        Ok(match error.errno() {
            Some(Errno::NAMETOOLONG | Errno::FBIG | Errno::MLINK | Errno::TOOBIG | Errno::RANGE) => true,
            // No such attribute, a value that it cannot have, a kind of object that cannot have it.
            Some(Errno::NOTSUP | Errno::INVAL | Errno::PERM) => error.call == "setxattr",
            // ext4 says so of an attribute that does not fit beside the others, with all the room of the disk left.
            Some(Errno::NOSPC | Errno::DQUOT) if error.call == "setxattr" => {
                fstatvfs(self.tree.root()).at("fstatvfs", self.tree.path())?.f_bavail > 0
            }
            _ => false,
        })
    }

    /// Of an object `before` bytes were written, and now are `after`.
    fn count(&self, before: u64, after: u64) {
        self.written.fetch_add(pages(after) - pages(before), Ordering::Relaxed);
    }

    /// Makes the non-directory `node` be at `path`, replacing what is there.
    ///
    /// # Errors
    /// Any failing call; what was at `path` is then still there, or the new object is.
    pub fn put(&self, path: &RelPath, node: &Node, contents: &mut Contents) -> Result<()> {
        self.put_in(self.tree.open_parent(path)?.as_fd(), path, node, contents)
    }

    /// The same where the directory that holds `path` is open.
    ///
    /// # Errors
    /// As [`Place::put`].
    pub fn put_in(&self, parent: BorrowedFd<'_>, path: &RelPath, node: &Node, contents: &mut Contents) -> Result<()> {
        self.make(parent, path, &self.temporary, node, contents)?;
        self.replace(parent, path)
    }

    /// The same where nothing is at `path`. A cut may leave a part of it: only for a merge that will be done again, where
    /// it is as good as nothing.
    ///
    /// # Errors
    /// As [`Place::put`].
    pub fn put_new(&self, parent: BorrowedFd<'_>, path: &RelPath, node: &Node, contents: &mut Contents) -> Result<()> {
        self.make(parent, path, path.name(), node, contents)
    }

    /// Makes `node` under a name where nothing is, or what a cut left.
    fn make(
        &self,
        parent: BorrowedFd<'_>,
        path: &RelPath,
        name: &OsStr,
        node: &Node,
        contents: &mut Contents,
    ) -> Result<()> {
        let shown = self.tree.show(path);
        let create = || anew(parent, name, &shown, || self.create(parent, path, name, node, contents));
        let made = unprotected(parent, path, &shown, create);
        let made = made.and_then(|object| {
            let is_file = matches!(node.kind, Kind::File(_));
            let handle = if is_file { Handle::open(object.as_fd()) } else { Handle::of(object.as_fd()) };
            self.finish(&handle, &node.meta, false, parent, path)
        });
        if made.is_err() {
            // The error that led here is the one to report; what stays is swept by a redo.
            let _swept = unprotected(parent, path, &shown, || unlink_any(parent, name, &shown));
        }
        made
    }

    /// Makes `path` another name of what is at `leader`.
    ///
    /// # Errors
    /// Any failing call.
    pub fn link(&self, leader: &RelPath, path: &RelPath) -> Result<()> {
        let shown = self.tree.show(path);
        let (from, to) = (self.tree.open_parent(leader)?, self.tree.open_parent(path)?);
        unprotected(&to, path, &shown, || {
            anew(to.as_fd(), &self.temporary, &shown, || {
                Ok(linkat(&from, leader.name(), &to, &self.temporary, AtFlags::empty()).at("linkat", &shown)?)
            })
        })?;
        self.replace(to.as_fd(), path)?;
        // rename(2) does nothing when both names are the same inode already.
        unlink_any(to.as_fd(), &self.temporary, &shown)
    }

    /// Makes a directory be at `path`, replacing anything else; its metadata waits for [`Place::finish_dir`]. Returns
    /// whether it is a new one, and so empty.
    ///
    /// # Errors
    /// Any failing call.
    pub fn make_dir(&self, path: &RelPath) -> Result<bool> {
        if let Some(stat) = self.tree.stat(path)? {
            if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
                return Ok(false);
            }
            self.remove(path)?;
        }
        let shown = self.tree.show(path);
        let parent = self.tree.open_parent(path)?;
        unprotected(&parent, path, &shown, || Ok(mkdirat(&parent, path.name(), Mode::RWXU).at("mkdirat", &shown)?))?;
        Ok(true)
    }

    /// Gives the directory at `path` its metadata, its times last: everything below it must be done.
    ///
    /// # Errors
    /// Any failing call.
    pub fn finish_dir(&self, path: &RelPath, meta: &Meta, opaque: bool) -> Result<()> {
        let dir = self.tree.open_dir(path)?;
        let parent = self.tree.open_parent(path)?;
        let shown = self.tree.show(path);
        let finish = || self.finish(&Handle::open(dir.as_fd()), meta, opaque, parent.as_fd(), path);
        unprotected_object(&dir, &shown, finish)
    }

    /// Gives the open file at `path`, which has the right contents already, its metadata.
    ///
    /// # Errors
    /// Any failing call.
    pub fn finish_file(&self, file: &File, meta: &Meta, parent: BorrowedFd<'_>, path: &RelPath) -> Result<()> {
        let finish = || self.finish(&Handle::open(file.as_fd()), meta, false, parent, path);
        unprotected_object(file, &self.tree.show(path), finish)
    }

    /// Makes the file `old` at `path` have the contents of `node` by writing only what differs, and gives it its
    /// metadata. A cut leaves it half written: only for a merge that will be done again.
    ///
    /// # Errors
    /// Any failing call.
    pub fn update(
        &self,
        old: &File,
        node: &Node,
        parent: BorrowedFd<'_>,
        path: &RelPath,
        contents: &mut Contents,
    ) -> Result<()> {
        let Kind::File(content) = &node.kind else { return Ok(()) };
        let shown = self.tree.show(path);
        let open = || open_child_file(parent, path.name(), OFlags::RDWR).at("openat2", &shown);
        let file = unprotected_object(old, &shown, || Ok(open()?))?;
        let written = Patch::new(&file, content.size, &shown)?.apply(&mut |sink| contents(path, content, sink))?;
        self.count(0, written);
        self.finish_file(&file, &node.meta, parent, path)
    }

    /// Removes what is at `path`, with everything below it; nothing there is as good. Crosses no mount.
    ///
    /// # Errors
    /// Any failing call.
    pub fn remove(&self, path: &RelPath) -> Result<()> {
        match self.tree.open_parent(path) {
            Ok(parent) => remove_at(&parent, path.name(), &self.tree.show(path)),
            Err(error) if is_nothing(error.errno()) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Makes a whiteout at `path`. Only in an upper directory.
    ///
    /// # Errors
    /// Any failing call.
    pub fn whiteout(&self, path: &RelPath) -> Result<()> {
        self.remove(path)?;
        let parent = self.tree.open_parent(path)?;
        let device = makedev(0, 0);
        Ok(mknodat(&parent, path.name(), FileType::CharacterDevice, Mode::empty(), device)
            .at("mknodat", self.tree.show(path))?)
    }

    /// Removes the temporary files that a cut left in the directory at `path`.
    ///
    /// # Errors
    /// Any failing call.
    pub fn sweep(&self, path: &RelPath) -> Result<()> {
        let (dir, shown) = (self.tree.open_dir(path)?, self.tree.show(path));
        let names = list(dir.as_fd(), &shown)?;
        let ours = names.iter().filter(|name| name.as_bytes().starts_with(self.temporary.as_bytes()));
        ours.into_iter().try_for_each(|name| remove_at(&dir, name, &shown.join(name)))
    }

    /// Sets `chattr +i` and `+a`, after which nothing else can be changed. Other kinds than files and directories have no
    /// such flags, and must not be opened to find that out.
    ///
    /// # Errors
    /// Any failing call.
    pub fn protect(&self, path: &RelPath, Node { kind, meta, .. }: &Node) -> Result<()> {
        if !matches!(self.into, Into::Lower { .. }) || !(meta.immutable || meta.append_only) {
            return Ok(());
        }
        let object = match kind {
            Kind::Dir { .. } => self.tree.open_dir(path)?,
            Kind::File(_) => self.tree.open_file(path)?.into(),
            _ => return Ok(()),
        };
        let shown = self.tree.show(path);
        let mut flags = ioctl_getflags(&object).at("ioctl FS_IOC_GETFLAGS", &shown)?;
        flags.set(IFlags::IMMUTABLE, meta.immutable);
        flags.set(IFlags::APPEND, meta.append_only);
        Ok(ioctl_setflags(&object, flags).at("ioctl FS_IOC_SETFLAGS", &shown)?)
    }

    /// Writes lower's token, also where the root is protected, and so it stays.
    ///
    /// # Errors
    /// Any failing call.
    pub fn write_token(&self, token: Token) -> Result<()> {
        let (root, shown) = (self.tree.root(), self.tree.path());
        // A file system may have no flags.
        let flags = ioctl_getflags(root).unwrap_or(IFlags::empty());
        unprotected_object(root, shown, || Ok(token.write(&Handle::of(root), shown)?))?;
        if flags.intersects(IFlags::IMMUTABLE | IFlags::APPEND) {
            ioctl_setflags(root, flags).at("ioctl FS_IOC_SETFLAGS", shown)?;
        }
        Ok(())
    }

    /// Makes the object under a name. The descriptor is that of what was made, whoever may rename what in a directory of
    /// theirs.
    fn create(
        &self,
        parent: BorrowedFd<'_>,
        path: &RelPath,
        name: &OsStr,
        node: &Node,
        contents: &mut Contents,
    ) -> Result<OwnedFd> {
        let shown = self.tree.show(path);
        let private = Mode::RUSR | Mode::WUSR;
        let special = |kind, device| mknodat(parent, name, kind, private, device).at("mknodat", &shown);
        match &node.kind {
            Kind::File(content) => {
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                // Most files may be read by everybody, and are spared a chmod(2).
                let everybody = Mode::from_raw_mode(node.meta.mode as RawMode & 0o755);
                let mode = if everybody.contains(Mode::RGRP | Mode::ROTH) { everybody } else { private };
                let file = File::from(openat(parent, name, flags, mode).at("openat", &shown)?);
                let (mut end, mut written) = (0, 0);
                contents(path, content, &mut |at, bytes| {
                    end = at + bytes.len() as u64;
                    file.write_all_at(bytes, at).at("pwrite64", &shown)?;
                    let before = written;
                    written += bytes.len() as u64;
                    self.count(before, written);
                    Ok(())
                })?;
                if end != content.size {
                    file.set_len(content.size).at("ftruncate", &shown)?;
                }
                return Ok(file.into());
            }
            Kind::Symlink { target } => {
                symlinkat(OsStr::from_bytes(target), parent, name).at("symlinkat", &shown)?;
            }
            Kind::Fifo => special(FileType::Fifo, 0)?,
            Kind::Socket => special(FileType::Socket, 0)?,
            Kind::Device { block, major, minor } => {
                let kind = if *block { FileType::BlockDevice } else { FileType::CharacterDevice };
                special(kind, makedev(*major, *minor))?;
            }
            Kind::Dir { .. } => mkdirat(parent, name, Mode::RWXU).at("mkdirat", &shown)?,
        }
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let object = openat(parent, name, flags, Mode::empty()).at("openat", &shown)?;
        let stat = fstat(&object).at("fstat", &shown)?;
        let is_ours = stat.st_uid == geteuid().as_raw()
            && stat.st_nlink == 1
            && !matches!(FileType::from_raw_mode(stat.st_mode), FileType::RegularFile | FileType::Directory);
        if is_ours { Ok(object) } else { Err(Errno::STALE).at("openat", shown).map_err(crate::Error::from) }
    }

    /// Metadata, in the one order that works.
    fn finish(
        &self,
        handle: &Handle<'_>,
        meta: &Meta,
        opaque: bool,
        parent: BorrowedFd<'_>,
        path: &RelPath,
    ) -> Result<()> {
        let (shown, object) = (self.tree.show(path), handle.fd());
        let mut wanted = match self.into {
            Into::Lower { .. } | Into::Copy => meta.xattrs.clone(),
            Into::Upper => express(&Artefacts {
                xattrs: meta.xattrs.clone(),
                opaque,
                immutable: meta.immutable,
                append_only: meta.append_only,
            }),
        };
        let stat = fstat(object).at("fstat", &shown)?;
        if self.into == (Into::Lower { keep_user_xattrs: true }) {
            wanted.extend(user_xattrs(parent, path, stat.st_mode).at("listxattr", &shown)?);
        }
        let is_others = (stat.st_uid, stat.st_gid) != (meta.uid, meta.gid);
        if is_others {
            let (uid, gid) = (Uid::from_raw(meta.uid), Gid::from_raw(meta.gid));
            rustix::fs::chownat(object, "", Some(uid), Some(gid), AtFlags::EMPTY_PATH).at("fchownat", &shown)?;
        }
        let present = handle.read_all().at("listxattr", &shown)?;
        for name in present.keys().filter(|name| !wanted.contains_key(*name) && !is_never_data(name)) {
            handle.remove(name).at("removexattr", &shown)?;
        }
        // chown(2) and an ACL change the mode.
        let is_settled = stat.st_mode & 0o7777 == meta.mode && !is_others && present.is_empty();
        if !is_settled && FileType::from_raw_mode(stat.st_mode) != FileType::Symlink {
            handle.set_mode(Mode::from_raw_mode(meta.mode as RawMode)).at("chmod", &shown)?;
        }
        // Capabilities and ACLs once more although they may be there: chown and chmod changed them.
        for (name, value) in &wanted {
            match handle.write(name, value) {
                Err(_cannot_hold) if self.into == Into::Copy => {}
                // tmpfs before Linux 6.6; the overlay over it shows none either.
                Err(Errno::NOTSUP) if self.into == Into::Upper && name.starts_with(b"user.") => {}
                other => other.at("setxattr", &shown)?,
            }
        }
        let omit = Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_OMIT };
        let modified = Timespec { tv_sec: meta.mtime, tv_nsec: meta.mtime_nsec.into() };
        let times = Timestamps { last_access: omit, last_modification: modified };
        Ok(utimensat(object, "", &times, AtFlags::EMPTY_PATH).at("utimensat", &shown)?)
    }

    /// The last step of making an object: the temporary name becomes the real one.
    fn replace(&self, parent: BorrowedFd<'_>, path: &RelPath) -> Result<()> {
        let shown = self.tree.show(path);
        let rename = || Ok(renameat(parent, &self.temporary, parent, path.name()).at("renameat", &shown)?);
        match unprotected(parent, path, &shown, rename) {
            Err(crate::Error::System(error)) if error.errno() == Some(Errno::ISDIR) => {
                remove_at(parent, path.name(), &shown)?;
                unprotected(parent, path, &shown, rename)
            }
            other => other,
        }
    }
}

/// Makes something under a name, in the place of what a cut left there.
fn anew<T>(parent: BorrowedFd<'_>, name: &OsStr, shown: &Path, mut make: impl FnMut() -> Result<T>) -> Result<T> {
    match make() {
        Err(crate::Error::System(error)) if error.errno() == Some(Errno::EXIST) => {
            unlink_any(parent, name, shown)?;
            make()
        }
        other => other,
    }
}

/// Removes a name, if it is there.
fn unlink_any(parent: BorrowedFd<'_>, name: &OsStr, shown: &Path) -> Result<()> {
    match unlinkat(parent, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(error).at("unlinkat", shown).map_err(std::convert::Into::into),
    }
}

/// What the names of whatever is unfinished in a merge with this token begin with.
#[must_use]
pub fn temporary_name(token: Token) -> OsString {
    format!("{TEMPORARY}{token}").into()
}

/// The `user.*` attributes of what stands at `path`, if it is of the kind that replaces it and can have any.
fn user_xattrs(parent: BorrowedFd<'_>, path: &RelPath, mode: u32) -> rustix::io::Result<Xattrs> {
    let name = if path.is_root() { OsStr::new(".") } else { path.name() };
    let kind = FileType::from_raw_mode(mode);
    match statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(old) if FileType::from_raw_mode(old.st_mode) == kind => {}
        Ok(_) | Err(Errno::NOENT) => return Ok(Xattrs::new()),
        Err(error) => return Err(error),
    }
    let mut own = Handle::child(parent, name).read_all()?;
    own.retain(|name, _| name.starts_with(b"user."));
    Ok(own)
}

/// Runs `act`; if lower's `chattr +i` or `+a` on the directory or on the object forbids it, takes those away first.
fn unprotected<T>(parent: impl AsFd, path: &RelPath, shown: &Path, mut act: impl FnMut() -> Result<T>) -> Result<T> {
    match act() {
        Err(error) if is_forbidden(&error) => {}
        other => return other,
    }
    clear_flags(parent.as_fd(), shown)?;
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    if let Ok(object) = openat(&parent, path.name(), flags, Mode::empty()) {
        clear_flags(object.as_fd(), shown)?;
    }
    act()
}

fn unprotected_object<T>(object: impl AsFd, shown: &Path, act: impl Fn() -> Result<T>) -> Result<T> {
    match act() {
        Err(error) if is_forbidden(&error) => {}
        other => return other,
    }
    clear_flags(object.as_fd(), shown)?;
    act()
}

fn is_forbidden(error: &crate::Error) -> bool {
    matches!(error, crate::Error::System(error) if error.errno() == Some(Errno::PERM))
}

fn clear_flags(object: BorrowedFd<'_>, shown: &Path) -> Result<(), SystemError> {
    match ioctl_getflags(object) {
        Ok(flags) if flags.intersects(IFlags::IMMUTABLE | IFlags::APPEND) => {
            ioctl_setflags(object, flags - (IFlags::IMMUTABLE | IFlags::APPEND)).at("ioctl FS_IOC_SETFLAGS", shown)
        }
        // Other kinds of files have no flags.
        _ => Ok(()),
    }
}

/// Removes `name` and everything below it.
fn remove_at(parent: impl AsFd, name: &OsStr, shown: &Path) -> Result<()> {
    let parent = parent.as_fd();
    let path = RelPath::root().child(name);
    let unlink = |flags| match unlinkat(parent, name, flags) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(error).at("unlinkat", shown).map_err(crate::Error::from),
    };
    let stat = match statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT) => return Ok(()),
        other => other.at("fstatat", shown)?,
    };
    if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
        return unprotected(parent, &path, shown, || unlink(AtFlags::empty()));
    }
    let dir = open_child_dir(parent, name).at("openat2", shown)?;
    for child in list(dir.as_fd(), shown)? {
        remove_at(&dir, &child, &shown.join(&child))?;
    }
    unprotected(parent, &path, shown, || unlink(AtFlags::REMOVEDIR))
}
