//! What tmpfiles.d(5) says about paths that are to stay. `x` keeps a path and all below it. Every other line, but those
//! that remove, keeps the path itself, as it does for systemd-tmpfiles: `X` says so, and what a line creates is wanted.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::io::Read;
use std::iter::Peekable;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::str::Chars;

use ephemeral_overlay::Layout;
use ephemeral_overlay::error::{At, SystemError};
use glob::Pattern;
use rustix::fs::OFlags;
use rustix::io::Errno;

use crate::tree::list;

/// A file hides those of the same name in later ones.
const DIRECTORIES: [&str; 4] =
    ["/etc/tmpfiles.d", "/run/tmpfiles.d", "/usr/local/lib/tmpfiles.d", "/usr/lib/tmpfiles.d"];

/// The paths of all lines.
#[derive(Debug, Default)]
pub(super) struct Lines {
    /// They stay with all below them.
    pub(super) with_all_below: Vec<Pattern>,
    /// They stay.
    pub(super) itself: Vec<Pattern>,
}

/// Reads all files.
pub(super) fn read(layout: &Layout) -> Result<Lines, SystemError> {
    let mut lines = Lines::default();
    let mut known: BTreeSet<OsString> = BTreeSet::new();
    for directory in DIRECTORIES.map(Path::new) {
        let names = match layout.open(directory, OFlags::RDONLY | OFlags::DIRECTORY) {
            Ok(dir) => list(dir.as_fd(), &layout.below_root(directory))?,
            Err(error) if matches!(error.errno(), Some(Errno::NOENT | Errno::NOTDIR)) => continue,
            Err(error) => return Err(error),
        };
        for name in names.into_iter().filter(|name| name.as_bytes().ends_with(b".conf")) {
            let path = directory.join(&name);
            if !known.insert(name) {
                continue;
            }
            let mut text = Vec::new();
            match layout.open(&path, OFlags::RDONLY | OFlags::NONBLOCK) {
                Ok(file) => std::fs::File::from(file).read_to_end(&mut text).at("read", layout.below_root(&path))?,
                // It hides others, and that is all.
                Err(error) if error.errno() == Some(Errno::NOENT) => continue,
                Err(error) => return Err(error),
            };
            String::from_utf8_lossy(&text).lines().for_each(|line| lines.add(line));
        }
    }
    Ok(lines)
}

impl Lines {
    fn add(&mut self, line: &str) {
        let mut rest = line.trim_start().chars().peekable();
        if rest.peek() == Some(&'#') {
            return;
        }
        let (kind, path) = (word(&mut rest), expand(&word(&mut rest)));
        let to = match kind.chars().next() {
            None | Some('r' | 'R') => return,
            Some('x') => &mut self.with_all_below,
            Some(_) => &mut self.itself,
        };
        if path.starts_with('/') {
            // As a path has it: nothing doubled, nothing at the end.
            let path = Path::new(&path).components().collect::<std::path::PathBuf>();
            let path = path.to_string_lossy();
            to.extend(Pattern::new(&path).or_else(|_| Pattern::new(&Pattern::escape(&path))));
        }
    }
}

/// The next word of a line, quotes and escapes undone. What an escape stands for that is no plain character is `?`.
fn word(rest: &mut Peekable<Chars<'_>>) -> String {
    let mut word = String::new();
    let mut quote = None;
    while rest.next_if(|letter| letter.is_whitespace()).is_some() {}
    while let Some(letter) = rest.next() {
        match letter {
            '\\' => word.push(escaped(rest)),
            '"' | '\'' if quote == Some(letter) => quote = None,
            '"' | '\'' if quote.is_none() => quote = Some(letter),
            letter if letter.is_whitespace() && quote.is_none() => break,
            letter => word.push(letter),
        }
    }
    word
}

fn escaped(rest: &mut Peekable<Chars<'_>>) -> char {
    match rest.next() {
        Some('s') => ' ',
        Some('t') => '\t',
        Some('n') => '\n',
        Some('x') => {
            let digits: String = rest.by_ref().take(2).collect();
            u8::from_str_radix(&digits, 16).ok().filter(u8::is_ascii).map_or('?', char::from)
        }
        Some(letter @ ('\\' | '"' | '\'')) => letter,
        _ => '?',
    }
}

/// Undoes the specifiers. What one stands for that differs between machines and boots is `*`: too much stays, then.
fn expand(word: &str) -> String {
    let mut path = String::new();
    let mut rest = word.chars();
    while let Some(letter) = rest.next() {
        if letter != '%' {
            path.push(letter);
            continue;
        }
        path.push_str(match rest.next() {
            Some('%') => "%",
            Some('T') => "/tmp",
            Some('V') => "/var/tmp",
            Some('t') => "/run",
            Some('S') => "/var/lib",
            Some('C') => "/var/cache",
            Some('L') => "/var/log",
            _ => "*",
        });
    }
    path
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(line: &str) -> (Vec<String>, Vec<String>) {
        let mut lines = Lines::default();
        lines.add(line);
        let texts = |patterns: Vec<Pattern>| patterns.iter().map(|pattern| pattern.as_str().to_owned()).collect();
        (texts(lines.with_all_below), texts(lines.itself))
    }

    #[test]
    fn a_line_keeps_its_path_with_or_without_what_is_below() {
        for (line, whole, itself) in [
            ("x /tmp/a", &["/tmp/a"][..], &[][..]),
            ("  x!\t/tmp//a/  -", &["/tmp/a"], &[]),
            ("X /tmp/a*", &[], &["/tmp/a*"]),
            ("d /tmp/a 1777 root root 1d", &[], &["/tmp/a"]),
            ("D! /tmp/.X11-unix", &[], &["/tmp/.X11-unix"]),
            ("r! /tmp/.X[0-9]*-lock", &[], &[]),
            ("R /tmp/a", &[], &[]),
            ("# x /tmp/a", &[], &[]),
            ("", &[], &[]),
            ("x tmp/a", &[], &[]),
            ("x /tmp/a[b", &["/tmp/a[[]b"], &[]),
            ("x /tmp/systemd-private-%b-*", &["/tmp/systemd-private-*-*"], &[]),
            ("x %T/a%%b", &["/tmp/a%b"], &[]),
            (r#"x "/tmp/a b""#, &["/tmp/a b"], &[]),
            (r"x /tmp/a\x20b\x5cc", &[r"/tmp/a b\c"], &[]),
            (r"x /tmp/\xff", &["/tmp/?"], &[]),
        ] {
            let (found_whole, found_itself) = kept(line);
            assert_eq!(
                (found_whole, found_itself),
                (whole.iter().map(|s| (*s).to_owned()).collect(), itself.iter().map(|s| (*s).to_owned()).collect()),
                "{line}"
            );
        }
    }
}
