//! The end of a clean shutdown, in the order of systemd-shutdown(8): every process is killed, everything that can be
//! is unmounted (but nothing below `/run/initramfs`), what is left becomes read-only, each mount for itself, and then
//! the programs in `/usr/lib/systemd/system-shutdown` run. Where there is a `/run/initramfs/shutdown`, it has the last
//! word, with the old root on `/oldroot`.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ephemeral_overlay::mountinfo;
use rustix::mount::{MountFlags, UnmountFlags, mount_bind, mount_move, mount_remount, unmount};
use rustix::process::{Pid, Signal, WaitOptions, kill_process, pivot_root, wait};

use crate::say;

/// What the initramfs left of itself.
const INITRAMFS: &str = "/run/initramfs";
/// What systemd-shutdown runs last.
const PROGRAMS: &str = "/usr/lib/systemd/system-shutdown";

/// What every init but systemd is to run last.
const LAST_STAGE: &str = "/usr/lib/ephemeral-overlay/last-stage";
/// Where OpenRC is what runs.
const OPENRC: &str = "/run/openrc";

/// Has the init end this boot: `reboot`, or with systemd `soft-reboot`.
pub(crate) fn ask_init(how: &str) -> Result<()> {
    let mut command = if Path::new(OPENRC).exists() {
        let mut command = Command::new("/usr/sbin/openrc-shutdown");
        command.args([&format!("--{how}"), "now"]);
        command
    } else {
        let mut command = Command::new("/usr/bin/systemctl");
        command.args(["--no-block", how]);
        command
    };
    let status = command.status().with_context(|| format!("execve {command:?}"))?;
    ensure!(status.success(), "{command:?}: {status}");
    Ok(())
}

/// The end of a shutdown by an init that knows nothing of us but one line: every process is killed, and that line is run.
/// Some unmount what they can before, also what is ours, but no tmpfs.
pub(crate) fn plain(after_umount: bool) -> Result<()> {
    kill_all();
    if after_umount {
        let mounts = mounts()?;
        let is_kept = |mount: &&mountinfo::Mount| {
            mount.mount_point == Path::new("/") || ["tmpfs", "devtmpfs", "proc", "sysfs"].contains(&&*mount.fs_type)
        };
        for mount in mounts.iter().rev().filter(|mount| !is_kept(mount)) {
            if let Err(error) = unmount(&mount.mount_point, UnmountFlags::NOFOLLOW) {
                say(&format!("BUSY {}: {error}", mount.mount_point.display()));
            }
        }
    }
    let status = Command::new(LAST_STAGE).env_clear().status().with_context(|| format!("execve {LAST_STAGE}"))?;
    say(&format!("LAST {LAST_STAGE} {status}"));
    rustix::fs::sync();
    Ok(())
}

pub(crate) fn shutdown() -> Result<()> {
    kill_all();
    unmount_all()?;
    for mount in mounts()?.iter().rev().filter(|mount| mount.source.starts_with("/dev/")) {
        let point = &mount.mount_point;
        mount_remount(point, MountFlags::RDONLY, c"")
            .with_context(|| format!("mount -o remount,ro {}", point.display()))?;
    }
    for program in programs() {
        let status = Command::new(&program).arg("poweroff").env_clear().status();
        let status = status.with_context(|| format!("execve {}", program.display()))?;
        say(&format!("LAST {} {status}", program.display()));
    }
    rustix::fs::sync();
    if Path::new(INITRAMFS).join("shutdown").exists() { back_to_the_initramfs() } else { Ok(()) }
}

/// Makes the initramfs the root again and becomes its `/shutdown`.
fn back_to_the_initramfs() -> Result<()> {
    let new = Path::new(INITRAMFS);
    mount_bind(new, new).context("mount --bind")?;
    for name in ["proc", "sys", "dev"] {
        let from = Path::new("/").join(name);
        mount_move(&from, new.join(name)).with_context(|| format!("mount --move {}", from.display()))?;
    }
    std::env::set_current_dir(new).context("chdir")?;
    pivot_root(".", "oldroot").context("pivot_root")?;
    rustix::process::chroot(".").context("chroot")?;
    Err(Command::new("/shutdown").exec()).context("execve /shutdown")
}

/// SIGTERM, a moment, SIGKILL: for everything but us and the kernel's threads.
fn kill_all() {
    for signal in [Signal::TERM, Signal::KILL] {
        for process in processes() {
            // It may have ended meanwhile.
            kill_process(process, signal).ok();
        }
        for _ in 0..20 {
            while let Ok(Some(_)) = wait(WaitOptions::NOHANG) {}
            if processes().is_empty() {
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

fn processes() -> Vec<Pid> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let numbers = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    // A thread of the kernel has no command line.
    let is_program = |pid: &i32| fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|text| !text.is_empty());
    numbers.filter(|pid| *pid > 1).filter(is_program).filter_map(Pid::from_raw).collect()
}

fn mounts() -> Result<Vec<mountinfo::Mount>> {
    Ok(mountinfo::parse(&fs::read("/proc/self/mountinfo").context("read /proc/self/mountinfo")?))
}

fn unmount_all() -> Result<()> {
    for mount in mounts()?.iter().rev() {
        let point = &mount.mount_point;
        let stays = ["/proc", "/sys", "/dev", "/run/initramfs"].iter().any(|kept| point.starts_with(kept));
        if stays || point == Path::new("/") || point == Path::new("/run") {
            continue;
        }
        if let Err(error) = unmount(point, UnmountFlags::NOFOLLOW) {
            say(&format!("BUSY {}: {error}", point.display()));
        }
    }
    Ok(())
}

fn programs() -> Vec<PathBuf> {
    let entries = fs::read_dir(PROGRAMS).into_iter().flatten().flatten();
    let mut programs: Vec<PathBuf> = entries.map(|entry| entry.path()).filter(|path| path.is_file()).collect();
    programs.sort();
    programs
}
