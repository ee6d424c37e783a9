//! Boots in which nothing is to be mounted: the machine comes up from its disk, and says why.

use super::{
    Case, FILES, LOOK, expect_disk, expect_nothing_mounted, expect_overlays, expect_pending, expect_view, machine,
    machine_with_checkpoint,
};
use crate::initramfs::Initramfs;
use crate::machine::{Boot, COUNTERPART, Machine, Setup};

pub(crate) const CASES: &[(&str, Case)] = &[
    ("without_the_module_it_boots_from_disk", no_module),
    ("a_broken_config_boots_from_disk", broken_config),
    ("an_unknown_key_boots_from_disk", unknown_key),
    ("off_merges_and_nomerge_touches_nothing", off_and_nomerge),
    ("a_rescue_merges_and_mounts_nothing", rescue),
    ("another_init_merges_and_mounts_nothing", another_init),
    ("a_root_without_counterpart_boots_from_disk", no_counterpart),
    ("after_two_boots_without_syncd_it_boots_from_disk", tries),
    ("a_crashing_early_boots_from_disk", crashing_early),
    ("a_failing_early_boots_from_disk", failing_early),
    ("a_hanging_early_is_given_up", hanging_early),
    ("a_symlinked_folder_is_skipped_alone", symlinked_folder),
];

/// No overlays, and it is said which; the pending checkpoint is on disk, and what is written goes there.
fn no_module(on: Setup) {
    let mut machine = machine_with_checkpoint(on, "no_module");
    let initramfs = Initramfs { overlay: false, ..Initramfs::default() };
    let boot = Boot { initramfs, ..Boot::default() };
    let console = machine.boot(boot, &format!("{LOOK}\nwrite /etc/direct disk\nshutdown"));
    for target in ["/etc", "/var/log"] {
        console.expect(console.mounts(target).is_empty(), "an overlay without a module");
        console.expect(console.says(&format!("early: {target} skipped: ")), "no reason was given");
    }
    expect_view(&console, true);
    let disk = machine.disk();
    expect_disk(&disk, true);
    expect_pending(&disk, 0);
    assert_eq!(disk.file("/etc/direct").as_deref(), Some("disk"));
}

/// Boots a machine with this configuration, and expects it to say `reason`.
fn boots_from_disk(on: Setup, name: &str, config: &str, reason: &str) {
    let files: Vec<_> = FILES.into_iter().chain([("/etc/ephemeral-overlay.toml", config)]).collect();
    let mut machine = Machine::new(on, name, &files);
    let console = machine.boot(Boot::default(), &format!("{LOOK}\nshutdown"));
    expect_nothing_mounted(&console);
    expect_view(&console, false);
    let said = console.lines.iter().any(|line| line.starts_with("early: ") && line.contains(reason));
    console.expect(said, &format!("nothing was said of {reason}"));
}

/// The reason names the file and the line.
fn broken_config(on: Setup) {
    boots_from_disk(on, "broken_config", "[overlay]\ndirs = [\n", "ephemeral-overlay.toml");
}

/// The reason names the nearest key.
fn unknown_key(on: Setup) {
    boots_from_disk(on, "unknown_key", "[overlay]\ndirectories = []\ndir = []\n", "dirs");
}

/// `nomerge`: the old disk, and the checkpoint stays. `off`, afterwards: the checkpoint is merged. Neither mounts.
fn off_and_nomerge(on: Setup) {
    let mut machine = machine_with_checkpoint(on, "off_and_nomerge");
    for (word, merged) in [("nomerge", false), ("off", true)] {
        let cmdline = format!("rw ephemeral_overlay={word}");
        let console = machine.boot(Boot { cmdline: &cmdline, ..Boot::default() }, &format!("{LOOK}\nshutdown"));
        expect_nothing_mounted(&console);
        expect_view(&console, merged);
        let disk = machine.disk();
        expect_disk(&disk, merged);
        expect_pending(&disk, usize::from(!merged));
    }
}

/// Boots with `word`, and expects the checkpoint on disk, no mount, and `reason`.
fn merges_and_mounts_nothing(on: Setup, name: &str, word: &str, reason: &str) {
    let mut machine = machine_with_checkpoint(on, name);
    let cmdline = format!("rw {word}");
    let console = machine.boot(Boot { cmdline: &cmdline, ..Boot::default() }, &format!("{LOOK}\nshutdown"));
    expect_nothing_mounted(&console);
    expect_view(&console, true);
    console.expect(console.says(reason), "no reason was given");
    expect_pending(&machine.disk(), 0);
}

/// Nothing is in RAM that a shell without any syncd would lose; nothing is missing on the disk.
fn rescue(on: Setup) {
    for word in ["single", "emergency"] {
        let name = format!("rescue-{word}");
        merges_and_mounts_nothing(on, &name, word, &format!("{word} on the kernel command line"));
    }
}

/// The same for `init=`. The program is our init under another name, so that it can tell what it sees.
fn another_init(on: Setup) {
    merges_and_mounts_nothing(on, "another_init", "init=/usr/bin/not-init", "not this root's own init");
}

/// Nobody would save what is in RAM: nothing is mounted.
fn no_counterpart(on: Setup) {
    let files: Vec<_> = FILES.into_iter().chain([(COUNTERPART, "")]).collect();
    let mut machine = Machine::new(on, "no_counterpart", &files);
    let console = machine.boot(Boot::default(), &format!("{LOOK}\nshutdown"));
    expect_nothing_mounted(&console);
    expect_view(&console, false);
    console.expect(console.says(COUNTERPART), "no reason was given");
}

/// Two boots that did not come as far as syncd: the third mounts nothing. Once syncd has run, it mounts again.
fn tries(on: Setup) {
    let mut machine = machine(on, "tries");
    // This one makes the store.
    machine.boot_and_cut(Boot::default(), "run syncd checkpoint");
    for _ in 0..2 {
        let console = machine.boot_and_cut(Boot::default(), "mounts");
        expect_overlays(&console);
    }
    let console = machine.boot(Boot::default(), "mounts\nrun syncd checkpoint\nshutdown");
    expect_nothing_mounted(&console);
    console.expect(console.says("did not come as far as syncd"), "no reason was given");
    let console = machine.boot(Boot::default(), "mounts\nshutdown");
    expect_overlays(&console);
}

/// Boots a machine whose `early` is this shell script, and expects the disk, untouched, and `reason`.
fn boots_without_early(on: Setup, name: &str, early: &'static str, reason: &str) {
    let mut machine = machine_with_checkpoint(on, name);
    let initramfs = Initramfs { replaced: Some(("early", early)), ..Initramfs::default() };
    let console = machine.boot(Boot { initramfs, ..Boot::default() }, &format!("{LOOK}\nshutdown"));
    expect_nothing_mounted(&console);
    expect_view(&console, false);
    console.expect(console.says(reason), "no reason was given");
    // The next one is not lost because of it.
    expect_pending(&machine.disk(), 1);
    let console = machine.boot(Boot::default(), &format!("{LOOK}\nshutdown"));
    expect_view(&console, true);
}

/// It ends by a signal: the boot goes on and says so.
fn crashing_early(on: Setup) {
    boots_without_early(on, "crashing_early", "#!/bin/sh\nkill -SEGV $$\n", "early ended with status 139");
}

/// It fails before it has done anything.
fn failing_early(on: Setup) {
    boots_without_early(on, "failing_early", "#!/bin/sh\necho early: no luck\nexit 1\n", "early: no luck");
}

/// It does nothing for a minute: the boot goes on and says so.
fn hanging_early(on: Setup) {
    boots_without_early(on, "hanging_early", "#!/bin/sh\nexec sleep 100000\n", "no progress for 60 seconds");
}

/// Everything else is mounted; the folder is what it was.
fn symlinked_folder(on: Setup) {
    let mut machine = machine(on, "symlinked_folder");
    machine.edit(|root| {
        std::fs::remove_dir(root.join("var/tmp"))?;
        Ok(std::os::unix::fs::symlink("../tmp", root.join("var/tmp"))?)
    });
    let console = machine.boot(Boot::default(), "mounts\nwrite /var/tmp/file text\ncat /tmp/file\nshutdown");
    expect_overlays(&console);
    console.expect(console.says("early: /var/tmp skipped: it is a symlink"), "no reason was given");
    console.expect(console.mounts("/tmp").iter().any(|mount| mount.starts_with("tmpfs ")), "/tmp is no tmpfs");
    console.expect(console.file("/tmp/file").as_deref() == Some("text"), "the symlink does not lead there any more");
}
