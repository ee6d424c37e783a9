//! `cargo xtask crash`: power cuts at every moment, without a machine.
//!
//! A system at work is recorded on a block device that writes down all writes and flushes. What the disk may hold after
//! a cut follows from that, and is put on another disk, which boots: the merge has to show exactly the state of the last
//! checkpoint that had been acknowledged, or of one that had begun since; never a mixture, never an older one, and it
//! never refuses.

mod device;
mod file_system;
mod found;
mod image;
mod log;
mod recording;
mod recovery;
mod states;
mod system;
mod workload;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Mutex;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::Args;
use fastrand::Rng;

use crate::disk::detach_all;
use crate::say::say;
use crate::{build, namespace, packages};
use file_system::FileSystem;
use found::{Found, Row};
use recording::{Recording, Subject};
use recovery::Scratch;
use states::{Distinct, State, States};
use workload::Workload;

/// The most states of one recording: many short histories find more than one long one.
const RECORDING: usize = 200;
/// How many states are tried with the tests.
const SAMPLE: usize = 240;
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
    /// How many at a time [default: two for each processor, as disks make them wait]
    #[arg(long, value_name = "N")]
    jobs: Option<usize>,
    /// Go on after a violation, and count them all
    #[arg(long)]
    all: bool,
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

/// A few states of each file system and workload, for every change.
pub(crate) fn sample() -> Result<ExitCode> {
    say("power cuts at some moments");
    let (fs, workload) = (Vec::new(), Vec::new());
    run(&Options { states: SAMPLE, seed: 1, fs, workload, jobs: None, all: false, replay: None, state: None })
}

/// Runs it.
pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    namespace::require_root()?;
    packages::ensure_recorder()?;
    let profile: &[&str] = if options.states >= MANY { &["--release"] } else { &[] };
    say("building early and syncd");
    let built = [build::binary("early", profile, &[])?, build::binary("syncd", profile, &[])?];
    namespace::enter()?;
    let place = tempfile::Builder::new().prefix("eo-crash-").tempdir().context("creating a temporary directory")?;
    let result = in_ram(place.path()).and_then(|()| {
        // Whoever builds something meanwhile does not change what is tried.
        let binaries = place.path().join("bin");
        fs::create_dir(&binaries)?;
        for path in &built {
            let name = path.file_name().context("a program without a name")?;
            fs::copy(path, binaries.join(name)).with_context(|| format!("copying {}", path.display()))?;
        }
        match (&options.replay, options.state) {
            (Some(recording), Some(state)) => replay(recording, state, place.path(), &binaries),
            _ => campaign(options, place.path(), &binaries),
        }
    });
    // Before the directory goes: what is mounted in it must not go with it.
    detach_all(place.path())?;
    place.close().context("removing the temporary directory")?;
    result.map(|()| ExitCode::SUCCESS)
}

/// Disks and logs are in RAM: nothing of this has to outlive a power cut.
fn in_ram(place: &Path) -> Result<()> {
    use rustix::mount::{MountFlags, mount};
    mount("tmpfs", place, "tmpfs", MountFlags::empty(), Some(c"mode=0700")).context("mount a tmpfs")
}

fn campaign(options: &Options, place: &Path, binaries: &Path) -> Result<()> {
    let file_systems = if options.fs.is_empty() { FileSystem::ALL.to_vec() } else { options.fs.clone() };
    let workloads = if options.workload.is_empty() { Workload::ALL.to_vec() } else { options.workload.clone() };
    let processors = std::thread::available_parallelism().map_or(1, Into::into);
    let jobs = options.jobs.unwrap_or(2 * processors).max(1);
    let pairs = file_systems.len() * workloads.len();
    let begun = Instant::now();
    let found = Found::new(options.all);
    // Every round makes new recordings.
    for round in 0.. {
        let done = found.sum();
        if done.states >= options.states || found.is_ended() {
            break;
        }
        if round > 1000 {
            bail!("there are only {} distinct states", done.states);
        }
        if round > 0 {
            say(&format!("{} states, {} violations, {:.0?}", done.states, done.violations, begun.elapsed()));
        }
        let states = (options.states - done.states).div_ceil(pairs).clamp(2, RECORDING);
        let mut tasks = Vec::new();
        for (row, &workload) in workloads.iter().enumerate() {
            for (column, &file_system) in file_systems.iter().enumerate() {
                let number = tasks.len();
                let seed = options.seed.wrapping_mul(1_000_003).wrapping_add((round * 1000 + number) as u64);
                // In four rounds, each pair in all four manners; in each round, each file system and workload in several.
                let manner = (round + row + column) % 4;
                let (busy, slow) = (manner % 2 == 1, manner == 0 || manner == 3);
                let subject = Subject { file_system, workload, seed, busy, slow };
                tasks.push(Task { number, subject, states });
            }
        }
        let place = place.join(round.to_string());
        fs::create_dir(&place)?;
        round_of(tasks, jobs, &place, binaries, &found)?;
        fs::remove_dir_all(&place).context("unlink of a round")?;
    }
    found.verdict(begun.elapsed())
}

/// Does all tasks, some at a time.
fn round_of(tasks: Vec<Task>, jobs: usize, place: &Path, binaries: &Path, found: &Found) -> Result<()> {
    let tasks = Mutex::new(tasks.into_iter());
    let next = || tasks.lock().ok().and_then(|mut tasks| tasks.next()).filter(|_| !found.is_ended());
    let worker = || -> Result<()> {
        while let Some(task) = next() {
            let place = place.join(task.number.to_string());
            fs::create_dir(&place)?;
            let mut row = Row::default();
            let begun = Instant::now();
            let done = one(&task, &place, binaries, found, &mut row).with_context(|| task.subject.to_string());
            row.time = begun.elapsed();
            found.add(task.subject, row);
            if done.is_err() {
                found.end();
                return done;
            }
            fs::remove_dir_all(&place).with_context(|| format!("unlink {}", place.display()))?;
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..jobs).map(|_| scope.spawn(worker)).collect();
        let ends = workers.into_iter().map(|worker| worker.join().unwrap_or_else(|_| bail!("a worker panicked")));
        ends.collect::<Vec<_>>().into_iter().collect()
    })
}

/// Makes one recording, and boots from its states.
fn one(task: &Task, place: &Path, binaries: &Path, found: &Found, row: &mut Row) -> Result<()> {
    let subject = task.subject;
    let recording = Recording::make(subject, place, binaries)?;
    let log = &recording.log;
    row.flushes = log.entries().iter().filter(|entry| entry.flush).count();
    row.writes = log.entries().len() - row.flushes;
    let moments: Vec<_> = recording.steps.iter().map(|step| step.acknowledged).collect();
    let plan = states::plan(&recording.base, log, &moments, task.states, &mut Rng::with_seed(subject.seed));
    let mut scratch = Scratch::new(&recording, place, binaries)?;
    let mut states = States::new(&recording.base, log);
    for distinct in &plan {
        if found.is_ended() {
            break;
        }
        let verdict = scratch.check(distinct, &states.image(distinct.first()))?;
        row.states += 1;
        row.trees = scratch.trees();
        let Some((state, words)) = verdict else { continue };
        row.violations += 1;
        if row.violations > 1 {
            continue;
        }
        let kept = keep(&recording)?;
        found.violation(&format!(
            "{subject}: a cut after request {} of {}, without {}:\n{words}\nagain: cargo xtask crash --replay {} --state {state}",
            state.at,
            log.entries().len(),
            states::missing(log, state),
            kept.display(),
        ));
    }
    Ok(())
}

/// Keeps a recording that shows something.
fn keep(recording: &Recording) -> Result<PathBuf> {
    let Subject { file_system, workload, seed, .. } = recording.subject;
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| PathBuf::from("target"), PathBuf::from);
    let directory = target.join("crash").join(format!("{}-{}-{seed}", file_system.name(), workload.name()));
    recording.save(&directory)?;
    Ok(directory)
}

fn replay(directory: &Path, state: State, place: &Path, binaries: &Path) -> Result<()> {
    let recording = Recording::load(directory)?;
    if state.at > recording.log.entries().len() {
        bail!("there are only {} requests", recording.log.entries().len());
    }
    let image = States::new(&recording.base, &recording.log).image(state);
    for step in &recording.steps {
        say(&format!("{}: begun at request {}, acknowledged at {}", step.what, step.begun, step.acknowledged));
    }
    say(&format!("without {}", states::missing(&recording.log, state)));
    let mut scratch = Scratch::new(&recording, place, binaries)?;
    if let Some((_, words)) = scratch.check(&Distinct(vec![state]), &image)? {
        bail!("{words}");
    }
    say("it is as it must be");
    Ok(())
}
