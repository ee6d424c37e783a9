//! `syncd`: see `syncd --help`.

mod cli;

use std::process::ExitCode;

use clap::Parser;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// A walk holds one descriptor for each level of a tree, and trees may be deep.
fn raise_file_limit() {
    let limit = getrlimit(Resource::Nofile);
    // Where that is refused a tree that is too deep is an error with its path.
    let _refused = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
}

fn main() -> ExitCode {
    let args = cli::Args::parse();
    cli::log(&args);
    // A name for our lines on a console. At the level that is always shown.
    let _name = tracing::error_span!("syncd").entered();
    raise_file_limit();
    cli::end_with_parent(&args);
    match cli::run(&args) {
        Ok(outcome) => outcome.into(),
        Err(error) => {
            tracing::error!("{error:#}");
            cli::Outcome::of_error(&error).into()
        }
    }
}
