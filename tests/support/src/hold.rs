//! Processes that hold something while a test looks on, or that disturb it: this program again, asked by a variable.

use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::sleep;
use std::time::Duration;

use nix::sched::{CloneFlags, unshare};
use rustix::fs::{CWD, Mode, OFlags, RenameFlags, ResolveFlags, link, openat, openat2, renameat_with, symlink};
use rustix::io::Errno;
use rustix::mount::{UnmountFlags, mount_bind, unmount};
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
    /// Makes small trees in the first directory, mounts parts of the second ones in it, and gives the files of the third
    /// one more names there.
    Mount(PathBuf, Vec<PathBuf>, PathBuf),
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
        How::Exchange(at, canary) => until_over(|over| exchange(&at, &canary, over)),
        How::Mount(at, canaries, linked) => until_over(|over| mount(&at, &canaries, &linked, over)),
    }
    std::process::exit(0);
}

/// Acts until it is told that all is over, and says how often it did something.
fn until_over(act: impl FnOnce(&AtomicBool) -> usize) {
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            wait();
            over.store(true, Ordering::Relaxed);
        });
        let count = act(&over);
        std::io::stdout().write_all(count.to_string().as_bytes()).unwrap();
    });
}

fn wait() {
    std::io::stdout().write_all(READY).unwrap();
    std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
}

/// What a symlink at `place` says that leads to `path`: all of it, or the way there.
fn leads_to(path: &Path, place: &Path, is_absolute: bool) -> PathBuf {
    let common = place.ancestors().skip(1).find(|above| path.starts_with(above)).unwrap();
    if is_absolute || common.parent().is_none() {
        return path.to_path_buf();
    }
    let up = place.strip_prefix(common).unwrap().components().skip(1).map(|_| "..").collect::<PathBuf>();
    up.join(path.strip_prefix(common).unwrap())
}

/// Returns how often something was exchanged. Between two bursts everything is at rest for a while, and grows old.
fn exchange(at: &Path, canary: &Path, over: &AtomicBool) -> usize {
    let parts = ["a", "a/b", "a/b/c", "a/7"];
    let places = parts.map(|part| at.join(part));
    let (mut rng, mut count) = (fastrand::Rng::new(), 0);
    while !over.load(Ordering::Relaxed) {
        // Whatever somebody else removed is made again. Where a symlink is left there is the same behind it.
        let _exists = fs::create_dir_all(&places[2]);
        for place in &places[..3] {
            for name in 0..100 {
                let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC;
                let path = place.join(name.to_string());
                drop(openat2(CWD, path, flags, Mode::RUSR, ResolveFlags::NO_SYMLINKS));
            }
        }
        sleep(Duration::from_micros(rng.u64(0..30_000)));
        let level = rng.usize(0..places.len());
        let link = at.with_extension(level.to_string());
        let _exists = symlink(leads_to(&canary.join(parts[level]), &places[level], rng.bool()), &link);
        for _ in 0..2 * rng.usize(0..3000) {
            count += usize::from(exchange_once(&link, &places[level]).is_ok());
        }
    }
    count
}

/// Not behind a symlink, which would be in the canary: one is left where the cleaner removed what it was exchanged for.
fn exchange_once(link: &Path, place: &Path) -> rustix::io::Result<()> {
    let (Some(parent), Some(name)) = (place.parent(), place.file_name()) else { return Err(Errno::INVAL) };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let parent = openat2(CWD, parent, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS)?;
    renameat_with(CWD, link, parent, name, RenameFlags::EXCHANGE)
}

/// Returns how often something was mounted.
fn mount(at: &Path, canaries: &[PathBuf], linked: &Path, over: &AtomicBool) -> usize {
    let place = at.join("m");
    let (mut rng, mut count) = (fastrand::Rng::new(), 0);
    while !over.load(Ordering::Relaxed) {
        let _exists = fs::create_dir_all(&place);
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let Ok(dir) = openat2(CWD, &place, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS) else { continue };
        for name in 0..100 {
            drop(openat(&dir, name.to_string(), OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC, Mode::RUSR));
        }
        // Or it would be in use.
        drop(dir);
        for name in 0..10 {
            let _exists = link(linked.join(name.to_string()), at.join(format!("link {name}")));
        }
        sleep(Duration::from_micros(rng.u64(0..30_000)));
        for _ in 0..rng.usize(0..300) {
            let what = canaries[rng.usize(..canaries.len())].join(["a", "a/b", "a/b/c"][rng.usize(..3)]);
            if mount_bind(&what, &place).is_ok() {
                count += 1;
                sleep(Duration::from_micros(rng.u64(0..100)));
                unmount(&place, UnmountFlags::DETACH).unwrap();
            }
        }
    }
    count
}
