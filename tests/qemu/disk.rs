//! A disk image, made and looked at without mounting it, so that neither root nor a loop device is needed.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

use crate::tools::{self, run};

/// What the tests look at.
const DIRECTORIES: [&str; 3] = ["/etc", "/var", "/persist"];
/// In bytes.
const SIZE: u64 = 64 << 20;

/// What is on a disk, after the file system's journal has been replayed.
#[derive(Debug)]
pub(crate) struct Disk {
    directory: TempDir,
}

impl Disk {
    /// Makes an ext4 image of the tree at `root`; everything in it belongs to root.
    pub(crate) fn create(image: &Path, root: &Path) -> Result<()> {
        fs::File::create(image).and_then(|file| file.set_len(SIZE)).with_context(|| image.display().to_string())?;
        run("mke2fs", &["-q".as_ref(), "-t".as_ref(), "ext4".as_ref(), "-d".as_ref(), root, image])?;
        Ok(())
    }

    /// The contents of an image, which stays as it is: its journal is replayed, and it is checked, in a copy.
    pub(crate) fn of(image: &Path) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("eo-disk-").tempdir().context("mkdtemp")?;
        let copy = directory.path().join("image");
        fs::copy(image, &copy).with_context(|| format!("copy {}", image.display()))?;
        let replayed = tools::command("e2fsck")?.args(["-p", "-E", "journal_only"]).arg(&copy).output()?;
        ensure!(replayed.status.code() <= Some(1), "e2fsck: {}", tools::text(&replayed));
        let checked = tools::command("e2fsck")?.args(["-f", "-n"]).arg(&copy).output()?;
        ensure!(checked.status.success(), "e2fsck: {}", tools::text(&checked));
        let disk = Self { directory };
        fs::create_dir(disk.root()).context("mkdir")?;
        let request = format!("rdump {} {}", DIRECTORIES.join(" "), disk.root().display());
        run("debugfs", &["-R".as_ref(), request.as_ref(), copy.as_os_str()])?;
        Ok(disk)
    }

    fn root(&self) -> PathBuf {
        self.directory.path().join("root")
    }

    /// Where a path of the disk lies here.
    pub(crate) fn at(&self, path: &str) -> PathBuf {
        self.root().join(path.trim_start_matches('/'))
    }

    /// What stands in a file, without the newline at its end; `None`: there is none.
    pub(crate) fn file(&self, path: &str) -> Option<String> {
        assert!(DIRECTORIES.iter().any(|directory| path.starts_with(directory)), "{path} is not looked at");
        let text = fs::read_to_string(self.at(path)).ok()?;
        Some(text.trim_end_matches('\n').to_owned())
    }

    /// Whether a merge of a target has begun and not ended.
    pub(crate) fn is_half_merged(&self, target: &str) -> bool {
        self.store(target).join("merging").exists()
    }

    /// The names of a target's checkpoint files, sorted.
    pub(crate) fn checkpoints(&self, target: &str) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.store(target)) else { return Vec::new() };
        let names = entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned());
        let mut names: Vec<String> =
            names.filter(|name| Path::new(name).extension().is_some_and(|extension| extension == "ckpt")).collect();
        names.sort();
        names
    }

    fn store(&self, target: &str) -> PathBuf {
        let name = ephemeral_overlay::layout::target_name(Path::new(target));
        self.at("/persist/ephemeral-overlay/targets").join(name)
    }
}
