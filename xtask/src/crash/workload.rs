//! What is done to a system while its disk is recorded.
//!
//! Each step is a command that changes what the next boot has to show, and the state that it shows from then on. A
//! command is believed from the moment on at which it has returned; until it was begun nothing of it can be there.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use rustix::fs::{FallocateFlags, fallocate, syncfs};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use test_support::model::Model;
use test_support::snapshot::{self, Snapshot};

use super::file_system::unmount_for_good;
use super::system::{System, expect, said};

/// Something that a system does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Workload {
    /// The very first checkpoint
    Checkpoint,
    /// Five checkpoints
    Chain,
    /// A full checkpoint that takes the place of a chain
    Full,
    /// A chain is merged after the overlay was unmounted
    Merge,
    /// A chain is merged at boot, into a disk that somebody changed
    Conflict,
    /// The last checkpoint of a shutdown, on a full disk
    Reserve,
}

/// A command, and what it made true.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Step {
    /// What was done.
    pub what: String,
    /// From this request on something of it may be there.
    pub begun: usize,
    /// From this request on it is there.
    pub acknowledged: usize,
    /// What `/etc` shows then, as text.
    pub view: Vec<String>,
}

/// What a workload asks of a recovery beside the state of `/etc`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Also {
    /// What lost a conflict is in the store: the ends of its paths, with its contents.
    pub saved: Vec<(PathBuf, String)>,
    /// A file that fills the disk, below the root: it is removed before the merge, which needs room.
    pub filler: Option<PathBuf>,
}

/// A workload at work.
#[derive(Debug)]
pub(crate) struct Work<'a> {
    system: &'a System,
    log: PathBuf,
    model: Model,
    /// What was done so far; positions are lengths of the log still.
    pub steps: Vec<Step>,
}

/// The file that fills the disk.
const FILLER: &str = "filler";
/// What is changed both in RAM and on disk.
const DISPUTED: [&str; 4] = ["disputed0", "disputed1", "disputed2", "tree/sub/disputed"];
/// How many are many files.
const MANY: usize = 150;
/// What is made on disk only.
const UNDISPUTED: &str = "only on disk";

impl Workload {
    /// All of them.
    pub(crate) const ALL: [Self; 6] =
        [Self::Checkpoint, Self::Chain, Self::Full, Self::Merge, Self::Conflict, Self::Reserve];

    /// Its name on the command line.
    pub(crate) fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }

    /// Makes what is there before anything is recorded; returns what `/etc` has to show.
    pub(crate) fn prepare(self, system: &System, seed: u64) -> Result<(Snapshot, Also)> {
        system.create()?;
        let mut model = model(system, seed);
        model.populate();
        match self {
            Self::Conflict => conflict(system, &mut model),
            Self::Reserve => Ok((system.look(), Also { filler: Some(FILLER.into()), ..Also::default() })),
            _ => Ok((system.look(), Also::default())),
        }
    }

    /// Does it. `first` is what `/etc` shows at the beginning.
    pub(crate) fn run<'a>(self, system: &'a System, log: &Path, first: &Snapshot, seed: u64) -> Result<Work<'a>> {
        let begin = Step { what: "the beginning".to_owned(), begun: 0, acknowledged: 0, view: snapshot::lines(first) };
        let model = model(system, seed.wrapping_add(1));
        let mut work = Work { system, log: log.to_path_buf(), model, steps: vec![begin] };
        match self {
            Self::Checkpoint => work.chain(1)?,
            Self::Chain => work.chain(5)?,
            Self::Full => work.full()?,
            Self::Merge => {
                work.chain(2)?;
                many(&system.etc())?;
                work.checkpoint()?;
                unmount_for_good(&system.etc())?;
                let view = work.steps.last().map_or_else(Vec::new, |step| step.view.clone());
                work.command(&["merge"], &[0], view)?;
                if system.checkpoints()? != 0 {
                    bail!("nothing was merged");
                }
            }
            Self::Conflict => {
                let view = snapshot::lines(first);
                let output = system.merge_at_boot()?;
                expect(&output, &[3], "syncd merge")?;
                work.steps.push(Step { what: "merge at boot".to_owned(), begun: 0, acknowledged: 0, view });
            }
            Self::Reserve => work.reserve()?,
        }
        Ok(work)
    }
}

fn model(system: &System, seed: u64) -> Model {
    let mut model = Model::new(&system.etc(), seed);
    // tmpfs has them since Linux 6.6.
    model.user_attributes = false;
    model
}

/// A chain, and a disk that was changed since. All that the chain says wins; what only the disk changed stays.
fn conflict(system: &System, model: &mut Model) -> Result<(Snapshot, Also)> {
    let etc = system.etc();
    let write_all = |by: &str| {
        remove(&etc.join("tree"))?;
        fs::create_dir_all(etc.join("tree/sub")).context("mkdir tree/sub")?;
        DISPUTED.iter().try_for_each(|name| write(&etc.join(name), &format!("{name} by {by}\n")))
    };
    write_all("nobody")?;
    system.boot()?;
    for _ in 0..2 {
        model.mounted = true;
        (0..15).for_each(|_| model.step());
        write_all("the user")?;
        write(&etc.join("new"), &"new\n".repeat(1000))?;
        many(&etc)?;
        expect(&system.syncd(&["checkpoint"])?, &[0], "syncd checkpoint")?;
    }
    let mut expected = system.look();
    system.cut()?;
    write_all("somebody else")?;
    write(&etc.join(UNDISPUTED), "x")?;
    let on_disk = system.look();
    expected.extend(on_disk.into_iter().filter(|(path, _)| path == Path::new(UNDISPUTED)));
    let saved = DISPUTED.iter().map(|name| (name.into(), format!("{name} by somebody else\n"))).collect();
    Ok((expected, Also { saved, ..Also::default() }))
}

impl Work<'_> {
    fn position(&self) -> Result<usize> {
        let length = fs::metadata(&self.log).context("stat of the log")?.len();
        usize::try_from(length).context("a log of that length")
    }

    /// Runs `syncd`, after which `/etc` is to show `view`.
    fn command(&mut self, arguments: &[&str], statuses: &[i32], view: Vec<String>) -> Result<()> {
        let begun = self.position()?;
        let output = self.system.syncd(arguments)?;
        let acknowledged = self.position()?;
        let what = arguments.join(" ");
        expect(&output, statuses, &format!("syncd {what}"))?;
        self.steps.push(Step { what, begun, acknowledged, view });
        Ok(())
    }

    fn checkpoint(&mut self) -> Result<()> {
        let view = snapshot::lines(&self.system.look());
        self.command(&["checkpoint"], &[0], view)
    }

    /// A boot, and checkpoints with edits before each.
    fn chain(&mut self, checkpoints: usize) -> Result<()> {
        self.system.boot()?;
        self.model.mounted = true;
        for _ in 0..checkpoints {
            for _ in 0..=self.model.below(25) {
                self.model.step();
            }
            self.checkpoint()?;
        }
        Ok(())
    }

    /// What does not compress is written again and again, until the chain is longer than what is in RAM.
    fn full(&mut self) -> Result<()> {
        self.chain(2)?;
        for round in 0..20 {
            fs::write(self.system.etc().join("noise"), noise(400_000, round)).context("write of noise")?;
            self.checkpoint()?;
            if self.system.checkpoints()? == 1 {
                return self.checkpoint_after();
            }
        }
        bail!("no checkpoint was full")
    }

    /// One more, on what is there now.
    fn checkpoint_after(&mut self) -> Result<()> {
        self.model.step();
        self.checkpoint()
    }

    /// A checkpoint, with which the reserve comes; a disk that is filled; and the end of a shutdown.
    fn reserve(&mut self) -> Result<()> {
        self.chain(1)?;
        // What was done at random may have come to nothing, and with no checkpoint there is no reserve.
        fs::write(self.system.etc().join("first"), "first\n").context("write of first")?;
        self.checkpoint()?;
        let reserve = self.system.store().join("reserve");
        if !reserve.exists() {
            bail!("there is no reserve");
        }
        self.fill()?;
        fs::write(self.system.etc().join("noise"), noise(700_000, 0)).context("write of noise")?;
        for _ in 0..5 {
            self.model.step();
        }
        let view = snapshot::lines(&self.system.look());
        unmount_for_good(&self.system.etc())?;
        let begun = self.position()?;
        let output = self.system.syncd(&["last-stage"])?;
        let acknowledged = self.position()?;
        // It may have saved everything and found no room to merge it.
        expect(&output, &[0, 1], "syncd last-stage")?;
        if reserve.exists() {
            bail!("the reserve was not needed: {}", said(&output));
        }
        self.steps.push(Step { what: "last-stage".to_owned(), begun, acknowledged, view });
        Ok(())
    }

    /// Fills the disk, to the last block, with blocks in which nothing is written.
    fn fill(&self) -> Result<()> {
        let path = self.system.root.join(FILLER);
        let file = fs::File::create(&path).with_context(|| format!("creat {}", path.display()))?;
        // What was set aside for a write that came to less is there again after a sync.
        for _ in 0..3 {
            let mut length = 1 << 30;
            while length >= 4096 {
                let end = file.metadata()?.size();
                match fallocate(&file, FallocateFlags::empty(), end, length) {
                    Ok(()) => {}
                    Err(Errno::NOSPC) => length /= 2,
                    Err(error) => return Err(error).with_context(|| format!("fallocate {}", path.display())),
                }
            }
            syncfs(&file).context("syncfs")?;
        }
        Ok(())
    }
}

/// Makes so many files that it takes a disk some time to write them.
fn many(etc: &Path) -> Result<()> {
    let directory = etc.join("many");
    remove(&directory)?;
    fs::create_dir(&directory).context("mkdir many")?;
    (0..MANY).try_for_each(|number| write(&directory.join(number.to_string()), &format!("{number}\n").repeat(1000)))
}

/// Writes a new file in the place of whatever is there.
fn write(path: &Path, text: &str) -> Result<()> {
    remove(path)?;
    fs::write(path, text).with_context(|| format!("write {}", path.display()))
}

/// Removes whatever is there.
fn remove(path: &Path) -> Result<()> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Ok(found) if found.is_dir() => fs::remove_dir_all(path),
        _ => fs::remove_file(path),
    }
    .with_context(|| format!("unlink {}", path.display()))
}

/// Bytes that do not compress.
fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; length];
    fastrand::Rng::with_seed(seed).fill(&mut bytes);
    bytes
}
