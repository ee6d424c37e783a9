//! The programs of this machine, and where the tests keep what they make.

use std::env;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, bail};

/// A directory of the boot tests below cargo's target directory.
pub(crate) fn kept(name: &str) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("qemu").join(name)
}

/// The root of this repository.
pub(crate) fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Where `program` is; root's directories are looked at too, which a login as an ordinary user leaves out.
pub(crate) fn which(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let found = env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    found.map(|directory| directory.join(program)).find(|path| path.is_file())
}

/// A program of the system, ready to be run.
pub(crate) fn command(program: &str) -> Result<Command> {
    let path = which(program).with_context(|| format!("{program} is not installed"))?;
    let mut command = Command::new(path);
    command.stdin(Stdio::null());
    Ok(command)
}

/// Runs a program of the system; returns what it wrote to standard output.
pub(crate) fn run<A: AsRef<OsStr>>(program: &str, arguments: &[A]) -> Result<Vec<u8>> {
    finish(command(program)?.args(arguments))
}

/// Runs a command to its end and expects it to succeed; returns what it wrote to standard output.
pub(crate) fn finish(command: &mut Command) -> Result<Vec<u8>> {
    let output = command.output().with_context(|| format!("running {command:?}"))?;
    if !output.status.success() {
        bail!("{command:?}: {}", text(&output));
    }
    Ok(output.stdout)
}

/// Everything a program said.
pub(crate) fn text(output: &Output) -> String {
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    format!("{}\n{out}{err}", output.status)
}
