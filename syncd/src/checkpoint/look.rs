//! What upper holds now, and what of it has to be recorded.

use std::collections::BTreeSet;
use std::fs;
use std::time::Duration;

use rayon::prelude::*;
use rustix::fs::FileType;
use rustix::io::Errno;

use super::{CheckpointStats, Job};
use crate::content;
use crate::diff::{self, Beside, Draft, Looked};
use crate::digest::BLOCK;
use crate::entry::{Kind, Meta, State};
use crate::error::{Error, Result};
use crate::path::RelPath;
use crate::scan::{self, Found, Object, Stamp, View};
use crate::tree::Opener;

/// How often upper is scanned for a state in which nothing moves.
const TRIES: usize = 3;
/// How long a scan that saw something move waits before the next one: longer than a tick of the clock that stamps
/// files (4 ms at 250 Hz).
const SETTLE: Duration = Duration::from_millis(5);

impl Job<'_> {
    /// A scan whose losses are believed, or held; `first` is one that was made already.
    pub(super) fn scan(&mut self, first: Option<Vec<Found>>, stats: &mut CheckpointStats) -> Result<Vec<Found>> {
        stats.unsettled = false;
        let mut scan = first.map_or_else(|| scan::scan(self.upper, View::Upper), Ok)?;
        for last in (0..TRIES).map(|done| done + 1 == TRIES) {
            let (losses, unmoved) = rayon::join(|| self.losses(&scan), || scan::is_unmoved(self.upper, &scan));
            if losses.is_empty() && unmoved? {
                break;
            }
            // On kernels before 6.13 two changes within one tick leave the same times: the next look is in another one.
            std::thread::sleep(SETTLE);
            let again = scan::scan(self.upper, View::Upper)?;
            let stable = diff::is_stable(&scan, &again);
            scan = again;
            if stable {
                break;
            }
            if last {
                stats.unsettled = true;
                self.hold_losses(&scan, stats);
            }
        }
        self.mark_opaque(&mut scan)?;
        Ok(scan)
    }

    /// Believes no loss: none is recorded, and each is reported.
    pub(super) fn hold_losses(&mut self, scan: &[Found], stats: &mut CheckpointStats) {
        let losses = self.losses(scan);
        self.held.extend(diff::held(&losses, scan));
        stats.disputed.extend(losses);
    }

    fn losses(&self, scan: &[Found]) -> BTreeSet<RelPath> {
        Beside::new(&self.past.net, scan).losses(|path| self.lower_is_dir(path))
    }

    fn lower_is_dir(&self, path: &RelPath) -> bool {
        let stat = self.lower.stat(path).ok().flatten();
        stat.is_some_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Directory)
    }

    /// A directory that lower does not have is opaque, whether or not the kernel had the room to say so: it ignores
    /// a failed setxattr of its own mark (fs/overlayfs/dir.c).
    fn mark_opaque(&self, scan: &mut [Found]) -> Result<()> {
        let mut opaque: Vec<RelPath> = Vec::new();
        for found in scan {
            let Object::Other(Kind::Dir { opaque: is_opaque }, _) = &mut found.object else { continue };
            while opaque.last().is_some_and(|above| !found.path.is_below(above)) {
                opaque.pop();
            }
            if opaque.is_empty() && !*is_opaque && !found.path.is_root() {
                let stat = self.lower.stat(&found.path)?;
                *is_opaque = stat.is_none_or(|stat| FileType::from_raw_mode(stat.st_mode) != FileType::Directory);
            }
            if *is_opaque {
                opaque.push(found.path.clone());
            }
        }
        Ok(())
    }

    /// Reads what has to be compared, in path order.
    pub(super) fn look<'a>(&self, beside: &Beside<'a>) -> Result<Vec<(&'a Found, Looked)>> {
        let look = |(buffer, opener): &mut (Vec<u8>, Opener<'_>), (found, recorded): (&'a Found, &State)| {
            let looked = self.open(opener, found).and_then(|(file, before)| {
                let shown = self.upper.show(&found.path);
                let read =
                    content::hash_with(&file, before, self.past.seed, buffer, &shown, || self.meta(&file, found));
                // What cannot be read may be no file any more.
                read.or_else(|error| self.meta(&file, found).and(Err(error)))
            });
            match looked {
                // It is met again when it would be written, and passed over there.
                Err(Error::Moved { .. }) if !self.patient => Ok(None),
                looked => looked.map(|(read, meta)| Some((found, Looked::of(recorded, &meta, read)))),
            }
        };
        let looked: Vec<_> = beside
            .to_hash()
            .into_par_iter()
            .map_init(|| (Vec::new(), Opener::new(self.upper)), look)
            .collect::<Result<_>>()?;
        Ok(looked.into_iter().flatten().collect())
    }

    /// Opens the file that the scan met; another one by that name, or none, makes us start over. Returned is what it was
    /// before it is read: of a short file what the scan saw, because the look after the read tells whether it is that file.
    pub(super) fn open(&self, opener: &mut Opener<'_>, found: &Found) -> Result<(fs::File, Stamp)> {
        let file = match opener.open_file(&found.path) {
            // The kernel calls it another device when a name leaves the directory under the open (openat2(2), EXDEV).
            Err(error)
                if matches!(
                    error.errno(),
                    Some(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::NXIO | Errno::XDEV)
                ) =>
            {
                return Err(Error::Moved { path: found.path.clone() });
            }
            other => other?,
        };
        let before = if found.stamp.size <= BLOCK as u64 { found.stamp } else { self.meta(&file, found)?.1 };
        Ok((file, before))
    }

    /// The metadata of an open file, and its stamp at that moment; another one than the scan met makes us start over.
    pub(super) fn meta(&self, file: &fs::File, found: &Found) -> Result<(Meta, Stamp)> {
        let (meta, stat) = scan::file_meta(file, View::Upper, &self.upper.show(&found.path))?;
        let is_file = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
        if !is_file || stat.st_ino != found.stamp.ino {
            return Err(Error::Moved { path: found.path.clone() });
        }
        Ok((meta, Stamp::of(&stat)))
    }

    /// Changes that are no reason to write: our own log, and directories that were copied up on the way to it, or
    /// from the start (the root), and differ in nothing but their times.
    pub(super) fn is_nothing(&self, drafts: &[(&RelPath, Draft)]) -> Result<bool> {
        for (path, draft) in drafts {
            let Draft::Present(found, _) = draft else { return Ok(false) };
            if Some(*path) == self.options.own_log.as_ref() {
                continue;
            }
            let leads_to_log = self.options.own_log.as_ref().is_some_and(|log| log.is_below(path));
            let Object::Other(kind @ Kind::Dir { .. }, now) = &found.object else { return Ok(false) };
            let Some((kind_before, mut before)) = self.before(path)? else { return Ok(false) };
            if *kind != kind_before {
                return Ok(false);
            }
            if leads_to_log {
                (before.mtime, before.mtime_nsec) = (now.mtime, now.mtime_nsec);
            }
            if **now != before {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// What an object was at the last checkpoint, or what a directory is in lower.
    fn before(&self, path: &RelPath) -> Result<Option<(Kind, Meta)>> {
        if let Some(recorded) = self.past.net.entries.get(path) {
            return Ok(recorded.state.node().map(|node| (node.kind.clone(), node.meta.clone())));
        }
        if !self.lower_is_dir(path) {
            return Ok(None);
        }
        let meta = scan::dir_meta(self.lower, path)?;
        Ok(Some((Kind::Dir { opaque: false }, meta)))
    }
}
