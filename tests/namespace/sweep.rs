//! Every point of a run at which something can go wrong, found with strace. One rayon thread, because strace counts for
//! each thread.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use rustix::fs::{CWD, FileType, Mode, XattrFlags, mknodat, setxattr};

use crate::tools::{run, text};
use crate::world::World;
use test_support::snapshot::{self, Snapshot};

/// Every call by which a checkpoint or a merge changes something, or makes it durable; of openat(2) most only look.
pub(crate) const CALLS: &str = "openat,mkdir,mkdirat,mknodat,symlinkat,linkat,rename,renameat,renameat2,unlink,unlinkat,\
    rmdir,write,pwrite64,ftruncate,fallocate,fchown,fchownat,chmod,fchmod,fchmodat,setxattr,lsetxattr,fsetxattr,\
    removexattr,lremovexattr,fremovexattr,utimensat,fsync,fdatasync,syncfs,ioctl";

/// What one run of a command calls: by name, and the number that strace gives it; the lines of all threads that come to
/// that number. `more` are options of strace.
pub(crate) fn trace(command: &Command, calls: &str, more: &[&str]) -> BTreeMap<String, Vec<Vec<String>>> {
    let log = tempfile::NamedTempFile::new().unwrap();
    let calls = format!("trace={calls}");
    let options = [&["-y", "-e", &calls, "-o", log.path().to_str().unwrap()], more].concat();
    let output = strace(command, &options);
    // A merge with a conflict ends with 3.
    assert!([Some(0), Some(3)].contains(&output.status.code()), "{}", text(&output));
    let mut by_thread: BTreeMap<(String, String), usize> = BTreeMap::new();
    let mut lines: BTreeMap<String, Vec<Vec<String>>> = BTreeMap::new();
    for line in fs::read_to_string(log.path()).unwrap().lines() {
        // `1234 rename("a", "b") = 0`
        let (thread, call) = line.split_once(' ').unwrap();
        let Some((name, _)) = call.trim_start().split_once('(') else { continue };
        let number = by_thread.entry((name.to_owned(), thread.to_owned())).or_default();
        let of_name = lines.entry(name.to_owned()).or_default();
        of_name.resize_with(of_name.len().max(*number + 1), Vec::new);
        of_name[*number].push(call.trim_start().to_owned());
        *number += 1;
    }
    lines
}

/// `command` under strace, ready to be run.
pub(crate) fn strace_command(command: &Command, options: &[&str]) -> Command {
    let mut strace = Command::new("strace");
    strace.args(["-f", "-qq"]).args(options).arg(command.get_program()).args(command.get_args());
    strace.env("RAYON_NUM_THREADS", "1");
    strace
}

/// Runs `command` under strace.
pub(crate) fn strace(command: &Command, options: &[&str]) -> Output {
    strace_command(command, options).output().unwrap()
}

/// Makes the tree `to` a copy of `from`, in everything that counts but `chattr`.
pub(crate) fn copy(from: &Path, to: &Path) {
    if to.exists() {
        // It fails on a symlink, which has no flags.
        Command::new("chattr").args(["-R", "-f", "-ia"]).arg(to).status().unwrap();
        fs::remove_dir_all(to).unwrap();
    }
    run("cp", &["-a", from.to_str().unwrap(), to.to_str().unwrap()]);
}

/// A life with everything in it that has an order to get wrong: three checkpoints.
pub(crate) fn three_checkpoints(world: &World, views: &mut Vec<Snapshot>) {
    let etc = world.at("etc");
    let at = |name: &str| etc.join(name);
    for name in ["patched", "log", "log.1", "grouped", "plain"] {
        fs::write(at(name), format!("lower {name}")).unwrap();
    }
    fs::hard_link(at("grouped"), at("grouped.link")).unwrap();
    // Long enough to be changed in place.
    let mut long: Vec<u8> = (0..3 << 20).map(|index: u32| (index / 13).to_le_bytes()[0]).collect();
    fs::write(at("long"), &long).unwrap();
    for name in ["dir/sub", "remade"] {
        fs::create_dir_all(at(name)).unwrap();
    }
    fs::write(at("dir/sub/file"), "lower").unwrap();
    fs::write(at("remade/old"), "lower").unwrap();
    world.boot();
    fs::write(at("patched"), "patched in RAM").unwrap();
    fs::write(at("group"), "one inode").unwrap();
    fs::hard_link(at("group"), at("group.link")).unwrap();
    fs::remove_dir_all(at("remade")).unwrap();
    fs::create_dir(at("remade")).unwrap();
    fs::write(at("remade/new"), "upper").unwrap();
    long[200_000..300_000].fill(7);
    long.truncate(2 << 20);
    fs::write(at("long"), &long).unwrap();
    world.checkpoint();
    views.push(snapshot::take(&etc));

    fs::rename(at("log"), at("log.1")).unwrap();
    fs::write(at("log"), "begun anew").unwrap();
    fs::remove_dir_all(at("dir")).unwrap();
    fs::write(at("dir"), "a file now").unwrap();
    fs::write(at("group"), "changed in both").unwrap();
    long[1 << 20..][..5000].fill(8);
    fs::write(at("long"), &long).unwrap();
    std::os::unix::fs::symlink("plain", at("symlink")).unwrap();
    mknodat(CWD, at("fifo"), FileType::Fifo, Mode::from_raw_mode(0o640), 0).unwrap();
    world.checkpoint();
    views.push(snapshot::take(&etc));

    fs::remove_file(at("patched")).unwrap();
    fs::remove_file(at("group.link")).unwrap();
    std::os::unix::fs::chown(at("plain"), Some(1000), Some(1000)).unwrap();
    fs::write(at("grouped"), "broken off").unwrap();
    fs::create_dir(at("attributes")).unwrap();
    for name in ["attributes", "attributes/sparse"] {
        if name.ends_with("sparse") {
            fs::File::create(at(name)).unwrap().set_len(1 << 20).unwrap();
        }
        setxattr(at(name), "trusted.test", b"value", XattrFlags::empty()).unwrap();
    }
    run("chattr", &["+i", at("attributes/sparse").to_str().unwrap()]);
    world.checkpoint();
    views.push(snapshot::take(&etc));
}

/// What a checkpoint after these three has to save; its reserve is made anew, too.
pub(crate) fn one_more_change(world: &World) {
    fs::write(world.at("etc/last"), "change").unwrap();
    fs::remove_file(world.at("etc/plain")).unwrap();
    fs::remove_file(world.at("persist/ephemeral-overlay/reserve")).unwrap();
}
