//! Checkpoint files that no writer would write: damaged, hostile, or merely strange. What the tests of the reader, those
//! of the merge and the fuzz targets have in common.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::missing_panics_doc,
    reason = "it is for tests, which may panic"
)]

pub mod cases;
pub mod file;
pub mod fuzz;
pub mod sample;
pub mod scratch;
