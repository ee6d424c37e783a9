//! Builds our own binaries and says where they are.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// The cargo that runs us.
pub(crate) fn cargo() -> Command {
    Command::new(std::env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo")))
}

/// Builds the binary of `package` with more arguments and variables for cargo; returns its path.
pub(crate) fn binary(package: &str, arguments: &[&str], variables: &[(&str, &str)]) -> Result<PathBuf> {
    let output = cargo()
        .args(["build", "--quiet", "--locked", "--message-format=json-render-diagnostics", "--package", package])
        .args(["--bin", package])
        .args(arguments)
        .envs(variables.iter().copied())
        .stderr(Stdio::inherit())
        .output()
        .context("running cargo build")?;
    if !output.status.success() {
        bail!("cargo build --package {package}: {}", output.status);
    }
    let messages = output.stdout.split(|&byte| byte == b'\n').filter(|line| !line.is_empty());
    let artifacts = messages.filter_map(|line| serde_json::from_slice::<Value>(line).ok());
    let executables = artifacts.filter(|message| message["target"]["name"] == package);
    let mut executables = executables.filter_map(|message| message["executable"].as_str().map(PathBuf::from));
    executables.next_back().with_context(|| format!("cargo built no executable of {package}"))
}

/// The target triple of this machine.
pub(crate) fn host() -> Result<String> {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| OsString::from("rustc"));
    let output = Command::new(rustc).arg("-vV").output().context("running rustc -vV")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let host = text.lines().find_map(|line| line.strip_prefix("host: "));
    host.map(str::to_owned).context("rustc -vV names no host")
}
