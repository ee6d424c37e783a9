//! What the tests run: our binaries, and the few programs of the system that make file systems and trace calls.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use ephemeral_overlay::mountinfo::{self, Mount};
use test_support::private;

/// Puts the whole process into a mount namespace of its own, and sees that the tests can run in it.
pub(crate) fn enter_private_namespace() -> Result<(), String> {
    for program in ["mkfs.ext4", "mkfs.btrfs", "mkfs.xfs", "strace", "losetup", "xfs_io", "fstrim", "chattr"] {
        if which(program).is_none() {
            return Err(format!("{program} is not installed; `cargo xtask test` installs what is missing"));
        }
    }
    private::enter()?;
    let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if known.lines().any(|line| line.trim_start_matches("nodev").trim() == "overlay") {
        Ok(())
    } else {
        Err("the kernel has no overlay file system".to_owned())
    }
}

fn which(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|directory| directory.join(program))
        .find(|path| path.exists())
}

/// `early`, as this workspace builds it.
pub(crate) fn early() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| build("early"))
}

/// `syncd`, as this workspace builds it.
pub(crate) fn syncd() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| build("syncd"))
}

fn build(package: &str) -> PathBuf {
    let run = escargot::CargoBuild::new().package(package).bin(package).run().unwrap();
    run.path().to_path_buf()
}

/// Runs a program of the system and expects it to succeed.
pub(crate) fn run(program: &str, args: &[&str]) -> String {
    let path = which(program).unwrap_or_else(|| panic!("{program} is not installed"));
    let output = Command::new(path).args(args).output().unwrap();
    assert!(output.status.success(), "{program} {args:?}: {}", text(&output));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Copies a program to where a test runs it.
///
/// A process of its own writes it: while another thread of ours is between `fork` and `execve`, its child has whatever we
/// have open, and the kernel executes nothing that somebody has open for writing (ETXTBSY).
pub(crate) fn install(program: &Path, to: &Path) {
    run("install", &["-m", "755", program.to_str().unwrap(), to.to_str().unwrap()]);
}

/// Everything a program said.
pub(crate) fn text(output: &Output) -> String {
    format!("{}\n{}{}", output.status, String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// The exit status; a program that was killed has none.
pub(crate) fn code(output: &Output) -> i32 {
    output.status.code().unwrap_or_else(|| panic!("killed: {}", text(output)))
}

/// The mounts on a path, lowest first.
pub(crate) fn mounts_on(path: &Path) -> Vec<Mount> {
    let mut mounts = mountinfo::parse(&fs::read("/proc/self/mountinfo").unwrap());
    mounts.retain(|mount| mount.mount_point == path);
    mounts
}

/// Whether what is seen at a path is an overlay.
pub(crate) fn is_overlay(path: &Path) -> bool {
    mounts_on(path).last().is_some_and(|mount| mount.fs_type == "overlay")
}
