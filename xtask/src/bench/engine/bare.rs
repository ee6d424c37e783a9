//! What making many files takes by itself: the same directories and files by as many threads as there are processors, and
//! nothing else. No owner, mode or attribute, no look at what was made, nothing that could go on after a cut.

use std::fs::{self, File, FileTimes};
use std::io::{Read, Write};
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{available_parallelism, scope};

use anyhow::{Context, Result};
use rustix::fs::syncfs;

/// Makes in `to` what is in `from`, durably.
pub(crate) fn copy(from: &Path, to: &Path) -> Result<()> {
    let mut directories = Vec::new();
    make_directories(from, to, &mut directories)?;
    let next = AtomicUsize::new(0);
    let work = || -> Result<()> {
        while let Some((to, files)) = directories.get(next.fetch_add(1, Ordering::Relaxed)) {
            files.iter().try_for_each(|file| copy_file(file, to))?;
        }
        Ok(())
    };
    scope(|scope| {
        let threads: Vec<_> = (0..available_parallelism()?.get()).map(|_| scope.spawn(work)).collect();
        threads.into_iter().try_for_each(|thread| thread.join().unwrap_or_else(|panic| resume_unwind(panic)))
    })?;
    syncfs(File::open(to)?).context("syncfs")
}

/// Makes the directories, each with the files that it is to have.
fn make_directories(from: &Path, to: &Path, all: &mut Vec<(PathBuf, Vec<PathBuf>)>) -> Result<()> {
    let mut files = Vec::new();
    for entry in fs::read_dir(from).with_context(|| format!("read {}", from.display()))? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            let below = to.join(entry.file_name());
            fs::create_dir(&below).with_context(|| format!("mkdir {}", below.display()))?;
            make_directories(&entry.path(), &below, all)?;
        } else if kind.is_file() {
            files.push(entry.path());
        }
    }
    all.push((to.to_path_buf(), files));
    Ok(())
}

fn copy_file(from: &Path, to: &Path) -> Result<()> {
    let mut source = File::open(from).with_context(|| format!("open {}", from.display()))?;
    let modified = source.metadata()?.modified()?;
    let mut copy = File::create_new(to.join(from.file_name().unwrap_or_default()))?;
    let mut bytes = Vec::new();
    source.read_to_end(&mut bytes)?;
    copy.write_all(&bytes)?;
    Ok(copy.set_times(FileTimes::new().set_modified(modified))?)
}
