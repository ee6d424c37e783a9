//! What a single value may be. A parser that refuses says what it would have taken.

use std::fmt::Display;
use std::path::PathBuf;
use std::time::Duration;

use glob::Pattern;
use toml::de::DeValue;

use super::size::{self, Size};

/// What [`normal_path`] takes.
pub(super) const NORMAL_PATH: &str = "an absolute path without \".\" and \"..\", without doubled and trailing slashes";

/// A value as a message shows it.
pub(super) fn describe(value: &DeValue<'_>) -> String {
    match value {
        DeValue::String(text) => format!("{text:?}"),
        DeValue::Integer(number) => number.to_string(),
        DeValue::Float(number) => number.to_string(),
        DeValue::Boolean(truth) => truth.to_string(),
        DeValue::Array(_) => "an array".to_owned(),
        DeValue::Table(_) => "a table".to_owned(),
        DeValue::Datetime(_) => "a date or time".to_owned(),
    }
}

/// `text` as a path, if it has exactly one spelling: two equal paths are then equal as strings.
pub(super) fn normal_path(text: &str) -> Option<PathBuf> {
    let rest = text.strip_prefix('/')?;
    (rest.is_empty() || rest.split('/').all(is_name)).then(|| text.into())
}

fn is_name(text: &str) -> bool {
    !matches!(text, "" | "." | "..") && !text.contains(['/', '\0'])
}

pub(super) fn path(value: &DeValue<'_>) -> Result<PathBuf, String> {
    value.as_str().and_then(normal_path).ok_or_else(|| NORMAL_PATH.to_owned())
}

pub(super) fn glob(value: &DeValue<'_>) -> Result<Pattern, String> {
    let text = value.as_str().filter(|text| normal_path(text).is_some());
    let pattern = text.and_then(|text| Pattern::new(text).ok());
    pattern.ok_or_else(|| format!("{NORMAL_PATH}, in which *, ?, [...] and a whole component ** stand for others"))
}

pub(super) fn name(value: &DeValue<'_>) -> Result<String, String> {
    let name = value.as_str().filter(|text| is_name(text));
    name.map(str::to_owned).ok_or_else(|| "the name of one directory, without slashes, not \".\" or \"..\"".to_owned())
}

pub(super) fn size(value: &DeValue<'_>) -> Result<Size, String> {
    let size = match value {
        DeValue::String(text) => text.parse().ok(),
        DeValue::Integer(_) => integer(value).filter(|&bytes| bytes > 0).map(Size::Bytes),
        _ => None,
    };
    size.ok_or_else(|| size::EXPECTED.to_owned())
}

/// A size, or `false` for none.
pub(super) fn size_or_off(value: &DeValue<'_>) -> Result<Option<Size>, String> {
    match value {
        DeValue::Boolean(false) => Ok(None),
        _ => size(value).map(Some).map_err(|expected| format!("{expected}, or false")),
    }
}

pub(super) fn duration(value: &DeValue<'_>) -> Result<Duration, String> {
    let text = value.as_str().filter(|text| is_modest(text));
    let duration = text.and_then(|text| humantime::parse_duration(text).ok());
    duration.filter(|time| !time.is_zero()).ok_or_else(|| "a time above zero such as \"30s\" or \"5min\"".to_owned())
}

/// humantime 2.4 panics when the spans add up to more than 2^64 seconds by a carry. With so few characters, at most
/// nine digits to a number, they stay below four thousand million years, far from there.
fn is_modest(text: &str) -> bool {
    let numbers = text.split(|c: char| !c.is_ascii_digit() && !c.is_whitespace());
    text.len() <= 32 && numbers.map(str::len).all(|length| length <= 9)
}

pub(super) fn boolean(value: &DeValue<'_>) -> Result<bool, String> {
    value.as_bool().ok_or_else(|| "true or false".to_owned())
}

/// An integer from `min` to `max`.
pub(super) fn between<T>(min: T, max: T) -> impl Fn(&DeValue<'_>) -> Result<T, String>
where
    T: Copy + PartialOrd + Display + TryFrom<i128>,
{
    move |value| {
        let number = integer(value).filter(|number| (min..=max).contains(number));
        number.ok_or_else(|| format!("an integer from {min} to {max}"))
    }
}

/// One of a few words.
pub(super) fn one_of<T: Copy, const N: usize>(
    words: [(&'static str, T); N],
) -> impl Fn(&DeValue<'_>) -> Result<T, String> {
    move |value| {
        let found = words.iter().find(|(word, _)| value.as_str() == Some(word));
        found.map(|&(_, meaning)| meaning).ok_or_else(|| words.map(|(word, _)| format!("{word:?}")).join(" or "))
    }
}

fn integer<T: TryFrom<i128>>(value: &DeValue<'_>) -> Option<T> {
    let number = value.as_integer()?;
    i128::from_str_radix(number.as_str(), number.radix()).ok()?.try_into().ok()
}
