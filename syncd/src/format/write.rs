//! Writes a checkpoint: data is compressed in parallel and written in order, so the same tree gives the same bytes.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use ephemeral_overlay::CHECKPOINT_FORMAT;
use ephemeral_overlay::error::{At, SystemError};
use rayon::prelude::*;
use xxhash_rust::xxh3::Xxh3;

use super::{END, FRAME, Header, Index, MAGIC, Trailer};
use crate::digest::Digest;
use crate::entry::Change;
use crate::error::Result;

/// A checkpoint that is being written.
pub struct Writer<'a> {
    out: &'a mut File,
    path: &'a Path,
    level: i32,
    written: u64,
    /// Over every byte written.
    whole: Xxh3,
    /// Over what stands before the data; the index is added at the end.
    head: Xxh3,
    /// Frames that wait to be compressed together; all but the last are complete.
    batch: Vec<Vec<u8>>,
    frames: Vec<u32>,
    /// The length of the data in `frames`, before compression.
    flushed: u64,
}

impl std::fmt::Debug for Writer<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Writer").field("path", &self.path).field("written", &self.written).finish_non_exhaustive()
    }
}

/// What was written.
#[derive(Debug, Clone, Copy)]
pub struct Written {
    /// The digest over every byte, which the next checkpoint names.
    pub digest: Digest,
    /// The length of the file in bytes.
    pub bytes: u64,
}

impl<'a> Writer<'a> {
    /// Begins a checkpoint in `out`; `path` is for messages, `level` is zstd's.
    ///
    /// # Errors
    /// Whatever write(2) says.
    pub fn new(out: &'a mut File, path: &'a Path, header: &Header, level: i32) -> Result<Self> {
        let header = encode(header, path)?;
        let mut writer = Self {
            out,
            path,
            level,
            written: 0,
            whole: Xxh3::new(),
            head: Xxh3::new(),
            batch: Vec::new(),
            frames: Vec::new(),
            flushed: 0,
        };
        let mut prelude = MAGIC.to_vec();
        prelude.extend_from_slice(&CHECKPOINT_FORMAT.to_le_bytes());
        prelude.extend_from_slice(&u32::try_from(header.len()).unwrap_or(u32::MAX).to_le_bytes());
        prelude.extend_from_slice(&header);
        writer.head.update(&prelude);
        writer.write(&prelude)?;
        Ok(writer)
    }

    /// Where the next byte of data will be.
    #[must_use]
    pub fn position(&self) -> u64 {
        let waiting: usize = self.batch.iter().map(Vec::len).sum();
        self.flushed + waiting as u64
    }

    /// Appends data.
    ///
    /// # Errors
    /// Whatever zstd or write(2) says.
    pub fn data(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            if self.batch.last().is_none_or(|frame| frame.len() == FRAME) {
                if self.batch.len() >= 2 * rayon::current_num_threads() {
                    self.flush()?;
                }
                self.batch.push(Vec::with_capacity(FRAME));
            }
            let Some(frame) = self.batch.last_mut() else { break };
            let (now, later) = bytes.split_at(bytes.len().min(FRAME - frame.len()));
            frame.extend_from_slice(now);
            bytes = later;
        }
        Ok(())
    }

    /// Takes back the data from `position` on, where it has not been written yet; the rest stays unused.
    pub fn rewind(&mut self, position: u64) {
        let keep = usize::try_from(position.saturating_sub(self.flushed)).unwrap_or(usize::MAX);
        self.batch.truncate(keep.div_ceil(FRAME));
        if let Some(last) = self.batch.last_mut() {
            last.truncate((keep - 1) % FRAME + 1);
        }
    }

    /// Ends the checkpoint with its changes, which must be in path order. Nothing is synced here.
    ///
    /// # Errors
    /// Whatever zstd or write(2) says.
    pub fn finish(mut self, changes: Vec<Change>) -> Result<Written> {
        self.flush()?;
        let raw = encode(&Index { frames: std::mem::take(&mut self.frames), changes }, self.path)?;
        let index = zstd::bulk::compress(&raw, self.level).at("zstd", self.path)?;
        let trailer = Trailer {
            index_at: self.written,
            index_len: index.len() as u64,
            index_raw: raw.len() as u64,
            data_len: self.flushed,
        }
        .to_bytes();
        self.head.update(&index);
        self.head.update(&trailer);
        self.write(&index)?;
        self.write(&trailer)?;
        self.write(&self.head.digest128().to_le_bytes())?;
        let digest = Digest(self.whole.digest128());
        self.write(&digest.0.to_le_bytes())?;
        self.write(&END)?;
        Ok(Written { digest, bytes: self.written })
    }

    fn flush(&mut self) -> Result<()> {
        let level = self.level;
        let compressed: Vec<_> = self.batch.par_iter().map(|frame| zstd::bulk::compress(frame, level)).collect();
        for frame in compressed {
            let frame = frame.at("zstd", self.path)?;
            self.frames.push(u32::try_from(frame.len()).unwrap_or(u32::MAX));
            self.write(&frame)?;
        }
        self.flushed = self.position();
        self.batch.clear();
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), SystemError> {
        self.out.write_all(bytes).at("write", self.path)?;
        self.whole.update(bytes);
        self.written += bytes.len() as u64;
        Ok(())
    }
}

fn encode(value: &impl serde::Serialize, path: &Path) -> Result<Vec<u8>, SystemError> {
    postcard::to_stdvec(value)
        .map_err(|error| std::io::Error::new(std::io::ErrorKind::InvalidInput, error))
        .at("encode", path)
}
