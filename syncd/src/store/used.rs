//! What outlives the checkpoints of a target: the last number that was used, and what was written to the disk for it.

use serde::{Deserialize, Serialize};

use super::{TargetStore, names};
use crate::durable;
use crate::error::{Error, Result};
use crate::format::SEQUENCE_MAX;
use crate::format::read::Checkpoint;
use crate::written::Account;

const SEQUENCE: &str = "sequence";

/// The record.
#[derive(Debug, Serialize, Deserialize)]
struct Used {
    /// The last number that was used.
    last: u64,
    /// What was written for it.
    written: Account,
}

impl TargetStore {
    /// The number of the next checkpoint. Numbers outlive merges.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub fn next_sequence(&self) -> Result<u64> {
        Ok(self.sequences()?.last().copied().unwrap_or(0).max(self.used_number()?) + 1)
    }

    /// The last number that outlived its checkpoint. A damaged record is made up for by what bears a number.
    fn used_number(&self) -> Result<u64> {
        match self.used() {
            Err(Error::Damaged { .. }) => {
                let mut all = names(&self.directory.join("aside"))?;
                all.extend(names(&self.directory.join("conflicts"))?);
                let numbers = all.iter().flat_map(|name| name.split(['-', '.'])).filter_map(|part| part.parse().ok());
                Ok(numbers.filter(|&number| number <= SEQUENCE_MAX).max().unwrap_or(0))
            }
            other => Ok(other?.map_or(0, |used| used.last)),
        }
    }

    /// Keeps the number of a checkpoint that is about to go, and the account.
    pub(super) fn keep_number(&self, last: u64, written: &Account) -> Result<()> {
        if let Ok(Some(used)) = self.used()
            && last <= used.last
            && written.in_all <= used.written.in_all
        {
            return Ok(());
        }
        let used = Used { last: last.max(self.used_number()?), written: written.clone() };
        durable::write_record(&self.directory, SEQUENCE, &used)
    }

    fn used(&self) -> Result<Option<Used>> {
        match durable::read_record(&self.directory, SEQUENCE)? {
            Some(Used { last, .. }) if last > SEQUENCE_MAX => Err(Error::Damaged {
                path: self.directory.join(SEQUENCE),
                what: "it has an impossible number".to_owned(),
            }),
            used => Ok(used),
        }
    }

    /// What was written to the disk for the target, as far as that is known.
    #[must_use]
    pub fn written(&self) -> Account {
        let newest = self.sequences().ok().and_then(|all| self.checkpoint(*all.last()?).ok());
        self.written_up_to(newest.as_ref())
    }

    /// The same, where the newest checkpoint is open already.
    #[must_use]
    pub fn written_up_to(&self, newest: Option<&Checkpoint>) -> Account {
        let kept = self.used().ok().flatten().map(|used| used.written);
        // A chain goes on after the record was made, and is gone when it is made anew.
        let all = newest.map(Checkpoint::written).into_iter().chain(kept);
        all.max_by_key(|written| written.in_all).unwrap_or_default()
    }
}
