//! Reads a checkpoint. Nothing in it is believed before its digest was checked, and nothing in it can name a place
//! outside its target ([`crate::path::RelPath`]).

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use ephemeral_overlay::CHECKPOINT_FORMAT;
use ephemeral_overlay::attributes::CAPABILITY;
use ephemeral_overlay::error::At;
use ephemeral_overlay::overlay::is_never_data;
use rayon::prelude::*;
use serde::de::DeserializeOwned;
use xxhash_rust::xxh3::Xxh3;
use zstd::bulk::Decompressor;

use super::{END, FRAME, FrameInfo, Header, INDEX_RATIO, Index, MAGIC, PRELUDE, SEQUENCE_MAX, TRAILER, Trailer};
use crate::digest::{self, BLOCK, Digest};
use crate::durable;
use crate::entry::{Change, Content, Kind, Meta, Node, Stretch};
use crate::error::{Error, Result};
use crate::per_thread::FRAMES;
use crate::progress::Progress;
use crate::written::{Account, pages};

/// The longest header that is read; a real one has some hundred bytes.
const HEADER_MAX: usize = 64 * 1024;

/// An open checkpoint: header and index are checked and in memory, data is read when it is asked for.
#[derive(Debug)]
pub struct Checkpoint {
    file: File,
    path: PathBuf,
    length: u64,
    /// What it says about itself.
    pub header: Header,
    /// Its changes, in path order, until its chain is composed.
    pub changes: Vec<Change>,
    /// Its digest, as the trailer has it.
    pub digest: Digest,
    frames: Vec<Frame>,
    /// The length of its data.
    data_len: u64,
}

/// Where a frame is.
#[derive(Debug)]
struct Frame {
    info: FrameInfo,
    /// Where it begins in the file.
    at: u64,
    /// Where its data begins in the data of the checkpoint.
    data: u64,
}

impl Checkpoint {
    /// Opens a checkpoint and checks header and index.
    ///
    /// # Errors
    /// When it cannot be read, is damaged, or is of a newer format.
    pub fn open(path: &Path) -> Result<Self> {
        let damaged = |what: &str| Error::Damaged { path: path.to_path_buf(), what: what.to_owned() };
        let file = durable::open(path)?;
        let stat = file.metadata().at("fstat", path)?;
        if !stat.is_file() {
            return Err(damaged("it is no regular file"));
        }
        let length = stat.len();
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
        let (numbers, rest) = tail.split_at(24);
        let (digest, end) = rest.split_at(16);
        if end != END {
            return Err(damaged("it does not end as a checkpoint does"));
        }
        let (mut fixed, mut digest_bytes) = ([0; 24], [0; 16]);
        fixed.copy_from_slice(numbers);
        digest_bytes.copy_from_slice(digest);
        let (trailer, digest) = (Trailer::from_bytes(&fixed), Digest(u128::from_le_bytes(digest_bytes)));
        if trailer.at < (PRELUDE + header_len) as u64 || trailer.at.checked_add(trailer.len) != Some(trailer_at) {
            return Err(damaged("its index is not where it can be"));
        }
        if trailer.raw > trailer.len.saturating_mul(INDEX_RATIO) {
            return Err(damaged("its index is longer than it can be"));
        }
        let index = read(trailer.at, usize::try_from(trailer.len).unwrap_or(usize::MAX))?;
        let mut head = Xxh3::new();
        for part in [&prelude[..], &header_bytes, &index, numbers] {
            head.update(part);
        }
        if Digest(head.digest128()) != digest {
            return Err(damaged("the digest of its index is wrong"));
        }
        let header: Header =
            decode(&header_bytes).map_err(|error| damaged(&format!("its header is malformed ({error})")))?;
        if !(1..=SEQUENCE_MAX).contains(&header.sequence) {
            return Err(damaged("it has an impossible number"));
        }
        let mut raw = Vec::new();
        let decoder = zstd::Decoder::new(&index[..]).at("zstd", path)?;
        // One byte more than declared would show a lie.
        decoder.take(trailer.raw.saturating_add(1)).read_to_end(&mut raw).at("zstd", path)?;
        if raw.len() as u64 != trailer.raw {
            return Err(damaged("its index is not as long as it says"));
        }
        let index: Index = decode(&raw).map_err(|error| damaged(&format!("its index is malformed ({error})")))?;
        let (mut at, mut data) = ((PRELUDE + header_len) as u64, 0);
        let mut frames = Vec::new();
        for info in index.frames {
            if info.raw == 0 || info.raw as usize > FRAME || info.stored > info.raw {
                return Err(damaged("a frame of its data has an impossible length"));
            }
            frames.push(Frame { info, at, data });
            at += u64::from(info.stored);
            data += u64::from(info.raw);
        }
        if at != trailer.at {
            return Err(damaged("its data is not as long as it says"));
        }
        check(&index.changes, data).map_err(damaged)?;
        let changes = index.changes;
        Ok(Self { path: path.to_path_buf(), length, header, changes, digest, frames, data_len: data, file })
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

    /// What was written to the disk for its target up to it, and with it.
    #[must_use]
    pub fn written(&self) -> Account {
        let Header { boot_id, written_in_boot, written_in_all, .. } = &self.header;
        let before = Account { boot_id: boot_id.clone(), in_boot: *written_in_boot, in_all: *written_in_all };
        before.and(pages(self.length))
    }

    /// The length of its data.
    #[must_use]
    pub fn data_len(&self) -> u64 {
        self.data_len
    }

    /// Reads every byte that [`Checkpoint::open`] did not, and checks its digest.
    ///
    /// # Errors
    /// When it cannot be read or is damaged.
    pub fn verify(&self, progress: &Progress) -> Result<()> {
        self.frames.par_iter().with_max_len(FRAMES).try_for_each_init(Vec::new, |stored, frame| {
            progress.step();
            self.read_stored(frame, stored)
        })
    }

    /// The number of the frame that holds a byte of the data, and where in the data that frame begins.
    pub(crate) fn frame_of(&self, data: u64) -> Option<(usize, u64)> {
        let number = self.frames.partition_point(|frame| frame.data <= data).checked_sub(1)?;
        (data < self.data_len).then(|| (number, self.frames[number].data))
    }

    /// Reads the data of a frame into `data`.
    ///
    /// # Errors
    /// When it cannot be read or is damaged.
    pub(crate) fn read_frame(&self, number: usize, unpacker: &mut Unpacker, data: &mut Vec<u8>) -> Result<()> {
        let frame = &self.frames[number];
        if frame.info.stored == frame.info.raw {
            return self.read_stored(frame, data);
        }
        let Unpacker { stored, zstd } = unpacker;
        self.read_stored(frame, stored)?;
        data.clear();
        data.reserve(frame.info.raw as usize);
        let length = zstd.decompress_to_buffer(stored, data).at("zstd", &self.path)?;
        if length == frame.info.raw as usize { Ok(()) } else { Err(self.damaged("a frame of its data is too short")) }
    }

    fn read_stored(&self, frame: &Frame, stored: &mut Vec<u8>) -> Result<()> {
        stored.resize(frame.info.stored as usize, 0);
        self.file.read_exact_at(stored, frame.at).at("pread64", &self.path)?;
        if digest::of_bytes(stored, 0) == frame.info.digest {
            Ok(())
        } else {
            Err(self.damaged("the digest of a frame of its data is wrong"))
        }
    }

    pub(crate) fn damaged(&self, what: &str) -> Error {
        Error::Damaged { path: self.path.clone(), what: what.to_owned() }
    }
}

/// What frames are read through, again and again.
#[derive(Default)]
pub(crate) struct Unpacker {
    stored: Vec<u8>,
    zstd: Decompressor<'static>,
}

impl std::fmt::Debug for Unpacker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Unpacker").finish_non_exhaustive()
    }
}

/// A structure that fills `bytes`.
fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, postcard::Error> {
    match postcard::take_from_bytes(bytes)? {
        (value, []) => Ok(value),
        _ => Err(postcard::Error::DeserializeBadEncoding),
    }
}

/// What the types alone do not guarantee.
fn check(changes: &[Change], data_len: u64) -> Result<(), &'static str> {
    if changes.windows(2).any(|pair| pair[0].path >= pair[1].path) {
        return Err("its changes are not in path order");
    }
    let mut groups: HashMap<u32, &Node> = HashMap::new();
    for node in changes.iter().filter_map(|change| change.state.node()) {
        check_meta(&node.meta)?;
        match &node.kind {
            Kind::Symlink { target } if target.is_empty() || target.contains(&0) => {
                return Err("a symlink leads to an impossible name");
            }
            // Linux has 12 and 20 bits for them, and overlayfs has one of its own.
            &Kind::Device { block, major, minor }
                if major >= 1 << 12 || minor >= 1 << 20 || (block, major, minor) == (false, 0, 0) =>
            {
                return Err("a device has an impossible number");
            }
            Kind::File(content) => check_content(content, data_len)?,
            _ => {}
        }
        if node.group != 0 && (node.is_dir() || *groups.entry(node.group).or_insert(node) != node) {
            return Err("the names of a file say different things");
        }
    }
    Ok(())
}

fn check_meta(meta: &Meta) -> Result<(), &'static str> {
    // To chown(2) an owner of -1 means that there is none to be set.
    if meta.mode & !0o7777 != 0 || [meta.uid, meta.gid].contains(&u32::MAX) || meta.mtime_nsec >= 1_000_000_000 {
        return Err("a mode, an owner or a time is out of range");
    }
    if meta.xattrs.keys().any(|name| name.is_empty() || name.contains(&0) || is_never_data(name)) {
        return Err("an attribute has an impossible name");
    }
    if meta.xattrs.get(CAPABILITY.as_bytes()).is_some_and(Vec::is_empty) {
        return Err("an attribute has an impossible value");
    }
    Ok(())
}

fn check_content(content: &Content, data_len: u64) -> Result<(), &'static str> {
    if content.size > i64::MAX as u64 {
        return Err("a file is longer than one can be");
    }
    let mut at = 0;
    for &Stretch { offset, length, back, data } in &content.stretches {
        let end = offset.checked_add(length);
        let data_end = data.checked_add(length);
        if length == 0
            || offset < at
            || end.is_none_or(|end| end > content.size)
            || data_end.is_none_or(|end| back == 0 && end > data_len)
        {
            return Err("a file's stretches do not fit");
        }
        at = end.unwrap_or(u64::MAX);
    }
    let blocks = content.size.div_ceil(BLOCK as u64);
    let mut next = 0;
    for block in &content.blocks {
        if blocks < 2 || block.number < next || block.number >= blocks {
            return Err("a file's blocks do not fit");
        }
        next = block.number + 1;
    }
    Ok(())
}
