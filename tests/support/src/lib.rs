//! What the tests of the namespaces and those of the virtual machines have in common: random histories, and everything
//! that one can see of a tree.

#![allow(clippy::unwrap_used, clippy::missing_panics_doc, reason = "tests may unwrap")]

pub mod hold;
pub mod live;
pub mod mapped;
pub mod model;
pub mod private;
pub mod snapshot;
pub mod watch;
