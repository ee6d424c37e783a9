//! One shape for every failed system call: the call, the path it was about, and the kernel's answer as the cause.

use std::io;
use std::path::{Path, PathBuf};

/// A system call that failed on a path.
#[derive(Debug, thiserror::Error)]
#[error("{call} {}", path.display())]
pub struct SystemError {
    /// The call, by its name in section 2 of the manual.
    pub call: &'static str,
    /// The path it was about.
    pub path: PathBuf,
    /// What the kernel answered.
    #[source]
    pub source: io::Error,
}

impl SystemError {
    /// The raw error number, where the cause has one.
    #[must_use]
    pub fn errno(&self) -> Option<rustix::io::Errno> {
        rustix::io::Errno::from_io_error(&self.source)
    }
}

/// Names the call and the path of a failure.
pub trait At<T> {
    /// Turns the error into a [`SystemError`] that names `call` and `path`.
    ///
    /// # Errors
    /// The error itself, named.
    fn at(self, call: &'static str, path: impl AsRef<Path>) -> Result<T, SystemError>;
}

impl<T, E: Into<io::Error>> At<T> for Result<T, E> {
    fn at(self, call: &'static str, path: impl AsRef<Path>) -> Result<T, SystemError> {
        self.map_err(|source| SystemError { call, path: path.as_ref().to_path_buf(), source: source.into() })
    }
}
