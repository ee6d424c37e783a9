//! Arbitrary bytes as a checkpoint.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use rustix::fs::{MemfdFlags, memfd_create};
use syncd::chain::{Chain, FrameCache};
use syncd::digest::of_bytes;
use syncd::entry::Content;
use syncd::format::read::Checkpoint;
use syncd::format::write::{Packer, Writer};
use syncd::progress::Progress;

use crate::file::{Forge, encode, seal};

/// The most of a file's bytes that are read.
const READ: u64 = 8 << 20;

/// Reads what the input says, with the right digests. Its first byte says how: as a whole file, or in parts.
pub fn read(input: &[u8]) {
    let Some((&first, rest)) = input.split_first() else { return };
    let bytes = if first.is_multiple_of(4) {
        let mut bytes = rest.to_vec();
        seal(&mut bytes);
        bytes
    } else {
        from_parts(rest)
    };
    let (_memory, path) = file_of(&bytes);
    let Ok(checkpoint) = Checkpoint::open(&path) else { return };
    written_again(&checkpoint);
    if checkpoint.verify(&Progress::new(None)).is_err() {
        return;
    }
    let target = checkpoint.header.target.clone();
    let sequence = checkpoint.header.sequence;
    let Ok(Some(mut chain)) = Chain::new(vec![checkpoint], &target) else { return };
    let Ok(net) = chain.compose() else { return };
    let (_, _) = (net.groups(), net.hidden_directories());
    for content in net.entries.values().filter_map(|recorded| recorded.state.node()?.content()) {
        read_content(&chain, sequence, content);
    }
}

/// The lengths of header and index, in two bytes each; the header; the index; the data. The digests of the frames are
/// made right.
fn from_parts(parts: &[u8]) -> Vec<u8> {
    let Some((lengths, rest)) = parts.split_at_checked(4) else { return Vec::new() };
    let length = |at: usize| usize::from(u16::from_le_bytes([lengths[at], lengths[at + 1]]));
    let (header, rest) = rest.split_at(length(0).min(rest.len()));
    let (index, data) = rest.split_at(length(2).min(rest.len()));
    let forge = Forge { header: header.to_vec(), data: data.to_vec(), frames: Vec::new(), changes: Vec::new() };
    forge.build_with(&with_digests(index, data).unwrap_or_else(|| index.to_vec()))
}

fn with_digests(index: &[u8], mut data: &[u8]) -> Option<Vec<u8>> {
    let (mut frames, changes) = postcard::take_from_bytes::<Vec<(u32, u32, [u8; 16])>>(index).ok()?;
    for (_, stored, digest) in &mut frames {
        let (bytes, rest) = data.split_at_checked(usize::try_from(*stored).ok()?)?;
        *digest = of_bytes(bytes, 0).0.to_le_bytes();
        data = rest;
    }
    Some([&encode(&frames)[..], changes].concat())
}

/// The parts of a file that is put together, as an input.
#[must_use]
pub fn parts_of(forge: &Forge) -> Vec<u8> {
    let index = forge.index();
    let length = |bytes: &[u8]| u16::try_from(bytes.len()).unwrap().to_le_bytes();
    [&[1][..], &length(&forge.header), &length(&index), &forge.header, &index, &forge.data].concat()
}

fn file_of(bytes: &[u8]) -> (File, PathBuf) {
    let memory = File::from(memfd_create("checkpoint", MemfdFlags::CLOEXEC).unwrap());
    memory.write_all_at(bytes, 0).unwrap();
    let path = format!("/proc/self/fd/{}", memory.as_raw_fd()).into();
    (memory, path)
}

/// What was read and is written again is read the same.
fn written_again(checkpoint: &Checkpoint) {
    let (mut memory, path) = file_of(b"");
    let mut writer = Writer::new(&mut memory, Path::new("again"), &checkpoint.header).unwrap();
    let mut packer = Packer::new(1).unwrap();
    let mut left = checkpoint.data_len();
    if left > READ {
        return;
    }
    while left > 0 {
        let length = left.min(1 << 20);
        writer.frame(&packer.pack(vec![0; usize::try_from(length).unwrap()], Vec::new()).unwrap().0).unwrap();
        left -= length;
    }
    writer.finish(checkpoint.changes.clone().into_par_iter().map(Some), 1).unwrap();
    let again = Checkpoint::open(&path).unwrap();
    assert_eq!((&again.header, &again.changes), (&checkpoint.header, &checkpoint.changes));
    assert_eq!(again.data_len(), checkpoint.data_len());
}

fn read_content(chain: &Chain, sequence: u64, content: &Content) {
    let length: u64 = content.stretches.iter().map(|stretch| stretch.length).sum();
    if length > READ {
        return;
    }
    let mut at = 0;
    let mut read = 0;
    let done = chain.contents(sequence, content, &mut FrameCache::default(), &mut |offset, bytes| {
        assert!(offset >= at && !bytes.is_empty(), "{offset} after {at}");
        at = offset + bytes.len() as u64;
        read += bytes.len() as u64;
        assert!(at <= content.size, "bytes behind the end");
        Ok(())
    });
    // A frame may still be no zstd frame.
    assert!(done.is_err() || read == length, "{read} of {length} bytes");
}
