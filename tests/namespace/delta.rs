//! What did not change, or only moved, is not written again; and nothing is lost by it.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::sweep::strace;
use crate::tools::{self, text};
use crate::world::{Disk, ETC, Fs, World, expect};
use test_support::mapped::Mapping;
use test_support::snapshot::{self, Snapshot};

pub(crate) const TESTS: &[(&str, fn())] = &[
    ("a_page_of_a_long_file_costs_a_page", a_page_of_a_long_file_costs_a_page),
    ("a_rotated_log_costs_nothing", a_rotated_log_costs_nothing),
    ("a_log_that_is_copied_and_cut_off_costs_nothing", a_log_that_is_copied_and_cut_off_costs_nothing),
    ("a_log_that_grew_is_not_read_on_the_disk", a_log_that_grew_is_not_read_on_the_disk),
    ("growing_and_shrinking_files_are_exact", growing_and_shrinking_files_are_exact),
    ("what_refers_to_a_damaged_checkpoint_is_written_anew", what_refers_to_a_damaged_checkpoint_is_written_anew),
    ("a_full_checkpoint_refers_to_nothing_before_it", a_full_checkpoint_refers_to_nothing_before_it),
    ("a_merge_writes_only_the_pages_that_differ", a_merge_writes_only_the_pages_that_differ),
    ("a_long_file_with_other_names_is_not_changed_in_place", a_long_file_with_other_names_is_not_changed_in_place),
];

const LONG: usize = 8 << 20;

fn world() -> World {
    World::on(Disk::new(Fs::Ext4, 192), ETC)
}

/// Bytes that do not compress.
fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    fastrand::Rng::with_seed(seed).fill(&mut bytes);
    bytes
}

/// Takes a checkpoint; returns how long it is.
fn checkpoint(world: &World) -> u64 {
    world.checkpoint();
    fs::metadata(world.checkpoints().last().unwrap()).unwrap().len()
}

fn expect_after_a_cut(world: &World, expected: &Snapshot) {
    world.cut();
    world.merge();
    snapshot::assert_same(expected, &snapshot::take(&world.at("etc")), "after the merge");
}

fn expect_view_after_a_cut(world: &World) {
    let view = snapshot::take(&world.at("etc"));
    expect_after_a_cut(world, &view);
}

fn a_page_of_a_long_file_costs_a_page() {
    let world = world();
    world.boot();
    let path = world.at("etc/journal");
    fs::write(&path, noise(1, LONG)).unwrap();
    let mapping = Mapping::new(&OpenOptions::new().read(true).write(true).open(&path).unwrap(), LONG);
    mapping.write(&noise(1, 8));
    assert!(checkpoint(&world) > 8 << 20);
    let before = fs::metadata(world.upper().join("journal")).unwrap();
    mapping.write(&noise(2, 100));
    let after = fs::metadata(world.upper().join("journal")).unwrap();
    assert_eq!((before.mtime_nsec(), before.ctime_nsec()), (after.mtime_nsec(), after.ctime_nsec()));
    drop(mapping);
    let length = checkpoint(&world);
    assert!((4096..8192).contains(&length), "{length} bytes for one page");
    expect_view_after_a_cut(&world);
}

fn a_rotated_log_costs_nothing() {
    let world = world();
    world.boot();
    let at = |name: &str| world.at("etc").join(name);
    fs::write(at("log"), noise(1, LONG)).unwrap();
    fs::write(at("short.log"), noise(2, 50_000)).unwrap();
    checkpoint(&world);
    // Something came between the last checkpoint and the rotation.
    OpenOptions::new().append(true).open(at("log")).unwrap().write_all(&noise(3, 1000)).unwrap();
    for name in ["log", "short.log"] {
        fs::rename(at(name), at(&format!("{name}.1"))).unwrap();
        fs::write(at(name), "begun anew").unwrap();
    }
    let length = checkpoint(&world);
    assert!(length < 20_000, "{length} bytes for a rotation");
    fs::rename(at("log.1"), at("log.2")).unwrap();
    let length = checkpoint(&world);
    assert!(length < 10_000, "{length} bytes for the next one");
    expect_view_after_a_cut(&world);
}

fn a_log_that_is_copied_and_cut_off_costs_nothing() {
    let world = world();
    world.boot();
    let at = |name: &str| world.at("etc").join(name);
    fs::write(at("log"), noise(1, LONG)).unwrap();
    checkpoint(&world);
    fs::copy(at("log"), at("log.1")).unwrap();
    File::options().write(true).open(at("log")).unwrap().set_len(0).unwrap();
    let length = checkpoint(&world);
    assert!(length < 10_000, "{length} bytes for a rotation");
    expect_view_after_a_cut(&world);
}

fn a_log_that_grew_is_not_read_on_the_disk() {
    let world = world();
    world.boot();
    let path = world.at("etc/log");
    // Its last block and its last page are not full.
    fs::write(&path, noise(1, 300_001)).unwrap();
    checkpoint(&world);
    let reads = || {
        let output = strace(&world.syncd_command(&["checkpoint"]), &["-y", "-e", "trace=pread64"]);
        expect(&output, 0);
        text(&output).lines().filter(|line| line.contains("0000000001.ckpt>")).count()
    };
    let unchanged = reads();
    assert!(unchanged > 0);
    OpenOptions::new().append(true).open(&path).unwrap().write_all(&noise(2, 10_000)).unwrap();
    assert_eq!(reads(), unchanged);
    let length = fs::metadata(world.checkpoints().last().unwrap()).unwrap().len();
    assert!((10_000..20_000).contains(&length), "{length} bytes");
    // What changed in the block, too, is compared with what is there.
    OpenOptions::new().write(true).open(&path).unwrap().write_all_at(b"new", 290_000).unwrap();
    OpenOptions::new().append(true).open(&path).unwrap().write_all(&noise(3, 10_000)).unwrap();
    assert!(reads() > unchanged);
    expect_view_after_a_cut(&world);
}

fn growing_and_shrinking_files_are_exact() {
    let world = world();
    world.boot();
    let path = world.at("etc/file");
    let file = OpenOptions::new().create_new(true).read(true).write(true).open(&path).unwrap();
    let mut random = fastrand::Rng::with_seed(7);
    // Around the limits of pages, blocks and frames.
    let sizes = [1, 4095, 4096, 4097, 131_071, 131_072, 131_073, 1_048_575, 1_048_576, 1_048_577, 3_000_000];
    for step in 0..40 {
        let size = sizes[random.usize(..sizes.len())];
        file.set_len(size).unwrap();
        let at = random.u64(..size);
        let length = usize::try_from(size - at).unwrap().min(random.usize(1..200_000));
        file.write_all_at(&noise(step, length), at).unwrap();
        checkpoint(&world);
    }
    expect_view_after_a_cut(&world);
}

/// Changes one byte in the middle of a file.
fn damage(path: &Path) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let at = file.metadata().unwrap().len() / 2;
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
}

fn what_refers_to_a_damaged_checkpoint_is_written_anew() {
    let world = world();
    world.boot();
    let path = world.at("etc/file");
    let bytes = noise(1, 1 << 20);
    fs::write(&path, &bytes).unwrap();
    checkpoint(&world);
    damage(&world.checkpoints()[0]);
    // To find the pages that changed the old ones are read.
    File::options().write(true).open(&path).unwrap().write_all_at(b"changed", 524_288).unwrap();
    let output = world.syncd(&["checkpoint"]);
    expect(&output, 0);
    assert!(text(&output).contains("are replaced by a full one"), "{}", text(&output));
    assert_eq!(world.checkpoints().len(), 1);
    expect_view_after_a_cut(&world);
}

fn a_full_checkpoint_refers_to_nothing_before_it() {
    let world = world();
    world.boot();
    let at = |name: &str| world.at("etc").join(name);
    fs::write(at("long"), noise(1, 2 << 20)).unwrap();
    checkpoint(&world);
    // Until the chain is longer than what is in RAM.
    let mut last = 0;
    for step in 0..6 {
        fs::write(at("other"), noise(step + 2, 1 << 20)).unwrap();
        last = checkpoint(&world);
        if world.checkpoints().len() == 1 {
            break;
        }
    }
    assert_eq!(world.checkpoints().len(), 1, "no full checkpoint");
    assert!(last > 3 << 20, "{last} bytes for all of it");
    expect_view_after_a_cut(&world);
}

/// The places of a file's data on the disk, to see what was written anew.
fn extents(path: &Path) -> String {
    tools::run("sync", &[path.to_str().unwrap()]);
    tools::run("filefrag", &["-v", path.to_str().unwrap()])
}

fn lower_with_long_file(world: &World) -> PathBuf {
    let path = world.at("etc/long");
    fs::write(&path, noise(1, LONG)).unwrap();
    path
}

fn a_merge_writes_only_the_pages_that_differ() {
    let world = world();
    let path = lower_with_long_file(&world);
    let (before, inode) = (extents(&path), fs::metadata(&path).unwrap().ino());
    world.boot();
    let file = File::options().write(true).open(&path).unwrap();
    file.write_all_at(&noise(2, 5000), 1_000_000).unwrap();
    drop(file);
    world.checkpoint();
    let view = snapshot::take(&world.at("etc"));
    world.cut();
    let log = tempfile::NamedTempFile::new().unwrap();
    let merge = world.offline_command(&["merge"]);
    let output = std::process::Command::new("strace")
        .args(["-f", "-y", "-qq", "-e", "trace=pwrite64", "-o"])
        .arg(log.path())
        .arg(merge.get_program())
        .args(merge.get_args())
        .output()
        .unwrap();
    expect(&output, 0);
    let calls = fs::read_to_string(log.path()).unwrap();
    let written: u64 = calls
        .lines()
        .filter(|line| line.contains("/etc/long>"))
        .filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok())
        .sum();
    assert!((5000..=3 * 4096).contains(&written), "{written} bytes\n{calls}");
    snapshot::assert_same(&view, &snapshot::take(&world.at("etc")), "after the merge");
    assert_eq!((extents(&path), fs::metadata(&path).unwrap().ino()), (before, inode));
}

fn a_long_file_with_other_names_is_not_changed_in_place() {
    let world = world();
    let path = lower_with_long_file(&world);
    fs::hard_link(&path, world.at("etc/other")).unwrap();
    let old = fs::read(&path).unwrap();
    world.boot();
    File::options().write(true).open(&path).unwrap().write_all_at(b"changed", 1_000_000).unwrap();
    world.checkpoint();
    expect_view_after_a_cut(&world);
    assert!(fs::read(world.at("etc/other")).unwrap() == old, "the other name changed, too");
}
