//! A chain, composed and applied.

use std::fs::{self, File};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;

use arbitrary::{Arbitrary, Unstructured};
use ephemeral_overlay::token::Token;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, linkat, makedev, mkdirat, mknodat, openat, symlinkat};
use syncd::base;
use syncd::conflict::Winner;
use syncd::merge::{MergeOptions, unpack};
use syncd::path::RelPath;
use syncd::progress::Progress;
use syncd::store::Marker;
use syncd::tree::Tree;
use test_support::snapshot;

use super::history::{History, Thing};
use crate::sample::SEED;
use crate::scratch::Scratch;

/// The same of what a fuzzer says.
pub fn merge_bytes(input: &[u8]) {
    if let Ok(history) = History::arbitrary_take_rest(Unstructured::new(input)) {
        merge(&history);
    }
}

/// Merges it, and merges it again. Needs root.
pub fn merge(history: &History) {
    let scratch = Scratch::new();
    let lower = scratch.lower();
    for (path, thing) in history.lower.iter().take(12) {
        if let Some(path) = path.parsed() {
            make(&lower, &path, *thing);
        }
    }
    let files = history.files(&|path, hides| base::capture(&lower, path, hides, SEED).ok());
    let put = || {
        for (file, number) in files.iter().zip(1..) {
            fs::write(scratch.store().directory().join(format!("{number:010}.ckpt")), file).unwrap();
        }
    };
    put();
    let before = scratch.snapshot();
    let unpacked = unpack(&scratch.store(), &lower, &Tree::open(&scratch.at("upper")).unwrap(), &Progress::new(None));
    snapshot::assert_same(&before, &scratch.snapshot(), "unpacking changed lower");
    scratch.assert_untouched();

    let winner = if history.disk_wins { Winner::Disk } else { Winner::Ram };
    let options = MergeOptions { winner, accept_prefix: history.accept_prefix };
    let stats = match scratch.merge(options) {
        Ok(Some(stats)) => stats,
        Ok(None) => return,
        Err(error) => {
            assert!(scratch.store().marker().unwrap().is_none(), "it failed when it had begun: {:#}", Why(error));
            return;
        }
    };
    if stats.is_exact() && !history.accept_prefix {
        unpacked.map_err(Why).expect("what can be merged can be unpacked");
    }
    if history.disk_wins && !stats.conflicts.is_empty() {
        // A directory of the disk keeps its metadata, and shows that something was made in it again.
        return;
    }
    let merged = scratch.snapshot();
    scratch.set_token();
    put();
    if history.redo {
        let last = files.len() as u64;
        let marker = Marker { first: 1, last, next_token: Token(1), left_alone: Vec::new() };
        scratch.store().begin_merge(&marker).unwrap();
    }
    scratch.merge(options).map_err(Why).expect("what was merged can be merged again");
    // A directory that lower cannot hold as it is has no times of its own either.
    if stats.left.is_empty() {
        snapshot::assert_same(&merged, &scratch.snapshot(), "merging again changed something");
    }
}

/// An error with its causes.
struct Why(syncd::Error);

impl std::fmt::Debug for Why {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

impl std::fmt::Display for Why {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut next: Option<&dyn std::error::Error> = Some(&self.0);
        while let Some(error) = next {
            write!(f, "{error}; ")?;
            next = error.source();
        }
        Ok(())
    }
}

/// Makes an object in lower, where there is nothing yet and all that is above it are directories, or nothing.
fn make(lower: &Tree, path: &RelPath, thing: Thing) {
    let above: Vec<_> = path.ancestors().filter(|above| !above.is_root()).collect();
    for above in above.iter().rev() {
        make_one(lower, above, Thing::Dir);
    }
    if !path.is_root() {
        make_one(lower, path, thing);
    }
}

fn make_one(lower: &Tree, path: &RelPath, thing: Thing) -> Option<()> {
    let parent: OwnedFd = lower.open_parent(path).ok()?;
    let (parent, name, mode) = (parent.as_fd(), path.name(), Mode::from_raw_mode(0o640));
    match thing {
        Thing::File(length, linked) => {
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let file = File::from(openat(parent, name, flags, mode).ok()?);
            file.write_all_at(&vec![7; usize::try_from(length.bytes()).unwrap()], 0).unwrap();
            if linked {
                linkat(parent, name, parent, "linked", AtFlags::empty()).ok()?;
            }
        }
        Thing::Dir => mkdirat(parent, name, Mode::RWXU).ok()?,
        Thing::Out(dir) => {
            let target = if dir { "../canary/dir" } else { "../canary/file" };
            symlinkat(target, parent, name).ok()?;
        }
        Thing::Fifo => mknodat(parent, name, FileType::Fifo, mode, 0).ok()?,
        Thing::Device => mknodat(parent, name, FileType::CharacterDevice, mode, makedev(1, 3)).ok()?,
    }
    Some(())
}
