//! Takes a checkpoint: walk → hash → diff → one file → durable.
//!
//! Contents decide, always: a write through a shared mapping changes no time stamp on tmpfs. A loss (a name that is
//! gone or newly hidden) is believed only when two scans agree on it and nothing was renamed between them, because a
//! live scan can see a file that is being moved in neither place.

mod capture;
mod known;
mod look;
mod past;
mod write;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use past::Past;

use crate::chain::Net;
use crate::diff::{Beside, Draft};
use crate::durable;
use crate::error::{Error, Result};
use crate::format::Relation;
use crate::format::read::Checkpoint;
use crate::later;
use crate::path::RelPath;
use crate::scan::{self, Found, View};
use crate::store::TargetStore;
use crate::tree::Tree;

/// How often a file that was moved away under a read makes us start over before it is passed over and reported.
const RESTARTS: usize = 3;
/// How often it does where that is impossible, because other names share the file.
const RESTARTS_MAX: usize = 20;
/// The longest chain; the next checkpoint is full.
const CHAIN_MAX: usize = 64;

/// How a checkpoint is taken.
#[derive(Debug, Clone)]
pub struct CheckpointOptions {
    /// Find out what would be written, and write nothing.
    pub dry_run: bool,
    /// zstd's level.
    pub compression: i32,
    /// Our own log: a change of nothing else is no reason to write.
    pub own_log: Option<RelPath>,
}

/// What a checkpoint came to.
#[derive(Debug, Clone, Default)]
pub struct CheckpointStats {
    /// Its number; `None` when nothing had changed, and in a dry run.
    pub sequence: Option<u64>,
    /// It is full, not a delta.
    pub full: bool,
    /// What changed, in path order.
    pub changes: Vec<(RelPath, ChangeKind)>,
    /// The length of the file, in bytes.
    pub written_bytes: u64,
    /// Files that changed while they were read.
    pub fuzzy: Vec<RelPath>,
    /// Losses on which no two scans agreed: they are not recorded.
    pub disputed: Vec<RelPath>,
    /// Names never stood still while they were read: one that was being moved may be missing, or be there twice.
    pub unsettled: bool,
    /// The chain of another state of the disk was moved here.
    pub set_aside: Option<PathBuf>,
    /// The chain so far was damaged: this checkpoint supersedes it.
    pub healed: Option<String>,
}

/// How a path differs from lower, as `diff` shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChangeKind {
    /// New or changed.
    Written,
    /// Deleted.
    Deleted,
    /// As lower again.
    Reverted,
}

impl CheckpointStats {
    /// Whether everything was recorded exactly.
    #[must_use]
    pub fn is_exact(&self) -> bool {
        self.fuzzy.is_empty() && self.disputed.is_empty() && !self.unsettled && self.set_aside.is_none()
    }
}

/// Takes a checkpoint of `upper` over `lower` into `store`, which the caller has locked.
///
/// # Errors
/// Anything that goes wrong; the chain is then what it was before.
pub fn take(store: &TargetStore, upper: &Tree, lower: &Tree, options: &CheckpointOptions) -> Result<CheckpointStats> {
    let mut stats = CheckpointStats::default();
    let load = || {
        if !options.dry_run {
            store.prepare()?;
        }
        Past::load(store, lower, options.dry_run, &mut stats)
    };
    let (past, scan) = rayon::join(load, || scan::scan(upper, View::Upper));
    let past = past?;
    let mut first = Some(scan?);
    let mut job = Job { upper, lower, past, options, held: BTreeSet::new(), patient: true };
    let mut passed_over = BTreeSet::new();
    for restart in 1.. {
        job.patient = restart < RESTARTS;
        // What is held has to fit what this scan sees: its directories may be gone by now.
        job.held.clone_from(&passed_over);
        stats.disputed = passed_over.iter().cloned().collect();
        let scan = job.scan(first.take(), &mut stats)?;
        if !job.patient {
            // What is passed over because it moves on may be what a lost name was renamed to.
            job.hold_losses(&scan, &mut stats);
        }
        match job.record(store, &scan, &mut stats) {
            Err(Error::Moved { path }) if restart < RESTARTS_MAX => {
                if !job.patient {
                    passed_over.insert(path);
                }
            }
            Err(Error::Moved { .. }) => break,
            Err(error @ Error::Damaged { .. }) if job.past.chain.is_some() => job.past.forget(&error, &mut stats),
            Err(error) => return Err(error),
            Ok(()) => {
                stats.disputed.sort_unstable();
                stats.disputed.dedup();
                later::drop((scan, job.past));
                return Ok(stats);
            }
        }
    }
    Err(Error::Unsettled { path: upper.path().to_path_buf() })
}

struct Job<'a> {
    upper: &'a Tree,
    lower: &'a Tree,
    past: Past,
    options: &'a CheckpointOptions,
    held: BTreeSet<RelPath>,
    /// A file that was moved away makes us start over; else it is passed over.
    patient: bool,
}

impl Job<'_> {
    /// Finds the changes and writes them, if there are any.
    fn record(&self, store: &TargetStore, scan: &[Found], stats: &mut CheckpointStats) -> Result<()> {
        let beside = Beside::new(&self.past.net, scan);
        let looked = self.look(&beside)?;
        let nothing = Net::default();
        let mut drafts = beside.diff(&looked, &self.held);
        if self.is_nothing(&drafts)? {
            return if self.options.dry_run { Ok(()) } else { self.settle(store) };
        }
        let kind = |draft: &Draft| match draft {
            Draft::Present(..) => ChangeKind::Written,
            Draft::Deleted => ChangeKind::Deleted,
            Draft::AsLower => ChangeKind::Reverted,
        };
        stats.changes = drafts.iter().map(|(path, draft)| ((*path).clone(), kind(draft))).collect();
        if self.options.dry_run {
            return Ok(());
        }
        let relation = self.relation(scan);
        stats.full = matches!(relation, Relation::Full { .. });
        if stats.full && self.past.net != nothing {
            drafts = Beside::new(&nothing, scan).diff(&[], &self.held);
        }
        let sequence = store.next_sequence()?;
        let written = self.write(store, sequence, relation, &drafts, &looked, stats)?;
        stats.sequence = Some(sequence);
        stats.written_bytes = written.bytes;
        // Only now: until the new one is durable the old ones are all that a cut leaves.
        if self.past.foreign {
            stats.set_aside = store.set_aside_before(sequence)?;
        } else {
            let first = self.past.chain.as_ref().filter(|_| !stats.full).map(|chain| chain.range().0);
            store.remove_before(first.unwrap_or(sequence))?;
        }
        Ok(())
    }

    /// Sees to it that what the chain says is durable, and that nothing else is left: whoever wrote it may not have come to
    /// that.
    fn settle(&self, store: &TargetStore) -> Result<()> {
        let Some(chain) = &self.past.chain else { return Ok(()) };
        durable::sync_directory(store.directory())?;
        store.remove_before(chain.range().0)
    }

    fn relation(&self, scan: &[Found]) -> Relation {
        let Some(chain) = &self.past.chain else { return Relation::Full { supersedes: None } };
        let upper = scan.iter().fold(0u64, |sum, found| sum.saturating_add(found.stamp.size));
        // What does not compress is as long in the full checkpoint as in upper: only what came after it counts.
        let deltas: u64 = chain.checkpoints()[1..].iter().map(Checkpoint::bytes).sum();
        let too_long = chain.checkpoints().len() >= CHAIN_MAX || deltas > upper.max(1 << 20);
        // What is held or passed over is recorded nowhere but in the chain.
        if (too_long || self.past.must_be_full) && self.held.is_empty() && self.patient {
            Relation::Full { supersedes: Some(chain.range().1) }
        } else {
            Relation::Delta { predecessor: chain.digest() }
        }
    }
}

/// The path of our own log below a target, if it is there.
#[must_use]
pub fn own_log(target: &Path, log: &Path) -> Option<RelPath> {
    use std::os::unix::ffi::OsStrExt;
    RelPath::parse(log.strip_prefix(target).ok()?.as_os_str().as_bytes()).filter(|path| !path.is_root())
}
