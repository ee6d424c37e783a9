//! `early` stays small: what it must not depend on, and what the executable in the initramfs may weigh.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests may unwrap")]

use std::ffi::OsString;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

/// What the static executable may weigh, in bytes.
const LARGEST: u64 = 2 << 20;
/// They belong to `syncd`: threads, compression, D-Bus, a large parser of arguments.
const NOT_WANTED: [&str; 5] = ["rayon", "zstd", "zbus", "dbus", "clap"];

/// Standard output of a command that succeeds.
fn output(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn cargo() -> Command {
    let mut command = Command::new(env!("CARGO"));
    command.current_dir(env!("CARGO_MANIFEST_DIR"));
    command
}

#[test]
fn heavy_crates_are_not_wanted() {
    let tree = output(cargo().args(["tree", "-p", "early", "-e", "normal", "--prefix", "none", "--locked"]));
    let crates: Vec<_> = tree.lines().filter_map(|line| line.split(' ').next()).collect();
    assert!(crates.contains(&"early") && crates.contains(&"rustix"), "{tree}");
    for name in crates {
        let unwanted = NOT_WANTED.iter().find(|family| name == **family || name.starts_with(&format!("{family}-")));
        assert_eq!(unwanted, None, "early depends on {name}:\n{tree}");
    }
}

/// The executable as it goes into an initramfs. Built beside the other builds, so that it is there the next time.
fn initramfs_build() -> PathBuf {
    let version = output(Command::new(rustc()).arg("-vV"));
    let host = version.lines().find_map(|line| line.strip_prefix("host: ")).unwrap();
    // A directory that cargo gives to integration tests, in the target directory.
    let target = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).with_file_name("footprint");
    let mut build = cargo();
    build.args(["build", "--locked", "--package", "early", "--profile", "initramfs", "--target", host]);
    // Without --target the flags would go to build scripts, too; those of the outer build must not leak in.
    build.env_remove("CARGO_ENCODED_RUSTFLAGS").env("RUSTFLAGS", "-Ctarget-feature=+crt-static");
    output(build.arg("--target-dir").arg(&target));
    target.join(host).join("initramfs/early")
}

fn rustc() -> OsString {
    std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into())
}

#[test]
fn the_static_executable_is_small_and_runs_alone() {
    let path = initramfs_build();
    let bytes = fs::read(&path).unwrap();
    let size = bytes.len() as u64;
    assert!(size <= LARGEST, "{} has {size} bytes, more than {LARGEST}", path.display());
    let kinds = segments(&bytes);
    assert!(kinds.contains(&PT_LOAD), "{kinds:?}");
    assert!(!kinds.contains(&PT_INTERP), "it needs a dynamic loader");
    let help = output(Command::new(&path).arg("--help").env_clear().current_dir("/"));
    assert!(help.starts_with("early --root DIR"), "{help}");
    assert!(!has_symbols(&bytes), "it is not stripped");
}

/// A loadable segment, and the one that names the dynamic loader (elf(5)).
const PT_LOAD: u32 = 1;
const PT_INTERP: u32 = 3;
/// A section that holds symbols.
const SHT_SYMTAB: u32 = 2;

/// The types of the program headers.
fn segments(elf: &[u8]) -> Vec<u32> {
    // e_phoff, e_phentsize, e_phnum; p_type stands first.
    table(elf, 0x20, 0x36, 0).collect()
}

fn has_symbols(elf: &[u8]) -> bool {
    // e_shoff, e_shentsize, e_shnum; sh_type stands second.
    table(elf, 0x28, 0x3a, 4).any(|kind| kind == SHT_SYMTAB)
}

/// A word of every entry of one of the two tables of a 64-bit little-endian ELF file.
fn table(elf: &[u8], start: usize, layout: usize, word: usize) -> impl Iterator<Item = u32> {
    assert_eq!(&elf[..6], b"\x7fELF\x02\x01", "not such a file");
    let short = |at: usize| usize::from(u16::from_le_bytes(elf[at..at + 2].try_into().unwrap()));
    let first = usize::try_from(u64::from_le_bytes(elf[start..start + 8].try_into().unwrap())).unwrap();
    let (length, number) = (short(layout), short(layout + 2));
    (0..number).map(move |index| {
        let at = first + index * length + word;
        u32::from_le_bytes(elf[at..at + 4].try_into().unwrap())
    })
}
