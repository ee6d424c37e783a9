//! What lower has at a path, reduced to what tells that somebody changed it on disk. Times alone are no change.

use ephemeral_overlay::error::At;
use rustix::fs::{FileType, fstat};
use rustix::io::Errno;
use serde::Serialize;

use crate::content;
use crate::digest::{self, Digest};
use crate::entry::{Base, Kind};
use crate::error::{Error, Result};
use crate::path::RelPath;
use crate::scan::{Object, View, scan_below};
use crate::tree::Tree;

/// One object in the digest of a subtree.
#[derive(Serialize)]
struct Line<'a> {
    path: &'a RelPath,
    owner: (u32, u32, u32),
    kind: Option<&'a Kind>,
    content: Option<Digest>,
}

/// What lower has at `path`. With `hides`, a directory is taken with everything below it. A disk that fails to read the
/// old version must not keep the new one from being saved.
///
/// # Errors
/// Whatever reading lower says.
pub fn capture(lower: &Tree, path: &RelPath, hides: bool, seed: u64) -> Result<Base> {
    match whole_or_dir(lower, path, hides, seed) {
        Err(Error::System(error)) if error.errno() == Some(Errno::IO) => Ok(Base::Unknown),
        other => other,
    }
}

fn whole_or_dir(lower: &Tree, path: &RelPath, hides: bool, seed: u64) -> Result<Base> {
    let Some(stat) = lower.stat(path)? else { return Ok(Base::Absent) };
    if !hides && FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
        return Ok(Base::Dir { owner: (stat.st_mode & 0o7777, stat.st_uid, stat.st_gid) });
    }
    let found = scan_below(lower, View::Plain, path)?;
    let mut buffer = Vec::new();
    let mut lines = Vec::new();
    for found in &found {
        let (owner, kind, content) = match &found.object {
            Object::File => {
                let file = lower.open_file(&found.path)?;
                let shown = lower.show(&found.path);
                let read = content::hash(&file, seed, &mut buffer, &shown)?;
                let stat = fstat(&file).at("fstat", &shown)?;
                ((stat.st_mode & 0o7777, stat.st_uid, stat.st_gid), None, Some(read.digest))
            }
            Object::Other(kind, meta) => ((meta.mode, meta.uid, meta.gid), Some(kind), None),
            Object::Whiteout => continue,
        };
        lines.push(Line { path: &found.path, owner, kind, content });
    }
    let bytes = postcard::to_stdvec(&lines)
        .map_err(|error| std::io::Error::new(std::io::ErrorKind::InvalidInput, error))
        .at("encode", lower.show(path))?;
    Ok(Base::Whole { digest: digest::of_bytes(&bytes, seed) })
}
