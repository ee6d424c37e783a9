//! Where things are in a file, and how long they say they are.

use super::{Case, full};
use crate::file::{Forge, encode, seal, trailer_at, varint};
use crate::sample::{FULL, dir, header, small};

/// More than any memory has.
const HUGE: [u64; 3] = [1 << 40, 1 << 60, u64::MAX];

pub(super) fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    prelude(&mut all);
    trailer(&mut all);
    header_fields(&mut all);
    lengths(&mut all);
    frames(&mut all);
    all
}

fn edited(edit: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut file = small().build();
    edit(&mut file);
    seal(&mut file);
    file
}

fn prelude(all: &mut Vec<Case>) {
    let version = |number: u32| edited(|file| file[8..12].copy_from_slice(&number.to_le_bytes()));
    all.push(Case::one("version 0", version(0), "its format is 0"));
    all.push(Case::one("the next version", version(2), "has format 2"));
    all.push(Case::one("the last version", version(u32::MAX), "has format 4294967295"));
    let header = |length: u32| edited(|file| file[12..16].copy_from_slice(&length.to_le_bytes()));
    all.push(Case::one("a header of 4 GiB", header(u32::MAX), "its header is longer than it can be"));
    all.push(Case::one("a header up to the trailer and more", header(65_536), "its header is longer than it can be"));
    all.push(Case::one("no header", header(0), "its header is malformed"));
}

fn trailer(all: &mut Vec<Case>) {
    let number = |which: usize, value: u64| {
        edited(|file| {
            let at = trailer_at(file) + which * 8;
            file[at..at + 8].copy_from_slice(&value.to_le_bytes());
        })
    };
    let where_it_is = "its index is not where it can be";
    for value in HUGE.into_iter().chain([0, 16]) {
        all.push(Case::one(&format!("index at {value}"), number(0, value), where_it_is));
        all.push(Case::one(&format!("index of {value} bytes"), number(1, value), where_it_is));
    }
    // Their sum is right again.
    let wrapped = edited(|file| {
        let end = trailer_at(file);
        file[end..end + 8].copy_from_slice(&u64::MAX.to_le_bytes());
        file[end + 8..end + 16].copy_from_slice(&(end as u64 + 1).to_le_bytes());
    });
    all.push(Case::one("index behind the end of all numbers", wrapped, where_it_is));
    for value in HUGE {
        let name = format!("index of {value} bytes before compression");
        all.push(Case::one(&name, number(2, value), "its index is longer than it can be"));
    }
    let raw = small().index().len() as u64;
    for value in [0, raw - 1, raw + 1] {
        let name = format!("index of {value} bytes where {raw} are");
        all.push(Case::one(&name, number(2, value), "its index is not as long as it says"));
    }
    let garbage = edited(|file| {
        let end = trailer_at(file);
        file[end - 20..end].fill(0xa5);
    });
    all.push(Case::one("an index that is no zstd frame", garbage, ""));
}

fn header_fields(all: &mut Vec<Case>) {
    let with = |header: Vec<u8>| Forge { header, ..small() }.build();
    let good = small().header;
    all.push(Case::one("a header cut short", with(good[..good.len() - 1].to_vec()), "its header is malformed"));
    all.push(Case::one("more than a header", with([&good[..], b"x"].concat()), "its header is malformed"));
    let target = [&varint(u64::MAX)[..], &good[1..]].concat();
    all.push(Case::one("a target of 2^64 bytes", with(target), "its header is malformed"));
    let mut text = good.clone();
    text[1] = 0xff;
    all.push(Case::one("a target that is no text", with(text), "its header is malformed"));
    for number in [0, 10_000_000_000, u64::MAX] {
        let file = Forge { header: encode(&header(number, FULL)), ..full() }.build();
        all.push(Case::one(&format!("checkpoint {number}"), file, "it has an impossible number"));
    }
}

/// Lengths and counts in the index, each before nothing.
fn lengths(all: &mut Vec<Case>) {
    let mut case = |name: &str, parts: &[&[u8]]| {
        for length in HUGE {
            let index = [&parts.concat()[..], &varint(length)].concat();
            let file = full().build_with(&index);
            all.push(Case::one(&format!("{name}: {length}"), file, "its index is malformed"));
        }
    };
    let (none, one) = (&[0][..], &[1][..]);
    case("frames", &[]);
    case("changes", &[none]);
    case("bytes of a path", &[none, one]);
    let node = |kind: u8| [0, 0, kind];
    // mode, uid, gid, mtime, nsec, immutable, append only
    let meta = &[0; 7][..];
    case("bytes of a symlink", &[none, one, none, &node(2)[1..]]);
    case("attributes", &[none, one, none, &node(3)[1..], meta]);
    case("bytes of an attribute's name", &[none, one, none, &node(3)[1..], meta, one]);
    case("bytes of an attribute's value", &[none, one, none, &node(3)[1..], meta, one, &[1, b'x']]);
    let file = [&node(0)[1..], &[0], &[0; 16], &[0]].concat();
    case("stretches", &[none, one, none, &file]);
    case("blocks", &[none, one, none, &file, none]);
    let index = [small().index(), b"x".to_vec()].concat();
    all.push(Case::one("more than an index", small().build_with(&index), "its index is malformed"));
}

fn frames(all: &mut Vec<Case>) {
    let with = |edit: &dyn Fn(&mut Forge)| {
        let mut forge = Forge::new(&header(1, FULL)).frame(b"0123456789").change(b"", dir(), None);
        edit(&mut forge);
        forge.build()
    };
    let length = "a frame of its data has an impossible length";
    all.push(Case::one("a frame of nothing", with(&|forge| forge.frames[0].raw = 0), length));
    all.push(Case::one("a frame longer in the file", with(&|forge| forge.frames[0].raw = 9), length));
    all.push(Case::one("a frame of 1 MiB and 1 byte", with(&|forge| forge.frames[0].raw = (1 << 20) + 1), length));
    all.push(Case::one("a frame of 4 GiB", with(&|forge| forge.frames[0].raw = u32::MAX), length));
    let sum = "its data is not as long as it says";
    all.push(Case::one("frames longer than the data", with(&|forge| forge.frames.push(forge.frames[0])), sum));
    all.push(Case::one("data without a frame", with(&|forge| forge.frames.clear()), sum));
    all.push(Case::one("data longer than the frames", with(&|forge| forge.data.push(0)), sum));
    let digest = "the digest of a frame of its data is wrong";
    all.push(Case::one("a frame with another digest", with(&|forge| forge.frames[0].digest.0 ^= 1), digest));
}
