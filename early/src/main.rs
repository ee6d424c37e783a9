//! `early`: mounts the overlays and the tmpfs folders of a system before the pivot.
//!
//! Arguments → facts → plan (pure) → apply. Only what must happen before anything in userspace opens a file happens
//! here. Nothing panics: whatever goes wrong is said, and the machine boots from disk.

mod args;
mod standing;
mod syncd;

use std::process::ExitCode;

use anyhow::{Context, bail};
use args::Args;
use early::{apply, facts, plan};
use ephemeral_overlay::Layout;
use ephemeral_overlay::cmdline::{KernelCmdline, Mode};
use ephemeral_overlay::config::Config;
use ephemeral_overlay::layout::{STORE_DIR, open_host_dir};
use ephemeral_overlay::state::Skipped;
use standing::Standing;

/// Everything that was planned is done, or there was nothing to do.
const DONE: u8 = 0;
/// Nothing is mounted; the machine boots from disk.
const FROM_DISK: u8 = 1;
/// The command line is wrong.
const USAGE: u8 = 2;
/// Something was skipped, and it was said what.
const SKIPPED: u8 = 3;

fn main() -> ExitCode {
    let args = match Args::parse() {
        Ok(Some(args)) => args,
        Ok(None) => return say(args::HELP, DONE),
        Err(error) => return complain(&format!("{error}; see early --help"), USAGE),
    };
    match run(&args) {
        Ok(skipped) if skipped.is_empty() => ExitCode::from(DONE),
        Ok(skipped) => {
            for Skipped { path, reason } in skipped {
                complain(&format!("{} skipped: {reason}", path.display()), SKIPPED);
            }
            ExitCode::from(SKIPPED)
        }
        Err(error) => complain(&format!("{error:#}; booting from disk"), FROM_DISK),
    }
}

fn run(args: &Args) -> anyhow::Result<Vec<Skipped>> {
    let layout = Layout::new(&args.root, args.run_dir.as_deref(), args.config.as_deref());
    open_host_dir(layout.root())?;
    let cmdline = KernelCmdline::parse(&args.cmdline()?);
    let mode = cmdline.mode();
    if let Some(value) = cmdline.unknown_value() {
        complain(&format!("ephemeral_overlay={value} on the kernel command line is not known, taken as off"), DONE);
    }
    if mode == Mode::NoMerge {
        return Ok(Vec::new());
    }
    if !args.dry_run && layout.boot_state().exists() {
        // Soft reboot, or a second call: what is in RAM is in use, and `boot.json` tells `syncd` of it.
        complain(&format!("{} exists: already active in this boot", layout.boot_state().display()), DONE);
        return Ok(Vec::new());
    }
    // With a configuration that does not parse the default store is looked at: merge what is there, mount nothing.
    let loaded = layout.load_config();
    if !args.dry_run {
        apply::create_run_dir(layout.run_dir())?;
        let persist =
            loaded.as_ref().map_or_else(|_| Config::default().persist.root, |config| config.persist.root.clone());
        syncd::merge_pending(&layout, &persist);
    }
    loaded?;
    if mode == Mode::Off {
        return Ok(Vec::new());
    }
    // The merge may have brought a newer configuration to the disk.
    let config = layout.load_config()?;
    let mut facts = facts::observe(&layout, &config).context("looking at the root")?;
    // A store that is not visible yet has no count of ours; below its mount point there may be another one.
    let store = facts.missing(&config.persist.root).is_none().then(|| config.persist.root.join(STORE_DIR));
    let standing = Standing::observe(&layout, &cmdline, store.as_deref())?;
    if let Some(why) = standing.obstacle(&cmdline) {
        bail!(why);
    }
    if args.dry_run {
        for target in facts.pending.drain(..) {
            say(&format!("merge the checkpoints of {}", target.display()), DONE);
        }
        let plan = plan::plan(&config, &facts);
        say(&plan.to_string(), DONE);
        return Ok(plan.skipped);
    }
    let plan = plan::plan(&config, &facts);
    if let Some(Err(error)) = store.map(|store| standing.count_try(&layout, &store)) {
        // A full disk must not decide what the machine shows.
        complain(&format!("this boot is not counted: {:#}", anyhow::Error::from(error)), SKIPPED);
    }
    let state = apply::new_state(&layout, &config.persist.root)?;
    apply::apply(&layout, plan, state, &|target| syncd::unpack(&layout, target))
}

#[allow(clippy::print_stdout, reason = "the one place that writes to standard output")]
fn say(text: &str, code: u8) -> ExitCode {
    println!("{}", text.trim_end());
    ExitCode::from(code)
}

#[allow(clippy::print_stderr, reason = "the one place that writes to the console")]
fn complain(text: &str, code: u8) -> ExitCode {
    eprintln!("early: {text}");
    ExitCode::from(code)
}
