//! Kinds of files, and what becomes of each when all are old.

use std::any::Any;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, SystemTime};

use rustix::fs::{CWD, FileType, FlockOperation, Mode, fcntl_lock, flock, mknodat};
use rustix::mount::mount_bind;
use test_support::hold::{Holder, How};
use test_support::mapped::Mapping;

use crate::tools;

/// What is held until the end.
pub(super) type Held = Box<dyn Any>;

/// A line of shell that says `ready` and waits.
fn shell(line: &str, directory: &Path) -> Holder {
    Holder::start(Command::new("sh").args(["-c", line]).current_dir(directory))
}

/// What happens to a case between the two passes, and what is to become of it.
pub(super) enum Then {
    Goes,
    Stays,
    /// Stays, because of this.
    Touched(fn(&Path)),
}

use Then::{Goes, Stays, Touched};

/// A case: a name in `/tmp`, how it is made, and what becomes of it. What it returns is held until the end.
pub(super) type Case = (&'static str, &'static str, fn(&Path) -> Held, Then);

fn done() -> Held {
    Box::new(())
}

fn held(what: impl std::any::Any) -> Held {
    Box::new(what)
}

pub(super) fn plain(path: &Path) -> Held {
    fs::write(path, "content").unwrap();
    done()
}

/// A directory with an old file in it.
fn full(path: &Path) -> Held {
    fs::create_dir(path).unwrap();
    plain(&path.join("file"))
}

fn empty(path: &Path) -> Held {
    fs::create_dir(path).unwrap();
    done()
}

/// Its parent directory is made, too.
pub(super) fn below(path: &Path) -> Held {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    plain(path)
}

fn special(path: &Path, kind: FileType, device: u64) -> Held {
    mknodat(CWD, path, kind, Mode::RUSR | Mode::WUSR, device).unwrap();
    done()
}

fn open(path: &Path) -> File {
    plain(path);
    File::open(path).unwrap()
}

/// `fcntl(2)` locks belong to processes; ours would go with any descriptor that is closed.
fn fcntl_locked(path: &Path) -> Held {
    plain(path);
    let file = OpenOptions::new().write(true).open(path).unwrap();
    fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive).unwrap();
    held(file)
}

pub(super) const CASES: &[Case] = &[
    ("an old plain file", "plain", plain, Goes),
    ("an old file in an old directory", "tree/a/b/file", below, Goes),
    ("that directory", "tree", |_| done(), Goes),
    ("a young atime", "atime", plain, Touched(|path| drop(fs::read(path).unwrap()))),
    (
        "a young mtime",
        "mtime",
        |path| {
            plain(path);
            let file = OpenOptions::new().write(true).open(path).unwrap();
            {
                file.set_modified(SystemTime::now() + Duration::from_secs(3600)).unwrap();
                done()
            }
        },
        Stays,
    ),
    (
        "a young ctime",
        "ctime",
        plain,
        Touched(|path| fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap()),
    ),
    ("an open file", "open", |path| held(open(path)), Stays),
    (
        "a mapped file, its descriptor closed",
        "mapped",
        |path| {
            plain(path);
            held(Mapping::new(&OpenOptions::new().read(true).write(true).open(path).unwrap(), 7))
        },
        Stays,
    ),
    (
        "a file that is executed",
        "executed",
        |path| {
            tools::install(Path::new("/bin/cat"), path);
            held(shell(&format!("echo ready; exec {}", path.display()), Path::new("/")))
        },
        Stays,
    ),
    (
        "a working directory",
        "cwd",
        |path| {
            fs::create_dir(path).unwrap();
            held(shell("echo ready; read line", path))
        },
        Stays,
    ),
    (
        "a root directory",
        "root",
        |path| {
            fs::create_dir(path).unwrap();
            held(Holder::new(&How::Root(path.to_path_buf())))
        },
        Stays,
    ),
    (
        "the working directory of a thread",
        "thread",
        |path| {
            fs::create_dir(path).unwrap();
            held(Holder::new(&How::ThreadDirectory(path.to_path_buf())))
        },
        Stays,
    ),
    (
        "an open directory",
        "opendir",
        |path| {
            fs::create_dir(path).unwrap();
            held(shell(&format!("exec 9<{}; echo ready; read line", path.display()), Path::new("/")))
        },
        Stays,
    ),
    (
        "a file with a BSD lock",
        "flocked",
        |path| {
            let file = open(path);
            flock(&file, FlockOperation::NonBlockingLockShared).unwrap();
            held(file)
        },
        Stays,
    ),
    ("a file with an fcntl lock", "fcntl", fcntl_locked, Stays),
    ("a bound socket", "socket", |path| held(UnixListener::bind(path).unwrap()), Stays),
    (
        "a dead socket",
        "dead",
        |path| {
            UnixListener::bind(path).unwrap();
            done()
        },
        Stays,
    ),
    ("a FIFO", "fifo", |path| special(path, FileType::Fifo, 0), Stays),
    ("a device", "null", |path| special(path, FileType::CharacterDevice, rustix::fs::makedev(1, 3)), Stays),
    (
        "a symlink to nothing",
        "dangling",
        |path| {
            symlink("/nowhere", path).unwrap();
            done()
        },
        Goes,
    ),
    (
        "a symlink to a directory outside",
        "outside",
        |path| {
            symlink("../canary", path).unwrap();
            done()
        },
        Goes,
    ),
    ("the lock of an X server", ".X0-lock", plain, Stays),
    ("the sockets of X servers", ".X11-unix/X0", below, Stays),
    ("those of ICE", ".ICE-unix/1", below, Stays),
    ("an authority file", ".Xauthority-1", plain, Stays),
    ("an authority file of SDDM", "xauth_AbCdEf", plain, Stays),
    ("one of startx", "serverauth.AbCdEf", plain, Stays),
    ("a folder of SDDM", "sddm-auth-1/file", below, Stays),
    ("a service's own /tmp", "systemd-private-1-x.service-2/tmp/file", below, Stays),
    ("snaps", "snap-private-tmp/snap.x/file", below, Stays),
    ("a path of a tmpfiles line x", "line-x-1/file", below, Stays),
    ("a path of a tmpfiles line X", "line-X", empty, Stays),
    ("what is below it", "line-X-full/file", below, Goes),
    ("a path that a tmpfiles line creates", "line-d", empty, Stays),
    ("a path of a masked tmpfiles file", "masked", plain, Goes),
    ("a configured glob", "keep-1/a/file", below, Stays),
    ("a path that has a configured glob only at its end", "a/keep-1", below, Goes),
    (
        "a mount below",
        "mounted",
        |path| {
            fs::create_dir(path).unwrap();
            tools::run("mount", &["-t", "tmpfs", "tmpfs", path.to_str().unwrap()]);
            plain(&path.join("file"))
        },
        Stays,
    ),
    (
        "a bind mount from the same tmpfs",
        "bound",
        |path| {
            let source = path.with_file_name("bound-source");
            full(&source);
            fs::create_dir(path).unwrap();
            {
                mount_bind(&source, path).unwrap();
                done()
            }
        },
        Stays,
    ),
    ("the directory that is mounted elsewhere", "bound-source", |_| done(), Stays),
    ("an empty old directory", "empty", empty, Goes),
    (
        "an empty young directory",
        "young",
        empty,
        Touched(|path| fs::set_permissions(path, fs::Permissions::from_mode(0o700)).unwrap()),
    ),
    ("a directory with a young file", "parent", full, Touched(|path| fs::write(path.join("file"), "again").unwrap())),
    (
        "an old file in a directory with a shared BSD lock",
        "locked/file",
        |path| {
            below(path);
            let dir = File::open(path.parent().unwrap()).unwrap();
            flock(&dir, FlockOperation::NonBlockingLockShared).unwrap();
            held(dir)
        },
        Stays,
    ),
    (
        "the first of two names of a file",
        "name-1",
        |path| {
            plain(path);
            {
                fs::hard_link(path, path.with_file_name("name-2")).unwrap();
                done()
            }
        },
        Goes,
    ),
    ("the second one, whose ctime the first one changed", "name-2", |_| done(), Stays),
    (
        "a name of a file that is open under another one",
        "alias-1",
        |path| {
            let file = open(path);
            fs::hard_link(path, path.with_file_name("alias-2")).unwrap();
            held(file)
        },
        Stays,
    ),
    (
        "a file with the sticky bit",
        "sticky",
        |path| {
            plain(path);
            {
                fs::set_permissions(path, fs::Permissions::from_mode(0o1644)).unwrap();
                done()
            }
        },
        Stays,
    ),
    (
        "a disk image that is attached",
        "image",
        |path| {
            File::create(path).unwrap().set_len(1 << 20).unwrap();
            let device = tools::run("losetup", &["--find", "--show", path.to_str().unwrap()]);
            held(Loop(device.trim().to_owned()))
        },
        Stays,
    ),
];

struct Loop(String);

impl Drop for Loop {
    fn drop(&mut self) {
        tools::run("losetup", &["--detach", &self.0]);
    }
}
