//! The tests that boot: a real kernel, our initramfs, a disk, and a power switch, in QEMU.
//!
//! They take minutes, so they boot only when they are asked for: `REQUIRE_TIERS=qemu`, which `cargo xtask test --boot`
//! sets. Otherwise they are shown as *ignored*, with the reason; what a boot needs and this machine lacks is then a
//! failure.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests may unwrap")]
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "tests talk to whoever runs them")]

mod binaries;
mod cases;
mod console;
mod cpio;
mod disk;
mod initramfs;
mod kernel;
mod machine;
mod tools;
mod vm;

use std::process::ExitCode;
use std::sync::OnceLock;

use cases::Case;
use kernel::Kernel;
use libtest_mimic::{Arguments, Trial};

/// The kernels that every case boots: the oldest that is supported, and a newer one.
static KERNELS: [(&str, OnceLock<Kernel>); 2] = [("6.1", OnceLock::new()), ("6.12", OnceLock::new())];

/// The programs of the machine, and the Debian packages that they are in.
const PROGRAMS: [(&str, &str); 14] = [
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("busybox", "busybox-static"),
    ("depmod", "kmod"),
    ("mke2fs", "e2fsprogs"),
    ("e2fsck", "e2fsprogs"),
    ("debugfs", "e2fsprogs"),
    ("apt-get", "apt"),
    ("apt-cache", "apt"),
    ("dpkg-deb", "dpkg"),
    ("bash", "bash"),
    ("ldd", "libc-bin"),
    ("lz4", "lz4"),
    ("xz", "xz-utils"),
    ("zstd", "zstd"),
];

fn main() -> ExitCode {
    let mut args = Arguments::from_args();
    // Under TCG a machine takes a whole processor.
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    args.test_threads.get_or_insert(processors);
    let mut trials = Vec::new();
    for (module, tests) in [("console", console::TESTS), ("cpio", cpio::TESTS)] {
        for &(name, test) in tests {
            trials.push(Trial::test(format!("{module}::{name}"), move || {
                test();
                Ok(())
            }));
        }
    }
    for (series, cell) in &KERNELS {
        let cases: Vec<(String, Case)> = cases::CASES
            .iter()
            .flat_map(|(module, cases)| {
                cases.iter().map(move |(name, case)| (format!("linux_{series}::{module}::{name}"), *case))
            })
            .collect();
        let wanted = cases.iter().any(|(name, _)| args.filter.as_ref().is_none_or(|filter| name.contains(filter)));
        let kernel = if args.list || !wanted { Err(String::new()) } else { available(series, cell) };
        if let Err(reason) = kernel.as_ref()
            && !reason.is_empty()
        {
            if is_required() {
                eprintln!("the boots of Linux {series} are required and cannot run: {reason}");
                return ExitCode::FAILURE;
            }
            eprintln!("the boots of Linux {series} are ignored: {reason}");
        }
        for (name, case) in cases {
            let kernel = kernel.as_ref().ok().copied();
            let run = move || {
                case(kernel.expect("an ignored test does not run"));
                Ok(())
            };
            trials.push(Trial::test(name, run).with_ignored_flag(kernel.is_none()));
        }
    }
    libtest_mimic::run(&args, trials).exit_code()
}

fn is_required() -> bool {
    std::env::var("REQUIRE_TIERS").is_ok_and(|tiers| tiers.split(',').any(|tier| tier == "qemu"))
}

/// A kernel of the series, when boots are asked for and this machine can boot it.
fn available(series: &'static str, cell: &'static OnceLock<Kernel>) -> Result<&'static Kernel, String> {
    if !is_required() {
        return Err("boots take minutes; `cargo xtask test --boot` runs them".to_owned());
    }
    if !binaries::host().map_err(|error| format!("{error:#}"))?.starts_with("x86_64-unknown-linux-") {
        return Err("the virtual machines are x86_64, and so must be the compiler's own machine".to_owned());
    }
    let missing = PROGRAMS.iter().find(|(program, _)| tools::which(program).is_none());
    if let Some((program, package)) = missing {
        return Err(format!("{program} is not installed (on Debian it is in {package})"));
    }
    let kernel = Kernel::of(series).map_err(|error| format!("{error:#}"))?;
    Ok(cell.get_or_init(|| kernel))
}
