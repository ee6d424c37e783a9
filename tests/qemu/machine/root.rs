//! What is on a root disk: a system, our package in it, and the files of a test.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, bail};

use super::{Setup, System};
use crate::binaries::Binaries;
use crate::disk::Disk;
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
/// Services of OpenRC: some that it has itself, and the one that follows the script of a boot.
const OPENRC_SCRIPTS: [(&str, &str); 5] = [
    ("/etc/init.d/localmount", include_str!("../openrc/localmount")),
    ("/etc/init.d/bootmisc", include_str!("../openrc/bootmisc")),
    ("/etc/init.d/killprocs", include_str!("../openrc/killprocs")),
    ("/etc/init.d/mount-ro", include_str!("../openrc/mount-ro")),
    ("/etc/init.d/qemu-guest", include_str!("../openrc/qemu-guest")),
];
/// Which of them are in which runlevel; of ours, what the README says.
const RUNLEVELS: [(&str, &[&str]); 3] = [
    ("boot", &["localmount", "bootmisc", "ephemeral-overlay"]),
    ("default", &["ephemeral-overlay-syncd", "qemu-guest"]),
    ("shutdown", &["killprocs", "savecache", "ephemeral-overlay-shutdown", "mount-ro"]),
];
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
        System::Debian(_) | System::OpenRc(_) => {
            let base = whole(on)?;
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
            chroot(root, &["systemctl", "enable", &name.to_string_lossy()])?;
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
fn whole(on: Setup) -> Result<PathBuf> {
    static MADE: Mutex<Option<HashMap<String, PathBuf>>> = Mutex::new(None);
    let mut made = MADE.lock().unwrap_or_else(PoisonError::into_inner);
    let made = made.get_or_insert_default();
    let (tree, fill): (_, fn(&Path) -> Result<()>) = match on.system {
        System::Debian(suite) => (suite.root()?, systemd),
        System::OpenRc(suite) => (suite.openrc_root()?, openrc),
        System::Minimal => bail!("a small system is made anew for each machine"),
    };
    let name = format!("{}-{}", tree.file_name().context("a name")?.to_string_lossy(), on.fs.name());
    if let Some(path) = made.get(&name) {
        return Ok(path.clone());
    }
    let path = kept(&format!("{name}.img"));
    Disk::create(&path, on.fs, on.measures().1, &tree)?;
    Disk::edit(&path, on.fs, |root| {
        package::install(root)?;
        fs::copy(Binaries::get()?.path("qemu-guest"), root.join("usr/bin/qemu-guest")).context("copy qemu-guest")?;
        fs::create_dir_all(root.join("persist")).context("mkdir persist")?;
        fill(root)
    })?;
    made.insert(name, path.clone());
    Ok(path)
}

fn systemd(root: &Path) -> Result<()> {
    fs::write(root.join("etc/machine-id"), format!("{MACHINE_ID}\n")).context("write machine-id")?;
    fs::create_dir_all(root.join("var/log/journal")).context("mkdir journal")?;
    chroot(root, &[&["systemctl", "mask"], MASKED.as_slice()].concat())?;
    chroot(root, &[&["systemctl", "enable"], UNITS.as_slice()].concat())?;
    put(root, &[("/etc/systemd/system/qemu-guest.service", GUEST_UNIT)])
}

/// Debian's OpenRC lacks the scripts of the early boot and of the end of a shutdown; those that matter here do what
/// OpenRC's own do.
fn openrc(root: &Path) -> Result<()> {
    package::install_openrc(root)?;
    put(root, &OPENRC_SCRIPTS)?;
    for (level, services) in RUNLEVELS {
        for service in services {
            chroot(root, &["rc-update", "add", service, level])?;
        }
    }
    let busybox = which("busybox").context("busybox is not installed")?;
    fs::copy(&busybox, root.join("usr/bin/busybox")).context("copy busybox")?;
    chroot(root, &["useradd", "--create-home", "--uid", "1000", "--shell", "/bin/sh", "anna"])?;
    symlink("openrc-init", root.join("usr/sbin/init")).context("symlink init")
}

fn chroot(root: &Path, words: &[&str]) -> Result<()> {
    let words = words.iter().map(AsRef::as_ref);
    run("chroot", &[root.as_os_str()].into_iter().chain(words).collect::<Vec<_>>()).map(drop)
}
