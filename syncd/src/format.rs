//! The checkpoint file, as docs/format.md specifies it: header, data in zstd frames, index, trailer.
//!
//! The trailer holds two digests. One is over header and index and is checked whenever a file is opened; one is over
//! every byte and is checked before a merge writes anything. Numbers are little endian.

pub mod read;
pub mod write;

use std::path::PathBuf;

use ephemeral_overlay::token::Token;
use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::entry::Change;

/// The first bytes of a checkpoint.
pub const MAGIC: [u8; 8] = *b"EOVLCKPT";
/// The last bytes of a checkpoint.
pub const END: [u8; 8] = *b"EOVLEND\n";
/// The length of the data in each zstd frame but the last, before compression.
pub const FRAME: usize = 1 << 20;
/// The length of what stands before the header: magic, format version, length of the header.
const PRELUDE: usize = 16;
/// The length of the trailer.
const TRAILER: usize = 72;

/// What a checkpoint says about itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// The target.
    pub target: PathBuf,
    /// Lower's token; `None` where lower has none yet.
    pub token: Option<Token>,
    /// Sequence number: one more than the target's last checkpoint, across merges.
    pub sequence: u64,
    /// What it is relative to.
    pub relation: Relation,
    /// The kernel's `boot_id` of the boot it was taken in.
    pub boot_id: String,
    /// The seed of all content digests of the chain.
    pub seed: u64,
    /// Upper could hold `user.*` attributes. Where it could not (tmpfs before Linux 6.6) a merge keeps lower's.
    pub user_xattrs: bool,
}

/// What a checkpoint is relative to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Relation {
    /// To lower: everything that upper held. All checkpoints before it are void.
    Full {
        /// The last checkpoint that it supersedes, if there was one in the chain.
        supersedes: Option<u64>,
    },
    /// To the checkpoint before it.
    Delta {
        /// That checkpoint's digest over every byte.
        predecessor: Digest,
    },
}

/// What stands between the data and the trailer.
#[derive(Debug, Serialize, Deserialize)]
struct Index {
    /// The compressed length of each frame of data, in order.
    frames: Vec<u32>,
    /// The changes, in path order.
    changes: Vec<Change>,
}

/// The trailer, in its order in the file; two digests and [`END`] follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Trailer {
    /// Where the index begins.
    index_at: u64,
    /// Its compressed length.
    index_len: u64,
    /// Its length before compression.
    index_raw: u64,
    /// The length of all data before compression.
    data_len: u64,
}

impl Trailer {
    fn to_bytes(self) -> [u8; 32] {
        let mut bytes = [0; 32];
        for (slot, value) in
            bytes.chunks_exact_mut(8).zip([self.index_at, self.index_len, self.index_raw, self.data_len])
        {
            slot.copy_from_slice(&value.to_le_bytes());
        }
        bytes
    }

    fn from_bytes(bytes: &[u8; 32]) -> Self {
        let (numbers, _) = bytes.as_chunks::<8>();
        let [index_at, index_len, index_raw, data_len] =
            [numbers[0], numbers[1], numbers[2], numbers[3]].map(u64::from_le_bytes);
        Self { index_at, index_len, index_raw, data_len }
    }
}
