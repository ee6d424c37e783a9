//! Writes a checkpoint: frames in the order in which they are handed over, so the same tree gives the same bytes.

use std::fs::File;
use std::io::Write;
use std::num::NonZeroU64;
use std::path::Path;

use ephemeral_overlay::CHECKPOINT_FORMAT;
use ephemeral_overlay::error::{At, SystemError};
use rayon::prelude::*;
use rustix::fs::{Advice, fadvise};
use xxhash_rust::xxh3::Xxh3;
use zstd::bulk::Compressor;

use super::{END, FrameInfo, Header, MAGIC, Trailer};
use crate::digest::{self, Digest};
use crate::entry::Change;
use crate::error::Result;

/// How much is written before the disk is told to begin with it.
const HASTEN: u64 = 2 << 20;
/// How many changes are encoded and compressed at once.
const PIECE: usize = 2048;
/// Shorter data is compressed without a look at a sample.
const SAMPLED: usize = 64 << 10;
/// A sample is one piece of this length out of each 64 KiB.
const SAMPLE: usize = 2 << 10;

/// Compresses frames. One for each thread: it is reused.
pub struct Packer {
    compressor: Compressor<'static>,
    sample: Vec<u8>,
}

impl std::fmt::Debug for Packer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Packer").finish_non_exhaustive()
    }
}

/// A frame as it will be in the file.
#[derive(Debug)]
pub struct Frame {
    info: FrameInfo,
    stored: Vec<u8>,
}

impl Packer {
    /// One with zstd's level.
    ///
    /// # Errors
    /// When zstd has no memory.
    pub fn new(level: i32) -> std::io::Result<Self> {
        Ok(Self { compressor: Compressor::new(level)?, sample: Vec::new() })
    }

    /// Makes a frame of at most [`super::FRAME`] bytes. What does not get shorter is stored as it is. The frame takes
    /// one of the two buffers, and the other one comes back.
    ///
    /// # Errors
    /// Whatever zstd says.
    pub fn pack(&mut self, data: Vec<u8>, mut packed: Vec<u8>) -> std::io::Result<(Frame, Vec<u8>)> {
        let raw = u32::try_from(data.len()).unwrap_or(u32::MAX);
        packed.clear();
        let mut is_shorter = false;
        if !self.is_incompressible(&data)? {
            packed.reserve(zstd::zstd_safe::compress_bound(data.len()));
            let length = self.compressor.compress_to_buffer(&data, &mut packed)?;
            // Reading it back costs, too.
            is_shorter = length + data.len() / 32 < data.len();
        }
        let (stored, spare) = if is_shorter { (packed, data) } else { (data, packed) };
        let digest = digest::of_bytes(&stored, 0);
        let info = FrameInfo { raw, stored: u32::try_from(stored.len()).unwrap_or(u32::MAX), digest };
        Ok((Frame { info, stored }, spare))
    }

    fn is_incompressible(&mut self, data: &[u8]) -> std::io::Result<bool> {
        if data.len() < SAMPLED {
            return Ok(false);
        }
        self.sample.clear();
        for part in data.chunks_exact(SAMPLED) {
            self.sample.extend_from_slice(&part[..SAMPLE]);
        }
        let packed = self.compressor.compress(&self.sample)?;
        Ok(packed.len() + self.sample.len() / 32 > self.sample.len())
    }
}

impl Frame {
    /// The length of its data.
    #[must_use]
    pub fn raw_len(&self) -> u64 {
        self.info.raw.into()
    }

    /// Its buffer, to be used again.
    #[must_use]
    pub fn into_buffer(self) -> Vec<u8> {
        self.stored
    }
}

/// A checkpoint that is being written.
pub struct Writer<'a> {
    out: &'a mut File,
    path: &'a Path,
    written: u64,
    /// How much of it the disk was told to write.
    hastened: u64,
    /// Over what stands before the data; the index is added at the end.
    head: Xxh3,
    frames: Vec<FrameInfo>,
}

impl std::fmt::Debug for Writer<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Writer").field("path", &self.path).field("written", &self.written).finish_non_exhaustive()
    }
}

/// What was written.
#[derive(Debug, Clone, Copy)]
pub struct Written {
    /// The checkpoint's digest, which the next one names.
    pub digest: Digest,
    /// The length of the file in bytes.
    pub bytes: u64,
}

impl<'a> Writer<'a> {
    /// Begins a checkpoint in `out`; `path` is for messages.
    ///
    /// # Errors
    /// Whatever write(2) says.
    pub fn new(out: &'a mut File, path: &'a Path, header: &Header) -> Result<Self> {
        let header = encode(header, path)?;
        let mut writer = Self { out, path, written: 0, hastened: 0, head: Xxh3::new(), frames: Vec::new() };
        let mut prelude = MAGIC.to_vec();
        prelude.extend_from_slice(&CHECKPOINT_FORMAT.to_le_bytes());
        prelude.extend_from_slice(&u32::try_from(header.len()).unwrap_or(u32::MAX).to_le_bytes());
        prelude.extend_from_slice(&header);
        writer.head.update(&prelude);
        writer.write(&prelude)?;
        Ok(writer)
    }

    /// Appends a frame of data.
    ///
    /// # Errors
    /// Whatever write(2) says.
    pub fn frame(&mut self, frame: &Frame) -> Result<()> {
        self.frames.push(frame.info);
        self.write(&frame.stored)?;
        if let Some(length) = NonZeroU64::new(self.written - self.hastened).filter(|length| length.get() >= HASTEN) {
            // Linux begins to write what is no longer needed (mm/fadvise.c), so that the disk works while we do.
            let _advice = fadvise(&*self.out, self.hastened, Some(length), Advice::DontNeed);
            self.hastened = self.written;
        }
        Ok(())
    }

    /// Ends the checkpoint with its changes, which must be in path order; where there is none, none is meant. Nothing is
    /// synced here.
    ///
    /// # Errors
    /// Whatever zstd or write(2) says.
    pub fn finish(
        mut self,
        changes: impl IndexedParallelIterator<Item = Option<Change>>,
        level: i32,
    ) -> Result<Written> {
        // What `Index` is in postcard's words, in pieces that several threads make, encode and compress.
        let pack = |raw: &[u8]| {
            let packed = zstd::bulk::compress(raw, level).at("zstd", self.path)?;
            Ok::<_, SystemError>((raw.len(), packed))
        };
        let pieces = changes.chunks(PIECE).map(|changes| {
            let changes: Vec<Change> = changes.into_iter().flatten().collect();
            let encoded = changes.iter().try_fold(Vec::new(), |raw, change| postcard::to_extend(change, raw));
            Ok::<_, SystemError>((changes.len(), pack(&encodable(encoded, self.path)?)?))
        });
        let pieces = pieces.collect::<Result<Vec<_>, _>>()?;
        let mut head = encode(&self.frames, self.path)?;
        head.extend(encode(&pieces.iter().map(|(count, _)| count).sum::<usize>(), self.path)?);
        let (mut raw, mut index) = pack(&head)?;
        for (_, (length, piece)) in pieces {
            raw += length;
            index.extend(piece);
        }
        let trailer = Trailer { at: self.written, len: index.len() as u64, raw: raw as u64 }.to_bytes();
        self.head.update(&index);
        self.head.update(&trailer);
        let digest = Digest(self.head.digest128());
        self.write(&index)?;
        self.write(&[&trailer[..], &digest.0.to_le_bytes(), &END].concat())?;
        Ok(Written { digest, bytes: self.written })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), SystemError> {
        self.out.write_all(bytes).at("write", self.path)?;
        self.written += bytes.len() as u64;
        Ok(())
    }
}

fn encode(value: &impl serde::Serialize, path: &Path) -> Result<Vec<u8>, SystemError> {
    encodable(postcard::to_stdvec(value), path)
}

fn encodable<T>(encoded: postcard::Result<T>, path: &Path) -> Result<T, SystemError> {
    encoded.map_err(|error| std::io::Error::new(std::io::ErrorKind::InvalidInput, error)).at("encode", path)
}
