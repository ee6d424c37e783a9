//! An init that knows nothing of us but one line, which it runs when every process is dead.

use super::{CHANGE, Case, LOOK, expect_disk, expect_pending, expect_view, machine};
use crate::machine::{Boot, Setup};

pub(crate) const CASES: &[(&str, Case)] = &[
    ("any_init_brings_everything_to_the_disk", |on| end(on, "plain")),
    ("an_init_that_unmounts_first_brings_everything_to_the_disk", |on| end(on, "plain-after-umount")),
    ("what_is_in_use_at_the_end_is_left_to_the_next_boot", in_use),
];

fn end(on: Setup, how: &str) {
    let mut machine = machine(on, how);
    let console = machine.boot(Boot::default(), &format!("mounts\n{CHANGE}\nshutdown {how}"));
    super::expect_overlays(&console);
    let disk = machine.disk();
    expect_disk(&disk, true);
    expect_pending(&disk, 0);
}

/// A mount that nobody knows of shows `/etc` elsewhere; `/var/log` is not in use.
fn in_use(on: Setup) {
    let mut machine = machine(on, "in_use");
    let hold = "sh busybox mkdir /run/held && busybox mount --bind /etc /run/held";
    let console = machine.boot(Boot::default(), &format!("{CHANGE}\n{hold}\nshutdown plain"));
    console.expect(console.exits() == ["0"], "nothing was held");
    console.expect(console.says("left pending for the next boot"), "it was not said");
    let disk = machine.disk();
    assert_eq!(disk.file("/etc/kept").as_deref(), Some("disk"), "it was merged while it was in use");
    assert_eq!(disk.file("/var/log/log").as_deref(), Some("ram"), "what was not in use");
    assert!(!disk.checkpoints("/etc").is_empty(), "what was in RAM was not saved");
    drop(disk);
    let console = machine.boot(Boot::default(), &format!("{LOOK}\nshutdown plain"));
    expect_view(&console, true);
    let disk = machine.disk();
    expect_disk(&disk, true);
    expect_pending(&disk, 0);
}
