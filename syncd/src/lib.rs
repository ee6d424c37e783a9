//! The syncer: what is in RAM goes into checkpoint files, and checkpoints go into the real directories once nothing
//! has them mounted.
//!
//! One direction, no back and forth: [`scan`] → [`content`] (hash) → [`diff`] (pure) → [`format`] → [`store`]; and
//! [`store`] → [`chain`] (pure composition) → [`merge`] → lower. The library never prints.

pub mod base;
pub mod chain;
pub mod checkpoint;
pub mod clean;
pub mod conflict;
pub mod content;
pub mod copy;
pub mod death;
pub mod diff;
pub mod digest;
pub mod durable;
pub mod entry;
pub mod error;
pub mod existing;
pub mod export;
pub mod format;
pub mod in_use;
mod later;
pub mod merge;
pub mod namespaces;
pub mod path;
mod per_thread;
pub mod place;
pub mod progress;
pub mod release;
pub mod room;
pub mod scan;
pub mod schedule;
pub mod sessions;
pub mod store;
pub mod system;
pub mod tree;
pub mod user_cache;
pub mod written;

pub use error::{Error, Result};
