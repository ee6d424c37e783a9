//! What is never removed, however old it is: by its name, by the configuration, by tmpfiles.d(5).

use std::path::Path;

use ephemeral_overlay::Layout;
use glob::{MatchOptions, Pattern};

use super::tmpfiles;
use crate::error::Result;

/// `PATH_MAX`: no program, and so no pattern, names a longer path.
pub(super) const PATH_MAX: usize = 4096;

/// Names that stand for a session or a service that lives, wherever they are.
const NAMES: [&str; 25] = [
    // X servers: locks, sockets, and who may speak to them.
    ".X*-lock",
    ".tX*-lock",
    ".X11-unix",
    ".ICE-unix",
    ".XIM-unix",
    ".font-unix",
    ".Test-unix",
    ".xfsm-ICE-*",
    ".Xauthority*",
    "Xauthority*",
    ".xauth*",
    "xauth_*",
    "xauth-*",
    "serverauth.*",
    ".serverauth.*",
    "xvfb-run.*",
    ".mutter-Xwaylandauth.*",
    // Display managers and desktops.
    "sddm-*",
    "gdm-*",
    ".gdm*",
    "kde-*",
    "ksocket-*",
    // What services and applications see as their own /tmp.
    "systemd-private-*",
    "snap-private-tmp",
    "snap.*",
];

/// `*` and `?` stand for anything but a slash.
const OPTIONS: MatchOptions =
    MatchOptions { case_sensitive: true, require_literal_separator: true, require_literal_leading_dot: false };

/// What is never removed.
#[derive(Debug)]
pub(super) struct Keep {
    names: Vec<Pattern>,
    with_all_below: Vec<Pattern>,
    itself: Vec<Pattern>,
}

impl Keep {
    /// What the system's tmpfiles.d and `exclude` say, as far as it is about `folders`.
    pub(super) fn read(layout: &Layout, exclude: &[Pattern], folders: &[&str]) -> Result<Self> {
        let concerns = |pattern: &Pattern| {
            let text = pattern.as_str();
            let literal = &text[..text.find(['*', '?', '[']).unwrap_or(text.len())];
            folders.iter().any(|folder| folder.starts_with(literal) || literal.starts_with(folder))
        };
        let names = NAMES.iter().filter_map(|name| Pattern::new(name).ok()).collect();
        let tmpfiles::Lines { mut with_all_below, mut itself } = tmpfiles::read(layout)?;
        with_all_below.extend_from_slice(exclude);
        with_all_below.retain(concerns);
        itself.retain(concerns);
        Ok(Self { names, with_all_below, itself })
    }

    /// Whether `path` stays, and everything below it.
    pub(super) fn with_all_below(&self, path: &Path) -> bool {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        self.names.iter().any(|pattern| pattern.matches_with(&name, OPTIONS)) || matches(&self.with_all_below, path)
    }

    /// Whether `path` stays.
    pub(super) fn itself(&self, path: &Path) -> bool {
        matches(&self.itself, path)
    }
}

fn matches(patterns: &[Pattern], path: &Path) -> bool {
    if patterns.is_empty() || path.as_os_str().len() > PATH_MAX {
        return false;
    }
    // What is no UTF-8 is matched by wildcards.
    let path = path.to_string_lossy();
    patterns.iter().any(|pattern| pattern.matches_with(&path, OPTIONS))
}
