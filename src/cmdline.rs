//! The kernel's command line, split as the kernel splits it: at white space, except between double quotes, which do
//! not belong to the words. `-` and `_` are the same in a parameter's name. Words after `--` are read like all others.

/// What `ephemeral_overlay=` asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// Nothing: merge what is pending, mount.
    #[default]
    Normal,
    /// `off`, or a word that we do not know: merge what is pending, mount nothing.
    Off,
    /// `nomerge`: touch nothing at all.
    NoMerge,
}

/// A kernel command line.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct KernelCmdline {
    words: Vec<Word>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Word {
    name: String,
    value: Option<String>,
}

/// Our own parameter.
const PARAMETER: &str = "ephemeral_overlay";

impl KernelCmdline {
    /// Parses a command line such as `/proc/cmdline` holds. Every text is one.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let mut words = Vec::new();
        let mut rest = text.trim_start_matches(is_space);
        while !rest.is_empty() {
            let mut in_quotes = false;
            let end = rest.find(|c| {
                in_quotes ^= c == '"';
                is_space(c) && !in_quotes
            });
            let (word, after) = rest.split_at(end.unwrap_or(rest.len()));
            words.push(Word::parse(&word.replace('"', "")));
            rest = after.trim_start_matches(is_space);
        }
        Self { words }
    }

    /// What our parameter asks for. The last one wins; one that is not understood turns the overlays off, because
    /// whoever wrote it did not want an ordinary boot (see [`KernelCmdline::unknown_value`]).
    #[must_use]
    pub fn mode(&self) -> Mode {
        match self.own_value() {
            None => Mode::Normal,
            Some("nomerge") => Mode::NoMerge,
            Some(_) => Mode::Off,
        }
    }

    /// The value of our parameter when it is not one that we know, to be reported.
    #[must_use]
    pub fn unknown_value(&self) -> Option<&str> {
        self.own_value().filter(|value| !matches!(*value, "off" | "nomerge"))
    }

    /// The value of the last `key=value`; `-` and `_` are the same in `key`.
    #[must_use]
    pub fn value(&self, key: &str) -> Option<&str> {
        let mut values = self.words.iter().rev().filter(|word| same_name(&word.name, key));
        values.find_map(|word| word.value.as_deref())
    }

    /// Whether `word` stands there by itself, without a value; `-` and `_` are the same in it.
    #[must_use]
    pub fn has(&self, word: &str) -> bool {
        self.words.iter().any(|candidate| candidate.value.is_none() && same_name(&candidate.name, word))
    }

    /// Without a value the parameter is there nevertheless, and not understood.
    fn own_value(&self) -> Option<&str> {
        let last = self.words.iter().rfind(|word| same_name(&word.name, PARAMETER))?;
        Some(last.value.as_deref().unwrap_or_default())
    }
}

impl Word {
    fn parse(word: &str) -> Self {
        match word.split_once('=') {
            Some((name, value)) => Self { name: name.to_owned(), value: Some(value.to_owned()) },
            None => Self { name: word.to_owned(), value: None },
        }
    }
}

/// What the kernel's `isspace` takes for space in ASCII: Rust's `is_ascii_whitespace` lacks the vertical tab.
fn is_space(c: char) -> bool {
    c.is_ascii_whitespace() || c == '\x0b'
}

fn same_name(a: &str, b: &str) -> bool {
    let plain = |byte: u8| if byte == b'-' { b'_' } else { byte };
    a.bytes().map(plain).eq(b.bytes().map(plain))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cmdline(text: &str) -> KernelCmdline {
        KernelCmdline::parse(text)
    }

    #[test]
    fn words_are_split_at_any_white_space() {
        let line = cmdline("  root=/dev/vda1\tro\x0b quiet\n\nsingle\n");
        assert_eq!(line.value("root"), Some("/dev/vda1"));
        assert!(line.has("ro") && line.has("quiet") && line.has("single"));
        assert_eq!(line.words.len(), 4);
        assert_eq!(cmdline(""), KernelCmdline::default());
        assert_eq!(cmdline(" \n"), KernelCmdline::default());
    }

    #[test]
    fn double_quotes_protect_spaces_and_are_removed() {
        let line = cmdline(r#"a="x y" "b=x y" c=x" "y "single word" d="" e="open end"#);
        for key in ["a", "b", "c"] {
            assert_eq!(line.value(key), Some("x y"), "{key}");
        }
        assert!(line.has("single word"));
        assert_eq!(line.value("d"), Some(""));
        assert_eq!(line.value("e"), Some("open end"));
    }

    #[test]
    fn a_quoted_parameter_is_not_ours() {
        assert_eq!(cmdline(r#"x="y ephemeral_overlay=off""#).mode(), Mode::Normal);
    }

    #[test]
    fn the_last_value_counts_and_may_hold_anything() {
        let line = cmdline("init=/bin/sh root=UUID=a-b_c init=/sbin/init");
        assert_eq!(line.value("init"), Some("/sbin/init"));
        assert_eq!(line.value("root"), Some("UUID=a-b_c"));
        assert_eq!(line.value("rootfstype"), None);
    }

    #[test]
    fn a_word_with_a_value_does_not_stand_by_itself() {
        let line = cmdline("rd.break=pre-pivot s=1 emergency");
        assert!(line.has("emergency"));
        assert!(!line.has("rd.break") && !line.has("s") && !line.has("1") && !line.has("emerg"));
        assert_eq!(line.value("emergency"), None);
    }

    #[test]
    fn hyphens_and_underscores_are_the_same_in_names_only() {
        let line = cmdline("a-b_c=d-e x-y");
        assert_eq!(line.value("a_b-c"), Some("d-e"));
        assert!(line.has("x_y"));
        assert_eq!(cmdline("ephemeral-overlay=off").mode(), Mode::Off);
    }

    #[test]
    fn nothing_ends_the_line() {
        assert_eq!(cmdline("quiet -- ephemeral_overlay=nomerge").mode(), Mode::NoMerge);
    }

    #[test]
    fn the_mode_is_the_last_one_given() {
        for (text, mode, unknown) in [
            ("quiet", Mode::Normal, None),
            ("ephemeral_overlay=off", Mode::Off, None),
            ("ephemeral_overlay=\"off\"", Mode::Off, None),
            ("ephemeral_overlay=nomerge", Mode::NoMerge, None),
            ("ephemeral_overlay=nomerge ephemeral_overlay=off", Mode::Off, None),
            ("ephemeral_overlay=off ephemeral_overlay=nomerge", Mode::NoMerge, None),
            ("ephemeral_overlay=Off", Mode::Off, Some("Off")),
            ("ephemeral_overlay=on", Mode::Off, Some("on")),
            ("ephemeral_overlay=what ephemeral_overlay=nomerge", Mode::NoMerge, None),
            ("ephemeral_overlay=nomerge ephemeral_overlay=what", Mode::Off, Some("what")),
            ("ephemeral_overlay=", Mode::Off, Some("")),
            ("ephemeral_overlay", Mode::Off, Some("")),
            ("xephemeral_overlay=off rd.ephemeral_overlay=off", Mode::Normal, None),
        ] {
            let line = cmdline(text);
            assert_eq!((line.mode(), line.unknown_value()), (mode, unknown), "{text}");
        }
    }
}
