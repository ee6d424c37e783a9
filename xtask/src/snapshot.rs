//! A tree as a value, for comparisons: names, types, contents, modes, owners, times of modification, links, attributes.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use ephemeral_overlay::attributes::{Handle, Xattrs};
use ephemeral_overlay::overlay::is_never_data;
use xxhash_rust::xxh3::Xxh3;

/// A tree, by path relative to the system's root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Snapshot(BTreeMap<PathBuf, Object>);

#[derive(Debug, Clone, PartialEq, Eq)]
struct Object {
    /// Type and permissions.
    mode: u32,
    owner: (u32, u32),
    mtime: (i64, i64),
    content: Content,
    /// The first path, in order, that is the same file.
    linked_to: PathBuf,
    xattrs: Xattrs,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Content {
    File { size: u64, digest: u128 },
    Symlink(PathBuf),
    Device(u64),
    None,
}

impl Snapshot {
    /// Takes a snapshot of some directories below `root`.
    pub(crate) fn take(root: &Path, directories: &[&str]) -> Result<Self> {
        let mut all = BTreeMap::new();
        let mut first_names = BTreeMap::new();
        for directory in directories {
            visit(root, Path::new(directory), &mut all, &mut first_names)?;
        }
        Ok(Self(all))
    }

    /// How many objects there are.
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// What differs, one line for each path.
    pub(crate) fn differences(&self, found: &Self) -> Vec<String> {
        let mut lines = Vec::new();
        for (path, expected) in &self.0 {
            match found.0.get(path) {
                Some(object) if object == expected => {}
                Some(object) => lines.push(format!("{}: expected {expected:?}, found {object:?}", path.display())),
                None => lines.push(format!("{} is missing", path.display())),
            }
        }
        let more = found.0.keys().filter(|path| !self.0.contains_key(*path));
        lines.extend(more.map(|path| format!("{} should not exist", path.display())));
        lines
    }
}

fn visit(
    root: &Path,
    path: &Path,
    all: &mut BTreeMap<PathBuf, Object>,
    first_names: &mut BTreeMap<(u64, u64), PathBuf>,
) -> Result<()> {
    let full = root.join(path);
    let metadata = fs::symlink_metadata(&full).with_context(|| format!("lstat {}", full.display()))?;
    let kind = metadata.file_type();
    let content = if kind.is_file() {
        Content::File { size: metadata.len(), digest: digest(&full)? }
    } else if kind.is_symlink() {
        Content::Symlink(fs::read_link(&full)?)
    } else if kind.is_char_device() || kind.is_block_device() {
        Content::Device(metadata.rdev())
    } else {
        Content::None
    };
    let linked_to = first_names.entry((metadata.dev(), metadata.ino())).or_insert_with(|| path.to_path_buf()).clone();
    let object = Object {
        mode: metadata.mode(),
        owner: (metadata.uid(), metadata.gid()),
        mtime: (metadata.mtime(), metadata.mtime_nsec()),
        content,
        linked_to,
        xattrs: xattrs(&full)?,
    };
    all.insert(path.to_path_buf(), object);
    if kind.is_dir() {
        let mut names = fs::read_dir(&full)?.map(|entry| Ok(entry?.file_name())).collect::<Result<Vec<_>>>()?;
        names.sort_unstable();
        names.into_iter().try_for_each(|name| visit(root, &path.join(name), all, first_names))?;
    }
    Ok(())
}

fn digest(path: &Path) -> Result<u128> {
    let mut file = File::open(path).with_context(|| format!("open {}", path.display()))?;
    let mut hasher = Xxh3::new();
    let mut buffer = vec![0; 1 << 16];
    loop {
        match file.read(&mut buffer).with_context(|| format!("read {}", path.display()))? {
            0 => return Ok(hasher.digest128()),
            length => hasher.update(&buffer[..length]),
        }
    }
}

/// All attributes but our token, and but `user.*`, which RAM can hold only since Linux 6.6.
fn xattrs(path: &Path) -> Result<Xattrs> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Ok(Xattrs::new()) };
    let parent = File::open(parent).with_context(|| format!("open {}", parent.display()))?;
    let mut all =
        Handle::child(parent.as_fd(), name).read_all().with_context(|| format!("listxattr {}", path.display()))?;
    all.retain(|name, _| !is_never_data(name) && !name.starts_with(b"user."));
    Ok(all)
}
