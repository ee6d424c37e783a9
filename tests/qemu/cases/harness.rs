//! The failures boot too: a harness that cannot fail proves nothing.

use super::{Case, machine};
use crate::machine::{Boot, Setup};

pub(crate) const CASES: &[(&str, Case)] = &[("a_failing_init_is_a_failure", failing_init)];

/// An init that cannot do what its script says, and one that ends: both are told from a good boot.
fn failing_init(on: Setup) {
    let mut machine = machine(on, "failing_init");
    for (script, part) in [("remove /nothing", "failed: `remove /nothing`"), ("panic", "Kernel panic")] {
        let console = machine.try_boot(Boot::default(), script);
        let complaint = console.complaint().unwrap_or_default();
        console.expect(complaint.contains(part), &format!("{script}: {complaint:?}"));
    }
}
