//! Tells systemd that we live: as long as we wait for something to do, or do it and it has not taken for ever.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use sd_notify::NotifyState;

/// How long one thing may take: a slow disk is none of our faults, and to be killed would lose what is done.
const LONGEST: Duration = Duration::from_secs(15 * 60);

/// Since when we have been at it.
#[derive(Debug, Clone, Default)]
pub(super) struct Watchdog {
    busy: Arc<Mutex<Option<Instant>>>,
}

/// We are at it.
#[derive(Debug)]
pub(super) struct Busy(Watchdog);

impl Watchdog {
    /// Begins to tell, if systemd wants to be told (`WatchdogSec=`).
    pub(super) fn start() -> Self {
        let watchdog = Self::default();
        if let Some(limit) = sd_notify::watchdog_enabled() {
            let own = watchdog.clone();
            thread::spawn(move || {
                while own.since().is_none_or(|since| since.elapsed() < LONGEST) {
                    // Where that fails systemd ends us, which is what it is for.
                    let _told = sd_notify::notify(&[NotifyState::Watchdog]);
                    thread::sleep(limit / 2);
                }
            });
        }
        watchdog
    }

    /// Something begins; it ends with the value.
    pub(super) fn busy(&self) -> Busy {
        *self.lock() = Some(Instant::now());
        Busy(self.clone())
    }

    fn since(&self) -> Option<Instant> {
        *self.lock()
    }

    fn lock(&self) -> MutexGuard<'_, Option<Instant>> {
        self.busy.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        *self.0.lock() = None;
    }
}
