//! A file of more than one frame: its pieces are read by whichever thread is free.

use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

use super::{Capture, FRAME_LEN, Part, State, Taker, Tools, Work};
use crate::content::{TRIES, blocks_of, pieces};
use crate::diff::Looked;
use crate::digest::{BLOCK, Block};
use crate::entry::Kind;
use crate::error::Result;
use crate::scan::Stamp;
use crate::tree::Opener;

/// A long file that is being read.
pub(super) struct Long {
    source: Arc<Source>,
    tries: usize,
    /// What was read of its pieces, each with where the data of its piece of work begins.
    parts: Vec<Option<(u64, Part)>>,
}

/// What its pieces are read from.
#[derive(Debug)]
pub(super) struct Source {
    file: Arc<File>,
    /// What it was when it was begun with.
    before: Stamp,
    /// Its blocks, where they were read to be compared; a block that the chain has is not read once more.
    read: Option<Vec<Block>>,
    pieces: Vec<Range<u64>>,
}

impl Source {
    pub(super) fn piece(&self, number: usize) -> Range<u64> {
        self.pieces[number].clone()
    }
}

impl Capture<'_> {
    pub(super) fn begin_long(&self, line: &mut State, file: usize) -> Result<()> {
        let (found, _) = self.files[file];
        let opened = self.job.open(&mut Opener::new(self.job.upper), found);
        let Some((open, now)) = self.unless_moved(file, opened)? else { return Ok(()) };
        let looked = self.looked.binary_search_by_key(&&found.path, |(found, _)| &found.path).ok();
        let read = match looked.map(|at| &self.looked[at].1) {
            Some(Looked::Changed(read)) if !read.fuzzy => Some(read),
            _ => None,
        };
        let before = read.map_or(now, |read| read.stamp);
        self.queue_pieces(line, file, open.into(), before, read.map(|read| read.blocks.clone()), 1)
    }

    fn queue_pieces(
        &self,
        line: &mut State,
        file: usize,
        open: Arc<File>,
        before: Stamp,
        read: Option<Vec<Block>>,
        tries: usize,
    ) -> Result<()> {
        let pieces = pieces(&open, &before, FRAME_LEN, &self.job.upper.show(&self.files[file].0.path))?;
        let count = pieces.len();
        let source = Arc::new(Source { file: open, before, read, pieces });
        for piece in (0..count).rev() {
            line.queue.push_front(Work::Piece { file, piece, source: Arc::clone(&source) });
        }
        line.long.insert(file, Long { source, tries, parts: std::iter::repeat_with(|| None).take(count).collect() });
        // Nothing but a hole is complete.
        if count == 0 { self.complete(line, file) } else { Ok(()) }
    }

    /// Reads one piece.
    pub(super) fn piece(
        &self,
        file: usize,
        Range { start, end }: Range<u64>,
        source: &Source,
        taker: &Taker<'_>,
        data: &mut Vec<u8>,
        tools: &mut Tools,
    ) -> Result<Part> {
        let shown = self.job.upper.show(&self.files[file].0.path);
        let mut part = Part::default();
        let mut read = |range, part: &mut Part| {
            blocks_of(&source.file, &source.before, range, &mut tools.buffer, &shown, |block| {
                taker.block(&block, part, data, &mut tools.frames)
            })
        };
        let Some(blocks) = &source.read else {
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
    pub(super) fn take_piece(&self, line: &mut State, file: usize, piece: usize, part: Part) -> Result<()> {
        let position = line.position;
        let Some(long) = line.long.get_mut(&file) else { return Ok(()) };
        long.parts[piece] = Some((position, part));
        if long.parts.iter().all(Option::is_some) { self.complete(line, file) } else { Ok(()) }
    }

    /// All pieces are there: the file is complete, or begun anew when it changed meanwhile.
    fn complete(&self, line: &mut State, file: usize) -> Result<()> {
        let Some(Long { source, tries, parts }) = line.long.remove(&file) else { return Ok(()) };
        let (meta, after) = self.job.meta(&source.file, self.files[file].0)?;
        let fuzzy = after != source.before;
        let mut parts: Vec<_> = parts.into_iter().flatten().collect();
        let mut size = source.before.size;
        // What was read behind the end of a file that was cut off is of another moment.
        if let Some(cut) = parts.iter().zip(&source.pieces).position(|((_, part), piece)| part.end < piece.end) {
            parts.truncate(cut + 1);
            size = parts[cut].1.end;
        }
        let content = self.content(line, size, &parts, fuzzy);
        if fuzzy && tries < TRIES {
            return self.queue_pieces(line, file, Arc::clone(&source.file), after, None, tries + 1);
        }
        line.captured[file] = Some((meta, Kind::file(content)));
        Ok(())
    }
}
