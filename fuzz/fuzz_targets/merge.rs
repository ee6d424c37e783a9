//! A chain, composed and merged into a directory on a file system that is mounted nowhere. Needs root.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| forge::fuzz::merge::merge_bytes(input));
