//! What a measurement came to, as Markdown: it reads well in a terminal, too.

use std::fmt::{self, Display};

use comfy_table::{Table, presets};

/// A heading with text and tables below it.
#[derive(Debug)]
pub(super) struct Section {
    title: String,
    parts: Vec<String>,
}

impl Section {
    pub(super) fn new(title: &str) -> Self {
        Self { title: title.to_owned(), parts: Vec::new() }
    }

    /// Adds a smaller heading.
    pub(super) fn heading(&mut self, text: &str) {
        self.parts.push(format!("### {text}"));
    }

    /// Adds a paragraph, or a table.
    pub(super) fn add(&mut self, part: &impl ToString) {
        self.parts.push(part.to_string());
    }
}

impl Display for Section {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "## {}", self.title)?;
        self.parts.iter().try_for_each(|part| write!(f, "\n\n{part}"))
    }
}

/// A table in Markdown with these heads.
pub(super) fn table(heads: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::ASCII_MARKDOWN).set_header(heads);
    table
}
