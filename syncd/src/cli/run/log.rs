//! The daemon's log: every line into our own file, and what is news to standard error, which is the journal under
//! systemd.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use rustix::fs::OFlags;
use tracing_subscriber::fmt::MakeWriter;

/// What is said with this target goes to our own log only.
pub(crate) const OWN: &str = "own";

/// Where it is, once that is known.
static FILE: Mutex<Option<PathBuf>> = Mutex::new(None);

/// Has what is said from now on written to a file.
pub(crate) fn to_file(path: &Path) {
    *FILE.lock().unwrap_or_else(PoisonError::into_inner) = Some(path.to_path_buf());
}

/// Writes each line to the file that has the name at that moment: it may be rotated whenever somebody likes, and is never
/// what keeps `/var/log` in use.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct LogFile;

impl<'a> MakeWriter<'a> for LogFile {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        *self
    }
}

impl io::Write for LogFile {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if let Some(path) = &*FILE.lock().unwrap_or_else(PoisonError::into_inner) {
            let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed();
            let mut file = OpenOptions::new().append(true).create(true).mode(0o640).custom_flags(flags).open(path)?;
            file.write_all(line)?;
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
