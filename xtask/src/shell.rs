//! Runs commands as a user would type them, and shows them with what they print.

use std::ffi::OsString;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::packages;
use crate::say::{quote, say};

/// A shell that knows `$R`, the system's root, and `$X`, its run directory.
#[derive(Debug)]
pub(crate) struct Shell<'a> {
    /// `$R`.
    pub root: &'a Path,
    /// `$X`.
    pub run_dir: &'a Path,
    /// Where `early` and `syncd` are.
    pub binaries: &'a Path,
}

impl Shell<'_> {
    /// Runs a command line and shows it; a failure is an error.
    pub(crate) fn run(&self, line: &str) -> Result<()> {
        say(&format!("   $ {line}"));
        let output =
            self.command(&format!("exec 2>&1; {line}"))?.output().with_context(|| format!("running {line}"))?;
        quote(&String::from_utf8_lossy(&output.stdout));
        if !output.status.success() {
            bail!("`{line}`: {}", output.status);
        }
        Ok(())
    }

    /// Runs a command line without showing it; returns its standard output.
    pub(crate) fn read(&self, line: &str) -> Result<Vec<u8>> {
        let output =
            self.command(line)?.stderr(Stdio::inherit()).output().with_context(|| format!("running {line}"))?;
        if !output.status.success() {
            bail!("`{line}`: {}", output.status);
        }
        Ok(output.stdout)
    }

    fn command(&self, line: &str) -> Result<Command> {
        let mut path = OsString::from(self.binaries);
        path.push(":");
        path.push(packages::path());
        let mut command = Command::new("sh");
        command.args(["-c", line]).env("R", self.root).env("X", self.run_dir).env("PATH", path);
        command.env("LC_ALL", "C").stdin(Stdio::null());
        // Paths in $R and $X are used unquoted, to be read easily.
        match [self.root, self.run_dir].iter().find(|path| path.to_string_lossy().contains(|c: char| c.is_whitespace()))
        {
            Some(path) => bail!("{} has a space in it; set TMPDIR to a plain directory", path.display()),
            None => Ok(command),
        }
    }
}
