//! The log of a recording block device, in the format of the kernel's dm-log-writes, little endian throughout.
//!
//! ```text
//! sector 0    magic u64, version u64, number of entries u64, sector size u32
//! then, for each entry, in the order in which they were completed:
//! 1 sector    first sector u64, number of sectors u64, flags u64, data_len u64
//! …           the data, as many sectors; none for a discard
//! ```
//!
//! The number of entries is behind while the log is written. What counts is the length of the file: an entry is in it
//! before the request that it stands for is answered.

use std::ops::Range;

use anyhow::{Context, Result, bail};

const MAGIC: u64 = 0x006a_7366_7773_6872;
const VERSION: u64 = 1;
const FLUSH: u64 = 1;
const FUA: u64 = 2;
const DISCARD: u64 = 4;
const MARK: u64 = 8;

/// A whole log.
#[derive(Debug, Clone)]
pub(crate) struct Log {
    bytes: Vec<u8>,
    entries: Vec<Entry>,
}

/// One request that the device completed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Where it stands in the log.
    start: usize,
    /// Where it writes to, in bytes.
    pub offset: u64,
    /// Where its data stands in the log; empty for a mere flush.
    data: Range<usize>,
    /// What was written before is durable.
    pub flush: bool,
    /// What this one writes is durable.
    pub fua: bool,
}

impl Log {
    /// Reads a log.
    pub(crate) fn parse(bytes: Vec<u8>) -> Result<Self> {
        let head: Vec<u64> = (0..3).map(|index| number(&bytes, index * 8)).collect::<Result<_>>()?;
        let sector = number(&bytes, 24)? & u64::from(u32::MAX);
        if head[0] != MAGIC || head[1] != VERSION {
            bail!("this is no log of writes, or not of version {VERSION}");
        }
        let size = usize::try_from(sector).ok().filter(|size| size.is_power_of_two() && *size >= 512);
        let size = size.with_context(|| format!("sectors of {sector} bytes"))?;
        let mut entries = Vec::new();
        let mut at = size;
        while at < bytes.len() {
            let (entry, next) =
                entry(&bytes, at, size).with_context(|| format!("entry {} at byte {at}", entries.len()))?;
            entries.extend(entry);
            at = next;
        }
        Ok(Self { bytes, entries })
    }

    /// The requests, in order.
    pub(crate) fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// What an entry writes.
    pub(crate) fn data(&self, entry: &Entry) -> &[u8] {
        &self.bytes[entry.data.clone()]
    }

    /// How many requests had been answered, or were about to be, when the log had this length.
    pub(crate) fn count_at(&self, length: u64) -> usize {
        self.entries.partition_point(|entry| (entry.start as u64) < length)
    }

    /// The log, as it was read.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

/// The entry at a place, if it is of interest, and where the next one begins.
fn entry(bytes: &[u8], at: usize, size: usize) -> Result<(Option<Entry>, usize)> {
    let (sector, sectors) = (number(bytes, at)?, number(bytes, at + 8)?);
    let flags = number(bytes, at + 16)?;
    if flags & !(FLUSH | FUA | DISCARD | MARK) != 0 {
        bail!("unknown flags {flags:#x}");
    }
    let data = at + size;
    if flags & (DISCARD | MARK) != 0 {
        // What is discarded may keep its contents, and here it does.
        return Ok((None, data));
    }
    let length = usize::try_from(sectors).ok().and_then(|sectors| sectors.checked_mul(size));
    let end = length.and_then(|length| data.checked_add(length)).filter(|&end| end <= bytes.len());
    let end = end.context("the log ends within it")?;
    let offset = sector.checked_mul(size as u64).context("it lies beyond every device")?;
    let entry = Entry { start: at, offset, data: data..end, flush: flags & FLUSH != 0, fua: flags & FUA != 0 };
    Ok((Some(entry), end))
}

fn number(bytes: &[u8], at: usize) -> Result<u64> {
    let eight =
        bytes.get(at..at + 8).and_then(|eight| eight.try_into().ok()).context("the log ends within a number")?;
    Ok(u64::from_le_bytes(eight))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    fn padded(numbers: &[u64]) -> Vec<u8> {
        let mut sector: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
        sector.resize(512, 0);
        sector
    }

    impl Log {
        /// The same, with an entry written through.
        pub(in crate::crash) fn with_fua(mut self, index: usize) -> Self {
            self.entries[index].fua = true;
            self
        }
    }

    /// A log in which each element is a write (sector, number of sectors, what they are full of), or a flush.
    pub(in crate::crash) fn log(entries: &[Option<(u64, usize, u8)>]) -> Log {
        let mut bytes = padded(&[MAGIC, VERSION, 0, 512]);
        for entry in entries {
            match *entry {
                Some((sector, sectors, byte)) => {
                    bytes.extend(padded(&[sector, sectors as u64, 0, 0]));
                    bytes.extend(vec![byte; sectors * 512]);
                }
                None => bytes.extend(padded(&[0, 0, FLUSH, 0])),
            }
        }
        Log::parse(bytes).unwrap()
    }

    #[test]
    fn writes_and_flushes_are_read_in_order() {
        let log = log(&[Some((8, 2, 7)), None, Some((0, 1, 9))]);
        let [first, flush, last] = log.entries() else { panic!("{:?}", log.entries()) };
        assert_eq!((first.offset, log.data(first)), (4096, &[7; 1024][..]));
        assert!(flush.flush && log.data(flush).is_empty());
        assert_eq!((last.offset, log.data(last)), (0, &[9; 512][..]));
    }

    #[test]
    fn a_length_says_what_had_been_answered() {
        let log = log(&[Some((8, 2, 7)), None, Some((0, 1, 9))]);
        let counts = [512, 513, 512 + 1536, 512 + 1536 + 512, 1 << 20].map(|length| log.count_at(length));
        assert_eq!(counts, [0, 1, 1, 2, 3]);
    }

    #[test]
    fn marks_and_discards_have_no_data_and_are_passed_over() {
        let mut bytes = padded(&[MAGIC, VERSION, 3, 512]);
        bytes.extend(padded(&[8, 100, DISCARD, 0]));
        bytes.extend(padded(&[0, 0, MARK, 4]));
        bytes.extend(padded(&[0, 0, FLUSH, 0]));
        assert_eq!(Log::parse(bytes).unwrap().entries().len(), 1);
    }

    #[test]
    fn what_is_no_whole_log_is_refused() {
        assert!(Log::parse(Vec::new()).is_err());
        assert!(Log::parse(padded(&[1, VERSION, 0, 512])).is_err());
        let mut cut = padded(&[MAGIC, VERSION, 1, 512]);
        cut.extend(padded(&[0, 1, 0, 0]));
        assert!(format!("{:#}", Log::parse(cut).unwrap_err()).contains("the log ends within it"));
        let mut unknown = padded(&[MAGIC, VERSION, 1, 512]);
        unknown.extend(padded(&[0, 0, 64, 0]));
        assert!(Log::parse(unknown).is_err());
    }
}
