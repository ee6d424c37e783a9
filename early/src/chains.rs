//! Checkpoints that wait in the store.

use std::collections::BTreeSet;
use std::path::Path;

use ephemeral_overlay::Layout;
use ephemeral_overlay::error::{At, SystemError};
use ephemeral_overlay::layout::STORE_DIR;
use rustix::fs::{Dir, OFlags};
use rustix::io::Errno;

/// The names of the targets whose store folder holds checkpoints or an unfinished merge, or cannot be looked at: such a
/// target must not be mounted as if it had none, and `syncd` says why when it is asked.
///
/// # Errors
/// When the store cannot be listed: all targets are such ones then.
pub fn pending(layout: &Layout, persist: &Path) -> Result<BTreeSet<String>, SystemError> {
    let targets = persist.join(STORE_DIR).join("targets");
    let is_work =
        |file: &String| Path::new(file).extension().is_some_and(|extension| extension == "ckpt") || file == "merging";
    let mut names = names(layout, &targets)?;
    names.retain(|name| self::names(layout, &targets.join(name)).map_or(true, |files| files.iter().any(is_work)));
    Ok(names.into_iter().collect())
}

/// The names in a directory; none where nothing is.
fn names(layout: &Layout, path: &Path) -> Result<Vec<String>, SystemError> {
    let fd = match layout.open(path, OFlags::RDONLY | OFlags::DIRECTORY) {
        Err(error) if error.errno() == Some(Errno::NOENT) => return Ok(Vec::new()),
        other => other?,
    };
    let mut names = Vec::new();
    for entry in Dir::new(fd).at("getdents64", path)? {
        let entry = entry.at("getdents64", path)?;
        names.extend(entry.file_name().to_str().ok().filter(|name| !name.starts_with('.')).map(str::to_owned));
    }
    Ok(names)
}
