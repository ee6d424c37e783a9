//! What is in RAM, how it changes, and how its logs are rotated.

use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result};
use fastrand::Rng;

/// A workload.
pub(super) struct Workload {
    pub(super) name: &'static str,
    /// In a few words.
    pub(super) what: &'static str,
    /// Fills a directory.
    pub(super) fill: fn(&Path) -> Result<()>,
    /// Changes a little of it.
    pub(super) change: fn(&Path) -> Result<()>,
    /// Rotates a log.
    pub(super) rotate: Option<fn(&Path) -> Result<()>>,
}

/// All of them.
pub(super) const ALL: [Workload; 3] = [
    Workload { name: "W1", what: "3,000 small files, 20 MB", fill: fill_w1, change: change_small, rotate: None },
    Workload {
        name: "W2",
        what: "6 incompressible journals of 64 MiB, 40 logs of 256 KiB",
        fill: fill_w2,
        change: change_w2,
        rotate: Some(rotate_w2),
    },
    Workload { name: "W3", what: "50,000 small files, 100 MB", fill: fill_w3, change: change_small, rotate: None },
];

const JOURNALS: usize = 6;
const JOURNAL: usize = 64 << 20;
const LOGS: usize = 40;
const LOG: usize = 256 << 10;
const MIB: usize = 1 << 20;

fn fill_w1(root: &Path) -> Result<()> {
    small_files(root, 3_000, 6_667, 1)
}

fn fill_w3(root: &Path) -> Result<()> {
    small_files(root, 50_000, 2_000, 2)
}

/// Files of half to one and a half times `mean` bytes, 50 in each directory.
fn small_files(root: &Path, count: usize, mean: usize, seed: u64) -> Result<()> {
    let mut random = Rng::with_seed(seed);
    for number in 0..count {
        let directory = root.join(format!("group.{}/part.{}", number / 1000, number / 50));
        if number % 50 == 0 {
            fs::create_dir_all(&directory)?;
        }
        let length = random.usize(mean / 2..mean * 3 / 2);
        fs::write(directory.join(format!("file-{number:05}.conf")), settings(&mut random, length))?;
    }
    Ok(())
}

fn change_small(root: &Path) -> Result<()> {
    let mut random = Rng::with_seed(3);
    for number in (0..3_000).step_by(100) {
        let path = root.join(format!("group.{}/part.{}/file-{number:05}.conf", number / 1000, number / 50));
        let mut file = OpenOptions::new().append(true).open(&path).with_context(|| path.display().to_string())?;
        file.write_all(settings(&mut random, 100).as_bytes())?;
    }
    Ok(())
}

fn fill_w2(root: &Path) -> Result<()> {
    let mut random = Rng::with_seed(4);
    fs::create_dir_all(root.join("journal"))?;
    for number in 0..JOURNALS {
        let mut bytes = vec![0; JOURNAL];
        random.fill(&mut bytes);
        fs::write(root.join(format!("journal/system{number}.journal")), bytes)?;
    }
    for number in 0..LOGS {
        fs::write(root.join(format!("service{number:02}.log")), log(&mut random, LOG))?;
    }
    Ok(())
}

/// 1 MiB in the middle of each journal, without any change of its times, as through a mapping; 4 KiB at the end of each
/// log.
fn change_w2(root: &Path) -> Result<()> {
    let mut random = Rng::with_seed(5);
    for number in 0..JOURNALS {
        let path = root.join(format!("journal/system{number}.journal"));
        let file = OpenOptions::new().write(true).open(&path)?;
        let times = file.metadata()?;
        let mut bytes = vec![0; MIB];
        random.fill(&mut bytes);
        file.write_all_at(&bytes, random.u64(MIB as u64..(JOURNAL - 2 * MIB) as u64) & !7)?;
        file.set_times(fs::FileTimes::new().set_modified(times.modified()?).set_accessed(times.accessed()?))?;
    }
    for number in 0..LOGS {
        let mut file = OpenOptions::new().append(true).open(root.join(format!("service{number:02}.log")))?;
        file.write_all(log(&mut random, 4096).as_bytes())?;
    }
    Ok(())
}

/// A journal is archived, as journald does it.
fn rotate_w2(root: &Path) -> Result<()> {
    let journal = root.join("journal");
    fs::rename(journal.join("system0.journal"), journal.join("system0@0001.journal"))?;
    File::create(journal.join("system0.journal"))?.write_all(b"a new journal\n")?;
    Ok(())
}

const WORDS: [&str; 16] = [
    "systemd",
    "session",
    "started",
    "network",
    "enable",
    "service",
    "interface",
    "option",
    "user",
    "timeout",
    "kernel",
    "device",
    "address",
    "module",
    "daemon",
    "config",
];

/// Settings: words that come again and small numbers. zstd makes a quarter of it, as of `/etc`.
pub(crate) fn settings(random: &mut Rng, length: usize) -> String {
    lines(random, length, |random, text| {
        let mut word = || WORDS[random.usize(..WORDS.len())];
        let (first, second) = (word(), word());
        writeln!(text, "{first}.{second} = {}", random.u16(..10_000))
    })
}

/// Messages, each with a number that never comes again.
pub(crate) fn log(random: &mut Rng, length: usize) -> String {
    lines(random, length, |random, text| {
        let mut word = || WORDS[random.usize(..WORDS.len())];
        let (first, second, third) = (word(), word(), word());
        writeln!(text, "host {first}[1234]: {second} {third}, id {:016x}", random.u64(..))
    })
}

fn lines(random: &mut Rng, length: usize, line: impl Fn(&mut Rng, &mut String) -> std::fmt::Result) -> String {
    let mut text = String::with_capacity(length + 128);
    // Writing to a string cannot fail.
    while text.len() < length && line(random, &mut text).is_ok() {}
    text.truncate(length);
    text
}

/// The length of all files below a directory.
pub(super) fn bytes(directory: &Path) -> Result<u64> {
    let mut sum = 0;
    for entry in fs::read_dir(directory)? {
        let metadata = entry?;
        let (path, metadata) = (metadata.path(), metadata.metadata()?);
        sum += if metadata.is_dir() { bytes(&path)? } else { metadata.len() };
    }
    Ok(sum)
}
