//! `~/.cache` in RAM, for a session: a tmpfs, with the folders that are to be kept bound from disk.
//!
//! It is put together where nobody but root can reach it, and then attached in one step, by descriptor, to the directory
//! that was verified: a user sees the cache on disk or the whole one in RAM. Below a home everything is done as the user
//! (see `identity.rs`), so no race that a user may win leads to what that user could not do alone. What else stands in the
//! cache on disk stays there, hidden.

mod copy;
mod home;
mod identity;
mod keep;
mod users;

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs::{DirBuilder, File};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use early::apply::{copy_own_attributes, create_run_dir};
use early::sys::{self, FileSystem, Tree};
use ephemeral_overlay::Layout;
use ephemeral_overlay::attributes::Handle;
use ephemeral_overlay::error::At;
use ephemeral_overlay::layout::open_host_dir;
use ephemeral_overlay::mountinfo::Mount;
use ephemeral_overlay::state::Skipped;
use rustix::fs::{Gid, Mode, Uid, fchown, fstat, mkdirat};

use crate::error::{Error, Result};
use crate::in_use;
use crate::system::System;
use crate::tree::open_child_dir;
use home::{Cache, Home, Mounted, open_mounted, source};
use keep::Keep;
pub use users::User;

/// What happens that takes its time.
#[derive(Debug, Clone, Copy)]
pub enum Event<'a> {
    /// A folder is copied, to where it is kept from now on.
    Copy {
        /// From here.
        from: &'a Path,
        /// To there.
        to: &'a Path,
        /// About so many bytes.
        bytes: u64,
    },
    /// So many bytes more were copied.
    Copied(u64),
    /// That is over.
    End,
}

/// Whoever wants to know. Called from several threads.
pub type Tell<'a> = &'a (dyn Fn(Event<'_>) + Send + Sync);

/// What became of a cache.
#[derive(Debug)]
pub struct Done {
    /// Where it is.
    pub path: PathBuf,
    /// What it is now.
    pub state: State,
    /// What was wanted and not done.
    pub left: Vec<Skipped>,
}

/// What a cache is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// In RAM, since this call.
    Mounted,
    /// In RAM, as before.
    Already,
    /// On disk, since this call.
    Unmounted,
    /// On disk, as before: it is not to be in RAM, for this reason.
    OnDisk(&'static str),
    /// In RAM, as before: somebody uses it.
    InUse,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mounted => write!(f, "in RAM now"),
            Self::Already => write!(f, "in RAM already"),
            Self::Unmounted => write!(f, "on disk again"),
            Self::OnDisk(why) => write!(f, "on disk: {why}"),
            Self::InUse => write!(f, "left in RAM: it is in use"),
        }
    }
}

/// Brings the cache of `user` into RAM. Nothing changes where it is there already.
///
/// # Errors
/// [`Error::Left`] where it is no directory of the user's, or something is mounted there; any failing call. It is on disk
/// then, as before.
pub fn start(system: &System, user: &User, tell: Tell<'_>) -> Result<Done> {
    let on_disk = |why| Done { path: user.home.join(".cache"), state: State::OnDisk(why), left: Vec::new() };
    let Some(size) = system.config.tmpfs.user_cache else { return Ok(on_disk("tmpfs.user_cache is false")) };
    if let Some(why) = user.is_no_person() {
        return Ok(on_disk(why));
    }
    let (_lock, staging) = lock(&system.layout, user)?;
    let Some(home) = Home::open(&system.layout, user)? else { return Ok(on_disk("there is no such home")) };
    let path = home.cache_path();
    match home.mounted()? {
        Mounted::Nothing => {}
        Mounted::Ours(_) => return Ok(Done { path, state: State::Already, left: Vec::new() }),
        Mounted::Other(why) => return Err(Error::Left { path, why }),
    }
    system.check_mounted("what is kept of the caches", system.persist())?;
    let cache = home.cache()?;
    let (kept, left) = keep(system, &cache, tell);
    let info = rustix::system::sysinfo();
    let size = size.bytes(info.totalram.saturating_mul(u64::from(info.mem_unit)));
    let tree = assemble(&staging, &cache, size, &kept, home.is_no_exec()?)
        .map_err(|source| Error::Mount { path: path.clone(), source })?;
    attach(&tree, &home, &cache)?;
    Ok(Done { path, state: State::Mounted, left })
}

/// Brings the cache of `user` back to disk: what was in RAM is gone. Where somebody uses it everything stays.
///
/// # Errors
/// Any failing call.
pub fn stop(system: &System, user: &User) -> Result<Done> {
    let done = |path: PathBuf, state| Done { path, state, left: Vec::new() };
    let (_lock, _) = lock(&system.layout, user)?;
    let Some(home) = Home::open(&system.layout, user)? else {
        return Ok(done(user.home.join(".cache"), State::OnDisk("there is no such home")));
    };
    let path = home.cache_path();
    let Mounted::Ours(inner) = home.mounted()? else { return Ok(done(path, State::OnDisk("it was not in RAM"))) };
    let failed = |source| Error::Mount { path: path.clone(), source };
    if take_apart(&home, &inner).map_err(failed)? {
        return Ok(done(path, State::Unmounted));
    }
    let found = in_use::search(&system.layout, &user.home.join(".cache"))?;
    let users = found.users.into_iter().filter(|found| found.process.is_some());
    let left = users.map(|found| Skipped { path: path.clone(), reason: found.to_string() }).collect();
    Ok(Done { path, state: State::InUse, left })
}

/// One start or stop of a user's at a time; and where a cache is put together.
fn lock(layout: &Layout, user: &User) -> Result<(File, PathBuf)> {
    let staging = layout.user_cache(user.uid);
    create_run_dir(layout.run_dir()).map_err(|source| Error::Mount { path: layout.run_dir().to_path_buf(), source })?;
    DirBuilder::new().recursive(true).mode(0o700).create(&staging).at("mkdir", &staging)?;
    let path = staging.with_extension("lock");
    let lock = File::create(&path).at("open", &path)?;
    lock.lock().at("flock", &path)?;
    if sys::is_mounted(&staging) {
        // Of a start that was cut.
        sys::detach(&staging);
    }
    Ok((lock, staging))
}

/// A folder of a cache that is on disk.
type Bind = (OsString, OwnedFd);

/// Opens all folders that are to be kept: where they are kept, or else, said, where they were until now.
fn keep(system: &System, cache: &Cache<'_>, tell: Tell<'_>) -> (Vec<Bind>, Vec<Skipped>) {
    let (mut kept, mut left) = (Vec::new(), Vec::new());
    let names: BTreeSet<_> = system.config.persist.user_cache.iter().map(OsStr::new).collect();
    if names.is_empty() {
        return (kept, left);
    }
    let mut say = |name: &OsStr, reason| left.push(Skipped { path: cache.path().join(name), reason });
    let keep = Keep::open(system, cache, tell).map_err(words);
    for name in names {
        let brought = match &keep {
            Ok(keep) => keep.bring(name).map_err(words),
            Err(reason) => Err(reason.clone()),
        };
        match brought {
            Ok(found) => {
                found.note.into_iter().for_each(|note| say(name, note));
                kept.push((name.to_owned(), found.dir));
            }
            Err(reason) => {
                say(name, format!("it stays where it was: {reason}"));
                if let Ok(Some(old)) = cache.folder(name) {
                    kept.push((name.to_owned(), old));
                }
            }
        }
    }
    (kept, left)
}

/// Mounts everything at `staging`, and returns it, mounted nowhere.
fn assemble(staging: &Path, cache: &Cache<'_>, size: u64, kept: &[Bind], no_exec: bool) -> anyhow::Result<Tree> {
    let tmpfs = FileSystem {
        fs_type: "tmpfs",
        source: &source(cache.user().uid),
        options: vec![("size", size.to_string()), ("mode", "0700".into())],
        restricted: true,
    };
    let at = open_host_dir(staging)?;
    let root = tmpfs.mount_on(&|| Ok(at.try_clone()?), &|root| {
        for (name, _) in kept {
            let at = staging.join(name);
            mkdirat(root, name, Mode::RWXU).at("mkdirat", &at)?;
            // Whatever becomes of what is bound there, it is a folder of the user's.
            let (uid, gid) = (Uid::from_raw(cache.user().uid), Gid::from_raw(cache.user().gid));
            fchown(open_child_dir(root, name).at("openat2", &at)?, Some(uid), Some(gid)).at("fchown", &at)?;
        }
        copy_own_attributes(cache.dir(), root, cache.path())
    })?;
    let fill = || -> anyhow::Result<Tree> {
        // A copy of a shared mount would lose what is in it together with this one.
        sys::make_private(staging)?;
        for (name, dir) in kept {
            let at = staging.join(name);
            Tree::of(dir.try_clone()?)?.attach(open_child_dir(root.as_fd(), name).at("openat2", &at)?.as_fd())?;
            sys::make_private(&at)?;
            sys::restrict(&at, no_exec)?;
        }
        sys::restrict(staging, no_exec)?;
        Tree::with_mounts_below(root.as_fd())
    };
    let tree = fill();
    sys::detach(staging);
    tree
}

/// Attaches the cache in RAM to the one on disk.
fn attach(tree: &Tree, home: &Home<'_>, cache: &Cache<'_>) -> Result<()> {
    let path = home.cache_path();
    tree.attach(cache.dir()).map_err(|source| Error::Mount { path: path.clone(), source })?;
    let identity = |dir: BorrowedFd<'_>| fstat(dir).map(|stat| (stat.st_dev, stat.st_ino));
    let is_there = home.top().is_ok_and(|top| identity(top.as_fd()) == identity(tree.root()));
    if is_there {
        return Ok(());
    }
    // The user moved the directory in the meantime: what is mounted on it is nobody's cache.
    sys::detach(&Handle::of(tree.root()).path());
    Err(Error::Left { path, why: "it was moved while something was mounted on it".to_owned() })
}

/// Unmounts the cache in RAM with what is mounted in it; says whether that could be done. Otherwise all of it stays.
fn take_apart(home: &Home<'_>, inner: &[Mount]) -> anyhow::Result<bool> {
    let top = home.top()?;
    let mut apart: Vec<(OsString, Tree)> = Vec::new();
    let mut is_used = false;
    for mount in inner.iter().rev() {
        let name = mount.mount_point.strip_prefix("/").unwrap_or(&mount.mount_point).as_os_str();
        // A bind of ours shows a folder of that name; what a user mounted shows a root.
        let is_ours = mount.root.file_name() == Some(name);
        if !is_ours || !take_bind(top.as_fd(), name, &mut apart)? {
            is_used = true;
            break;
        }
    }
    drop(top);
    let unmounted = if is_used { Ok(false) } else { sys::unmount_unused(&home.cache_by_descriptor()) };
    if unmounted.as_ref().is_ok_and(|&is_gone| is_gone) {
        return unmounted;
    }
    let top = home.top()?;
    for (name, tree) in apart.iter().rev() {
        tree.attach(open_child_dir(top.as_fd(), name).at("openat2", home.cache_path().join(name))?.as_fd())?;
    }
    unmounted
}

/// Unmounts a folder that is kept, if nothing uses it, and keeps a copy of its mount.
fn take_bind(top: BorrowedFd<'_>, name: &OsStr, apart: &mut Vec<(OsString, Tree)>) -> anyhow::Result<bool> {
    let at = Handle::of(top).path().join(name);
    let copy = Tree::of(open_mounted(top, name).at("openat2", &at)?)?;
    let is_gone = sys::unmount_unused(&at)?;
    if is_gone {
        apart.push((name.to_owned(), copy));
    }
    Ok(is_gone)
}

fn words(error: Error) -> String {
    format!("{:#}", anyhow::Error::from(error))
}
