//! Makes an existing file have other contents by writing only the pages that differ.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use ephemeral_overlay::error::{At, SystemError};
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;

use crate::content;
use crate::error::Result;
use crate::scan::Stamp;

/// What is compared at once, and written where it differs.
const PAGE: u64 = 4096;
/// How much of the old contents is read at once.
const WINDOW: usize = 1 << 20;

/// A file that is being changed.
pub(super) struct Patch<'a> {
    file: &'a File,
    path: &'a Path,
    size: u64,
    /// What the file was at first.
    old: Stamp,
    /// Up to here it is as it should be.
    done: u64,
    /// How many bytes were written.
    written: u64,
    window: Vec<u8>,
}

/// Something that hands out the new contents, each piece with its offset, ascending; what is left out is a hole.
type Source<'a> = dyn FnMut(&mut dyn FnMut(u64, &[u8]) -> Result<()>) -> Result<()> + 'a;

impl<'a> Patch<'a> {
    pub(super) fn new(file: &'a File, size: u64, path: &'a Path) -> Result<Self> {
        Ok(Self { file, path, size, old: content::stamp(file, path)?, done: 0, written: 0, window: vec![0; WINDOW] })
    }

    /// Does it; returns how many bytes were written.
    pub(super) fn apply(mut self, source: &mut Source<'_>) -> Result<u64> {
        source(&mut |at, bytes| {
            self.hole(at)?;
            self.data(bytes)
        })?;
        self.hole(self.size)?;
        if self.old.size != self.size {
            self.file.set_len(self.size).at("ftruncate", self.path)?;
        }
        Ok(self.written)
    }

    /// Writes what differs of the bytes that come next.
    fn data(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(WINDOW));
            let old = self.read_old(now.len())?;
            // Pages that differ are written together with those next to them that do, too.
            let mut from: Option<usize> = None;
            let mut at = 0;
            while at < now.len() {
                let page_end = (self.done + at as u64 + 1).next_multiple_of(PAGE) - self.done;
                let end = usize::try_from(page_end).unwrap_or(usize::MAX).min(now.len());
                let same = self.window[..old].get(at..end) == Some(&now[at..end]);
                match (same, from) {
                    (false, None) => from = Some(at),
                    (true, Some(start)) => {
                        self.write(&now[start..at], start)?;
                        from = None;
                    }
                    _ => {}
                }
                at = end;
            }
            if let Some(start) = from {
                self.write(&now[start..], start)?;
            }
            self.done += now.len() as u64;
            bytes = later;
        }
        Ok(())
    }

    /// Reads what the file has where we are; returns how much that is.
    fn read_old(&mut self, length: usize) -> Result<usize, SystemError> {
        let mut read = 0;
        while read < length {
            match self.file.read_at(&mut self.window[read..length], self.done + read as u64).at("pread64", self.path)? {
                0 => break,
                more => read += more,
            }
        }
        Ok(read)
    }

    fn write(&mut self, bytes: &[u8], within: usize) -> Result<(), SystemError> {
        self.written += bytes.len() as u64;
        self.file.write_all_at(bytes, self.done + within as u64).at("pwrite64", self.path)
    }

    /// Sees to it that there are no data up to `end`.
    fn hole(&mut self, end: u64) -> Result<()> {
        // Behind its old end the file has none.
        let until = end.min(self.old.size);
        if self.done < until {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            match fallocate(self.file, flags, self.done, until - self.done) {
                Err(Errno::OPNOTSUPP) => self.zeros(until)?,
                other => other.at("fallocate", self.path)?,
            }
        }
        self.done = self.done.max(end);
        Ok(())
    }

    /// Writes zeros up to `end`, where the file system cannot make holes.
    fn zeros(&mut self, end: u64) -> Result<(), SystemError> {
        self.window.fill(0);
        let mut at = self.done;
        while at < end {
            let length = usize::try_from(end - at).unwrap_or(WINDOW).min(WINDOW);
            self.file.write_all_at(&self.window[..length], at).at("pwrite64", self.path)?;
            at += length as u64;
            self.written += length as u64;
        }
        Ok(())
    }
}
