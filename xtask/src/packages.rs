//! Installs the programs that a task needs, where they are missing.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::say::say;

/// A program, and what it comes in with apt and with pacman.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tool {
    program: &'static str,
    apt: &'static str,
    pacman: &'static str,
}

const fn tool(program: &'static str, apt: &'static str, pacman: &'static str) -> Tool {
    Tool { program, apt, pacman }
}

/// What a disk image takes.
pub(crate) const IMAGE: [Tool; 3] = [
    tool("mkfs.ext4", "e2fsprogs", "e2fsprogs"),
    tool("mount", "mount", "util-linux"),
    tool("cp", "coreutils", "coreutils"),
];
/// What the measurements take beside that.
pub(crate) const BENCH: [Tool; 4] = [
    tool("rsync", "rsync", "rsync"),
    tool("tar", "tar", "tar"),
    tool("zstd", "zstd", "zstd"),
    tool("fio", "fio", "fio"),
];
/// What the cleaner is measured beside.
pub(crate) const CLEAN: [Tool; 2] = [tool("find", "findutils", "findutils"), tool("lsof", "lsof", "lsof")];
/// Another allocator, to be measured.
pub(crate) const MIMALLOC: [Tool; 1] = [tool("libmimalloc.so.2", "libmimalloc2.0", "mimalloc")];
/// What `try` takes beside that.
pub(crate) const TRY: [Tool; 2] = [tool("tar", "tar", "tar"), tool("useradd", "passwd", "shadow")];
/// What the tests take.
pub(crate) const TEST: [Tool; 8] = [
    tool("mkfs.ext4", "e2fsprogs", "e2fsprogs"),
    tool("mkfs.btrfs", "btrfs-progs", "btrfs-progs"),
    tool("mkfs.xfs", "xfsprogs", "xfsprogs"),
    tool("strace", "strace", "strace"),
    tool("login", "login", "util-linux"),
    tool("script", "bsdutils", "util-linux"),
    tool("nsenter", "util-linux", "util-linux"),
    tool("Xvfb", "xvfb", "xorg-server-xvfb"),
];

/// What a recorded disk takes, in QEMU's storage daemon and beside it.
const CRASH: [Tool; 7] = [
    tool("mkfs.ext4", "e2fsprogs", "e2fsprogs"),
    tool("mkfs.btrfs", "btrfs-progs", "btrfs-progs"),
    tool("mkfs.xfs", "xfsprogs", "xfsprogs"),
    tool("losetup", "mount", "util-linux"),
    tool("setpriv", "util-linux", "util-linux"),
    tool("timeout", "coreutils", "coreutils"),
    tool("qemu-storage-daemon", "qemu-system-common", "qemu-img"),
];
/// Where Debian has that since QEMU 8.
const STORAGE_DAEMON: Tool = tool("qemu-storage-daemon", "qemu-utils", "qemu-img");

/// What a virtual machine takes, beside that. Its kernels come from Debian's packages.
pub(crate) const BOOT: [Tool; 8] = [
    tool("qemu-system-x86_64", "qemu-system-x86", "qemu-system-x86"),
    tool("busybox", "busybox-static", "busybox"),
    tool("debootstrap", "debootstrap", "debootstrap"),
    tool("depmod", "kmod", "kmod"),
    tool("dmsetup", "dmsetup", "device-mapper"),
    tool("lz4", "lz4", "lz4"),
    tool("xz", "xz-utils", "xz"),
    tool("zstd", "zstd", "zstd"),
];

/// `PATH`, with the directories for root's programs at its end: a login as an ordinary user leaves them out.
pub(crate) fn path() -> OsString {
    let own = env::var_os("PATH").unwrap_or_default();
    let mut all: Vec<PathBuf> = env::split_paths(&own).collect();
    for directory in ["/usr/local/sbin", "/usr/sbin", "/sbin"] {
        if !all.iter().any(|known| known == Path::new(directory)) {
            all.push(directory.into());
        }
    }
    env::join_paths(all).unwrap_or(own)
}

/// Whether this is Debian, or of its kind.
pub(crate) fn has_apt() -> bool {
    exists("apt-get")
}

fn exists(program: &str) -> bool {
    find(program).is_some()
}

/// Where a program is, or a library.
pub(crate) fn find(name: &str) -> Option<PathBuf> {
    let libraries = ["/usr/lib".to_owned(), format!("/usr/lib/{}-linux-gnu", env::consts::ARCH)].map(PathBuf::from);
    env::split_paths(&path()).chain(libraries).map(|directory| directory.join(name)).find(|path| path.is_file())
}

/// Sees to it that a disk can be recorded.
pub(crate) fn ensure_recorder() -> Result<()> {
    ensure(&CRASH).or_else(|error| if has_apt() { ensure(&[STORAGE_DAEMON]) } else { Err(error) })
}

/// Sees to it that all `tools` can be run.
pub(crate) fn ensure(tools: &[Tool]) -> Result<()> {
    let missing: Vec<Tool> = tools.iter().copied().filter(|tool| !exists(tool.program)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let programs = missing.iter().map(|tool| tool.program).collect::<Vec<_>>().join(", ");
    let commands: Vec<Vec<&str>> = if has_apt() {
        let install = ["apt-get", "install", "--yes", "--no-install-recommends"];
        vec![vec!["apt-get", "update"], install.into_iter().chain(missing.iter().map(|tool| tool.apt)).collect()]
    } else if exists("pacman") {
        let install = ["pacman", "-Sy", "--needed", "--noconfirm"];
        vec![install.into_iter().chain(missing.iter().map(|tool| tool.pacman)).collect()]
    } else {
        bail!("missing: {programs}; neither apt-get nor pacman is there to install them");
    };
    if !rustix::process::geteuid().is_root() {
        let commands = commands.iter().map(|words| words.join(" ")).collect::<Vec<_>>().join(" && ");
        bail!("missing: {programs}; as root: {commands}");
    }
    say(&format!("installing what is missing: {programs}"));
    for words in &commands {
        install(words).or_else(|error| install_with_qemu(words).unwrap_or(Err(error)))?;
    }
    match missing.iter().find(|tool| !exists(tool.program)) {
        Some(tool) => bail!("{} is still missing", tool.program),
        None => Ok(()),
    }
}

/// The same with `qemu-utils` of the version that QEMU itself comes in. A newer one, from backports say, breaks it, and
/// apt does not go back to an older one by itself. `None` where that is not the matter.
fn install_with_qemu(words: &[&str]) -> Option<Result<()>> {
    if !words.contains(&"qemu-system-x86") || !exists("qemu-img") {
        return None;
    }
    let output = Command::new("apt-cache").args(["policy", "qemu-system-x86"]).env("PATH", path()).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let version = text.lines().find_map(|line| line.trim().strip_prefix("Candidate: "))?;
    let utils = format!("qemu-utils={version}");
    say(&format!("{utils} is installed in the place of the one that is there, which does not go with QEMU"));
    Some(install(&[words, &["--allow-downgrades", &utils]].concat()))
}

fn install(words: &[&str]) -> Result<()> {
    let shown = words.join(" ");
    let (program, arguments) = words.split_first().context("no command")?;
    let output = Command::new(program)
        .args(arguments)
        .env("PATH", path())
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("running {shown}"))?;
    if !output.status.success() {
        bail!("{shown}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr).trim_end());
    }
    Ok(())
}
