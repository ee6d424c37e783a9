//! Everything that one can see of a tree, as values to be compared.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fmt::Write;
use std::fs;
use std::hash::{DefaultHasher, Hasher};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use ephemeral_overlay::attributes::{Handle, Xattrs};
use ephemeral_overlay::overlay::is_never_data;

/// One object, as a user sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Object {
    kind: &'static str,
    mode: u32,
    owner: (u32, u32),
    mtime: (i64, i64),
    device: u64,
    content: Vec<u8>,
    xattrs: Xattrs,
    /// The first path of the link group that this one belongs to.
    group: Option<PathBuf>,
}

impl Object {
    /// Whether it is a socket.
    #[must_use]
    pub fn is_socket(&self) -> bool {
        self.kind == "socket"
    }
}

/// A tree, by path.
pub type Snapshot = BTreeMap<PathBuf, Object>;

/// Looks at everything at and below `root`; no symlink is followed, no FIFO or device is opened.
#[must_use]
pub fn take(root: &Path) -> Snapshot {
    let mut snapshot = Snapshot::new();
    let mut first_by_inode: BTreeMap<(u64, u64), PathBuf> = BTreeMap::new();
    let mut pending = vec![PathBuf::new()];
    while let Some(path) = pending.pop() {
        let full = if path.as_os_str().is_empty() { root.to_path_buf() } else { root.join(&path) };
        let stat = fs::symlink_metadata(&full).unwrap_or_else(|error| panic!("{}: {error}", full.display()));
        let kind = stat.file_type();
        let mut content = Vec::new();
        let name = if kind.is_dir() {
            let mut names: Vec<_> = fs::read_dir(&full).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            names.sort();
            pending.extend(names.iter().rev().map(|name| path.join(name)));
            "directory"
        } else if kind.is_file() {
            content = fs::read(&full).unwrap();
            "file"
        } else if kind.is_symlink() {
            content = fs::read_link(&full).unwrap().as_os_str().as_bytes().to_vec();
            "symlink"
        } else if kind.is_fifo() {
            "fifo"
        } else if kind.is_socket() {
            "socket"
        } else if kind.is_block_device() {
            "block device"
        } else {
            "character device"
        };
        let mut group = None;
        if !kind.is_dir() && stat.nlink() > 1 {
            group = Some(first_by_inode.entry((stat.dev(), stat.ino())).or_insert_with(|| path.clone()).clone());
        }
        let object = Object {
            kind: name,
            mode: stat.mode() & 0o7777,
            owner: (stat.uid(), stat.gid()),
            mtime: (stat.mtime(), stat.mtime_nsec()),
            device: if kind.is_block_device() || kind.is_char_device() { stat.rdev() } else { 0 },
            content,
            xattrs: xattrs(&full),
            group,
        };
        snapshot.insert(path, object);
    }
    // A name whose partners are all elsewhere is a file with one name.
    let mut members: BTreeMap<PathBuf, usize> = BTreeMap::new();
    for group in snapshot.values().filter_map(|object| object.group.clone()) {
        *members.entry(group).or_default() += 1;
    }
    for object in snapshot.values_mut() {
        object.group = object.group.take().filter(|group| members[group] > 1);
    }
    snapshot
}

fn xattrs(path: &Path) -> Xattrs {
    let (parent, name) = match path.file_name() {
        Some(name) => (path.parent().unwrap(), name),
        None => (path, OsStr::new(".")),
    };
    let parent = fs::File::open(parent).unwrap();
    let mut all = Handle::child(parent.as_fd(), name).read_all().unwrap();
    all.retain(|name, _| !is_never_data(name));
    all
}

/// Everything in it as text, a line for each object: for two machines that cannot see each other's trees.
#[must_use]
pub fn lines(snapshot: &Snapshot) -> Vec<String> {
    let digest = |content: &[u8]| {
        let mut hasher = DefaultHasher::new();
        hasher.write(content);
        hasher.finish()
    };
    let line = |(path, object): (&PathBuf, &Object)| {
        let name = path.as_os_str().as_bytes().escape_ascii();
        format!("{name} {} digest {:x}", show(Some(object)), digest(&object.content))
    };
    snapshot.iter().map(line).collect()
}

/// What differs, for a message; `None` when nothing does.
#[must_use]
pub fn difference(expected: &Snapshot, found: &Snapshot) -> Option<String> {
    let mut text = String::new();
    for path in expected.keys().chain(found.keys().filter(|path| !expected.contains_key(*path))) {
        let (expected, found) = (expected.get(path), found.get(path));
        if expected != found {
            writeln!(text, "{}\n  expected {}\n  found    {}", path.display(), show(expected), show(found)).unwrap();
        }
    }
    (!text.is_empty()).then_some(text)
}

fn show(object: Option<&Object>) -> String {
    let Some(object) = object else { return "nothing".to_owned() };
    // No character has more than four bytes.
    let beginning = &object.content[..object.content.len().min(4 * 40)];
    let shown: String = String::from_utf8_lossy(beginning).chars().take(40).collect();
    let xattrs: Vec<_> = object
        .xattrs
        .iter()
        .map(|(name, value)| format!("{}={}", String::from_utf8_lossy(name), String::from_utf8_lossy(value)))
        .collect();
    format!(
        "{} {:o} {:?} {:?} dev {} [{} bytes] {shown:?} {xattrs:?} links {:?}",
        object.kind,
        object.mode,
        object.owner,
        object.mtime,
        object.device,
        object.content.len(),
        object.group
    )
}

/// Fails with what differs.
pub fn assert_same(expected: &Snapshot, found: &Snapshot, what: &str) {
    if let Some(difference) = difference(expected, found) {
        panic!("{what}:\n{difference}");
    }
}
