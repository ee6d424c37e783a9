//! Who uses a directory that is to be covered by an overlay; and, in [`overlay`], an overlay that is to be unmounted.
//!
//! What is written through a descriptor that was opened before lands in lower, out of sight of everybody else, and under
//! a mounted overlay; a process that has a mount of its own there keeps the disk, or gets a writable overlay under its
//! read-only mount. Both were measured. So nothing that is in use is ever covered.

pub mod overlay;

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use ephemeral_overlay::Layout;
use ephemeral_overlay::error::{At, SystemError};
use ephemeral_overlay::mountinfo::Mount;
use rustix::io::Errno;

use crate::namespaces::{self, View, descriptors, directory, unless_gone};

/// The bits of `flags:` in fdinfo that tell how a file is open, and what they are when it is only read.
const O_ACCMODE: u32 = 3;
const O_RDONLY: u32 = 0;

/// How many users are named.
const NAMED_MAX: usize = 5;

/// Who uses a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// The number and the name of the process; `None` for a mount that all processes of our namespace have.
    pub process: Option<(u32, String)>,
    /// The file or directory.
    pub path: PathBuf,
    /// How it uses that.
    pub how: &'static str,
}

impl fmt::Display for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some((process, name)) = &self.process {
            write!(f, "process {process} ({name}) has ")?;
        }
        write!(f, "{} {}", self.path.display(), self.how)
    }
}

impl User {
    /// Whether it is a process of this name, of which the kernel keeps 15 bytes.
    #[must_use]
    pub fn is_called(&self, name: &str) -> bool {
        self.process.as_ref().is_some_and(|(_, called)| called == name)
    }

    fn new(process: u32, path: &Path, how: &'static str) -> Self {
        let name = fs::read(directory(process).join("comm")).unwrap_or_default();
        let name = String::from_utf8_lossy(&name).trim_end().to_owned();
        Self { process: Some((process, name)), path: path.to_path_buf(), how }
    }
}

/// What a search found.
#[derive(Debug, Default)]
pub struct Search {
    /// Who uses the directory.
    pub users: Vec<User>,
    /// Processes that even root may not look into, because a security module forbids it.
    pub hidden: Vec<u32>,
}

impl Search {
    /// The users in words, the first ones by name; `None` when there are none.
    #[must_use]
    pub fn words(&self) -> Option<String> {
        let mut words: Vec<_> = self.users.iter().take(NAMED_MAX).map(ToString::to_string).collect();
        if self.users.len() > NAMED_MAX {
            words.push(format!("and {} more", self.users.len() - NAMED_MAX));
        }
        (!words.is_empty()).then(|| words.join(", "))
    }
}

/// Everybody but this process who writes below `target`, has a directory there open or as its own, or has a mount of
/// its own there.
///
/// # Errors
/// When that cannot be found out.
pub fn search(layout: &Layout, target: &Path) -> Result<Search, SystemError> {
    let root = fs::canonicalize(layout.root()).at("realpath", layout.root())?;
    let place = Place(root.join(target.strip_prefix("/").unwrap_or(target)));
    let mut found = Search { users: place.mounts(layout)?, hidden: Vec::new() };
    each_process(
        &mut found,
        |process| {
            if process == std::process::id() { Ok(Vec::new()) } else { place.used_by(process) }
        },
    )?;
    Ok(found)
}

/// Adds what `used_by` tells of every process.
fn each_process(
    found: &mut Search,
    mut used_by: impl FnMut(u32) -> Result<Vec<User>, SystemError>,
) -> Result<(), SystemError> {
    for process in namespaces::processes()? {
        match used_by(process) {
            Ok(users) => found.users.extend(users),
            Err(error) if matches!(error.errno(), Some(Errno::ACCESS | Errno::PERM)) => found.hidden.push(process),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// The directory that is looked for, by the paths of this process.
struct Place(PathBuf);

impl Place {
    /// Whether `path`, which a link in `/proc` names, is in the directory. The text alone does not tell: it holds for
    /// the root of that process. What was deleted is nobody's any more.
    fn holds(&self, link: &Path, path: &Path) -> bool {
        let identity = |path: &Path| fs::metadata(path).ok().map(|found| (found.dev(), found.ino()));
        path.starts_with(&self.0) && identity(path).is_some_and(|found| Some(found) == identity(link))
    }

    fn used_by(&self, process: u32) -> Result<Vec<User>, SystemError> {
        Ok([self.links(process)?, self.descriptors(process)?, self.mappings(process)?].concat())
    }

    fn links(&self, process: u32) -> Result<Vec<User>, SystemError> {
        let mut users = Vec::new();
        for (name, how) in [("cwd", "as its working directory"), ("root", "as its root")] {
            let link = directory(process).join(name);
            let Some(path) = unless_gone(fs::read_link(&link), "readlink", &link)? else { continue };
            if self.holds(&link, &path) {
                users.push(User::new(process, &path, how));
            }
        }
        Ok(users)
    }

    fn descriptors(&self, process: u32) -> Result<Vec<User>, SystemError> {
        let mut users = Vec::new();
        for (link, path) in descriptors(process)? {
            if !self.holds(&link, &path) {
                continue;
            }
            // What is opened relative to a directory is opened below the overlay.
            if fs::metadata(&link).is_ok_and(|found| found.is_dir()) {
                users.push(User::new(process, &path, "open"));
            } else if is_open_for_writing(process, &link)? {
                users.push(User::new(process, &path, "open for writing"));
            }
        }
        Ok(users)
    }

    fn mappings(&self, process: u32) -> Result<Vec<User>, SystemError> {
        let mut users = Vec::new();
        let maps = directory(process).join("maps");
        let Some(text) = unless_gone(fs::read(&maps), "read", &maps)? else { return Ok(users) };
        for line in text.split(|&byte| byte == b'\n') {
            // 7f..-7f.. rw-s 00000000 fe:01 12 /var/log/journal/...
            let mut fields = line.splitn(6, |&byte| byte == b' ');
            let (Some(range), Some([_, b'w', _, b's']), Some(path)) = (fields.next(), fields.next(), fields.nth(3))
            else {
                continue;
            };
            let path = PathBuf::from(OsString::from_vec(path.trim_ascii_start().to_vec()));
            let link = directory(process).join("map_files").join(OsStr::from_bytes(range));
            if self.holds(&link, &path) {
                users.push(User::new(process, &path, "mapped for writing"));
            }
        }
        Ok(users)
    }

    /// Mounts that show the directory or a part of it elsewhere, and those that cover a part of it.
    fn mounts(&self, layout: &Layout) -> Result<Vec<User>, SystemError> {
        let views = namespaces::views()?;
        let root = fs::metadata("/").at("stat", "/")?;
        let sees_our_paths = |view: &&View| view.has_root(&root);
        let ours = views.iter().find(|view| view.is_ours && sees_our_paths(view)).map_or(&[][..], |view| &view.mounts);
        let shown = ours.iter().rfind(|mount| mount.mount_point == self.innermost(ours)).map(|mount| {
            let inside = self.0.strip_prefix(&mount.mount_point).unwrap_or(Path::new(""));
            (mount.device.clone(), mount.root.join(inside))
        });
        let run_dir = fs::canonicalize(layout.run_dir()).unwrap_or_else(|_| layout.run_dir().to_path_buf());
        let mut users = Vec::new();
        for view in &views {
            let mut known = if view.is_ours { Vec::new() } else { ours.to_vec() };
            let on_our_paths = sees_our_paths(&view);
            if view.is_ours && !on_our_paths {
                // The same mounts, seen from a chroot.
                continue;
            }
            for mount in &view.mounts {
                if let Some(index) = known.iter().position(|known| is_same_mount(known, mount)) {
                    // Each of ours explains one of theirs.
                    known.swap_remove(index);
                    continue;
                }
                let is_own = on_our_paths && mount.mount_point.starts_with(&run_dir);
                // The file system of the target itself, which is what will be covered.
                let is_target = view.is_ours && mount.mount_point == self.0;
                let covers = on_our_paths && mount.mount_point.starts_with(&self.0);
                let shows = shown
                    .as_ref()
                    .is_some_and(|(device, root)| mount.device == *device && mount.root.starts_with(root));
                if !is_own && !is_target && (covers || shows) {
                    users.push(if view.is_ours {
                        User { process: None, path: mount.mount_point.clone(), how: "is a mount of its own" }
                    } else {
                        User::new(view.process, &mount.mount_point, "mounted for itself")
                    });
                }
            }
        }
        Ok(users)
    }

    /// The innermost mount point that the directory lies on.
    fn innermost(&self, mounts: &[Mount]) -> PathBuf {
        let above = mounts.iter().map(|mount| &mount.mount_point).filter(|point| self.0.starts_with(point));
        above.max_by_key(|point| point.components().count()).cloned().unwrap_or_default()
    }
}

fn is_same_mount(a: &Mount, b: &Mount) -> bool {
    (&a.device, &a.root, &a.mount_point) == (&b.device, &b.root, &b.mount_point)
}

fn is_open_for_writing(process: u32, link: &Path) -> Result<bool, SystemError> {
    let path = directory(process).join("fdinfo").join(link.file_name().unwrap_or_default());
    let text = match fs::read_to_string(&path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
        other => other.at("read", &path)?,
    };
    let flags = text.lines().find_map(|line| u32::from_str_radix(line.strip_prefix("flags:")?.trim(), 8).ok());
    // One that says nothing may be anything.
    Ok(flags.is_none_or(|flags| flags & O_ACCMODE != O_RDONLY))
}
