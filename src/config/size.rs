//! How much RAM: an amount, or a share of what the machine has. Never zero, which tmpfs takes for "no limit".

use std::str::FromStr;

/// The ceiling of a tmpfs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Size {
    /// So many bytes, at least one.
    Bytes(u64),
    /// So many hundredths of the total RAM, 1 to 100.
    Percent(u8),
}

/// A string that is not a [`Size`]; the text says what is allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{EXPECTED}")]
pub struct SizeError;

pub(super) const EXPECTED: &str = "a size above zero such as \"512M\", \"1.5GiB\" or \"90%\" (1% to 100% of RAM)";

impl Size {
    pub(super) const fn gib(gib: u64) -> Self {
        Self::Bytes(gib << 30)
    }

    /// The size in bytes on a machine with `total_ram` bytes.
    #[must_use]
    pub fn bytes(self, total_ram: u64) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes,
            Self::Percent(percent) => {
                let percent = u64::from(percent);
                total_ram / 100 * percent + total_ram % 100 * percent / 100
            }
        }
    }
}

impl FromStr for Size {
    type Err = SizeError;

    /// Parses `"5G"`, `"512M"`, `"1.5GiB"` (all binary), `"4096"` (bytes) or `"90%"`.
    fn from_str(text: &str) -> Result<Self, SizeError> {
        let size = if let Some(percent) = text.strip_suffix('%') {
            percent.trim_end().parse().ok().filter(|percent| (1..=100).contains(percent)).map(Self::Percent)
        } else {
            let bytes = parse_size::Config::new().with_binary().parse_size(text);
            bytes.ok().filter(|&bytes| bytes > 0).map(Self::Bytes)
        };
        size.ok_or(SizeError)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_binary() {
        for (text, bytes) in [
            ("1", 1),
            ("4096", 4096),
            ("1k", 1 << 10),
            ("512M", 512 << 20),
            ("5G", 5 << 30),
            ("5GB", 5 << 30),
            ("5GiB", 5 << 30),
            ("5 GiB", 5 << 30),
            ("1.5GiB", 3 << 29),
            ("2T", 2 << 40),
        ] {
            assert_eq!(text.parse(), Ok(Size::Bytes(bytes)), "{text}");
        }
    }

    #[test]
    fn shares_are_whole_and_from_1_to_100() {
        for (text, percent) in [("1%", 1), ("90%", 90), ("90 %", 90), ("100%", 100)] {
            assert_eq!(text.parse(), Ok(Size::Percent(percent)), "{text}");
        }
    }

    #[test]
    fn everything_else_is_refused() {
        for text in [
            "",
            " ",
            "G",
            "%",
            "0",
            "0%",
            "0G",
            "0.1",
            "101%",
            "256%",
            "-1%",
            "12.5%",
            "-5G",
            "5X",
            "5G%",
            "five",
            "99999999E",
            "NaN",
            "inf",
        ] {
            assert_eq!(text.parse::<Size>(), Err(SizeError), "{text}");
        }
    }

    #[test]
    fn a_share_of_ram_is_exact_and_does_not_overflow() {
        assert_eq!(Size::Percent(90).bytes(1000), 900);
        assert_eq!(Size::Percent(33).bytes(199), 65);
        assert_eq!(Size::Percent(100).bytes(u64::MAX), u64::MAX);
        assert_eq!(Size::Bytes(7).bytes(1), 7);
    }
}
