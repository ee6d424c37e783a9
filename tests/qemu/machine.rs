//! A machine with a disk of its own: built from a few words, booted as often as a test wants, and its disk looked at
//! from outside, without booting.

use std::collections::HashMap;
use std::fs;
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};
use tempfile::TempDir;

use crate::binaries::Binaries;
use crate::console::Console;
use crate::disk::Disk;
use crate::initramfs::{self, Flavour};
use crate::kernel::Kernel;
use crate::tools::{kept, which};
use crate::vm::Vm;

/// A machine.
#[derive(Debug)]
pub(crate) struct Machine {
    kernel: &'static Kernel,
    name: String,
    directory: TempDir,
    boots: usize,
}

/// What tells `early` that a root is one of ours.
pub(crate) const COUNTERPART: &str = ephemeral_overlay::layout::COUNTERPART;

/// How a machine is booted. The default is an ordinary boot with a writable root.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Boot<'a> {
    /// Words for the kernel's command line.
    pub cmdline: &'a str,
    /// The initramfs.
    pub flavour: Flavour,
    /// The processor has a random number generator.
    pub entropy: bool,
}

impl Default for Boot<'_> {
    fn default() -> Self {
        Self { cmdline: "rw", flavour: Flavour::Whole, entropy: true }
    }
}

impl Machine {
    /// A machine with a small system on its disk, and `files` (path, contents) in it.
    #[track_caller]
    pub(crate) fn new(kernel: &'static Kernel, name: &str, files: &[(&str, &str)]) -> Self {
        let directory = tempfile::Builder::new().prefix("eo-qemu-").tempdir().expect("mkdtemp");
        let root = directory.path().join("root");
        install(&root, files).unwrap_or_else(|error| panic!("the root: {error:#}"));
        Disk::create(&directory.path().join("disk"), &root).unwrap_or_else(|error| panic!("the disk: {error:#}"));
        fs::remove_dir_all(root).expect("the root is not needed any more");
        Self { kernel, name: format!("{}-{name}", kernel.series), directory, boots: 0 }
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

    /// The disk, from outside.
    pub(crate) fn disk(&self) -> Disk {
        Disk::of(&self.image()).unwrap_or_else(|error| panic!("{error:#}"))
    }

    /// The disk's image.
    pub(crate) fn image(&self) -> PathBuf {
        self.directory.path().join("disk")
    }

    fn run(&mut self, boot: Boot<'_>, script: &str, kill_at: Option<&str>) -> Result<Console> {
        self.boots += 1;
        let initramfs = initramfs_of(self.kernel, boot.flavour)?;
        let path = self.directory.path().join("script");
        let mut bytes = script.as_bytes().to_vec();
        // At least one NUL, and whole sectors.
        bytes.resize((bytes.len() + 1).next_multiple_of(512), 0);
        fs::write(&path, bytes).context("write the script")?;
        let logs = kept("console");
        fs::create_dir_all(&logs).with_context(|| format!("mkdir {}", logs.display()))?;
        let log = logs.join(format!("{}-{}.log", self.name, self.boots));
        let vm = Vm {
            kernel: self.kernel,
            initramfs: &initramfs,
            disk: &self.image(),
            script: &path,
            cmdline: boot.cmdline,
            entropy: boot.entropy,
            kill_at,
        };
        vm.run(&log).with_context(|| format!("boot {}", self.boots))
    }
}

/// The initramfs for a kernel, assembled once in each run.
fn initramfs_of(kernel: &Kernel, flavour: Flavour) -> Result<PathBuf> {
    static BUILT: Mutex<Option<HashMap<(&'static str, Flavour), PathBuf>>> = Mutex::new(None);
    let mut built = BUILT.lock().unwrap_or_else(PoisonError::into_inner);
    let built = built.get_or_insert_default();
    if let Some(path) = built.get(&(kernel.series, flavour)) {
        return Ok(path.clone());
    }
    let archive = initramfs::build(kernel, flavour).context("assembling the initramfs")?;
    let path = kept(&format!("initramfs-{}-{flavour:?}.cpio", kernel.series));
    // By a rename: another run may be booting from the old one.
    let mut file = tempfile::NamedTempFile::new_in(kept("")).context("mkstemp")?;
    file.write_all(&archive).context("write an initramfs")?;
    file.persist(&path).with_context(|| format!("rename to {}", path.display()))?;
    built.insert((kernel.series, flavour), path.clone());
    Ok(path)
}

/// Puts a system together: our programs, busybox, and the directories that every system has.
fn install(root: &Path, files: &[(&str, &str)]) -> Result<()> {
    for directory in
        ["dev", "etc", "persist", "proc", "run", "sys", "tmp", "usr/bin", "var/cache", "var/log", "var/tmp"]
    {
        fs::create_dir_all(root.join(directory)).with_context(|| format!("mkdir {directory}"))?;
    }
    for directory in ["tmp", "var/tmp"] {
        fs::set_permissions(root.join(directory), fs::Permissions::from_mode(0o1777))?;
    }
    for link in ["bin", "sbin"] {
        symlink("usr/bin", root.join(link)).with_context(|| format!("symlink {link}"))?;
    }
    let binaries = Binaries::get()?;
    let busybox = which("busybox").context("busybox is not installed")?;
    for (source, name) in
        [(binaries.path("qemu-guest"), "init"), (binaries.path("syncd"), "syncd"), (busybox, "busybox")]
    {
        fs::copy(&source, root.join("usr/bin").join(name)).with_context(|| format!("copy {}", source.display()))?;
    }
    symlink("busybox", root.join("usr/bin/sh")).context("symlink sh")?;
    // Another init, and so another file.
    fs::copy(binaries.path("qemu-guest"), root.join("usr/bin/not-init")).context("copy not-init")?;
    // What tells `early` that this root has a syncd that reads its checkpoints.
    let format = format!("format = {}\n", ephemeral_overlay::CHECKPOINT_FORMAT);
    let counterpart = (COUNTERPART, format.as_str());
    // An empty one takes what is there by default away.
    for (path, contents) in [counterpart].iter().chain(files) {
        let path = root.join(path.trim_start_matches('/'));
        fs::create_dir_all(path.parent().context("a parent")?)?;
        fs::write(&path, contents).with_context(|| format!("write {}", path.display()))?;
        if contents.starts_with("#!") {
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        }
    }
    Ok(())
}
