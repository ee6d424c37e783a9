//! Reads the contents of a regular file, holes told from data, while others may be writing to it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use ephemeral_overlay::error::{At, SystemError};
use rustix::fs::{SeekFrom, fstat, seek};
use rustix::io::Errno;

use crate::digest::{BLOCK, Digest, FileHasher};
use crate::error::Result;
use crate::scan::Stamp;

/// How often a file that changes while it is read is read before it is taken as it is.
const TRIES: usize = 3;

/// What a complete read found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Read {
    /// Length in bytes.
    pub size: u64,
    /// Digest of the contents.
    pub digest: Digest,
    /// It changed during each of [`TRIES`] reads.
    pub fuzzy: bool,
}

/// Takes the data of a file as it is read.
pub trait Sink {
    /// A read begins, from the file's start; whatever came before is void.
    fn begin(&mut self);
    /// The bytes at `offset`; ascending, and what is left out is a hole.
    ///
    /// # Errors
    /// Whatever the sink has to say.
    fn data(&mut self, offset: u64, bytes: &[u8]) -> Result<()>;
}

/// A sink for those who only want the digest.
#[derive(Debug, Clone, Copy)]
pub struct NoSink;

impl Sink for NoSink {
    fn begin(&mut self) {}
    fn data(&mut self, _offset: u64, _bytes: &[u8]) -> Result<()> {
        Ok(())
    }
}

/// Reads the whole file: status, contents, status, again while the two differ.
///
/// # Errors
/// Whatever fstat(2), lseek(2), pread(2) or the sink says.
pub fn read(file: &File, seed: u64, buffer: &mut Vec<u8>, path: &Path, sink: &mut impl Sink) -> Result<Read> {
    let mut tries = 1;
    loop {
        let before = stamp(file, path)?;
        sink.begin();
        let mut read = read_once(file, seed, buffer, path, sink)?;
        let changed = before != stamp(file, path)?;
        if !changed || tries == TRIES {
            read.fuzzy = changed;
            return Ok(read);
        }
        tries += 1;
    }
}

fn stamp(file: &File, path: &Path) -> Result<Stamp, SystemError> {
    Ok(Stamp::of(&fstat(file).at("fstat", path)?))
}

fn read_once(file: &File, seed: u64, buffer: &mut Vec<u8>, path: &Path, sink: &mut impl Sink) -> Result<Read> {
    buffer.resize(BLOCK, 0);
    let mut hasher = FileHasher::new(seed);
    let mut at = 0;
    'segments: loop {
        let start = match seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            // No data from here to the end.
            Err(Errno::NXIO) => {
                let size = stamp(file, path)?.size;
                hasher.update_zeros(size.saturating_sub(at));
                at = at.max(size);
                break;
            }
            Err(error) => return Err(error).at("lseek", path).map_err(Into::into),
        };
        hasher.update_zeros(start - at);
        at = start;
        let end = match seek(file, SeekFrom::Hole(start)) {
            Ok(end) => end,
            // Cut off since.
            Err(Errno::NXIO) => break,
            Err(error) => return Err(error).at("lseek", path).map_err(Into::into),
        };
        while at < end {
            // To the next block boundary of the file, so that a digest's block is one read.
            let room = (BLOCK as u64 - at % BLOCK as u64).min(end - at);
            let length = usize::try_from(room).unwrap_or(BLOCK);
            let length = file.read_at(&mut buffer[..length], at).at("pread64", path)?;
            if length == 0 {
                break 'segments;
            }
            hasher.update(&buffer[..length]);
            sink.data(at, &buffer[..length])?;
            at += length as u64;
        }
    }
    Ok(Read { size: at, digest: hasher.finish(), fuzzy: false })
}

#[cfg(test)]
mod tests {
    use std::io::{Seek, Write};

    use super::*;

    struct Collect(Vec<(u64, Vec<u8>)>);

    impl Sink for Collect {
        fn begin(&mut self) {
            self.0.clear();
        }
        fn data(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
            self.0.push((offset, bytes.to_vec()));
            Ok(())
        }
    }

    #[test]
    fn holes_cost_nothing_and_do_not_change_the_digest() {
        let mut sparse = tempfile::tempfile().unwrap();
        sparse.seek(std::io::SeekFrom::Start(300 << 20)).unwrap();
        sparse.write_all(b"end").unwrap();
        sparse.set_len((300 << 20) + 5000).unwrap();
        let mut collect = Collect(Vec::new());
        let first = read(&sparse, 1, &mut Vec::new(), Path::new("sparse"), &mut collect).unwrap();
        assert_eq!(first.size, (300 << 20) + 5000);
        let data: usize = collect.0.iter().map(|(_, bytes)| bytes.len()).sum();
        assert!(data <= 64 * 1024, "{data} bytes of data");

        let mut dense = tempfile::tempfile().unwrap();
        for _ in 0..300 {
            dense.write_all(&vec![0; 1 << 20]).unwrap();
        }
        dense.write_all(b"end").unwrap();
        dense.write_all(&vec![0; 4997]).unwrap();
        let second = read(&dense, 1, &mut Vec::new(), Path::new("dense"), &mut NoSink).unwrap();
        assert_eq!(first, second);
    }
}
