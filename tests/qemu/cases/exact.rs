//! The view is exact, in everything that can be seen: on the kernels and file systems of the machines, not only on
//! those of the one that runs the tests.

use test_support::snapshot;

use super::{Case, expect_overlays, machine};
use crate::console::Console;
use crate::disk::Disk;
use crate::machine::{Boot, Setup};

pub(crate) const CASES: &[(&str, Case)] = &[("everything_comes_back_from_a_checkpoint_and_to_the_disk", both_ways)];

/// The target that is changed at random; it has nothing else in it.
const TARGET: &str = "/etc/tree";

/// Lower is filled at random, then RAM changed at random, with objects and attributes of every kind. A checkpoint and a
/// cut: the next boot shows the very same, and so does the disk.
fn both_ways(on: Setup) {
    let mut machine = machine(on, "both_ways");
    let nothing_mounted = Boot { cmdline: "rw ephemeral_overlay=nomerge", ..Boot::default() };
    machine.boot(nothing_mounted, &format!("mkdir {TARGET}\nmodel {TARGET} 1 0\nmodel {TARGET} 2 60\nshutdown"));
    let before = lines(&machine.disk());
    let script = format!("model {TARGET} 3 80\nrun syncd checkpoint\nmodel {TARGET} 4 80\nrun syncd checkpoint");
    let console = machine.boot_and_cut(Boot::default(), &format!("{script}\nsnapshot {TARGET}"));
    console.expect(console.exits() == ["0", "0"], "a checkpoint failed");
    let expected = console.tree(TARGET);
    console.expect(expected != before, "nothing was changed");
    assert_eq!(lines(&machine.disk()), before, "lower was changed while it was mounted");

    let console = machine.boot(Boot::default(), &format!("mounts\nsnapshot {TARGET}\nshutdown"));
    expect_overlays(&console);
    expect_same(&expected, &console.tree(TARGET), &console);
    expect_same(&expected, &lines(&machine.disk()), &console);
}

fn lines(disk: &Disk) -> Vec<String> {
    snapshot::lines(&snapshot::take(&disk.at(TARGET)))
}

#[track_caller]
fn expect_same(expected: &[&str], found: &[impl AsRef<str>], console: &Console) {
    let found: Vec<&str> = found.iter().map(AsRef::as_ref).collect();
    let lost: Vec<_> = expected.iter().filter(|line| !found.contains(line)).collect();
    let strange: Vec<_> = found.iter().filter(|line| !expected.contains(line)).collect();
    console.expect(lost.is_empty() && strange.is_empty(), &format!("expected {lost:#?}\nfound {strange:#?}"));
}
