//! `cargo xtask bench clean`: what a pass of the cleaner takes of the processor, beside `find` and `lsof`, which tell the
//! same two things: what is old, and what is in use. Nothing is removed, so that each round meets the same.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use super::measured::measure as run_measured;
use super::report::{Section, table};
use super::{median, milliseconds};
use crate::disk::run;
use crate::say::say;
use crate::{build, namespace, packages};

const DIRECTORIES: usize = 100;
const FILES: usize = 1000;

/// A situation: its name, the configured age, and how find is asked for the same files.
const CASES: [(&str, &str, &str); 2] =
    [("nothing is old", "10min", "-mmin +10"), ("everything is old: a dry run that lists it", "1ms", "-mmin -1000")];

/// Runs it.
pub(super) fn measure(rounds: usize) -> Result<Section> {
    namespace::require_root()?;
    packages::ensure(&packages::CLEAN)?;
    let syncd = build::binary("syncd", &["--release"], &[])?;
    namespace::enter()?;
    let place = tempfile::tempdir().context("creating a temporary directory")?;
    run(Command::new("mount").args(["-t", "tmpfs", "-o", "strictatime,nr_inodes=0", "tmpfs"]).arg(place.path()))?;
    let result = prepare(place.path()).and_then(|()| compare(place.path(), &syncd, rounds));
    rustix::mount::unmount(place.path(), rustix::mount::UnmountFlags::DETACH).context("umount2")?;
    place.close().context("removing the temporary directory")?;
    result
}

fn prepare(place: &Path) -> Result<()> {
    let tmp = place.join("root/tmp");
    fs::create_dir_all(&tmp)?;
    fs::create_dir(place.join("run"))?;
    run(Command::new("mount").args(["-t", "tmpfs", "-o", "strictatime,nr_inodes=0", "tmpfs"]).arg(&tmp))?;
    for directory in 0..DIRECTORIES {
        let directory = tmp.join(directory.to_string());
        fs::create_dir(&directory)?;
        for file in 0..FILES {
            File::create(directory.join(format!("file-{file}")))?;
        }
    }
    Ok(())
}

fn compare(place: &Path, syncd: &Path, rounds: usize) -> Result<Section> {
    let mut section = Section::new("A pass of the cleaner");
    section.add(&format!(
        "{} files in a tmpfs, median of {rounds} interleaved rounds, processor time (user and system) of all processes. \
         The peers are `find` for what is old and `lsof -n -P` for what is in use; neither removes anything.",
        DIRECTORIES * FILES
    ));
    let mut rows = table(&["", "syncd clean", "peak memory", "find", "lsof", "find and lsof together", "ratio"]);
    for (what, stale, find) in CASES {
        let config = place.join("config.toml");
        fs::write(&config, format!("overlay.dirs = []\ncleanup.stale = '{stale}'\n"))?;
        let at = |name: &str| place.join(name).display().to_string();
        let options = format!("--root {} --run-dir {} --config {}", at("root"), at("run"), at("config.toml"));
        let clean = format!("{} clean --quiet {options}", syncd.display());
        if stale == "10min" {
            run_measured(&clean)?;
        }
        let clean = format!("{clean} --dry-run");
        let commands = [clean, format!("find {} -type f {find}", at("root/tmp")), "lsof -n -P".to_owned()];
        let mut samples = [const { Vec::new() }; 3];
        let mut peak = 0;
        for round in 0..rounds {
            say(&format!("{what}, round {} of {rounds}", round + 1));
            for (index, (command, samples)) in commands.iter().zip(&mut samples).enumerate() {
                let sample = run_measured(command)?;
                samples.push(sample.cpu);
                peak = if index == 0 { sample.peak.max(peak) } else { peak };
            }
        }
        let [ours, find, lsof] = samples.map(median);
        let shown = |time: Duration| format!("{:.0} ms", milliseconds(time));
        rows.add_row([
            what.to_owned(),
            shown(ours),
            bytesize::ByteSize(peak).to_string(),
            shown(find),
            shown(lsof),
            shown(find + lsof),
            format!("{:.2}", ours.as_secs_f64() / (find + lsof).as_secs_f64()),
        ]);
    }
    section.add(&rows);
    Ok(section)
}
