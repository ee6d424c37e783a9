//! The token: a random value on a target's root directory in lower and in the header of every checkpoint of it.
//! A chain whose token is not lower's belongs to another state of the disk and is never merged.

use std::path::Path;
use std::str::FromStr;

use rustix::io::Errno;
use rustix::rand::GetRandomFlags;
use serde::{Deserialize, Serialize};

use crate::attributes::Handle;
use crate::error::{At, SystemError};

/// The attribute on the target's root directory in lower. Never part of a checkpoint.
pub const XATTR: &str = "trusted.ephemeral_overlay.token";

/// A token, written as 32 hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Token(pub u128);

impl Token {
    /// A new random token.
    ///
    /// # Errors
    /// When the kernel has no random numbers to give at all.
    pub fn random() -> std::io::Result<Self> {
        let mut bytes = [0; 16];
        // It must differ, not be secret: a kernel that has just started may have no entropy yet, and the boot waits.
        rustix::rand::getrandom(&mut bytes[..], GetRandomFlags::INSECURE)?;
        Ok(Self(u128::from_le_bytes(bytes)))
    }

    /// The token of a directory; `None` when it has none. `shown` is for messages.
    ///
    /// # Errors
    /// When the attribute cannot be read or is not a token.
    pub fn read(dir: &Handle, shown: &Path) -> Result<Option<Self>, SystemError> {
        let Some(value) = dir.read(XATTR).at("getxattr", shown)? else {
            return Ok(None);
        };
        match std::str::from_utf8(&value).ok().and_then(|text| text.parse().ok()) {
            Some(token) => Ok(Some(token)),
            None => Err(Errno::INVAL).at("getxattr trusted.ephemeral_overlay.token", shown),
        }
    }

    /// Puts the token on a directory. Not durable before the next sync.
    ///
    /// # Errors
    /// Whatever setxattr(2) says.
    pub fn write(self, dir: &Handle, shown: &Path) -> Result<(), SystemError> {
        dir.write(XATTR.as_bytes(), self.to_string().as_bytes()).at("setxattr", shown)
    }
}

impl std::fmt::Display for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl FromStr for Token {
    type Err = std::num::ParseIntError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        u128::from_str_radix(text, 16).map(Self)
    }
}
