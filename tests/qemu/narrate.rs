//! Tells whoever watches what a test does, when asked for with `NARRATE=1`: `cargo xtask try --vm` is a test that talks.

use std::sync::OnceLock;

/// Says a step of the story.
pub(crate) fn step(text: &str) {
    if is_asked_for() {
        println!("\n{text}\n");
    }
}

/// Shows a line of a console or of a script.
pub(crate) fn quote(line: &str) {
    if is_asked_for() {
        println!("     {line}");
    }
}

fn is_asked_for() -> bool {
    static ASKED: OnceLock<bool> = OnceLock::new();
    *ASKED.get_or_init(|| std::env::var_os("NARRATE").is_some())
}
