//! What the fuzz targets do with an input, and the tests with each file of the corpus.

pub mod history;
pub mod merge;
pub mod reader;

use std::path::Path;

/// The files of the corpus of a target, each with its name.
#[must_use]
pub fn corpus(target: &str) -> Vec<(String, Vec<u8>)> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus").join(target);
    let entries = std::fs::read_dir(&directory).unwrap_or_else(|error| panic!("{}: {error}", directory.display()));
    let read = |path: std::path::PathBuf| (path.display().to_string(), std::fs::read(path).unwrap());
    let mut all: Vec<_> = entries.map(|entry| read(entry.unwrap().path())).collect();
    all.sort();
    all
}
