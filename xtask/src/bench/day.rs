//! A day in a minute: how much RAM the overlays take for what was written into them, and how much of it reached the disk
//! when it is saved once an hour.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use bytesize::ByteSize;
use fastrand::Rng;
use rustix::fs::statvfs;
use rustix::mount::{UnmountFlags, unmount};
use serde_json::Value;

use super::engine::workload::{log, settings};
use super::overlay::boot;
use super::report::{Section, table};
use crate::disk::{self, Disk};
use crate::say::say;

const HOURS: usize = 24;
const TARGETS: [&str; 3] = ["/etc", "/var/log", "/srv/cache"];
const JOURNAL: u64 = 8 << 20;
const DATABASE: usize = 16 << 20;
/// The size of a file system.
const DISK: u64 = 2 << 30;

/// How many pieces an hour has. Where nothing of ours runs, the kernel writes a piece's changes before the next one is
/// over: it waits for 30 seconds and looks every 5 (Documentation/admin-guide/sysctl/vm.rst, `dirty_expire_centisecs`).
const PIECES: usize = 100;

/// The writer: counts what it hands to write(2).
struct Day<'a> {
    root: &'a Path,
    random: Rng,
    /// Bytes that do not compress, for the cache.
    noise: Vec<u8>,
    /// Of each target.
    written: [u64; TARGETS.len()],
    /// Where the journal's next entry goes.
    journal: u64,
    archived: usize,
}

/// What a day with our overlays came to.
struct With {
    /// What programs wrote into each target, what of it was in RAM at the end, and what `status` says reached the disk.
    targets: [(u64, u64, u64); TARGETS.len()],
    /// What the tmpfs took at the end.
    ram: u64,
    /// What reached the device in all.
    device: u64,
}

/// Runs it below `place`, once with our overlays and once without.
pub(super) fn measure(place: &Path, early: &Path, syncd: &Path, section: &mut Section) -> Result<()> {
    let with = with(&place.join("with"), early, syncd)?;
    let without = without(&place.join("without"))?;
    section.heading("A day of it");
    section.add(&format!(
        "Log lines of three services, rotated at noon; journals of {}, appended in small pieces; 20 edits of `/etc` an hour, \
         each by a new file and a rename; a cache whose files are written anew all the time, beside a database of {} that \
         is written in place. It is saved every hour, and merged at the end. RAM is what the day's last moment takes; *to \
         the disk* is what `syncd status` says of {HOURS} checkpoints and the merge. *Without us* the same writes go to an \
         ext4 of each target's own, which writes them back every {} seconds, as the kernel does by itself, and counts what \
         reached its device; programs that call fsync would make that more.",
        ByteSize(JOURNAL),
        ByteSize(DATABASE as u64),
        3600 / PIECES
    ));
    let mut rows = table(&["", "written by programs", "in RAM", "to the disk", "without us"]);
    let mut add = |name: &str, numbers: [u64; 4]| {
        rows.add_row([name.to_owned()].into_iter().chain(numbers.map(|bytes| ByteSize(bytes).to_string())));
    };
    for ((target, (written, ram, disk)), without) in TARGETS.iter().zip(with.targets).zip(without) {
        add(target, [written, ram, disk, without]);
    }
    let sum = |of: fn(&(u64, u64, u64)) -> u64| with.targets.iter().map(of).sum();
    add("together", [sum(|target| target.0), with.ram, sum(|target| target.2), without.iter().sum()]);
    section.add(&rows);
    section.add(&format!(
        "With the file system's own writes, {} reached the device with our overlays.",
        ByteSize(with.device)
    ));
    Ok(())
}

fn with(root: &Path, early: &Path, syncd: &Path) -> Result<With> {
    let run_dir = root.with_extension("run");
    fs::create_dir(root)?;
    mount_disk(root)?;
    fs::create_dir_all(root.join("usr/lib/ephemeral-overlay"))?;
    let mut day = Day::prepare(root)?;
    boot(root, &run_dir, early, &TARGETS)?;
    let syncd = |arguments: &[&str]| -> Result<Vec<u8>> {
        let mut command = Command::new(syncd);
        command.arg("--root").arg(root).arg("--run-dir").arg(&run_dir).arg("--config").arg(root.join("config.toml"));
        let output = command.args(arguments).stdin(Stdio::null()).output().context("starting syncd")?;
        if !output.status.success() {
            bail!("syncd {arguments:?}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
        }
        Ok(output.stdout)
    };
    sync(root)?;
    let before = disk::written(root)?;
    for hour in 0..HOURS {
        say(&format!("with the overlays, hour {} of {HOURS}", hour + 1));
        (0..PIECES).try_for_each(|piece| day.piece(hour, piece))?;
        syncd(&["checkpoint"])?;
    }
    let tmpfs = statvfs(run_dir.join("ram")).context("statvfs")?;
    let ram = ["etc", "var-log", "srv-cache"].map(|name| blocks(&run_dir.join("ram").join(name)));
    for target in TARGETS {
        unmount(below(root, target), UnmountFlags::empty()).context("umount2")?;
    }
    syncd(&["merge"])?;
    sync(root)?;
    let device = disk::written(root)? - before;
    let status: Value = serde_json::from_slice(&syncd(&["status", "--json"])?).context("reading the status")?;
    let mut targets = [(0, 0, 0); TARGETS.len()];
    for (((target, name), written), ram) in targets.iter_mut().zip(TARGETS).zip(day.written).zip(ram) {
        let mut all = status["targets"].as_array().into_iter().flatten();
        let found = all.find(|target| target["target"] == name);
        let disk = found.and_then(|target| target["written_in_all_bytes"].as_u64());
        *target = (written, ram?, disk.with_context(|| format!("the status has nothing on {name}"))?);
    }
    Ok(With { targets, ram: (tmpfs.f_blocks - tmpfs.f_bfree) * tmpfs.f_frsize, device })
}

/// Returns what reached the device of each target.
fn without(root: &Path) -> Result<[u64; TARGETS.len()]> {
    for target in TARGETS {
        fs::create_dir_all(below(root, target))?;
        mount_disk(&below(root, target))?;
    }
    let mut day = Day::prepare(root)?;
    let mut bytes = [0; TARGETS.len()];
    for (bytes, target) in bytes.iter_mut().zip(TARGETS) {
        sync(&below(root, target))?;
        *bytes = disk::written(&below(root, target))?;
    }
    for hour in 0..HOURS {
        say(&format!("without them, hour {} of {HOURS}", hour + 1));
        for piece in 0..PIECES {
            day.piece(hour, piece)?;
            TARGETS.iter().try_for_each(|target| sync(&below(root, target)))?;
        }
    }
    for (bytes, target) in bytes.iter_mut().zip(TARGETS) {
        *bytes = disk::written(&below(root, target))? - *bytes;
    }
    Ok(bytes)
}

/// Mounts a new file system that does nothing in the background.
fn mount_disk(at: &Path) -> Result<()> {
    let disk = Disk::create(DISK)?;
    disk.format_anew()?;
    disk.mount(at, "")
}

fn below(root: &Path, target: &str) -> PathBuf {
    root.join(target.trim_start_matches('/'))
}

fn sync(path: &Path) -> Result<()> {
    rustix::fs::syncfs(File::open(path)?).context("syncfs")
}

impl<'a> Day<'a> {
    /// Makes what is there before the day begins.
    fn prepare(root: &'a Path) -> Result<Self> {
        for directory in ["etc/conf.d", "var/log/journal", "srv/cache"] {
            fs::create_dir_all(root.join(directory))?;
        }
        let mut random = Rng::with_seed(6);
        for number in 0..500 {
            fs::write(root.join(format!("etc/conf.d/{number}.conf")), settings(&mut random, 2000))?;
        }
        fs::write(root.join("srv/cache/database"), vec![0; DATABASE])?;
        let mut noise = vec![0; DATABASE];
        random.fill(&mut noise);
        Ok(Self { root, random, noise, written: [0; TARGETS.len()], journal: JOURNAL, archived: 0 })
    }

    /// What happens in one piece of an hour.
    fn piece(&mut self, hour: usize, piece: usize) -> Result<()> {
        if piece.is_multiple_of(5) {
            self.edit()?;
        }
        for name in ["syslog", "auth.log", "daemon.log"] {
            self.log(name, (hour, piece) == (HOURS / 2, 0))?;
        }
        for _ in 0..30 {
            self.message()?;
        }
        self.cache()
    }

    /// As editors and package managers do it.
    fn edit(&mut self) -> Result<()> {
        let number = self.random.usize(..500);
        let text = settings(&mut self.random, 2000);
        let path = self.root.join(format!("etc/conf.d/{number}.conf"));
        let new = path.with_extension("new");
        fs::write(&new, &text)?;
        fs::rename(new, path)?;
        self.written[0] += text.len() as u64;
        Ok(())
    }

    /// 4 KiB in lines, each by a write of its own.
    fn log(&mut self, name: &str, rotate: bool) -> Result<()> {
        let path = self.root.join("var/log").join(name);
        if rotate {
            fs::rename(&path, path.with_extension("1"))?;
        }
        let mut file = OpenOptions::new().create(true).append(true).open(path)?;
        for line in log(&mut self.random, 4 << 10).split_inclusive('\n') {
            file.write_all(line.as_bytes())?;
            self.written[1] += line.len() as u64;
        }
        Ok(())
    }

    /// One entry of the journal, which has its room from the start and a header that every entry changes.
    fn message(&mut self) -> Result<()> {
        let path = self.root.join("var/log/journal/system.journal");
        if self.journal + 1024 > JOURNAL {
            if path.exists() {
                fs::rename(&path, self.root.join(format!("var/log/journal/system@{:04}.journal", self.archived)))?;
                self.archived += 1;
            }
            let file = File::create(&path)?;
            rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, JOURNAL).context("fallocate")?;
            self.journal = 4096;
        }
        let length = self.random.usize(300..700);
        let entry = log(&mut self.random, length);
        let file = OpenOptions::new().write(true).open(path)?;
        file.write_all_at(entry.as_bytes(), self.journal)?;
        file.write_all_at(&self.random.u128(..).to_le_bytes(), 64)?;
        self.journal += entry.len().next_multiple_of(8) as u64;
        self.written[1] += entry.len() as u64 + 16;
        Ok(())
    }

    fn cache(&mut self) -> Result<()> {
        let cache = self.root.join("srv/cache");
        for _ in 0..4 {
            let (at, length) = (self.random.usize(..self.noise.len() - 100_000), self.random.usize(4096..100_000));
            fs::write(cache.join(self.random.usize(..1000).to_string()), &self.noise[at..at + length])?;
            self.written[2] += length as u64;
        }
        let database = OpenOptions::new().write(true).open(cache.join("database"))?;
        for _ in 0..20 {
            let at = self.random.usize(..self.noise.len() - 4096);
            database.write_all_at(&self.noise[at..at + 4096], self.random.u64(..DATABASE as u64 / 4096) * 4096)?;
            self.written[2] += 4096;
        }
        Ok(())
    }
}

/// What a tree takes, in bytes.
fn blocks(path: &Path) -> Result<u64> {
    let metadata = fs::symlink_metadata(path).with_context(|| format!("lstat {}", path.display()))?;
    let mut sum = metadata.blocks() * 512;
    if metadata.is_dir() {
        for entry in fs::read_dir(path)? {
            sum += blocks(&entry?.path())?;
        }
    }
    Ok(sum)
}
