//! What each thread of the pool keeps to use again.

use std::sync::{Mutex, PoisonError};

/// One `T` for each thread.
#[derive(Debug)]
pub(crate) struct PerThread<T>(Vec<Mutex<T>>);

impl<T: Default> PerThread<T> {
    /// Begins with the default of each.
    pub(crate) fn new() -> Self {
        // The last one is for whoever is outside of the pool.
        Self((0..=rayon::current_num_threads()).map(|_| Mutex::default()).collect())
    }

    /// Hands out the calling thread's, to `act` that leaves nothing to other threads: it would wait for itself.
    pub(crate) fn with<R>(&self, act: impl FnOnce(&mut T) -> R) -> R {
        let number = rayon::current_thread_index().unwrap_or(self.0.len() - 1);
        act(&mut self.0[number].lock().unwrap_or_else(PoisonError::into_inner))
    }
}
