//! The tests that need a kernel: real overlays, real file systems in loop images, in a private mount namespace.
//!
//! Where that cannot be had every test is shown as ignored, with the reason; with `REQUIRE_TIERS=namespace` that is
//! a failure instead.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests may unwrap")]
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "tests talk to whoever runs them")]

mod activate;
mod checkpoint;
mod clean;
mod damage;
mod delta;
mod differential;
mod early;
mod errors;
mod export;
mod facts;
mod live;
mod merge;
mod order;
mod refused;
mod release;
mod reserve;
mod restart;
mod run;
mod sessions;
mod shutdown;
mod sweep;
mod tools;
mod trouble;
mod user_cache;
mod vanish;
mod world;
mod written;

use std::process::ExitCode;
use std::sync::{PoisonError, RwLock};

use libtest_mimic::{Arguments, Trial};

/// The mount table of this process.
static TABLE: RwLock<()> = RwLock::new(());

fn main() -> ExitCode {
    test_support::live::write_if_asked();
    test_support::hold::if_asked();
    user_cache::hostile::act_if_asked();
    let mut args = Arguments::from_args();
    let available = tools::enter_private_namespace();
    if let Err(reason) = &available {
        let required = std::env::var("REQUIRE_TIERS").unwrap_or_default();
        if required.split(',').any(|tier| tier == "namespace") {
            eprintln!("the namespace tests are required and cannot run: {reason}");
            return ExitCode::FAILURE;
        }
        eprintln!("the namespace tests are ignored: {reason}");
    }
    let ignored = available.is_err();
    // Every test waits for the same two or three programs; more at once only makes failures harder to read.
    args.test_threads.get_or_insert(2);
    let modules = [
        ("activate", activate::TESTS),
        ("checkpoint", checkpoint::TESTS),
        ("clean", clean::TESTS),
        ("damage", damage::TESTS),
        ("delta", delta::TESTS),
        ("differential", differential::TESTS),
        ("early", early::TESTS),
        ("errors", errors::TESTS),
        ("export", export::TESTS),
        ("facts", facts::TESTS),
        ("live", live::TESTS),
        ("merge", merge::TESTS),
        ("order", order::TESTS),
        ("refused", refused::TESTS),
        ("release", release::TESTS),
        ("reserve", reserve::TESTS),
        ("restart", restart::TESTS),
        ("run", run::TESTS),
        ("sessions", sessions::TESTS),
        ("shutdown", shutdown::TESTS),
        ("trouble", trouble::TESTS),
        ("user_cache", user_cache::TESTS),
        ("vanish", vanish::TESTS),
        ("written", written::TESTS),
    ];
    let mut trials = Vec::new();
    for (module, tests) in modules {
        for &(name, test) in tests {
            let run = move || {
                // A copy of the mount table holds on to the overlays of every test that runs at the time.
                let alone = [activate::ALONE, refused::ALONE].contains(&name)
                    || release::ALONE.contains(&name)
                    || user_cache::ALONE.contains(&name)
                    || module == "sessions";
                let _shared = (!alone).then(|| TABLE.read().unwrap_or_else(PoisonError::into_inner));
                let _alone = alone.then(|| TABLE.write().unwrap_or_else(PoisonError::into_inner));
                test();
                Ok(())
            };
            trials.push(Trial::test(format!("{module}::{name}"), run).with_ignored_flag(ignored));
        }
    }
    libtest_mimic::run(&args, trials).exit_code()
}
