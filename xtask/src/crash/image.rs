//! The contents of a disk as a value: blocks that are shared between images until they differ, and a digest that is the
//! same for the same contents, whatever the order of the writes was.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use anyhow::{Context, Result};
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use xxhash_rust::xxh3::xxh3_128_with_seed;

/// The unit of sharing. A disk writes as much as this whole or not at all.
pub(crate) const BLOCK: usize = 4096;

/// The contents of a disk. Blocks of zeros are left out.
#[derive(Debug, Clone, Default)]
pub(crate) struct Image {
    blocks: BTreeMap<u64, Arc<Block>>,
    /// The sum of the blocks' digests.
    sum: u128,
}

#[derive(Debug)]
struct Block {
    bytes: [u8; BLOCK],
    digest: u128,
}

impl Image {
    /// What is in a file, whose length is a multiple of a block's.
    pub(crate) fn read(file: &File) -> Result<Self> {
        let mut image = Self::default();
        let mut bytes = [0; BLOCK];
        for number in blocks_with_data(file)? {
            file.read_exact_at(&mut bytes, number * BLOCK as u64).context("pread of an image")?;
            image.set(number, &bytes);
        }
        Ok(image)
    }

    /// The block of a number; nothing for zeros.
    pub(crate) fn block(&self, number: u64) -> Option<&[u8; BLOCK]> {
        self.blocks.get(&number).map(|block| &block.bytes)
    }

    /// The numbers of all blocks that are not zeros, in order.
    pub(crate) fn numbers(&self) -> impl Iterator<Item = u64> + '_ {
        self.blocks.keys().copied()
    }

    /// Writes bytes, within one block or over several.
    pub(crate) fn write(&mut self, offset: u64, bytes: &[u8]) {
        for (offset, piece) in pieces(offset, bytes) {
            let (number, within) = place(offset);
            let mut block = self.block(number).copied().unwrap_or([0; BLOCK]);
            block[within..within + piece.len()].copy_from_slice(piece);
            self.set(number, &block);
        }
    }

    fn set(&mut self, number: u64, bytes: &[u8; BLOCK]) {
        let digest = digest(number, bytes);
        let old = match digest {
            0 => self.blocks.remove(&number),
            _ => self.blocks.insert(number, Arc::new(Block { bytes: *bytes, digest })),
        };
        self.sum = self.sum.wrapping_sub(old.map_or(0, |old| old.digest)).wrapping_add(digest);
    }

    /// The same for the same contents.
    #[cfg(test)]
    pub(crate) fn digest(&self) -> u128 {
        self.sum
    }

    /// The digest after more writes, which are not made.
    pub(crate) fn digest_with<'a>(&self, writes: impl Iterator<Item = (u64, &'a [u8])>) -> u128 {
        let mut changed: HashMap<u64, [u8; BLOCK]> = HashMap::new();
        for (offset, bytes) in writes {
            for (offset, piece) in pieces(offset, bytes) {
                let (number, within) = place(offset);
                let block = changed.entry(number).or_insert_with(|| self.block(number).copied().unwrap_or([0; BLOCK]));
                block[within..within + piece.len()].copy_from_slice(piece);
            }
        }
        changed.iter().fold(self.sum, |sum, (&number, bytes)| {
            let old = self.blocks.get(&number).map_or(0, |block| block.digest);
            sum.wrapping_sub(old).wrapping_add(digest(number, bytes))
        })
    }
}

/// The number of the block that a byte is in, and where in it.
fn place(offset: u64) -> (u64, usize) {
    (offset / BLOCK as u64, usize::try_from(offset % BLOCK as u64).unwrap_or_default())
}

/// The digest of one block, which depends on where it is; 0 for zeros.
fn digest(number: u64, bytes: &[u8; BLOCK]) -> u128 {
    if *bytes == [0; BLOCK] { 0 } else { xxh3_128_with_seed(bytes, number) }
}

/// A write, cut where blocks end.
pub(crate) fn pieces(mut offset: u64, mut bytes: &[u8]) -> impl Iterator<Item = (u64, &[u8])> {
    std::iter::from_fn(move || {
        if bytes.is_empty() {
            return None;
        }
        let room = BLOCK - usize::try_from(offset % BLOCK as u64).unwrap_or_default();
        let (piece, rest) = bytes.split_at(room.min(bytes.len()));
        let start = offset;
        offset += piece.len() as u64;
        bytes = rest;
        Some((start, piece))
    })
}

/// The numbers of the blocks of a file that are not known to be holes, in order.
pub(crate) fn blocks_with_data(file: &File) -> Result<Vec<u64>> {
    let mut numbers = Vec::new();
    let mut at = 0;
    loop {
        let data = match seek(file, SeekFrom::Data(at)) {
            Ok(data) => data,
            Err(Errno::NXIO) => return Ok(numbers),
            Err(error) => return Err(error).context("lseek SEEK_DATA in an image"),
        };
        at = seek(file, SeekFrom::Hole(data)).context("lseek SEEK_HOLE in an image")?;
        let first = data / BLOCK as u64;
        let next = numbers.last().map_or(first, |last| first.max(last + 1));
        numbers.extend(next..at.div_ceil(BLOCK as u64));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_is_cut_where_blocks_end() {
        let bytes = [1; 3 * BLOCK];
        let cut: Vec<_> = pieces(BLOCK as u64 - 512, &bytes).map(|(at, piece)| (at, piece.len())).collect();
        let block = BLOCK as u64;
        assert_eq!(cut, [(block - 512, 512), (block, BLOCK), (2 * block, BLOCK), (3 * block, BLOCK - 512)]);
    }

    #[test]
    fn the_digest_is_of_the_contents() {
        let mut one = Image::default();
        assert_eq!(one.digest(), 0);
        one.write(512, &[1; 1024]);
        one.write(9000, &[2; 5]);
        let mut other = Image::default();
        other.write(9000, &[2; 5]);
        other.write(512, &[3; 1024]);
        assert_ne!(one.digest(), other.digest());
        other.write(512, &[1; 1024]);
        other.write(1 << 20, &[0; BLOCK]);
        assert_eq!(one.digest(), other.digest());
        let writes = [(9000, &[7; 5][..]), (BLOCK as u64 - 1, &[8; 2]), (512, &[0; 1024])];
        let foreseen = one.digest_with(writes.into_iter());
        assert_ne!(foreseen, one.digest());
        for (offset, bytes) in writes {
            one.write(offset, bytes);
        }
        assert_eq!(foreseen, one.digest());
        // The same bytes in another place are something else.
        let mut moved = Image::default();
        moved.write(512 + BLOCK as u64, &[1; 1024]);
        moved.write(9000, &[2; 5]);
        assert_ne!(other.digest(), moved.digest());
    }

    #[test]
    fn a_file_is_read_with_its_holes() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        file.write_all_at(&[5; BLOCK], 8 * BLOCK as u64).unwrap();
        let image = Image::read(&file).unwrap();
        assert_eq!(image.numbers().collect::<Vec<_>>(), [8]);
        assert_eq!(image.block(8), Some(&[5; BLOCK]));
    }
}
