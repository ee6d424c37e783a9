//! What mounts the overlays and the tmpfs folders of a system: before the pivot for `early`, and for what has to wait
//! until the system has mounted its own file systems, for `syncd activate`.
//!
//! Facts → plan (pure) → apply. The library never prints.

pub mod apply;
pub mod chains;
pub mod cover;
pub mod facts;
pub mod plan;
pub mod sys;
mod utab;
pub mod writable;
