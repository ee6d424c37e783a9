//! A machine with a disk of its own: built from a few words, booted as often as a test wants, and its disk looked at
//! from outside, without booting.

mod root;

pub(crate) use root::MACHINE_ID;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use tempfile::TempDir;

use crate::console::Console;
use crate::debian::Suite;
use crate::disk::{Disk, Fs};
use crate::initramfs::Initramfs;
use crate::kernel::Kernel;
use crate::tools::kept;
use crate::vm::{Fault, Vm};

/// What tells `early` that a root is one of ours.
pub(crate) const COUNTERPART: &str = ephemeral_overlay::layout::COUNTERPART;

/// What a test runs on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Setup {
    /// The kernel.
    pub kernel: &'static Kernel,
    /// The file system of the root disk.
    pub fs: Fs,
    /// What is on it.
    pub system: System,
}

/// A system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum System {
    /// Busybox, our programs, and an init of our own.
    Minimal,
    /// A release of Debian, with systemd.
    Debian(Suite),
    /// The same release with OpenRC.
    OpenRc(Suite),
}

impl Setup {
    /// The memory of a machine in MiB, the least size of its disk, and how long a boot with a script may take.
    fn measures(&self) -> (u32, u64, Duration) {
        match self.system {
            System::Minimal => (256, self.fs.least(), Duration::from_secs(240)),
            System::Debian(_) => (640, 1024, Duration::from_secs(400)),
            System::OpenRc(_) => (384, 768, Duration::from_secs(400)),
        }
    }

    fn name(&self) -> String {
        let system = match self.system {
            System::Minimal => "minimal".to_owned(),
            System::Debian(suite) => suite.name().to_owned(),
            System::OpenRc(suite) => format!("{}-openrc", suite.name()),
        };
        format!("{}-{}-{system}", self.kernel.series, self.fs.name())
    }
}

/// A machine.
#[derive(Debug)]
pub(crate) struct Machine {
    on: Setup,
    name: String,
    /// Where the disks lie.
    _directory: TempDir,
    /// The root disk, the disk with the script, and any others.
    disks: Vec<PathBuf>,
    boots: usize,
}

/// How a machine is booted. The default is an ordinary boot with a writable root.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Boot<'a> {
    /// Words for the kernel's command line.
    pub cmdline: &'a str,
    /// The initramfs.
    pub initramfs: Initramfs,
    /// The processor has a random number generator.
    pub entropy: bool,
    /// What goes wrong with the root disk.
    pub faults: &'a [Fault],
    /// It takes that many times as long as others may.
    pub patience: u32,
}

impl Default for Boot<'_> {
    fn default() -> Self {
        Self { cmdline: "rw", initramfs: Initramfs::default(), entropy: true, faults: &[], patience: 1 }
    }
}

impl Machine {
    /// A machine with a system on its disk, and `files` (path, contents) in it.
    #[track_caller]
    pub(crate) fn new(on: Setup, name: &str, files: &[(&str, &str)]) -> Self {
        let directory = tempfile::Builder::new().prefix("eo-qemu-").tempdir().expect("mkdtemp");
        let disks = ["disk", "script"].map(|name| directory.path().join(name)).to_vec();
        root::create(&disks[0], on, files).unwrap_or_else(|error| panic!("the root disk: {error:#}"));
        Self { on, name: format!("{}-{name}", on.name()), _directory: directory, disks, boots: 0 }
    }

    /// Gives it one more disk (the first is `/dev/vdc`) of `megabytes`, which `fill` puts something on.
    #[track_caller]
    pub(crate) fn add_disk(&mut self, fs: Fs, megabytes: u64, fill: impl FnOnce(&Path) -> Result<()>) {
        let path = self.disks[0].with_file_name(format!("disk{}", self.disks.len()));
        let empty = tempfile::Builder::new().prefix("eo-empty-").tempdir().expect("mkdtemp");
        let made = Disk::create(&path, fs, megabytes, empty.path()).and_then(|()| Disk::edit(&path, fs, fill));
        made.unwrap_or_else(|error| panic!("another disk: {error:#}"));
        self.disks.push(path);
    }

    /// Changes its disk while it is off.
    #[track_caller]
    pub(crate) fn edit(&self, change: impl FnOnce(&Path) -> Result<()>) {
        Disk::edit(&self.disks[0], self.on.fs, change).unwrap_or_else(|error| panic!("{error:#}"));
    }

    /// Boots, follows `script` to its end, and expects a good verdict.
    #[track_caller]
    pub(crate) fn boot(&mut self, boot: Boot<'_>, script: &str) -> Console {
        let console = self.try_boot(boot, script);
        if let Some(complaint) = console.complaint() {
            panic!("{complaint}{console}");
        }
        console
    }

    /// Boots, follows `script` to its end, and leaves the judgement to the caller.
    #[track_caller]
    pub(crate) fn try_boot(&mut self, boot: Boot<'_>, script: &str) -> Console {
        self.run(boot, script, None).unwrap_or_else(|error| panic!("{error:#}"))
    }

    /// Boots, follows `script`, and cuts the power as soon as it is through.
    #[track_caller]
    pub(crate) fn boot_and_cut(&mut self, boot: Boot<'_>, script: &str) -> Console {
        let script = format!("{script}\nhold cut\n");
        let console = self.run(boot, &script, Some("cut")).unwrap_or_else(|error| panic!("{error:#}"));
        console.expect(console.trouble().is_none(), "the kernel complained");
        console
    }

    /// The root disk, from outside.
    #[track_caller]
    pub(crate) fn disk(&self) -> Disk {
        Disk::of(&self.disks[0], self.on.fs).unwrap_or_else(|error| panic!("{error:#}"))
    }

    /// The disk that was added first, from outside.
    #[track_caller]
    pub(crate) fn other_disk(&self, fs: Fs) -> Disk {
        Disk::of(&self.disks[2], fs).unwrap_or_else(|error| panic!("{error:#}"))
    }

    /// The sectors of the root disk that have exactly these bytes.
    pub(crate) fn sectors_with(&self, bytes: &[u8]) -> Vec<u64> {
        let image = fs::read(&self.disks[0]).expect("the image");
        (0..).zip(image.chunks(512)).filter(|(_, sector)| *sector == bytes).map(|(number, _)| number).collect()
    }

    /// Another machine with the disks as they are now.
    #[track_caller]
    pub(crate) fn copy(&self, name: &str) -> Self {
        let directory = tempfile::Builder::new().prefix("eo-qemu-").tempdir().expect("mkdtemp");
        let copy = |path: &PathBuf| {
            let to = directory.path().join(path.file_name().expect("a name"));
            crate::tools::run("cp", &["--sparse=always".as_ref(), path.as_os_str(), to.as_os_str()]).map(|_| to)
        };
        let disks = self.disks.iter().map(copy).collect::<Result<_>>().unwrap_or_else(|error| panic!("{error:#}"));
        Self { on: self.on, name: format!("{}-{name}", self.on.name()), _directory: directory, disks, boots: 0 }
    }

    fn run(&mut self, boot: Boot<'_>, script: &str, kill_at: Option<&str>) -> Result<Console> {
        self.boots += 1;
        let initramfs = boot.initramfs.get(self.on.kernel, self.on.fs)?;
        let mut bytes = script.as_bytes().to_vec();
        // At least one NUL, and whole sectors.
        bytes.resize((bytes.len() + 1).next_multiple_of(512), 0);
        fs::write(&self.disks[1], bytes).context("write the script")?;
        let logs = kept("console");
        fs::create_dir_all(&logs).with_context(|| format!("mkdir {}", logs.display()))?;
        let log = logs.join(format!("{}-{}.log", self.name, self.boots));
        let (memory, _, limit) = self.on.measures();
        let vm = Vm {
            kernel: self.on.kernel,
            initramfs: &initramfs,
            disks: &self.disks,
            faults: boot.faults,
            cmdline: &format!("rootfstype={} {}", self.on.fs.name(), boot.cmdline),
            memory,
            entropy: boot.entropy,
            kill_at,
            limit: limit * boot.patience,
        };
        vm.run(&log).with_context(|| format!("boot {}", self.boots))
    }
}
