//! The command line of `early`.

use std::path::PathBuf;

use anyhow::Context;
use lexopt::Arg::{Long, Short};
use lexopt::ValueExt;

/// What `--help` prints.
pub(crate) const HELP: &str = "\
early --root DIR [--run-dir DIR] [--config FILE] [--cmdline STRING] [--dry-run]

Mounts the overlays and the tmpfs folders of the system at DIR, before the pivot.

  --root DIR        the system's root, for example /sysroot or /new_root
  --run-dir DIR     where our tmpfs and our binds go [/run/initramfs/ephemeral-overlay]
  --config FILE     instead of DIR/etc/ephemeral-overlay.toml
  --cmdline STRING  instead of /proc/cmdline
  --dry-run         print the plan and do nothing

Exit status: 0 planned and done, or nothing to do; 1 booting from disk; 2 usage; 3 something was skipped (said).";

/// The parsed command line.
#[derive(Debug)]
pub(crate) struct Args {
    /// `--root`.
    pub root: PathBuf,
    /// `--run-dir`.
    pub run_dir: Option<PathBuf>,
    /// `--config`.
    pub config: Option<PathBuf>,
    /// `--dry-run`.
    pub dry_run: bool,
    cmdline: Option<String>,
}

impl Args {
    /// Parses the process's arguments; `None` when help was asked for.
    pub(crate) fn parse() -> Result<Option<Self>, lexopt::Error> {
        let mut parser = lexopt::Parser::from_env();
        let (mut root, mut run_dir, mut config, mut cmdline, mut dry_run) = (None, None, None, None, false);
        while let Some(arg) = parser.next()? {
            match arg {
                Long("root") => root = Some(parser.value()?.into()),
                Long("run-dir") => run_dir = Some(parser.value()?.into()),
                Long("config") => config = Some(parser.value()?.into()),
                Long("cmdline") => cmdline = Some(parser.value()?.string()?),
                Long("dry-run") => dry_run = true,
                Long("help") | Short('h') => return Ok(None),
                other => return Err(other.unexpected()),
            }
        }
        let root = root.ok_or("--root DIR is missing")?;
        Ok(Some(Self { root, run_dir, config, dry_run, cmdline }))
    }

    /// The kernel command line.
    pub(crate) fn cmdline(&self) -> anyhow::Result<String> {
        match &self.cmdline {
            Some(given) => Ok(given.clone()),
            None => std::fs::read_to_string("/proc/cmdline").context("read /proc/cmdline"),
        }
    }
}
