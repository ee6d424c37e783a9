//! The only place that prints.

/// Prints a line, or several.
#[allow(clippy::print_stdout, reason = "the one place that writes to standard output")]
pub(crate) fn say(text: &str) {
    println!("{text}");
}

/// Prints what went wrong.
#[allow(clippy::print_stderr, reason = "the one place that writes to standard error")]
pub(crate) fn error(text: &str) {
    eprintln!("xtask: {text}");
}

/// Prints the output of a command, indented.
pub(crate) fn quote(text: &str) {
    for line in text.trim_end().lines() {
        say(&format!("     {line}"));
    }
}
