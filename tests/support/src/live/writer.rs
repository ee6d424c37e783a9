//! A writer: a process of its own, which is this program started once more.

use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::time::Duration;

use fastrand::Rng;
use rustix::fs::{FlockOperation, flock};

use super::log::{Event, Log};
use super::op::{Hands, Op};
use super::system::System;
use super::tree::{Id, Kind, ROOT, Tree, parent};
use super::{PARTS, WRITERS};

/// Says to a program that it is to be a writer, and which: target, log, lock, writer, seed, first number.
const ASKED: &str = "LIVE_WRITER";
/// The part that the writers share.
const SHARED: usize = 2;
/// How many objects a part has.
const OBJECTS: usize = 70;
/// The longest file, in slots, by the number of the operation that made it: few have more than a frame of a checkpoint.
/// Only those in odd places are written to through mappings: nobody can see when.
const LENGTHS: [usize; 16] = [15_000, 18_000, 18_000, 3000, 3000, 300, 300, 300, 300, 64, 64, 64, 64, 16, 16, 1];

/// A running writer; killed when it is dropped.
#[derive(Debug)]
pub(super) struct Writer(Child);

impl Writer {
    pub(super) fn is_alive(&mut self) -> bool {
        self.0.try_wait().unwrap().is_none()
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // An error means that it has ended.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// Starts the writers, whose operations have numbers from `first` on.
pub(super) fn start(system: &System, rng: &mut Rng, first: u32) -> Vec<Writer> {
    let lock = File::create(system.lock()).unwrap();
    // Until all have read the tree nobody changes what they share.
    flock(&lock, FlockOperation::LockExclusive).unwrap();
    let mut writers: Vec<_> = (0..WRITERS)
        .map(|writer| {
            let seed = rng.u64(..);
            let words = (system.target(), system.log(), system.lock(), writer, seed, first);
            let mut command = Command::new("/proc/self/exe");
            Writer(command.env(ASKED, serde_json::to_string(&words).unwrap()).spawn().unwrap())
        })
        .collect();
    let mut log = Log::open(&system.log());
    while log.events.iter().filter(|event| matches!(event, Event::Ready)).count() < WRITERS {
        assert!(writers.iter_mut().all(Writer::is_alive), "a writer has ended");
        std::thread::sleep(Duration::from_millis(1));
        log.catch_up();
    }
    writers
}

/// To be called first in every program that runs [`super::run`]: where the program was started to write it does not
/// return.
pub fn write_if_asked() {
    if let Ok(words) = std::env::var(ASKED) {
        write(serde_json::from_str(&words).unwrap());
    }
}

fn write((target, log, lock, writer, seed, first): (PathBuf, PathBuf, PathBuf, usize, u64, u32)) -> ! {
    // A checkpoint is to get ahead where there is one processor.
    rustix::process::nice(5).unwrap();
    let mut rng = Rng::with_seed(seed);
    let mut log = Log::open(&log);
    let lock = File::open(lock).unwrap();
    let roots = PARTS.map(|part| target.join(part));
    let mut own = Place { part: writer, tree: Tree::read(&roots[writer]), hands: Hands::default() };
    let mut shared = Place { part: SHARED, tree: Tree::read(&roots[SHARED]), hands: Hands::default() };
    log.append(&Event::Ready);
    let mut number = first + u32::try_from(writer).unwrap();
    let mut followed = 0;
    let mut running = Vec::new();
    loop {
        let pace = Pace::random(&mut rng);
        for _ in 0..rng.usize(1..200) {
            if rng.u32(..4) > 0 {
                own.step(&mut rng, &mut log, &roots, pace, number);
            } else {
                flock(&lock, FlockOperation::LockExclusive).unwrap();
                log.catch_up();
                for event in &log.events[followed..] {
                    match event {
                        Event::Begin { number, part: SHARED, op } => running.push((*number, op.clone())),
                        Event::End { number, done } => {
                            let begun = running.iter().position(|(begun, _)| begun == number);
                            if let Some((number, op)) = begun.map(|at| running.remove(at))
                                && *done
                            {
                                shared.tree.apply(number, &op);
                            }
                        }
                        _ => {}
                    }
                }
                followed = log.events.len();
                shared.step(&mut rng, &mut log, &roots, pace, number);
                flock(&lock, FlockOperation::Unlock).unwrap();
            }
            number += u32::try_from(WRITERS).unwrap();
            pace.wait(&mut rng);
        }
    }
}

/// How fast operations follow one another for a while, and whether they are about names as well.
#[derive(Debug, Clone, Copy)]
struct Pace {
    names: bool,
    microseconds: u64,
}

impl Pace {
    fn random(rng: &mut Rng) -> Self {
        // A pause now and then, so that names stand still while a checkpoint is taken.
        if rng.u32(..3) == 0 {
            std::thread::sleep(Duration::from_millis(rng.u64(..100)));
        }
        Self { names: rng.bool(), microseconds: [0, 0, 100, 1000][rng.usize(..4)] }
    }

    fn wait(self, rng: &mut Rng) {
        if self.microseconds > 0 {
            std::thread::sleep(Duration::from_micros(rng.u64(..2 * self.microseconds)));
        }
    }
}

/// A part, as its writer knows it.
#[derive(Debug)]
struct Place {
    part: usize,
    tree: Tree,
    hands: Hands,
}

impl Place {
    /// Does one thing, and says so before and after.
    fn step(&mut self, rng: &mut Rng, log: &mut Log, roots: &[PathBuf; PARTS.len()], pace: Pace, number: u32) {
        let Some(op) = choose(&self.tree, rng, pace.names) else { return };
        log.append(&Event::Begin { number, part: self.part, op: op.clone() });
        let done = self.hands.perform(&roots[self.part], number, &op);
        log.append(&Event::End { number, done });
        if done && self.part != SHARED {
            self.tree.apply(number, &op);
        }
    }
}

/// What stands where.
struct Names {
    directories: Vec<String>,
    files: Vec<(String, Id)>,
    others: Vec<String>,
}

/// An operation that is possible, or about a name in use.
fn choose(tree: &Tree, rng: &mut Rng, with_names: bool) -> Option<Op> {
    let paths = tree.paths();
    let mut names = Names { directories: vec![String::new()], files: Vec::new(), others: Vec::new() };
    for (path, &id) in &paths {
        match tree.nodes[&id].kind {
            Kind::Dir(_) if id == ROOT => {}
            Kind::Dir(_) => names.directories.push(path.clone()),
            Kind::File(_) => names.files.push((path.clone(), id)),
            Kind::Symlink(_) => names.others.push(path.clone()),
        }
    }
    let is_full = paths.len() > OBJECTS;
    let pick = |rng: &mut Rng, from: &[String]| rng.choice(from).cloned();
    let any = |rng: &mut Rng| rng.choice(paths.keys().skip(1).collect::<Vec<_>>()).cloned();
    let file = rng.choice(&names.files).cloned();
    let directory = pick(rng, &names.directories[1..]);
    let somewhere = {
        let above = pick(rng, &names.directories)?;
        let name = format!("n{}", rng.u32(..14));
        if above.is_empty() { name } else { format!("{above}/{name}") }
    };
    let there = paths.get(&somewhere).map(|id| &tree.nodes[id].kind);
    let is_free = there.is_none();
    match if with_names { rng.u32(..30) } else { rng.u32(..14) } {
        0..=11 => {
            // Often the longest, so that it is never read while nobody writes.
            let longest = names.files.iter().max_by_key(|(_, id)| tree.slots(*id)).cloned();
            let (path, id) = if rng.u32(..3) == 0 { longest } else { file }?;
            content(rng, path, tree.slots(id), id as usize / WRITERS % LENGTHS.len())
        }
        12 => {
            let path = any(rng)?;
            let is_symlink = names.others.contains(&path);
            match rng.u32(..4) {
                0 => Some(Op::Owner(path, [0, 1000, 65534][rng.usize(..3)])),
                1 if !is_symlink => Some(Op::Mode(path, [0o600, 0o644, 0o700, 0o755][rng.usize(..4)])),
                2 if tree.nodes[&paths[&path]].meta.attribute.is_some() => Some(Op::RemoveAttribute(path)),
                _ => Some(Op::SetAttribute(path)),
            }
        }
        13 => Some(Op::SetAttribute(file?.0)),
        14..=17 if is_free && !is_full => Some(Op::Create(somewhere)),
        18 if is_free && !is_full && depth(&somewhere) < 4 => Some(Op::Mkdir(somewhere)),
        19 if is_free && !is_full => Some(Op::Symlink(somewhere)),
        20 if is_free && !is_full => Some(Op::Link(file?.0, somewhere)),
        21..=22 => match there {
            Some(Kind::Dir(_)) => None,
            _ => Some(Op::Rename(file?.0, somewhere)),
        },
        23 => match there {
            None | Some(Kind::Dir(_)) => Some(Op::Rename(directory?, somewhere)),
            _ => None,
        },
        24 if is_free => Some(Op::Rename(pick(rng, &names.others)?, somewhere)),
        25 => Some(Op::Exchange(any(rng)?, any(rng)?)),
        26 => Some(Op::Exchange(file?.0, rng.choice(&names.files)?.0.clone())),
        27 => Some(Op::Unlink(file?.0)),
        28 => Some(Op::Unlink(pick(rng, &names.others)?)),
        _ => {
            let directory = directory?;
            let below: Vec<_> = paths.keys().filter(|path| parent(path) == directory).cloned().collect();
            match pick(rng, &below) {
                None => Some(Op::Rmdir(directory)),
                Some(path) if matches!(tree.nodes[&paths[&path]].kind, Kind::Dir(_)) => None,
                Some(path) => Some(Op::Unlink(path)),
            }
        }
    }
}

fn depth(path: &str) -> usize {
    path.split('/').count()
}

/// A change of the contents of a file of some slots, which is of one of the [`LENGTHS`].
fn content(rng: &mut Rng, path: String, slots: usize, class: usize) -> Option<Op> {
    let (most, is_mapped) = (LENGTHS[class], class % 2 == 1);
    let count = if rng.u32(..8) == 0 { rng.usize(1..=most) } else { rng.usize(1..=most.min(64)) };
    match rng.u32(..10) {
        0..=2 if slots + count <= most => Some(Op::Append { path, count }),
        3..=5 if slots > 0 && is_mapped => {
            let count = count.min(slots);
            Some(Op::Map { path, at: rng.usize(..=slots - count), count, sync: rng.bool() })
        }
        0..=7 => Some(Op::Write { path, at: rng.usize(..=most - count), count }),
        8 => Some(Op::Resize { path, count: rng.usize(..=most) }),
        9 => Some(Op::Resize { path, count: slots.min(rng.usize(..=most)) }),
        _ => None,
    }
}
