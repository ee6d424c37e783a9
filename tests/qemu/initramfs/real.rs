//! The same by a real mkinitcpio, where this machine has one: with `MKINITCPIO=1`.
//!
//! It finds our hook and our programs where a package puts them: below an overlay on `/usr/lib`, which nobody sees but
//! this process and those that it starts.

use std::fs;
use std::os::fd::AsFd;
use std::path::Path;

use anyhow::{Context, Result};
use rustix::fs::CWD;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, UnmountFlags, fsconfig_create, fsconfig_set_string,
    fsmount, fsopen, move_mount, unmount,
};

use super::{DISK, Flavour};
use crate::disk::Fs;
use crate::kernel::Kernel;
use crate::package;
use crate::tools;

/// Where a package puts most of itself.
const LIB: &str = "/usr/lib";

/// Whether it was asked for.
pub(super) fn is_asked_for() -> bool {
    std::env::var("MKINITCPIO").is_ok_and(|value| value == "1")
}

/// The initramfs for a kernel, as bytes.
pub(super) fn build(kernel: &Kernel, fs: Fs, flavour: Flavour) -> Result<Vec<u8>> {
    let stage = tempfile::Builder::new().prefix("eo-stage-").tempdir().context("mkdtemp")?;
    package::install(stage.path())?;
    let base = match flavour {
        Flavour::Busybox => "base udev",
        Flavour::Systemd(_) => "base systemd",
    };
    let (config, image) = (stage.path().join("config"), stage.path().join("image"));
    let modules = DISK.join(" ");
    // In the README's order, without what is about hardware: autodetect would look at this machine's.
    let hooks = format!("{base} modconf block filesystems fsck ephemeral-overlay");
    let text = format!("MODULES=({modules} {})\nHOOKS=({hooks})\n", fs.name());
    fs::write(&config, text).context("write the configuration")?;
    let root = kernel.modules_directory().ancestors().nth(3).context("the root of the modules")?;
    let _installed = Installed::from(stage.path())?;
    let mut mkinitcpio = tools::command("mkinitcpio")?;
    mkinitcpio.args(["--nocolor", "--nopost", "--compress", "cat", "--kernel", &kernel.version()]);
    mkinitcpio.arg("--moduleroot").arg(root).arg("--config").arg(config).arg("--generate").arg(&image);
    tools::finish(&mut mkinitcpio)?;
    fs::read(&image).context("read the image")
}

/// Our package, as if it were installed.
struct Installed;

impl Installed {
    fn from(stage: &Path) -> Result<Self> {
        let lower = format!("{}:{LIB}", stage.join("usr/lib").display());
        let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).context("fsopen overlay")?;
        fsconfig_set_string(context.as_fd(), "lowerdir", lower.as_str()).context("fsconfig lowerdir")?;
        fsconfig_create(context.as_fd()).context("fsconfig create")?;
        let mount = fsmount(context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty()).context("fsmount")?;
        move_mount(mount, "", CWD, LIB, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH).context("move_mount")?;
        Ok(Self)
    }
}

impl Drop for Installed {
    fn drop(&mut self) {
        // Lazily: other tests run programs from there.
        unmount(LIB, UnmountFlags::DETACH).ok();
    }
}
