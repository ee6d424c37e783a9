//! The tests that boot: a real kernel, our initramfs, a disk, and a power switch, in QEMU.
//!
//! They take minutes, so they boot only when they are asked for: `REQUIRE_TIERS=qemu`, which `cargo xtask test` sets.
//! Otherwise they are shown as *ignored*, with the reason; what a boot needs and this machine lacks is then a failure.
//! `BOOTS=full` boots every case on every kernel and file system; otherwise [`matrix`] says what is enough. `BOOTS=cost`
//! measures.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests may unwrap")]
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "tests talk to whoever runs them")]

mod binaries;
mod cases;
mod console;
mod cpio;
mod debian;
mod disk;
mod initramfs;
mod kernel;
mod machine;
mod matrix;
mod narrate;
mod package;
mod tools;
mod vm;

use std::process::ExitCode;
use std::sync::OnceLock;

use kernel::{Kernel, NEWEST};
use libtest_mimic::{Arguments, Trial};
use machine::Setup;
use test_support::private;

/// The kernels: the oldest that is supported, the one that most have, and the newest that there is.
static KERNELS: [(&str, OnceLock<Kernel>); 3] =
    [("6.1", OnceLock::new()), ("6.12", OnceLock::new()), (NEWEST, OnceLock::new())];

/// The programs of the machine, and the Debian packages that they are in.
const PROGRAMS: [(&str, &str); 20] = [
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("busybox", "busybox-static"),
    ("depmod", "kmod"),
    ("debootstrap", "debootstrap"),
    ("dmsetup", "dmsetup"),
    ("mkfs.ext4", "e2fsprogs"),
    ("e2fsck", "e2fsprogs"),
    ("mkfs.btrfs", "btrfs-progs"),
    ("mkfs.xfs", "xfsprogs"),
    ("xfs_repair", "xfsprogs"),
    ("mount", "mount"),
    ("chroot", "coreutils"),
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
    // Disks are looked at by mounting them.
    let private = private::enter();
    // Under TCG a machine takes a whole processor.
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    args.test_threads.get_or_insert(processors);
    let mut trials = Vec::new();
    for (module, tests) in [("console", console::TESTS), ("cpio", cpio::TESTS), ("initramfs", initramfs::TESTS)] {
        for &(name, test) in tests {
            trials.push(Trial::test(format!("{module}::{name}"), move || {
                test();
                Ok(())
            }));
        }
    }
    let tests = match std::env::var("BOOTS").as_deref() {
        Ok("cost") => matrix::measurements(),
        Ok("full") => matrix::tests(true),
        _ => matrix::tests(false),
    };
    for (series, cell) in &KERNELS {
        let of_series = || tests.iter().filter(|test| test.series == *series);
        let wanted = of_series().any(|test| args.filter.as_ref().is_none_or(|filter| test.name.contains(filter)));
        let kernel = if args.list || !wanted {
            Err(String::new())
        } else {
            private.clone().and_then(|()| available(series, cell))
        };
        if let Err(reason) = kernel.as_ref()
            && !reason.is_empty()
        {
            if is_required() {
                eprintln!("the boots of Linux {series} are required and cannot run: {reason}");
                return ExitCode::FAILURE;
            }
            eprintln!("the boots of Linux {series} are ignored: {reason}");
        }
        let kernel = kernel.ok();
        for test in of_series() {
            let (case, fs, system) = (test.case, test.fs, test.system);
            let run = move || {
                case(Setup { kernel: kernel.expect("an ignored test does not run"), fs, system });
                Ok(())
            };
            trials.push(Trial::test(test.name.clone(), run).with_ignored_flag(kernel.is_none()));
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
        return Err("boots take minutes; `cargo xtask test` runs them".to_owned());
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
