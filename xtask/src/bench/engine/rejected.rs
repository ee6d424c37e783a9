//! What was tried and not kept, measured again each time: the reasons are only as good as the figures.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use bytesize::ByteSize;

use super::workload::{self, Workload};
use super::{CONFIG, Disk, Round, Sample};
use crate::bench::report::{Section, table};
use crate::bench::{median, milliseconds};
use crate::disk::run;
use crate::packages;
use crate::say::say;

/// A name, what stands before the command, and what is added to the configuration.
type Variant = (&'static str, String, &'static str);

pub(super) fn measure(place: &Path, disk: &Disk, early: &Path, syncd: &Path, rounds: usize) -> Result<Section> {
    let workload = &workload::ALL[0];
    let mut variants: Vec<Variant> =
        vec![("syncd", String::new(), ""), ("zstd level 3", String::new(), "checkpoint.compression = 3\n")];
    // Not every system has it.
    if packages::ensure(&packages::MIMALLOC).is_ok()
        && let Some(library) = packages::find("libmimalloc.so.2")
    {
        variants.push(("mimalloc", format!("LD_PRELOAD={} ", library.display()), ""));
    }
    let mut samples = vec![(Vec::new(), Vec::new()); variants.len()];
    for number in 0..rounds {
        say(&format!("what is not kept, round {} of {rounds}", number + 1));
        one_round(&Round::begin(place, disk, early, syncd, workload)?, workload, &variants, &mut samples)?;
    }
    let mut section = Section::new("Measured and not kept");
    section.add(&format!(
        "{}, {}; median of {rounds} rounds. The default level of zstd is 1. Another allocator, mimalloc, is loaded before \
         the program (`LD_PRELOAD`).",
        workload.name, workload.what
    ));
    let mut rows = table(&["", "first", "unchanged", "written by first", "peak memory of first"]);
    for ((name, ..), (first, unchanged)) in variants.iter().zip(&samples) {
        let time = |samples: &[Sample]| {
            format!("{:.1} ms", milliseconds(median(samples.iter().map(|sample| sample.measured.time).collect())))
        };
        let bytes = |of: fn(&Sample) -> u64| ByteSize(median(first.iter().map(of).collect())).to_string();
        rows.add_row([
            (*name).to_owned(),
            time(first),
            time(unchanged),
            bytes(|sample| sample.written),
            bytes(|sample| sample.measured.peak),
        ]);
    }
    section.add(&rows);
    section.add(&levels(place)?);
    Ok(section)
}

fn one_round(
    round: &Round,
    workload: &Workload,
    variants: &[Variant],
    samples: &mut [(Vec<Sample>, Vec<Sample>)],
) -> Result<()> {
    for ((_, before, config), (first, unchanged)) in variants.iter().zip(samples) {
        // As if there had never been a checkpoint.
        let store = round.root.join("persist/ephemeral-overlay/targets");
        if store.exists() {
            fs::remove_dir_all(store)?;
        }
        let path = round.place.join("config.toml");
        fs::write(&path, format!("{CONFIG}{config}"))?;
        let line = format!("{before}{} --config {}", round.syncd("checkpoint"), path.display());
        first.push(round.sample(&line).with_context(|| workload.name)?);
        unchanged.push(round.sample(&line)?);
    }
    Ok(())
}

/// What zstd itself makes of this machine's `/etc`, in pieces as long as our frames.
fn levels(place: &Path) -> Result<String> {
    let archive = place.join("etc.tar");
    run(Command::new("tar").args(["-C", "/", "-cf"]).arg(&archive).arg("etc"))?;
    let output = Command::new("zstd")
        .args(["-q", "-b1", "-e3", "-i2", "-B1M"])
        .arg(&archive)
        .env("PATH", packages::path())
        .output()
        .context("running zstd")?;
    // `-1  641700 (3.239)  327.1 MB/s  900.2 MB/s  etc.tar`, and the same again for each level.
    let text = String::from_utf8_lossy(&output.stdout);
    let level = |number: u8| {
        let words = text.lines().find_map(|line| line.strip_prefix(&format!("-{number} ")))?;
        let mut words = words.split_whitespace().skip(1);
        let ratio = words.next()?.trim_matches(['(', ')']);
        Some(format!("{ratio} times at {} MB/s", words.next()?))
    };
    let (one, three) = level(1).zip(level(3)).with_context(|| format!("zstd -b says something else: {text:?}"))?;
    fs::remove_file(archive)?;
    Ok(format!(
        "In frames of 1 MiB, zstd compresses this machine's `/etc` {one} at level 1, {three} at level 3 (`zstd -b`)."
    ))
}
