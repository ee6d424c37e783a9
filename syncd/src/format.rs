//! The checkpoint file, as docs/format.md specifies it: header, data in zstd frames, index, trailer.
//!
//! The index has the digest of every frame, and the trailer has one over header and index, which is that of the
//! checkpoint: it is checked whenever a file is opened, and those of the frames before a merge writes anything, and
//! whenever a frame is read. Numbers are little endian.

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
/// The most data in one frame, before compression.
pub const FRAME: usize = 1 << 20;
/// The length of what stands before the header: magic, format version, length of the header.
const PRELUDE: usize = 16;
/// The length of the trailer.
const TRAILER: usize = 48;
/// By how much the index is compressed at the most: zstd makes four bytes of a block of 128 KiB (RFC 8878, 3.1.1.2). Deep
/// trees of long names come near.
const INDEX_RATIO: u64 = 32768;
/// The highest number of a checkpoint: what ten digits can hold, those of its name.
pub(crate) const SEQUENCE_MAX: u64 = 9_999_999_999;

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
    /// Bytes that were written to the disk for the target before it, in that boot.
    pub written_in_boot: u64,
    /// The same, ever.
    pub written_in_all: u64,
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
        /// That checkpoint's digest.
        predecessor: Digest,
    },
}

/// What stands between the data and the trailer, as it is read; [`write::Writer::finish`] writes it in pieces.
#[derive(Debug, Deserialize)]
struct Index {
    /// The frames of data, in order.
    frames: Vec<FrameInfo>,
    /// The changes, in path order.
    changes: Vec<Change>,
}

/// What the index says of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct FrameInfo {
    /// The length of its data.
    raw: u32,
    /// Its length in the file: shorter where it is compressed, else the same.
    stored: u32,
    /// The digest of its bytes in the file.
    digest: Digest,
}

/// What the trailer says of the index, in its order in the file; the digest and [`END`] follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Trailer {
    /// Where it begins.
    at: u64,
    /// Its compressed length.
    len: u64,
    /// Its length before compression.
    raw: u64,
}

impl Trailer {
    fn to_bytes(self) -> [u8; 24] {
        let mut bytes = [0; 24];
        for (slot, value) in bytes.chunks_exact_mut(8).zip([self.at, self.len, self.raw]) {
            slot.copy_from_slice(&value.to_le_bytes());
        }
        bytes
    }

    fn from_bytes(bytes: &[u8; 24]) -> Self {
        let (numbers, _) = bytes.as_chunks::<8>();
        let [at, len, raw] = [numbers[0], numbers[1], numbers[2]].map(u64::from_le_bytes);
        Self { at, len, raw }
    }
}
