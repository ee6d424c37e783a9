//! Writes what a chain says as an OCI image layer: a tar archive over the root of the system, in the pax format, with
//! whiteouts (`.wh.NAME`, `.wh..wh..opq`) for what is deleted, as the OCI image specification has it. Extended
//! attributes, ACLs among them, are records `SCHILY.xattr.NAME`, as GNU tar and container tools write them.

use std::collections::{BTreeMap, HashSet};
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use ephemeral_overlay::error::At;
use tar::{Builder, EntryType, Header};

use crate::chain::{Chain, FrameCache, Net, Recorded};
use crate::entry::{Content, Kind, Meta, Node, Stretch};
use crate::error::Result;
use crate::path::RelPath;

/// What the name of a whiteout begins with.
const WHITEOUT: &[u8] = b".wh.";
/// The name in a directory that hides all that lower has in it.
const OPAQUE: &[u8] = b".wh..wh..opq";
/// The longest path that the plain header takes.
const PLAIN: usize = 100;
/// Holes of less than this in all are written as zeros, which every reader of tar understands.
const SPARSE: u64 = 1 << 20;

/// What cannot be in an archive, with the reason.
pub type Left = Vec<(RelPath, &'static str)>;

/// A layer that is being written.
pub struct Layer<'a, W: Write> {
    builder: Builder<W>,
    /// Where it is written to, for messages.
    path: &'a Path,
}

impl<W: Write> std::fmt::Debug for Layer<'_, W> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Layer").field("path", &self.path).finish_non_exhaustive()
    }
}

impl<'a, W: Write> Layer<'a, W> {
    /// Begins a layer in `out`; `path` is for messages.
    pub fn new(out: W, path: &'a Path) -> Self {
        Self { builder: Builder::new(out), path }
    }

    /// Adds the net state of the chain of `target`.
    ///
    /// # Errors
    /// When the chain cannot be read, or the archive cannot be written.
    pub fn add(&mut self, target: &Path, chain: &Chain, net: &Net) -> Result<Left> {
        let hidden = net.hidden_directories();
        let mut groups: BTreeMap<(u64, u32), &RelPath> = BTreeMap::new();
        let mut frames = FrameCache::default();
        let mut left = Left::new();
        let prefix = target.strip_prefix("/").unwrap_or(target).as_os_str().as_bytes();
        for (path, Recorded { state, seq }) in &net.entries {
            let name = inside(prefix, path);
            let Some(node) = state.node() else {
                self.empty(&inside(prefix, &whiteout(path)))?;
                continue;
            };
            if path.components().any(|name| name.as_bytes().starts_with(WHITEOUT)) {
                left.push((path.clone(), "its name means something else in a layer"));
                continue;
            }
            if let Some(leader) = (node.group != 0).then(|| groups.get(&(*seq, node.group))).flatten() {
                let mut records = Records::of(&node.meta, &name);
                records.link(&inside(prefix, leader));
                self.entry(header(&node.meta, EntryType::Link), &records, &mut std::io::empty(), 0)?;
                continue;
            }
            let mut records = Records::of(&node.meta, &name);
            if records.is_incomplete {
                left.push((path.clone(), "an attribute has a name that is no text"));
            }
            match &node.kind {
                Kind::Socket => {
                    // What it replaced is gone all the same.
                    self.empty(&inside(prefix, &whiteout(path)))?;
                    left.push((path.clone(), "it is a socket"));
                    continue;
                }
                Kind::File(content) => self.file(node, content, records, *seq, chain, &mut frames)?,
                kind => {
                    let mut header = header(&node.meta, entry_type(kind));
                    if let Kind::Symlink { target } = kind {
                        records.link(target);
                    }
                    if let Kind::Device { major, minor, .. } = *kind {
                        header.set_device_major(major).at("encode", self.path)?;
                        header.set_device_minor(minor).at("encode", self.path)?;
                    }
                    self.entry(header, &records, &mut std::io::empty(), 0)?;
                }
            }
            if node.group != 0 {
                groups.insert((*seq, node.group), path);
            }
            if node.is_opaque() && is_outermost(path, &hidden) {
                self.empty(&[&name[..], b"/", OPAQUE].concat())?;
            }
        }
        Ok(left)
    }

    /// Ends the archive; returns what it was written to.
    ///
    /// # Errors
    /// Whatever writing says.
    pub fn finish(self) -> Result<W> {
        Ok(self.builder.into_inner().at("write", self.path)?)
    }

    fn file(
        &mut self,
        node: &Node,
        content: &Content,
        mut records: Records,
        seq: u64,
        chain: &Chain,
        frames: &mut FrameCache,
    ) -> Result<()> {
        let data: u64 = content.stretches.iter().map(|stretch| stretch.length).sum();
        let header = header(&node.meta, EntryType::Regular);
        if content.size - data < SPARSE {
            let mut reader = Reader::new(chain, seq, content, frames, true);
            let done = self.entry(header, &records, &mut reader, content.size);
            return reader.error.map_or(done, Err);
        }
        let map = sparse_map(content);
        records.sparse(content.size);
        let mut reader = Reader::new(chain, seq, content, frames, false);
        let done = self.entry(header, &records, &mut map.chain(&mut reader), map.len() as u64 + data);
        reader.error.map_or(done, Err)
    }

    /// An empty file that only says something by its name.
    fn empty(&mut self, name: &[u8]) -> Result<()> {
        let meta = Meta { mode: 0o600, ..Meta::default() };
        let records = Records::of(&meta, name);
        self.entry(header(&meta, EntryType::Regular), &records, &mut std::io::empty(), 0)
    }

    fn entry(&mut self, mut header: Header, records: &Records, data: &mut dyn Read, size: u64) -> Result<()> {
        header.set_size(size);
        let ustar = header.as_ustar_mut().map(|ustar| &mut ustar.name[..]).unwrap_or_default();
        let plain = &records.name[..records.name.len().min(PLAIN)];
        ustar[..plain.len()].copy_from_slice(plain);
        if let Some(target) = &records.target {
            let plain = &target[..target.len().min(PLAIN)];
            let ustar = header.as_ustar_mut().map(|ustar| &mut ustar.linkname[..]).unwrap_or_default();
            ustar[..plain.len()].copy_from_slice(plain);
        }
        header.set_cksum();
        let records = records.all.iter().map(|(key, value)| (key.as_str(), &value[..]));
        self.builder.append_pax_extensions(records).at("write", self.path)?;
        Ok(self.builder.append(&header, data).at("write", self.path)?)
    }
}

/// The path of an entry in the layer.
fn inside(prefix: &[u8], path: &RelPath) -> Vec<u8> {
    if path.is_root() {
        return prefix.to_vec();
    }
    [prefix, b"/", path.as_path().as_os_str().as_bytes()].concat()
}

/// What hides `path`.
fn whiteout(path: &RelPath) -> RelPath {
    let mut name = WHITEOUT.to_vec();
    name.extend_from_slice(path.name().as_bytes());
    path.parent().unwrap_or_default().child(std::ffi::OsStr::from_bytes(&name))
}

/// Below an opaque directory nothing of lower is left to be hidden.
fn is_outermost(path: &RelPath, hidden: &HashSet<&RelPath>) -> bool {
    path.parent().is_none_or(|parent| !hidden.contains(&parent))
}

fn entry_type(kind: &Kind) -> EntryType {
    match kind {
        Kind::Dir { .. } => EntryType::Directory,
        Kind::Symlink { .. } => EntryType::Symlink,
        Kind::Fifo => EntryType::Fifo,
        Kind::Device { block: true, .. } => EntryType::Block,
        Kind::Device { block: false, .. } => EntryType::Char,
        Kind::File(_) | Kind::Socket => EntryType::Regular,
    }
}

fn header(meta: &Meta, kind: EntryType) -> Header {
    let mut header = Header::new_ustar();
    header.set_entry_type(kind);
    header.set_mode(meta.mode);
    // What the fields cannot hold is in the records.
    header.set_uid(if meta.uid < 1 << 21 { meta.uid.into() } else { 0 });
    header.set_gid(if meta.gid < 1 << 21 { meta.gid.into() } else { 0 });
    header.set_mtime(u64::try_from(meta.mtime).unwrap_or(0).min((1 << 33) - 1));
    header
}

/// The pax records of one entry.
struct Records {
    name: Vec<u8>,
    target: Option<Vec<u8>>,
    all: Vec<(String, Vec<u8>)>,
    /// Something could not be said.
    is_incomplete: bool,
}

impl Records {
    fn of(meta: &Meta, name: &[u8]) -> Self {
        let mut records = Self { name: name.to_vec(), target: None, all: Vec::new(), is_incomplete: false };
        if name.len() > PLAIN || !name.is_ascii() {
            records.push("path", name);
        }
        records.push("mtime", format!("{}", Time(meta)).as_bytes());
        for (key, id) in [("uid", meta.uid), ("gid", meta.gid)] {
            if id >= 1 << 21 {
                records.push(key, id.to_string().as_bytes());
            }
        }
        let flags: Vec<_> = [("append", meta.append_only), ("immutable", meta.immutable)]
            .iter()
            .filter_map(|(flag, is_set)| is_set.then_some(*flag))
            .collect();
        if !flags.is_empty() {
            records.push("SCHILY.fflags", flags.join(",").as_bytes());
        }
        for (key, value) in &meta.xattrs {
            match std::str::from_utf8(key) {
                // A record ends its key with the first `=`.
                Ok(key) if !key.contains('=') => records.push(&format!("SCHILY.xattr.{key}"), value),
                _ => records.is_incomplete = true,
            }
        }
        records
    }

    fn push(&mut self, key: &str, value: &[u8]) {
        self.all.push((key.to_owned(), value.to_vec()));
    }

    fn link(&mut self, target: &[u8]) {
        if target.len() > PLAIN || !target.is_ascii() {
            self.push("linkpath", target);
        }
        self.target = Some(target.to_vec());
    }

    /// GNU's sparse format 1.0: the data begin with a map.
    fn sparse(&mut self, size: u64) {
        let name = std::mem::take(&mut self.name);
        self.all.retain(|(key, _)| key != "path");
        self.push("GNU.sparse.major", b"1");
        self.push("GNU.sparse.minor", b"0");
        self.push("GNU.sparse.name", &name);
        self.push("GNU.sparse.realsize", size.to_string().as_bytes());
        // Who does not know the format sees this name.
        self.name = [b"GNUSparseFile.0/", &name[..]].concat();
        if self.name.len() > PLAIN || !self.name.is_ascii() {
            let name = self.name.clone();
            self.push("path", &name);
        }
    }
}

/// A time as pax writes it: a decimal fraction, negative before the epoch.
struct Time<'a>(&'a Meta);

impl std::fmt::Display for Time<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Meta { mtime, mtime_nsec, .. } = self.0;
        match (*mtime, *mtime_nsec) {
            (seconds, 0) => write!(f, "{seconds}"),
            (seconds, nanoseconds) if seconds < 0 => {
                write!(f, "-{}.{:09}", seconds.unsigned_abs() - 1, 1_000_000_000 - nanoseconds)
            }
            (seconds, nanoseconds) => write!(f, "{seconds}.{nanoseconds:09}"),
        }
    }
}

/// The number of stretches, then where each begins and how long it is, a line each, in whole blocks of 512 bytes.
fn sparse_map(content: &Content) -> Vec<u8> {
    // The end of the file, where a hole is last.
    let end = [(content.size, 0)];
    let stretches = content.stretches.iter().map(|stretch| (stretch.offset, stretch.length)).chain(end);
    let count = content.stretches.len() as u64 + 1;
    let numbers = std::iter::once(count).chain(stretches.flat_map(|(offset, length)| [offset, length]));
    let mut map: Vec<u8> = numbers.flat_map(|number| format!("{number}\n").into_bytes()).collect();
    map.resize(map.len().next_multiple_of(512), 0);
    map
}

/// Reads a file out of a chain, with its holes as zeros or without them.
struct Reader<'a> {
    chain: &'a Chain,
    seq: u64,
    frames: &'a mut FrameCache,
    /// What comes next, the last one first.
    rest: Vec<Piece>,
    /// Why it ended early: `Read` takes only its own kind of errors.
    error: Option<crate::Error>,
}

#[derive(Debug, Clone, Copy)]
enum Piece {
    Zeros(u64),
    Data(Stretch),
}

impl<'a> Reader<'a> {
    fn new(chain: &'a Chain, seq: u64, content: &Content, frames: &'a mut FrameCache, holes: bool) -> Self {
        let (mut rest, mut at) = (Vec::new(), 0);
        for stretch in &content.stretches {
            if holes && stretch.offset > at {
                rest.push(Piece::Zeros(stretch.offset - at));
            }
            rest.push(Piece::Data(*stretch));
            at = stretch.offset + stretch.length;
        }
        if holes && content.size > at {
            rest.push(Piece::Zeros(content.size - at));
        }
        rest.reverse();
        Self { chain, seq, frames, rest, error: None }
    }
}

impl Read for Reader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let Some(piece) = self.rest.pop() else { return Ok(0) };
        let fits = |length: u64| usize::try_from(length).unwrap_or(usize::MAX).min(buffer.len());
        match piece {
            Piece::Zeros(length) => {
                let now = fits(length);
                buffer[..now].fill(0);
                if length > now as u64 {
                    self.rest.push(Piece::Zeros(length - now as u64));
                }
                Ok(now)
            }
            Piece::Data(stretch) => {
                let now = fits(stretch.length);
                let (head, tail) = stretch.split(now as u64);
                self.rest.extend(tail.map(Piece::Data));
                let mut done = 0;
                let read = self.chain.stretches(self.seq, std::iter::once(head), self.frames, &mut |_, bytes| {
                    buffer[done..done + bytes.len()].copy_from_slice(bytes);
                    done += bytes.len();
                    Ok(())
                });
                if let Err(error) = read {
                    let text = error.to_string();
                    self.error = Some(error);
                    return Err(std::io::Error::other(text));
                }
                Ok(now)
            }
        }
    }
}
