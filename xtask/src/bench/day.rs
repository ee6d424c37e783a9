//! A day in a minute: how much RAM the overlays take for what was written into them, and how much of it reached the disk
//! when it is saved once an hour.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
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
use crate::say::say;

const HOURS: usize = 24;
const TARGETS: [&str; 3] = ["/etc", "/var/log", "/srv/cache"];
const JOURNAL: u64 = 8 << 20;
const DATABASE: usize = 16 << 20;

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

/// Runs it in `root`, on the disk.
pub(super) fn measure(root: &Path, early: &Path, syncd: &Path, section: &mut Section) -> Result<()> {
    let run_dir = root.with_extension("run");
    for directory in ["etc/conf.d", "var/log/journal", "srv/cache", "usr/lib/ephemeral-overlay"] {
        fs::create_dir_all(root.join(directory))?;
    }
    let mut random = Rng::with_seed(6);
    for number in 0..500 {
        fs::write(root.join(format!("etc/conf.d/{number}.conf")), settings(&mut random, 2000))?;
    }
    fs::write(root.join("srv/cache/database"), vec![0; DATABASE])?;
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
    let mut noise = vec![0; DATABASE];
    random.fill(&mut noise);
    let mut day = Day { root, random, noise, written: [0; TARGETS.len()], journal: JOURNAL, archived: 0 };
    for hour in 0..HOURS {
        say(&format!("hour {} of {HOURS}", hour + 1));
        day.hour(hour)?;
        syncd(&["checkpoint"])?;
    }
    let ram = statvfs(run_dir.join("ram")).context("statvfs")?;
    let used = (ram.f_blocks - ram.f_bfree) * ram.f_frsize;
    let uppers = ["etc", "var-log", "srv-cache"].map(|name| blocks(&run_dir.join("ram").join(name)));
    for target in TARGETS {
        unmount(root.join(target.trim_start_matches('/')), UnmountFlags::empty()).context("umount2")?;
    }
    syncd(&["merge"])?;
    let status: Value = serde_json::from_slice(&syncd(&["status", "--json"])?).context("reading the status")?;
    let on_disk = TARGETS.map(|name| {
        let mut targets = status["targets"].as_array().into_iter().flatten();
        targets.find(|target| target["target"] == name).and_then(|target| target["written_in_all_bytes"].as_u64())
    });

    section.heading("A day of it");
    section.add(&format!(
        "Log lines of three services, rotated at noon; journals of {}, appended in small pieces; 20 edits of `/etc` an hour, \
         each by a new file and a rename; a cache whose files are written anew all the time, beside a database of {} that \
         is written in place. It is saved every hour, and merged at the end. RAM is what the day's last moment takes; the \
         disk is what `syncd status` says of {HOURS} checkpoints and the merge.",
        ByteSize(JOURNAL),
        ByteSize(DATABASE as u64)
    ));
    let mut rows = table(&["", "written by programs", "in RAM", "written to the disk"]);
    let mut add = |name: &str, written: u64, ram: u64, disk: u64| {
        rows.add_row([
            name.to_owned(),
            ByteSize(written).to_string(),
            ByteSize(ram).to_string(),
            ByteSize(disk).to_string(),
        ]);
    };
    let mut sum = 0;
    for (((target, written), upper), disk) in TARGETS.iter().zip(day.written).zip(uppers).zip(on_disk) {
        let disk = disk.with_context(|| format!("the status has nothing on {target}"))?;
        sum += disk;
        add(target, written, upper?, disk);
    }
    add("together", day.written.iter().sum(), used, sum);
    section.add(&rows);
    Ok(())
}

impl Day<'_> {
    fn hour(&mut self, hour: usize) -> Result<()> {
        for _ in 0..20 {
            self.edit()?;
        }
        for name in ["syslog", "auth.log", "daemon.log"] {
            self.log(name, hour == HOURS / 2)?;
        }
        for _ in 0..3000 {
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

    /// 400 KiB in lines, each by a write of its own.
    fn log(&mut self, name: &str, rotate: bool) -> Result<()> {
        let path = self.root.join("var/log").join(name);
        if rotate {
            fs::rename(&path, path.with_extension("1"))?;
        }
        let mut file = OpenOptions::new().create(true).append(true).open(path)?;
        for line in log(&mut self.random, 400 << 10).split_inclusive('\n') {
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
        for _ in 0..400 {
            let (at, length) = (self.random.usize(..self.noise.len() - 100_000), self.random.usize(4096..100_000));
            fs::write(cache.join(self.random.usize(..1000).to_string()), &self.noise[at..at + length])?;
            self.written[2] += length as u64;
        }
        let database = OpenOptions::new().write(true).open(cache.join("database"))?;
        for _ in 0..2000 {
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
