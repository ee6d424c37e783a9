//! Where in the chain which block is: what did not change, and what only moved (a rotated log), is not written again.

use std::collections::HashMap;

use crate::chain::Net;
use crate::digest::{BLOCK, Digest};
use crate::entry::{Content, Stretch};

/// A reference to less costs as much as the bytes.
const MIN: u64 = 4096;

/// The blocks of the chain, by digest.
#[derive(Debug, Default)]
pub(super) struct Known(HashMap<Digest, Place>);

/// Where a block is.
#[derive(Debug)]
struct Place {
    /// The checkpoint that the stretches count back from.
    seq: u64,
    /// The number of the first work that may refer to it: which work is done earlier depends on the threads.
    from: u64,
    /// Its stretches, from the start of the block.
    stretches: Box<[Stretch]>,
}

impl Known {
    /// What a chain holds.
    pub(super) fn of(net: &Net) -> Self {
        let mut known = Self::default();
        for recorded in net.entries.values() {
            if let Some(content) = recorded.state.node().and_then(|node| node.content()) {
                known.add(content, recorded.seq, 0);
            }
        }
        known
    }

    /// Adds the blocks of a file as checkpoint `seq` has it, for work from a number on.
    pub(super) fn add(&mut self, content: &Content, seq: u64, from: u64) {
        if content.size < MIN {
            return;
        }
        for block in content.all_blocks() {
            self.0.entry(block.digest).or_insert_with(|| {
                let start = block.number * BLOCK as u64;
                let stretches = content.within(start..start + BLOCK as u64);
                let stretches =
                    stretches.map(|stretch| Stretch { offset: stretch.offset - start, ..stretch }).collect();
                Place { seq, from, stretches }
            });
        }
    }

    /// The stretches of a block that stands at `offset` of a file in checkpoint `seq` and is read by work of a number, where
    /// the chain has it.
    pub(super) fn find(
        &self,
        digest: Digest,
        offset: u64,
        seq: u64,
        number: u64,
    ) -> Option<impl Iterator<Item = Stretch>> {
        let place = self.0.get(&digest).filter(|place| place.from <= number)?;
        let age = seq - place.seq;
        let here =
            move |stretch: &Stretch| Stretch { offset: stretch.offset + offset, back: stretch.back + age, ..*stretch };
        Some(place.stretches.iter().map(here))
    }
}
