//! Writes through a shared mapping: what journald does, and what changes no time stamp on tmpfs.
#![allow(unsafe_code, reason = "mmap(2) has no safe form: another process may change the file")]

use std::fs::File;
use std::num::NonZeroUsize;

use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, munmap};

/// Writes `bytes` at the start of `file`, which must be at least as long, through a shared mapping.
pub(crate) fn write(file: &File, bytes: &[u8]) {
    let length = NonZeroUsize::new(bytes.len()).unwrap();
    assert!(file.metadata().unwrap().len() >= bytes.len() as u64);
    // SAFETY: a new mapping at an address of the kernel's choice. It is as long as the copy, lies within the file,
    // which nothing truncates meanwhile, and is unmapped before the reference to it ends.
    unsafe {
        let map =
            mmap(None, length, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED, file, 0).unwrap();
        madvise(map, length.get(), MmapAdvise::MADV_NORMAL).unwrap();
        std::ptr::copy_nonoverlapping(bytes.as_ptr(), map.as_ptr().cast::<u8>(), bytes.len());
        munmap(map, length.get()).unwrap();
    }
}
