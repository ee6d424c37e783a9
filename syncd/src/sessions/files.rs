//! Sessions where no logind answers: utmp, where the system keeps one, else the sockets of displays. Both are watched by
//! inotify.

use std::collections::BTreeSet;
use std::fs;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use ephemeral_overlay::error::{At, SystemError};
use procfs::net::UnixState;
use procfs::process::Process;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use utmp_rs::UtmpEntry;

use super::Change;

/// Where utmp is (utmp(5)).
const UTMP: &str = "/run/utmp";
/// Where X servers have their sockets.
const X11: &str = "/tmp/.X11-unix";
/// Where the runtime directories of users are, with the sockets of Wayland compositors.
const RUNTIME: &str = "/run/user";

/// When it is looked at again.
const SETTLE: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };
/// The state of a process that has ended and that nobody has asked about yet (`proc_pid_stat(5)`).
const ZOMBIE: char = 'Z';

/// Watches them.
#[derive(Debug)]
pub(super) struct Files;

impl Files {
    /// Has changes told, from a thread of its own.
    pub(super) fn watch(tell: impl Fn(Change) + Send + 'static) -> Result<Self, SystemError> {
        let watch = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).at("inotify_init1", "/run")?;
        follow(&watch);
        std::thread::spawn(move || {
            let mut limit = None;
            // What fails to be waited for tells nothing any more.
            while let Ok(happened) = wait(&watch, limit) {
                // A directory that came meanwhile is watched from now on.
                follow(&watch);
                tell(Change::Sessions);
                // A server that ends removes the name of its socket, and lets go of it a moment later.
                limit = happened.then_some(&SETTLE);
            }
            tell(Change::Lost);
        });
        Ok(Self)
    }

    /// Which of them tells us now.
    #[allow(clippy::unused_self, reason = "there is nothing to be told without a watch")]
    pub(super) fn source(&self) -> &'static str {
        if logins(Path::new(UTMP)).is_some() { "utmp" } else { "displays" }
    }

    /// Who is logged in.
    #[allow(clippy::unused_self, reason = "there is nothing to be told without a watch")]
    pub(super) fn present(&self) -> Option<BTreeSet<String>> {
        match logins(Path::new(UTMP)) {
            Some(logins) => Some(logins.into_iter().map(|login| login.name).collect()),
            None => displays(),
        }
    }
}

/// Waits until a file changes, or a process ends that is a login: whoever notes in utmp that it did may come much later,
/// or never. Says whether it did, before the limit.
fn wait(watch: &OwnedFd, limit: Option<&Timespec>) -> rustix::io::Result<bool> {
    let logins = logins(Path::new(UTMP)).unwrap_or_default();
    let leaders: Vec<_> =
        logins.iter().filter_map(|login| pidfd_open(login.leader, PidfdFlags::empty()).ok()).collect();
    let mut all: Vec<_> = std::iter::once(watch).chain(&leaders).map(|fd| PollFd::new(fd, PollFlags::IN)).collect();
    if poll(&mut all, limit)? == 0 {
        return Ok(false);
    }
    let mut buffer = [MaybeUninit::uninit(); 4096];
    let mut events = inotify::Reader::new(watch, &mut buffer);
    loop {
        match events.next() {
            Ok(_) => {}
            Err(Errno::AGAIN) => return Ok(true),
            Err(error) => return Err(error),
        }
    }
}

/// Watches all that is there to be watched; to watch it twice is to watch it once.
fn follow(watch: &OwnedFd) {
    let runtime = fs::read_dir(RUNTIME).into_iter().flatten().flatten().map(|entry| entry.path());
    let names = WatchFlags::CREATE | WatchFlags::DELETE | WatchFlags::MOVED_TO | WatchFlags::MOVED_FROM;
    // Every program makes files in /run and /tmp: a new name there is looked at only if it is one of ours.
    let directories = [X11, RUNTIME].map(PathBuf::from).into_iter().chain(runtime).map(|path| (path, names));
    for (path, flags) in directories.chain([(UTMP.into(), WatchFlags::MODIFY)]) {
        // It is not there, or was, a moment ago.
        let _watched = inotify::add_watch(watch, &path, flags);
    }
}

/// A login in utmp.
struct Login {
    /// Its first process.
    leader: Pid,
    /// Who and where.
    name: String,
}

/// The logins in utmp whose process runs; `None` where it is missing or has no record at all: a system that writes none.
fn logins(path: &Path) -> Option<Vec<Login>> {
    let entries = utmp_rs::parse_from_path(path).ok().filter(|entries| !entries.is_empty())?;
    let logins = entries.into_iter().filter_map(|entry| match entry {
        UtmpEntry::UserProcess { pid, line, user, .. } => {
            let stat = Process::new(pid).and_then(|process| process.stat()).ok()?;
            let leader = Pid::from_raw(pid).filter(|_| stat.state != ZOMBIE)?;
            Some(Login { leader, name: format!("{user} on {line}") })
        }
        _ => None,
    });
    Some(logins.collect())
}

/// The displays that somebody serves; `None` where that cannot be seen.
fn displays() -> Option<BTreeSet<String>> {
    let sockets = match procfs::net::unix() {
        Ok(sockets) => sockets,
        Err(error) => {
            tracing::warn!("/proc/net/unix: {error}");
            return None;
        }
    };
    let listening = sockets.into_iter().filter(|socket| socket.state == UnixState::UNCONNECTED);
    Some(
        listening
            .filter_map(|socket| socket.path)
            .filter(|path| is_display(path))
            .map(|path| path.display().to_string())
            .collect(),
    )
}

fn is_display(socket: &Path) -> bool {
    let is_wayland = || {
        let name = socket.file_name().and_then(|name| name.to_str());
        socket.starts_with(RUNTIME) && name.is_some_and(|name| name.starts_with("wayland-"))
    };
    socket.parent() == Some(Path::new(X11)) || is_wayland()
}
