//! Digests of contents.
//!
//! A file is hashed in blocks of 128 KiB, each with XXH3-128, seeded with a random number of the chain. Blocks of zeros
//! are left out: a hole costs nothing, however long, and a file has one digest however its file system stores it. The
//! digest of a file is a function of its length and its blocks, which can be hashed in any order.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use xxhash_rust::xxh3::{Xxh3, xxh3_128_with_seed};

/// The size of a block in bytes.
pub const BLOCK: usize = 128 * 1024;

/// An XXH3-128 digest. It finds damage and change; it is no defence against somebody who forges files, and none is
/// needed: only root writes where checkpoints are, and who writes into a target does not know the seed.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest(pub u128);

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.to_le_bytes().serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        <[u8; 16]>::deserialize(deserializer).map(|bytes| Self(u128::from_le_bytes(bytes)))
    }
}

/// A block of a file that holds anything but zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Block {
    /// Its number, from 0.
    pub number: u64,
    /// The digest of its bytes.
    pub digest: Digest,
}

impl Block {
    /// The block `number` with these bytes; `None` where they are all zeros.
    #[must_use]
    pub fn of(number: u64, bytes: &[u8], seed: u64) -> Option<Self> {
        (!is_zero(bytes)).then(|| Self { number, digest: of_bytes(bytes, seed) })
    }
}

/// The digest of a file that has these blocks. That of a file of one block is the block's: most files have no more.
#[must_use]
pub fn of_file(size: u64, blocks: &[Block], seed: u64) -> Digest {
    if let ([block], true) = (blocks, size <= BLOCK as u64) {
        return block.digest;
    }
    let mut all = Xxh3::with_seed(seed);
    for block in blocks {
        all.update(&block.number.to_le_bytes());
        all.update(&block.digest.0.to_le_bytes());
    }
    all.update(&size.to_le_bytes());
    Digest(all.digest128())
}

/// The digest of bytes that are at hand.
#[must_use]
pub fn of_bytes(bytes: &[u8], seed: u64) -> Digest {
    Digest(xxh3_128_with_seed(bytes, seed))
}

fn is_zero(bytes: &[u8]) -> bool {
    let (head, words) = bytes.split_at(bytes.len() % 16);
    head.iter().all(|&byte| byte == 0) && words.chunks_exact(16).all(|word| word == [0; 16])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn whole(bytes: &[u8]) -> Digest {
        let blocks: Vec<_> =
            bytes.chunks(BLOCK).zip(0..).filter_map(|(bytes, number)| Block::of(number, bytes, 7)).collect();
        of_file(bytes.len() as u64, &blocks, 7)
    }

    #[test]
    fn length_and_content_count() {
        assert_ne!(whole(&[0; 10]), whole(&[0; 11]));
        assert_ne!(whole(&vec![0; BLOCK]), whole(&vec![0; 2 * BLOCK]));
        assert_ne!(whole(b"a"), whole(b"b"));
        assert_ne!(whole(b""), whole(b"\0"));
        let mut long = vec![1; 3 * BLOCK];
        let before = whole(&long);
        long[2 * BLOCK] = 2;
        assert_ne!(whole(&long), before);
        // A block has to be where it was.
        long[2 * BLOCK] = 1;
        long[..BLOCK].fill(0);
        let first_missing = whole(&long);
        long[..BLOCK].fill(1);
        long[BLOCK..2 * BLOCK].fill(0);
        assert_ne!(whole(&long), first_missing);
    }
}
