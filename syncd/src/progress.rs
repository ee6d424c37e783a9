//! Tells whoever waits for a merge that it gets on: the limit at boot is on lack of progress, not on total time.

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use sd_notify::NotifyState;

/// How often it is told, at the most.
const EVERY: Duration = Duration::from_secs(1);
/// By how much systemd is asked to wait longer, each time.
const EXTENSION: Duration = Duration::from_secs(60);

/// The progress of one run.
#[derive(Debug)]
pub struct Progress {
    file: Option<PathBuf>,
    told: Mutex<Option<Instant>>,
}

impl Progress {
    /// Progress that is told to systemd, where it started us, and to who watches `file`.
    #[must_use]
    pub fn new(file: Option<&Path>) -> Self {
        Self { file: file.map(Path::to_path_buf), told: Mutex::new(None) }
    }

    /// A step was done.
    pub fn step(&self) {
        // Another thread that is telling it right now is as good.
        let Ok(mut told) = self.told.try_lock() else { return };
        if told.is_some_and(|last| last.elapsed() < EVERY) {
            return;
        }
        let begun = told.get_or_insert_with(Instant::now);
        let text = format!("{:?}\n", begun.elapsed());
        *told = Some(Instant::now());
        if let Some(file) = &self.file {
            // Whoever watches gives up too early at worst, and the merge is redone at the next boot.
            let _told = std::fs::write(file, text);
        }
        let _told = sd_notify::notify(&[NotifyState::ExtendTimeoutUsec(
            u32::try_from(EXTENSION.as_micros()).unwrap_or(u32::MAX),
        )]);
    }
}
