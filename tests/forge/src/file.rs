//! One checkpoint file, put together by hand as docs/format.md says, from parts that may be anything. Its digests are
//! right, so that what stands behind them is reached.

use serde::Serialize;
use syncd::digest::{Digest, of_bytes};
use syncd::entry::{Base, State};
use syncd::format::{END, Header, MAGIC};

/// What the index says of a frame.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Frame {
    /// The length of its piece of the data.
    pub raw: u32,
    /// Its length in the file.
    pub stored: u32,
    /// The digest of its bytes in the file.
    pub digest: Digest,
}

/// A change whose path may be any bytes.
#[derive(Debug, Clone, Serialize)]
pub struct Change {
    /// The path.
    #[serde(with = "serde_bytes")]
    pub path: Vec<u8>,
    /// What it is now.
    pub state: State,
    /// What lower had.
    pub base: Option<Base>,
}

/// A checkpoint file in the making.
#[derive(Debug, Clone)]
pub struct Forge {
    /// The header as it will stand in the file.
    pub header: Vec<u8>,
    /// What stands between header and index.
    pub data: Vec<u8>,
    /// What the index says of the data.
    pub frames: Vec<Frame>,
    /// The changes, in any order.
    pub changes: Vec<Change>,
}

impl Forge {
    /// A file without data and changes.
    #[must_use]
    pub fn new(header: &Header) -> Self {
        Self { header: encode(header), data: Vec::new(), frames: Vec::new(), changes: Vec::new() }
    }

    /// Adds a frame that is stored as it is.
    #[must_use]
    pub fn frame(self, bytes: &[u8]) -> Self {
        let raw = u32::try_from(bytes.len()).unwrap();
        self.packed_frame(raw, bytes)
    }

    /// Adds a frame with these bytes in the file, which claims to hold `raw` bytes.
    #[must_use]
    pub fn packed_frame(mut self, raw: u32, stored: &[u8]) -> Self {
        let length = u32::try_from(stored.len()).unwrap();
        self.frames.push(Frame { raw, stored: length, digest: of_bytes(stored, 0) });
        self.data.extend_from_slice(stored);
        self
    }

    /// Adds a change.
    #[must_use]
    pub fn change(mut self, path: &[u8], state: State, base: Option<Base>) -> Self {
        self.changes.push(Change { path: path.to_vec(), state, base });
        self
    }

    /// The index before it is compressed.
    #[must_use]
    pub fn index(&self) -> Vec<u8> {
        encode(&(&self.frames, &self.changes))
    }

    /// The file.
    #[must_use]
    pub fn build(&self) -> Vec<u8> {
        self.build_with(&self.index())
    }

    /// The file with another index.
    #[must_use]
    pub fn build_with(&self, index: &[u8]) -> Vec<u8> {
        let packed = zstd::bulk::compress(index, 1).unwrap();
        let mut file = MAGIC.to_vec();
        file.extend_from_slice(&1u32.to_le_bytes());
        file.extend_from_slice(&u32::try_from(self.header.len()).unwrap().to_le_bytes());
        file.extend_from_slice(&self.header);
        file.extend_from_slice(&self.data);
        let at = file.len() as u64;
        file.extend_from_slice(&packed);
        for number in [at, packed.len() as u64, index.len() as u64] {
            file.extend_from_slice(&number.to_le_bytes());
        }
        file.extend_from_slice(&[0; 16]);
        file.extend_from_slice(&END);
        seal(&mut file);
        file
    }
}

/// Where in a file the trailer begins.
#[must_use]
pub fn trailer_at(file: &[u8]) -> usize {
    file.len() - 48
}

/// Puts the right digest into a file whose other bytes were changed. Where its own numbers lead nowhere there is none.
pub fn seal(file: &mut [u8]) {
    let Some(trailer) = file.len().checked_sub(48).filter(|&at| at >= 16) else { return };
    let number = |at: usize| u64::from_le_bytes(file[at..at + 8].try_into().unwrap());
    let header_end = 16 + u32::from_le_bytes(file[12..16].try_into().unwrap()) as usize;
    let index = usize::try_from(number(trailer)).unwrap_or(usize::MAX);
    let end = index.saturating_add(usize::try_from(number(trailer + 8)).unwrap_or(usize::MAX));
    if let (Some(head), Some(index)) = (file.get(..header_end), file.get(index..end)) {
        let digest = of_bytes(&[head, index, &file[trailer..trailer + 24]].concat(), 0);
        file[trailer + 24..trailer + 40].copy_from_slice(&digest.0.to_le_bytes());
    }
}

/// The digest of a file, as the next one names it.
#[must_use]
pub fn digest(file: &[u8]) -> Digest {
    let at = trailer_at(file) + 24;
    Digest(u128::from_le_bytes(file[at..at + 16].try_into().unwrap()))
}

/// A value in postcard.
#[must_use]
pub fn encode(value: &impl Serialize) -> Vec<u8> {
    postcard::to_stdvec(value).unwrap()
}

/// A number as postcard writes it.
#[must_use]
pub fn varint(number: u64) -> Vec<u8> {
    encode(&number)
}
