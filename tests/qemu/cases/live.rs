//! Checkpoints of what is being written to, on the kernels of the machines: how fine their time stamps are differs.
//!
//! `LIVE_OPERATIONS=N` sets the number of operations.

use super::{Case, machine};
use crate::machine::{Boot, Setup};

pub(crate) const CASES: &[(&str, Case)] = &[("what_is_written_to_is_as_it_was_during_the_checkpoint", two_writers)];

/// The operations of one boot: some hundred a second where the processor is an emulated one.
const PER_BOOT: usize = 4000;

/// Two processes write in a system within the system, which loses its RAM again and again.
fn two_writers(on: Setup) {
    let operations = std::env::var("LIVE_OPERATIONS").map_or(PER_BOOT, |text| text.parse().unwrap());
    let mut machine = machine(on, "live");
    machine.add_disk(on.fs, 1024, |_| Ok(()));
    for seed in 1..=operations.div_ceil(PER_BOOT) {
        let live = format!("live /mnt {seed} {}", PER_BOOT.min(operations));
        let mount = format!("mkdir /mnt\nsh mount -t {} /dev/vdc /mnt", on.fs.name());
        let nothing_mounted = Boot { cmdline: "rw ephemeral_overlay=off", ..Boot::default() };
        let console = machine.boot(nothing_mounted, &format!("{mount}\n{live}\nshutdown"));
        console.expect(console.says("guest: LIVE ") && console.exits() == ["0"], "it did not come to its end");
        let figures = console.lines.iter().find_map(|line| line.strip_prefix("guest: LIVE ")).unwrap();
        println!("{}: {figures}", on.kernel.series);
    }
}
