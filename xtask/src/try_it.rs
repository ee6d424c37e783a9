//! `cargo xtask try`: the whole way of the data, on a copy of this machine, with a power cut in between.
//!
//! The cut is as hard as it can be without a power supply: the image is copied as it is at that moment, which is what
//! a disk would hold, and everything goes on with the copy. The file system is told to keep back for five minutes
//! what nobody asks it to write.

use std::path::Path;

use anyhow::{Context, Result, bail};
use bytesize::ByteSize;
use serde_json::Value;

use crate::disk::{self, Disk};
use crate::say::say;
use crate::shell::Shell;
use crate::snapshot::Snapshot;
use crate::{build, edits, machine, namespace, packages};

/// What is compared.
const TARGETS: [&str; 2] = ["etc", "var/log"];

/// Runs it.
pub(crate) fn run() -> Result<()> {
    namespace::require_root()?;
    packages::ensure(&[&packages::IMAGE[..], &packages::TRY].concat())?;
    say("building early and syncd");
    let early = build::binary("early", &["--release"], &[])?;
    let syncd = build::binary("syncd", &["--release"], &[])?;
    let binaries = early.parent().context("early is nowhere")?;
    if syncd.parent() != Some(binaries) {
        bail!("early and syncd are not in one directory");
    }
    namespace::enter()?;
    let place = tempfile::Builder::new().prefix("eo-").tempdir().context("creating a temporary directory")?;
    let result = story(place.path(), binaries);
    // Before the directory goes: what is mounted in it must not go with it.
    disk::detach_all(place.path())?;
    place.close().context("removing the temporary directory")?;
    result
}

fn story(place: &Path, binaries: &Path) -> Result<()> {
    let (root, run_dir) = (place.join("root"), place.join("run"));
    let shell = Shell { root: &root, run_dir: &run_dir, binaries };
    for directory in [&root, &run_dir] {
        std::fs::create_dir(directory)?;
    }
    say("\n1. A disk with a copy of this machine's /etc and /var/log\n");
    let disk = copy_machine(&root)?;
    say(&format!("   R={}   the system's root\n   X={}    its run directory", root.display(), run_dir.display()));
    let on_disk = Snapshot::take(&root, &TARGETS)?;
    say(&format!("   {} files and directories", on_disk.len()));

    say("\n2. Before anything in userspace runs: the overlays are mounted\n");
    shell.run("early --root $R --run-dir $X --cmdline ''")?;
    shell.run("findmnt --raw --noheadings --output FSTYPE,TARGET | grep -F $R/ || grep -F $R/ /proc/self/mounts")?;
    differ("the merged view", &on_disk, &Snapshot::take(&root, &TARGETS)?)?;

    say("\n3. The system is used; all of this goes to RAM\n");
    edits::lines(&root).iter().try_for_each(|line| shell.run(line))?;
    shell.run("syncd status --root $R --run-dir $X")?;

    say("\n4. A checkpoint, and an edit after it\n");
    shell.run("syncd checkpoint --root $R --run-dir $X")?;
    let saved = Snapshot::take(&root, &TARGETS)?;
    shell.run(&format!("echo '{}' >>$R/etc/demo.conf", edits::UNSAVED))?;
    shell.run("syncd status --root $R --run-dir $X")?;

    say("\n5. The power goes: what was in RAM is gone, the disk is as it was at that moment\n");
    let after = disk.as_it_is_now()?;
    disk::detach_all(&root)?;
    disk::detach_all(&run_dir)?;
    drop(disk);
    after.mount(&root, "")?;
    differ("the disk after the cut", &on_disk, &Snapshot::take(&root, &TARGETS)?)?;
    say(
        "   (All overlays and tmpfs are detached; the image, copied at this moment, is mounted in place of the old one.)",
    );
    shell.run(&format!("grep {} $R/etc/passwd || echo 'no such user on disk'", edits::USER))?;
    say(&format!("   The directories are as in step 1: {} files and directories, no difference.", on_disk.len()));
    shell.run("syncd status --root $R")?;

    say("\n6. The next boot merges, before it mounts\n");
    shell.run("syncd merge --root $R")?;
    let merged = Snapshot::take(&root, &TARGETS)?;
    shell.run(&format!("grep {} $R/etc/passwd", edits::USER))?;
    shell.run("cat $R/etc/demo.conf")?;
    shell.run("syncd status --root $R")?;

    say("\n7. Is the disk what was seen at the checkpoint?\n");
    differ("the disk after the merge", &saved, &merged)?;
    expect_the_unsaved_to_be_lost(&root)?;
    nothing_pending(&shell)?;
    say(&format!(
        "   Yes: {} files and directories, names, types, contents, modes, owners, times and links.\n   \
         The edit after the checkpoint is lost, nothing else is. Nothing is pending in the store.",
        merged.len()
    ));
    Ok(())
}

fn copy_machine(root: &Path) -> Result<Disk> {
    let selection = machine::select()?;
    // Twice, because a merge writes a new file beside the old one; and room for checkpoints and the journal.
    let bytes = (2 * selection.bytes + selection.objects * 8192 + (96 << 20)).next_multiple_of(1 << 20);
    let disk = Disk::create(bytes)?;
    disk.mount(root, ",commit=300")?;
    machine::copy(&selection, root)?;
    edits::prepare(root)?;
    let file = std::fs::File::open(root)?;
    rustix::fs::syncfs(&file).context("syncfs")?;
    for (path, bytes) in &selection.left_out {
        say(&format!("   left out, because it is large: {} ({})", path.display(), ByteSize(*bytes)));
    }
    say(&format!("   {} in an ext4 image of {}, on a loop device", ByteSize(selection.bytes), ByteSize(bytes)));
    Ok(disk)
}

/// Fails when there is any difference.
fn differ(what: &str, expected: &Snapshot, found: &Snapshot) -> Result<()> {
    let differences = expected.differences(found);
    if differences.is_empty() {
        return Ok(());
    }
    let shown = differences.iter().take(20).map(String::as_str).collect::<Vec<_>>().join("\n");
    bail!("{what} is wrong in {} places, such as\n{shown}", differences.len())
}

fn expect_the_unsaved_to_be_lost(root: &Path) -> Result<()> {
    let passwd = std::fs::read_to_string(edits::passwd(root)).context("read passwd")?;
    if !passwd.lines().any(|line| line.starts_with(&format!("{}:", edits::USER))) {
        bail!("the user that was saved is not on disk");
    }
    let conf = std::fs::read_to_string(root.join("etc/demo.conf")).context("read demo.conf")?;
    if conf.contains(edits::UNSAVED) {
        bail!("an edit that was never saved is on disk");
    }
    Ok(())
}

/// Asks `syncd`, and looks for checkpoints and records of a merge in the store.
fn nothing_pending(shell: &Shell) -> Result<()> {
    let status: Value =
        serde_json::from_slice(&shell.read("syncd status --json --root $R")?).context("syncd status")?;
    let targets = status["targets"].as_array().context("syncd status names no targets")?;
    let is_clean = |target: &Value| {
        target["pending"] == 0
            && target["merging"] == false
            && target["conflicts"].as_array().is_some_and(Vec::is_empty)
    };
    if targets.len() < TARGETS.len() || !targets.iter().all(is_clean) {
        bail!("something is still pending: {status}");
    }
    let left = shell.read("find $R/persist/ephemeral-overlay -name '*.ckpt' -o -name merging -o -name '.tmp-*'")?;
    if !left.is_empty() {
        bail!("the store still holds {}", String::from_utf8_lossy(&left).trim_end());
    }
    Ok(())
}
