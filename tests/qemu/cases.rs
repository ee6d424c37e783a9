//! The boots. Each test says the end state that it wants.

use crate::kernel::Kernel;
use crate::machine::{Boot, Machine};

/// A test on one kernel.
pub(crate) type Case = fn(&'static Kernel);

pub(crate) const CASES: &[(&str, Case)] = &[("fresh_boot", fresh_boot)];

/// The overlays and the tmpfs folders are there before the root's init does anything; the disk has not changed.
fn fresh_boot(kernel: &'static Kernel) {
    let mut machine = Machine::new(kernel, "fresh_boot", &[("/etc/hello", "from disk\n")]);
    let console = machine.boot(Boot::default(), "mounts\ncat /etc/hello\nshutdown");
    for (path, kind) in [
        ("/etc", "overlay"),
        ("/var/log", "overlay"),
        ("/tmp", "tmpfs"),
        ("/var/tmp", "tmpfs"),
        ("/var/cache", "tmpfs"),
    ] {
        console.expect(console.mounts(path).iter().any(|mount| mount.starts_with(kind)), &format!("{path}: no {kind}"));
    }
    assert_eq!(console.file("/etc/hello").as_deref(), Some("from disk"));
    let disk = machine.disk();
    assert_eq!(disk.file("/etc/hello").as_deref(), Some("from disk"));
    assert_eq!(disk.pending("/etc"), 0);
}
