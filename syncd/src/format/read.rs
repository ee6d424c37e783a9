//! Reads a checkpoint. Nothing in it is believed before its digest was checked, and nothing in it can name a place
//! outside its target ([`crate::path::RelPath`]).

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use ephemeral_overlay::CHECKPOINT_FORMAT;
use ephemeral_overlay::error::At;
use xxhash_rust::xxh3::Xxh3;

use super::{END, FRAME, Header, Index, MAGIC, PRELUDE, TRAILER, Trailer};
use crate::digest::Digest;
use crate::entry::{Change, Content, Kind, Node};
use crate::error::{Error, Result};
use crate::progress::Progress;

/// The longest header that is read; a real one has some hundred bytes.
const HEADER_MAX: usize = 64 * 1024;
/// How much is read at once when every byte is checked.
const READ: usize = 1 << 20;

/// An open checkpoint: header and index are checked and in memory, data is read when it is asked for.
#[derive(Debug)]
pub struct Checkpoint {
    file: File,
    path: PathBuf,
    length: u64,
    /// What it says about itself.
    pub header: Header,
    /// Its changes, in path order.
    pub changes: Vec<Change>,
    /// The digest over every byte, as the trailer has it.
    pub digest: Digest,
    /// Where each frame begins in the file; one more than there are frames.
    frames: Vec<u64>,
    /// The frame that was decompressed last.
    cached: Option<(usize, Vec<u8>)>,
}

impl Checkpoint {
    /// Opens a checkpoint and checks header and index.
    ///
    /// # Errors
    /// When it cannot be read, is damaged, or is of a newer format.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).at("open", path)?;
        let length = file.metadata().at("fstat", path)?.len();
        let damaged = |what: &str| Error::Damaged { path: path.to_path_buf(), what: what.to_owned() };
        let read = |at: u64, length: usize| -> Result<Vec<u8>> {
            let mut bytes = vec![0; length];
            file.read_exact_at(&mut bytes, at).at("pread64", path)?;
            Ok(bytes)
        };
        if length < (PRELUDE + TRAILER) as u64 {
            return Err(damaged("it is too short"));
        }
        let prelude = read(0, PRELUDE)?;
        if prelude[..8] != MAGIC {
            return Err(damaged("it does not begin as a checkpoint does"));
        }
        let version = u32::from_le_bytes([prelude[8], prelude[9], prelude[10], prelude[11]]);
        if version > CHECKPOINT_FORMAT {
            return Err(Error::Newer { path: path.to_path_buf(), found: version });
        }
        if version == 0 {
            return Err(damaged("its format is 0"));
        }
        let header_len = u32::from_le_bytes([prelude[12], prelude[13], prelude[14], prelude[15]]) as usize;
        let trailer_at = length - TRAILER as u64;
        if header_len > HEADER_MAX || (PRELUDE + header_len) as u64 > trailer_at {
            return Err(damaged("its header is longer than it can be"));
        }
        let header_bytes = read(PRELUDE as u64, header_len)?;
        let tail = read(trailer_at, TRAILER)?;
        let (numbers, rest) = tail.split_at(32);
        let (digests, end) = rest.split_at(32);
        if end != END {
            return Err(damaged("it does not end as a checkpoint does"));
        }
        let digest_at = |at: usize| {
            let mut bytes = [0; 16];
            bytes.copy_from_slice(&digests[at..at + 16]);
            Digest(u128::from_le_bytes(bytes))
        };
        let mut fixed = [0; 32];
        fixed.copy_from_slice(numbers);
        let trailer = Trailer::from_bytes(&fixed);
        if trailer.index_at < (PRELUDE + header_len) as u64
            || trailer.index_at.checked_add(trailer.index_len) != Some(trailer_at)
        {
            return Err(damaged("its index is not where it can be"));
        }
        let index = read(trailer.index_at, usize::try_from(trailer.index_len).unwrap_or(usize::MAX))?;
        let mut head = Xxh3::new();
        for part in [&prelude[..], &header_bytes, &index, numbers] {
            head.update(part);
        }
        if Digest(head.digest128()) != digest_at(0) {
            return Err(damaged("the digest of its index is wrong"));
        }
        let header: Header = postcard::from_bytes(&header_bytes).map_err(|error| damaged(&error.to_string()))?;
        let mut raw = Vec::new();
        let decoder = zstd::Decoder::new(&index[..]).at("zstd", path)?;
        // One byte more than declared would show a lie.
        decoder.take(trailer.index_raw.saturating_add(1)).read_to_end(&mut raw).at("zstd", path)?;
        if raw.len() as u64 != trailer.index_raw {
            return Err(damaged("its index is not as long as it says"));
        }
        let index: Index = postcard::from_bytes(&raw).map_err(|error| damaged(&error.to_string()))?;
        check(&index, &trailer).map_err(damaged)?;

        let mut at = (PRELUDE + header_len) as u64;
        let mut frames = vec![at];
        for length in index.frames {
            at += u64::from(length);
            frames.push(at);
        }
        if at != trailer.index_at {
            return Err(damaged("its data is not as long as it says"));
        }
        Ok(Self {
            path: path.to_path_buf(),
            length,
            header,
            changes: index.changes,
            digest: digest_at(16),
            frames,
            cached: None,
            file,
        })
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its length in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.length
    }

    /// Reads every byte and checks the digest over all of them.
    ///
    /// # Errors
    /// When it cannot be read or is damaged.
    pub fn verify(&self, progress: &Progress) -> Result<()> {
        // The digest itself and END follow.
        let end = self.length - 24;
        let mut whole = Xxh3::new();
        let mut buffer = vec![0; READ];
        let mut at = 0;
        while at < end {
            let length = usize::try_from(end - at).unwrap_or(READ).min(READ);
            self.file.read_exact_at(&mut buffer[..length], at).at("pread64", &self.path)?;
            whole.update(&buffer[..length]);
            progress.step();
            at += length as u64;
        }
        if Digest(whole.digest128()) == self.digest { Ok(()) } else { Err(self.damaged("its digest is wrong")) }
    }

    /// Hands out the bytes of a file, stretch by stretch, each piece with its offset in the file.
    ///
    /// # Errors
    /// When the data cannot be read or decompressed, or `sink` fails.
    pub fn contents(&mut self, content: &Content, sink: &mut dyn FnMut(u64, &[u8]) -> Result<()>) -> Result<()> {
        for stretch in &content.stretches {
            let mut done = 0;
            while done < stretch.length {
                let at = stretch.data + done;
                let within = usize::try_from(at % FRAME as u64).unwrap_or(0);
                let frame = usize::try_from(at / FRAME as u64).unwrap_or(usize::MAX);
                let left = usize::try_from(stretch.length - done).unwrap_or(usize::MAX);
                let bytes = self.frame(frame)?;
                let piece = bytes.get(within..).filter(|piece| !piece.is_empty());
                let Some(piece) = piece.map(|piece| &piece[..piece.len().min(left)]) else {
                    return Err(self.damaged("a frame of its data is too short"));
                };
                sink(stretch.offset + done, piece)?;
                done += piece.len() as u64;
            }
        }
        Ok(())
    }

    fn frame(&mut self, number: usize) -> Result<&[u8]> {
        if self.cached.as_ref().is_none_or(|(cached, _)| *cached != number) {
            let (Some(&start), Some(&end)) = (self.frames.get(number), self.frames.get(number + 1)) else {
                return Err(self.damaged("a stretch lies outside its data"));
            };
            let mut compressed = vec![0; usize::try_from(end - start).unwrap_or(0)];
            self.file.read_exact_at(&mut compressed, start).at("pread64", &self.path)?;
            let bytes = zstd::bulk::decompress(&compressed, FRAME).at("zstd", &self.path)?;
            self.cached = Some((number, bytes));
        }
        Ok(self.cached.as_ref().map_or(&[], |(_, bytes)| bytes))
    }

    fn damaged(&self, what: &str) -> Error {
        Error::Damaged { path: self.path.clone(), what: what.to_owned() }
    }
}

/// What the types alone do not guarantee.
fn check(index: &Index, trailer: &Trailer) -> Result<(), &'static str> {
    if index.changes.windows(2).any(|pair| pair[0].path >= pair[1].path) {
        return Err("its changes are not in path order");
    }
    let nodes = index.changes.iter().filter_map(|change| change.state.node());
    for Node { kind, meta, .. } in nodes {
        if meta.mode & !0o7777 != 0 || meta.mtime_nsec >= 1_000_000_000 {
            return Err("a mode or a time is out of range");
        }
        if meta.xattrs.keys().any(|name| name.is_empty() || name.contains(&0)) {
            return Err("an attribute has an impossible name");
        }
        match kind {
            Kind::Symlink { target } if target.is_empty() || target.contains(&0) => {
                return Err("a symlink leads to an impossible name");
            }
            Kind::File(content) => check_content(content, trailer.data_len)?,
            _ => {}
        }
    }
    Ok(())
}

fn check_content(content: &Content, data_len: u64) -> Result<(), &'static str> {
    let mut at = 0;
    for stretch in &content.stretches {
        let end = stretch.offset.checked_add(stretch.length);
        let data_end = stretch.data.checked_add(stretch.length);
        if stretch.length == 0
            || stretch.offset < at
            || end.is_none_or(|end| end > content.size)
            || data_end.is_none_or(|end| end > data_len)
        {
            return Err("a file's stretches do not fit");
        }
        at = end.unwrap_or(u64::MAX);
    }
    Ok(())
}
