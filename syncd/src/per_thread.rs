//! What each thread of the pool keeps to use again, and how much it takes at a time.
//!
//! rayon cuts a list into twice as many parts as there are threads, and cuts further only what a thread takes from another
//! one: of two threads, one may have nothing to do while the other does the last quarter. So a list of which each part takes
//! long is cut into more of them.

use std::sync::{Mutex, PoisonError};

/// How many directories are listed at a time.
pub(crate) const DIRECTORIES: usize = 8;
/// How many frames are read at a time.
pub(crate) const FRAMES: usize = 16;

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
