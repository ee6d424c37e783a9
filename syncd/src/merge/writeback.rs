//! Has the disk begin while a merge still makes files. Without it the disk would have nothing to do all that time, and the
//! syncfs(2) at the end would have everything to write.

use std::panic::resume_unwind;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::{Builder, scope};

use ephemeral_overlay::error::At;
use rustix::fs::syncfs;

use crate::error::Result;
use crate::tree::Tree;

/// How many bytes of contents come together before the disk is to take them: a merge that writes less costs no journal
/// commit more than the one at its end.
const PORTION: u64 = 32 << 20;

/// Tells when there is a portion for the disk.
pub(super) struct Portions {
    /// How much was written when that was told last.
    told: AtomicU64,
    tell: SyncSender<()>,
}

impl Portions {
    /// `written` bytes were written so far.
    pub(super) fn look(&self, written: u64) {
        let told = self.told.load(Ordering::Relaxed);
        let is_portion = written.saturating_sub(told) >= PORTION;
        if is_portion && self.told.compare_exchange(told, written, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
            // One that waits already takes this with it.
            let _told = self.tell.try_send(());
        }
    }
}

/// Runs `make`, and meanwhile has the disk of `tree` take each portion that there is.
///
/// # Errors
/// What `make` says, and whatever syncfs(2) says: no later one on this descriptor would say it again.
pub(super) fn beside<T>(tree: &Tree, make: impl FnOnce(&Portions) -> Result<T>) -> Result<T> {
    let (tell, told) = sync_channel(1);
    scope(|scope| {
        let sync = move || told.iter().try_for_each(|()| syncfs(tree.root()).at("syncfs", tree.path()));
        let disk = Builder::new().name("writeback".to_owned()).spawn_scoped(scope, sync).at("clone", tree.path())?;
        let portions = Portions { told: AtomicU64::new(0), tell };
        let made = make(&portions);
        drop(portions);
        disk.join().unwrap_or_else(|panic| resume_unwind(panic))?;
        made
    })
}
