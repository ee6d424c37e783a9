//! Every message says where (file and line), which key, what is wrong, and what would be right.

use std::path::PathBuf;

/// Why a configuration is not used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// A file is not TOML.
    #[error("{path}:{line}: not valid TOML: {message}")]
    Syntax {
        /// The file.
        path: PathBuf,
        /// The line at which the parser gave up.
        line: usize,
        /// What the parser expected.
        message: String,
    },
    /// A key or table that does not exist.
    #[error("{path}:{line}: unknown key {key}{}; allowed here: {allowed}", did_you_mean(nearest.as_deref()))]
    UnknownKey {
        /// The file.
        path: PathBuf,
        /// The line of the key.
        line: usize,
        /// The key, with its tables.
        key: String,
        /// The known key that looks most like it, if one does.
        nearest: Option<String>,
        /// The keys of this table.
        allowed: String,
    },
    /// A value of the wrong type, or outside its range.
    #[error("{path}:{line}: {key} is {found}, expected {expected}")]
    Value {
        /// The file.
        path: PathBuf,
        /// The line of the value.
        line: usize,
        /// The key, with its tables and, in an array, its index from 0.
        key: String,
        /// The value as it was written, or its type.
        found: String,
        /// What is allowed.
        expected: String,
    },
    /// A value that is well-formed by itself, but must not be used here.
    #[error("{path}:{line}: {key}: {reason}")]
    Refused {
        /// The file.
        path: PathBuf,
        /// The line of the value.
        line: usize,
        /// The key, with its tables and, in an array, its index from 0.
        key: String,
        /// Why not, and what is allowed.
        reason: String,
    },
}

fn did_you_mean(nearest: Option<&str>) -> String {
    nearest.map(|key| format!(", did you mean {key}?")).unwrap_or_default()
}
