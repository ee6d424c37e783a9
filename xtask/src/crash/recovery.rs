//! The next boot, from one state of the disk, and what it has to show.
//!
//! One file and one loop device serve for all states: what differs from the next one is written through the device, so
//! that neither its cache nor the file is ever behind the other. Every state is mounted and compared. Where the file
//! system then shows a tree that has been booted from already, as most do, what that came to is known.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use ephemeral_overlay::attributes::Handle;
use ephemeral_overlay::token::Token;
use test_support::snapshot;
use xxhash_rust::xxh3::xxh3_128;

use super::device::Loop;
use super::file_system::unmount_for_good;
use super::image::{BLOCK, Image, blocks_with_data};
use super::recording::Recording;
use super::states::{Distinct, State};
use super::system::{System, expect, said};
use super::workload::Step;
use crate::disk::detach_all;

/// A disk that takes any state of one recording, and a place to mount it.
#[derive(Debug)]
pub(crate) struct Scratch<'a> {
    recording: &'a Recording,
    file: File,
    device: Loop,
    disk: PathBuf,
    system: System,
    /// What came of the boots so far, by the tree that the disk showed before.
    boots: HashMap<u128, Result<Boot, String>>,
}

/// What came of a boot.
#[derive(Debug)]
struct Boot {
    /// What `/etc` shows.
    view: Vec<String>,
    /// What the merge said.
    said: String,
}

/// Which state is wrong, and why, in words; nothing when all are right.
pub(crate) type Verdict = Option<(State, String)>;

impl<'a> Scratch<'a> {
    /// A disk in the directory `place`.
    pub(crate) fn new(recording: &'a Recording, place: &Path, binaries: &Path) -> Result<Self> {
        let (path, disk) = (place.join("scratch"), place.join("recovered"));
        let file = File::create_new(&path).with_context(|| format!("creat {}", path.display()))?;
        file.set_len(recording.subject.file_system.bytes()).context("ftruncate of the disk")?;
        fs::create_dir(&disk).with_context(|| format!("mkdir {}", disk.display()))?;
        let mut system = System::on(&disk, place, binaries)?;
        system.one_thread = true;
        let (file, device) = (File::open(&path)?, Loop::on(&path)?);
        Ok(Self { recording, file, device, disk, system, boots: HashMap::new() })
    }

    /// How many different trees the file system has shown.
    pub(crate) fn trees(&self) -> usize {
        self.boots.len()
    }

    /// Boots from what all of some states have on the disk, and compares.
    pub(crate) fn check(&mut self, states: &Distinct, image: &Image) -> Result<Verdict> {
        self.load(image)?;
        if let Err(error) = self.recording.subject.file_system.mount(self.device.path(), &self.disk) {
            return Ok(Some((states.first(), format!("the file system is lost: {error:#}"))));
        }
        // A file that cannot be read makes a snapshot panic.
        let verdict = catch_unwind(AssertUnwindSafe(|| self.judge(states)));
        let verdict = match verdict {
            Ok(Ok(verdict)) => verdict,
            Ok(Err(error)) => Some((states.first(), format!("{error:#}"))),
            Err(panic) => Some((states.first(), words_of(panic.as_ref()))),
        };
        if verdict.is_some() {
            detach_all(&self.disk)?;
        } else {
            unmount_for_good(&self.disk)?;
        }
        Ok(verdict)
    }

    /// Makes the disk hold an image.
    fn load(&self, image: &Image) -> Result<()> {
        let device = self.device.open_unused()?;
        // What the last mount left in the device's cache goes to the file first.
        device.sync_all().context("fsync of the loop device")?;
        let mut present = blocks_with_data(&self.file)?;
        let mut found = [0; BLOCK];
        present.retain(|number| image.block(*number).is_none());
        for number in image.numbers().chain(present) {
            self.file.read_exact_at(&mut found, number * BLOCK as u64).context("pread of the disk")?;
            let wanted = image.block(number).unwrap_or(&[0; BLOCK]);
            if found != *wanted {
                device.write_all_at(wanted, number * BLOCK as u64).context("pwrite to the loop device")?;
            }
        }
        device.sync_all().context("fsync of the loop device")
    }

    /// Boots from what is mounted, unless the same tree has been booted from before, and compares with what may be there.
    fn judge(&mut self, states: &Distinct) -> Result<Verdict> {
        self.make_room()?;
        let tree = self.tree()?;
        if !self.boots.contains_key(&tree) {
            let boot = self.boot().map_err(|error| format!("{error:#}"));
            self.boots.insert(tree, boot);
        }
        match &self.boots[&tree] {
            Ok(boot) => Ok(self.compare(states, boot)),
            Err(words) => bail!("{words}"),
        }
    }

    /// Removes what fills the disk.
    fn make_room(&self) -> Result<()> {
        let Some(filler) = &self.recording.also.filler else { return Ok(()) };
        let path = self.system.root.join(filler);
        match fs::remove_file(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error).with_context(|| format!("unlink {}", path.display())),
            Ok(()) => rustix::fs::syncfs(&File::open(&self.system.root)?).context("syncfs"),
        }
    }

    /// A digest of everything that a boot can see.
    fn tree(&self) -> Result<u128> {
        let etc = self.system.etc();
        // A snapshot leaves it out.
        let token = Token::read(&Handle::open(File::open(&etc)?.as_fd()), &etc)?;
        let mut lines = vec![format!("{token:?}")];
        for directory in [&etc, &self.system.persist()] {
            lines.extend(snapshot::lines(&snapshot::take(directory)));
        }
        Ok(xxh3_128(lines.join("\n").as_bytes()))
    }

    fn boot(&self) -> Result<Boot> {
        let (system, also) = (&self.system, &self.recording.also);
        let was_pending = !system.pending()?.is_empty();
        let statuses: &[i32] = if also.saved.is_empty() { &[0] } else { &[0, 3] };
        let output = system.merge_at_boot()?;
        expect(&output, statuses, "the merge at boot fails")?;
        let boot = Boot { view: snapshot::lines(&system.look()), said: said(&output) };
        for (name, contents) in &also.saved {
            self.is_saved(name, contents)?;
        }
        let mut left = system.pending()?;
        if was_pending {
            // A store that was not needed is swept by whoever writes to it next.
            left.extend(system.unfinished()?);
        }
        if !left.is_empty() {
            bail!("the store still holds {left:?}\n{}", boot.said);
        }
        let again = system.merge_at_boot()?;
        expect(&again, &[0], "the second merge fails")?;
        if snapshot::lines(&system.look()) != boot.view {
            bail!("the second merge changes something: {}", said(&again));
        }
        Ok(boot)
    }

    /// At every crash point that may leave this state, what `/etc` shows has to be what may be there.
    fn compare(&self, states: &Distinct, boot: &Boot) -> Verdict {
        let whole = |step: &Step| step.view == boot.view;
        for &state in &states.0 {
            let allowed = self.recording.allowed(state.at);
            if allowed.iter().any(whole) {
                continue;
            }
            let other = self.recording.steps.iter().find(|step| whole(step));
            let words = format!(
                "/etc is not what it was at `{}`{}: {}\n{}\n{}",
                allowed[0].what,
                if allowed.len() > 1 { ", nor at what had begun since" } else { "" },
                other.map_or("it is no checkpoint's state at all".to_owned(), |step| format!(
                    "it is what it was at `{}`, request {}",
                    step.what, step.acknowledged
                )),
                difference(&allowed[0].view, &boot.view),
                boot.said,
            );
            return Some((state, words));
        }
        None
    }

    /// The version that lost is in the store.
    fn is_saved(&self, name: &Path, contents: &str) -> Result<()> {
        let conflicts = self.system.store().join("targets/etc/conflicts");
        let entries = fs::read_dir(&conflicts).with_context(|| format!("listing {}", conflicts.display()))?;
        for entry in entries {
            if fs::read(entry?.path().join(name)).is_ok_and(|found| found == contents.as_bytes()) {
                return Ok(());
            }
        }
        bail!("the disk's version of {} is lost", name.display())
    }
}

/// The lines in which two views differ, some of them.
fn difference(expected: &[String], found: &[String]) -> String {
    let missing = expected.iter().filter(|line| !found.contains(line)).map(|line| format!("  expected {line}"));
    let more = found.iter().filter(|line| !expected.contains(line)).map(|line| format!("  found    {line}"));
    let mut lines: Vec<_> = missing.chain(more).collect();
    lines.sort_by(|a, b| a[11..].cmp(&b[11..]));
    let count = lines.len();
    lines.truncate(20);
    if count > 20 {
        lines.push(format!("  and {} more", count - 20));
    }
    lines.join("\n")
}

fn words_of(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("a panic").to_owned()
}
