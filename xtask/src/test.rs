//! `cargo xtask test`: all tests, with everything that they need.

use std::process::{ExitCode, Stdio};

use anyhow::{Context, Result, bail};

use crate::say::say;
use crate::{build, crash, packages};

/// What makes the tests thorough.
const FULL: [(&str, &str); 7] = [
    ("BOOTS", "full"),
    ("ERRORS", "full"),
    ("KILLS", "full"),
    ("RELEASE", "full"),
    ("HOSTILE_SECONDS", "600"),
    ("LIVE_OPERATIONS", "100000"),
    ("DAY_CHECKPOINTS", "300"),
];

/// Runs all tests, and the power cuts of `cargo xtask crash` in a small choice; a tier that could not run is a failure,
/// not a note.
pub(crate) fn run(full: bool, args: &[String]) -> Result<ExitCode> {
    packages::ensure(&packages::TEST)?;
    let boots = can_boot();
    if boots {
        packages::ensure(&packages::BOOT)?;
    } else {
        say("the virtual machines are left out: their kernels and systems are Debian's, for x86_64");
    }
    let tiers = if boots { "namespace,qemu" } else { "namespace" };
    let mut variables = vec![("REQUIRE_TIERS", tiers)];
    variables.extend(if full { &FULL[..] } else { &[("BOOTS", "some")] });
    let done = cargo_test(&[&["--workspace".to_owned()], args].concat(), &variables)?;
    // Last, as it leaves us in a mount namespace of our own.
    if done == ExitCode::SUCCESS && args.is_empty() { crash::sample() } else { Ok(done) }
}

/// Runs one test of the boots, with what it says.
pub(crate) fn one_boot(name: &str, variables: &[(&str, &str)]) -> Result<ExitCode> {
    if !can_boot() {
        bail!("the virtual machines' kernels and systems are Debian's, for x86_64");
    }
    packages::ensure(&[&packages::TEST[..], &packages::BOOT].concat())?;
    let args = ["--test", "qemu", "--", "--nocapture", name].map(str::to_owned);
    cargo_test(&args, &[variables, &[("REQUIRE_TIERS", "qemu")]].concat())
}

/// Whether the virtual machines can run here.
pub(crate) fn can_boot() -> bool {
    packages::has_apt() && cfg!(target_arch = "x86_64")
}

/// Runs one test of the boots; returns what it says.
pub(crate) fn output_of(name: &str, variables: &[(&str, &str)]) -> Result<String> {
    packages::ensure(&[&packages::TEST[..], &packages::BOOT].concat())?;
    let output = build::cargo()
        .args(["test", "--locked", "--test", "qemu", "--", "--nocapture", name])
        .envs(variables.iter().copied())
        .envs([("REQUIRE_TIERS", "qemu")])
        .env("PATH", packages::path())
        .stderr(Stdio::inherit())
        .output()
        .context("running cargo test")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        bail!("{name}: {}\n{text}", output.status);
    }
    Ok(text)
}

fn cargo_test(args: &[String], variables: &[(&str, &str)]) -> Result<ExitCode> {
    let status = build::cargo()
        .args(["test", "--locked"])
        .args(args)
        .envs(variables.iter().copied())
        .env("PATH", packages::path())
        .status()
        .context("running cargo test")?;
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(code.map_or(ExitCode::FAILURE, ExitCode::from))
}
