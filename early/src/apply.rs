//! Carries a plan out. A step that fails is undone alone and reported; the others go on, because each target is
//! whole by itself and the machine must boot.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::io::ErrorKind;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use ephemeral_overlay::attributes::Handle;
use ephemeral_overlay::error::At;
use ephemeral_overlay::layout::{RUN_DIR, RUN_LINK, open_host_dir};
use ephemeral_overlay::overlay::{self, is_never_data};
use ephemeral_overlay::state::{self, BootState, Skipped, TargetState};
use ephemeral_overlay::token::Token;
use ephemeral_overlay::{CHECKPOINT_FORMAT, Layout};
use rustix::fs::{
    Dir, FileType, Gid, Mode, OFlags, RawMode, Stat, Timespec, Timestamps, Uid, fchmod, fchown, fstat, futimens,
    mkdirat, openat, renameat, statvfs,
};

use crate::cover::Cover;
use crate::plan::{Keep, Plan, Step};
use crate::sys::{self, FileSystem, Tree};
use crate::utab;

/// With fewer free inodes than this a tmpfs is as good as full.
const FEW_INODES: u64 = 64;
/// How many it gets then. Each takes about 1 KiB of memory.
const MORE_INODES: u64 = 256;
/// How often it is tried again where others took them all.
const TRIES: usize = 8;

/// Unpacks the pending chain of a target into its upper directory.
pub type Unpack<'a> = &'a dyn Fn(&Path) -> Result<()>;

/// The state of a boot in which nothing was done yet.
///
/// # Errors
/// When the root cannot be looked at.
pub fn new_state(layout: &Layout, persist: &Path) -> Result<BootState> {
    let root = fstat(open_host_dir(layout.root())?).at("fstat", layout.root())?;
    Ok(BootState {
        version: state::VERSION,
        checkpoint_format: CHECKPOINT_FORMAT,
        root: (root.st_dev, root.st_ino),
        persist: persist.to_path_buf(),
        targets: Vec::new(),
        tmpfs: Vec::new(),
        deferred: Vec::new(),
        skipped: Vec::new(),
    })
}

/// Carries out `plan`, on top of what `state` says was done in this boot; returns what was not done.
///
/// # Errors
/// When the state cannot be kept.
pub fn apply(layout: &Layout, plan: Plan, mut state: BootState, unpack: Unpack<'_>) -> Result<Vec<Skipped>> {
    let earlier = state.skipped.len();
    state.skipped.extend(plan.skipped);
    for path in plan.deferred {
        if !state.deferred.contains(&path) {
            state.deferred.push(path);
        }
    }
    // Before the first mount and after each: an overlay that `syncd` does not know of would be lost without a word.
    state.write(&layout.boot_state())?;
    let mut executor = Executor { layout, unpack, ram: false, bound: BTreeSet::new(), to_the_end: Vec::new(), state };
    for step in plan.steps {
        if let Err((path, error)) = executor.execute(step) {
            executor.state.skipped.push(Skipped { path, reason: format!("{error:#}") });
        }
    }
    if let Err(error) = utab::keep_to_the_end(layout, &executor.to_the_end) {
        // The overlays are there; a shutdown may lose what is written after they were unmounted.
        executor.state.skipped.push(Skipped { path: layout.utab(), reason: format!("{error:#}") });
    }
    executor.state.write(&layout.boot_state())?;
    Ok(executor.state.skipped.split_off(earlier))
}

/// Creates the run directory, for root alone.
///
/// # Errors
/// When it cannot be created, or overlayfs could not name what is in it.
pub fn create_run_dir(run_dir: &Path) -> Result<()> {
    if run_dir.to_string_lossy().contains(['\\', ':', ',']) {
        bail!("the run directory {} must not contain '\\', ':' or ','", run_dir.display());
    }
    fs::DirBuilder::new().recursive(true).mode(0o700).create(run_dir).at("mkdir", run_dir)?;
    fchmod(open_host_dir(run_dir)?, Mode::RWXU).at("fchmod", run_dir)?;
    if run_dir == Path::new(RUN_DIR) {
        match symlink(RUN_DIR, RUN_LINK) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => Err(error).at("symlink", RUN_LINK)?,
            _ => {}
        }
    }
    Ok(())
}

struct Executor<'a> {
    layout: &'a Layout,
    unpack: Unpack<'a>,
    /// Our tmpfs is mounted.
    ram: bool,
    /// The targets whose lower is bound.
    bound: BTreeSet<PathBuf>,
    /// What must stay mounted until the last stage of a shutdown.
    to_the_end: Vec<PathBuf>,
    state: BootState,
}

impl Executor<'_> {
    /// Does one step; an error comes with the path that is skipped because of it.
    fn execute(&mut self, step: Step) -> Result<(), (PathBuf, anyhow::Error)> {
        match step {
            Step::Ram { size, inodes } => self.ram(size, inodes).map_err(|error| (self.layout.ram(), error)),
            Step::Store(path) => self.store(&path).map_err(|error| (path, error)),
            Step::Lower { target, token } => self.lower(&target, token).map_err(|error| (target, error)),
            // The reason was given when its lower, or the tmpfs, failed.
            Step::Overlay { target, .. } if !self.ram || !self.bound.contains(&target) => {
                sys::detach(&self.layout.lower(&target));
                Err((target, anyhow::anyhow!("what it needs could not be mounted (see above)")))
            }
            Step::Overlay { target, unpack, passthrough } => {
                self.overlay(&target, unpack, &passthrough).map_err(|error| (target, error))
            }
            Step::Tmpfs { path, size, skeleton, keep } => {
                self.tmpfs(&path, size, skeleton, &keep).map_err(|error| (path, error))
            }
        }
    }

    fn ram(&mut self, size: u64, inodes: u64) -> Result<()> {
        let at = self.layout.ram();
        if sys::is_mounted(&at) {
            self.ram = true;
            return Ok(());
        }
        let dir = create_dir(&at)?;
        let tmpfs = FileSystem {
            fs_type: "tmpfs",
            source: "ephemeral-overlay",
            options: vec![("size", size.to_string()), ("nr_inodes", inodes.to_string()), ("mode", "0700".into())],
            restricted: false,
        };
        tmpfs.mount_on(&|| Ok(dir.try_clone()?), &|_| Ok(()))?;
        sys::make_private(&at).inspect_err(|_| sys::detach(&at))?;
        self.ram = true;
        Ok(())
    }

    fn store(&mut self, path: &Path) -> Result<()> {
        let at = self.layout.store_bind();
        if sys::is_mounted(&at) {
            return Ok(());
        }
        let dir = match self.layout.create_dir(path) {
            // The root will be writable by the time that `syncd` needs a store.
            Err(error) if error.errno() == Some(rustix::io::Errno::ROFS) => return Ok(()),
            other => other?,
        };
        let stat = fstat(&dir).at("fstat", path)?;
        if stat.st_mode & 0o7777 != 0o700 {
            fchmod(&dir, Mode::RWXU).at("fchmod", path)?;
        }
        create_dir(&at)?;
        sys::bind_privately(dir, &at)
    }

    fn lower(&mut self, target: &Path, token: bool) -> Result<()> {
        let dir = self.layout.open_dir(target)?;
        let at = self.layout.lower(target);
        create_dir(&at)?;
        if sys::is_mounted(&at) {
            // Of a time in this boot when the target was in RAM before. A bind made anew, of a mount that is shared by now,
            // would pass the overlay on to its copies in other namespaces (measured on systemd 257).
            let identity = |dir: BorrowedFd<'_>| fstat(dir).map(|stat| (stat.st_dev, stat.st_ino));
            if identity(open_host_dir(&at)?.as_fd()) == identity(dir.as_fd()) {
                self.bound.insert(target.to_path_buf());
                return Ok(());
            }
            sys::detach(&at);
        }
        let handle = Handle::of(dir.as_fd());
        if Token::read(&handle, target)?.is_none() && token {
            // On a root that is still read-only the first merge does it; no checkpoint depends on it.
            drop(Token::random()?.write(&handle, target));
        }
        sys::bind_privately(dir, &at)?;
        self.bound.insert(target.to_path_buf());
        Ok(())
    }

    fn overlay(&mut self, target: &Path, unpack: bool, passthrough: &[PathBuf]) -> Result<()> {
        let (lower, upper, work) = (self.layout.lower(target), self.layout.upper(target), self.layout.work(target));
        let mut mount = || {
            let upper_dir = with_room(self.layout, || create_dir(&work).and_then(|_| create_dir(&upper)))?;
            copy_own_attributes(open_host_dir(&lower)?.as_fd(), upper_dir.as_fd(), &upper)?;
            if unpack {
                (self.unpack)(target)?;
            }
            // Taken before the overlay hides them.
            let on_disk: Vec<_> = passthrough.iter().map(|path| (path, self.tree_on_disk(target, path))).collect();
            let note = |next: &BootState| Ok(next.write(&self.layout.boot_state())?);
            self.state = mount_overlay(self.layout, target, &self.state, &note)?;
            for (path, tree) in on_disk {
                match tree.and_then(|tree| tree.attach(self.layout.open_dir(path)?.as_fd())) {
                    Ok(()) => self.to_the_end.push(path.clone()),
                    Err(error) => {
                        let reason = format!("it is in RAM with the rest of {}: {error:#}", target.display());
                        self.state.skipped.push(Skipped { path: path.clone(), reason });
                    }
                }
            }
            Ok(())
        };
        match mount() {
            Ok(()) => {
                self.state.deferred.retain(|path| path != target);
                self.to_the_end.push(target.to_path_buf());
                Ok(())
            }
            Err(error) => {
                sys::detach(&lower);
                // Only RAM of ours, and the machine boots from disk for this target either way.
                drop(upper.parent().map(fs::remove_dir_all));
                Err(error)
            }
        }
    }

    /// A directory in a target's lower.
    fn tree_on_disk(&self, target: &Path, path: &Path) -> Result<Tree> {
        let lower = Layout::new(&self.layout.lower(target), None, None);
        let inside = path.strip_prefix(target).unwrap_or(path);
        Tree::of(lower.open_dir(inside)?)
    }

    fn tmpfs(&mut self, path: &Path, size: u64, skeleton: bool, keep: &[Keep]) -> Result<()> {
        let hidden = self.layout.open_dir(path)?;
        let tree = |keep: &Keep| Tree::of(self.layout.open_dir(keep.moved_from.as_ref().unwrap_or(&keep.source))?);
        let kept = keep.iter().map(tree).collect::<Result<Vec<_>>>()?;
        let tmpfs = FileSystem {
            fs_type: "tmpfs",
            source: "ephemeral-overlay",
            options: vec![("size", size.to_string())],
            restricted: true,
        };
        let root = tmpfs.mount_on(&|| Ok(hidden.try_clone()?), &|root| {
            if skeleton {
                copy_skeleton(hidden.as_fd(), root, path)?;
            }
            copy_own_attributes(hidden.as_fd(), root, path)
        })?;
        for (keep, tree) in keep.iter().zip(kept) {
            let bound = (|| {
                let at = match mkdirat(root.as_fd(), &keep.name, Mode::RWXU) {
                    Ok(()) | Err(rustix::io::Errno::EXIST) => open_child(root.as_fd(), OsStr::new(&keep.name))?,
                    Err(error) => return Err(error).at("mkdirat", path.join(&keep.name)).map_err(Into::into),
                };
                tree.attach(at.as_fd())
            })();
            if let Err(error) = bound {
                sys::detach(&self.layout.below_root(path));
                return Err(error);
            }
        }
        self.state.deferred.retain(|deferred| deferred != path);
        self.state.tmpfs.push(path.to_path_buf());
        keep.iter().try_for_each(|keep| self.move_cache(hidden.as_fd(), keep))
    }

    /// Moves a directory that is bound already to where it is kept from now on: the bind follows. It is the last
    /// thing that is done, so that no failure leaves the cache where nobody looks for it.
    fn move_cache(&self, hidden: BorrowedFd<'_>, keep: &Keep) -> Result<()> {
        if keep.moved_from.is_none() {
            return Ok(());
        }
        let parent = self.layout.create_dir(keep.source.parent().unwrap_or(Path::new("/")))?;
        Ok(renameat(hidden, &keep.name, parent, &keep.name).at("renameat", &keep.source)?)
    }
}

/// Mounts the overlay of `target` once more on what its upper directory holds, after it was unmounted in vain. A state
/// that cannot be written must not keep it from being seen: the overlay is in it already, if by another device number.
///
/// # Errors
/// When it cannot be mounted; that it could not be noted is told when it is.
pub fn mount_again(layout: &Layout, target: &Path, state: &mut BootState) -> Result<()> {
    let unnoted = RefCell::new(None);
    let note = |next: &BootState| {
        *unnoted.borrow_mut() = next.write(&layout.boot_state()).err();
        Ok(())
    };
    *state = mount_overlay(layout, target, state, &note)?;
    let unnoted = unnoted.into_inner();
    utab::keep_to_the_end(layout, &[target.to_path_buf()])?;
    unnoted.map_or(Ok(()), |error| Err(error.into()))
}

/// Does something that takes inodes of our tmpfs, a handful, and sees to it that it has them: a full one must not keep a
/// target from being shown that was in RAM already. It gets [`MORE_INODES`] then, even beyond `overlay.size`. Where others
/// take them all at the same moment it is done again.
///
/// # Errors
/// What `act` says at last.
pub fn with_room<T, E>(layout: &Layout, mut act: impl FnMut() -> Result<T, E>) -> Result<T, E> {
    let ram = layout.ram();
    // Without a limit both are 0.
    let short = || statvfs(&ram).ok().filter(|stat| stat.f_ffree < FEW_INODES && stat.f_files > 0);
    for _ in 0..TRIES {
        if let Some(stat) = short().filter(|_| sys::is_mounted(&ram)) {
            // Where that fails there may be enough all the same.
            drop(sys::resize(&ram, stat.f_blocks * stat.f_frsize, stat.f_files + MORE_INODES));
        }
        match act() {
            Err(_) if short().is_some() => {}
            done => return done,
        }
    }
    act()
}

/// Mounts an overlay on the directories that were made for it, and below it the cover; returns `state` with both, which was
/// noted before anybody could use the overlay: of one that nobody knows of nothing could be saved.
fn mount_overlay(
    layout: &Layout,
    target: &Path,
    state: &BootState,
    note: &dyn Fn(&BootState) -> Result<()>,
) -> Result<BootState> {
    let directories =
        [("lowerdir", layout.lower(target)), ("upperdir", layout.upper(target)), ("workdir", layout.work(target))];
    let mut options = directories.map(|(key, path)| (key, path.to_string_lossy().into_owned())).to_vec();
    options.extend(overlay::OPTIONS.map(|(key, value)| (key, value.to_owned())));
    let overlay = FileSystem { fs_type: "overlay", source: "ephemeral-overlay", options, restricted: false };
    let cover = Cover::prepare(layout, target, state)?;
    let next = RefCell::new(state.clone());
    let note_it = |root: BorrowedFd<'_>| {
        let device = fstat(root).at("fstat", target)?.st_dev;
        let device = format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device));
        let mut next = next.borrow_mut();
        let entry = TargetState { cover: cover.as_ref().map(|cover| cover.number), ..TargetState::new(target, device) };
        match next.entry(target) {
            Some(known) => {
                let cover = entry.cover.or(known.cover);
                *known = TargetState { pinned: known.pinned.take(), cover, ..entry };
            }
            None => next.targets.push(entry),
        }
        note(&next)
    };
    let at = || {
        cover.as_ref().map_or(Ok(()), |cover| cover.attach(layout, target))?;
        Ok(layout.open_dir(target)?)
    };
    // Overlayfs makes a directory of its own; without room for its attribute it would mount, and make none opaque.
    let mounted = with_room(layout, || overlay.mount_on(&at, &note_it));
    mounted.inspect_err(|_| {
        if let Some(cover) = &cover {
            cover.remove(layout, target);
        }
    })?;
    Ok(next.into_inner())
}

/// Lets our tmpfs grow.
///
/// # Errors
/// When the kernel refuses.
pub fn grow(layout: &Layout, size: u64, inodes: u64) -> Result<()> {
    sys::resize(&layout.ram(), size, inodes)
}

/// Creates a directory of ours (0700) in the run directory, with its parents, and opens it.
fn create_dir(path: &Path) -> Result<OwnedFd> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path).at("mkdir", path)?;
    Ok(open_host_dir(path)?)
}

/// Gives the directory `to` the mode, owner, times and attributes of the directory `from`; `path` is for messages.
///
/// # Errors
/// Any failing call.
pub fn copy_own_attributes(from: BorrowedFd<'_>, to: BorrowedFd<'_>, path: &Path) -> Result<()> {
    let stat = fstat(from).at("fstat", path)?;
    copy_owner_and_mode(&stat, to, path)?;
    let target = Handle::of(to);
    for (name, value) in Handle::of(from).read_all().at("listxattr", path)? {
        // Overlayfs would hide its own attributes of lower's root, and act on them in upper.
        if is_never_data(&name) || name.starts_with(overlay::PREFIX.as_bytes()) {
            continue;
        }
        match target.write(&name, &value) {
            // tmpfs has user.* only since 6.6; the merge keeps lower's (docs/overlayfs.md).
            Err(rustix::io::Errno::NOTSUP) if name.starts_with(b"user.") => {}
            other => other.at("setxattr", path)?,
        }
    }
    let times = Timestamps {
        last_access: Timespec { tv_sec: stat.st_atime, tv_nsec: stat.st_atime_nsec.try_into()? },
        last_modification: Timespec { tv_sec: stat.st_mtime, tv_nsec: stat.st_mtime_nsec.try_into()? },
    };
    Ok(futimens(to, &times).at("futimens", path)?)
}

fn copy_owner_and_mode(stat: &Stat, to: BorrowedFd<'_>, path: &Path) -> Result<()> {
    fchown(to, Some(Uid::from_raw(stat.st_uid)), Some(Gid::from_raw(stat.st_gid))).at("fchown", path)?;
    Ok(fchmod(to, Mode::from_raw_mode(stat.st_mode as RawMode & 0o7777)).at("fchmod", path)?)
}

/// Creates in `to` the directories that are in `from`, without files, so that packages find their folders. From below:
/// a directory's times and its default ACL come when everything in it stands.
fn copy_skeleton(from: BorrowedFd<'_>, to: BorrowedFd<'_>, path: &Path) -> Result<()> {
    for entry in Dir::read_from(from).at("getdents64", path)? {
        let entry = entry.at("getdents64", path)?;
        let name = OsStr::from_bytes(entry.file_name().to_bytes());
        if entry.file_type() != FileType::Directory || name == "." || name == ".." {
            continue;
        }
        let path = path.join(name);
        let source = open_child(from, name)?;
        mkdirat(to, name, Mode::RWXU).at("mkdirat", &path)?;
        let copy = open_child(to, name)?;
        copy_skeleton(source.as_fd(), copy.as_fd(), &path)?;
        copy_own_attributes(source.as_fd(), copy.as_fd(), &path)?;
    }
    Ok(())
}

fn open_child(dir: BorrowedFd<'_>, name: &OsStr) -> Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(openat(dir, name, flags, Mode::empty()).at("openat", Path::new(name))?)
}
