//! A file of more than one frame: its pieces are read by whichever thread is free.

use std::fs::File;
use std::ops::Range;

use super::{Capture, FRAME_LEN, Part, Tools, Work};
use crate::content::{TRIES, blocks_of, pieces};
use crate::diff::Looked;
use crate::digest::{BLOCK, Block};
use crate::error::Result;
use crate::scan::{self, Stamp, View};
use crate::tree::Opener;

/// A long file that is being read.
pub(super) struct Long {
    file: File,
    /// What it was when it was begun with.
    before: Stamp,
    /// Its blocks, where they were read to be compared; a block that the chain has is not read once more.
    read: Option<Vec<Block>>,
    tries: usize,
    pieces: Vec<Range<u64>>,
    /// What was read of them, each with where the data of its piece of work begins.
    parts: Vec<Option<(u64, Part)>>,
}

impl Capture<'_> {
    pub(super) fn begin_long(&mut self, file: usize) -> Result<()> {
        let (found, _) = self.files[file];
        let Some((open, now)) = self.open(&mut Opener::new(self.job.upper), file)? else { return Ok(()) };
        let looked = self.looked.binary_search_by_key(&&found.path, |(found, _)| &found.path).ok();
        let read = match looked.map(|at| &self.looked[at].1) {
            Some(Looked::Changed(read)) if !read.fuzzy => Some(read),
            _ => None,
        };
        let before = read.map_or(now, |read| read.stamp);
        let read = read.map(|read| read.blocks.clone());
        self.long.insert(file, Long { file: open, before, read, tries: 1, pieces: Vec::new(), parts: Vec::new() });
        self.queue_pieces(file)
    }

    fn queue_pieces(&mut self, file: usize) -> Result<()> {
        let Some(long) = self.long.get_mut(&file) else { return Ok(()) };
        long.pieces = pieces(&long.file, &long.before, FRAME_LEN, &self.job.upper.show(&self.files[file].0.path))?;
        long.parts = long.pieces.iter().map(|_| None).collect();
        (0..long.pieces.len()).rev().for_each(|piece| self.queue.push_front(Work::Piece { file, piece }));
        // Nothing but a hole is complete.
        if long.pieces.is_empty() { self.complete(file) } else { Ok(()) }
    }

    /// Reads one piece.
    pub(super) fn piece(&self, file: usize, piece: usize, data: &mut Vec<u8>, tools: &mut Tools) -> Result<Part> {
        let (long, path) = (&self.long[&file], &self.files[file].0.path);
        let (shown, taker) = (self.job.upper.show(path), self.taker(path));
        let Range { start, end } = long.pieces[piece];
        let mut part = Part::default();
        let mut read = |range, part: &mut Part| {
            blocks_of(&long.file, &long.before, range, &mut tools.buffer, &shown, |block| {
                taker.block(&block, part, data, &mut tools.frames)
            })
        };
        let Some(blocks) = &long.read else {
            part.end = read(start..end, &mut part)?;
            return Ok(part);
        };
        part.end = end;
        let offset = |block: &Block| block.number * BLOCK as u64;
        let first = blocks.partition_point(|block| offset(block) < start);
        for &block in blocks[first..].iter().take_while(|block| offset(block) < end) {
            if taker.refer(block, &mut part) {
                part.blocks.push(block);
                continue;
            }
            let at = offset(&block);
            let until = (at + BLOCK as u64).min(end);
            let got = read(at..until, &mut part)?;
            if got < until {
                part.end = got;
                break;
            }
        }
        Ok(part)
    }

    /// Takes a piece in.
    pub(super) fn take_piece(&mut self, file: usize, piece: usize, part: Part) -> Result<()> {
        let position = self.position;
        let Some(long) = self.long.get_mut(&file) else { return Ok(()) };
        long.parts[piece] = Some((position, part));
        if long.parts.iter().all(Option::is_some) { self.complete(file) } else { Ok(()) }
    }

    /// All pieces are there: the file is complete, or begun anew when it changed meanwhile.
    fn complete(&mut self, file: usize) -> Result<()> {
        let Some(mut long) = self.long.remove(&file) else { return Ok(()) };
        let shown = self.job.upper.show(&self.files[file].0.path);
        let (meta, after) = scan::file_meta(&long.file, View::Upper, &shown)?;
        let fuzzy = after != long.before;
        let mut parts: Vec<_> = std::mem::take(&mut long.parts).into_iter().flatten().collect();
        let mut size = long.before.size;
        // What was read behind the end of a file that was cut off is of another moment.
        if let Some(cut) = parts.iter().zip(&long.pieces).position(|((_, part), piece)| part.end < piece.end) {
            parts.truncate(cut + 1);
            size = parts[cut].1.end;
        }
        let content = self.content(size, &parts, fuzzy);
        if fuzzy && long.tries < TRIES {
            (long.before, long.read) = (after, None);
            long.tries += 1;
            self.long.insert(file, long);
            return self.queue_pieces(file);
        }
        self.captured[file] = Some((meta, content));
        Ok(())
    }
}
