//! What is never removed, however old it is: by its name, by the configuration, by tmpfiles.d(5).

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
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
    names: Vec<Glob>,
    /// Which bytes one of `names` begins with.
    first: [bool; 256],
    with_all_below: Vec<Glob>,
    itself: Vec<Glob>,
}

impl Keep {
    /// What the system's tmpfiles.d and `exclude` say, as far as it is about `folders`.
    pub(super) fn read(layout: &Layout, exclude: &[Pattern], folders: &[&str]) -> Result<Self> {
        let concerns = |glob: &Glob| {
            folders.iter().any(|folder| folder.starts_with(glob.literal()) || glob.literal().starts_with(folder))
        };
        let names = NAMES.iter().filter_map(|name| Pattern::new(name).ok()).map(Glob::new).collect();
        let tmpfiles::Lines { mut with_all_below, itself } = tmpfiles::read(layout)?;
        with_all_below.extend_from_slice(exclude);
        let globs = |patterns: Vec<Pattern>| patterns.into_iter().map(Glob::new).filter(concerns).collect();
        let mut first = [false; 256];
        for name in NAMES {
            first[usize::from(name.as_bytes()[0])] = true;
        }
        Ok(Self { names, first, with_all_below: globs(with_all_below), itself: globs(itself) })
    }

    /// Whether `path` stays, and everything below it.
    pub(super) fn with_all_below(&self, path: &Path) -> bool {
        let name = path.as_os_str().as_bytes().rsplit(|&byte| byte == b'/').next().unwrap_or_default();
        let may_match = name.first().is_some_and(|&byte| self.first[usize::from(byte)]);
        (may_match && self.names.iter().any(|glob| glob.matches(OsStr::from_bytes(name))))
            || matches(&self.with_all_below, path)
    }

    /// Whether `path` stays.
    pub(super) fn itself(&self, path: &Path) -> bool {
        matches(&self.itself, path)
    }
}

fn matches(globs: &[Glob], path: &Path) -> bool {
    path.as_os_str().len() <= PATH_MAX && globs.iter().any(|glob| glob.matches(path.as_os_str()))
}

/// A pattern. What does not begin with the text before its first wildcard, as most names do not, is not compared with
/// the rest of it.
#[derive(Debug)]
struct Glob {
    pattern: Pattern,
    literal: usize,
}

impl Glob {
    fn new(pattern: Pattern) -> Self {
        let text = pattern.as_str();
        // U+FFFD stands for any byte that is no UTF-8, here and in what is compared.
        let literal = text.find(['*', '?', '[', char::REPLACEMENT_CHARACTER]).unwrap_or(text.len());
        Self { pattern, literal }
    }

    fn literal(&self) -> &str {
        &self.pattern.as_str()[..self.literal]
    }

    fn matches(&self, text: &OsStr) -> bool {
        text.as_bytes().starts_with(self.literal().as_bytes())
            // What is no UTF-8 is matched by wildcards.
            && self.pattern.matches_with(&text.to_string_lossy(), OPTIONS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_compared_first_changes_no_answer() {
        let texts: [&[u8]; 8] = [b"", b"a", b"ab", b"a\xffb", b"a\xffbc", b"b", b"[b", b"a*"];
        for pattern in ["a", "a*", "*b", "?b", "a?b", "[ab]", "[[]b", "a[*]", "a\u{fffd}b*", ""] {
            let pattern = Pattern::new(pattern).unwrap();
            let glob = Glob::new(pattern.clone());
            for text in texts.map(OsStr::from_bytes) {
                let whole = pattern.matches_with(&text.to_string_lossy(), OPTIONS);
                assert_eq!(glob.matches(text), whole, "{pattern} {}", text.display());
            }
        }
    }
}
