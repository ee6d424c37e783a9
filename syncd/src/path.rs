//! Paths relative to a target's root: bytes, never text, and never able to leave the root.
//!
//! The empty path is the root itself. No component is empty, `.`, `..` or longer than 255 bytes, and none holds a NUL:
//! [`RelPath::parse`] is the only way in for bytes that come from a file. The order is by components, so a directory
//! stands right before everything below it.

use std::cmp::Ordering;
use std::ffi::OsStr;
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

/// The longest name of one file (`NAME_MAX`, limits.h).
const NAME_MAX: usize = 255;

/// A path below a target's root. A clone is the same bytes: a path stands in many lists at a time.
#[derive(Clone, PartialEq, Eq, Hash, Default)]
pub struct RelPath(Arc<[u8]>);

impl RelPath {
    /// The target's root.
    #[must_use]
    pub fn root() -> Self {
        Self::default()
    }

    /// Takes bytes that come from elsewhere; `None` when they are not such a path.
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let is_name = |name: &[u8]| !matches!(name, b"" | b"." | b"..") && name.len() <= NAME_MAX && !name.contains(&0);
        (bytes.is_empty() || bytes.split(|&byte| byte == b'/').all(is_name)).then(|| Self(bytes.into()))
    }

    /// The path of the entry `name` of this directory. `name` is a single component, as the kernel lists it.
    #[must_use]
    pub fn child(&self, name: &OsStr) -> Self {
        let name = name.as_bytes();
        let above = if self.is_root() { &[][..] } else { &b"/"[..] };
        Self(self.0.iter().chain(above).chain(name).copied().collect())
    }

    /// The directory that holds this path; `None` for the root.
    #[must_use]
    pub fn parent(&self) -> Option<Self> {
        if self.is_root() {
            return None;
        }
        let end = self.0.iter().rposition(|&byte| byte == b'/').unwrap_or(0);
        Some(Self(self.0[..end].into()))
    }

    /// Whether `directory` is the one that holds this path.
    #[must_use]
    pub fn is_in(&self, directory: &Self) -> bool {
        let end = self.0.iter().rposition(|&byte| byte == b'/').unwrap_or(0);
        !self.is_root() && self.0[..end] == *directory.0
    }

    /// All directories above this path, the nearest first, the root last.
    pub fn ancestors(&self) -> impl Iterator<Item = Self> {
        std::iter::successors(self.parent(), Self::parent)
    }

    /// The last component; empty for the root.
    #[must_use]
    pub fn name(&self) -> &OsStr {
        let start = self.0.iter().rposition(|&byte| byte == b'/').map_or(0, |at| at + 1);
        OsStr::from_bytes(&self.0[start..])
    }

    /// The components, outermost first.
    pub fn components(&self) -> impl Iterator<Item = &OsStr> {
        self.0.split(|&byte| byte == b'/').filter(|name| !name.is_empty()).map(OsStr::from_bytes)
    }

    /// Whether this is the target's root.
    #[must_use]
    pub fn is_root(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether this path lies below `directory` (and is not `directory` itself).
    #[must_use]
    pub fn is_below(&self, directory: &Self) -> bool {
        directory.is_root() && !self.is_root()
            || self.0.strip_prefix(&directory.0[..]).is_some_and(|rest| rest.first() == Some(&b'/'))
    }

    /// The path as the file system calls want it; `.` for the root.
    #[must_use]
    pub fn as_path(&self) -> &Path {
        if self.is_root() { Path::new(".") } else { Path::new(OsStr::from_bytes(&self.0)) }
    }

    /// The path below `directory`, for messages.
    #[must_use]
    pub fn below(&self, directory: &Path) -> std::path::PathBuf {
        if self.is_root() { directory.to_path_buf() } else { directory.join(self.as_path()) }
    }
}

impl Ord for RelPath {
    fn cmp(&self, other: &Self) -> Ordering {
        let (ours, theirs) = (&self.0[..], &other.0[..]);
        // Paths of one directory have much in common: eight bytes at a time.
        let common = ours.chunks_exact(8).zip(theirs.chunks_exact(8)).take_while(|(a, b)| a == b).count() * 8;
        // `/` sorts before every byte of a name, so a subtree is contiguous.
        let key = |&byte: &u8| if byte == b'/' { 0 } else { byte };
        ours[common..].iter().map(key).cmp(theirs[common..].iter().map(key))
    }
}

impl PartialOrd for RelPath {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl fmt::Display for RelPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.as_path().display())
    }
}

impl fmt::Debug for RelPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.as_path())
    }
}

impl Serialize for RelPath {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0)
    }
}

impl<'de> Deserialize<'de> for RelPath {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let bytes: &serde_bytes::Bytes = Deserialize::deserialize(deserializer)?;
        Self::parse(bytes).ok_or_else(|| D::Error::custom("a path that would leave its target"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str) -> RelPath {
        RelPath::parse(text.as_bytes()).unwrap()
    }

    #[test]
    fn paths_that_leave_the_target_are_refused() {
        for bad in ["/", "/a", "a/", "a//b", ".", "..", "a/../b", "./a", "a\0b"] {
            assert!(RelPath::parse(bad.as_bytes()).is_none(), "{bad:?} was accepted");
        }
        assert!(RelPath::parse(&[b'x'; 256]).is_none());
        assert!(RelPath::parse(&[b'x'; 255]).is_some());
    }

    #[test]
    fn a_directory_stands_right_before_what_is_below_it() {
        let mut paths = ["a.b", "a/b", "", "a", "a/b/c", "a-b", "a/\x01"].map(path);
        paths.sort();
        assert_eq!(paths, ["", "a", "a/\x01", "a/b", "a/b/c", "a-b", "a.b"].map(path));
    }

    #[test]
    fn parents_and_names() {
        let deep = path("a/b/c");
        assert_eq!(deep.ancestors().collect::<Vec<_>>(), [path("a/b"), path("a"), RelPath::root()]);
        assert_eq!((deep.name(), path("a").name(), RelPath::root().name()), ("c".as_ref(), "a".as_ref(), "".as_ref()));
        assert!(deep.is_below(&path("a/b")) && deep.is_below(&RelPath::root()));
        assert!(!path("ab").is_below(&path("a")) && !path("a").is_below(&path("a")));
        assert!(path("a/b").is_in(&path("a")) && path("a").is_in(&RelPath::root()));
        assert!(!path("a/b/c").is_in(&path("a")) && !path("a").is_in(&path("a")) && !path("").is_in(&path("")));
    }
}
