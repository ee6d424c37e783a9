//! Damaged and hostile checkpoints, as far as reading them goes: each is refused, with an error that names the file.
//! What a merge makes of them is in tests/namespace/damage.rs.

#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "tests may unwrap, and talk")]

use std::fs;
use std::path::Path;

use forge::cases::{self, Case};
use forge::file::{Forge, seal, trailer_at};
use forge::sample;
use syncd::chain::{FrameCache, Net};
use syncd::format::read::Checkpoint;
use syncd::progress::Progress;
use syncd::store::{Store, TargetStore};
use syncd::{Error, Result};

/// Everything that a merge reads before it writes anything.
fn read(store: &TargetStore) -> Result<Option<Net>> {
    let Some(mut chain) = store.chain()? else { return Ok(None) };
    chain.verify(&Progress::new(None))?;
    chain.compose().map(Some)
}

fn verified(path: &Path, bytes: &[u8]) -> Result<Checkpoint> {
    fs::write(path, bytes).unwrap();
    let checkpoint = Checkpoint::open(path)?;
    checkpoint.verify(&Progress::new(None))?;
    Ok(checkpoint)
}

/// Expects a file to be refused for its bytes alone, by name.
fn assert_damaged(path: &Path, bytes: &[u8], what: &str) {
    match verified(path, bytes) {
        Ok(_) => panic!("{what}: it was accepted"),
        Err(error @ (Error::Damaged { .. } | Error::Newer { .. })) => {
            assert!(error.to_string().contains(path.to_str().unwrap()), "{what}: {error}");
        }
        Err(error) => panic!("{what}: {error}"),
    }
}

#[test]
fn every_length_but_the_right_one_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("0000000001.ckpt");
    let good = sample::small().build();
    verified(&path, &good).unwrap();
    for length in 0..good.len() {
        assert_damaged(&path, &good[..length], &format!("cut to {length} of {} bytes", good.len()));
    }
    // The last one ends as a checkpoint does, with a trailer that leads to the wrong place.
    for (what, more) in [("a zero", &[0][..]), ("a block of zeros", &[0; 4096]), ("itself", &good)] {
        assert_damaged(&path, &[&good[..], more].concat(), &format!("{what} behind it"));
    }
}

#[test]
fn a_flipped_bit_in_any_byte_is_found() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("0000000001.ckpt");
    let good = sample::small().build();
    for at in 0..good.len() {
        let mut bytes = good.clone();
        bytes[at] ^= 1 << (at % 8);
        assert_damaged(&path, &bytes, &format!("bit {} of byte {at} of {}", at % 8, good.len()));
    }
}

#[test]
fn every_zeroed_block_is_found() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("0000000001.ckpt");
    // No byte is zero, so a block of zeros is always damage.
    let piece = |seed: usize| -> Vec<u8> { (0..9000).map(|at| u8::try_from(at * seed % 255 + 1).unwrap()).collect() };
    let mut forge = sample::small();
    for seed in 1..6 {
        forge = forge.frame(&piece(seed));
    }
    let good = forge.build();
    verified(&path, &good).unwrap();
    for block in [512, 4096] {
        for from in (0..good.len()).step_by(block) {
            let mut bytes = good.clone();
            let end = good.len().min(from + block);
            bytes[from..end].fill(0);
            assert_damaged(&path, &bytes, &format!("{block} zeros at {from} of {}", good.len()));
        }
    }
}

/// What a sector that was written in another place leaves.
#[test]
fn blocks_that_changed_places_are_found() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("0000000001.ckpt");
    let mut forge = sample::small();
    for byte in 1..10 {
        forge = forge.frame(&[byte; 512]);
    }
    let good = forge.build();
    for from in (0..good.len() - 1024).step_by(512) {
        let mut bytes = good.clone();
        bytes[from..from + 1024].rotate_left(512);
        assert_damaged(&path, &bytes, &format!("sectors at {from} swapped"));
    }
}

/// A store with nothing in it, for the target of the sample.
fn empty_store() -> (tempfile::TempDir, TargetStore) {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(directory.path()).unwrap().target(Path::new(sample::TARGET));
    fs::create_dir_all(store.directory()).unwrap();
    (directory, store)
}

/// What is wrong with how a case is refused, if anything is.
fn complaint(case: &Case) -> Option<String> {
    let (_directory, store) = empty_store();
    case.write(store.directory());
    let Err(error) = read(&store) else { return Some(format!("{}: it was accepted", case.name)) };
    let text = anyhow::Error::from(error).chain().map(ToString::to_string).collect::<Vec<_>>().join(": ");
    let blamed = store.directory().join(TargetStore::file_name(case.blame));
    let complete = text.contains(case.says) && text.contains(blamed.to_str().unwrap());
    (!complete).then(|| format!("{}: {text}, and not {:?} of {}", case.name, case.says, case.blame))
}

#[test]
fn what_no_writer_would_write_is_refused() {
    let all = cases::all();
    assert!(all.len() > 200, "{} cases", all.len());
    let complaints: Vec<_> = all.iter().filter_map(complaint).collect();
    assert!(complaints.is_empty(), "{} of {}:\n{}", complaints.len(), all.len(), complaints.join("\n"));
}

#[test]
fn the_sample_is_a_chain() {
    let (_directory, store) = empty_store();
    fs::write(store.directory().join("0000000001.ckpt"), sample::small().build()).unwrap();
    let net = read(&store).unwrap().unwrap();
    assert_eq!(net.entries.len(), sample::small().changes.len() - 1, "all but what is as in lower");
}

/// A frame whose digest is right and that is no zstd frame, or not one of this length: only reading it shows that.
#[test]
fn a_frame_that_cannot_be_unpacked_is_an_error() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("0000000001.ckpt");
    let packed = zstd::bulk::compress(&[b'x'; 5000], 3).unwrap();
    let declares_more = zstd::bulk::compress(&vec![b'x'; 1 << 20], 3).unwrap();
    let frames =
        [("garbage", &b"0123456789"[..]), ("nothing", b""), ("too short", &packed), ("too long", &declares_more)];
    for (what, stored) in frames {
        let forge = Forge::new(&sample::header(1, sample::FULL)).packed_frame(5001, stored);
        let file = forge.change(b"", sample::dir(), None).change(b"x", sample::file(b"x", 0), None).build();
        fs::write(&path, &file).unwrap();
        let mut chain = syncd::chain::Chain::new(vec![Checkpoint::open(&path).unwrap()], Path::new(sample::TARGET))
            .unwrap()
            .unwrap();
        let net = chain.compose().unwrap();
        let content = net.entries.values().find_map(|recorded| recorded.state.node()?.content()).unwrap();
        let error = chain.contents(1, content, &mut FrameCache::default(), &mut |_, _| Ok(())).unwrap_err();
        assert!(error.to_string().contains(path.to_str().unwrap()), "{what}: {error}");
    }
}

#[test]
fn names_that_only_look_like_those_of_checkpoints_are_left_alone() {
    let (_directory, store) = empty_store();
    fs::write(store.directory().join("0000000001.ckpt"), sample::small().build()).unwrap();
    let names = ["2.ckpt", "+000000003.ckpt", "00000000004.ckpt", "18446744073709551615.ckpt", "5.ckpt.ckpt", ".ckpt"];
    for name in names {
        fs::write(store.directory().join(name), "not ours").unwrap();
    }
    assert_eq!(store.sequences().unwrap(), [1]);
    assert_eq!(store.next_sequence().unwrap(), 2);
    assert!(read(&store).unwrap().is_some());
}

/// A seal is what makes the other tests reach what they are about.
#[test]
fn a_seal_is_the_digest_of_the_format() {
    let mut bytes = sample::small().build();
    let good = bytes.clone();
    let at = trailer_at(&bytes) + 24;
    bytes[at..at + 16].fill(0);
    seal(&mut bytes);
    assert_eq!(bytes, good);
    let golden = fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/v1-full.ckpt")).unwrap();
    let mut sealed = golden.clone();
    seal(&mut sealed);
    assert!(sealed == golden, "the golden file has another digest");
}
