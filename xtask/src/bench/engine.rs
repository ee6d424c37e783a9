//! `cargo xtask bench engine`: checkpoints and merges side by side with what people use instead, on an ext4 image. All
//! of it is durable when it counts as done: the peers end with syncfs(2).
//!
//! A round makes a new file system and runs everything once, the peers from the same RAM; what counts is the median of
//! the rounds.

pub(super) mod bare;
mod rejected;
pub(super) mod workload;

use std::collections::BTreeMap;
use std::env;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bytesize::ByteSize;
use comfy_table::Table;
use workload::Workload;

use super::measured::{Measured, measure};
use super::report::{self, Section};
use super::{median, milliseconds};
use crate::disk::{self, Disk};
use crate::say::say;
use crate::{build, namespace, packages};

/// The size of the file system.
const DISK: u64 = 3 << 30;

/// One target, and nothing else.
const CONFIG: &str = r#"
overlay.dirs = ["/var/log"]
tmpfs = { "/tmp" = false, "/var/tmp" = false, "/var/cache" = false }
"#;

/// What is measured, in the order of the rows: the step, who does it, and what it took.
type Row = (&'static str, &'static str);

/// One measurement of a row.
#[derive(Debug, Clone, Copy)]
struct Sample {
    measured: Measured,
    /// Bytes that reached the device.
    written: u64,
}

/// Runs it.
pub(super) fn measure_all(only: Option<&str>, rounds: usize) -> Result<Vec<Section>> {
    namespace::require_root()?;
    packages::ensure(&[&packages::IMAGE[..], &packages::BENCH].concat())?;
    say("building early and syncd");
    let early = build::binary("early", &["--release"], &[])?;
    let syncd = build::binary("syncd", &["--release"], &[])?;
    namespace::enter()?;
    let place = tempfile::Builder::new().prefix("eo-").tempdir().context("creating a temporary directory")?;
    let disk = Disk::written_once(DISK)?;
    let mut section = Section::new("Checkpoints and merges");
    section.add(&format!(
        "On an ext4 image, median of {rounds} rounds. Everything is durable when it counts as done: the peers end with \
         syncfs(2). *First* saves all that is in RAM, *unchanged* finds that nothing is to be saved, *small change* saves a \
         little of it, *rotation* a log under a new name; *merge* brings it to its directory. *One write* is the \
         same number of bytes in one file, with fsync; *bare calls* makes the same small \
         files by all processors and does nothing else: no owners, modes and attributes, no look at what was made, no way to \
         go on after a cut. *Written* is what reached the device, the file system's own writes included."
    ));
    let chosen = workload::ALL.iter().filter(|workload| only.is_none_or(|only| only == workload.name));
    let result = chosen.into_iter().try_for_each(|workload| {
        let mut rows = Vec::new();
        for number in 0..rounds {
            say(&format!("{}, round {} of {rounds}", workload.name, number + 1));
            let round = Round::begin(place.path(), &disk, &early, &syncd, workload)?;
            let samples = round.run(workload)?;
            drop(round);
            for (index, (row, sample)) in samples.into_iter().enumerate() {
                if number == 0 {
                    rows.push((row, Vec::new()));
                }
                rows[index].1.push(sample);
            }
        }
        section.heading(&format!("{}: {}", workload.name, workload.what));
        section.add(&table(&rows));
        Ok(())
    });
    let result = result.and_then(|()| {
        let rejected = only.is_none().then(|| rejected::measure(place.path(), &disk, &early, &syncd, rounds));
        Ok([section].into_iter().chain(rejected.transpose()?).collect())
    });
    disk::detach_all(place.path())?;
    place.close().context("removing the temporary directory")?;
    result
}

/// A system on a new file system with a workload in RAM.
struct Round<'a> {
    place: &'a Path,
    syncd: &'a Path,
    root: PathBuf,
    run_dir: PathBuf,
}

impl<'a> Round<'a> {
    fn begin(place: &'a Path, disk: &Disk, early: &Path, syncd: &'a Path, workload: &Workload) -> Result<Self> {
        let (root, run_dir) = (place.join("root"), place.join("run"));
        fs::create_dir_all(&root)?;
        disk.format_anew()?;
        disk.mount(&root, "")?;
        for directory in ["etc", "var/log", "peers", "usr/lib/ephemeral-overlay"] {
            fs::create_dir_all(root.join(directory))?;
        }
        fs::write(root.join("usr/lib/ephemeral-overlay/counterpart"), "format = 1\n")?;
        fs::write(root.join("etc/ephemeral-overlay.toml"), CONFIG)?;
        let round = Self { place, syncd, root, run_dir };
        let mut mount = Command::new(early);
        mount.arg("--root").arg(&round.root).arg("--run-dir").arg(&round.run_dir).args(["--cmdline", ""]);
        let output = mount.stdin(Stdio::null()).output().context("starting early")?;
        if !output.status.success() {
            bail!("early: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
        }
        (workload.fill)(&round.root.join("var/log"))?;
        Ok(round)
    }

    fn run(&self, workload: &Workload) -> Result<Vec<(Row, Sample)>> {
        let upper = self.run_dir.join("ram/var-log/upper");
        let upper = upper.display();
        let peers = self.root.join("peers");
        let peer = |name: &str| peers.join(name).display().to_string();
        let sync = |name: &str| format!("sync -f {}", peer(name));
        let rsync = |options: &str, name: &str| {
            format!("rsync -aHAX --delete {options} {upper}/ {}/ && {}", peer(name), sync(name))
        };
        for name in ["rsync", "checksum", "cp", "merge", "bare"] {
            fs::create_dir_all(peers.join(name))?;
        }
        let checkpoint = self.syncd("checkpoint");
        let bytes = workload::bytes(&self.root.join("var/log"))?;
        let floor = format!("dd if=/dev/zero of={} bs=1M count={bytes} iflag=count_bytes conv=fsync", peer("floor"));
        let mut rows = Vec::new();
        let mut row = |step: &'static str, who: &'static str, line: &str| -> Result<()> {
            rows.push(((step, who), self.sample(line)?));
            Ok(())
        };
        row("first", "syncd", &checkpoint)?;
        row("first", "rsync", &rsync("", "rsync"))?;
        row("first", "rsync --checksum", &rsync("--checksum", "checksum"))?;
        row("first", "cp", &format!("cp -a {upper}/. {}/ && {}", peer("cp"), sync("cp")))?;
        let tar = peer("tar");
        row("first", "tar, zstd", &format!("tar -C {upper} -cf - . | zstd -q -T0 -o {tar} && sync -f {tar}"))?;
        row("first", "one write", &floor)?;
        fs::remove_dir_all(peers.join("cp"))?;
        for name in ["tar", "floor"] {
            fs::remove_file(peers.join(name))?;
        }
        let mut again = |step| -> Result<()> {
            row(step, "syncd", &checkpoint)?;
            row(step, "rsync", &rsync("", "rsync"))?;
            row(step, "rsync --checksum", &rsync("--checksum", "checksum"))
        };
        again("unchanged")?;
        (workload.change)(&self.root.join("var/log"))?;
        again("small change")?;
        if let Some(rotate) = workload.rotate {
            rotate(&self.root.join("var/log"))?;
            again("rotation")?;
        }
        // A first checkpoint of all that there is, and nothing else.
        fs::remove_dir_all(self.root.join("persist/ephemeral-overlay/targets"))?;
        measure(&checkpoint)?;
        row("merge", "rsync", &rsync("", "merge"))?;
        let bytes = workload::bytes(&self.root.join("var/log"))?;
        let floor = format!("dd if=/dev/zero of={} bs=1M count={bytes} iflag=count_bytes conv=fsync", peer("floor"));
        row("merge", "one write", &floor)?;
        fs::remove_file(peers.join("floor"))?;
        // For long files the one write is the measure.
        if workload.rotate.is_none() {
            let xtask = env::current_exe().context("finding this program")?;
            row("merge", "bare calls", &format!("{} bare {upper} {}", xtask.display(), peer("bare")))?;
        }
        // As in the initramfs of the next boot.
        disk::detach_all(&self.root.join("var/log"))?;
        let merge = format!(
            "{} --root {} --run-dir {}/next merge",
            self.syncd.display(),
            self.root.display(),
            self.place.display()
        );
        row("merge", "syncd", &merge)?;
        Ok(rows)
    }

    fn syncd(&self, command: &str) -> String {
        let (syncd, root, run_dir) = (self.syncd.display(), self.root.display(), self.run_dir.display());
        format!("{syncd} --root {root} --run-dir {run_dir} {command}")
    }

    /// Measures a command on a quiet disk.
    fn sample(&self, line: &str) -> Result<Sample> {
        rustix::fs::syncfs(File::open(&self.root)?).context("syncfs")?;
        let before = disk::written(&self.root)?;
        let measured = measure(line)?;
        Ok(Sample { measured, written: disk::written(&self.root)? - before })
    }
}

impl Drop for Round<'_> {
    fn drop(&mut self) {
        // What stays is taken away at the end, with an error.
        let _detached = disk::detach_all(self.place);
        let _removed = fs::remove_dir_all(&self.run_dir);
    }
}

fn table(rows: &[(Row, Vec<Sample>)]) -> Table {
    let time = |samples: &[Sample]| median(samples.iter().map(|sample| sample.measured.time).collect());
    let ours: BTreeMap<&str, Duration> = rows
        .iter()
        .filter(|((_, who), _)| *who == "syncd")
        .map(|((step, _), samples)| (*step, time(samples)))
        .collect();
    let mut table = report::table(&["step", "by", "time", "times syncd's", "written", "peak memory"]);
    for ((step, who), samples) in rows {
        let time = time(samples);
        table.add_row([
            (*step).to_owned(),
            (*who).to_owned(),
            format!("{:.1} ms", milliseconds(time)),
            format!("{:.2}", time.as_secs_f64() / ours[step].as_secs_f64()),
            ByteSize(median(samples.iter().map(|sample| sample.written).collect())).to_string(),
            ByteSize(median(samples.iter().map(|sample| sample.measured.peak).collect())).to_string(),
        ]);
    }
    table
}
