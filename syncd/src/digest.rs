//! Digests of contents.
//!
//! A file's digest is XXH3-128 (seeded per chain) over the numbers and digests of those of its 128 KiB blocks that hold
//! anything but zeros, and its length. So a hole costs nothing, however long, and a file has one digest however its file
//! system stores it.

use std::fmt;

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::{Xxh3, xxh3_128_with_seed};

/// The size of a block in bytes.
pub const BLOCK: usize = 128 * 1024;

/// An XXH3-128 digest. It finds damage and change; it is no defence against somebody who forges files, and none is
/// needed: only root writes where checkpoints are.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Digest(pub u128);

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// Takes a file's contents in, in order, and gives its digest.
pub struct FileHasher {
    seed: u64,
    blocks: Xxh3,
    /// The number of the block that is being filled.
    number: u64,
    partial: Vec<u8>,
    size: u64,
}

impl fmt::Debug for FileHasher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FileHasher").field("size", &self.size).finish_non_exhaustive()
    }
}

impl FileHasher {
    /// A hasher for one file.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self { seed, blocks: Xxh3::with_seed(seed), number: 0, partial: Vec::new(), size: 0 }
    }

    /// The next bytes.
    pub fn update(&mut self, mut bytes: &[u8]) {
        self.size += bytes.len() as u64;
        if !self.partial.is_empty() {
            let take = bytes.len().min(BLOCK - self.partial.len());
            self.partial.extend_from_slice(&bytes[..take]);
            bytes = &bytes[take..];
            if self.partial.len() < BLOCK {
                return;
            }
            let block = std::mem::take(&mut self.partial);
            self.block(&block);
            self.partial = block;
            self.partial.clear();
        }
        let mut blocks = bytes.chunks_exact(BLOCK);
        for block in &mut blocks {
            self.block(block);
        }
        self.partial.extend_from_slice(blocks.remainder());
    }

    /// The next `length` bytes, which are zeros.
    pub fn update_zeros(&mut self, mut length: u64) {
        const ZEROS: [u8; 4096] = [0; 4096];
        while length > 0 {
            if self.partial.is_empty() && length >= BLOCK as u64 {
                let blocks = length / BLOCK as u64;
                self.number += blocks;
                self.size += blocks * BLOCK as u64;
                length -= blocks * BLOCK as u64;
            } else {
                let room = (BLOCK - self.partial.len()).min(ZEROS.len());
                let take = usize::try_from(length).map_or(room, |length| room.min(length));
                self.update(&ZEROS[..take]);
                length -= take as u64;
            }
        }
    }

    /// The digest of all that was taken in.
    #[must_use]
    pub fn finish(mut self) -> Digest {
        let last = std::mem::take(&mut self.partial);
        if !last.is_empty() {
            self.block(&last);
        }
        self.blocks.update(&self.size.to_le_bytes());
        Digest(self.blocks.digest128())
    }

    fn block(&mut self, block: &[u8]) {
        if !is_zero(block) {
            self.blocks.update(&self.number.to_le_bytes());
            self.blocks.update(&xxh3_128_with_seed(block, self.seed).to_le_bytes());
        }
        self.number += 1;
    }
}

fn is_zero(bytes: &[u8]) -> bool {
    let (head, words) = bytes.split_at(bytes.len() % 16);
    head.iter().all(|&byte| byte == 0) && words.chunks_exact(16).all(|word| word == [0; 16])
}

/// The digest of a short value.
#[must_use]
pub fn of_bytes(bytes: &[u8], seed: u64) -> Digest {
    Digest(xxh3_128_with_seed(bytes, seed))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn whole(bytes: &[u8]) -> Digest {
        let mut hasher = FileHasher::new(7);
        hasher.update(bytes);
        hasher.finish()
    }

    #[test]
    fn the_digest_does_not_depend_on_how_the_bytes_come() {
        let mut bytes: Vec<u8> = (0..3 * BLOCK + 1234).map(|index| u8::try_from(index % 251).unwrap()).collect();
        bytes[BLOCK - 100..2 * BLOCK + 5].fill(0);
        for piece in [1000, BLOCK - 1, BLOCK, BLOCK + 1] {
            let mut hasher = FileHasher::new(7);
            bytes.chunks(piece).for_each(|piece| hasher.update(piece));
            assert_eq!(hasher.finish(), whole(&bytes), "pieces of {piece}");
        }
        let mut hasher = FileHasher::new(7);
        hasher.update(&bytes[..BLOCK - 100]);
        hasher.update_zeros(BLOCK as u64 + 105);
        hasher.update(&bytes[2 * BLOCK + 5..]);
        assert_eq!(hasher.finish(), whole(&bytes));
    }

    #[test]
    fn length_and_content_count() {
        assert_ne!(whole(&[0; 10]), whole(&[0; 11]));
        assert_ne!(whole(&vec![0; BLOCK]), whole(&vec![0; 2 * BLOCK]));
        assert_ne!(whole(b"a"), whole(b"b"));
        assert_ne!(whole(b""), whole(b"\0"));
    }
}
