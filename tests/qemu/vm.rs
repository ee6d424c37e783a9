//! One run of QEMU: started, listened to, and ended, by itself or by us.
//!
//! The machine has no state but its disks. With `cache=unsafe` a SIGKILL of QEMU keeps every write that has reached
//! it, and loses what was still in the guest's memory.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::console::Console;
use crate::kernel::Kernel;
use crate::narrate;
use crate::tools;

/// What a machine starts with.
#[derive(Debug)]
pub(crate) struct Vm<'a> {
    /// The kernel.
    pub kernel: &'a Kernel,
    /// The initramfs.
    pub initramfs: &'a Path,
    /// The disks, written to: the root, what our init reads its script from, and any others.
    pub disks: &'a [PathBuf],
    /// What goes wrong with the first disk.
    pub faults: &'a [Fault],
    /// What follows our own part of the kernel's command line.
    pub cmdline: &'a str,
    /// In MiB.
    pub memory: u32,
    /// The processor has a random number generator. Without it the kernel may have no random numbers for minutes.
    pub entropy: bool,
    /// End QEMU with SIGKILL as soon as init says this mark.
    pub kill_at: Option<&'a str>,
    /// An hour-glass for a hang, not a measure.
    pub limit: Duration,
}

/// Requests to a disk that fail with EIO.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Fault {
    /// Every write.
    Writes,
    /// Reads of this sector (512 bytes).
    Reads {
        /// Which.
        sector: u64,
    },
}

/// A process that does not outlive its owner.
struct Owned(Child);

impl Drop for Owned {
    fn drop(&mut self) {
        // An error means that it has ended.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

impl Vm<'_> {
    /// Runs the machine to its end, listening to its console; the console is kept in `log`.
    ///
    /// A machine that was to be killed has been killed at its mark; every other one has ended by itself.
    pub(crate) fn run(&self, log: &Path) -> Result<Console> {
        let mut command = qemu(accelerator(self.kernel), &self.kernel.image)?;
        command.args(["-m", &self.memory.to_string()]);
        command.args(["-cpu", if self.entropy { "qemu64,+rdrand" } else { "qemu64,-rdrand" }]);
        command.arg("-initrd").arg(self.initramfs);
        for (number, path) in self.disks.iter().enumerate() {
            let faults = if number == 0 { self.faults } else { &[] };
            let drive = format!("{},if=none,id=disk{number},cache=unsafe", image(path, faults));
            command.args(["-drive", &drive, "-device", &format!("virtio-blk-pci,drive=disk{number}")]);
        }
        let cmdline = format!("console=ttyS0 quiet loglevel=4 panic=-1 root=/dev/vda {}", self.cmdline);
        command.args(["-append", &cmdline]);

        let (mut process, lines) = start(command)?;
        let mut console = Console { lines: Vec::new(), kept: log.to_path_buf() };
        let mut file = File::create(log).with_context(|| format!("create {}", log.display()))?;
        let deadline = Instant::now() + self.limit;
        loop {
            match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => {
                    writeln!(file, "{line}").context("write the log")?;
                    narrate::quote(&line);
                    console.lines.push(line);
                    if self.kill_at.is_some_and(|mark| console.marked(mark)) {
                        return Ok(console);
                    }
                }
                Err(RecvTimeoutError::Timeout) => {
                    anyhow::bail!("the machine did not end within {} s{console}", self.limit.as_secs())
                }
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        let status = process.0.wait().context("waiting for QEMU")?;
        if let Some(mark) = self.kill_at {
            anyhow::bail!("the machine ended before the mark {mark}{console}");
        }
        anyhow::ensure!(status.success(), "QEMU: {status}{console}");
        Ok(console)
    }
}

/// How QEMU is told of an image, with what goes wrong with it.
fn image(path: &Path, faults: &[Fault]) -> String {
    let path = path.to_string_lossy().replace(',', ",,");
    if faults.is_empty() {
        return format!("file={path},format=raw");
    }
    let rules = faults.iter().enumerate().map(|(number, fault)| {
        let rule = format!("file.inject-error.{number}");
        let what = match fault {
            Fault::Writes => "iotype=write".to_owned(),
            Fault::Reads { sector } => format!("iotype=read,{rule}.sector={sector}"),
        };
        format!(",{rule}.event=none,{rule}.errno=5,{rule}.once=off,{rule}.{what}")
    });
    let rules: String = rules.collect();
    format!("driver=raw,file.driver=blkdebug,file.image.driver=file,file.image.filename={path}{rules}")
}

/// QEMU with the least of devices.
fn qemu(accelerator: &str, kernel: &Path) -> Result<Command> {
    let mut command = tools::command("qemu-system-x86_64")?;
    command.args(["-accel", accelerator, "-M", "pc,acpi=off,hpet=off", "-smp", "1"]);
    command.args(["-display", "none", "-nodefaults", "-no-user-config", "-no-reboot", "-serial", "stdio"]);
    command.arg("-kernel").arg(kernel);
    Ok(command)
}

/// Starts a command; its lines come through the channel, which closes when it has ended.
fn start(mut command: Command) -> Result<(Owned, Receiver<String>)> {
    let (reader, writer) = std::io::pipe().context("pipe")?;
    command.stdin(Stdio::null()).stdout(writer.try_clone().context("dup")?).stderr(writer);
    let child = command.spawn().with_context(|| format!("execve {command:?}"))?;
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        for line in BufReader::new(reader).split(b'\n').map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line).trim_end_matches('\r').to_owned();
            if sender.send(line).is_err() {
                break;
            }
        }
    });
    Ok((Owned(child), receiver))
}

/// `kvm` where it works, which `/dev/kvm` alone does not say: a kernel without an initramfs has to come to its panic.
fn accelerator(kernel: &Kernel) -> &'static str {
    static CHOSEN: OnceLock<&str> = OnceLock::new();
    CHOSEN.get_or_init(|| if kvm_works(&kernel.image).unwrap_or(false) { "kvm" } else { "tcg,thread=multi" })
}

fn kvm_works(kernel: &Path) -> Result<bool> {
    if fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_err() {
        return Ok(false);
    }
    let mut command = qemu("kvm", kernel)?;
    command.args(["-m", "256", "-append", "console=ttyS0 quiet panic=-1"]);
    let (_process, lines) = start(command)?;
    let deadline = Instant::now() + Duration::from_secs(2);
    while let Ok(line) = lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
        if line.contains("Kernel panic") {
            return Ok(true);
        }
    }
    Ok(false)
}
