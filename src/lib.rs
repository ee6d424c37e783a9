//! The contract between `early` (before the pivot) and `syncd` (after it).
//!
//! Nothing here mounts or merges: the modules say where things are ([`layout`]), what the user wants ([`config`],
//! [`cmdline`]), what the machine has mounted ([`mountinfo`], [`fstab`]), what the artefacts in an upper directory mean
//! ([`overlay`]) and what `early` tells `syncd` about this boot ([`state`]).

pub mod attributes;
pub mod cmdline;
pub mod config;
pub mod error;
pub mod fstab;
pub mod layout;
pub mod mountinfo;
pub mod overlay;
pub mod state;
pub mod token;

pub use error::{At, SystemError};
pub use layout::Layout;

/// The newest checkpoint format that this build reads and writes (docs/format.md).
pub const CHECKPOINT_FORMAT: u32 = 1;
