//! An initramfs as mkinitcpio makes it, from the install script that we ship: what that script does not add is not
//! in it. The rest is busybox, the modules and a short `/init`.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::binaries::Binaries;
use crate::cpio::Archive;
use crate::kernel::{Kernel, decompressed, module_name};
use crate::tools::{self, repository, run};

/// What the root disk takes. Modules that a kernel has built in are left out.
const DISK: [&str; 2] = ["virtio_pci", "virtio_blk"];
/// The name of the hook, of its install script and of its run-time script.
const HOOK: &str = "ephemeral-overlay";

/// Which initramfs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Flavour {
    /// With everything.
    Whole,
    /// The same without the module `overlay`.
    WithoutOverlay,
}

/// Puts our package into `stage`, as it lies installed.
fn install(stage: &Path) -> Result<()> {
    let binaries = Binaries::get()?;
    let packaged = repository().join("mkinitcpio");
    let installed = [
        (binaries.path("early"), "usr/lib/ephemeral-overlay/initramfs/early"),
        (binaries.path("syncd"), "usr/lib/ephemeral-overlay/initramfs/syncd"),
        (packaged.join("install").join(HOOK), "usr/lib/initcpio/install/ephemeral-overlay"),
        (packaged.join("hooks").join(HOOK), "usr/lib/initcpio/hooks/ephemeral-overlay"),
    ];
    for (source, path) in installed {
        let to = stage.join(path);
        fs::create_dir_all(to.parent().context("a parent")?)?;
        fs::copy(&source, &to).with_context(|| format!("copy {}", source.display()))?;
    }
    Ok(())
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
fn requests(stage: &Path) -> Result<Vec<Request>> {
    let driver = repository().join("tests/qemu/mkinitcpio.bash");
    let script = stage.join("usr/lib/initcpio/install").join(HOOK);
    let record = run("bash", &[driver.as_path(), &script, stage, Path::new("busybox")])?;
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

/// The initramfs for a kernel, as bytes.
pub(crate) fn build(kernel: &Kernel, flavour: Flavour) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    skeleton(&mut archive)?;
    let mut modules: Vec<String> = DISK.map(str::to_owned).to_vec();
    let stage = tempfile::Builder::new().prefix("eo-stage-").tempdir().context("mkdtemp")?;
    install(stage.path())?;
    for request in requests(stage.path())? {
        match request {
            Request::File { source, to, mode } => {
                let contents = fs::read(&source).with_context(|| format!("read {}", source.display()))?;
                archive.file(&to, mode, &contents);
            }
            Request::Link { path, target } => archive.symlink(&path, &target),
            Request::Directory { path, mode } => archive.directory(&path, mode),
            Request::Module(name) => modules.push(name),
        }
    }
    if flavour == Flavour::WithoutOverlay {
        modules.retain(|name| name != "overlay");
    }
    let names: Vec<&str> = modules.iter().map(String::as_str).collect();
    archive.directory(Path::new("/modules"), 0o755);
    for (number, path) in kernel.modules(&names)?.iter().enumerate() {
        let name = module_name(&path.to_string_lossy());
        archive.file(&PathBuf::from(format!("/modules/{number:02}-{name}.ko")), 0o644, &decompressed(path)?);
    }
    Ok(archive.finish())
}

/// What mkinitcpio's `base` brings: the directories, busybox with its applets, and `/init`.
fn skeleton(archive: &mut Archive) -> Result<()> {
    archive.directory(Path::new("/usr/bin"), 0o755);
    archive.directory(Path::new("/usr/lib"), 0o755);
    let merged = [("/bin", "usr/bin"), ("/sbin", "usr/bin"), ("/usr/sbin", "bin"), ("/lib", "usr/lib")];
    for (path, target) in merged.into_iter().chain([("/lib64", "usr/lib"), ("/usr/lib64", "lib")]) {
        archive.symlink(Path::new(path), Path::new(target));
    }
    for directory in ["/dev", "/proc", "/sys", "/run", "/new_root", "/tmp", "/hooks", "/usr/local/bin"] {
        archive.directory(Path::new(directory), 0o755);
    }
    archive.device(Path::new("/dev/console"), 0o600, (5, 1));
    let busybox = tools::which("busybox").context("busybox is not installed")?;
    let contents = fs::read(&busybox).with_context(|| format!("read {}", busybox.display()))?;
    archive.file(Path::new("/usr/bin/busybox"), 0o755, &contents);
    for applet in String::from_utf8(run("busybox", &["--list"])?)?.lines().filter(|name| *name != "busybox") {
        archive.symlink(&Path::new("/usr/bin").join(applet), Path::new("busybox"));
    }
    archive.file(Path::new("/init"), 0o755, include_bytes!("init"));
    Ok(())
}
