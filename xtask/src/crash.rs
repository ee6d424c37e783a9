//! `cargo xtask crash`: power cuts at every moment, without a machine.
//!
//! A system at work is recorded on a block device that writes down all writes and flushes. What the disk may hold after
//! a cut follows from that, and is put on another disk, which boots: the merge has to show exactly the state of the last
//! checkpoint that had been acknowledged, or of one that had begun since; never a mixture, never an older one, and it
//! never refuses.

mod device;
mod file_system;
mod image;
mod log;
mod recording;
mod recovery;
mod states;
mod system;
mod workload;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use comfy_table::{CellAlignment, Table, presets};
use fastrand::Rng;

use crate::disk::detach_all;
use crate::say::say;
use crate::{build, namespace, packages};
use file_system::FileSystem;
use recording::{Recording, Subject};
use recovery::Scratch;
use states::{Distinct, State, States};
use workload::Workload;

/// The most states of one recording: many short histories find more than one long one.
const RECORDING: usize = 200;
/// From this number of states on it pays to optimise what is tried.
const MANY: usize = 2000;

/// What is tried.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// How many distinct states of the disk to boot from, at least
    #[arg(long, value_name = "N", default_value_t = 20_000)]
    states: usize,
    /// What the workloads do, and which states are chosen
    #[arg(long, value_name = "S", default_value_t = 1)]
    seed: u64,
    /// The file systems [default: all]
    #[arg(long, value_name = "NAME", num_args = 1..)]
    fs: Vec<FileSystem>,
    /// What is recorded [default: all]
    #[arg(long, value_name = "NAME", num_args = 1..)]
    workload: Vec<Workload>,
    /// How many at a time [default: one for each processor]
    #[arg(long, value_name = "N")]
    jobs: Option<usize>,
    /// Boot once more from a state of a recording that was kept
    #[arg(long, value_name = "DIR", requires = "state")]
    replay: Option<PathBuf>,
    /// Which state that is: the number of a point in the recording, or that and a choice, as `12/3`
    #[arg(long, value_name = "STATE", requires = "replay")]
    state: Option<State>,
}

/// One recording, to be made and tried.
#[derive(Debug)]
struct Task {
    number: usize,
    subject: Subject,
    states: usize,
}

/// What came of one file system and workload.
#[derive(Debug, Default, Clone, Copy)]
struct Row {
    writes: usize,
    flushes: usize,
    states: usize,
    violations: usize,
    time: Duration,
}

type Rows = BTreeMap<(FileSystem, Workload), Row>;

/// A state after which the system is not what it must be.
#[derive(Debug)]
struct Violation(String);

/// Runs it.
pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    namespace::require_root()?;
    packages::ensure_recorder()?;
    let profile: &[&str] = if options.states >= MANY { &["--release"] } else { &[] };
    say("building early and syncd");
    let early = build::binary("early", profile, &[])?;
    let syncd = build::binary("syncd", profile, &[])?;
    let binaries = early.parent().context("early is nowhere")?;
    if syncd.parent() != Some(binaries) {
        bail!("early and syncd are not in one directory");
    }
    namespace::enter()?;
    let place = tempfile::Builder::new().prefix("eo-crash-").tempdir().context("creating a temporary directory")?;
    let result = in_ram(place.path()).and_then(|()| match (&options.replay, options.state) {
        (Some(recording), Some(state)) => replay(recording, state, place.path(), binaries),
        _ => campaign(options, place.path(), binaries),
    });
    // Before the directory goes: what is mounted in it must not go with it.
    detach_all(place.path())?;
    place.close().context("removing the temporary directory")?;
    match result? {
        None => Ok(ExitCode::SUCCESS),
        Some(Violation(words)) => bail!("{words}"),
    }
}

/// Disks and logs are in RAM: nothing of this has to outlive a power cut.
fn in_ram(place: &Path) -> Result<()> {
    use rustix::mount::{MountFlags, mount};
    mount("tmpfs", place, "tmpfs", MountFlags::empty(), Some(c"mode=0700")).context("mount a tmpfs")
}

fn campaign(options: &Options, place: &Path, binaries: &Path) -> Result<Option<Violation>> {
    let all = |wanted: &[FileSystem]| if wanted.is_empty() { FileSystem::ALL.to_vec() } else { wanted.to_vec() };
    let file_systems = all(&options.fs);
    let workloads = if options.workload.is_empty() { Workload::ALL.to_vec() } else { options.workload.clone() };
    let jobs = options.jobs.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, Into::into)).max(1);
    let begun = Instant::now();
    let mut rows = Rows::new();
    let pairs = file_systems.len() * workloads.len();
    // Every round makes new recordings, in turn with and without somebody else who syncs; two of them at the least.
    for round in 0u64.. {
        let done: usize = rows.values().map(|row| row.states).sum();
        if done >= options.states && round >= 2 {
            break;
        }
        if round > 1000 {
            bail!("there are only {done} distinct states");
        }
        let left = options.states.saturating_sub(done) / if round == 0 { 2 } else { 1 };
        let states = left.div_ceil(pairs).clamp(2, RECORDING);
        let mut tasks = Vec::new();
        for &workload in &workloads {
            for &file_system in &file_systems {
                let number = tasks.len();
                let seed = options.seed.wrapping_mul(1_000_003).wrapping_add(round * 1000 + number as u64);
                let subject = Subject { file_system, workload, seed, busy: round % 2 == 1 };
                tasks.push(Task { number, subject, states });
            }
        }
        let place = place.join(round.to_string());
        fs::create_dir(&place)?;
        let violation = round_of(tasks, jobs, &place, binaries, &mut rows)?;
        if violation.is_some() {
            show(&rows, begun.elapsed());
            return Ok(violation);
        }
        fs::remove_dir_all(&place).context("unlink of a round")?;
    }
    show(&rows, begun.elapsed());
    Ok(None)
}

/// Does all tasks, some at a time, until one finds something.
fn round_of(
    tasks: Vec<Task>,
    jobs: usize,
    place: &Path,
    binaries: &Path,
    rows: &mut Rows,
) -> Result<Option<Violation>> {
    let stop = AtomicBool::new(false);
    let (tasks, shared) = (Mutex::new(tasks.into_iter()), Mutex::new(rows));
    let next = || tasks.lock().ok().and_then(|mut tasks| tasks.next());
    let worker = || -> Result<Option<Violation>> {
        while let Some(task) = next().filter(|_| !stop.load(Ordering::Relaxed)) {
            let place = place.join(task.number.to_string());
            fs::create_dir(&place)?;
            let mut row = Row::default();
            let begun = Instant::now();
            let done = one(&task, &place, binaries, &stop, &mut row);
            row.time = begun.elapsed();
            if let Ok(mut rows) = shared.lock() {
                rows.entry((task.subject.file_system, task.subject.workload)).or_default().add(row);
            }
            if !matches!(done, Ok(None)) {
                stop.store(true, Ordering::Relaxed);
                return done;
            }
            fs::remove_dir_all(&place).with_context(|| format!("unlink {}", place.display()))?;
        }
        Ok(None)
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..jobs).map(|_| scope.spawn(worker)).collect();
        let ends = workers.into_iter().map(|worker| worker.join().unwrap_or_else(|_| bail!("a worker panicked")));
        let ends: Vec<_> = ends.collect();
        let mut first = Ok(None);
        for end in ends {
            if !matches!(end, Ok(None)) {
                first = end;
            }
        }
        first
    })
}

/// Makes one recording, and boots from its states.
fn one(task: &Task, place: &Path, binaries: &Path, stop: &AtomicBool, row: &mut Row) -> Result<Option<Violation>> {
    let Subject { file_system, workload, seed, busy } = task.subject;
    let what = format!("{} {} seed {seed}{}", file_system.name(), workload.name(), if busy { " busy" } else { "" });
    let recording = Recording::make(task.subject, place, binaries).with_context(|| what.clone())?;
    row.flushes = recording.log.entries().iter().filter(|entry| entry.flush).count();
    row.writes = recording.log.entries().len() - row.flushes;
    let plan = states::plan(&recording.base, &recording.log, task.states, &mut Rng::with_seed(seed));
    let scratch = Scratch::new(file_system, place, binaries)?;
    let mut states = States::new(&recording.base, &recording.log);
    for distinct in &plan {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        row.states += 1;
        let image = states.image(distinct.state);
        let verdict = scratch.check(&recording, distinct, &image).with_context(|| what.clone())?;
        let Some(words) = verdict else { continue };
        row.violations += 1;
        let kept = keep(&recording)?;
        return Ok(Some(Violation(format!(
            "{what}: after {} states, a cut after request {} of {}, without {}:\n{words}\nagain: cargo xtask crash --replay {} --state {}",
            row.states,
            distinct.state.at,
            recording.log.entries().len(),
            states::missing(&recording.log, distinct.state),
            kept.display(),
            distinct.state,
        ))));
    }
    Ok(None)
}

/// Keeps a recording that shows something.
fn keep(recording: &Recording) -> Result<PathBuf> {
    let Subject { file_system, workload, seed, .. } = recording.subject;
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| PathBuf::from("target"), PathBuf::from);
    let directory = target.join("crash").join(format!("{}-{}-{seed}", file_system.name(), workload.name()));
    recording.save(&directory)?;
    Ok(directory)
}

fn replay(directory: &Path, state: State, place: &Path, binaries: &Path) -> Result<Option<Violation>> {
    let recording = Recording::load(directory)?;
    if state.at > recording.log.entries().len() {
        bail!("there are only {} requests", recording.log.entries().len());
    }
    let image = States::new(&recording.base, &recording.log).image(state);
    let scratch = Scratch::new(recording.subject.file_system, place, binaries)?;
    for step in &recording.steps {
        say(&format!("{}: begun at request {}, acknowledged at {}", step.what, step.begun, step.acknowledged));
    }
    say(&format!("without {}", states::missing(&recording.log, state)));
    let verdict = scratch.check(&recording, &Distinct { state, points: vec![state.at] }, &image)?;
    if verdict.is_none() {
        say("it is as it must be");
    }
    Ok(verdict.map(Violation))
}

impl Row {
    fn add(&mut self, other: Self) {
        self.writes += other.writes;
        self.flushes += other.flushes;
        self.states += other.states;
        self.violations += other.violations;
        self.time += other.time;
    }

    fn cells(&self) -> [String; 6] {
        let seconds = self.time.as_secs_f64();
        let rate = f64::from(u32::try_from(self.states).unwrap_or(u32::MAX)) / seconds.max(0.001);
        let numbers = [self.writes, self.flushes, self.states, self.violations].map(|number| number.to_string());
        let [writes, flushes, states, violations] = numbers;
        [writes, flushes, states, violations, format!("{seconds:.0}"), format!("{rate:.0}")]
    }
}

fn show(rows: &Rows, time: Duration) {
    let mut table = Table::new();
    table.load_preset(presets::ASCII_MARKDOWN);
    table.set_header(["file system", "workload", "writes", "flushes", "states", "violations", "seconds", "states/s"]);
    let mut sum = Row::default();
    for ((file_system, workload), row) in rows {
        table.add_row([file_system.name(), workload.name()].into_iter().chain(row.cells()));
        sum.add(*row);
    }
    sum.time = time;
    table.add_row(["all".to_owned(), String::new()].into_iter().chain(sum.cells()));
    for column in table.column_iter_mut().skip(2) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    say(&table.to_string());
}
