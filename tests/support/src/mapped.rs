//! Writes through a shared mapping: what journald does, and what changes no time stamp on tmpfs.
#![allow(unsafe_code, reason = "mmap(2) has no safe form: another process may change the file")]

use std::ffi::c_void;
use std::fs::File;
use std::num::NonZeroUsize;
use std::ptr::NonNull;

use nix::sys::mman::{MapFlags, MsFlags, ProtFlags, mmap, msync, munmap};

/// A shared mapping of the start of a file.
#[derive(Debug)]
pub struct Mapping {
    start: NonNull<c_void>,
    length: NonZeroUsize,
}

impl Mapping {
    /// Maps the first `length` bytes of `file`, which must be at least as long.
    #[must_use]
    pub fn new(file: &File, length: usize) -> Self {
        assert!(file.metadata().unwrap().len() >= length as u64);
        let length = NonZeroUsize::new(length).unwrap();
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe { mmap(None, length, protection, MapFlags::MAP_SHARED, file, 0).unwrap() };
        Self { start, length }
    }

    /// Writes at the start of the file.
    pub fn write(&self, bytes: &[u8]) {
        self.write_at(0, bytes);
    }

    /// Writes somewhere in the file.
    pub fn write_at(&self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= self.length.get());
        // SAFETY: it lies within the mapping, to which there is no reference; what was truncated is a signal, no more.
        unsafe { self.start.as_ptr().cast::<u8>().add(at).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) }
    }

    /// Has the kernel write it to where it belongs.
    pub fn sync(&self) {
        // SAFETY: the mapping that `new` made.
        unsafe { msync(self.start, self.length.get(), MsFlags::MS_SYNC).unwrap() }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping that `new` made; nothing refers to it any more.
        unsafe { munmap(self.start, self.length.get()).unwrap() }
    }
}
