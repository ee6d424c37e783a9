//! The static `syncd` beside us: it merges what is pending before anything is mounted, and unpacks what it cannot merge.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};
use early::chains::pending;
use early::writable::Writable;
use ephemeral_overlay::Layout;

/// Merges what is pending. A failure is said by `syncd` and leaves the chain; the caller looks again.
pub(crate) fn merge_pending(layout: &Layout, persist: &Path) {
    if pending(layout, persist).is_empty() {
        return;
    }
    // Where that is refused (a disk with write protection) the merge says what it cannot do.
    let writable = Writable::make([layout.root().to_path_buf()]).inspect_err(|error| {
        super::complain(&format!("{error:#}"), super::SKIPPED);
    });
    if let Err(error) = run(layout, &[OsStr::new("merge")]) {
        super::complain(&format!("merging pending checkpoints: {error:#}"), super::SKIPPED);
    }
    // A root that is left writable is no reason not to boot; the system remounts it anyway.
    if let Err(error) = writable.map_or(Ok(()), Writable::undo) {
        super::complain(&format!("{error:#}"), super::SKIPPED);
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
