//! Checkpoints that wait in the store: merged by the static `syncd` beside us, before anything is mounted.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};
use ephemeral_overlay::Layout;
use ephemeral_overlay::layout::STORE_DIR;
use rustix::fs::{Dir, OFlags};

/// The names of the targets whose store folder holds checkpoints or an unfinished merge.
///
/// A store that cannot be read holds none that could be merged; `syncd` says why when it is asked.
pub(crate) fn pending(layout: &Layout, persist: &Path) -> BTreeSet<String> {
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

/// Merges what is pending. A failure is said by `syncd` and leaves the chain; the caller looks again.
pub(crate) fn merge_pending(layout: &Layout, persist: &Path) {
    if pending(layout, persist).is_empty() {
        return;
    }
    if let Err(error) = run(layout, &[OsStr::new("merge")]) {
        super::complain(&format!("merging pending checkpoints: {error:#}"), super::SKIPPED);
    }
}

/// Unpacks the chain of `target` into its upper directory, so that the view is exact although the merge failed.
pub(crate) fn unpack(layout: &Layout, target: &Path) -> anyhow::Result<()> {
    let upper = layout.upper(target);
    run(layout, &[OsStr::new("unpack"), OsStr::new("--upper"), upper.as_os_str(), target.as_os_str()])
}

fn run(layout: &Layout, arguments: &[&OsStr]) -> anyhow::Result<()> {
    let syncd = syncd();
    let mut command = Command::new(&syncd);
    command.args(arguments).arg("--root").arg(layout.root()).arg("--progress").arg(layout.progress());
    if let Some(config) = layout.named_config() {
        command.arg("--config").arg(config);
    }
    let status = command.status().with_context(|| format!("execve {}", syncd.display()))?;
    match status.code() {
        Some(0 | 3) => Ok(()),
        _ => bail!("{} ended with {status}", syncd.display()),
    }
}

/// The `syncd` that was put into the initramfs together with this binary.
fn syncd() -> PathBuf {
    let sibling = std::env::current_exe().ok().map(|own| own.with_file_name("syncd"));
    sibling.filter(|path| path.exists()).unwrap_or_else(|| "syncd".into())
}
