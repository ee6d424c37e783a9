//! What is in use, in the whole machine: one pass over `/proc`, made when it is first asked for.
//!
//! Only the inodes of the folders' own file systems are kept, so that a question is one look into a set.

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use ephemeral_overlay::error::{At, SystemError};
use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, StatxFlags, makedev, openat, statx};
use rustix::io::Errno;

use super::walk::Folder;
use crate::error::Result;
use crate::namespaces::{self, directory, unless_gone};

/// Looks out for who uses what.
#[derive(Debug)]
pub(super) struct Lookout<'a> {
    folders: &'a [Folder],
    used: Option<Used>,
}

impl<'a> Lookout<'a> {
    /// For these folders.
    pub(super) fn new(folders: &'a [Folder]) -> Self {
        Self { folders, used: None }
    }

    /// Whether the inode is in use, or the path below a folder is mounted, or has a mount on it, anywhere.
    pub(super) fn is_used(&mut self, inode: (u64, u64), path: &Path) -> Result<bool> {
        let used = self.used()?;
        Ok(used.inodes.contains(&inode) || used.mounted.contains(path.as_os_str()))
    }

    /// Whether somebody has locked the inode.
    pub(super) fn is_locked(&mut self, inode: (u64, u64)) -> Result<bool> {
        Ok(self.used()?.locked.contains(&inode))
    }

    /// The processes that could not be looked at.
    pub(super) fn hidden(self) -> Vec<u32> {
        self.used.map(|used| used.hidden).unwrap_or_default()
    }

    fn used(&mut self) -> Result<&Used> {
        Ok(match &mut self.used {
            Some(used) => used,
            unknown => unknown.insert(Used::search(self.folders)?),
        })
    }
}

/// What was found.
#[derive(Debug, Default)]
struct Used {
    devices: HashSet<u64>,
    inodes: HashSet<(u64, u64)>,
    locked: HashSet<(u64, u64)>,
    /// Paths below the folders, as their configuration has them; by their bytes, which are hashed faster than a path.
    mounted: HashSet<OsString>,
    hidden: Vec<u32>,
}

impl Used {
    fn search(folders: &[Folder]) -> Result<Self, SystemError> {
        let devices = folders.iter().map(|folder| folder.device).collect();
        let mut used = Self { devices, ..Self::default() };
        for process in namespaces::processes()? {
            match used.process(process) {
                Err(error) if matches!(error.errno(), Some(Errno::ACCESS | Errno::PERM)) => used.hidden.push(process),
                other => other?,
            }
        }
        used.locks()?;
        used.loops()?;
        used.mounts(folders)?;
        Ok(used)
    }

    /// What one process uses. Threads may have a working directory of their own, and go on when the first one has ended.
    fn process(&mut self, process: u32) -> Result<(), SystemError> {
        let path = directory(process);
        self.link(&path.join("exe"))?;
        let any = self.descriptors(&path, process == std::process::id())?;
        self.mappings(&path)?;
        let tasks = path.join("task");
        let Some(entries) = unless_gone(fs::read_dir(&tasks), "getdents64", &tasks)? else { return Ok(()) };
        for task in entries.flatten().map(|entry| entry.path()) {
            self.link(&task.join("cwd"))?;
            self.link(&task.join("root"))?;
            if !any {
                self.descriptors(&task, false)?;
                self.mappings(&task)?;
            }
        }
        Ok(())
    }

    fn link(&mut self, link: &Path) -> Result<(), SystemError> {
        let found = inode(CWD, link.as_os_str()).map_err(Into::into);
        if let Some((inode, _)) = unless_gone(found, "statx", link)? {
            self.add(inode);
        }
        Ok(())
    }

    /// Whether there were any. Of our own, the directories are those of the pass itself.
    fn descriptors(&mut self, process: &Path, own: bool) -> Result<bool, SystemError> {
        let path = process.join("fd");
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let open = openat(CWD, &path, flags, Mode::empty()).map_err(Into::into);
        let Some(dir) = unless_gone(open, "openat", &path)? else { return Ok(false) };
        let mut any = false;
        for entry in Dir::read_from(&dir).at("getdents64", &path)? {
            // What was closed since is no use; so is all that a process has which ended.
            let Ok(entry) = entry else { break };
            if entry.file_type() != FileType::Symlink {
                continue;
            }
            any = true;
            if let Ok((inode, kind)) = inode(dir.as_fd(), entry.file_name())
                && !(own && kind == FileType::Directory)
            {
                self.add(inode);
            }
        }
        Ok(any)
    }

    fn mappings(&mut self, process: &Path) -> Result<(), SystemError> {
        let path = process.join("maps");
        let Some(text) = unless_gone(fs::read(&path), "read", &path)? else { return Ok(()) };
        for line in text.split(|&byte| byte == b'\n') {
            // 7f..-7f.. rw-s 00000000 00:1b 12 /tmp/x
            let mut fields = line.splitn(6, |&byte| byte == b' ').skip(3);
            if let (Some(device), Some(ino)) = (fields.next(), fields.next())
                && ino != b"0"
                && let Some(inode) = inode_of(device, ino)
            {
                self.add(inode);
            }
        }
        Ok(())
    }

    fn add(&mut self, inode: (u64, u64)) {
        if self.devices.contains(&inode.0) {
            self.inodes.insert(inode);
        }
    }

    /// Locks of every kind, and leases.
    fn locks(&mut self) -> Result<(), SystemError> {
        let text = fs::read("/proc/locks").at("read", "/proc/locks")?;
        // 1: FLOCK  ADVISORY  WRITE 24354 00:1b:12 0 EOF
        for word in text.split(u8::is_ascii_whitespace) {
            let Some(colon) = word.iter().rposition(|&byte| byte == b':') else { continue };
            let inode = inode_of(&word[..colon], &word[colon + 1..]);
            self.locked.extend(inode.filter(|inode| self.devices.contains(&inode.0)));
        }
        Ok(())
    }

    /// Files that are disks: the kernel has them open itself.
    fn loops(&mut self) -> Result<(), SystemError> {
        let Some(devices) = unless_gone(fs::read_dir("/sys/block"), "getdents64", Path::new("/sys/block"))? else {
            return Ok(());
        };
        for device in devices.flatten() {
            let Ok(file) = fs::read(device.path().join("loop/backing_file")) else { continue };
            if let Ok((inode, _)) = inode(CWD, OsStr::from_bytes(file.trim_ascii_end())) {
                self.add(inode);
            }
        }
        Ok(())
    }

    /// Directories and files that are mounted elsewhere, and those that something is mounted on, in any namespace.
    fn mounts(&mut self, folders: &[Folder]) -> Result<(), SystemError> {
        for view in namespaces::views()? {
            for mount in &view.mounts {
                let device = device_of(mount.device.as_bytes(), 10);
                for folder in folders.iter().filter(|folder| Some(folder.device) == device) {
                    let below =
                        view.mounts.iter().filter_map(|other| other.mount_point.strip_prefix(&mount.mount_point).ok());
                    let inside = below.map(|path| mount.root.join(path)).chain([mount.root.clone()]);
                    let below =
                        inside.filter_map(|path| Some(folder.path.join(path.strip_prefix(&folder.inside).ok()?)));
                    self.mounted.extend(below.map(PathBuf::into_os_string));
                }
            }
        }
        Ok(())
    }
}

/// The inode that a link leads to, and its type. No file system is asked that may not answer.
fn inode(dir: impl AsFd, name: impl rustix::path::Arg) -> rustix::io::Result<((u64, u64), FileType)> {
    let found = statx(dir, name, AtFlags::STATX_DONT_SYNC, StatxFlags::INO | StatxFlags::TYPE)?;
    let kind = FileType::from_raw_mode(found.stx_mode.into());
    Ok(((makedev(found.stx_dev_major, found.stx_dev_minor), found.stx_ino), kind))
}

/// `00:1b` and `12`.
fn inode_of(device: &[u8], ino: &[u8]) -> Option<(u64, u64)> {
    Some((device_of(device, 16)?, std::str::from_utf8(ino).ok()?.parse().ok()?))
}

fn device_of(text: &[u8], radix: u32) -> Option<u64> {
    let (major, minor) = std::str::from_utf8(text).ok()?.split_once(':')?;
    Some(makedev(u32::from_str_radix(major, radix).ok()?, u32::from_str_radix(minor, radix).ok()?))
}
