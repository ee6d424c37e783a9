//! A small system on a disk, and the two programs that it is about, as black boxes: nothing of their insides is known
//! here but the names of what must not be left in the store.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context, Result, bail};
use test_support::snapshot::{self, Snapshot};

use crate::disk::detach_all;

/// Only `/etc`: each target is merged by itself, and exactly as the others.
const CONFIG: &str = "overlay.dirs = ['/etc']\ntmpfs = { '/tmp' = false, '/var/tmp' = false, '/var/cache' = false }\n";
/// After this many seconds a program hangs.
const PATIENCE: &str = "120";

/// A system.
#[derive(Debug, Clone)]
pub(crate) struct System {
    /// Its root.
    pub root: PathBuf,
    run: PathBuf,
    config: PathBuf,
    binaries: PathBuf,
    /// The programs do their work in one thread.
    pub one_thread: bool,
}

impl System {
    /// The system on the disk that is mounted at `disk`; what is in RAM is below `beside`, which is on no disk.
    pub(crate) fn on(disk: &Path, beside: &Path, binaries: &Path) -> Result<Self> {
        let config = beside.join("config.toml");
        fs::write(&config, CONFIG).with_context(|| format!("write {}", config.display()))?;
        let (root, run) = (disk.join("root"), beside.join("run"));
        Ok(Self { root, run, config, binaries: binaries.to_path_buf(), one_thread: false })
    }

    /// Makes its directories.
    pub(crate) fn create(&self) -> Result<()> {
        for directory in ["etc", "var/log", "var/tmp", "var/cache", "tmp", "persist", "usr/lib/ephemeral-overlay"] {
            fs::create_dir_all(self.root.join(directory)).with_context(|| format!("mkdir {directory}"))?;
        }
        let counterpart = self.root.join("usr/lib/ephemeral-overlay/counterpart");
        fs::write(counterpart, "format = 1\n").context("write counterpart")
    }

    /// `/etc`, through the overlay where there is one.
    pub(crate) fn etc(&self) -> PathBuf {
        self.root.join("etc")
    }

    /// Everything that one sees of it.
    pub(crate) fn look(&self) -> Snapshot {
        snapshot::take(&self.etc())
    }

    /// Boots.
    pub(crate) fn boot(&self) -> Result<()> {
        let output = self.program("early", &[], true).args(["--cmdline", ""]).output().context("running early")?;
        expect(&output, &[0], "early")?;
        Ok(())
    }

    /// Runs `syncd` on the running system.
    pub(crate) fn syncd(&self, arguments: &[&str]) -> Result<Output> {
        self.program("syncd", arguments, true).output().context("running syncd")
    }

    /// Merges as the next boot does, before it mounts.
    pub(crate) fn merge_at_boot(&self) -> Result<Output> {
        self.program("syncd", &["merge"], false).output().context("running syncd")
    }

    fn program(&self, name: &str, arguments: &[&str], runs: bool) -> Command {
        let mut command = Command::new("timeout");
        command.args(["--signal=KILL", PATIENCE]).arg(self.binaries.join(name)).args(arguments);
        command.arg("--root").arg(&self.root).arg("--config").arg(&self.config);
        if runs {
            command.arg("--run-dir").arg(&self.run);
        }
        if self.one_thread {
            command.env("RAYON_NUM_THREADS", "1");
        }
        command
    }

    /// Everything in RAM is gone, and nothing is written to the disk for that.
    pub(crate) fn cut(&self) -> Result<()> {
        detach_all(&self.root)?;
        detach_all(&self.run)?;
        if self.run.exists() {
            fs::remove_dir_all(&self.run).with_context(|| format!("unlink {}", self.run.display()))?;
        }
        Ok(())
    }

    /// Where the store is.
    pub(crate) fn persist(&self) -> PathBuf {
        self.root.join("persist")
    }

    /// The store.
    pub(crate) fn store(&self) -> PathBuf {
        self.persist().join("ephemeral-overlay")
    }

    /// How many checkpoints are in the store.
    pub(crate) fn checkpoints(&self) -> Result<usize> {
        Ok(self.in_store()?.iter().filter(|path| path.extension().is_some_and(|name| name == "ckpt")).count())
    }

    /// What of the store says that something is pending: checkpoints, marks, chains that were set aside.
    pub(crate) fn pending(&self) -> Result<Vec<PathBuf>> {
        let is_pending = |name: &str| {
            Path::new(name).extension().is_some_and(|extension| extension == "ckpt")
                || ["merging", "disk-boot", "aside"].contains(&name)
        };
        self.named(is_pending)
    }

    /// What is unfinished in the store.
    pub(crate) fn unfinished(&self) -> Result<Vec<PathBuf>> {
        self.named(|name| name.starts_with(".tmp-"))
    }

    fn named(&self, wanted: impl Fn(&str) -> bool) -> Result<Vec<PathBuf>> {
        let mut all = self.in_store()?;
        all.retain(|path| path.file_name().is_some_and(|name| wanted(&name.to_string_lossy())));
        Ok(all)
    }

    /// Everything in the store, but for what a user is to look at.
    fn in_store(&self) -> Result<Vec<PathBuf>> {
        let mut pending = vec![self.store()];
        let mut all = Vec::new();
        while let Some(directory) = pending.pop() {
            let entries = match fs::read_dir(&directory) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                other => other.with_context(|| format!("listing {}", directory.display()))?,
            };
            for entry in entries {
                let entry = entry?;
                if entry.file_type()?.is_dir() && entry.file_name() != "conflicts" {
                    pending.push(entry.path());
                }
                all.push(entry.path());
            }
        }
        Ok(all)
    }
}

/// Expects one of some exit statuses; returns the one that it was.
pub(crate) fn expect(output: &Output, statuses: &[i32], what: &str) -> Result<i32> {
    match output.status.code() {
        Some(code) if statuses.contains(&code) => Ok(code),
        _ => bail!("{what}: {}\n{}", output.status, said(output)),
    }
}

/// Everything that a program said.
pub(crate) fn said(output: &Output) -> String {
    let text = [&output.stdout[..], &output.stderr[..]].concat();
    String::from_utf8_lossy(&text).trim_end().to_owned()
}
