//! What is on a root disk: a system, our package in it, and the files of a test.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};

use super::{Setup, System};
use crate::binaries::Binaries;
use crate::debian::Suite;
use crate::disk::{Disk, Fs};
use crate::package;
use crate::tools::{kept, run, which};

/// Follows the script of a boot under systemd. A file to systemd: to a terminal it would talk first.
const GUEST_UNIT: &str = "\
[Unit]
After=multi-user.target systemd-user-sessions.service
[Service]
ExecStart=/usr/bin/qemu-guest
StandardOutput=file:/dev/ttyS0
[Install]
WantedBy=graphical.target
";
/// What a release starts by itself and no test is about.
const MASKED: [&str; 6] = [
    "serial-getty@ttyS0.service",
    "getty@tty1.service",
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "dpkg-db-backup.timer",
    "systemd-networkd.service",
];
/// What the README enables.
const UNITS: [&str; 3] =
    ["ephemeral-overlay.service", "ephemeral-overlay-late.service", "ephemeral-overlay-syncd.service"];
/// The same in every machine, so that a test knows where its journal is.
pub(crate) const MACHINE_ID: &str = "0123456789abcdef0123456789abcdef";

/// Makes the root disk of a machine.
pub(super) fn create(image: &Path, on: Setup, files: &[(&str, &str)]) -> Result<()> {
    match on.system {
        System::Minimal => {
            let tree = tempfile::Builder::new().prefix("eo-root-").tempdir().context("mkdtemp")?;
            minimal(tree.path())?;
            put(tree.path(), files)?;
            Disk::create(image, on.fs, on.measures().1, tree.path())
        }
        System::Debian(suite) => {
            let base = debian(suite, on)?;
            run("cp", &["--sparse=always".as_ref(), base.as_os_str(), image.as_os_str()])?;
            Disk::edit(image, on.fs, |root| put(root, files))
        }
    }
}

/// Writes the files of a test. One that begins with `#!` can be executed; a unit among them is enabled; an empty one
/// takes away what is there otherwise.
fn put(root: &Path, files: &[(&str, &str)]) -> Result<()> {
    for (path, contents) in files {
        let below = root.join(path.trim_start_matches('/'));
        fs::create_dir_all(below.parent().context("a parent")?)?;
        fs::write(&below, contents).with_context(|| format!("write {path}"))?;
        if contents.starts_with("#!") {
            fs::set_permissions(&below, fs::Permissions::from_mode(0o755))?;
        }
        if contents.contains("[Install]") {
            let name = below.file_name().context("a name")?;
            run("chroot", &[root.as_os_str(), "systemctl".as_ref(), "enable".as_ref(), name])?;
        }
    }
    Ok(())
}

/// Our programs, busybox, and the directories that every system has.
fn minimal(root: &Path) -> Result<()> {
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
    package::install(root)?;
    // A test that wants a last stage brings it; nobody builds an initramfs in here.
    for path in ["usr/lib/systemd", "usr/lib/initcpio", "usr/lib/ephemeral-overlay/initramfs"] {
        fs::remove_dir_all(root.join(path)).with_context(|| format!("rm -r {path}"))?;
    }
    let guest = Binaries::get()?.path("qemu-guest");
    let busybox = which("busybox").context("busybox is not installed")?;
    let early = Binaries::get()?.path("early");
    // not-init is another init, and so another file.
    for (source, name) in [(&guest, "init"), (&guest, "not-init"), (&busybox, "busybox"), (&early, "early")] {
        fs::copy(source, root.join("usr/bin").join(name)).with_context(|| format!("copy {}", source.display()))?;
    }
    symlink("busybox", root.join("usr/bin/sh")).context("symlink sh")
}

/// An image with a release of Debian and all of our package, made once in each run.
fn debian(suite: Suite, on: Setup) -> Result<PathBuf> {
    static MADE: Mutex<Option<HashMap<(Suite, Fs), PathBuf>>> = Mutex::new(None);
    let mut made = MADE.lock().unwrap_or_else(PoisonError::into_inner);
    let made = made.get_or_insert_default();
    if let Some(path) = made.get(&(suite, on.fs)) {
        return Ok(path.clone());
    }
    let tree = suite.root()?;
    let path = kept(&format!("{}-{}.img", suite.name(), on.fs.name()));
    Disk::create(&path, on.fs, on.measures().1, &tree)?;
    Disk::edit(&path, on.fs, |root| {
        package::install(root)?;
        fs::copy(Binaries::get()?.path("qemu-guest"), root.join("usr/bin/qemu-guest")).context("copy qemu-guest")?;
        fs::write(root.join("etc/machine-id"), format!("{MACHINE_ID}\n")).context("write machine-id")?;
        for directory in ["persist", "var/log/journal"] {
            fs::create_dir_all(root.join(directory)).with_context(|| format!("mkdir {directory}"))?;
        }
        let systemctl = |words: &[&str]| {
            let words = ["systemctl"].iter().chain(words).map(AsRef::as_ref);
            run("chroot", &[root.as_os_str()].into_iter().chain(words).collect::<Vec<_>>()).map(drop)
        };
        systemctl(&[&["mask"], MASKED.as_slice()].concat())?;
        systemctl(&[&["enable"], UNITS.as_slice()].concat())?;
        put(root, &[("/etc/systemd/system/qemu-guest.service", GUEST_UNIT)])
    })?;
    made.insert((suite, on.fs), path.clone());
    Ok(path)
}
