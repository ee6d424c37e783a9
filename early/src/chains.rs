//! Checkpoints that wait in the store.

use std::collections::BTreeSet;
use std::path::Path;

use ephemeral_overlay::Layout;
use ephemeral_overlay::layout::STORE_DIR;
use rustix::fs::{Dir, OFlags};

/// The names of the targets whose store folder holds checkpoints or an unfinished merge.
///
/// A store that cannot be read holds none that could be merged; `syncd` says why when it is asked.
#[must_use]
pub fn pending(layout: &Layout, persist: &Path) -> BTreeSet<String> {
    let targets = persist.join(STORE_DIR).join("targets");
    let names = |path: &Path| -> Vec<String> {
        let Ok(fd) = layout.open(path, OFlags::RDONLY | OFlags::DIRECTORY) else { return Vec::new() };
        let Ok(dir) = Dir::new(fd) else { return Vec::new() };
        dir.flatten().filter_map(|entry| entry.file_name().to_str().ok().map(str::to_owned)).collect()
    };
    let holds_work = |name: &String| {
        let is_work = |file: &String| {
            Path::new(file).extension().is_some_and(|extension| extension == "ckpt") || file == "merging"
        };
        !name.starts_with('.') && names(&targets.join(name)).iter().any(is_work)
    };
    names(&targets).into_iter().filter(holds_work).collect()
}
