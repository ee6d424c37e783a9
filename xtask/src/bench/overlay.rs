//! `cargo xtask bench overlay`: what a write costs through our overlay, beside the disk below it, a tmpfs without an
//! overlay, and a plain `mount -t overlay` on a tmpfs; measured by fio.
//!
//! The places take turns, in the opposite order in every other round; what counts is the median. What is buffered ends
//! with an fsync that is part of the time: else the disk would be measured as RAM. In RAM the file is made right before
//! and removed right after, so that all places get the same pages in turn: which pages a file has makes a difference of
//! some percent, longer than the run of the program.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use rustix::fs::statfs;
use serde_json::Value;

use super::machine::ON_DISK;
use super::report::{Section, table};
use super::{day, median};
use crate::disk::{self, run};
use crate::say::say;
use crate::{build, namespace, packages};

/// The length of the file.
const MIB: usize = 512;
/// How often RAM does what the disk does once: fio counts whole milliseconds.
const LOOPS: &str = "--loops=8";
/// `TMPFS_MAGIC` (linux/magic.h).
const TMPFS: i64 = 0x0102_1994;

/// A kind of load, and how fio is told to make it.
struct Load {
    what: &'static str,
    options: &'static [&'static str],
}

const LOADS: [Load; 3] = [
    Load { what: "random 4 KiB, buffered", options: &["--rw=randwrite", "--bs=4k", "--io_size=64M", "--end_fsync=1"] },
    Load {
        what: "random 4 KiB, fdatasync after each",
        options: &["--rw=randwrite", "--bs=4k", "--fdatasync=1", "--time_based", "--runtime=2"],
    },
    Load { what: "sequential 1 MiB, buffered", options: &["--rw=write", "--bs=1M", "--end_fsync=1"] },
];

const PLACES: [&str; 4] = ["disk", "tmpfs", "overlay, plain", "overlay, ours"];

/// What fio said.
#[derive(Debug, Clone, Copy)]
struct Sample {
    /// Writes in a second, all in all.
    rate: f64,
    /// Nanoseconds that a write takes, with its fdatasync, if it has one.
    mean: f64,
    /// That of the slowest of a hundred.
    slow: f64,
}

/// Runs it.
pub(super) fn measure(rounds: usize) -> Result<Section> {
    namespace::require_root()?;
    packages::ensure(&[&packages::IMAGE[..], &packages::BENCH].concat())?;
    let early = build::binary("early", &["--release"], &[])?;
    let syncd = build::binary("syncd", &["--release"], &[])?;
    namespace::enter()?;
    let place = tempfile::Builder::new().prefix("eo-").tempdir_in(ON_DISK).context("creating a temporary directory")?;
    if statfs(place.path()).context("statfs")?.f_type == TMPFS {
        bail!("{ON_DISK} is in RAM: there is no disk to compare with");
    }
    let result = writes(place.path(), &early, rounds * 3).and_then(|mut section| {
        disk::detach_all(place.path())?;
        day::measure(place.path(), &early, &syncd, &mut section)?;
        Ok(section)
    });
    disk::detach_all(place.path())?;
    place.close().context("removing the temporary directory")?;
    result
}

fn writes(place: &Path, early: &Path, rounds: usize) -> Result<Section> {
    let places = prepare(place, early)?;
    let mut samples = vec![vec![Vec::new(); PLACES.len()]; LOADS.len()];
    for number in 0..rounds {
        say(&format!("writes, round {} of {rounds}", number + 1));
        for (load, samples) in LOADS.iter().zip(&mut samples) {
            let mut turns: Vec<_> = places.iter().zip(samples).collect();
            if number % 2 == 1 {
                turns.reverse();
            }
            for (place, samples) in turns {
                samples.push(sample(place, load)?);
            }
        }
    }
    Ok(report(&samples, rounds))
}

/// Makes the places; the disk has its file from now on.
fn prepare(place: &Path, early: &Path) -> Result<[PathBuf; 4]> {
    let at = |name: &str| place.join(name);
    for name in ["disk", "tmpfs", "plain-ram", "plain-lower", "plain", "root/var/log", "root/usr/lib/ephemeral-overlay"]
    {
        fs::create_dir_all(at(name))?;
    }
    for name in ["tmpfs", "plain-ram"] {
        run(Command::new("mount").args(["-t", "tmpfs", "tmpfs"]).arg(at(name)))?;
    }
    fs::create_dir(at("plain-ram/upper"))?;
    fs::create_dir(at("plain-ram/work"))?;
    let [lower, upper, work] =
        ["plain-lower", "plain-ram/upper", "plain-ram/work"].map(|name| at(name).display().to_string());
    let options = format!("lowerdir={lower},upperdir={upper},workdir={work}");
    run(Command::new("mount").args(["-t", "overlay", "overlay", "-o", &options]).arg(at("plain")))?;
    boot(&at("root"), &at("run"), early, &["/var/log"])?;
    fs::write(at("disk/file"), vec![0xa5; MIB << 20])?;
    Ok(["disk", "tmpfs", "plain", "root/var/log"].map(at))
}

/// One load in one place.
fn sample(place: &Path, load: &Load) -> Result<Sample> {
    let file = place.join("file");
    if file.exists() {
        rustix::fs::syncfs(File::open(place)?).context("syncfs")?;
        return fio(&file, load, &[]);
    }
    fs::write(&file, vec![0xa5; MIB << 20])?;
    let sample = fio(&file, load, &[LOOPS])?;
    fs::remove_file(&file)?;
    Ok(sample)
}

/// Mounts our overlays in a root that has what `early` asks for.
pub(super) fn boot(root: &Path, run_dir: &Path, early: &Path, targets: &[&str]) -> Result<()> {
    fs::write(root.join("usr/lib/ephemeral-overlay/counterpart"), "format = 1\n")?;
    let config = root.join("config.toml");
    let off = r#"tmpfs = { "/tmp" = false, "/var/tmp" = false, "/var/cache" = false }"#;
    fs::write(&config, format!("overlay.dirs = {targets:?}\n{off}\n"))?;
    let mut command = Command::new(early);
    command.arg("--root").arg(root).arg("--run-dir").arg(run_dir).arg("--config").arg(config).args(["--cmdline", ""]);
    let output = command.stdin(Stdio::null()).output().context("starting early")?;
    if !output.status.success() {
        bail!("early: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}

fn fio(file: &Path, load: &Load, more: &[&str]) -> Result<Sample> {
    let output = Command::new("fio")
        .args(["--name=bench", "--ioengine=psync", "--direct=0", "--output-format=json"])
        .arg(format!("--size={MIB}M"))
        .arg("--filename")
        .arg(file)
        .args(load.options)
        .args(more)
        .env("PATH", packages::path())
        .stdin(Stdio::null())
        .output()
        .context("running fio")?;
    if !output.status.success() {
        bail!("fio: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    // A warning may stand before the object.
    let begin = output.stdout.iter().position(|&byte| byte == b'{').context("fio said nothing")?;
    let all: Value = serde_json::from_slice(&output.stdout[begin..]).context("reading what fio said")?;
    let job = &all["jobs"][0];
    let number = |pointer: &str| job.pointer(pointer).and_then(Value::as_f64).with_context(|| format!("no {pointer}"));
    let slow = |of: &str| number(&format!("{of}/percentile/99.000000"));
    let (mut mean, mut slowest) = (number("/write/clat_ns/mean")?, slow("/write/clat_ns")?);
    if load.options.contains(&"--fdatasync=1") {
        mean += number("/sync/lat_ns/mean")?;
        slowest += slow("/sync/lat_ns")?;
    }
    let seconds = number("/write/runtime")? / 1000.0;
    Ok(Sample { rate: number("/write/total_ios")? / seconds, mean, slow: slowest })
}

fn report(samples: &[Vec<Vec<Sample>>], rounds: usize) -> Section {
    let mut section = Section::new("Writing through the overlay");
    section.add(&format!(
        "fio in one thread (`--ioengine=psync --direct=0`) on a file of {MIB} MiB that is there already; median of {rounds} \
         interleaved rounds. Buffered writes end with an fsync, which counts in the rate and not in the latencies; the random \
         ones reach an eighth of the blocks, each once, so that the disk cannot put them together. Places in RAM do that \
         eight times in a run. Those with fdatasync go on for 2 s. *Disk* is a directory on the disk above. *Plain* is `mount \
         -t overlay` without options on a tmpfs; *ours* is what `early` mounts."
    ));
    let mut rows = table(&["writes", "to", "in a second", "mean", "99 % within", "times the disk"]);
    let mut words = Vec::new();
    for (load, places) in LOADS.iter().zip(samples) {
        let middle = |place: &[Sample], of: fn(&Sample) -> f64| median(place.iter().map(of).map(Ordered).collect()).0;
        let rates: Vec<f64> = places.iter().map(|place| middle(place, |sample| sample.rate)).collect();
        for ((name, place), rate) in PLACES.iter().zip(places).zip(&rates) {
            rows.add_row([
                load.what.to_owned(),
                (*name).to_owned(),
                format!("{rate:.0}"),
                microseconds(middle(place, |sample| sample.mean)),
                microseconds(middle(place, |sample| sample.slow)),
                format!("{:.1}", rate / rates[0]),
            ]);
        }
        // Of neighbours in time: what else the machine does meets both.
        let pairs = places[3].iter().zip(&places[2]).map(|(ours, plain)| Ordered(ours.rate / plain.rate)).collect();
        words.push(format!("{}: {:+.1} %", load.what, (median(pairs).0 - 1.0) * 100.0));
    }
    section.add(&rows);
    section.add(&format!(
        "Our overlay against a plain one, in writes a second, median of the rounds: {}.",
        words.join("; ")
    ));
    section
}

/// A number that a measurement gave: it can be put in order.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Ordered(f64);

impl Eq for Ordered {}

impl PartialOrd for Ordered {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Ordered {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.total_cmp(&other.0)
    }
}

fn microseconds(nanoseconds: f64) -> String {
    format!("{:.1} µs", nanoseconds / 1000.0)
}
