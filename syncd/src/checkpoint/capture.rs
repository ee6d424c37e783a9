//! Puts the contents of files into a checkpoint: read, compared with the chain and compressed in parallel, written in
//! order, so the same tree gives the same bytes.
//!
//! A file is read between two looks at its status; where they differ it is read again, and in the end taken as it is,
//! and called fuzzy.

mod line;
mod long;
mod part;

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use ephemeral_overlay::error::At;
use line::{AHEAD, Line, State};
use long::{Long, Source};
use part::{Part, Previous, Taker};

use super::Job;
use super::known::Known;
use crate::chain::FrameCache;
use crate::content::{TRIES, blocks_of};
use crate::diff::Looked;
use crate::digest::{BLOCK, of_file};
use crate::entry::{Content, Kind, Meta};
use crate::error::{Error, Result};
use crate::format::FRAME;
use crate::format::write::{Frame, Packer, Writer};
use crate::path::RelPath;
use crate::per_thread::PerThread;
use crate::scan::Found;
use crate::tree::Opener;

const FRAME_LEN: u64 = FRAME as u64;

/// A file as it was captured; nothing when it was moved away under the read.
pub(super) type Captured = Option<(Meta, Kind)>;

/// Captures the contents of some files.
pub(super) struct Capture<'a> {
    job: &'a Job<'a>,
    /// The checkpoint that is written.
    sequence: u64,
    /// It refers to nothing before it.
    full: bool,
    /// The files, each with its link group, 0 for none.
    files: Vec<(&'a Found, u32)>,
    looked: &'a [(&'a Found, Looked)],
    known: RwLock<Known>,
    tools: PerThread<Option<Tools>>,
    /// Buffers of frames that are written.
    spare: Mutex<Vec<Vec<u8>>>,
}

/// What one thread does at a time.
#[derive(Debug)]
enum Work {
    /// Short files, whole.
    Short(Range<usize>),
    /// A long file, to be opened.
    Long(usize),
    /// A piece of a long file.
    Piece { file: usize, piece: usize, source: Arc<Source> },
}

/// What came of it.
struct Done {
    parts: Vec<Outcome>,
    frames: Vec<Frame>,
}

enum Outcome {
    Whole {
        meta: Meta,
        part: Part,
        fuzzy: bool,
    },
    /// It became a long one since it was met.
    Long,
    /// It was moved away.
    Moved,
    Piece(Part),
}

/// What a thread needs, used again and again.
struct Tools {
    buffer: Vec<u8>,
    packer: Packer,
    frames: FrameCache,
}

impl<'a> Capture<'a> {
    pub(super) fn new(
        job: &'a Job<'a>,
        sequence: u64,
        full: bool,
        files: Vec<(&'a Found, u32)>,
        looked: &'a [(&'a Found, Looked)],
    ) -> Self {
        Self {
            job,
            sequence,
            full,
            known: if full || files.is_empty() { RwLock::default() } else { Known::of(&job.past.net).into() },
            files,
            looked,
            tools: PerThread::new(),
            spare: Mutex::default(),
        }
    }

    /// Writes all of it; returns what each file turned out to be.
    pub(super) fn run(&self, writer: &mut Writer) -> Result<Vec<Captured>> {
        let queue = work(self.files.iter().map(|(found, _)| found.stamp.size));
        Line::new(queue, self.files.len(), writer).run(self)
    }

    /// What is begun next.
    fn next_work(&self, line: &mut State) -> Result<Option<Work>> {
        loop {
            match line.queue.pop_front() {
                Some(Work::Long(file)) => self.begin_long(line, file)?,
                other => return Ok(other),
            }
        }
    }

    /// One piece of work, by one thread of many.
    fn act(&self, number: u64, work: &Work) -> Result<Done> {
        self.tools.with(|tools| {
            if let Some(tools) = tools {
                return self.act_with(number, work, tools);
            }
            let packer = Packer::new(self.job.options.compression).at("zstd", "")?;
            let fresh = Tools { buffer: Vec::new(), packer, frames: FrameCache::default() };
            self.act_with(number, work, tools.insert(fresh))
        })
    }

    fn act_with(&self, number: u64, work: &Work, tools: &mut Tools) -> Result<Done> {
        let mut data = self.take_buffer();
        let parts = match work {
            Work::Short(files) => {
                let mut opener = Opener::new(self.job.upper);
                let short = |file| self.short(number, file, &mut opener, &mut data, tools);
                files.clone().map(short).collect::<Result<_>>()?
            }
            Work::Piece { file, piece, source } => {
                let taker = self.taker(number, &self.files[*file].0.path);
                vec![Outcome::Piece(self.piece(*file, source.piece(*piece), source, &taker, &mut data, tools)?)]
            }
            Work::Long(_) => Vec::new(),
        };
        let mut frames = Vec::new();
        let mut pack = |data| {
            let (frame, spare) = tools.packer.pack(data, self.take_buffer()).at("zstd", "")?;
            frames.push(frame);
            self.give_buffer(spare);
            Ok::<_, Error>(())
        };
        while data.len() > FRAME {
            let rest = data.split_off(FRAME);
            pack(std::mem::replace(&mut data, rest))?;
        }
        if data.is_empty() {
            self.give_buffer(data);
        } else {
            pack(data)?;
        }
        Ok(Done { parts, frames })
    }

    /// An empty buffer, which may have been used before: memory that is new to the process costs more than what is
    /// copied into it.
    fn take_buffer(&self) -> Vec<u8> {
        let spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner).pop();
        spare.unwrap_or_else(|| Vec::with_capacity(FRAME))
    }

    fn give_buffer(&self, mut buffer: Vec<u8>) {
        buffer.clear();
        self.spare.lock().unwrap_or_else(PoisonError::into_inner).push(buffer);
    }

    /// Captures a file of at most one frame.
    fn short(
        &self,
        number: u64,
        file: usize,
        opener: &mut Opener<'_>,
        data: &mut Vec<u8>,
        tools: &mut Tools,
    ) -> Result<Outcome> {
        let start = data.len();
        let captured = self.read_short(number, self.files[file].0, opener, data, tools);
        if !matches!(captured, Ok(Outcome::Whole { .. })) {
            data.truncate(start);
        }
        Ok(self.unless_moved(file, captured)?.unwrap_or(Outcome::Moved))
    }

    fn read_short(
        &self,
        number: u64,
        found: &Found,
        opener: &mut Opener<'_>,
        data: &mut Vec<u8>,
        tools: &mut Tools,
    ) -> Result<Outcome> {
        let shown = self.job.upper.show(&found.path);
        let (file, mut before) = self.job.open(opener, found)?;
        let taker = self.taker(number, &found.path);
        let start = data.len();
        let mut tries = 1;
        loop {
            if before.size > FRAME_LEN {
                return Ok(Outcome::Long);
            }
            let mut part = Part::default();
            let end = blocks_of(&file, &before, 0..before.size, &mut tools.buffer, &shown, |block| {
                taker.block(&block, &mut part, data, &mut tools.frames)
            });
            // What cannot be read may be no file any more.
            let (meta, after) = self.job.meta(&file, found)?;
            part.end = end?;
            let fuzzy = before != after;
            if !fuzzy || tries == TRIES {
                return Ok(Outcome::Whole { meta, part, fuzzy });
            }
            data.truncate(start);
            before = after;
            tries += 1;
        }
    }

    /// Nothing where a file was moved away and may be passed over.
    fn unless_moved<T>(&self, file: usize, result: Result<T>) -> Result<Option<T>> {
        match result {
            // Not where other names share the file.
            Err(Error::Moved { .. }) if !self.job.patient && self.files[file].1 == 0 => Ok(None),
            other => other.map(Some),
        }
    }

    /// For a file that is read by work of this number.
    fn taker(&self, number: u64, path: &RelPath) -> Taker<'_> {
        let previous = self.job.past.chain.as_ref().filter(|_| !self.full).and_then(|chain| {
            let recorded = self.job.past.net.entries.get(path)?;
            let content = recorded.state.node()?.content()?;
            // A short file is written sooner than its old version is read.
            (content.size > BLOCK as u64).then_some(Previous { chain, seq: recorded.seq, content })
        });
        Taker { seed: self.job.past.seed, sequence: self.sequence, number, known: &self.known, previous }
    }

    /// Puts together what a thread brought.
    fn take_in(&self, line: &mut State, work: &Work, parts: Vec<Outcome>) -> Result<()> {
        let first = match work {
            Work::Short(files) => files.start,
            Work::Long(file) | Work::Piece { file, .. } => *file,
        };
        for (file, part) in (first..).zip(parts) {
            match (part, work) {
                (Outcome::Whole { meta, part, fuzzy }, _) => {
                    let content = self.content(line, part.end, &[(line.position, part)], fuzzy);
                    line.captured[file] = Some((meta, Kind::file(content)));
                }
                (Outcome::Piece(part), Work::Piece { piece, .. }) => self.take_piece(line, file, *piece, part)?,
                (Outcome::Long, _) => line.queue.push_back(Work::Long(file)),
                (Outcome::Moved | Outcome::Piece(_), _) => {}
            }
        }
        Ok(())
    }

    /// Makes the content of a file of its parts, each with where the data of its piece of work begins.
    fn content(&self, line: &State, size: u64, parts: &[(u64, Part)], fuzzy: bool) -> Content {
        let mut blocks: Vec<_> = parts.iter().flat_map(|(_, part)| part.blocks.iter().copied()).collect();
        let digest = of_file(size, &blocks, self.job.past.seed);
        if blocks.len() == 1 && digest == blocks[0].digest {
            blocks.clear();
        }
        let mut stretches = Vec::new();
        for stretch in parts.iter().flat_map(|(base, part)| part.stretches(*base)) {
            stretch.append_to(&mut stretches);
        }
        let content = Content { size, digest, fuzzy, stretches, blocks };
        // What comes later may be the same: a copy, or the same file once more.
        self.known.write().unwrap_or_else(PoisonError::into_inner).add(&content, self.sequence, line.next + AHEAD);
        content
    }
}

/// Cuts the files into work, in their order.
fn work(sizes: impl ExactSizeIterator<Item = u64>) -> VecDeque<Work> {
    let mut queue = VecDeque::new();
    let (count, mut start, mut bytes) = (sizes.len(), 0, 0);
    for (index, size) in sizes.enumerate() {
        if start < index && bytes + size > FRAME_LEN {
            queue.push_back(Work::Short(start..index));
            (start, bytes) = (index, 0);
        }
        if size > FRAME_LEN {
            queue.push_back(Work::Long(index));
            start = index + 1;
        } else {
            bytes += size;
        }
    }
    if start < count {
        queue.push_back(Work::Short(start..count));
    }
    queue
}
