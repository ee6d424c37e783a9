//! Processes that hold something while a test looks on, or that disturb it: this program again, asked by a variable.

use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::sleep;
use std::time::Duration;

use nix::sched::{CloneFlags, unshare};
use rustix::fs::{CWD, Mode, OFlags, RenameFlags, ResolveFlags, openat2, renameat_with, symlink};
use serde::{Deserialize, Serialize};

/// The variable: what is to be done, as JSON.
const ASKED: &str = "TEST_HOLDER";
const READY: &[u8; 6] = b"ready\n";

/// What a process does until it is dropped.
#[derive(Debug, Serialize, Deserialize)]
pub enum How {
    /// Has a root directory of its own.
    Root(PathBuf),
    /// Has a thread with a working directory of its own.
    ThreadDirectory(PathBuf),
    /// Makes small trees in the first directory, and exchanges their directories for symlinks into the second one.
    Exchange(PathBuf, PathBuf),
}

/// The process.
#[derive(Debug)]
pub struct Holder(Child);

impl Holder {
    /// Starts this program again.
    #[must_use]
    pub fn new(how: &How) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        Self::start(command.env(ASKED, serde_json::to_string(how).unwrap()))
    }

    /// Starts a program that says `ready` and goes on until its standard input ends.
    #[must_use]
    pub fn start(command: &mut Command) -> Self {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut word = [0; READY.len()];
        child.stdout.as_mut().unwrap().read_exact(&mut word).unwrap();
        assert_eq!(&word, READY);
        Self(child)
    }

    /// Ends it; what it said at last.
    pub fn end(&mut self) -> String {
        drop(self.0.stdin.take());
        let mut text = String::new();
        self.0.stdout.take().map(|mut out| out.read_to_string(&mut text).unwrap());
        self.0.wait().unwrap();
        text
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        self.end();
    }
}

/// Never returns where this process was started by a [`Holder`].
pub fn if_asked() {
    let Ok(words) = std::env::var(ASKED) else { return };
    match serde_json::from_str(&words).unwrap() {
        How::Root(path) => {
            rustix::process::chroot(&path).unwrap();
            wait();
        }
        How::ThreadDirectory(path) => {
            let thread = std::thread::spawn(move || {
                unshare(CloneFlags::CLONE_FS).unwrap();
                std::env::set_current_dir(path).unwrap();
                wait();
            });
            thread.join().unwrap();
        }
        How::Exchange(at, canary) => {
            let over = AtomicBool::new(false);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    wait();
                    over.store(true, Ordering::Relaxed);
                });
                let count = exchange(&at, &canary, &over);
                std::io::stdout().write_all(count.to_string().as_bytes()).unwrap();
            });
        }
    }
    std::process::exit(0);
}

fn wait() {
    std::io::stdout().write_all(READY).unwrap();
    std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
}

/// Returns how often something was exchanged. Between two bursts everything is at rest for a while, and grows old.
fn exchange(at: &Path, canary: &Path, over: &AtomicBool) -> usize {
    let places = ["a", "a/b", "a/b/c"].map(|place| at.join(place));
    let (mut rng, mut count) = (fastrand::Rng::new(), 0);
    while !over.load(Ordering::Relaxed) {
        // Whatever somebody else removed is made again. Where a symlink is left there is the same behind it.
        let _exists = fs::create_dir_all(&places[2]);
        for place in &places {
            for name in 0..100 {
                let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC;
                let path = place.join(name.to_string());
                drop(openat2(CWD, path, flags, Mode::RUSR, ResolveFlags::NO_SYMLINKS));
            }
        }
        sleep(Duration::from_micros(rng.u64(0..30_000)));
        let level = rng.usize(0..places.len());
        let link = at.with_extension(level.to_string());
        let _exists = symlink(canary.join(["a", "a/b", "a/b/c"][level]), &link);
        for _ in 0..2 * rng.usize(0..3000) {
            count += usize::from(renameat_with(CWD, &link, CWD, &places[level], RenameFlags::EXCHANGE).is_ok());
        }
    }
    count
}
