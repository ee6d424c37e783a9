//! The static `syncd` beside us: it merges what is pending before anything is mounted, and unpacks what it cannot merge.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use early::chains::pending;
use early::writable::Writable;
use ephemeral_overlay::Layout;
use sd_notify::NotifyState;

/// For how long it may give no sign of life.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often it is looked at.
const LOOK: Duration = Duration::from_millis(100);
/// How often whoever waits for us is told that it gets on, at the most, and for how long that holds.
const TELL: Duration = Duration::from_secs(5);
const HOLDS: Duration = Duration::from_secs(60);

/// Merges what is pending. A failure is said by `syncd` and leaves the chain; the caller looks again.
pub(crate) fn merge_pending(layout: &Layout, persist: &Path) {
    if pending(layout, persist).is_ok_and(|targets| targets.is_empty()) {
        return;
    }
    // Where that is refused (a disk with write protection) the merge says what it cannot do.
    let writable = Writable::make([layout.root().to_path_buf()]).inspect_err(|error| {
        super::complain(&format!("{error:#}"), super::SKIPPED);
    });
    if let Err(error) = run(layout, &[OsStr::new("merge")]) {
        super::complain(&format!("merging pending checkpoints: {error:#}"), super::SKIPPED);
    }
    // A root that is left writable is no reason not to boot; the system remounts it anyway.
    if let Err(error) = writable.map_or(Ok(()), Writable::undo) {
        super::complain(&format!("{error:#}"), super::SKIPPED);
    }
}

/// Unpacks the chain of `target` into its upper directory, so that the view is exact although the merge failed.
pub(crate) fn unpack(layout: &Layout, target: &Path) -> anyhow::Result<()> {
    let upper = layout.upper(target);
    run(layout, &[OsStr::new("unpack"), OsStr::new("--upper"), upper.as_os_str(), target.as_os_str()])
}

fn run(layout: &Layout, arguments: &[&OsStr]) -> anyhow::Result<()> {
    let syncd = syncd();
    let mut command = Command::new(&syncd);
    command.args(arguments).arg("--root").arg(layout.root()).arg("--progress").arg(layout.progress());
    if let Some(config) = layout.named_config() {
        command.arg("--config").arg(config);
    }
    let mut child = command.spawn().with_context(|| format!("execve {}", syncd.display()))?;
    let status = wait(&mut child, layout).with_context(|| syncd.display().to_string())?;
    match status.code() {
        Some(0 | 3) => Ok(()),
        _ => bail!("{} ended with {status}", syncd.display()),
    }
}

/// Waits for `syncd` as long as it gets on. The limit is on lack of progress, not on total time: a merge may be long, and
/// a disk slow, but one that does not answer any more must not keep the machine from booting.
fn wait(child: &mut Child, layout: &Layout) -> anyhow::Result<ExitStatus> {
    let mut signs = signs_of_life(child.id(), layout);
    let (mut seen, mut told) = (Instant::now(), Instant::now());
    loop {
        if let Some(status) = child.try_wait().context("waitpid")? {
            return Ok(status);
        }
        std::thread::sleep(LOOK);
        let now = signs_of_life(child.id(), layout);
        if now != signs {
            (signs, seen) = (now, Instant::now());
            if told.elapsed() >= TELL {
                told = Instant::now();
                tell(layout, &signs);
            }
        } else if seen.elapsed() > PATIENCE {
            child.kill().context("kill")?;
            // A moment for its last call to end. Whom a dead disk holds dies when that lets it go.
            for _ in 0..20 {
                if child.try_wait().context("waitpid")?.is_some() {
                    break;
                }
                std::thread::sleep(LOOK);
            }
            bail!("no progress for {} seconds, given up", PATIENCE.as_secs());
        }
    }
}

/// Whatever changes while a merge gets on: what it says itself, its processor time, what it has read and written, and
/// what the kernel still has to write for it, which is all that changes during a long syncfs(2).
fn signs_of_life(process: u32, layout: &Layout) -> String {
    let read = |path: PathBuf| std::fs::read_to_string(path).unwrap_or_default();
    let own = Path::new("/proc").join(process.to_string());
    let memory = read("/proc/meminfo".into());
    let unwritten = memory.lines().filter(|line| line.starts_with("Dirty:") || line.starts_with("Writeback:"));
    [read(layout.progress()), read(own.join("stat")), read(own.join("io")), unwritten.collect()].concat()
}

/// Tells the hook, through a file that changes, and systemd.
fn tell(layout: &Layout, signs: &str) {
    // Whoever watches gives up too early at worst, and the merge is redone at the next boot.
    let _told = std::fs::write(layout.alive(), signs);
    let _told =
        sd_notify::notify(&[NotifyState::ExtendTimeoutUsec(u32::try_from(HOLDS.as_micros()).unwrap_or(u32::MAX))]);
}

/// The `syncd` that was put into the initramfs together with this binary.
fn syncd() -> PathBuf {
    let sibling = std::env::current_exe().ok().map(|own| own.with_file_name("syncd"));
    sibling.filter(|path| path.exists()).unwrap_or_else(|| "syncd".into())
}
