//! `cargo xtask package`: the tree that a package is made of, in `target/package`.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::build;
use crate::say::say;

/// Where it is put.
const TREE: &str = "target/package";

/// Builds both kinds of programs and puts everything in its place.
pub(crate) fn run() -> Result<()> {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("the repository")?;
    let tree = repository.join(TREE);
    say("building the syncd of the system, and early and syncd for the initramfs");
    let syncd = build::binary("syncd", &["--release"], &[])?;
    let host = build::host()?;
    let small = ["--profile", "initramfs", "--target", &host];
    let flags = [("RUSTFLAGS", "-Ctarget-feature=+crt-static")];
    let early = build::binary("early", &small, &flags)?;
    build::binary("syncd", &small, &flags)?;
    if tree.exists() {
        std::fs::remove_dir_all(&tree).with_context(|| format!("rm -r {}", tree.display()))?;
    }
    let status = Command::new("sh")
        .arg(repository.join("packaging/install.sh"))
        .args([early.parent().context("early is nowhere")?, &syncd])
        .env("DESTDIR", &tree)
        .status()
        .context("running packaging/install.sh")?;
    if !status.success() {
        bail!("packaging/install.sh: {status}");
    }
    say(&format!("done: as root, cp -rT --preserve=mode {TREE} /"));
    Ok(())
}
