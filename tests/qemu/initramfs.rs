//! An initramfs as mkinitcpio makes it, from the install script that we ship: what that script does not add is not
//! in it. The rest is what mkinitcpio's own hooks bring: busybox with a short `/init`, or systemd.

mod real;
mod systemd;

use std::collections::HashMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, bail};

use crate::cpio::Archive;
use crate::debian::Suite;
use crate::disk::Fs;
use crate::kernel::{Kernel, decompressed, module_name};
use crate::package;
use crate::tools::{self, kept, repository, run};

pub(crate) const TESTS: &[(&str, fn())] =
    &[("a_systemd_initramfs_has_the_unit_whatever_the_order_of_hooks", unit_in_any_order)];

/// What the root disk takes, beside its file system. Modules that a kernel has built in are left out.
const DISK: [&str; 3] = ["virtio_pci", "virtio_blk", "dm_mod"];
/// Where our programs are in it.
const PROGRAMS: &str = "/usr/lib/ephemeral-overlay/initramfs";

/// Which initramfs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Initramfs {
    /// What runs in it.
    pub flavour: Flavour,
    /// With our hook.
    pub hook: bool,
    /// With the module `overlay`.
    pub overlay: bool,
    /// With the module of another file system than the root's, too.
    pub also: Option<Fs>,
    /// One of our programs, and a shell script in its place; the program has `.real` at the end of its name then.
    pub replaced: Option<(&'static str, &'static str)>,
}

/// What runs in an initramfs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Flavour {
    /// Busybox and `run_latehook`.
    Busybox,
    /// The systemd of a release, and our unit.
    Systemd(Suite),
}

impl Default for Initramfs {
    fn default() -> Self {
        Self { flavour: Flavour::Busybox, hook: true, overlay: true, also: None, replaced: None }
    }
}

impl Initramfs {
    /// Where the archive lies, assembled once in each run.
    pub(crate) fn get(self, kernel: &Kernel, fs: Fs) -> Result<PathBuf> {
        type Built = HashMap<(&'static str, Fs, Initramfs), PathBuf>;
        static BUILT: Mutex<Option<Built>> = Mutex::new(None);
        let mut built = BUILT.lock().unwrap_or_else(PoisonError::into_inner);
        let built = built.get_or_insert_default();
        if let Some(path) = built.get(&(kernel.series, fs, self)) {
            return Ok(path.clone());
        }
        let is_whole = self == Self { flavour: self.flavour, ..Self::default() };
        let archive = if is_whole && real::is_asked_for() {
            real::build(kernel, fs, self.flavour).context("building the initramfs with mkinitcpio")?
        } else {
            self.build(kernel, fs).context("assembling the initramfs")?
        };
        let path = kept("initramfs").join(format!("{}-{}-{}.cpio", kernel.series, fs.name(), built.len()));
        fs::create_dir_all(kept("initramfs")).context("mkdir")?;
        // By a rename: another run may be booting from the old one.
        let mut file = tempfile::NamedTempFile::new_in(kept("initramfs")).context("mkstemp")?;
        file.write_all(&archive).context("write an initramfs")?;
        file.persist(&path).with_context(|| format!("rename to {}", path.display()))?;
        built.insert((kernel.series, fs, self), path.clone());
        Ok(path)
    }

    fn build(self, kernel: &Kernel, fs: Fs) -> Result<Vec<u8>> {
        let mut archive = Archive::default();
        let mut modules: Vec<String> =
            DISK.into_iter().chain([fs].into_iter().chain(self.also).map(Fs::name)).map(str::to_owned).collect();
        let stage = tempfile::Builder::new().prefix("eo-stage-").tempdir().context("mkdtemp")?;
        package::install(stage.path())?;
        let flavour = match self.flavour {
            Flavour::Busybox => "busybox",
            Flavour::Systemd(_) => "systemd",
        };
        let requests = if self.hook { requests(stage.path(), flavour)? } else { Vec::new() };
        match self.flavour {
            Flavour::Busybox => busybox(&mut archive)?,
            Flavour::Systemd(suite) => systemd::skeleton(&mut archive, &suite.root()?, &modules)?,
        }
        for request in requests {
            match request {
                Request::File { source, to, mode } => {
                    let contents = fs::read(&source).with_context(|| format!("read {}", source.display()))?;
                    match self.replaced {
                        Some((program, script)) if to == Path::new(PROGRAMS).join(program) => {
                            archive.file(&to, mode, script.as_bytes());
                            archive.file(&to.with_extension("real"), mode, &contents);
                        }
                        _ => archive.file(&to, mode, &contents),
                    }
                }
                Request::Link { path, target } => archive.symlink(&path, &target),
                Request::Directory { path, mode } => archive.directory(&path, mode),
                Request::Module(name) => modules.push(name),
            }
        }
        if !self.overlay {
            modules.retain(|name| name != "overlay");
        }
        let names: Vec<&str> = modules.iter().map(String::as_str).collect();
        let files = kernel.modules(&names)?;
        match self.flavour {
            Flavour::Busybox => {
                archive.directory(Path::new("/modules"), 0o755);
                for (number, path) in files.iter().enumerate() {
                    let name = module_name(&path.to_string_lossy());
                    archive.file(
                        &PathBuf::from(format!("/modules/{number:02}-{name}.ko")),
                        0o644,
                        &decompressed(path)?,
                    );
                }
            }
            Flavour::Systemd(_) => systemd::modules(&mut archive, kernel, &files)?,
        }
        Ok(archive.finish())
    }
}

/// One thing that the install script asks for.
#[derive(Debug)]
enum Request {
    File { source: PathBuf, to: PathBuf, mode: u32 },
    Link { path: PathBuf, target: PathBuf },
    Directory { path: PathBuf, mode: u32 },
    Module(String),
}

/// Runs the install script on what lies in `stage`.
fn requests(stage: &Path, flavour: &str) -> Result<Vec<Request>> {
    let driver = repository().join("tests/qemu/mkinitcpio.bash");
    let script = stage.join("usr/lib/initcpio/install/ephemeral-overlay");
    let record = run("bash", &[driver.as_path(), &script, stage, Path::new(flavour)])?;
    String::from_utf8(record)?.lines().map(parse).collect()
}

fn parse(line: &str) -> Result<Request> {
    let octal = |mode: &str| u32::from_str_radix(mode, 8).with_context(|| format!("the mode in {line:?}"));
    let fields: Vec<&str> = line.split('\t').collect();
    Ok(match fields[..] {
        ["file", source, to, mode] => Request::File { source: source.into(), to: to.into(), mode: octal(mode)? },
        ["link", path, target] => Request::Link { path: path.into(), target: target.into() },
        ["directory", path, mode] => Request::Directory { path: path.into(), mode: octal(mode)? },
        ["module", name] => Request::Module(name.to_owned()),
        _ => bail!("the install script's record has the line {line:?}"),
    })
}

/// The directories that every initramfs has.
fn directories(archive: &mut Archive) {
    for directory in ["/dev", "/proc", "/sys", "/run", "/new_root", "/sysroot", "/tmp", "/hooks", "/usr/local/bin"] {
        archive.directory(Path::new(directory), 0o755);
    }
    archive.device(Path::new("/dev/console"), 0o600, (5, 1));
}

/// What mkinitcpio's `base` brings: the directories, busybox with its applets, and `/init`.
fn busybox(archive: &mut Archive) -> Result<()> {
    archive.directory(Path::new("/usr/bin"), 0o755);
    archive.directory(Path::new("/usr/lib"), 0o755);
    let merged = [("/bin", "usr/bin"), ("/sbin", "usr/bin"), ("/usr/sbin", "bin"), ("/lib", "usr/lib")];
    for (path, target) in merged.into_iter().chain([("/lib64", "usr/lib"), ("/usr/lib64", "lib")]) {
        archive.symlink(Path::new(path), Path::new(target));
    }
    directories(archive);
    let busybox = tools::which("busybox").context("busybox is not installed")?;
    let contents = fs::read(&busybox).with_context(|| format!("read {}", busybox.display()))?;
    archive.file(Path::new("/usr/bin/busybox"), 0o755, &contents);
    for applet in String::from_utf8(run("busybox", &["--list"])?)?.lines().filter(|name| *name != "busybox") {
        archive.symlink(&Path::new("/usr/bin").join(applet), Path::new("busybox"));
    }
    archive.file(Path::new("/init"), 0o755, include_bytes!("init"));
    archive.file(Path::new("/shutdown"), 0o755, include_bytes!("shutdown"));
    let dmsetup = tools::which("dmsetup").context("dmsetup is not installed")?;
    let libraries = String::from_utf8(run("ldd", &[&dmsetup])?)?;
    let libraries = libraries.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from);
    for (source, to) in libraries.map(|path| (path.clone(), path)).chain([(dmsetup, "/usr/bin/dmsetup".into())]) {
        let contents = fs::read(&source).with_context(|| format!("read {}", source.display()))?;
        archive.file(&to, 0o755, &contents);
    }
    Ok(())
}

/// A busybox script in a systemd initramfs would be there in vain, and nobody would say so.
fn unit_in_any_order() {
    let stage = tempfile::tempdir().unwrap();
    let install = |from: &str, to: &str| {
        let to = stage.path().join(to);
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::copy(repository().join(from), to).unwrap();
    };
    install("mkinitcpio/install/ephemeral-overlay", "usr/lib/initcpio/install/ephemeral-overlay");
    install("mkinitcpio/hooks/ephemeral-overlay", "usr/lib/initcpio/hooks/ephemeral-overlay");
    install("systemd/ephemeral-overlay-early.service", "usr/lib/systemd/system/ephemeral-overlay-early.service");
    let sandbox = "usr/lib/systemd/system/ephemeral-overlay-.service.d/sandbox.conf";
    install("systemd/sandbox.conf", sandbox);
    for program in ["early", "syncd"] {
        // What it is does not matter here.
        install("packaging/counterpart", &format!("usr/lib/ephemeral-overlay/initramfs/{program}"));
    }
    for (flavour, has_unit) in [("systemd", true), ("systemd-behind", true), ("busybox", false)] {
        let requests = requests(stage.path(), flavour).unwrap();
        let has = |wanted: &str| {
            requests.iter().any(|request| match request {
                Request::File { to, .. } => to == Path::new(wanted),
                Request::Link { path, .. } => path == Path::new(wanted),
                _ => false,
            })
        };
        assert_eq!(has("/usr/lib/systemd/system/ephemeral-overlay-early.service"), has_unit, "{flavour}");
        assert_eq!(has(&format!("/{sandbox}")), has_unit, "{flavour}");
        let wanted = "/usr/lib/systemd/system/initrd.target.wants/ephemeral-overlay-early.service";
        assert_eq!(has(wanted), has_unit, "{flavour}");
        assert_eq!(has("/hooks/ephemeral-overlay"), !has_unit, "{flavour}");
    }
}
