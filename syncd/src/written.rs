//! How much was written to the disk for a target: in this boot, and in all.
//!
//! Counting writes nothing itself. What was written before a checkpoint stands in its header, and what it adds is its
//! own length; a merge adds the contents that it wrote, and the sum goes into the record that ends it. Work that failed,
//! or was cut, is in neither, nor are copies of what lost a conflict. What counts are whole pages of contents: what a file
//! system writes for itself (inodes, its journal) comes on top.
//!
//! The kernel's own account of a process (`/proc/self/io`) is of no use for this: where a page cache has large folios, one
//! page that is written in place counts as a whole folio.

use std::fs;

use serde::{Deserialize, Serialize};

/// What a disk is written in.
const PAGE: u64 = 4096;

/// Bytes that were written for a target.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Account {
    /// The kernel's `boot_id` of the boot that wrote last; empty where there is none.
    pub boot_id: String,
    /// What was written in that boot.
    pub in_boot: u64,
    /// What was ever written.
    pub in_all: u64,
}

impl Account {
    /// The same as seen from a boot: what others wrote counts in all only.
    #[must_use]
    pub fn seen_from(&self, boot_id: &str) -> Self {
        let is_same = !boot_id.is_empty() && self.boot_id == boot_id;
        Self { boot_id: boot_id.to_owned(), in_boot: if is_same { self.in_boot } else { 0 }, in_all: self.in_all }
    }

    /// With `bytes` more in the boot that wrote last.
    #[must_use]
    pub fn and(self, bytes: u64) -> Self {
        let [in_boot, in_all] = [self.in_boot, self.in_all].map(|before| before.saturating_add(bytes));
        Self { in_boot, in_all, ..self }
    }
}

/// What `length` bytes of a file take.
#[must_use]
pub fn pages(length: u64) -> u64 {
    length.checked_next_multiple_of(PAGE).unwrap_or(length)
}

/// The `boot_id` of the kernel that runs.
#[must_use]
pub fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_boot_begins_anew_and_goes_on_in_all() {
        let first = Account::default().seen_from("one").and(10).and(5);
        assert_eq!((first.in_boot, first.in_all), (15, 15));
        let second = first.seen_from("two").and(3);
        assert_eq!(second, Account { boot_id: "two".to_owned(), in_boot: 3, in_all: 18 });
        assert_eq!(second.seen_from("two"), second);
        // Where a kernel names no boot, none is taken for another.
        assert_eq!(first.seen_from("").and(3).seen_from("").in_boot, 0);
    }

    #[test]
    fn a_file_takes_whole_pages() {
        assert_eq!([0, 1, 4096, 4097, u64::MAX].map(pages), [0, 4096, 4096, 8192, u64::MAX]);
    }
}
