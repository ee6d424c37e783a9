//! The next boot, from one state of the disk, and what it has to show.
//!
//! One file and one loop device serve for all states: what differs from the next one is written through the device, so
//! that neither its cache nor the file is ever behind the other.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use test_support::snapshot;

use super::device::Loop;
use super::file_system::{FileSystem, unmount_for_good};
use super::image::{BLOCK, Image, blocks_with_data};
use super::recording::Recording;
use super::states::Distinct;
use super::system::{System, expect, said};
use crate::disk::detach_all;

/// A disk that takes any state, and a place to mount it.
#[derive(Debug)]
pub(crate) struct Scratch {
    file: File,
    device: Loop,
    file_system: FileSystem,
    disk: PathBuf,
    system: System,
}

/// Why a state is wrong, in words; nothing when it is right.
pub(crate) type Verdict = Option<String>;

impl Scratch {
    /// A disk in the directory `place`.
    pub(crate) fn new(file_system: FileSystem, place: &Path, binaries: &Path) -> Result<Self> {
        let (path, disk) = (place.join("scratch"), place.join("recovered"));
        let file = File::create_new(&path).with_context(|| format!("creat {}", path.display()))?;
        file.set_len(file_system.bytes()).context("ftruncate of the disk")?;
        fs::create_dir(&disk).with_context(|| format!("mkdir {}", disk.display()))?;
        let system = System::on(&disk, place, binaries)?;
        Ok(Self { file: File::open(&path)?, device: Loop::on(&path)?, file_system, disk, system })
    }

    /// Boots from a state, and compares.
    pub(crate) fn check(&self, recording: &Recording, state: &Distinct, image: &Image) -> Result<Verdict> {
        self.load(image)?;
        if let Err(error) = self.file_system.mount(self.device.path(), &self.disk) {
            return Ok(Some(format!("the file system is lost: {error:#}")));
        }
        // A file that cannot be read makes a snapshot panic.
        let verdict = catch_unwind(AssertUnwindSafe(|| self.boot(recording, state)));
        let verdict = match verdict {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(format!("{error:#}")),
            Err(panic) => Some(words_of(panic.as_ref())),
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
        let device = File::options().write(true).open(self.device.path()).context("open of the loop device")?;
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

    fn boot(&self, recording: &Recording, state: &Distinct) -> Result<()> {
        let system = &self.system;
        if let Some(filler) = &recording.also.filler {
            let path = system.root.join(filler);
            if path.exists() {
                fs::remove_file(&path).with_context(|| format!("unlink {}", path.display()))?;
                rustix::fs::syncfs(&File::open(&system.root)?).context("syncfs")?;
            }
        }
        let was_pending = !system.pending()?.is_empty();
        let statuses: &[i32] = if recording.also.saved.is_empty() { &[0] } else { &[0, 3] };
        let output = system.merge_at_boot()?;
        expect(&output, statuses, "the merge at boot fails")?;
        let view = snapshot::lines(&system.look());
        let whole = |step: &super::workload::Step| step.view == view;
        for at in &state.points {
            let allowed = recording.allowed(*at);
            if !allowed.iter().any(whole) {
                let other = recording.steps.iter().find(|step| whole(step));
                bail!(
                    "/etc is not what it was at `{}`{}: {}\n{}",
                    allowed[0].what,
                    if allowed.len() > 1 { ", nor at what had begun since" } else { "" },
                    other.map_or("it is no checkpoint's state at all".to_owned(), |step| format!(
                        "it is what it was at `{}`, request {}",
                        step.what, step.acknowledged
                    )),
                    difference(&allowed[0].view, &view) + "\n" + &said(&output)
                );
            }
        }
        for (name, contents) in &recording.also.saved {
            self.is_saved(name, contents)?;
        }
        let mut left = system.pending()?;
        if was_pending {
            // A store that was not needed is swept by whoever writes to it next.
            left.extend(system.unfinished()?);
        }
        if !left.is_empty() {
            bail!("the store still holds {left:?}\n{}", said(&output));
        }
        let again = system.merge_at_boot()?;
        expect(&again, &[0], "the second merge fails")?;
        if snapshot::lines(&system.look()) != view {
            bail!("the second merge changes something: {}", said(&again));
        }
        Ok(())
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
