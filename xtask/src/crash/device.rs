//! Block devices of our own: a loop device, and one that keeps a log of what is written to it.
//!
//! A loop device goes with the last descriptor of it, however we end: it is detached as soon as it is held.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::fs::OFlags;

use crate::disk::run;
use crate::packages;

/// How many writes a slow device does in a second.
const SLOW: u32 = 500;

/// How long something that comes by itself may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// A loop device.
#[derive(Debug)]
pub(crate) struct Loop {
    path: PathBuf,
    _held: File,
}

impl Loop {
    /// A loop device on a file.
    pub(crate) fn on(file: &Path) -> Result<Self> {
        let output = Command::new("losetup")
            .args(["--find", "--show", "--"])
            .arg(file)
            .env("PATH", packages::path())
            .output()
            .context("running losetup")?;
        if !output.status.success() {
            bail!("losetup {}: {}", file.display(), String::from_utf8_lossy(&output.stderr).trim_end());
        }
        let path = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim_end());
        let held = File::open(&path).with_context(|| format!("open {}", path.display()));
        run(Command::new("losetup").arg("--detach").arg(&path))?;
        Ok(Self { path, _held: held? })
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Opens it to write, once nothing is mounted from it any more.
    pub(crate) fn open_unused(&self) -> Result<File> {
        let mut options = File::options();
        options.write(true).custom_flags(i32::try_from(OFlags::EXCL.bits())?);
        let begun = Instant::now();
        loop {
            match options.open(&self.path) {
                Err(error) if error.kind() == ErrorKind::ResourceBusy && begun.elapsed() < PATIENCE => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                other => return other.with_context(|| format!("open {}", self.path.display())),
            }
        }
    }
}

/// A block device whose log has every write and flush, in the order in which they were completed.
#[derive(Debug)]
pub(crate) struct Recorder {
    daemon: Child,
    log: PathBuf,
}

impl Recorder {
    /// Shows the disk in the file `image` as the file `export`, and writes down what happens to it in `log`. On a slow
    /// one there is time for something to happen between a write and its end.
    pub(crate) fn start(image: &Path, export: &Path, log: &Path, slow: bool) -> Result<Self> {
        for file in [export, log] {
            File::create(file).with_context(|| format!("creat {}", file.display()))?;
        }
        let of = |name: &str, path: &Path| format!("driver=file,node-name={name},filename={}", path.display());
        // It must not outlive us: what is mounted from it would wait for it.
        let mut command = Command::new("setpriv");
        command
            .args(["--pdeathsig", "KILL", "qemu-storage-daemon"])
            .args(["--blockdev", &of("disk", image), "--blockdev", &of("log", log)])
            .args(["--blockdev", "driver=blklogwrites,node-name=recorder,file=disk,log=log"]);
        let mut seen = "recorder";
        if slow {
            seen = "slow";
            let limit = format!(r#"{{"qom-type":"throttle-group","id":"limit","limits":{{"iops-write":{SLOW}}}}}"#);
            command.args(["--object", &limit]);
            command.args(["--blockdev", "driver=throttle,node-name=slow,throttle-group=limit,file=recorder"]);
        }
        let daemon = command
            .arg("--export")
            .arg(format!("type=fuse,id=export,node-name={seen},writable=on,mountpoint={}", export.display()))
            .env("PATH", packages::path())
            .stdin(Stdio::null())
            .spawn()
            .context("running qemu-storage-daemon")?;
        let mut recorder = Self { daemon, log: log.to_path_buf() };
        let begun = Instant::now();
        while fs::metadata(export).context("stat of the export")?.len() == 0 {
            if let Some(status) = recorder.daemon.try_wait()? {
                bail!("qemu-storage-daemon: {status}");
            }
            if begun.elapsed() > PATIENCE {
                bail!("qemu-storage-daemon shows no disk");
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(recorder)
    }

    /// Ends it, and returns the whole log. Nothing uses the device any more.
    pub(crate) fn finish(mut self) -> Result<Vec<u8>> {
        let pid = rustix::process::Pid::from_child(&self.daemon);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).context("kill qemu-storage-daemon")?;
        let status = self.daemon.wait()?;
        if !status.success() {
            bail!("qemu-storage-daemon: {status}");
        }
        fs::read(&self.log).with_context(|| format!("read {}", self.log.display()))
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        // After `finish` there is none any more.
        let _gone = self.daemon.kill();
        let _gone = self.daemon.wait();
    }
}
