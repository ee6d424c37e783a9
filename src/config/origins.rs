//! Where each value was last set, so that a rule broken by the sum of all files can name the line that broke it.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use super::ConfigError;

/// A line of a file. The order is that of reading.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    file: usize,
    line: usize,
}

/// The files, and the places of all values found in them, by full key (`overlay.dirs[1]`, `tmpfs."/tmp"`).
#[derive(Debug)]
pub(super) struct Origins<'a> {
    sources: &'a [(PathBuf, String)],
    places: BTreeMap<String, Place>,
}

impl<'a> Origins<'a> {
    pub(super) fn new(sources: &'a [(PathBuf, String)]) -> Self {
        Self { sources, places: BTreeMap::new() }
    }

    pub(super) fn text(&self, file: usize) -> &'a str {
        self.sources.get(file).map_or("", |(_, text)| text)
    }

    pub(super) fn record(&mut self, key: String, place: Place) {
        self.places.insert(key, place);
    }

    pub(super) fn was_set(&self, key: &str) -> bool {
        self.places.contains_key(key)
    }

    pub(super) fn place(&self, file: usize, span: &Range<usize>) -> Place {
        let before = self.text(file).as_bytes().iter().take(span.start);
        Place { file, line: 1 + before.filter(|&&byte| byte == b'\n').count() }
    }

    /// The file's path and the line, for an error.
    pub(super) fn locate(&self, place: Place) -> (PathBuf, usize) {
        let path = self.sources.get(place.file).map(|(path, _)| path.clone());
        (path.unwrap_or_default(), place.line)
    }

    /// Refuses the one of `keys` that was set last: until then the files read so far were consistent. Defaults are
    /// set before everything else and agree with one another, so there always is one.
    pub(super) fn refuse(&self, keys: &[&str], reason: String) -> ConfigError {
        let last = keys.iter().max_by_key(|key| self.places.get(**key)).copied().unwrap_or_default();
        let place = self.places.get(last).copied().unwrap_or(Place { file: usize::MAX, line: 0 });
        let (path, line) = self.locate(place);
        ConfigError::Refused { path, line, key: last.to_owned(), reason }
    }
}

/// The full key of `key` in `table`, written as TOML would: quoted where it must be.
pub(super) fn full_key(table: &str, key: &str) -> String {
    if table.is_empty() { quoted(key) } else { format!("{table}.{}", quoted(key)) }
}

/// The full key of a path in a table of paths.
pub(super) fn path_key(table: &str, path: &Path) -> String {
    full_key(table, &path.to_string_lossy())
}

/// `key`, quoted unless TOML takes it bare.
pub(super) fn quoted(key: &str) -> String {
    let bare = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    if !key.is_empty() && key.chars().all(bare) { key.to_owned() } else { format!("{key:?}") }
}
