//! What a command says about one target: to people, to scripts (`--json`), and to `status` later.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use ephemeral_overlay::Layout;
use serde::{Deserialize, Serialize};
use syncd::error::remedy;

use super::Outcome;

/// The version of every object that `--json` prints.
pub(crate) const JSON_VERSION: u32 = 1;

/// `1 path`, `2 paths`.
pub(crate) fn count(number: usize, of: &str) -> String {
    if number == 1 { format!("1 {of}") } else { format!("{number} {of}s") }
}

/// Why a checkpoint was not taken, and what to do about the disk, where it is that.
pub(crate) fn in_words(error: impl Into<anyhow::Error>) -> String {
    let error = error.into();
    let remedy = remedy(&error).map_or(String::new(), |remedy| format!("; {remedy}"));
    format!("{error:#}{remedy}")
}

/// One object: what a command did.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    /// [`JSON_VERSION`].
    pub version: u32,
    /// One for each target.
    pub targets: Vec<TargetReport>,
}

/// What became of one target.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct TargetReport {
    /// The target.
    pub target: PathBuf,
    /// The exit status that this target alone would have given.
    pub status: u8,
    /// What happened, in words.
    pub message: String,
    /// When, in seconds since the epoch.
    pub time: u64,
    /// The checkpoint's sequence number, if one was written.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sequence: Option<u64>,
    /// How many bytes were written to the store.
    #[serde(default)]
    pub written_bytes: u64,
}

impl TargetReport {
    /// A report without numbers.
    pub(crate) fn new(target: &Path, outcome: Outcome, message: String) -> Self {
        let time = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        Self { target: target.to_path_buf(), status: outcome.status(), message, time, sequence: None, written_bytes: 0 }
    }

    /// Says it to people.
    pub(crate) fn say(&self) {
        let target = self.target.display();
        match self.status {
            0 => tracing::info!("{target}: {}", self.message),
            3 => tracing::warn!("{target}: {}", self.message),
            _ => tracing::error!("{target}: {}", self.message),
        }
    }

    /// Keeps it for `status`, in RAM.
    pub(crate) fn keep(&self, layout: &Layout) {
        let path = layout.last_result(&self.target);
        let kept = (|| {
            if let Some(parent) = path.parent() {
                fs::create_dir_all(parent)?;
            }
            fs::write(&path, serde_json::to_vec(self)?)
        })();
        if let Err(error) = kept {
            // The command's own result is what counts; it has been said.
            tracing::debug!("{}: {error}", path.display());
        }
    }

    /// What was kept last, if anything was.
    pub(crate) fn last(layout: &Layout, target: &Path) -> Option<Self> {
        serde_json::from_slice(&fs::read(layout.last_result(target)).ok()?).ok()
    }
}

/// Prints the object of a command, if `--json` asked for it, and gives the worst outcome.
pub(crate) fn finish(targets: Vec<TargetReport>, json: bool) -> anyhow::Result<Outcome> {
    let outcome = worst(&targets);
    if json {
        super::say(&serde_json::to_string_pretty(&Report { version: JSON_VERSION, targets })?);
    }
    Ok(outcome)
}

/// The worst that became of a target.
pub(crate) fn worst(targets: &[TargetReport]) -> Outcome {
    let outcomes = targets.iter().map(|report| match report.status {
        0 => Outcome::Done,
        3 => Outcome::Partial,
        _ => Outcome::Failed,
    });
    outcomes.max().unwrap_or(Outcome::Done)
}
