//! Chains that must be refused, each for one reason. All digests are right: it is the check behind them that counts.

mod chain;
mod entry;
mod layout;

use std::path::Path;

use crate::file::Forge;
use crate::sample;

/// A chain that must be refused.
#[derive(Debug)]
pub struct Case {
    /// What is wrong with it.
    pub name: String,
    /// Its files, by the number in the name; in order.
    pub files: Vec<(u64, Vec<u8>)>,
    /// Which of the files is to blame.
    pub blame: u64,
    /// What has to be said of it.
    pub says: &'static str,
}

impl Case {
    fn one(name: &str, file: Vec<u8>, says: &'static str) -> Self {
        Self { name: name.to_owned(), files: vec![(1, file)], blame: 1, says }
    }

    /// A second checkpoint after a good one.
    fn second(name: &str, first: Vec<u8>, second: Vec<u8>, says: &'static str) -> Self {
        Self { name: name.to_owned(), files: vec![(1, first), (2, second)], blame: 2, says }
    }

    /// Puts the chain into a target's directory in the store.
    pub fn write(&self, directory: &Path) {
        for (number, bytes) in &self.files {
            std::fs::write(directory.join(format!("{number:010}.ckpt")), bytes).unwrap();
        }
    }
}

/// All of them.
#[must_use]
pub fn all() -> Vec<Case> {
    let mut all = layout::cases();
    all.extend(entry::cases());
    all.extend(chain::cases());
    all
}

/// A full checkpoint with a root, to add to.
fn full() -> Forge {
    Forge::new(&sample::header(1, sample::FULL)).change(b"", sample::dir(), None)
}
