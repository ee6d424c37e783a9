//! One command, timed, with its processor time and its peak memory. A process of its own starts it: the kernel tells the peak only of all
//! children together.

use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use serde_json::{Value, json};

use crate::packages;
use crate::say::say;

/// What a command came to.
#[derive(Debug, Clone, Copy)]
pub(super) struct Measured {
    /// From its start to its end.
    pub(super) time: Duration,
    /// What it, and the commands that it started, took of the processors.
    pub(super) cpu: Duration,
    /// The most memory that it, or a command that it started, had at once, in bytes.
    pub(super) peak: u64,
}

/// Runs a command line for `sh` and measures it.
pub(super) fn measure(line: &str) -> Result<Measured> {
    let output = Command::new(std::env::current_exe().context("finding this program")?)
        .args(["measured", line])
        .env("PATH", packages::path())
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .output()
        .context("running a measurement")?;
    if !output.status.success() {
        bail!("`{line}`: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    let value: Value = serde_json::from_slice(&output.stdout).context("reading a measurement")?;
    let number = |key: &str| value[key].as_u64().with_context(|| format!("a measurement without {key}"));
    let time = |key| number(key).map(Duration::from_nanos);
    Ok(Measured { time: time("nanoseconds")?, cpu: time("cpu")?, peak: number("kilobytes")? << 10 })
}

/// The process of its own.
pub(crate) fn measured(line: &str) -> Result<ExitCode> {
    let start = Instant::now();
    let output = Command::new("sh").args(["-c", line]).stdin(Stdio::null()).stdout(Stdio::null()).status();
    let time = start.elapsed();
    let status = output.with_context(|| format!("running {line}"))?;
    if !status.success() {
        bail!("{status}, signal {:?}", status.signal());
    }
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN).context("getrusage")?;
    let cpu = usage.user_time() + usage.system_time();
    let cpu = cpu.num_microseconds() * 1000;
    let said = json!({ "nanoseconds": u64::try_from(time.as_nanos())?, "cpu": cpu, "kilobytes": usage.max_rss() });
    say(&said.to_string());
    Ok(ExitCode::SUCCESS)
}
