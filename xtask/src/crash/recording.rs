//! A recording: what the disk held, what was written to it, and what was done meanwhile. It can be kept, to look at one
//! of its states again.

use std::fmt;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::device::{Loop, Recorder};
use super::file_system::{FileSystem, unmount_for_good};
use super::image::{BLOCK, Image};
use super::log::Log;
use super::system::System;
use super::workload::{Also, Step, Workload};
use crate::disk::detach_all;

/// What is recorded.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Subject {
    /// On what.
    pub file_system: FileSystem,
    /// What.
    pub workload: Workload,
    /// What it does, as far as that is random.
    pub seed: u64,
    /// Something else writes to the same file system meanwhile, and syncs: it makes things durable that nobody asked for.
    pub busy: bool,
    /// The disk takes its time.
    pub slow: bool,
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { file_system, workload, seed, .. } = self;
        write!(f, "{} {} seed {seed}", file_system.name(), workload.name())?;
        let words = [(self.busy, " beside another writer"), (self.slow, " on a slow disk")];
        words.iter().filter(|(is, _)| *is).try_for_each(|(_, word)| f.write_str(word))
    }
}

/// A recording.
#[derive(Debug)]
pub(crate) struct Recording {
    /// Of what.
    pub subject: Subject,
    /// What the disk held at the beginning.
    pub base: Image,
    /// What was written since.
    pub log: Log,
    /// What was done.
    pub steps: Vec<Step>,
    /// What else has to hold.
    pub also: Also,
}

/// A recording's words, for a file.
#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    file_system: String,
    workload: String,
    seed: u64,
    busy: bool,
    slow: bool,
    steps: Vec<Step>,
    also: Also,
}

impl Recording {
    /// Makes one, in the empty directory `place`, with the programs in `binaries`.
    pub(crate) fn make(subject: Subject, place: &Path, binaries: &Path) -> Result<Self> {
        let (image, disk) = (place.join("image"), place.join("disk"));
        let Subject { file_system, workload, seed, .. } = subject;
        fs::create_dir(&disk).with_context(|| format!("mkdir {}", disk.display()))?;
        File::create(&image)?.set_len(file_system.bytes()).context("ftruncate of the image")?;
        file_system.make(&image)?;
        let system = System::on(&disk, place, binaries)?;
        let plain = Loop::on(&image)?;
        file_system.mount(plain.path(), &disk)?;
        let prepared = workload.prepare(&system, seed).and_then(|prepared| system.cut().map(|()| prepared));
        let (first, also) = ended(prepared, &disk)?;
        // An overlay that was detached holds the file system for a moment more, and with it what is not written yet.
        plain.open_unused()?.sync_all().context("fsync of the loop device")?;
        drop(plain);
        let base = Image::read(&File::open(&image)?)?;

        let (export, log) = (place.join("export"), place.join("log"));
        let recorder = Recorder::start(&image, &export, &log, subject.slow)?;
        let recorded = Loop::on(&export)?;
        file_system.mount(recorded.path(), &disk)?;
        let neighbour = subject.busy.then(|| disk.join("neighbour"));
        let work = beside(neighbour.as_deref(), || workload.run(&system, &log, &first, seed));
        let work = work.and_then(|work| system.cut().map(|()| work));
        let mut steps = ended(work, &disk)?.steps;
        recorded.open_unused()?.sync_all().context("fsync of the recorded device")?;
        drop(recorded);
        let log = Log::parse(recorder.finish()?)?;
        for step in &mut steps {
            step.begun = log.count_at(step.begun as u64);
            step.acknowledged = log.count_at(step.acknowledged as u64);
        }
        if !log.entries().iter().any(|entry| entry.flush) {
            bail!("no flush came as far as the log: nothing in it is ever durable");
        }
        Ok(Self { subject, base, log, steps, also })
    }

    /// The states that a system may show after a cut at a crash point: that of the last step that had been acknowledged,
    /// and those of the steps that had begun since.
    pub(crate) fn allowed(&self, at: usize) -> &[Step] {
        let last = self.steps.iter().rposition(|step| step.acknowledged <= at).unwrap_or(0);
        let begun = self.steps[last..].iter().take_while(|step| step.begun < at).count();
        &self.steps[last..last + begun.max(1)]
    }

    /// Keeps it in a new directory.
    pub(crate) fn save(&self, directory: &Path) -> Result<()> {
        if directory.exists() {
            fs::remove_dir_all(directory).with_context(|| format!("unlink {}", directory.display()))?;
        }
        fs::create_dir_all(directory).with_context(|| format!("mkdir {}", directory.display()))?;
        let Subject { file_system, workload, seed, busy, slow } = self.subject;
        let image = File::create(directory.join("base")).context("creat base")?;
        image.set_len(file_system.bytes()).context("ftruncate of base")?;
        for number in self.base.numbers() {
            let block = self.base.block(number).unwrap_or(&[0; BLOCK]);
            image.write_all_at(block, number * BLOCK as u64).context("pwrite of base")?;
        }
        fs::write(directory.join("log"), self.log.bytes()).context("write of the log")?;
        let (steps, also) = (self.steps.clone(), self.also.clone());
        let kept = Kept { file_system: file_system.name(), workload: workload.name(), seed, busy, slow, steps, also };
        fs::write(directory.join("steps.json"), serde_json::to_vec_pretty(&kept)?).context("write of the steps")
    }

    /// Reads one that was kept.
    pub(crate) fn load(directory: &Path) -> Result<Self> {
        let read = |name: &str| {
            let path: PathBuf = directory.join(name);
            fs::read(&path).with_context(|| format!("read {}", path.display()))
        };
        let kept: Kept = serde_json::from_slice(&read("steps.json")?).context("reading the steps")?;
        let unknown = |error: String| anyhow::anyhow!("{}: {error}", directory.display());
        let subject = Subject {
            file_system: FileSystem::from_str(&kept.file_system, false).map_err(unknown)?,
            workload: Workload::from_str(&kept.workload, false).map_err(unknown)?,
            seed: kept.seed,
            busy: kept.busy,
            slow: kept.slow,
        };
        let base = Image::read(&File::open(directory.join("base")).context("open base")?)?;
        Ok(Self { subject, base, log: Log::parse(read("log")?)?, steps: kept.steps, also: kept.also })
    }
}

/// Unmounts the disk, however what was done on it ended.
fn ended<T>(result: Result<T>, disk: &Path) -> Result<T> {
    if result.is_err() {
        detach_all(disk)?;
        return result;
    }
    unmount_for_good(disk)?;
    result
}

/// Does something while a neighbour, if there is one, appends to a file and syncs it, over and over.
fn beside<T>(neighbour: Option<&Path>, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let Some(path) = neighbour else { return work() };
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| -> Result<()> {
            let file = File::create(path).with_context(|| format!("creat {}", path.display()))?;
            let mut at = 0;
            while !done.load(Ordering::Relaxed) {
                // On a full disk it goes on with what it has.
                let end = file.write_at(&[0x5a; 100], at).map_or(0, |length| at + length as u64);
                at = if end > 1 << 16 { 0 } else { end };
                file.sync_all().with_context(|| format!("fsync {}", path.display()))?;
            }
            Ok(())
        });
        let result = work();
        done.store(true, Ordering::Relaxed);
        match writer.join() {
            Ok(written) => written.and(result),
            Err(_) => bail!("the neighbour panicked"),
        }
    })
}
