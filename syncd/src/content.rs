//! Reads the contents of a regular file block by block, holes told from data, while others may be writing to it.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use ephemeral_overlay::error::{At, SystemError};
use rayon::prelude::*;
use rustix::fs::{SeekFrom, fstat, seek};
use rustix::io::Errno;

use crate::digest::{BLOCK, Block, Digest, of_file};
use crate::error::Result;
use crate::scan::Stamp;

/// How often a file that changes while it is read is read before it is taken as it is.
pub const TRIES: usize = 3;
/// A long file is hashed by several threads, in pieces of this length: whole blocks.
const PIECE: u64 = 32 * BLOCK_LEN;
const BLOCK_LEN: u64 = BLOCK as u64;

/// What a complete read found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Read {
    /// What the file was when it was begun with.
    pub stamp: Stamp,
    /// Length in bytes.
    pub size: u64,
    /// Digest of the contents.
    pub digest: Digest,
    /// The blocks that hold anything but zeros.
    pub blocks: Vec<Block>,
    /// It changed during each of [`TRIES`] reads.
    pub fuzzy: bool,
}

/// A block as it was read.
#[derive(Debug)]
pub struct BlockRead<'a> {
    /// Where it begins in the file.
    pub offset: u64,
    /// Its bytes; where the file has a hole they are zeros.
    pub bytes: &'a [u8],
    /// Which of them are data, ascending.
    pub data: &'a [Range<usize>],
}

impl BlockRead<'_> {
    /// Its number, from 0.
    #[must_use]
    pub fn number(&self) -> u64 {
        self.offset / BLOCK_LEN
    }

    /// Its digest; `None` where all of it is zeros.
    #[must_use]
    pub fn digest(&self, seed: u64) -> Option<Block> {
        Block::of(self.number(), self.bytes, seed)
    }
}

/// The stamp of an open file.
///
/// # Errors
/// Whatever fstat(2) says.
pub fn stamp(file: &File, path: &Path) -> Result<Stamp, SystemError> {
    Ok(Stamp::of(&fstat(file).at("fstat", path)?))
}

/// Reads the whole file and hashes it: status, contents, status, again while the two differ.
///
/// # Errors
/// Whatever fstat(2), lseek(2) or pread(2) says.
pub fn hash(file: &File, seed: u64, buffer: &mut Vec<u8>, path: &Path) -> Result<Read> {
    let before = stamp(file, path)?;
    hash_with(file, before, seed, buffer, path, || Ok(((), stamp(file, path)?))).map(|(read, ())| read)
}

/// The same, with a look at the file after each read that has its stamp, too. `before` is its stamp now.
///
/// # Errors
/// As [`hash`], and whatever the look says.
pub fn hash_with<T>(
    file: &File,
    mut before: Stamp,
    seed: u64,
    buffer: &mut Vec<u8>,
    path: &Path,
    look: impl Fn() -> Result<(T, Stamp)>,
) -> Result<(Read, T)> {
    let mut tries = 1;
    loop {
        let (size, blocks) = hash_once(file, &before, seed, buffer, path)?;
        let (looked, after) = look()?;
        let fuzzy = before != after;
        if !fuzzy || tries == TRIES {
            let digest = of_file(size, &blocks, seed);
            return Ok((Read { stamp: before, size, digest, blocks, fuzzy }, looked));
        }
        before = after;
        tries += 1;
    }
}

/// The digest of a file that nobody changes, of which this is the stamp.
///
/// # Errors
/// Whatever lseek(2) or pread(2) says.
pub fn digest(file: &File, stamp: &Stamp, seed: u64, path: &Path) -> Result<Digest> {
    let (size, blocks) = hash_once(file, stamp, seed, &mut Vec::new(), path)?;
    Ok(of_file(size, &blocks, seed))
}

fn hash_once(file: &File, stamp: &Stamp, seed: u64, buffer: &mut Vec<u8>, path: &Path) -> Result<(u64, Vec<Block>)> {
    let hash = |range, buffer: &mut Vec<u8>| {
        let mut blocks = Vec::new();
        let end = blocks_of(file, stamp, range, buffer, path, |block| {
            blocks.extend(block.digest(seed));
            Ok(())
        })?;
        Ok((end, blocks))
    };
    if stamp.size <= 2 * PIECE {
        return hash(0..stamp.size, buffer);
    }
    let pieces = pieces(file, stamp, PIECE, path)?;
    let hashed = pieces.par_iter().map_init(Vec::new, |buffer, piece| hash(piece.clone(), buffer));
    let mut all = Vec::new();
    for ((end, blocks), piece) in hashed.collect::<Result<Vec<_>>>()?.into_iter().zip(&pieces) {
        all.extend(blocks);
        if end < piece.end {
            // It was cut off: what was read behind is of another moment.
            return Ok((end, all));
        }
    }
    Ok((stamp.size, all))
}

/// Cuts a file into pieces of some whole blocks; those that lie in a hole are left out.
///
/// # Errors
/// Whatever lseek(2) says.
pub fn pieces(file: &File, stamp: &Stamp, length: u64, path: &Path) -> Result<Vec<Range<u64>>> {
    let mut pieces = Vec::new();
    let mut at = 0;
    while at < stamp.size {
        if !stamp.is_dense() {
            let Some(data) = next_data(file, at, path)?.filter(|&data| data < stamp.size) else {
                let now = self::stamp(file, path)?.size;
                if now < stamp.size {
                    // Cut off since: whoever reads where it ends now will say so.
                    let last = at.max(now - now % length);
                    pieces.push(last..last.saturating_add(length).min(stamp.size));
                }
                break;
            };
            at = data - data % length;
        }
        let end = at.saturating_add(length).min(stamp.size);
        pieces.push(at..end);
        at = end;
    }
    Ok(pieces)
}

/// Hands out the blocks that begin in `range`, as far as the file reached by `stamp`; those that lie in a hole are left
/// out. Returns where the file ended: at the end of the range, or before it.
///
/// # Errors
/// Whatever lseek(2), pread(2) or `each` says.
pub fn blocks_of(
    file: &File,
    stamp: &Stamp,
    range: Range<u64>,
    buffer: &mut Vec<u8>,
    path: &Path,
    mut each: impl FnMut(BlockRead<'_>) -> Result<()>,
) -> Result<u64> {
    let mut end = range.end.min(stamp.size);
    let is_dense = stamp.is_dense();
    let mut data = Vec::new();
    let mut at = range.start;
    while at < end {
        if !is_dense {
            let next = next_data(file, at, path)?;
            if next.is_none() {
                // A hole, or cut off since.
                end = end.min(self::stamp(file, path)?.size.max(at));
            }
            let next = next.unwrap_or(end);
            at = at.max(next - next % BLOCK_LEN).min(end);
            if at == end {
                break;
            }
        }
        let length = usize::try_from((end - at).min(BLOCK_LEN)).unwrap_or(BLOCK);
        if buffer.len() < length {
            buffer.resize(length, 0);
        }
        data.clear();
        if is_dense {
            data.push(0..length);
        } else {
            segments(file, at, length, &mut data, path)?;
            buffer[..length].fill(0);
        }
        let mut read = length;
        for segment in &mut data {
            let filled = fill(file, at, &mut buffer[segment.clone()], segment.start, path)?;
            if filled < segment.len() {
                // Cut off since.
                segment.end = segment.start + filled;
                read = segment.end;
                break;
            }
        }
        if !is_dense && data.last().is_none_or(|last| last.end < read) {
            // A hole at its end, or cut off since.
            let now = self::stamp(file, path)?.size.saturating_sub(at);
            read = read.min(usize::try_from(now).unwrap_or(read));
        }
        data.retain(|segment| segment.start < read);
        if let Some(last) = data.last_mut() {
            last.end = last.end.min(read);
        }
        if read > 0 {
            each(BlockRead { offset: at, bytes: &buffer[..read], data: &data })?;
        }
        at += read as u64;
        if read < length {
            break;
        }
    }
    Ok(at)
}

/// Reads until the buffer is full or the file ends; returns how far it came.
fn fill(file: &File, block: u64, buffer: &mut [u8], within: usize, path: &Path) -> Result<usize, SystemError> {
    let mut done = 0;
    while done < buffer.len() {
        match file.read_at(&mut buffer[done..], block + (within + done) as u64).at("pread64", path)? {
            0 => break,
            length => done += length,
        }
    }
    Ok(done)
}

/// The parts of a block that are data.
fn segments(
    file: &File,
    block: u64,
    length: usize,
    data: &mut Vec<Range<usize>>,
    path: &Path,
) -> Result<(), SystemError> {
    let end = block + length as u64;
    let within = |at: u64| usize::try_from(at.min(end) - block).unwrap_or(length);
    let mut at = block;
    while let Some(start) = next_data(file, at, path)?.filter(|&start| start < end) {
        at = match seek(file, SeekFrom::Hole(start)) {
            Ok(hole) => hole,
            // Cut off since: the read will say so.
            Err(Errno::NXIO) => end,
            Err(error) => return Err(error).at("lseek", path),
        };
        data.push(within(start)..within(at));
        if at >= end {
            break;
        }
    }
    Ok(())
}

/// Where the next data is; `None` where there is no more.
fn next_data(file: &File, at: u64, path: &Path) -> Result<Option<u64>, SystemError> {
    match seek(file, SeekFrom::Data(at)) {
        Err(Errno::NXIO) => Ok(None),
        other => other.at("lseek", path).map(Some),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Seek, Write};

    use super::*;

    #[test]
    fn holes_cost_nothing_and_do_not_change_the_digest() {
        let mut sparse = tempfile::tempfile().unwrap();
        sparse.seek(std::io::SeekFrom::Start(300 << 20)).unwrap();
        sparse.write_all(b"end").unwrap();
        sparse.set_len((300 << 20) + 5000).unwrap();
        let path = Path::new("sparse");
        let stamp = stamp(&sparse, path).unwrap();
        let mut data = 0;
        let end = blocks_of(&sparse, &stamp, 0..u64::MAX, &mut Vec::new(), path, |block| {
            data += block.data.iter().map(ExactSizeIterator::len).sum::<usize>();
            Ok(())
        });
        assert_eq!(end.unwrap(), (300 << 20) + 5000);
        assert!((3..=64 * 1024).contains(&data), "{data} bytes of data");

        let mut dense = tempfile::tempfile().unwrap();
        for _ in 0..300 {
            dense.write_all(&vec![0; 1 << 20]).unwrap();
        }
        dense.write_all(b"end").unwrap();
        dense.write_all(&vec![0; 4997]).unwrap();
        let first = hash(&sparse, 1, &mut Vec::new(), path).unwrap();
        let second = hash(&dense, 1, &mut Vec::new(), Path::new("dense")).unwrap();
        assert_eq!((second.size, second.digest, second.blocks), (first.size, first.digest, first.blocks));
    }

    #[test]
    fn a_sparse_file_that_is_cut_off_ends_there() {
        let path = Path::new("sparse");
        for (blocks, cut) in [(400, 3 * BLOCK + 500), (400, 2 * BLOCK), (400, 32 * BLOCK), (400, 0), (1, 500), (2, 0)] {
            let full = blocks * BLOCK;
            let mut sparse = tempfile::tempfile().unwrap();
            sparse.write_all(&vec![7; full - BLOCK / 2]).unwrap();
            sparse.set_len(full as u64).unwrap();
            let before = stamp(&sparse, path).unwrap();
            assert!(!before.is_dense());
            sparse.set_len(cut as u64).unwrap();
            let end = blocks_of(&sparse, &before, 0..u64::MAX, &mut Vec::new(), path, |_| Ok(())).unwrap();
            assert_eq!(end, cut as u64, "of {blocks}");
            let (size, _) = hash_once(&sparse, &before, 1, &mut Vec::new(), path).unwrap();
            assert_eq!(size, cut as u64, "of {blocks}, in pieces");
        }
    }

    #[test]
    fn every_length_around_a_block_is_read_whole() {
        for length in [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 1234, 70 * BLOCK + 5] {
            let bytes: Vec<u8> = (0..length).map(|index| u8::try_from(index * 7 % 251).unwrap()).collect();
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(&bytes).unwrap();
            let read = hash(&file, 3, &mut Vec::new(), Path::new("file")).unwrap();
            let blocks: Vec<_> =
                bytes.chunks(BLOCK).zip(0..).filter_map(|(bytes, number)| Block::of(number, bytes, 3)).collect();
            assert_eq!((read.size, &read.blocks), (length as u64, &blocks), "{length}");
        }
    }
}
