//! The system that is written to: a root on a disk, our two programs, and a power switch.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use ephemeral_overlay::mountinfo;
use rustix::mount::{UnmountFlags, unmount};
use serde::{Deserialize, Serialize};

/// Where everything is.
#[derive(Debug, Clone)]
pub struct System {
    /// The root of the system, with an empty `/etc`, which is the target.
    pub root: PathBuf,
    /// Its run directory.
    pub run: PathBuf,
    /// Its configuration.
    pub config: PathBuf,
    /// What is not on the disk: the log.
    pub beside: PathBuf,
    /// `early`.
    pub early: PathBuf,
    /// `syncd`.
    pub syncd: PathBuf,
}

/// How a checkpoint ended that reported success.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Ended {
    /// It gave up: nothing of what follows.
    pub(super) gave_up: bool,
    /// Its number; nothing had changed where it has none.
    pub(super) sequence: Option<u64>,
    /// What it calls fuzzy.
    pub(super) fuzzy: Vec<String>,
    /// What it says was moving.
    pub(super) moving: Vec<String>,
    /// Names never stood still.
    pub(super) unsettled: bool,
}

/// A checkpoint that is being taken; killed when it is dropped.
#[derive(Debug)]
pub(super) struct Checkpoint {
    pub(super) run: usize,
    child: Child,
}

#[derive(Debug, Deserialize)]
struct Report {
    targets: Vec<TargetReport>,
}

#[derive(Debug, Deserialize)]
struct TargetReport {
    message: String,
    sequence: Option<u64>,
}

impl System {
    pub(super) fn target(&self) -> PathBuf {
        self.root.join("etc")
    }

    /// The log.
    pub(super) fn log(&self) -> PathBuf {
        self.beside.join("log")
    }

    /// Whose holder may write to the part that is shared.
    pub(super) fn lock(&self) -> PathBuf {
        self.beside.join("lock")
    }

    pub(super) fn boot(&self) {
        let mut command = Command::new(&self.early);
        command.arg("--root").arg(&self.root).arg("--run-dir").arg(&self.run);
        expect_success(command.arg("--config").arg(&self.config).args(["--cmdline", ""]));
    }

    pub(super) fn checkpoint(&self, run: usize) -> Checkpoint {
        let mut command = self.syncd("checkpoint");
        command.arg("--json").arg("--run-dir").arg(&self.run).stdout(Stdio::piped()).stderr(Stdio::piped());
        Checkpoint { run, child: command.spawn().unwrap() }
    }

    pub(super) fn merge(&self) {
        expect_success(&mut self.syncd("merge"));
    }

    /// Everything in RAM is gone.
    pub(super) fn cut(&self) {
        unmount_below(&self.root);
        unmount_below(&self.run);
        fs::remove_dir_all(&self.run).unwrap();
    }

    /// The number of the newest checkpoint in the store.
    pub(super) fn newest(&self) -> Option<u64> {
        let entries = fs::read_dir(self.root.join("persist/ephemeral-overlay/targets/etc")).ok()?;
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter_map(|name| name.strip_suffix(".ckpt")?.parse().ok()).max()
    }

    fn syncd(&self, command: &str) -> Command {
        let mut syncd = Command::new(&self.syncd);
        syncd.arg(command).arg("--root").arg(&self.root).arg("--config").arg(&self.config);
        syncd
    }
}

impl Checkpoint {
    /// How it ended, when it has.
    ///
    /// # Panics
    /// When it failed otherwise than by giving up.
    pub(super) fn ended(&mut self) -> Option<Ended> {
        let status = self.child.try_wait().unwrap()?;
        let (mut out, mut words) = (String::new(), String::new());
        self.child.stdout.take().unwrap().read_to_string(&mut out).unwrap();
        self.child.stderr.take().unwrap().read_to_string(&mut words).unwrap();
        match status.code() {
            Some(0 | 3) => {}
            Some(1) if words.contains("moved faster than they can be read") => {
                return Some(Ended { gave_up: true, ..Ended::default() });
            }
            _ => panic!("syncd checkpoint: {status}: {words}"),
        }
        let report: Report = serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {out}"));
        let [target] = &report.targets[..] else { panic!("{report:?}") };
        let mut ended = Ended { sequence: target.sequence, ..Ended::default() };
        for part in target.message.split("; ") {
            if let Some(path) = part.strip_suffix(" changed while it was read") {
                ended.fuzzy.push(path.to_owned());
            } else if let Some(path) = part.strip_suffix(" was moving, its loss is not recorded") {
                ended.moving.push(path.to_owned());
            } else if part.starts_with("names never stood still") {
                ended.unsettled = true;
            } else if part == "one that was being moved may be missing" {
                assert!(ended.unsettled);
            } else {
                let is_known = part.starts_with("checkpoint ") || part == "nothing changed";
                assert!(is_known, "syncd checkpoint says: {part}");
            }
        }
        let is_exact = ended.fuzzy.is_empty() && ended.moving.is_empty() && !ended.unsettled;
        assert_eq!(status.code(), Some(if is_exact { 0 } else { 3 }), "{words}");
        Some(ended)
    }
}

impl Drop for Checkpoint {
    fn drop(&mut self) {
        // An error means that it has ended.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

fn expect_success(command: &mut Command) {
    let output = command.output().unwrap();
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}: {words}", output.status);
}

/// Unmounts everything strictly below `path`, as soon as nobody uses it.
fn unmount_below(path: &Path) {
    let mounts = mountinfo::parse(&fs::read("/proc/self/mountinfo").unwrap());
    for mount in mounts.iter().rev() {
        if mount.mount_point.starts_with(path) && mount.mount_point != path {
            unmount(&mount.mount_point, UnmountFlags::DETACH).unwrap();
        }
    }
}
