//! Who uses an overlay that is to be unmounted: whatever keeps it busy, and what an unmount would end without a word.
//!
//! Paths do not tell: a process may have the overlay below another root, in another mount namespace, or mounted nowhere
//! any more. The device number of its superblock does, or the mount number, for files that show another device.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use ephemeral_overlay::Layout;
use ephemeral_overlay::error::{At, SystemError};
use ephemeral_overlay::mountinfo::Mount;
use rustix::fs::{AtFlags, CWD, StatxFlags, makedev, statx};

use super::{Search, User, each_process, is_open_for_writing};
use crate::namespaces::{self, View, descriptors, directory, unless_gone};

/// Everybody who uses the overlay on `target`, this process included; nobody where none is mounted.
///
/// # Errors
/// When that cannot be found out.
pub fn search(layout: &Layout, target: &Path) -> Result<Search, SystemError> {
    let root = fs::canonicalize(layout.root()).at("realpath", layout.root())?;
    let target_path = root.join(target.strip_prefix("/").unwrap_or(target));
    let upper = layout.upper(target);
    let views = namespaces::views()?;
    let is_ours = |mount: &&Mount| mount.fs_type == "overlay" && mount.option("upperdir").as_ref() == Some(&upper);
    let here = views.iter().filter(|view| view.is_ours).flat_map(|view| &view.mounts);
    let Some(mount) = here.clone().find(|mount| is_ours(mount) && mount.mount_point == target_path).cloned() else {
        return Ok(Search::default());
    };
    let all = views.iter().flat_map(|view| &view.mounts);
    let mounts = all.filter(|other| other.device == mount.device).map(|mount| mount.id).collect();
    let overlay = Overlay { device: number(&mount.device), target: target_path, mounts };
    let mut found = Search { users: overlay.mounted(&views, &mount)?, hidden: Vec::new() };
    let sockets = sockets()?;
    let mut held = BTreeSet::new();
    each_process(&mut found, |process| overlay.used_by(process, &sockets, &mut held))?;
    for (_, path) in sockets.iter().filter(|(inode, path)| !held.contains(*inode) && overlay.has(path)) {
        found.users.push(User { process: None, path: path.clone(), how: "bound as a socket" });
    }
    Ok(found)
}

fn number(device: &str) -> u64 {
    let (major, minor) = device.split_once(':').unwrap_or_default();
    makedev(major.parse().unwrap_or_default(), minor.parse().unwrap_or_default())
}

struct Overlay {
    /// The device number of the superblock.
    device: u64,
    /// Where it is mounted, by the paths of this process.
    target: PathBuf,
    /// The numbers of its mounts, in all namespaces.
    mounts: BTreeSet<u64>,
}

impl Overlay {
    /// Whether `path`, or what a link in `/proc` leads to, is on the overlay.
    fn has(&self, path: &Path) -> bool {
        let flags = AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT;
        let found = statx(CWD, path, flags, StatxFlags::TYPE | StatxFlags::MNT_ID);
        found.is_ok_and(|found| {
            makedev(found.stx_dev_major, found.stx_dev_minor) == self.device || self.mounts.contains(&found.stx_mnt_id)
        })
    }

    fn used_by(
        &self,
        process: u32,
        sockets: &BTreeMap<u64, PathBuf>,
        held: &mut BTreeSet<u64>,
    ) -> Result<Vec<User>, SystemError> {
        let mut users = Vec::new();
        for (name, how) in [("cwd", "as its working directory"), ("root", "as its root"), ("exe", "as its program")] {
            let link = directory(process).join(name);
            if self.has(&link) {
                users.push(User::new(process, &fs::read_link(&link).unwrap_or_default(), how));
            }
        }
        users.extend(self.descriptors(process, sockets, held)?);
        let known: BTreeSet<_> = users.iter().map(|user| user.path.clone()).collect();
        users.extend(self.mappings(process)?.into_iter().filter(|user| !known.contains(&user.path)));
        Ok(users)
    }

    fn descriptors(
        &self,
        process: u32,
        sockets: &BTreeMap<u64, PathBuf>,
        held: &mut BTreeSet<u64>,
    ) -> Result<Vec<User>, SystemError> {
        let mut users = Vec::new();
        for (link, path) in descriptors(process)? {
            let text = path.to_string_lossy();
            let socket = text.strip_prefix("socket:[").and_then(|rest| rest.strip_suffix(']')?.parse().ok());
            if let Some(inode) = socket {
                // By the paths of whoever has it.
                let root = directory(process).join("root");
                if let Some(path) = sockets.get(&inode)
                    && held.insert(inode)
                    && self.has(&root.join(path.strip_prefix("/").unwrap_or(path)))
                {
                    users.push(User::new(process, path, "bound as a socket"));
                }
            } else if text.starts_with("anon_inode:") {
                if text.contains("notify") && self.is_watched_by(process, &link)? {
                    users.push(User::new(process, &self.target, "watched (inotify, fanotify)"));
                }
            } else if self.has(&link) {
                let is_file = fs::metadata(&link).is_ok_and(|found| found.is_file());
                let how = if is_file && is_open_for_writing(process, &link)? { "open for writing" } else { "open" };
                users.push(User::new(process, &path, how));
            }
        }
        Ok(users)
    }

    /// Whether a descriptor of inotify(7) or fanotify(7) has a mark on the overlay: an unmount takes it away without an
    /// error.
    fn is_watched_by(&self, process: u32, link: &Path) -> Result<bool, SystemError> {
        let path = directory(process).join("fdinfo").join(link.file_name().unwrap_or_default());
        let Some(text) = unless_gone(fs::read_to_string(&path), "read", &path)? else { return Ok(false) };
        Ok(text.lines().any(|line| {
            // inotify wd:1 ino:2a sdev:2d mask:100 ignored_mask:0; fanotify mnt_id:1c mflags:0 ...
            line.split(' ').any(|field| match field.split_once(':') {
                // The kernel's own form: twelve bits and twenty.
                Some(("sdev", value)) => u32::from_str_radix(value, 16)
                    .is_ok_and(|device| makedev(device >> 20, device & 0x000f_ffff) == self.device),
                Some(("mnt_id", value)) => {
                    u64::from_str_radix(value, 16).is_ok_and(|number| self.mounts.contains(&number))
                }
                _ => false,
            })
        }))
    }

    fn mappings(&self, process: u32) -> Result<Vec<User>, SystemError> {
        let files = directory(process).join("map_files");
        let Some(entries) = unless_gone(fs::read_dir(&files), "getdents64", &files)? else { return Ok(Vec::new()) };
        let mut paths = BTreeSet::new();
        for link in entries.flatten().map(|entry| entry.path()).filter(|link| self.has(link)) {
            paths.insert(fs::read_link(&link).unwrap_or_default());
        }
        Ok(paths.into_iter().map(|path| User::new(process, &path, "mapped")).collect())
    }

    /// What is mounted on the overlay, and where else it is mounted itself, but for copies that go with the unmount.
    fn mounted(&self, views: &[View], ours: &Mount) -> Result<Vec<User>, SystemError> {
        let root = fs::metadata("/").at("stat", "/")?;
        let mut users = Vec::new();
        let here = views.iter().find(|view| view.is_ours && view.has_root(&root));
        let parent = here.and_then(|view| view.mounts.iter().find(|mount| mount.id == ours.parent));
        for mount in here.iter().flat_map(|view| &view.mounts).filter(|mount| mount.id != ours.id) {
            let is_copy = self.mounts.contains(&mount.id);
            let is_inside = mount.mount_point.starts_with(&self.target) && mount.mount_point != self.target;
            let is_on_top = mount.parent == ours.id;
            if is_copy || is_inside || is_on_top {
                users.push(User { process: None, path: mount.mount_point.clone(), how: "is a mount of its own" });
            }
        }
        for view in views.iter().filter(|view| !view.is_ours) {
            for mount in view.mounts.iter().filter(|mount| self.mounts.contains(&mount.id)) {
                let above = view.mounts.iter().find(|above| above.id == mount.parent);
                // An unmount is passed on to the peers and the slaves of the mount on which it happens.
                let group = parent.and_then(|parent| parent.shared);
                let follows = group.is_some()
                    && above.is_some_and(|above| above.shared == group || above.master == group)
                    && mount.mount_point == ours.mount_point
                    && !view.mounts.iter().any(|other| other.parent == mount.id);
                if !follows {
                    users.push(User::new(view.process, &mount.mount_point, "mounted for itself"));
                }
            }
        }
        Ok(users)
    }
}

/// All bound sockets by their inode number in sockfs. One that was bound by a relative path cannot be found this way;
/// the unmount is refused for it.
fn sockets() -> Result<BTreeMap<u64, PathBuf>, SystemError> {
    let mut namespaces = BTreeSet::new();
    let mut found = BTreeMap::new();
    for process in namespaces::processes()? {
        let directory = directory(process);
        let Ok(namespace) = fs::read_link(directory.join("ns/net")) else { continue };
        if !namespaces.insert(namespace) {
            continue;
        }
        let path = directory.join("net/unix");
        let Some(text) = unless_gone(fs::read(&path), "read", &path)? else { continue };
        for line in text.split(|&byte| byte == b'\n') {
            // Num: RefCount Protocol Flags Type St Inode Path
            let Some(start) = line.iter().position(|&byte| byte == b'/') else { continue };
            let inode = String::from_utf8_lossy(&line[..start]).split_whitespace().nth(6).map(str::parse);
            let path = Path::new(OsStr::from_bytes(&line[start..]));
            if let Some(Ok(inode)) = inode {
                found.insert(inode, path.to_path_buf());
            }
        }
    }
    Ok(found)
}
