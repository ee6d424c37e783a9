//! What mkinitcpio's `systemd` brings, taken from the tree of a release: systemd, udev, the units of an initramfs, and
//! the libraries of all that.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::directories;
use crate::cpio::Archive;
use crate::kernel::{Kernel, decompressed};
use crate::tools::run;

/// The programs. Those that a release does not have yet, or has no more, are left out.
const PROGRAMS: [&str; 21] = [
    "usr/lib/systemd/systemd",
    "usr/lib/systemd/systemd-executor",
    "usr/lib/systemd/systemd-journald",
    "usr/lib/systemd/systemd-modules-load",
    "usr/lib/systemd/systemd-shutdown",
    "usr/lib/systemd/systemd-sysroot-fstab-check",
    "usr/lib/systemd/systemd-udevd",
    "usr/lib/systemd/system-generators/systemd-debug-generator",
    "usr/lib/systemd/system-generators/systemd-fstab-generator",
    "usr/bin/journalctl",
    "usr/bin/kmod",
    "usr/bin/mount",
    "usr/bin/sh",
    "usr/bin/sleep",
    "usr/bin/systemctl",
    "usr/bin/systemd-tmpfiles",
    "usr/bin/udevadm",
    "usr/bin/umount",
    "usr/lib/udev/ata_id",
    "usr/lib/udev/scsi_id",
    "usr/sbin/sulogin",
];
/// What these open only when they need it.
const OPENED_LATER: [&str; 12] =
    ["acl", "apparmor", "audit", "blkid", "crypt", "crypto", "kmod", "lzma", "mount", "pam", "seccomp", "selinux"];
/// The units of a boot to the pivot.
const UNITS: [&str; 44] = [
    "basic.target",
    "emergency.target",
    "final.target",
    "initrd-cleanup.service",
    "initrd-fs.target",
    "initrd-parse-etc.service",
    "initrd-root-device.target",
    "initrd-root-fs.target",
    "initrd-switch-root.service",
    "initrd-switch-root.target",
    "initrd-udevadm-cleanup-db.service",
    "initrd-usr-fs.target",
    "initrd.target",
    "kmod-static-nodes.service",
    "local-fs-pre.target",
    "local-fs.target",
    "modprobe@.service",
    "paths.target",
    "reboot.target",
    "rescue.target",
    "shutdown.target",
    "slices.target",
    "sockets.target",
    "swap.target",
    "sysinit.target",
    "systemd-fsck@.service",
    "systemd-journald-audit.socket",
    "systemd-journald-dev-log.socket",
    "systemd-journald.service",
    "systemd-journald.socket",
    "systemd-modules-load.service",
    "systemd-reboot.service",
    "systemd-tmpfiles-setup-dev-early.service",
    "systemd-tmpfiles-setup-dev.service",
    "systemd-tmpfiles-setup.service",
    "systemd-udev-trigger.service",
    "systemd-udevd-control.socket",
    "systemd-udevd-kernel.socket",
    "systemd-udevd.service",
    "timers.target",
    "umount.target",
    "final.target",
    "-.slice",
    "system.slice",
];
const RULES: [&str; 5] =
    ["50-udev-default.rules", "60-persistent-storage.rules", "64-btrfs.rules", "80-drivers.rules", "99-systemd.rules"];

/// Everything but the modules.
pub(super) fn skeleton(archive: &mut Archive, root: &Path, modules: &[String]) -> Result<()> {
    for (path, target) in [("/bin", "usr/bin"), ("/sbin", "usr/sbin"), ("/lib", "usr/lib"), ("/lib64", "usr/lib64")] {
        archive.directory(Path::new(target), 0o755);
        archive.symlink(Path::new(path), Path::new(target));
    }
    directories(archive);
    let mut copy = |path: &Path| -> Result<()> {
        let source = resolved(root, path)?;
        let mode = fs::metadata(&source).with_context(|| format!("stat {}", source.display()))?.permissions().mode();
        let contents = fs::read(&source).with_context(|| format!("read {}", source.display()))?;
        archive.file(path, mode & 0o7777, &contents);
        Ok(())
    };
    let is_there = |path: &&str| root.join(path).symlink_metadata().is_ok();
    let mut programs: Vec<&str> = PROGRAMS.into_iter().filter(is_there).collect();
    for path in &programs {
        copy(Path::new(path))?;
    }
    let libraries = root.join("usr/lib/x86_64-linux-gnu");
    let mut later = Vec::new();
    for entry in fs::read_dir(&libraries).context("readdir")?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let is_wanted = |wanted: &&str| name.starts_with(&format!("lib{wanted}.so."));
        if OPENED_LATER.iter().any(is_wanted) {
            later.push(format!("usr/lib/x86_64-linux-gnu/{name}"));
        }
    }
    programs.extend(later.iter().map(String::as_str));
    for path in needed(root, &programs)?.iter().map(PathBuf::as_path).chain(later.iter().map(Path::new)) {
        copy(path)?;
    }
    let units = Path::new("usr/lib/systemd/system");
    for unit in UNITS.map(|unit| units.join(unit)).iter().filter(|unit| root.join(unit).exists()) {
        copy(unit)?;
    }
    for path in RULES.map(|name| Path::new("usr/lib/udev/rules.d").join(name)) {
        copy(&path)?;
    }
    for path in ["usr/lib/tmpfiles.d/systemd.conf", "etc/passwd", "etc/group", "etc/nsswitch.conf"] {
        copy(Path::new(path))?;
    }
    // What these units are wanted by.
    for directory in fs::read_dir(root.join(units)).context("readdir")?.flatten() {
        let name = directory.file_name().to_string_lossy().into_owned();
        if Path::new(&name).extension().is_none_or(|extension| extension != "wants") {
            continue;
        }
        for link in fs::read_dir(directory.path()).context("readdir")?.flatten() {
            let unit = link.file_name().to_string_lossy().into_owned();
            if UNITS.contains(&unit.as_str()) {
                archive.symlink(&Path::new("/").join(units).join(&name).join(&unit), &Path::new("..").join(&unit));
            }
        }
    }
    for (path, target) in [
        ("/init", "usr/lib/systemd/systemd"),
        ("/usr/sbin/modprobe", "../bin/kmod"),
        ("/usr/lib/systemd/system/default.target", "initrd.target"),
        ("/usr/lib/systemd/system/ctrl-alt-del.target", "reboot.target"),
    ] {
        archive.symlink(Path::new(path), Path::new(target));
    }
    archive.file(Path::new("/etc/initrd-release"), 0o644, b"NAME=test\nID=test\n");
    archive.file(Path::new("/etc/modules-load.d/test.conf"), 0o644, (modules.join("\n") + "\n").as_bytes());
    Ok(())
}

/// The modules, as kmod finds them.
pub(super) fn modules(archive: &mut Archive, kernel: &Kernel, files: &[PathBuf]) -> Result<()> {
    let stage = tempfile::Builder::new().prefix("eo-modules-").tempdir().context("mkdtemp")?;
    let below = Path::new("lib/modules").join(kernel.version());
    let directory = stage.path().join(&below);
    let (from, mut paths) = (kernel.modules_directory(), BTreeSet::new());
    for file in files {
        let path = file.strip_prefix(from).context("a module outside of its directory")?.with_extension("");
        // modules.dep names what lies there: no compression, no second extension.
        let path = if path.extension().is_some() { path } else { path.with_extension("ko") };
        fs::create_dir_all(directory.join(path.parent().context("a parent")?)).context("mkdir")?;
        fs::write(directory.join(&path), decompressed(file)?).context("write a module")?;
        paths.insert(path);
    }
    for name in ["modules.order", "modules.builtin", "modules.builtin.modinfo"] {
        fs::copy(from.join(name), directory.join(name)).with_context(|| format!("copy {name}"))?;
        paths.insert(name.into());
    }
    run("depmod", &["-b".as_ref(), stage.path().as_os_str(), kernel.version().as_ref()])?;
    for name in
        ["modules.dep.bin", "modules.alias.bin", "modules.builtin.bin", "modules.softdep", "modules.symbols.bin"]
    {
        paths.insert(name.into());
    }
    for path in paths {
        let contents = fs::read(directory.join(&path)).with_context(|| format!("read {}", path.display()))?;
        archive.file(&Path::new("/usr").join(&below).join(path), 0o644, &contents);
    }
    Ok(())
}

/// Where a path of the tree at `root` leads; an absolute symlink stays in the tree.
fn resolved(root: &Path, path: &Path) -> Result<PathBuf> {
    let mut path = path.to_path_buf();
    while let Ok(target) = fs::read_link(root.join(&path)) {
        path = path.parent().context("a parent")?.join(target);
        path = path.strip_prefix("/").unwrap_or(&path).to_path_buf();
    }
    Ok(root.join(path))
}

/// The libraries that programs of the tree at `root` need.
fn needed(root: &Path, programs: &[&str]) -> Result<BTreeSet<PathBuf>> {
    let arguments = [root.as_os_str(), "ldd".as_ref()].into_iter().chain(programs.iter().map(AsRef::as_ref));
    let text = String::from_utf8(run("chroot", &arguments.collect::<Vec<_>>())?)?;
    let words = text.lines().filter(|line| line.starts_with('\t')).flat_map(str::split_whitespace);
    Ok(words.filter(|word| word.starts_with('/')).map(|path| path.trim_start_matches('/').into()).collect())
}
