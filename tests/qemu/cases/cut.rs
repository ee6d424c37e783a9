//! Power cuts while the disk is being written to: at any moment of a merge, at boot and at shutdown.

use super::{CHANGE, CHECKPOINT, Case, FILES, LOOK, expect_disk, expect_pending, expect_view, machine};
use crate::console::Console;
use crate::machine::{Boot, Machine, Setup};

pub(crate) const CASES: &[(&str, Case)] =
    &[("a_merge_cut_again_and_again_ends_whole", cut_merge), ("a_cut_last_stage_is_finished_at_boot", cut_last_stage)];

/// Enough for a merge to take a while.
const MANY: &str = "sh i=0; while [ $i -lt 2000 ]; do echo $i >/etc/many.$i; i=$((i+1)); done";
/// Shows how many of them there are, and that each has its contents.
const COUNT: &str = "sh ls /etc | grep -c '^many'; cat /etc/many.* | sort -n | md5sum";

/// What `COUNT` showed.
fn counted(console: &Console) -> Vec<&str> {
    let lines = console.lines.iter().filter_map(|line| line.strip_prefix("guest: OUT "));
    lines.filter(|line| !line.contains("INFO")).collect()
}

/// The same chain is merged by boots that are cut later and later. Every cut leaves a sound file system with the
/// chain in it, the boot after the last one shows exactly the checkpoint, and then nothing is pending.
fn cut_merge(on: Setup) {
    let mut machine = machine(on, "cut_merge");
    let console = machine.boot_and_cut(Boot::default(), &format!("{CHANGE}\n{MANY}\n{CHECKPOINT}\n{COUNT}"));
    let expected = counted(&console).join("\n");
    console.expect(expected.starts_with("2000\n"), "not what was to be written");

    let mut cuts_within = 0;
    let mut after = 0.1;
    while !machine.disk().checkpoints("/etc").is_empty() {
        let cmdline = format!("rw test.cut={after:.3}");
        let console = machine.try_boot(Boot { cmdline: &cmdline, ..Boot::default() }, "shutdown");
        console.expect(console.trouble().is_none(), "the kernel complained");
        let disk = machine.disk();
        cuts_within += usize::from(disk.is_half_merged("/etc"));
        if disk.checkpoints("/etc").is_empty() {
            // Its last file goes when all is on disk, and not before.
            assert_eq!(disk.file("/etc/many.1999").as_deref(), Some("1999"));
        }
        after *= 1.15;
        assert!(after < 60.0, "the merge does not come to its end");
    }
    println!("{cuts_within} cuts were within the merge");
    assert!(cuts_within > 0);

    let console = machine.boot(Boot::default(), &format!("{LOOK}\n{COUNT}\nshutdown"));
    expect_view(&console, true);
    assert_eq!(counted(&console).join("\n"), expected);
    let disk = machine.disk();
    expect_disk(&disk, true);
    expect_pending(&disk, 0);
}

/// The last checkpoint and its merge are cut: the next boot shows the checkpoint before, or everything.
fn cut_last_stage(on: Setup) {
    let mut cuts = 0;
    for after in [0.02, 0.2, 0.8, 2.0] {
        let last =
            format!("#!/bin/sh\n(busybox sleep {after}; echo b >/proc/sysrq-trigger) &\n/usr/bin/syncd last-stage\n");
        let program = ("/usr/lib/systemd/system-shutdown/ephemeral-overlay", last.as_str());
        let files: Vec<_> = FILES.into_iter().chain([program]).collect();
        let mut machine = Machine::new(on, &format!("cut_last_stage-{after}"), &files);
        let script = format!("{CHANGE}\n{CHECKPOINT}\nwrite /etc/late later\n{MANY}\nshutdown");
        let console = machine.try_boot(Boot::default(), &script);
        console.expect(console.trouble().is_none(), "the kernel complained");
        cuts += usize::from(!console.says("LAST "));
        let console = machine.boot(Boot::default(), &format!("{LOOK}\ncat /etc/late\n{COUNT}"));
        expect_view(&console, true);
        let later = console.file("/etc/late").is_some();
        let count = counted(&console)[0];
        console.expect(count == if later { "2000" } else { "0" }, &format!("a mixture: {later}, {count} files"));
        expect_pending(&machine.disk(), 0);
    }
    assert!(cuts > 0, "no cut was within the last stage");
}
