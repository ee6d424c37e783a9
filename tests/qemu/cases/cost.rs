//! What the hook costs a boot: a measurement, for `cargo xtask bench boot`. It asserts nothing about time.

use super::machine;
use crate::console::Console;
use crate::initramfs::Initramfs;
use crate::machine::{Boot, Machine, Setup};

/// How often each is measured.
const ROUNDS: usize = 5;
/// How many files a chain changes.
const FILES: usize = 3000;

/// Boots without the hook, with it, and with a chain to be merged, in turns. Prints the time from the first hook's
/// begin to the last one's end, and that from the kernel's start to that of the root's init; medians.
pub(crate) fn run(on: Setup) {
    let mut plain = machine(on, "cost");
    plain.boot(Boot::default(), "run syncd checkpoint\nshutdown");
    let mut pending = machine(on, "cost-pending");
    let write = format!("sh i=0; while [ $i -lt {FILES} ]; do echo $i >/etc/file.$i; i=$((i+1)); done");
    let console = pending.boot_and_cut(Boot::default(), &format!("{write}\nrun syncd checkpoint"));
    console.expect(console.exits() == ["0", "0"], "there is no chain");
    let without = Initramfs { hook: false, ..Initramfs::default() };
    let rows = [("without the hook", &plain, without), ("nothing pending", &plain, Initramfs::default())];
    let rows = rows.into_iter().chain([("3,000 files pending", &pending, Initramfs::default())]);
    let rows: Vec<_> = rows.collect();
    let mut times = vec![(Vec::new(), Vec::new()); rows.len()];
    for _ in 0..ROUNDS {
        for ((name, machine, initramfs), times) in rows.iter().zip(&mut times) {
            let mut machine: Machine = machine.copy(name);
            let boot = Boot { initramfs: *initramfs, ..Boot::default() };
            let console = machine.boot(boot, "run syncd checkpoint\nsh cat /proc/uptime");
            times.0.push(seconds(&console, "hooks took "));
            times.1.push(seconds(&console, "init after "));
        }
    }
    let medians: Vec<_> = times.into_iter().map(|(hooks, boot)| (median(hooks), median(boot))).collect();
    println!("Linux {}, {}, median of {ROUNDS} boots", on.kernel.version(), on.fs.name());
    println!("| {:22} | {:>9} | {:>9} | {:>6} |\n|---|---|---|---|", "", "hooks", "to init", "ratio");
    for ((name, ..), (hooks, boot)) in rows.iter().zip(&medians) {
        println!("| {name:22} | {hooks:7.2} s | {boot:7.2} s | {:6.2} |", boot / medians[0].1);
    }
}

fn seconds(console: &Console, what: &str) -> f64 {
    let found = console.lines.iter().find_map(|line| line.strip_prefix(&format!("test: {what}"))?.parse().ok());
    found.unwrap_or_else(|| panic!("the initramfs did not say {what:?}{console}"))
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}
