//! `cargo xtask bench boot`: what the hook adds to a boot. It is one of the tests that boot, which says it as a table.

use anyhow::{Context, Result};

use super::report::Section;
use crate::test;

pub(super) fn measure() -> Result<Section> {
    let mut section = Section::new("What the hook adds to a boot");
    if !test::can_boot() {
        section.add(&"Not measured: the kernels of the virtual machines are Debian's, for x86_64.");
        return Ok(section);
    }
    let text = test::output_of("what_the_hook_costs", &[("BOOTS", "cost")])?;
    let what = text.lines().find(|line| line.contains(", median of ")).context("the test said nothing")?;
    section.add(&format!(
        "{what}, in a virtual machine. *Hooks* is the time from the first hook's begin to the last one's end."
    ));
    let rows: Vec<_> = text.lines().filter(|line| line.starts_with('|')).collect();
    section.add(&rows.join("\n"));
    Ok(section)
}
