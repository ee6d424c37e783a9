//! The only place that makes something durable: temporary name, contents, fsync, rename, fsync of the directory.
//!
//! A reader sees the old file or the new one, whole, and what returned `Ok` survives a power cut one instant later.
//! A temporary file that a cut leaves behind is swept by the next writer, who holds the store's lock.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use ephemeral_overlay::error::{At, SystemError};
use rustix::fs::OFlags;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tempfile::Builder;

use crate::digest;
use crate::error::{Error, Result};
use crate::tree;

/// What the names of unfinished files begin with.
const TEMPORARY: &str = ".tmp-";
/// The bytes of the digest in front of a record.
const DIGEST: usize = 16;

/// Makes `directory`/`name` be what `fill` writes. On any error the file that was there before is untouched.
///
/// # Errors
/// Whatever `fill`, fsync(2) or rename(2) says.
pub fn write_file<T>(directory: &Path, name: &str, fill: impl FnOnce(&mut File) -> Result<T>) -> Result<T> {
    let path = directory.join(name);
    let mut temporary = Builder::new().prefix(TEMPORARY).tempfile_in(directory).at("open", directory)?;
    let value = fill(temporary.as_file_mut())?;
    temporary.as_file().sync_all().at("fsync", &path)?;
    temporary.persist(&path).map_err(|error| error.error).at("rename", &path)?;
    sync_directory(directory)?;
    Ok(value)
}

/// Writes a small record with its digest in front.
///
/// # Errors
/// As [`write_file`].
pub fn write_record(directory: &Path, name: &str, record: &impl Serialize) -> Result<()> {
    let body = postcard::to_stdvec(record)
        .map_err(|error| std::io::Error::new(ErrorKind::InvalidInput, error))
        .at("encode", directory.join(name))?;
    let digest = digest::of_bytes(&body, 0).0.to_le_bytes();
    write_file(directory, name, |file| {
        use std::io::Write;
        file.write_all(&digest).at("write", directory.join(name))?;
        Ok(file.write_all(&body).at("write", directory.join(name))?)
    })
}

/// Reads a record that [`write_record`] wrote; `None` when there is none.
///
/// # Errors
/// When it cannot be read, or is damaged.
pub fn read_record<T: DeserializeOwned>(directory: &Path, name: &str) -> Result<Option<T>> {
    let path = directory.join(name);
    let mut bytes = Vec::new();
    match open(&path) {
        Ok(mut file) => file.read_to_end(&mut bytes).at("read", &path)?,
        Err(error) if error.source.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let damaged = |what: &str| Error::Damaged { path: path.clone(), what: what.to_owned() };
    let Some((digest, body)) = bytes.split_at_checked(DIGEST) else { return Err(damaged("it is too short")) };
    if digest::of_bytes(body, 0).0.to_le_bytes() != digest {
        return Err(damaged("its digest is wrong"));
    }
    postcard::from_bytes(body).map(Some).map_err(|error| damaged(&error.to_string()))
}

/// Creates `path` (0700) and what is missing above it, durably.
///
/// # Errors
/// Whatever mkdir(2) or fsync(2) says.
pub fn create_directory(path: &Path) -> Result<(), SystemError> {
    if path.is_dir() {
        return Ok(());
    }
    if let Some(parent) = path.parent() {
        create_directory(parent)?;
    }
    match fs::DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
        other => other.at("mkdir", path)?,
    }
    path.parent().map_or(Ok(()), sync_directory)
}

/// Removes `directory`/`name`, durably; nothing there is as good.
///
/// # Errors
/// Whatever unlink(2) or fsync(2) says.
pub fn remove_file(directory: &Path, name: &str) -> Result<(), SystemError> {
    remove_files(directory, &[name])
}

/// Removes several files of a directory, in this order, durably; after a cut any of them may still be there.
///
/// # Errors
/// Whatever unlink(2) or fsync(2) says.
pub fn remove_files(directory: &Path, names: &[impl AsRef<Path>]) -> Result<(), SystemError> {
    for name in names {
        let path = directory.join(name);
        match fs::remove_file(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            other => other.at("unlink", &path)?,
        }
    }
    if names.is_empty() { Ok(()) } else { sync_directory(directory) }
}

/// Gives several files of a directory a second name in another one, durably; a name that is there is this one already.
///
/// # Errors
/// Whatever link(2) or fsync(2) says.
pub fn link_files(from: &Path, to: &Path, names: &[impl AsRef<Path>]) -> Result<(), SystemError> {
    for name in names {
        match fs::hard_link(from.join(name), to.join(name)) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            other => other.at("link", to.join(name))?,
        }
    }
    sync_directory(to)
}

/// Renames within one file system, durably.
///
/// # Errors
/// Whatever rename(2) or fsync(2) says.
pub fn rename(from: &Path, to: &Path) -> Result<(), SystemError> {
    fs::rename(from, to).at("rename", from)?;
    for directory in [to.parent(), from.parent()].into_iter().flatten() {
        sync_directory(directory)?;
    }
    Ok(())
}

/// Makes the finished directory `temporary` be `path`, with everything in it, replacing what was there.
///
/// # Errors
/// Whatever syncfs(2), unlink(2), rename(2) or fsync(2) says.
pub fn publish_directory(temporary: &Path, path: &Path) -> Result<(), SystemError> {
    rustix::fs::syncfs(File::open(temporary).at("open", temporary)?).at("syncfs", temporary)?;
    if let Some(parent) = path.parent() {
        create_directory(parent)?;
    }
    if exists(path)? {
        fs::remove_dir_all(path).at("unlink", path)?;
    }
    rename(temporary, path)
}

/// Whether something is at `path`. That it cannot be seen is no answer.
///
/// # Errors
/// Whatever stat(2) says, save that nothing is there.
pub fn exists(path: &Path) -> Result<bool, SystemError> {
    path.try_exists().at("stat", path)
}

/// Opens what is at `path` for reading, and writes nothing by that: not even the time of the last access. Never waits for
/// the other end of a FIFO.
///
/// # Errors
/// Whatever open(2) says.
pub fn open(path: &Path) -> Result<File, SystemError> {
    let open = |flags: OFlags| File::options().read(true).custom_flags(flags.bits().cast_signed()).open(path);
    match open(OFlags::NONBLOCK | OFlags::NOATIME) {
        // It belongs to somebody else, open(2).
        Err(error) if error.kind() == ErrorKind::PermissionDenied => open(OFlags::NONBLOCK),
        other => other,
    }
    .at("open", path)
}

/// The names in a directory, sorted.
///
/// # Errors
/// Whatever open(2) or getdents64(2) says.
pub fn names(directory: &Path) -> Result<Vec<OsString>, SystemError> {
    tree::list(open(directory)?.as_fd(), directory)
}

/// Makes the names in a directory durable.
///
/// # Errors
/// Whatever open(2) or fsync(2) says.
pub fn sync_directory(path: &Path) -> Result<(), SystemError> {
    File::open(path).at("open", path)?.sync_all().at("fsync", path)
}

/// Removes what a cut left unfinished in `directory`. Only for the holder of the store's lock.
///
/// # Errors
/// Whatever the listing or unlink(2) says.
pub fn sweep(directory: &Path) -> Result<(), SystemError> {
    for name in names(directory)?.iter().filter(|name| name.as_bytes().starts_with(TEMPORARY.as_bytes())) {
        let path = directory.join(name);
        let is_dir = fs::symlink_metadata(&path).at("lstat", &path)?.is_dir();
        if is_dir { fs::remove_dir_all(&path) } else { fs::remove_file(&path) }.at("unlink", &path)?;
    }
    Ok(())
}

/// The name of an unfinished directory that [`sweep`] will find.
#[must_use]
pub fn temporary_name(name: &str) -> String {
    format!("{TEMPORARY}{name}")
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn an_error_leaves_the_old_file_and_no_temporary() {
        let directory = tempfile::tempdir().unwrap();
        write_record(directory.path(), "x", &7u32).unwrap();
        let failed: Result<()> = write_file(directory.path(), "x", |file| {
            file.write_all(b"half").unwrap();
            Err(std::io::Error::from(ErrorKind::StorageFull)).at("write", "x").map_err(Into::into)
        });
        assert!(failed.is_err());
        assert_eq!(read_record::<u32>(directory.path(), "x").unwrap(), Some(7));
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_damaged_record_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        write_record(directory.path(), "x", &7u32).unwrap();
        let path = directory.path().join("x");
        let mut bytes = fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&path, bytes).unwrap();
        assert!(matches!(read_record::<u32>(directory.path(), "x"), Err(Error::Damaged { .. })));
        assert_eq!(read_record::<u32>(directory.path(), "y").unwrap(), None);
    }
}
