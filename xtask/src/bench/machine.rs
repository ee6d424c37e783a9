//! What was measured on, and with what. No names of hosts, users or paths: the report is published.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use bytesize::ByteSize;

use super::report::{Section, table};
use crate::packages;

/// Where the measurements that need a real disk take place.
pub(super) const ON_DISK: &str = "/var/tmp";

/// Describes this machine.
pub(super) fn describe() -> Result<Section> {
    let mut rows = table(&["", ""]);
    let cpu = field("/proc/cpuinfo", "model name")?.unwrap_or_else(|| std::env::consts::ARCH.to_owned());
    let cores = std::thread::available_parallelism().context("counting the processors")?;
    rows.add_row(["date".to_owned(), said("date", &["+%F"])?]);
    rows.add_row(["processor".to_owned(), format!("{cpu}, {cores} cores")]);
    let memory = field("/proc/meminfo", "MemTotal")?.context("no MemTotal")?;
    let kib: u64 = memory.trim_end_matches(" kB").parse().context("MemTotal")?;
    rows.add_row(["memory".to_owned(), ByteSize::kib(kib).to_string()]);
    rows.add_row(["kernel".to_owned(), format!("Linux {}", said("uname", &["-r"])?)]);
    rows.add_row(["disk".to_owned(), disk()?]);
    for program in ["rsync", "cp", "tar", "zstd", "fio"] {
        rows.add_row([program.to_owned(), version(&said(program, &["--version"])?)]);
    }
    let mut section = Section::new("The machine");
    section.add(&rows);
    Ok(section)
}

/// The file system and the disk below it, as far as the kernel tells.
fn disk() -> Result<String> {
    let device = fs::metadata(ON_DISK).with_context(|| format!("stat {ON_DISK}"))?.dev();
    let mut words = vec![said("findmnt", &["--noheadings", "--output", "FSTYPE", "--target", ON_DISK])?];
    let block = format!("/sys/dev/block/{}:{}", rustix::fs::major(device), rustix::fs::minor(device));
    // A partition's own directory is below that of its disk.
    let Ok(path) = fs::canonicalize(block) else { return Ok(words.remove(0)) };
    let whole = if path.join("partition").exists() { path.parent().unwrap_or(&path) } else { &path };
    let read = |name: &str| fs::read_to_string(whole.join(name)).map(|text| text.trim().to_owned());
    if let Ok(sectors) = read("size").unwrap_or_default().parse::<u64>() {
        words.push(ByteSize::b(sectors * 512).to_string());
    }
    words.extend(read("device/model"));
    let driver = fs::read_link(whole.join("device/driver")).unwrap_or_default();
    words.extend(driver.file_name().map(|name| format!("driver {}", Path::new(name).display())));
    words.extend(read("queue/rotational").map(|turns| format!("rotational {turns}")));
    Ok(words.join(", "))
}

/// The value of the first line `name: value` of a file in /proc.
fn field(path: &str, name: &str) -> Result<Option<String>> {
    let text = fs::read_to_string(path).with_context(|| format!("read {path}"))?;
    let value = |line: &str| Some(line.strip_prefix(name)?.trim_start().strip_prefix(':')?.trim().to_owned());
    Ok(text.lines().find_map(value))
}

/// The first line that a program says.
fn said(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program).args(arguments).env("PATH", packages::path()).env("LC_ALL", "C").output();
    let output = output.with_context(|| format!("running {program}"))?;
    Ok(String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or_default().trim().to_owned())
}

/// The first word that has a number with a dot in it, from its first digit on.
fn version(line: &str) -> String {
    let numbers = line
        .split_whitespace()
        .map(|word| word.trim_start_matches(|letter: char| !letter.is_ascii_digit()).trim_end_matches([',', ')']));
    numbers.into_iter().find(|word| word.contains('.')).unwrap_or(line).to_owned()
}
