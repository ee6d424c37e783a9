//! `syncd`: see `syncd --help`.

mod cli;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let args = cli::Args::parse();
    cli::log_to_stderr(&args);
    match cli::run(&args) {
        Ok(outcome) => outcome.into(),
        Err(error) => {
            tracing::error!("{error:#}");
            cli::Outcome::of_error(&error).into()
        }
    }
}
