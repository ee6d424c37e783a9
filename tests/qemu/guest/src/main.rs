//! The hands of the boot tests: follows the script that the harness put onto the second disk, says what it sees, ends
//! with exactly one verdict, and switches the machine off. It is `/sbin/init`, or a service of systemd.
//!
//! Each line for the harness begins with `guest: `.

mod script;
mod shutdown;

use std::fs;
use std::io::Write;

use anyhow::{Context, Result, ensure};
use rustix::mount::{MountFlags, mount};
use rustix::system::{RebootCommand, reboot};

/// The disk with the script, which ends at the first NUL.
const SCRIPT: &str = "/dev/vdb";
/// How many soft reboots this boot has had, in RAM.
const SOFT_REBOOTS: &str = "/run/qemu-guest";

/// How a script ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// Whatever is running.
    AtOnce,
    /// By a clean shutdown.
    Shutdown,
    /// Not yet: systemd starts us again.
    SoftReboot,
}

fn main() {
    test_support::live::write_if_asked();
    let end = run();
    match &end {
        Ok(End::SoftReboot) => {}
        Ok(_) => say("VERDICT done"),
        Err(error) => say(&format!("VERDICT failed: {error:#}")),
    }
    let asked = match end {
        Ok(End::SoftReboot) => shutdown::ask_init("soft-reboot"),
        Ok(End::Shutdown) if !is_init() => shutdown::ask_init("reboot"),
        _ => Err(anyhow::anyhow!("at once")),
    };
    if asked.is_err() {
        // QEMU runs with -no-reboot. Should it go on nevertheless, the kernel's panic over the lost init is a failure.
        reboot(RebootCommand::Restart).ok();
    }
}

fn run() -> Result<End> {
    if is_init() {
        for (source, fs_type) in [("proc", "proc"), ("sys", "sysfs"), ("dev", "devtmpfs"), ("run", "tmpfs")] {
            let directory = format!("/{source}");
            if !is_mount_point(&directory) {
                mount(source, &directory, fs_type, MountFlags::empty(), None)
                    .with_context(|| format!("mount {directory}"))?;
            }
        }
    }
    let disk = fs::read(SCRIPT).with_context(|| format!("read {SCRIPT}"))?;
    let text = disk.split(|byte| *byte == 0).next().unwrap_or_default();
    let text = std::str::from_utf8(text).with_context(|| format!("{SCRIPT} is not text"))?;
    let done: usize = fs::read_to_string(SOFT_REBOOTS).map_or(Ok(0), |count| count.parse()).context(SOFT_REBOOTS)?;
    let mut lines = text.lines().filter(|line| !line.trim().is_empty());
    for _ in 0..done {
        ensure!(lines.any(|line| line == "soft-reboot"), "a soft reboot that the script does not have");
    }
    let mut end = End::AtOnce;
    for line in lines {
        end = match line {
            "soft-reboot" => {
                fs::write(SOFT_REBOOTS, (done + 1).to_string()).context(SOFT_REBOOTS)?;
                return Ok(End::SoftReboot);
            }
            "shutdown" if is_init() => {
                shutdown::shutdown().context("`shutdown`")?;
                End::Shutdown
            }
            "shutdown" => End::Shutdown,
            "shutdown plain" | "shutdown plain-after-umount" => {
                shutdown::plain(line.ends_with("umount")).context("`shutdown`")?;
                End::Shutdown
            }
            _ => {
                script::execute(line).with_context(|| format!("`{line}`"))?;
                End::AtOnce
            }
        };
    }
    Ok(end)
}

/// Whether this is the machine's init.
fn is_init() -> bool {
    std::process::id() == 1
}

/// Whether something is mounted at a path.
pub(crate) fn is_mount_point(path: &str) -> bool {
    let mountinfo = fs::read("/proc/self/mountinfo").unwrap_or_default();
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
