//! The store: where checkpoints live on disk, `<persist.root>/ephemeral-overlay`, 0700 because it holds copies of
//! everything that is under the overlays.
//!
//! ```text
//! lock                                 one writer at a time, flock(2)
//! reserve                              room for the last checkpoint of a shutdown; holds nothing
//! targets/NAME/0000000001.ckpt …       the chain, by sequence number
//! targets/NAME/sequence                the last number that was used and what was written, for when the chain is gone
//! targets/NAME/merging                 a merge has begun; its chain is redone until it ends
//! targets/NAME/disk-boot               the system ran from disk while the chain was pending
//! targets/NAME/conflicts/SEQ[.list]    the versions that lost, and which they are
//! targets/NAME/aside/FIRST-LAST/       chains that were set aside
//! ```

mod reserve;
mod used;

use std::fs::{self, File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use ephemeral_overlay::error::{At, SystemError};
use ephemeral_overlay::layout::{TRIES, target_name, target_path};
use ephemeral_overlay::token::Token;
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use crate::chain::{Chain, follows};
use crate::conflict;
use crate::durable;
use crate::error::{Error, Result};
use crate::format::read::Checkpoint;
use crate::format::{Relation, SEQUENCE_MAX};
use crate::path::RelPath;
use crate::progress::Progress;
use crate::written::Account;

const MERGING: &str = "merging";
const DISK_BOOT: &str = "disk-boot";
const EXTENSION: &str = "ckpt";

/// The store, locked against every other writer while this value lives.
#[derive(Debug)]
pub struct Store {
    path: PathBuf,
    _lock: Option<File>,
}

/// One target's part of the store.
#[derive(Debug, Clone)]
pub struct TargetStore {
    directory: PathBuf,
    target: PathBuf,
}

/// The durable mark that a merge has begun.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Marker {
    /// The first checkpoint that is merged.
    pub first: u64,
    /// The last one.
    pub last: u64,
    /// The token that lower gets when all is done: where lower has it, only the cleaning up is left.
    pub next_token: Token,
    /// Paths at which the disk's version stays.
    pub left_alone: Vec<RelPath>,
}

impl Store {
    /// Opens the store for writing, creating it where it is missing; waits for whoever has it. What a cut left unfinished
    /// is removed.
    ///
    /// # Errors
    /// When it cannot be created, locked or cleaned up.
    pub fn open(path: &Path) -> Result<Self> {
        if !path.join("targets").is_dir() {
            durable::create_directory(&path.join("targets"))?;
            // `early` may have made what is above it a moment ago, and never syncs.
            let device = |path: &Path| Ok::<_, SystemError>(fs::metadata(path).at("stat", path)?.dev());
            let here = device(path)?;
            for above in path.ancestors().skip(1) {
                if device(above)? != here {
                    break;
                }
                durable::sync_directory(above)?;
            }
        }
        let lock = open_lock(path, true)?;
        flock(&lock, FlockOperation::LockExclusive).at("flock", path)?;
        durable::sweep(path)?;
        Ok(Self { path: path.to_path_buf(), _lock: Some(lock) })
    }

    /// Opens the store for reading only; `None` when there is none. Waits for a writer to end.
    ///
    /// # Errors
    /// When it exists and cannot be opened.
    pub fn open_to_read(path: &Path) -> Result<Option<Self>> {
        if !durable::exists(&path.join("targets"))? {
            return Ok(None);
        }
        let lock = match open_lock(path, false) {
            Ok(lock) => {
                flock(&lock, FlockOperation::LockShared).at("flock", path)?;
                Some(lock)
            }
            // Never written to.
            Err(error) if error.source.kind() == ErrorKind::NotFound => None,
            Err(error) => return Err(error.into()),
        };
        Ok(Some(Self { path: path.to_path_buf(), _lock: lock }))
    }

    /// Stands for a store that does not exist: everything in it is empty.
    #[must_use]
    pub fn absent(path: &Path) -> Self {
        Self { path: path.to_path_buf(), _lock: None }
    }

    /// Tells `early` that this boot came as far as here.
    ///
    /// # Errors
    /// When the count of boots that did not cannot be removed.
    pub fn reset_tries(&self) -> Result<()> {
        if durable::exists(&self.path.join(TRIES))? { Ok(durable::remove_file(&self.path, TRIES)?) } else { Ok(()) }
    }

    /// The part of `target`.
    #[must_use]
    pub fn target(&self, target: &Path) -> TargetStore {
        TargetStore { directory: self.path.join("targets").join(target_name(target)), target: target.to_path_buf() }
    }

    /// All targets that ever had a checkpoint here.
    ///
    /// # Errors
    /// When the store cannot be listed.
    pub fn targets(&self) -> Result<Vec<TargetStore>> {
        let mut targets: Vec<_> =
            names(&self.path.join("targets"))?.iter().map(|name| self.target(&target_path(name))).collect();
        targets.sort_by(|a, b| a.target.cmp(&b.target));
        Ok(targets)
    }
}

fn open_lock(store: &Path, create: bool) -> Result<File, SystemError> {
    let path = store.join("lock");
    OpenOptions::new().read(true).write(create).create(create).truncate(false).mode(0o600).open(&path).at("open", &path)
}

/// The names in a directory; none where there is no directory.
fn names(directory: &Path) -> Result<Vec<String>, SystemError> {
    match durable::names(directory) {
        Ok(names) => Ok(names.iter().map(|name| name.to_string_lossy().into_owned()).collect()),
        Err(error) if error.source.kind() == ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

impl TargetStore {
    /// The target.
    #[must_use]
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Its directory in the store.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Creates the directory where it is missing and removes what a cut left unfinished.
    ///
    /// # Errors
    /// When that fails.
    pub fn prepare(&self) -> Result<()> {
        durable::create_directory(&self.directory)?;
        durable::sweep(&self.directory)?;
        Ok(())
    }

    /// The name of the file of checkpoint `seq`.
    #[must_use]
    pub fn file_name(seq: u64) -> String {
        format!("{seq:010}.{EXTENSION}")
    }

    /// The sequence numbers of all checkpoint files, superseded ones included.
    ///
    /// # Errors
    /// When the directory cannot be listed.
    pub fn sequences(&self) -> Result<Vec<u64>> {
        let mut all: Vec<u64> = names(&self.directory)?
            .iter()
            .filter_map(|name| {
                let seq = name.strip_suffix(EXTENSION)?.strip_suffix('.')?.parse().ok()?;
                // `1.ckpt` is none of ours.
                (seq <= SEQUENCE_MAX && Self::file_name(seq) == *name).then_some(seq)
            })
            .collect();
        all.sort_unstable();
        Ok(all)
    }

    /// The chain; `None` when there is none.
    ///
    /// # Errors
    /// When a file of it cannot be read or does not belong there.
    pub fn chain(&self) -> Result<Option<Chain>> {
        let mut checkpoints = Vec::new();
        // What a full checkpoint superseded may still be there after a cut, and no longer counts.
        for seq in self.sequences()?.into_iter().rev() {
            let checkpoint = self.checkpoint(seq)?;
            let is_full = matches!(checkpoint.header.relation, Relation::Full { .. });
            checkpoints.push(checkpoint);
            if is_full {
                break;
            }
        }
        checkpoints.reverse();
        Chain::new(checkpoints, &self.target)
    }

    /// The newest full checkpoint that is whole, with what follows it up to the first damaged one.
    ///
    /// # Errors
    /// When the directory cannot be listed.
    pub fn valid_chain(&self, progress: &Progress) -> Result<Option<Chain>> {
        let all = self.sequences()?;
        let whole = |seq: u64| self.checkpoint(seq).ok().filter(|checkpoint| checkpoint.verify(progress).is_ok());
        let is_full = |checkpoint: &Checkpoint| matches!(checkpoint.header.relation, Relation::Full { .. });
        let Some(first) = all.iter().rev().find_map(|&seq| whole(seq).filter(is_full)) else { return Ok(None) };
        let number = first.header.sequence;
        let mut valid = vec![first];
        for seq in all.into_iter().filter(|&seq| seq > number) {
            match whole(seq) {
                Some(next) if valid.last().is_some_and(|last| follows(last, &next)) => valid.push(next),
                _ => break,
            }
        }
        Chain::new(valid, &self.target)
    }

    fn checkpoint(&self, seq: u64) -> Result<Checkpoint> {
        let path = self.directory.join(Self::file_name(seq));
        let checkpoint = Checkpoint::open(&path)?;
        if checkpoint.header.sequence == seq {
            Ok(checkpoint)
        } else {
            Err(Error::Damaged {
                path,
                what: format!("it is checkpoint {} under another name", checkpoint.header.sequence),
            })
        }
    }

    /// Removes the checkpoints before `seq`, which a full one superseded.
    ///
    /// # Errors
    /// Whatever unlink(2) says.
    pub fn remove_before(&self, seq: u64) -> Result<()> {
        let old = self.sequences()?.into_iter().filter(|&old| old < seq).map(Self::file_name).collect::<Vec<_>>();
        Ok(durable::remove_files(&self.directory, &old)?)
    }

    /// The mark of a merge that began. A damaged one still says that much.
    ///
    /// # Errors
    /// When it is there and cannot be read.
    pub fn marker(&self) -> Result<Option<Marker>> {
        match durable::read_record(&self.directory, MERGING) {
            Err(Error::Damaged { path, .. }) => {
                let next_token = Token::random().at("getrandom", path)?;
                Ok(Some(Marker { first: 0, last: u64::MAX, next_token, left_alone: Vec::new() }))
            }
            other => other,
        }
    }

    /// Marks that a merge begins.
    ///
    /// # Errors
    /// When the mark cannot be made durable.
    pub fn begin_merge(&self, marker: &Marker) -> Result<()> {
        durable::write_record(&self.directory, MERGING, marker)
    }

    /// Forgets a chain that lower holds durably: its number and the account of what was written are kept, then its files
    /// go, then the marks.
    ///
    /// # Errors
    /// When one of these steps fails; the next merge does the rest.
    pub fn end_merge(&self, last: u64, written: &Account) -> Result<()> {
        self.keep_number(last, written)?;
        self.remove_before(last + 1)?;
        // One after the other: a note that outlives the mark would be about the next chain.
        durable::remove_file(&self.directory, DISK_BOOT)?;
        Ok(durable::remove_file(&self.directory, MERGING)?)
    }

    /// Moves the chain and the marks away, for somebody to look at; returns where to. The numbers go on.
    ///
    /// # Errors
    /// When a file cannot be moved.
    pub fn set_aside(&self) -> Result<PathBuf> {
        let aside = self.set_aside_after(0)?.unwrap_or_else(|| self.directory.join("aside"));
        for mark in [MERGING, DISK_BOOT] {
            if !durable::exists(&self.directory.join(mark))? {
                continue;
            }
            durable::create_directory(&aside)?;
            durable::rename(&self.directory.join(mark), &aside.join(mark))?;
        }
        Ok(aside)
    }

    /// Moves the checkpoints after `last` away; returns where to, if there are any.
    ///
    /// # Errors
    /// When a file cannot be moved.
    pub fn set_aside_after(&self, last: u64) -> Result<Option<PathBuf>> {
        let after: Vec<_> = self.sequences()?.into_iter().filter(|&seq| seq > last).collect();
        self.move_aside(&after)
    }

    /// Moves the checkpoints before `seq` away; returns where to, if there are any.
    ///
    /// # Errors
    /// When a file cannot be moved.
    pub fn set_aside_before(&self, seq: u64) -> Result<Option<PathBuf>> {
        let before: Vec<_> = self.sequences()?.into_iter().filter(|&old| old < seq).collect();
        self.move_aside(&before)
    }

    /// Keeps the checkpoints up to `last` for somebody to look at, under second names; returns where. The chain stays
    /// whole until [`TargetStore::end_merge`] removes it: a part of one would be an older state.
    ///
    /// # Errors
    /// When a file cannot be linked.
    pub fn keep_aside(&self, last: u64) -> Result<Option<PathBuf>> {
        let all: Vec<_> = self.sequences()?.into_iter().filter(|&seq| seq <= last).collect();
        let Some(aside) = self.aside(&all)? else { return Ok(None) };
        let names: Vec<_> = all.into_iter().map(Self::file_name).collect();
        durable::link_files(&self.directory, &aside, &names)?;
        Ok(Some(aside))
    }

    fn move_aside(&self, all: &[u64]) -> Result<Option<PathBuf>> {
        let Some(aside) = self.aside(all)? else { return Ok(None) };
        // The newest first: what a cut leaves is a chain still.
        for name in all.iter().rev().map(|&seq| Self::file_name(seq)) {
            durable::rename(&self.directory.join(&name), &aside.join(&name))?;
        }
        Ok(Some(aside))
    }

    /// Makes the directory in which these checkpoints are kept, if there are any. Their numbers go on.
    fn aside(&self, all: &[u64]) -> Result<Option<PathBuf>> {
        let (Some(first), Some(newest)) = (all.first(), all.last()) else { return Ok(None) };
        self.keep_number(*newest, &self.written())?;
        let aside = self.directory.join("aside").join(format!("{first}-{newest}"));
        durable::create_directory(&aside)?;
        Ok(Some(aside))
    }

    /// Notes that the system ran from disk although a chain was pending: what the disk has now is newer.
    ///
    /// # Errors
    /// When the note cannot be made durable.
    pub fn note_disk_boot(&self) -> Result<()> {
        if self.booted_from_disk()? {
            return Ok(());
        }
        durable::write_record(&self.directory, DISK_BOOT, &())
    }

    /// Whether [`TargetStore::note_disk_boot`] was called since the last merge.
    ///
    /// # Errors
    /// When the directory cannot be looked at.
    pub fn booted_from_disk(&self) -> Result<bool> {
        Ok(durable::exists(&self.directory.join(DISK_BOOT))?)
    }

    /// Where the versions go that lose against checkpoint `last`.
    #[must_use]
    pub fn conflicts(&self, last: u64) -> PathBuf {
        self.directory.join("conflicts").join(last.to_string())
    }

    /// Where the versions go that lose when a merge is done again: nothing that is there already may be replaced.
    ///
    /// # Errors
    /// When what is there cannot be looked at.
    pub fn more_conflicts(&self, last: u64) -> Result<PathBuf> {
        let mut place = self.conflicts(last);
        let mut number = 0u64;
        while durable::exists(&conflict::list_of(&place))? {
            number += 1;
            place = self.directory.join("conflicts").join(format!("{last}.{number}"));
        }
        Ok(place)
    }

    /// All conflicts that were recorded and not yet removed by somebody: one line each.
    ///
    /// # Errors
    /// When they cannot be listed.
    pub fn all_conflicts(&self) -> Result<Vec<String>> {
        let directory = self.directory.join("conflicts");
        let mut all = Vec::new();
        for name in names(&directory)?
            .iter()
            .filter(|name| Path::new(name).extension().is_some_and(|extension| extension == "list"))
        {
            let path = directory.join(name);
            all.extend(fs::read_to_string(&path).at("read", &path)?.lines().map(str::to_owned));
        }
        Ok(all)
    }
}
