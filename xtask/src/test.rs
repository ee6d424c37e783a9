//! `cargo xtask test`: all tests, with everything that they need.

use std::process::ExitCode;

use anyhow::{Context, Result};

use crate::{build, packages};

/// Runs `cargo test`; a tier that could not run is a failure, not a note.
pub(crate) fn run(boot: bool, args: &[String]) -> Result<ExitCode> {
    packages::ensure(&packages::TEST)?;
    if boot {
        packages::ensure(&packages::BOOT)?;
    }
    let status = build::cargo()
        .args(["test", "--workspace", "--locked"])
        .args(args)
        .env("REQUIRE_TIERS", if boot { "namespace,qemu" } else { "namespace" })
        .env("PATH", packages::path())
        .status()
        .context("running cargo test")?;
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(code.map_or(ExitCode::FAILURE, ExitCode::from))
}
