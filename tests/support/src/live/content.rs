//! What is in the files: slots that say by which operation they were written. All zeros is a hole.

/// The length of a slot.
pub(super) const SLOT: usize = 64;
/// A slot that is no operation's.
pub(super) const TORN: u32 = u32::MAX;

/// A slot as an operation writes it at its place in a file.
fn slot(operation: u32, at: usize) -> [u8; SLOT] {
    let mut bytes = [0; SLOT];
    let mut word = u64::from(operation) << 32 | at as u64;
    for chunk in bytes.chunks_exact_mut(8) {
        chunk.copy_from_slice(&word.to_le_bytes());
        word = word.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29) ^ 0x5851_f42d_4c95_7f2d;
    }
    bytes
}

/// What an operation writes into some slots.
pub(super) fn encode(operation: u32, at: usize, count: usize) -> Vec<u8> {
    (at..at + count).flat_map(|at| slot(operation, at)).collect()
}

/// Which operations wrote a file: 0 for a hole, [`TORN`] for a slot that nobody wrote so.
pub(super) fn decode(bytes: &[u8]) -> Vec<u32> {
    let one = |(at, bytes): (usize, &[u8])| {
        if bytes.len() == SLOT && bytes.iter().all(|&byte| byte == 0) {
            return 0;
        }
        let operation = bytes.get(4..8).map_or(TORN, |bytes| u32::from_le_bytes(bytes.try_into().unwrap()));
        if bytes == slot(operation, at) { operation } else { TORN }
    };
    bytes.chunks(SLOT).enumerate().map(one).collect()
}
