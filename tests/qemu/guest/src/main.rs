//! `/sbin/init` of the boot tests: follows the script that the harness put onto the second disk, says what it sees,
//! ends with exactly one verdict, and switches the machine off.
//!
//! Each line for the harness begins with `guest: `.

mod script;
mod shutdown;

use std::io::Write;

use anyhow::{Context, Result};
use rustix::mount::{MountFlags, mount};
use rustix::system::{RebootCommand, reboot};

/// The disk with the script, which ends at the first NUL.
const SCRIPT: &str = "/dev/vdb";

fn main() {
    match run() {
        Ok(()) => say("VERDICT done"),
        Err(error) => say(&format!("VERDICT failed: {error:#}")),
    }
    // QEMU runs with -no-reboot. Should it go on nevertheless, the kernel's panic over the lost init is a failure.
    reboot(RebootCommand::Restart).ok();
}

fn run() -> Result<()> {
    for (source, fs_type) in [("proc", "proc"), ("sys", "sysfs"), ("dev", "devtmpfs"), ("run", "tmpfs")] {
        let directory = format!("/{source}");
        if !is_mount_point(&directory) {
            mount(source, &directory, fs_type, MountFlags::empty(), None)
                .with_context(|| format!("mount {directory}"))?;
        }
    }
    let disk = std::fs::read(SCRIPT).with_context(|| format!("read {SCRIPT}"))?;
    let text = disk.split(|byte| *byte == 0).next().unwrap_or_default();
    let text = std::str::from_utf8(text).with_context(|| format!("{SCRIPT} is not text"))?;
    for line in text.lines().filter(|line| !line.trim().is_empty()) {
        script::execute(line).with_context(|| format!("`{line}`"))?;
    }
    Ok(())
}

fn is_mount_point(path: &str) -> bool {
    let mountinfo = std::fs::read("/proc/self/mountinfo").unwrap_or_default();
    let mounts = ephemeral_overlay::mountinfo::parse(&mountinfo);
    mounts.iter().any(|mount| mount.mount_point.as_os_str() == path)
}

/// Writes one line to the console, in one piece.
pub(crate) fn say(line: &str) {
    let mut console = std::io::stdout();
    let text = format!("guest: {line}\n");
    // Without a console nobody hears a complaint either; the harness takes silence for a failure.
    drop(console.write_all(text.as_bytes()).and_then(|()| console.flush()));
}
