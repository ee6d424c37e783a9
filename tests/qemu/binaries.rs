//! Our programs as they go into an initramfs: static and small, from a nested build in a directory of its own.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Context, Result, bail};

use crate::tools;

/// The static programs.
#[derive(Debug)]
pub(crate) struct Binaries {
    directory: PathBuf,
}

impl Binaries {
    /// Builds them, once; what went wrong is told once.
    pub(crate) fn get() -> Result<&'static Self> {
        static BUILT: OnceLock<Option<Binaries>> = OnceLock::new();
        let built = BUILT.get_or_init(|| {
            let built = build().map(|directory| Self { directory });
            built.inspect_err(|error| eprintln!("the static programs cannot be built: {error:#}")).ok()
        });
        built.as_ref().context("the static programs could not be built; the reason stands above")
    }

    /// The program of this name.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }
}

/// The target triple of the compiler's own machine.
pub(crate) fn host() -> Result<String> {
    let rustc = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let version = String::from_utf8(tools::finish(Command::new(rustc).arg("-vV"))?)?;
    let host = version.lines().find_map(|line| line.strip_prefix("host: ")).context("rustc -vV names no host")?;
    Ok(host.to_owned())
}

fn build() -> Result<PathBuf> {
    let host = host()?;
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let own = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let target = own.parent().context("the target directory")?.join("static");
    let mut command = Command::new(cargo);
    command
        .args(["build", "--quiet", "--locked", "--profile", "initramfs", "--target", &host])
        .args(["-p", "early", "-p", "syncd", "-p", "qemu-guest", "--target-dir"])
        .arg(&target)
        .current_dir(tools::repository())
        // It stands before RUSTFLAGS, which may say something else.
        .env("CARGO_ENCODED_RUSTFLAGS", "-Ctarget-feature=+crt-static");
    // A variable of the outer build is not for this one.
    for name in ["CARGO_TARGET_DIR", "CARGO_BUILD_TARGET", "CARGO_BUILD_TARGET_DIR"] {
        command.env_remove(name);
    }
    tools::finish(&mut command)?;
    let directory = target.join(host).join("initramfs");
    if !directory.join("early").is_file() {
        bail!("cargo left nothing in {}", directory.display());
    }
    Ok(directory)
}
