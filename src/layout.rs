//! Where everything is: the only module that knows an absolute path.
//!
//! `/` is just one root. Every path of the target system resolves inside [`Layout::root`] (`RESOLVE_IN_ROOT`,
//! openat2(2)), so an absolute symlink in it cannot lead to the machine that works on it. The run directory is the
//! exception: it belongs to the running system and is never relative to the root.

use std::ffi::OsStr;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Dir, Mode, OFlags, ResolveFlags, mkdirat, openat2};
use rustix::io::Errno;

use crate::config::{Config, ConfigError};
use crate::error::{At, SystemError};
use crate::fstab;

/// The run directory of a live system. Below `/run/initramfs` systemd leaves mounts alone until the very end of a
/// shutdown (measured on systemd 252 to 262).
pub const RUN_DIR: &str = "/run/initramfs/ephemeral-overlay";
/// Where libmount, and through it systemd, finds the options of mounts that the kernel does not know.
const UTAB: &str = "/run/mount/utab";
/// A link to [`RUN_DIR`] for people and scripts.
pub const RUN_LINK: &str = "/run/ephemeral-overlay";
/// The configuration file, below the root.
pub const CONFIG_FILE: &str = "/etc/ephemeral-overlay.toml";
/// The mounts of the system, below the root.
const FSTAB: &str = "/etc/fstab";
/// The store's directory below `persist.root`.
pub const STORE_DIR: &str = "ephemeral-overlay";

/// What is kept of the users' caches, below `persist.root`.
pub const USER_CACHE_DIR: &str = "user-cache";
/// The users of the system, below the root.
pub const PASSWD: &str = "/etc/passwd";
/// The groups of the system, below the root.
pub const GROUP: &str = "/etc/group";

/// Says that the root has a `syncd` and a last stage of shutdown that belong to `early`: one line `format = N`, the
/// newest checkpoint format that its `syncd` reads and writes. Installed and removed together with them.
pub const COUNTERPART: &str = "/usr/lib/ephemeral-overlay/counterpart";
/// In the store: how many boots in a row did not reach `syncd`.
pub const TRIES: &str = "tries";

/// The places of one system.
#[derive(Debug, Clone)]
pub struct Layout {
    root: PathBuf,
    run_dir: PathBuf,
    config: Option<PathBuf>,
}

/// Why the configuration could not be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// A file could not be read.
    #[error(transparent)]
    System(#[from] SystemError),
    /// A file is not UTF-8.
    #[error("{}: not valid UTF-8", .0.display())]
    NotText(PathBuf),
    /// A file says something that is not allowed.
    #[error(transparent)]
    Config(#[from] ConfigError),
}

impl Layout {
    /// A layout for the system at `root`; `run_dir` defaults to [`RUN_DIR`], `config` to [`CONFIG_FILE`] below `root`.
    #[must_use]
    pub fn new(root: &Path, run_dir: Option<&Path>, config: Option<&Path>) -> Self {
        Self {
            root: root.to_path_buf(),
            run_dir: run_dir.unwrap_or(Path::new(RUN_DIR)).to_path_buf(),
            config: config.map(Path::to_path_buf),
        }
    }

    /// The root of the system that is worked on.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The run directory of this system.
    #[must_use]
    pub fn run_dir(&self) -> &Path {
        &self.run_dir
    }

    /// The configuration file that was named instead of [`CONFIG_FILE`].
    #[must_use]
    pub fn named_config(&self) -> Option<&Path> {
        self.config.as_deref()
    }

    /// `boot.json`, see [`crate::state::BootState`].
    #[must_use]
    pub fn boot_state(&self) -> PathBuf {
        self.run_dir.join("boot.json")
    }

    /// A sign of life of a merge at boot: its contents change as long as it gets on.
    #[must_use]
    pub fn progress(&self) -> PathBuf {
        self.run_dir.join("progress")
    }

    /// The same from `early`, for whoever waits for it.
    #[must_use]
    pub fn alive(&self) -> PathBuf {
        self.run_dir.join("alive")
    }

    /// The file in which libmount keeps the options of mounts that the kernel does not know: the running system's own,
    /// or, for one that is not booted, a file that nobody else reads.
    #[must_use]
    pub fn utab(&self) -> PathBuf {
        if self.run_dir == Path::new(RUN_DIR) { UTAB.into() } else { self.run_dir.join("utab") }
    }

    /// Where our tmpfs is mounted.
    #[must_use]
    pub fn ram(&self) -> PathBuf {
        self.run_dir.join("ram")
    }

    /// The upper directory of a target.
    #[must_use]
    pub fn upper(&self, target: &Path) -> PathBuf {
        self.ram().join(target_name(target)).join("upper")
    }

    /// The work directory of a target.
    #[must_use]
    pub fn work(&self, target: &Path) -> PathBuf {
        self.ram().join(target_name(target)).join("work")
    }

    /// The private bind of a target's directory on disk.
    #[must_use]
    pub fn lower(&self, target: &Path) -> PathBuf {
        self.run_dir.join("lower").join(target_name(target))
    }

    /// Where the cover of a target is made, before it is bound over the target.
    #[must_use]
    pub fn cover(&self, target: &Path) -> PathBuf {
        self.run_dir.join("cover").join(target_name(target))
    }

    /// What was done last about the fill level of the tmpfs, for `status`.
    #[must_use]
    pub fn room(&self) -> PathBuf {
        self.run_dir.join("room.json")
    }

    /// The private bind of the store.
    #[must_use]
    pub fn store_bind(&self) -> PathBuf {
        self.run_dir.join("store")
    }

    /// Where the cache of the user with this number is put together, out of everybody's reach.
    #[must_use]
    pub fn user_cache(&self, uid: u32) -> PathBuf {
        self.run_dir.join("user-cache").join(uid.to_string())
    }

    /// What the last run of a command on a target came to, for `status`.
    #[must_use]
    pub fn last_result(&self, target: &Path) -> PathBuf {
        self.run_dir.join("last").join(target_name(target))
    }

    /// Where `path` of the target system is seen from here. For messages and for paths that nobody but root can
    /// change; everything else is opened with [`Layout::open`].
    #[must_use]
    pub fn below_root(&self, path: &Path) -> PathBuf {
        self.root.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// Opens `path` inside the root; no symlink leads out of it.
    ///
    /// # Errors
    /// Whatever openat2(2) says, with the path.
    pub fn open(&self, path: &Path, flags: OFlags) -> Result<OwnedFd, SystemError> {
        self.open_resolving(path, flags, ResolveFlags::IN_ROOT)
    }

    /// Opens the directory `path` inside the root without following any symlink on the way.
    ///
    /// # Errors
    /// Whatever openat2(2) says, with the path; `ELOOP` for a symlink.
    pub fn open_dir(&self, path: &Path) -> Result<OwnedFd, SystemError> {
        self.open_resolving(path, OFlags::RDONLY | OFlags::DIRECTORY, ResolveFlags::IN_ROOT | ResolveFlags::NO_SYMLINKS)
    }

    /// Creates the directory `path` (0700) inside the root, with what is missing above it, and opens it. A symlink on
    /// the way is followed inside the root.
    ///
    /// # Errors
    /// Whatever mkdirat(2) or openat2(2) says.
    pub fn create_dir(&self, path: &Path) -> Result<OwnedFd, SystemError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        match (self.open(path, flags), path.parent(), path.file_name()) {
            (Err(error), Some(parent), Some(name)) if error.errno() == Some(Errno::NOENT) => {
                let parent = self.create_dir(parent)?;
                match mkdirat(parent, name, Mode::RWXU) {
                    Err(Errno::EXIST) => {}
                    other => other.at("mkdirat", self.below_root(path))?,
                }
                self.open(path, flags)
            }
            (opened, ..) => opened,
        }
    }

    fn open_resolving(&self, path: &Path, flags: OFlags, resolve: ResolveFlags) -> Result<OwnedFd, SystemError> {
        let root = rustix::fs::open(&self.root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .at("open", &self.root)?;
        openat2(root, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve).at("openat2", self.below_root(path))
    }

    /// Reads a whole text file inside the root; `None` when there is none.
    ///
    /// # Errors
    /// When it exists and cannot be read, or is not UTF-8.
    pub fn read_text(&self, path: &Path) -> Result<Option<String>, LoadError> {
        read_text(self.open(path, OFlags::RDONLY), &self.below_root(path))
    }

    /// What the root's fstab says will be mounted. Bytes that are not UTF-8 (a comment in an old encoding) hide nothing
    /// else.
    ///
    /// # Errors
    /// When it exists and cannot be read.
    pub fn fstab(&self) -> Result<Vec<fstab::Entry>, SystemError> {
        let path = Path::new(FSTAB);
        let mut bytes = Vec::new();
        match self.open(path, OFlags::RDONLY) {
            Ok(fd) => drop(std::fs::File::from(fd).read_to_end(&mut bytes).at("read", self.below_root(path))?),
            Err(error) if error.errno() == Some(Errno::NOENT) => {}
            Err(error) => return Err(error),
        }
        Ok(fstab::parse(&String::from_utf8_lossy(&bytes)))
    }

    /// Reads the configuration: the main file, then the drop-ins in the byte order of their names.
    ///
    /// A file given with `--config` is the host's, as are the drop-ins in the `.d` directory beside it; the default
    /// one is read from inside the root.
    ///
    /// # Errors
    /// When a file cannot be read or does not parse. A missing file is not an error.
    pub fn load_config(&self) -> Result<Config, LoadError> {
        let main = self.config.clone().unwrap_or_else(|| CONFIG_FILE.into());
        let open = |path: &Path| match self.config {
            Some(_) => rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).at("open", path),
            None => self.open(path, OFlags::RDONLY),
        };
        let mut paths = vec![main.clone()];
        let dropins = main.with_extension("d");
        match open(&dropins) {
            Ok(fd) => {
                let mut names = Vec::new();
                for entry in Dir::new(fd).at("getdents64", &dropins)? {
                    let name = entry.at("getdents64", &dropins)?.file_name().to_bytes().to_vec();
                    if name.ends_with(b".toml") && !name.starts_with(b".") {
                        names.push(name);
                    }
                }
                names.sort_unstable();
                paths.extend(names.iter().map(|name| dropins.join(OsStr::from_bytes(name))));
            }
            Err(error) if error.errno() == Some(Errno::NOENT) => {}
            Err(error) => return Err(error.into()),
        }
        let mut sources = Vec::new();
        for path in paths {
            if let Some(text) = read_text(open(&path), &path)? {
                sources.push((path, text));
            }
        }
        Ok(Config::parse(&sources)?)
    }
}

fn read_text(opened: Result<OwnedFd, SystemError>, path: &Path) -> Result<Option<String>, LoadError> {
    let fd = match opened {
        Ok(fd) => fd,
        Err(error) if error.errno() == Some(Errno::NOENT) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let mut bytes = Vec::new();
    std::fs::File::from(fd).read_to_end(&mut bytes).at("read", path)?;
    match String::from_utf8(bytes) {
        Ok(text) => Ok(Some(text)),
        Err(_not_utf8) => Err(LoadError::NotText(path.to_path_buf())),
    }
}

/// Opens a directory by a path of the running system.
///
/// # Errors
/// Whatever open(2) says, with the path.
pub fn open_host_dir(path: &Path) -> Result<OwnedFd, SystemError> {
    rustix::fs::openat(CWD, path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).at("open", path)
}

/// The name of a target's folder in the store and in the run directory: `/var/log` is `var-log`.
///
/// `/` becomes `-`; every byte that is not a letter, a digit, `_` or a `.` that does not stand first becomes `%XX`.
/// Overlay options stay readable: none of `,`, `:` and `\` can occur.
#[must_use]
pub fn target_name(target: &Path) -> String {
    let mut name = String::new();
    for &byte in target.strip_prefix("/").unwrap_or(target).as_os_str().as_bytes() {
        match byte {
            b'/' => name.push('-'),
            b'.' if name.is_empty() => name.push_str("%2e"),
            b'.' | b'_' | b'0'..=b'9' | b'a'..=b'z' | b'A'..=b'Z' => name.push(char::from(byte)),
            other => {
                name.push('%');
                for digit in [other >> 4, other & 15] {
                    name.push(char::from_digit(u32::from(digit), 16).unwrap_or('0'));
                }
            }
        }
    }
    name
}

/// The target that [`target_name`] made `name` of.
#[must_use]
pub fn target_path(name: &str) -> PathBuf {
    let mut path = vec![b'/'];
    let mut rest = name.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        rest = tail;
        match first {
            b'-' => path.push(b'/'),
            b'%' => {
                let digits = tail.get(..2).and_then(|digits| std::str::from_utf8(digits).ok());
                let byte = digits.and_then(|digits| u8::from_str_radix(digits, 16).ok());
                path.push(byte.unwrap_or(b'%'));
                rest = if byte.is_some() { &tail[2..] } else { tail };
            }
            other => path.push(other),
        }
    }
    OsStr::from_bytes(&path).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_targets_are_distinct_and_plain() {
        assert_eq!(target_name(Path::new("/etc")), "etc");
        assert_eq!(target_name(Path::new("/var/log")), "var-log");
        assert_eq!(target_name(Path::new("/var-log")), "var%2dlog");
        assert_eq!(target_name(Path::new("/srv/a:b,c\\d")), "srv-a%3ab%2cc%5cd");
        assert_eq!(target_name(Path::new("/.x")), "%2ex");
        for target in ["/etc", "/var/log", "/var-log", "/srv/a:b,c\\d", "/.x/é"] {
            assert_eq!(target_path(&target_name(Path::new(target))), Path::new(target));
        }
    }
}
