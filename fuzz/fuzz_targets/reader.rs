//! Arbitrary bytes as a checkpoint, behind the right digests.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| forge::fuzz::reader::read(input));
