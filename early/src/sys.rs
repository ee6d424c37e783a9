//! The only caller of the mount API. Kernel differences live here, newest first.
//!
//! A mount is prepared as an owned descriptor and attached last: an error before that leaves nothing behind.
//! Kernels without fsopen(2) (before 5.2, or a filter that refuses it) get mount(2) on the spot.

use std::ffi::CString;
use std::fmt::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use anyhow::{Context, Result, anyhow};
use ephemeral_overlay::attributes::Handle;
use rustix::fs::{AtFlags, CWD, Mode, OFlags, StatVfsMountFlags, StatxAttributes, StatxFlags, openat, statvfs, statx};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags,
    UnmountFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen, mount, mount_bind, mount_change,
    mount_remount, move_mount, open_tree, unmount,
};

/// How the root of a new mount is opened.
const ROOT: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

/// A mount of its own, reached by nothing but a descriptor.
const CLONE: OpenTreeFlags =
    OpenTreeFlags::OPEN_TREE_CLONE.union(OpenTreeFlags::OPEN_TREE_CLOEXEC).union(OpenTreeFlags::AT_EMPTY_PATH);

/// A file system to be mounted.
#[derive(Debug)]
pub struct FileSystem<'a> {
    /// Its type.
    pub fs_type: &'a str,
    /// What mountinfo shows as the source.
    pub source: &'a str,
    /// Its options. No value may hold a `,`: mount(2) could not express it.
    pub options: Vec<(&'a str, String)>,
    /// `nosuid,nodev,strictatime`, as for folders that everybody writes to.
    pub restricted: bool,
}

impl FileSystem<'_> {
    /// Mounts it on the directory that `at` opens, as the last thing before that; `fill` puts in what must be there from
    /// the start. Returns the root of the new mount.
    ///
    /// # Errors
    /// Whatever the kernel, `at` or `fill` says; it is not mounted then.
    pub fn mount_on(
        &self,
        at: &dyn Fn() -> Result<OwnedFd>,
        fill: &dyn Fn(BorrowedFd<'_>) -> Result<()>,
    ) -> Result<OwnedFd> {
        match self.prepare() {
            Ok(detached) => {
                // fsmount(2) gives an O_PATH descriptor, through which nothing can be changed; the mount goes when
                // that descriptor is closed before it is attached.
                let root = openat(&detached, ".", ROOT, Mode::empty()).context("openat")?;
                fill(root.as_fd())?;
                attach(detached.as_fd(), at()?.as_fd())?;
                Ok(root)
            }
            Err(Unprepared::NoSuchCall) => self.mount_at_once(at()?.as_fd(), fill),
            Err(Unprepared::Failed(error)) => Err(error),
        }
    }

    fn prepare(&self) -> Result<OwnedFd, Unprepared> {
        let context = match fsopen(self.fs_type, FsOpenFlags::FSOPEN_CLOEXEC) {
            Err(Errno::NOSYS) => return Err(Unprepared::NoSuchCall),
            other => other.with_context(|| format!("fsopen {}", self.fs_type))?,
        };
        let explain = |error: Errno, call: String| anyhow!("{call}: {error}{}", kernel_message(context.as_fd()));
        for (key, value) in &self.options {
            fsconfig_set_string(context.as_fd(), *key, value.as_str())
                .map_err(|error| explain(error, format!("fsconfig {}: {key}={value}", self.fs_type)))?;
        }
        fsconfig_set_string(context.as_fd(), "source", self.source)
            .map_err(|error| explain(error, format!("fsconfig {}: source", self.fs_type)))?;
        fsconfig_create(context.as_fd())
            .map_err(|error| explain(error, format!("fsconfig {}: create", self.fs_type)))?;
        let attributes = if self.restricted {
            MountAttrFlags::MOUNT_ATTR_NOSUID
                | MountAttrFlags::MOUNT_ATTR_NODEV
                | MountAttrFlags::MOUNT_ATTR_STRICTATIME
        } else {
            MountAttrFlags::empty()
        };
        Ok(fsmount(context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
            .with_context(|| format!("fsmount {}", self.fs_type))?)
    }

    fn mount_at_once(&self, at: BorrowedFd<'_>, fill: &dyn Fn(BorrowedFd<'_>) -> Result<()>) -> Result<OwnedFd> {
        let mut data = String::new();
        for (key, value) in &self.options {
            let comma = if data.is_empty() { "" } else { "," };
            write!(data, "{comma}{key}={value}")?;
        }
        let flags = if self.restricted {
            MountFlags::NOSUID | MountFlags::NODEV | MountFlags::STRICTATIME
        } else {
            MountFlags::empty()
        };
        // The path behind the descriptor: the root of the new mount must be looked up again, on top of `at`.
        let target = std::fs::read_link(Handle::of(at).path()).context("readlink /proc/self/fd")?;
        mount(self.source, &target, self.fs_type, flags, CString::new(data)?.as_c_str())
            .with_context(|| format!("mount {} on {}", self.fs_type, target.display()))?;
        let open = || -> Result<OwnedFd> {
            let root = openat(CWD, &target, ROOT, Mode::empty())?;
            fill(root.as_fd())?;
            Ok(root)
        };
        open().inspect_err(|_| detach(&target))
    }
}

enum Unprepared {
    /// The kernel has no fsopen(2).
    NoSuchCall,
    Failed(anyhow::Error),
}

impl From<anyhow::Error> for Unprepared {
    fn from(error: anyhow::Error) -> Self {
        Self::Failed(error)
    }
}

/// What the kernel wrote into the file-system context about the last failure.
fn kernel_message(context: BorrowedFd<'_>) -> String {
    let mut text = String::new();
    let mut buffer = [0; 512];
    while let Ok(length @ 1..) = rustix::io::read(context, &mut buffer[..]) {
        text.push_str("; kernel: ");
        text.push_str(String::from_utf8_lossy(&buffer[..length]).trim());
    }
    text
}

/// A directory of a mounted file system, to be bound somewhere, without anything mounted below it.
#[derive(Debug)]
pub enum Tree {
    /// A copy of its mount, attached to nothing yet.
    Detached(OwnedFd),
    /// The directory itself, where the kernel has no `open_tree`.
    Directory(OwnedFd),
}

impl Tree {
    /// Takes the directory behind a descriptor.
    ///
    /// # Errors
    /// Whatever `open_tree(2)` says.
    pub fn of(dir: OwnedFd) -> Result<Self> {
        match open_tree(&dir, "", CLONE) {
            Ok(tree) => Ok(Self::Detached(tree)),
            Err(Errno::NOSYS) => Ok(Self::Directory(dir)),
            Err(error) => Err(error).context("open_tree"),
        }
    }

    /// Takes the directory behind a descriptor with everything that is mounted below it.
    ///
    /// # Errors
    /// Whatever `open_tree(2)` says; there is no other way.
    pub fn with_mounts_below(dir: BorrowedFd<'_>) -> Result<Self> {
        Ok(Self::Detached(open_tree(dir, "", CLONE | OpenTreeFlags::AT_RECURSIVE).context("open_tree")?))
    }

    /// The directory: of the mount, once it is attached.
    #[must_use]
    pub fn root(&self) -> BorrowedFd<'_> {
        match self {
            Self::Detached(dir) | Self::Directory(dir) => dir.as_fd(),
        }
    }

    /// The number of its mount, as mountinfo shows it. `None` where the kernel does not tell, or it is no mount of its own.
    pub(crate) fn number(&self) -> Result<Option<u64>> {
        let Self::Detached(tree) = self else { return Ok(None) };
        let found = statx(tree, "", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID).context("statx STATX_MNT_ID")?;
        let is_told = found.stx_mask & StatxFlags::MNT_ID.bits() != 0;
        Ok(is_told.then_some(found.stx_mnt_id))
    }

    /// Binds it to the directory behind `at`.
    ///
    /// # Errors
    /// Whatever `move_mount(2)` says.
    pub fn attach(&self, at: BorrowedFd<'_>) -> Result<()> {
        match self {
            Self::Detached(tree) => attach(tree.as_fd(), at),
            Self::Directory(dir) => {
                mount_bind(Handle::of(dir.as_fd()).path(), Handle::of(at).path()).context("mount --bind")
            }
        }
    }
}

fn attach(tree: BorrowedFd<'_>, at: BorrowedFd<'_>) -> Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(tree, "", at, "", flags).context("move_mount")
}

/// Binds the directory behind `dir` to `at`, out of reach of every later mount on the original: in a systemd
/// initramfs all mounts are shared, and an overlay would be propagated into the bind (measured on 257 and 262).
///
/// # Errors
/// When it cannot be bound; nothing is mounted at `at` then.
pub fn bind_privately(dir: OwnedFd, at: &Path) -> Result<()> {
    let directory = openat(CWD, at, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    Tree::of(dir)?.attach(directory.as_fd()).with_context(|| format!("binding {}", at.display()))?;
    let settle = || {
        make_private(at)?;
        // A copy of a read-only mount would stay read-only when the root is remounted. Only the mount's own flag is
        // cleared: a read-only superblock is one still.
        read_only_bind(at, false)
    };
    settle().inspect_err(|_| detach(at))
}

/// Remounts the file system at `at`, read-only or writable; says whether `at` is a mount point at all.
pub(crate) fn remount(at: &Path, read_only: bool) -> Result<bool> {
    if !is_mounted(at) {
        return Ok(false);
    }
    let (flag, word) = if read_only { (MountFlags::RDONLY, "ro") } else { (MountFlags::empty(), "rw") };
    mount_remount(at, own_flags(at)? | flag, c"")
        .with_context(|| format!("mount -o remount,{word} {}", at.display()))?;
    Ok(true)
}

/// Makes the mount at `at` `nosuid,nodev`, and `noexec` where that is wanted; what else it is stays.
///
/// # Errors
/// Whatever mount(2) says.
pub fn restrict(at: &Path, no_exec: bool) -> Result<()> {
    let mut flags = MountFlags::BIND | MountFlags::NOSUID | MountFlags::NODEV | own_flags(at)?;
    flags.set(MountFlags::NOEXEC, no_exec || flags.contains(MountFlags::NOEXEC));
    let is_read_only = statvfs(at).is_ok_and(|found| found.f_flag.contains(StatVfsMountFlags::RDONLY));
    flags.set(MountFlags::RDONLY, is_read_only);
    mount_remount(at, flags, c"").with_context(|| format!("mount -o remount,bind,nosuid,nodev {}", at.display()))
}

/// Makes the mount at `at` read-only or writable; others of the same file system stay what they are.
pub(crate) fn read_only_bind(at: &Path, read_only: bool) -> Result<()> {
    let flag = if read_only { MountFlags::RDONLY } else { MountFlags::empty() };
    mount_remount(at, MountFlags::BIND | own_flags(at)? | flag, c"")
        .with_context(|| format!("mount -o remount,bind {}", at.display()))
}

/// Gives the tmpfs at `at` another size and number of inodes.
pub(crate) fn resize(at: &Path, size: u64, inodes: u64) -> Result<()> {
    let options = CString::new(format!("size={size},nr_inodes={inodes}"))?;
    mount_remount(at, own_flags(at)?, options.as_c_str())
        .with_context(|| format!("mount -o remount,{} {}", options.to_string_lossy(), at.display()))
}

/// The flags of a mount that a remount would clear. Those about access times stay when none of them is given.
fn own_flags(at: &Path) -> Result<MountFlags> {
    let own = statvfs(at).with_context(|| format!("statvfs {}", at.display()))?.f_flag;
    let kept = [
        (StatVfsMountFlags::NOSUID, MountFlags::NOSUID),
        (StatVfsMountFlags::NODEV, MountFlags::NODEV),
        (StatVfsMountFlags::NOEXEC, MountFlags::NOEXEC),
    ];
    Ok(kept.into_iter().filter(|(flag, _)| own.contains(*flag)).map(|(_, flag)| flag).collect())
}

/// Whether something is mounted at `at`.
#[must_use]
pub fn is_mounted(at: &Path) -> bool {
    let found = statx(CWD, at, AtFlags::empty(), StatxFlags::empty());
    found.is_ok_and(|found| found.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
}

/// Takes the mount at `at` out of its peer group.
///
/// # Errors
/// Whatever mount(2) says.
pub fn make_private(at: &Path) -> Result<()> {
    mount_change(at, MountPropagationFlags::PRIVATE).with_context(|| format!("mount --make-private {}", at.display()))
}

/// Takes what is mounted at `at` away, if nothing uses it; says whether it is gone. A symlink is not followed.
///
/// # Errors
/// Whatever umount(2) says, save that it is in use.
pub fn unmount_unused(at: &Path) -> Result<bool> {
    match unmount(at, UnmountFlags::NOFOLLOW) {
        Ok(()) => Ok(true),
        Err(Errno::BUSY) => Ok(false),
        Err(error) => Err(error).with_context(|| format!("umount {}", at.display())),
    }
}

/// Takes a mount of ours away again, while undoing a step that failed.
pub fn detach(at: &Path) {
    // Nothing uses it yet, and the failure that led here is the one that is reported.
    let _reported_already = unmount(at, UnmountFlags::DETACH);
}
