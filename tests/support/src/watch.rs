//! A tree that nobody may touch: the kernel tells of whoever opens, reads, writes, changes, makes or removes something in
//! it, by whatever way it was reached. A comparison of before and after knows nothing of what was only opened or read.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::inotify::{CreateFlags, Reader, WatchFlags, add_watch, init};
use rustix::io::Errno;

/// What the kernel told.
#[derive(Debug)]
pub struct Watch {
    events: OwnedFd,
    paths: BTreeMap<i32, PathBuf>,
}

impl Watch {
    /// Watches nothing yet.
    #[must_use]
    pub fn new() -> Self {
        Self { events: init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC).unwrap(), paths: BTreeMap::new() }
    }

    /// Watches everything at and below the directory `path`.
    pub fn tree(&mut self, path: &Path) {
        self.add(path, WatchFlags::ALL_EVENTS);
        for entry in fs::read_dir(path).unwrap().map(Result::unwrap) {
            if entry.file_type().unwrap().is_dir() {
                self.tree(&entry.path());
            }
        }
        self.forget();
    }

    /// Watches a file for `what`, under whichever name it is reached.
    pub fn file(&mut self, path: &Path, what: WatchFlags) {
        self.add(path, what);
    }

    fn add(&mut self, path: &Path, what: WatchFlags) {
        let number = add_watch(&self.events, path, what | WatchFlags::DONT_FOLLOW).unwrap();
        self.paths.insert(number, path.to_path_buf());
    }

    /// What was done since the last call: the path, and what it was.
    #[must_use]
    pub fn told(&self) -> BTreeSet<String> {
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut reader = Reader::new(&self.events, &mut buffer);
        let mut told = BTreeSet::new();
        loop {
            match reader.next() {
                Ok(event) => {
                    // Events that were lost have no path.
                    let path = self.paths.get(&event.wd()).cloned().unwrap_or_default();
                    let name = event.file_name().map_or(OsStr::new(""), |name| OsStr::from_bytes(name.to_bytes()));
                    told.insert(format!("{}: {:?}", path.join(name).display(), event.events()));
                }
                Err(Errno::AGAIN) => return told,
                Err(error) => panic!("inotify: {error}"),
            }
        }
    }

    /// What was done until now was done by the test.
    pub fn forget(&self) {
        drop(self.told());
    }
}

impl Default for Watch {
    fn default() -> Self {
        Self::new()
    }
}
