//! A home, and the cache in it. Both are the user's, who may exchange anything in them at any moment: what is done in them
//! is done as the user, relative to descriptors, through no symlink and over no mount.

use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use ephemeral_overlay::Layout;
use ephemeral_overlay::attributes::Handle;
use ephemeral_overlay::error::At;
use ephemeral_overlay::mountinfo::{self, Mount};
use rustix::fs::{
    AtFlags, Mode, OFlags, ResolveFlags, Stat, StatVfsMountFlags, StatxAttributes, StatxFlags, fstat, fstatvfs,
    mkdirat, openat2, statx,
};
use rustix::io::Errno;

use super::identity::Identity;
use super::users::User;
use crate::error::{Error, Result};
use crate::tree::open_child_dir;

/// The name of the cache in a home.
const CACHE: &str = ".cache";

/// What the cache of a user in RAM says that it was mounted from.
pub(super) fn source(uid: u32) -> String {
    format!("ephemeral-overlay-cache-{uid}")
}

/// A user's home.
#[derive(Debug)]
pub(super) struct Home<'a> {
    user: &'a User,
    identity: Identity,
    dir: OwnedFd,
    /// Where it is, for messages and for the mount table.
    path: PathBuf,
    /// The root of the system, likewise.
    root: PathBuf,
}

/// What is mounted on a cache.
#[derive(Debug)]
pub(super) enum Mounted {
    /// Nothing.
    Nothing,
    /// Our tmpfs, with what is mounted in it.
    Ours(Vec<Mount>),
    /// Something that is left alone, in words.
    Other(String),
}

impl<'a> Home<'a> {
    /// Opens the home of `user`; `None` where there is none.
    pub(super) fn open(layout: &Layout, user: &'a User) -> Result<Option<Self>> {
        let shown = layout.below_root(&user.home);
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        let dir = match layout.open(&user.home, flags) {
            Err(error) if matches!(error.errno(), Some(Errno::NOENT | Errno::NOTDIR)) => return Ok(None),
            other => other?,
        };
        let identity = Identity::of(user)?;
        // A file system in user space may show its root to nobody else.
        let stat = identity.run(|| fstat(&dir)).at("fstat", &shown)?;
        owned_by(&[user.uid, 0], &stat, &shown)?;
        if stat.st_uid == 0 {
            // Through a symlink it could be any directory of root's.
            layout.open_dir(&user.home)?;
        }
        let path = std::fs::read_link(Handle::of(dir.as_fd()).path()).at("readlink", &shown)?;
        let root = std::fs::canonicalize(layout.root()).at("realpath", layout.root())?;
        Ok(Some(Self { user, identity, dir, path, root }))
    }

    /// Where the cache is.
    pub(super) fn cache_path(&self) -> PathBuf {
        self.path.join(CACHE)
    }

    /// The same by a path that leads through nothing but the home. The last component is not to be followed.
    pub(super) fn cache_by_descriptor(&self) -> PathBuf {
        Handle::of(self.dir.as_fd()).path().join(CACHE)
    }

    /// Whether nothing in the home may be executed.
    pub(super) fn is_no_exec(&self) -> Result<bool> {
        let found = fstatvfs(&self.dir).at("fstatvfs", &self.path)?;
        Ok(found.f_flag.contains(StatVfsMountFlags::NOEXEC))
    }

    /// What is mounted on the cache.
    pub(super) fn mounted(&self) -> Result<Mounted> {
        let table = std::fs::read("/proc/self/mountinfo").at("read", "/proc/self/mountinfo")?;
        let (all, path) = (mountinfo::parse(&table), self.cache_path());
        let source = PathBuf::from(source(self.user.uid));
        let is_ours = |mount: &Mount| mount.fs_type == "tmpfs" && mount.source == source;
        let (own, inner): (Vec<_>, Vec<_>) =
            mountinfo::below(&all, &path).into_iter().partition(|mount| mount.mount_point == Path::new("/"));
        Ok(match (own.last(), inner.first()) {
            // Out of an older mount namespace a user can rename it with what is mounted on it. One must be enough.
            (None, None) => {
                match all.iter().find(|mount| is_ours(mount) && mount.mount_point.starts_with(&self.root)) {
                    Some(moved) => Mounted::Other(format!("it was moved to {}", moved.mount_point.display())),
                    None => Mounted::Nothing,
                }
            }
            (None, Some(inner)) => {
                let at = path.join(inner.mount_point.strip_prefix("/").unwrap_or(Path::new("")));
                Mounted::Other(format!("{} is mounted in it", at.display()))
            }
            (Some(own), _) if is_ours(own) => Mounted::Ours(inner),
            (Some(own), _) => Mounted::Other(format!("something is mounted there already ({})", own.fs_type)),
        })
    }

    /// Opens the cache on disk, made if it is missing.
    pub(super) fn cache(&'a self) -> Result<Cache<'a>> {
        let path = self.cache_path();
        let open = || open_child_dir(self.dir.as_fd(), OsStr::new(CACHE));
        let opened = self.identity.run(|| match open() {
            Err(Errno::NOENT) => mkdirat(&self.dir, CACHE, Mode::RWXU).and_then(|()| open()),
            other => other,
        });
        let dir = or_left(opened, &path)?;
        owned_by(&[self.user.uid, 0], &fstat(&dir).at("fstat", &path)?, &path)?;
        Ok(Cache { home: self, dir, path })
    }

    /// Opens the root of what is mounted on the cache.
    pub(super) fn top(&self) -> Result<OwnedFd> {
        let opened = self.identity.run(|| open_mounted(self.dir.as_fd(), OsStr::new(CACHE)));
        Ok(opened.at("openat2", self.cache_path())?)
    }
}

/// The cache on disk.
#[derive(Debug)]
pub(super) struct Cache<'a> {
    home: &'a Home<'a>,
    dir: OwnedFd,
    path: PathBuf,
}

impl Cache<'_> {
    /// Whose it is.
    pub(super) fn user(&self) -> &User {
        self.home.user
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Its descriptor.
    pub(super) fn dir(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }

    /// Does something in it, as the user.
    pub(super) fn run<T: Send>(&self, act: impl FnOnce(BorrowedFd<'_>) -> T + Send) -> T {
        self.home.identity.run(|| act(self.dir.as_fd()))
    }

    /// Opens a folder in it, if it is there.
    pub(super) fn folder(&self, name: &OsStr) -> Result<Option<OwnedFd>> {
        let path = self.path.join(name);
        let dir = match self.run(|cache| open_child_dir(cache, name)) {
            Err(Errno::NOENT) => return Ok(None),
            other => or_left(other, &path)?,
        };
        owned_by(&[self.user().uid], &fstat(&dir).at("fstat", &path)?, &path)?;
        Ok(Some(dir))
    }
}

/// Opens the root of what is mounted on the directory `name`.
pub(super) fn open_mounted(parent: BorrowedFd<'_>, name: &OsStr) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = openat2(parent, name, flags, Mode::empty(), ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS)?;
    let found = statx(&dir, "", AtFlags::EMPTY_PATH, StatxFlags::empty())?;
    // It was exchanged: what is there now is not what the mount table says.
    if found.stx_attributes.contains(StatxAttributes::MOUNT_ROOT) { Ok(dir) } else { Err(Errno::STALE) }
}

/// What stands in the place of a directory is left alone.
fn or_left<T>(opened: Result<T, Errno>, path: &Path) -> Result<T> {
    let why = match opened {
        Err(Errno::LOOP) => "it is a symlink",
        Err(Errno::XDEV) => "something is mounted there",
        Err(Errno::NOTDIR) => "it is not a directory",
        Err(Errno::ACCESS | Errno::PERM) => "its user may not use it",
        other => return Ok(other.at("openat2", path)?),
    };
    Err(Error::Left { path: path.to_path_buf(), why: why.to_owned() })
}

/// Checks whose a directory is.
pub(super) fn owned_by(allowed: &[u32], stat: &Stat, path: &Path) -> Result<()> {
    if allowed.contains(&stat.st_uid) {
        return Ok(());
    }
    Err(Error::Left { path: path.to_path_buf(), why: format!("it belongs to the user {}", stat.st_uid) })
}
