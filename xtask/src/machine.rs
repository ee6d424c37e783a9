//! A copy of this machine's `/etc` and `/var/log` as a system of its own.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::packages;

/// A log longer than this is left out of the copy.
const LARGE: u64 = 32 << 20;
/// The most of `/var/log` that is copied.
const LOGS: u64 = 256 << 20;

/// What is to be copied.
#[derive(Debug, Default)]
pub(crate) struct Selection {
    /// The length of all files together.
    pub bytes: u64,
    /// How many files, directories and so on.
    pub objects: u64,
    /// What is left out, and how long it is.
    pub left_out: Vec<(PathBuf, u64)>,
}

/// Looks at `/etc` and `/var/log` and decides what is too large.
pub(crate) fn select() -> Result<Selection> {
    let mut etc = Vec::new();
    walk(Path::new("/etc"), &mut etc)?;
    let mut logs = Vec::new();
    walk(Path::new("/var/log"), &mut logs)?;
    let mut selection = Selection::default();
    logs.sort_by_key(|&(_, bytes)| bytes);
    let mut kept = 0;
    for (path, bytes) in logs {
        if bytes > LARGE || kept + bytes > LOGS {
            selection.left_out.push((path, bytes));
        } else {
            kept += bytes;
            selection.objects += 1;
        }
    }
    selection.objects += etc.len() as u64;
    selection.bytes = kept + etc.iter().map(|(_, bytes)| bytes).sum::<u64>();
    Ok(selection)
}

fn walk(directory: &Path, found: &mut Vec<(PathBuf, u64)>) -> Result<()> {
    for entry in fs::read_dir(directory).with_context(|| format!("listing {}", directory.display()))? {
        let path = entry?.path();
        // What is gone by now is not copied either.
        let Ok(metadata) = fs::symlink_metadata(&path) else { continue };
        if metadata.is_dir() {
            found.push((path.clone(), 0));
            walk(&path, found)?;
        } else {
            let bytes = metadata.size().min(metadata.blocks() * 512);
            found.push((path, bytes));
        }
    }
    Ok(())
}

/// Copies the selection to the empty root directory `root` and makes a system of it.
pub(crate) fn copy(selection: &Selection, root: &Path) -> Result<()> {
    let list = tempfile::NamedTempFile::new()?;
    let names: Vec<u8> = selection.left_out.iter().flat_map(|(path, _)| pattern(path)).collect();
    fs::write(list.path(), names)?;
    // The pax format has whole times.
    let mut pack = Command::new("tar")
        .args(["--create", "--format=posix", "--xattrs", "--xattrs-include=*", "--sparse", "--directory=/"])
        .args(["--null", "--no-wildcards", "--anchored", "--exclude-from"])
        .arg(list.path())
        .args(["--warning=no-file-ignored", "etc", "var/log"])
        .env("PATH", packages::path())
        .stdout(Stdio::piped())
        .spawn()
        .context("running tar")?;
    let archive = pack.stdout.take().context("tar has no output")?;
    let unpacked = Command::new("tar")
        .args(["--extract", "--preserve-permissions", "--same-owner", "--numeric-owner"])
        .args(["--xattrs", "--xattrs-include=*", "--delay-directory-restore", "--directory"])
        .arg(root)
        .env("PATH", packages::path())
        .stdin(archive)
        .status()
        .context("running tar")?;
    // 1: a file changed while it was read, as logs do.
    if !matches!(pack.wait()?.code(), Some(0 | 1)) || !unpacked.success() {
        bail!("copying /etc and /var/log failed");
    }
    complete(root)
}

/// A line of the list of what tar leaves out.
fn pattern(path: &Path) -> Vec<u8> {
    use std::os::unix::ffi::OsStrExt;
    let relative = path.strip_prefix("/").unwrap_or(path);
    [relative.as_os_str().as_bytes(), b"\0"].concat()
}

/// What a system with an installation of ours has beside its `/etc` and `/var/log`.
fn complete(root: &Path) -> Result<()> {
    for directory in ["tmp", "var/tmp", "var/cache", "usr/lib/ephemeral-overlay"] {
        fs::create_dir_all(root.join(directory))?;
    }
    fs::write(root.join("usr/lib/ephemeral-overlay/counterpart"), "format = 1\n")?;
    // This machine's file systems and its own settings say nothing about the copy.
    fs::write(root.join("etc/fstab"), "# the copy is one file system\n/dev/root / ext4 defaults 0 1\n")?;
    for name in ["etc/ephemeral-overlay.toml", "etc/ephemeral-overlay.d"] {
        let path = root.join(name);
        match fs::symlink_metadata(&path) {
            Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(&path)?,
            Ok(_) => fs::remove_file(&path)?,
            Err(_) => {}
        }
    }
    Ok(())
}
