//! The folders of a cache that outlive a session: `<persist.root>/user-cache/UID/NAME`.
//!
//! What leads there is root's alone (0700): a folder is reached only through its bind, by the user whose it is. It comes
//! there by one rename, whole, from a landing that the user's threads can write to, and no process of the user:
//!
//! - `user-cache/moved/UID/NAME`, by a rename, where that is possible. It is the only copy then.
//! - `user-cache/copies/UID/NAME`, by a copy. When that is on disk the old folder is set aside, under a name that says so,
//!   and compared; then the copy is taken, and what was set aside is removed.
//!
//! So every state that a cut can leave says by its names what is to be done, and at every moment one of them has all of it.

use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use ephemeral_overlay::error::{At, SystemError};
use ephemeral_overlay::layout::USER_CACHE_DIR;
use rustix::fs::{
    AtFlags, Gid, Mode, RenameFlags, Uid, fchmod, fchown, fstat, fsync, mkdirat, renameat, renameat_with, statat,
};
use rustix::io::Errno;

use super::home::{Cache, owned_by};
use super::{Event, Tell, copy, words};
use crate::copy::place;
use crate::error::{Error, Result};
use crate::path::RelPath;
use crate::system::System;
use crate::tree::{Tree, open_child_dir};

/// What the name of a folder begins with that was copied, and is to be removed.
const ASIDE: &str = ".ephemeral-overlay-moved-";

/// Where the folders of one user are kept.
pub(super) struct Keep<'a> {
    cache: &'a Cache<'a>,
    tell: Tell<'a>,
    kept: Dir,
    moved: Dir,
    copies: Dir,
}

/// A folder that is kept.
#[derive(Debug)]
pub(super) struct Kept {
    /// It.
    pub(super) dir: OwnedFd,
    /// What is left of it elsewhere, in words.
    pub(super) note: Option<String>,
}

#[derive(Debug)]
struct Dir {
    fd: OwnedFd,
    path: PathBuf,
}

impl<'a> Keep<'a> {
    /// Opens the place, or makes it.
    pub(super) fn open(system: &System, cache: &'a Cache<'a>, tell: Tell<'a>) -> Result<Self> {
        let path = system.persist().join(USER_CACHE_DIR);
        let all = Dir { fd: system.layout.create_dir(&path)?, path: system.layout.below_root(&path) };
        owned_by(&[0], &fstat(&all.fd).at("fstat", &all.path)?, &all.path)?;
        fchmod(&all.fd, Mode::RWXU).at("fchmod", &all.path)?;
        let name = cache.user().uid.to_string();
        let landing = |stage: &str| -> Result<Dir> {
            let dir = all.child(OsStr::new(stage))?.child(OsStr::new(&name))?;
            let stat = fstat(&dir.fd).at("fstat", &dir.path)?;
            if stat.st_uid == 0 {
                // Nobody else can reach it.
                let (uid, gid) = (Uid::from_raw(cache.user().uid), Gid::from_raw(cache.user().gid));
                fchown(&dir.fd, Some(uid), Some(gid)).at("fchown", &dir.path)?;
            }
            Ok(dir)
        };
        Ok(Self {
            cache,
            tell,
            moved: landing("moved")?,
            copies: landing("copies")?,
            kept: all.child(OsStr::new(&name))?,
        })
    }

    /// Opens the folder `name`, after bringing it here if the cache on disk still has it; a new one where there is none.
    pub(super) fn bring(&self, name: &OsStr) -> Result<Kept> {
        let mut note = self.finish_earlier(name)?;
        let old = if let Some(dir) = self.open_kept(name)? {
            if self.cache.folder(name).is_ok_and(|old| old.is_some()) {
                let place = self.cache.path().join(name);
                note =
                    Some(format!("another one, {}, is hidden now; remove it, or move what you need", place.display()));
            }
            return Ok(Kept { dir, note });
        } else {
            self.cache.folder(name)?
        };
        match old {
            Some(old) => note = self.migrate(name, old)?.or(note),
            None => self.make(name)?,
        }
        match self.open_kept(name)? {
            Some(dir) => Ok(Kept { dir, note }),
            None => Err(Errno::NOENT).at("openat2", self.kept.path.join(name)).map_err(Error::from),
        }
    }

    fn open_kept(&self, name: &OsStr) -> Result<Option<OwnedFd>> {
        self.kept.folder(name, self.cache.user().uid)
    }

    /// Ends what a cut left; says what of it could not be removed.
    fn finish_earlier(&self, name: &OsStr) -> Result<Option<String>> {
        if exists(&self.moved.fd, name).at("fstatat", self.moved.path.join(name))? {
            self.settle_moved(name)?;
        }
        let aside = aside(name);
        let is_aside = self.cache.run(|cache| exists(cache, &aside)).at("fstatat", self.cache.path().join(&aside))?;
        if !is_aside {
            return Ok(None);
        }
        if self.open_kept(name)?.is_some() {
            return Ok(self.remove_aside(name));
        }
        self.put_back(name)?;
        Ok(None)
    }

    fn make(&self, name: &OsStr) -> Result<()> {
        let shown = self.copies.path.join(name);
        self.cache.run(|_| {
            // Of a copy that was cut, of what is gone since.
            remove(&self.copies.fd, name, &self.copies.path)?;
            Ok::<_, Error>(mkdirat(&self.copies.fd, name, Mode::RWXU).at("mkdirat", shown)?)
        })?;
        self.settle(&self.copies, name)
    }

    fn migrate(&self, name: &OsStr, old: OwnedFd) -> Result<Option<String>> {
        let shown = self.cache.path().join(name);
        let rename = |cache: BorrowedFd<'_>| {
            renameat(cache, name, &self.moved.fd, name)?;
            fsync(&self.moved.fd)?;
            fsync(cache)
        };
        match self.cache.run(rename) {
            Ok(()) => self.settle_moved(name).map(|()| None),
            Err(Errno::XDEV) => self.copy(name, old),
            Err(error) => Err(error).at("renameat", shown).map_err(Error::from),
        }
    }

    /// Takes what was moved; if it is not what it should be, somebody exchanged it on the way, and gets it back.
    fn settle_moved(&self, name: &OsStr) -> Result<()> {
        self.settle(&self.moved, name).inspect_err(|_| {
            // Or it stays in the landing, and the next start tries again; the error that led here is the one to report.
            let back = |cache: BorrowedFd<'_>| renameat_with(&self.moved.fd, name, cache, name, RenameFlags::NOREPLACE);
            let _stays = self.cache.run(back);
        })
    }

    fn copy(&self, name: &OsStr, old: OwnedFd) -> Result<Option<String>> {
        let (uid, tell) = (self.cache.user().uid, self.tell);
        let copied = self.cache.run(|cache| {
            match mkdirat(&self.copies.fd, name, Mode::RWXU) {
                Err(Errno::EXIST) => {}
                other => other.at("mkdirat", self.copies.path.join(name))?,
            }
            let to = open_child_dir(self.copies.fd.as_fd(), name).at("openat2", self.copies.path.join(name))?;
            let to = Tree::new(to, &self.copies.path.join(name));
            let from = Tree::new(old, &self.cache.path().join(name));
            copy::copy(&from, &to, uid, tell)?;
            // From here on nobody finds it by its name; what had it open is compared.
            self.set_aside(cache, name, &from)?;
            copy::compare(&from, &to)
        });
        tell(Event::End);
        if let Err(error) = copied.and_then(|()| self.settle(&self.copies, name)) {
            // What is incomplete must not take the room of others; what is on disk is in its old place.
            drop(self.cache.run(|_| remove(&self.copies.fd, name, &self.copies.path)));
            drop(self.put_back(name));
            return Err(error);
        }
        Ok(self.remove_aside(name))
    }

    fn set_aside(&self, cache: BorrowedFd<'_>, name: &OsStr, old: &Tree) -> Result<()> {
        let aside = aside(name);
        let shown = self.cache.path().join(&aside);
        renameat_with(cache, name, cache, &aside, RenameFlags::NOREPLACE).at("renameat2", &shown)?;
        fsync(cache).at("fsync", self.cache.path())?;
        let (moved, copied) = (
            statat(cache, &aside, AtFlags::SYMLINK_NOFOLLOW).at("fstatat", &shown)?,
            fstat(old.root()).at("fstat", &shown)?,
        );
        if (moved.st_dev, moved.st_ino) == (copied.st_dev, copied.st_ino) {
            return Ok(());
        }
        Err(Error::Left { path: old.path().to_path_buf(), why: "it was exchanged while it was copied".to_owned() })
    }

    /// What was set aside gets its name again, if it was.
    fn put_back(&self, name: &OsStr) -> Result<()> {
        let aside = aside(name);
        let back = self.cache.run(|cache| {
            renameat_with(cache, &aside, cache, name, RenameFlags::NOREPLACE)?;
            fsync(cache)
        });
        match back {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(error).at("renameat2", self.cache.path().join(&aside)).map_err(Error::from),
        }
    }

    /// The copy is what counts; says why not all of the old folder could be removed.
    fn remove_aside(&self, name: &OsStr) -> Option<String> {
        let removed = self.cache.run(|cache| remove(cache, &aside(name), self.cache.path()));
        removed.err().map(|error| format!("it was copied, and the old one could not be removed: {}", words(error)))
    }

    /// The last step: one rename, between directories of root's.
    fn settle(&self, from: &Dir, name: &OsStr) -> Result<()> {
        if from.folder(name, self.cache.user().uid)?.is_none() {
            return Err(Errno::NOENT).at("openat2", from.path.join(name)).map_err(Error::from);
        }
        let shown = self.kept.path.join(name);
        renameat_with(&from.fd, name, &self.kept.fd, name, RenameFlags::NOREPLACE).at("renameat2", &shown)?;
        fsync(&self.kept.fd).at("fsync", &self.kept.path)?;
        Ok(fsync(&from.fd).at("fsync", &from.path)?)
    }
}

impl Dir {
    /// A directory of root's in it, made if it is missing.
    fn child(&self, name: &OsStr) -> Result<Self, SystemError> {
        let path = self.path.join(name);
        match mkdirat(&self.fd, name, Mode::RWXU) {
            Ok(()) => fsync(&self.fd).at("fsync", &self.path)?,
            Err(Errno::EXIST) => {}
            Err(error) => return Err(error).at("mkdirat", path),
        }
        Ok(Self { fd: open_child_dir(self.fd.as_fd(), name).at("openat2", &path)?, path })
    }

    /// The folder of a user in it, if it is there.
    fn folder(&self, name: &OsStr, uid: u32) -> Result<Option<OwnedFd>> {
        let path = self.path.join(name);
        let dir = match open_child_dir(self.fd.as_fd(), name) {
            Err(Errno::NOENT) => return Ok(None),
            other => other.at("openat2", &path)?,
        };
        owned_by(&[uid], &fstat(&dir).at("fstat", &path)?, &path)?;
        Ok(Some(dir))
    }
}

fn aside(name: &OsStr) -> OsString {
    let mut aside = OsString::from(ASIDE);
    aside.push(name);
    aside
}

fn exists(dir: impl AsFd, name: &OsStr) -> Result<bool, Errno> {
    match statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(_) => Ok(true),
        Err(Errno::NOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Removes what is in a folder of the user's, and it; as the user.
fn remove(parent: impl AsFd, name: &OsStr, shown: &Path) -> Result<()> {
    let parent = parent.as_fd().try_clone_to_owned().at("dup", shown)?;
    let tree = Tree::new(parent, shown);
    let path = RelPath::root().child(name);
    let place = place(&tree);
    match place.remove(&path) {
        Err(Error::System(error)) if error.errno() == Some(Errno::ACCESS) => {
            copy::make_writable(&tree, &path)?;
            place.remove(&path)?;
        }
        other => other?,
    }
    Ok(fsync(tree.root()).at("fsync", shown)?)
}
