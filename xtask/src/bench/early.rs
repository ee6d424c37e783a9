//! `cargo xtask bench early`: the time that `early` takes, against a shell script that does the same, and the time that
//! it takes when there are checkpoints to be merged first.
//!
//! The rounds are interleaved and everything is unmounted between them. The script leaves out what only helps `early`
//! later (the configuration, fstab, mountinfo, tokens), so the comparison leans towards the script.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use comfy_table::Table;

use super::report::{Section, table};
use super::{median, milliseconds};
use crate::disk::{self, Disk};
use crate::say::say;
use crate::{build, namespace, packages};

/// How often each is timed.
const ROUNDS: usize = 31;
/// Rounds before that, to fill the caches.
const WARM_UP: usize = 3;
/// How many changed files a chain holds that is merged, and how often that is timed.
const CHAIN: usize = 3000;
const CHAIN_ROUNDS: usize = 7;
/// What is mounted beside the two overlays and the three tmpfs of the defaults.
const CONFIG: &str = "[tmpfs]\n\"/srv/scratch\" = \"64M\"\n";
/// The script.
const SCRIPT: &str = include_str!("early.sh");

/// Runs it.
pub(super) fn measure() -> Result<Section> {
    namespace::require_root()?;
    packages::ensure(&packages::IMAGE)?;
    say("building early, static and stripped");
    let host = build::host()?;
    let flags = [("RUSTFLAGS", "-Ctarget-feature=+crt-static")];
    let small = ["--profile", "initramfs", "--target", &host];
    let early = build::binary("early", &small, &flags)?;
    let syncd = build::binary("syncd", &small, &flags)?;
    namespace::enter()?;
    let place = tempfile::Builder::new().prefix("eo-").tempdir().context("creating a temporary directory")?;
    let mut rows = table(&["", "time", "times early's"]);
    let result = compare(place.path(), &early, &mut rows).and_then(|nothing_pending| {
        disk::detach_all(place.path())?;
        merge(place.path(), &early, &syncd, nothing_pending, &mut rows)
    });
    disk::detach_all(place.path())?;
    place.close().context("removing the temporary directory")?;
    result?;
    let mut section = Section::new("Mounting everything, before the pivot");
    section.add(&format!(
        "`early` with two overlays, four tmpfs, our own tmpfs and five binds, and a shell script that mounts the same; \
         median of {ROUNDS} interleaved rounds. With {CHAIN} changed files to be merged first: median of {CHAIN_ROUNDS}. \
         `early` is {} bytes, static and stripped.",
        fs::metadata(&early)?.len()
    ));
    section.add(&rows);
    Ok(section)
}

fn add(rows: &mut Table, name: &str, time: Duration, early: Duration) {
    let ratio = time.as_secs_f64() / early.as_secs_f64();
    rows.add_row([name.to_owned(), format!("{:.2} ms", milliseconds(time)), format!("{ratio:.1}")]);
}

/// A disk of `bytes` with an empty system on it, mounted.
fn disk_with_system(bytes: u64, root: &Path) -> Result<Disk> {
    fs::create_dir_all(root)?;
    let disk = Disk::create(bytes)?;
    disk.mount(root, "")?;
    for directory in ["etc", "var/log", "tmp", "var/tmp", "var/cache", "srv/scratch", "usr/lib/ephemeral-overlay"] {
        fs::create_dir_all(root.join(directory))?;
    }
    fs::write(root.join("usr/lib/ephemeral-overlay/counterpart"), "format = 1\n")?;
    fs::write(root.join("etc/ephemeral-overlay.toml"), CONFIG)?;
    rustix::fs::syncfs(fs::File::open(root)?).context("syncfs")?;
    Ok(disk)
}

/// Returns what `early` took.
fn compare(place: &Path, early: &Path, rows: &mut Table) -> Result<Duration> {
    let (root, run_dir, script) = (place.join("root"), place.join("run"), place.join("script"));
    fs::write(&script, SCRIPT)?;
    let _disk = disk_with_system(64 << 20, &root)?;
    let with_early = || {
        // As if `syncd` had started after the boot before.
        let _first = fs::remove_file(root.join("persist/ephemeral-overlay/tries"));
        let mut command = Command::new(early);
        command.arg("--root").arg(&root).arg("--run-dir").arg(&run_dir).args(["--cmdline", ""]);
        round(command, place, &run_dir)
    };
    let with_script = || {
        let mut command = Command::new("sh");
        command.arg(&script).arg(&root).arg(&run_dir);
        round(command, place, &run_dir)
    };
    let (mut of_early, mut of_script) = (Vec::new(), Vec::new());
    for number in 0..WARM_UP + ROUNDS {
        let (early, script) = (with_early()?, with_script()?);
        if early.mounts != script.mounts {
            bail!("early and the script mount different things:\n{:#?}\n{:#?}", early.mounts, script.mounts);
        }
        if number >= WARM_UP {
            of_early.push(early.time);
            of_script.push(script.time);
        }
    }
    let (early_time, script_time) = (median(of_early), median(of_script));
    add(rows, "early", early_time, early_time);
    add(rows, "script", script_time, early_time);
    Ok(early_time)
}

/// Times `early` on copies of a disk on which a chain waits.
fn merge(place: &Path, early: &Path, syncd: &Path, nothing_pending: Duration, rows: &mut Table) -> Result<()> {
    let (root, run_dir) = (place.join("root"), place.join("run"));
    let command = |program: &Path| {
        let mut command = Command::new(program);
        command.arg("--root").arg(&root).arg("--run-dir").arg(&run_dir).stdin(Stdio::null());
        command
    };
    let run = |command: &mut Command| -> Result<()> {
        let output = command.output().with_context(|| format!("starting {command:?}"))?;
        if !output.status.success() {
            bail!("{command:?}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
        }
        Ok(())
    };
    let disk = disk_with_system(256 << 20, &root)?;
    run(command(early).args(["--cmdline", ""]))?;
    for number in 0..CHAIN {
        fs::write(root.join(format!("etc/file.{number}")), format!("{number}\n").repeat(100))?;
    }
    run(command(syncd).arg("checkpoint"))?;
    let pending = disk.as_it_is_now()?;
    disk::detach_all(place)?;
    fs::remove_dir_all(&run_dir)?;
    let mut times = Vec::new();
    for _ in 0..CHAIN_ROUNDS {
        let copy = pending.as_it_is_now()?;
        copy.mount(&root, "")?;
        let mut with_chain = command(early);
        with_chain.args(["--cmdline", ""]);
        times.push(round(with_chain, place, &run_dir)?.time);
        if !root.join(format!("etc/file.{}", CHAIN - 1)).exists() {
            bail!("early did not have the chain merged");
        }
        disk::detach_all(place)?;
    }
    add(rows, "early, with a merge", median(times), nothing_pending);
    Ok(())
}

struct Round {
    time: Duration,
    /// Mount points and types, in order.
    mounts: Vec<(PathBuf, String)>,
}

/// Times one run and unmounts everything but the disk.
fn round(mut command: Command, place: &Path, run_dir: &Path) -> Result<Round> {
    let disk = place.join("root");
    let start = Instant::now();
    let output = command.env("PATH", packages::path()).stdin(Stdio::null()).output().context("starting a round")?;
    let time = start.elapsed();
    if !output.status.success() {
        bail!("{command:?}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    let mut mounts = disk::mounts_below(place)?;
    mounts.retain(|(at, _)| *at != disk);
    for (at, _) in mounts.iter().rev() {
        rustix::mount::unmount(at, rustix::mount::UnmountFlags::empty())
            .with_context(|| format!("umount2 {}", at.display()))?;
    }
    fs::remove_dir_all(run_dir)?;
    mounts.sort_unstable();
    Ok(Round { time, mounts })
}
