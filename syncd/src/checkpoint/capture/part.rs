//! A file, or a piece of a long one, as one thread read it: what the chain has already is referred to, the rest is data.

use std::ops::Range;
use std::sync::{PoisonError, RwLock};

use crate::chain::{Chain, FrameCache};
use crate::content::BlockRead;
use crate::digest::{BLOCK, Block};
use crate::entry::{Content, Stretch};
use crate::error::{Error, Result};

use super::super::known::Known;

/// In a block that changed, what is the same by pages is not written again.
const PAGE: usize = 4096;

/// What was read.
#[derive(Debug, Default)]
pub(super) struct Part {
    /// Where the piece ended, or the file before that.
    pub(super) end: u64,
    /// The blocks that hold anything but zeros.
    pub(super) blocks: Vec<Block>,
    pieces: Vec<Piece>,
}

/// Where some bytes of a file are.
#[derive(Debug)]
enum Piece {
    /// In the data of the same piece of work: it counts from its beginning.
    Here(Stretch),
    /// In what was written before.
    There(Stretch),
}

impl Part {
    /// The stretches, when the data of its piece of work begins at `base`.
    pub(super) fn stretches(&self, base: u64) -> impl Iterator<Item = Stretch> {
        self.pieces.iter().map(move |piece| match piece {
            Piece::Here(stretch) => Stretch { data: stretch.data + base, ..*stretch },
            Piece::There(stretch) => *stretch,
        })
    }
}

/// What a file was at the checkpoint before.
#[derive(Debug, Clone, Copy)]
pub(super) struct Previous<'a> {
    pub(super) chain: &'a Chain,
    pub(super) seq: u64,
    pub(super) content: &'a Content,
}

/// Takes the blocks of one file in.
#[derive(Debug)]
pub(super) struct Taker<'a> {
    pub(super) seed: u64,
    /// The checkpoint that is written.
    pub(super) sequence: u64,
    /// The number of the work that reads it.
    pub(super) number: u64,
    pub(super) known: &'a RwLock<Known>,
    pub(super) previous: Option<Previous<'a>>,
}

impl Taker<'_> {
    /// Takes a block; bytes that have to be written are appended to `data`.
    pub(super) fn block(
        &self,
        read: &BlockRead,
        part: &mut Part,
        data: &mut Vec<u8>,
        frames: &mut FrameCache,
    ) -> Result<()> {
        let block = read.digest(self.seed);
        part.blocks.extend(block);
        if block.is_some_and(|block| self.refer(block, part)) {
            return Ok(());
        }
        let old = match self.previous {
            Some(previous) if block.is_some() => previous.block(read, self.seed, frames)?,
            _ => None,
        };
        for segment in read.data {
            let mut at = segment.start;
            while at < segment.end {
                let page = if old.is_some() { (at / PAGE + 1) * PAGE } else { segment.end };
                let end = segment.end.min(page);
                match (&old, self.previous) {
                    (Some(old), Some(previous)) if old.has(at..end, read.bytes) => {
                        let back = self.sequence - previous.seq;
                        let range = read.offset + at as u64..read.offset + end as u64;
                        let stretches = previous.content.within(range);
                        part.pieces.extend(stretches.map(|old| Piece::There(Stretch { back: old.back + back, ..old })));
                    }
                    _ => {
                        let stretch = Stretch {
                            offset: read.offset + at as u64,
                            length: (end - at) as u64,
                            back: 0,
                            data: data.len() as u64,
                        };
                        part.pieces.push(Piece::Here(stretch));
                        data.extend_from_slice(&read.bytes[at..end]);
                    }
                }
                at = end;
            }
        }
        Ok(())
    }

    /// Refers to a block that was written before; whether there is one.
    pub(super) fn refer(&self, block: Block, part: &mut Part) -> bool {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        let offset = block.number * BLOCK as u64;
        let Some(stretches) = known.find(block.digest, offset, self.sequence, self.number) else { return false };
        part.pieces.extend(stretches.map(Piece::There));
        true
    }
}

/// What stood where a block was read.
enum Old {
    /// As many of its bytes, and no more.
    Begins(usize),
    Bytes(Vec<u8>),
}

impl Old {
    /// Whether a range of `bytes` is the same.
    fn has(&self, range: Range<usize>, bytes: &[u8]) -> bool {
        match self {
            Self::Begins(length) => range.end <= *length,
            Self::Bytes(old) => old.get(range.clone()) == Some(&bytes[range]),
        }
    }
}

impl Previous<'_> {
    /// What stood where a block was read; nothing where the file ended before. A log that only grew is told by its digest:
    /// nothing of it is read from the disk.
    fn block(&self, read: &BlockRead, seed: u64, frames: &mut FrameCache) -> Result<Option<Old>> {
        let end = self.content.size.min(read.offset + read.bytes.len() as u64);
        let Some(length) = end.checked_sub(read.offset).and_then(|length| usize::try_from(length).ok()) else {
            return Ok(None);
        };
        if length < read.bytes.len()
            && self.digest(read.number()) == Block::of(read.number(), &read.bytes[..length], seed)
        {
            return Ok(Some(Old::Begins(length)));
        }
        let mut old = vec![0; length];
        let stretches = self.content.within(read.offset..end);
        let copied = self.chain.stretches(self.seq, stretches, frames, &mut |at, bytes| {
            let start = usize::try_from(at - read.offset).unwrap_or(usize::MAX);
            old[start..start + bytes.len()].copy_from_slice(bytes);
            Ok(())
        });
        match copied {
            // What cannot be read is damaged for us: upper has everything, and it is written anew.
            Err(Error::System(error)) => {
                Err(Error::Damaged { path: error.path.clone(), what: format!("{}: {}", error.call, error.source) })
            }
            other => other.map(|()| Some(Old::Bytes(old))),
        }
    }

    /// Nothing for a block of zeros.
    fn digest(&self, number: u64) -> Option<Block> {
        let blocks = &self.content.blocks;
        blocks.binary_search_by_key(&number, |block| block.number).ok().map(|at| blocks[at])
    }
}
