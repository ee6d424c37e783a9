//! The plan: a pure function of the configuration and the facts, printable before anything is done.

use std::fmt;
use std::path::{Path, PathBuf};

use ephemeral_overlay::config::{Activate, Config};
use ephemeral_overlay::fstab;
use ephemeral_overlay::layout::STORE_DIR;
use ephemeral_overlay::state::Skipped;

use crate::facts::{Facts, Found, kept_paths};

/// The folder whose directory skeleton is kept and whose persistent parts are bound back.
const VAR_CACHE: &str = "/var/cache";

/// What will be done, in order, and what will not.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Plan {
    /// Below this the store is.
    pub persist: PathBuf,
    /// What will be done.
    pub steps: Vec<Step>,
    /// What was asked for and will not be done.
    pub skipped: Vec<Skipped>,
}

/// One thing to do. A step that fails is undone alone.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Mount our tmpfs in the run directory.
    Ram {
        /// Ceiling in bytes.
        size: u64,
        /// Ceiling in inodes.
        inodes: u64,
    },
    /// Create the store where it is missing and bind it privately into the run directory.
    Store(PathBuf),
    /// Bind a target's directory on disk privately into the run directory.
    Lower {
        /// The target.
        target: PathBuf,
        /// Give it a token if it has none. Not under a chain that names none and could not be merged.
        token: bool,
    },
    /// Mount the overlay of a target.
    Overlay {
        /// The target.
        target: PathBuf,
        /// Its chain could not be merged: unpack it into upper first.
        unpack: bool,
        /// Paths in it that stay on disk.
        passthrough: Vec<PathBuf>,
    },
    /// Mount a tmpfs.
    Tmpfs {
        /// Where.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
        /// Start with the directories (no files) of what it hides.
        skeleton: bool,
        /// Directories in it that stay on disk.
        keep: Vec<Keep>,
    },
}

/// A directory in a tmpfs that stays on disk.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Keep {
    /// Its name in the tmpfs.
    pub name: String,
    /// Where it lives.
    pub source: PathBuf,
    /// Where it lived until now: to be renamed to `source` first.
    pub moved_from: Option<PathBuf>,
}

/// Decides what to do.
pub(crate) fn plan(config: &Config, facts: &Facts) -> Plan {
    let mut steps = Vec::new();
    let mut skipped = Vec::new();
    let mut skip = |path: &Path, reason: String| skipped.push(Skipped { path: path.to_path_buf(), reason });

    let mut targets = Vec::new();
    for dir in &config.overlay.dirs {
        let at_login = (config.overlay.activate == Activate::Login).then(|| "it is activated at login".to_owned());
        let obstacle = at_login.or_else(|| obstacle(facts, dir));
        match obstacle.or_else(|| deferred(facts, dir, &config.persist.root)) {
            Some(reason) => skip(dir, reason),
            None => targets.push(dir.clone()),
        }
    }
    if !targets.is_empty() {
        let size = config.overlay.size.bytes(facts.total_ram);
        steps.push(Step::Ram { size, inodes: inodes(size) });
        steps.push(Step::Store(config.persist.root.join(STORE_DIR)));
        steps.extend(targets.iter().cloned().map(|target| {
            let token = !facts.pending.contains(&target);
            Step::Lower { target, token }
        }));
        steps.extend(targets.into_iter().map(|target| {
            let unpack = facts.pending.contains(&target);
            if unpack {
                skip(&target, "its checkpoints could not be merged; they are kept in RAM until they can be".to_owned());
            }
            let passthrough = config.overlay.passthrough.iter().filter(|path| path.starts_with(&target));
            Step::Overlay { unpack, passthrough: passthrough.cloned().collect(), target }
        }));
    }
    for (path, size) in &config.tmpfs.mounts {
        let theirs = facts.fstab.contains(path).then(|| "fstab mounts it; remove one of the two".to_owned());
        match obstacle(facts, path).or(theirs) {
            Some(reason) => skip(path, reason),
            None => steps.push(Step::Tmpfs {
                path: path.clone(),
                size: size.bytes(facts.total_ram),
                skeleton: path == Path::new(VAR_CACHE),
                keep: if path == Path::new(VAR_CACHE) { keep(config, facts) } else { Vec::new() },
            }),
        }
    }
    Plan { persist: config.persist.root.clone(), steps, skipped }
}

/// Why nothing can be mounted on `path`.
fn obstacle(facts: &Facts, path: &Path) -> Option<String> {
    if facts.mounted.iter().any(|mounted| mounted == path) {
        return Some("something is mounted there already".to_owned());
    }
    match facts.at(path) {
        Found::Directory(_) => None,
        Found::Symlink => Some("it is a symlink, or below one; name the directory it leads to".to_owned()),
        Found::Missing => Some("there is no such directory".to_owned()),
        Found::Other => Some("it is not a directory".to_owned()),
    }
}

/// Why a target has to wait until the system has mounted its file systems.
fn deferred(facts: &Facts, target: &Path, persist: &Path) -> Option<String> {
    [("it", target), ("the store", persist)].into_iter().find_map(|(what, path)| {
        let mount_point = fstab::covering(&facts.fstab, path)?;
        (!facts.mounted.contains(mount_point))
            .then(|| format!("deferred: {what} is on {}, which is not mounted yet", mount_point.display()))
    })
}

/// The persistent parts of `/var/cache` that exist somewhere.
fn keep(config: &Config, facts: &Facts) -> Vec<Keep> {
    let device = |path: &Path| match facts.at(path) {
        Found::Directory(device) => Some(device),
        _ => None,
    };
    let mut kept = Vec::new();
    for name in &config.persist.var_cache {
        let (from, to) = kept_paths(config, name);
        let (source, moved_from) = match (device(&to), device(&from)) {
            (Some(_), _) => (to, None),
            (None, Some(device)) if device == facts.persist_device => (to, Some(from)),
            // A rename cannot cross file systems, and a copy takes too long here: it stays where it is.
            (None, Some(_)) => (from, None),
            (None, None) => continue,
        };
        kept.push(Keep { name: name.clone(), source, moved_from });
    }
    kept
}

/// How many inodes a tmpfs of `size` bytes may have: one for 16 KiB, and enough for a small one to be of use.
///
/// The kernel's default follows from RAM, not from `size`, and would let inodes alone fill a small machine.
fn inodes(size: u64) -> u64 {
    (size / (16 * 1024)).max(1024)
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for step in &self.steps {
            match step {
                Step::Ram { size, inodes } => writeln!(f, "tmpfs for the overlays: {size} bytes, {inodes} inodes")?,
                Step::Store(path) => writeln!(f, "store: {}", path.display())?,
                Step::Lower { target, .. } => writeln!(f, "private bind of {}", target.display())?,
                Step::Overlay { target, unpack, passthrough } => {
                    let note = if *unpack { " (pending checkpoints unpacked into RAM)" } else { "" };
                    writeln!(f, "overlay on {}{note}", target.display())?;
                    passthrough.iter().try_for_each(|path| writeln!(f, "  {} stays on disk", path.display()))?;
                }
                Step::Tmpfs { path, size, skeleton, keep } => {
                    let note = if *skeleton { ", with the directories it hides" } else { "" };
                    writeln!(f, "tmpfs on {}: {size} bytes{note}", path.display())?;
                    for Keep { name, source, moved_from } in keep {
                        if let Some(from) = moved_from {
                            writeln!(f, "  move {} to {}", from.display(), source.display())?;
                        }
                        writeln!(f, "  bind {} on {}", source.display(), path.join(name).display())?;
                    }
                }
            }
        }
        for Skipped { path, reason } in &self.skipped {
            writeln!(f, "skip {}: {reason}", path.display())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(found: &[(&str, Found)]) -> Facts {
        Facts {
            total_ram: 1 << 30,
            mounted: vec!["/".into()],
            fstab: vec!["/".into()],
            found: found.iter().map(|(path, found)| (path.into(), *found)).collect(),
            persist_device: 1,
            pending: Vec::new(),
        }
    }

    fn config(text: &str) -> Config {
        Config::parse(&[("test.toml".into(), text.to_owned())]).unwrap()
    }

    const ROOT: &[(&str, Found)] = &[
        ("/etc", Found::Directory(1)),
        ("/var/log", Found::Directory(1)),
        ("/tmp", Found::Directory(1)),
        ("/var/tmp", Found::Directory(1)),
        ("/var/cache", Found::Directory(1)),
        ("/var/cache/pacman", Found::Directory(1)),
    ];

    #[test]
    fn the_default_plan() {
        let expected = "\
tmpfs for the overlays: 966367641 bytes, 58982 inodes
store: /persist/ephemeral-overlay
private bind of /etc
private bind of /var/log
overlay on /etc
overlay on /var/log
tmpfs on /tmp: 5368709120 bytes
tmpfs on /var/cache: 2147483648 bytes, with the directories it hides
  move /var/cache/pacman to /persist/var/cache/pacman
  bind /persist/var/cache/pacman on /var/cache/pacman
tmpfs on /var/tmp: 1073741824 bytes
";
        assert_eq!(plan(&config(""), &facts(ROOT)).to_string(), expected);
    }

    #[test]
    fn a_symlink_and_a_mount_are_skipped_alone() {
        let mut facts = facts(ROOT);
        facts.found.insert("/var/log".into(), Found::Symlink);
        facts.mounted.push("/tmp".into());
        let plan = plan(&config(""), &facts);
        let skipped: Vec<_> = plan.skipped.iter().map(|skipped| skipped.path.as_path()).collect();
        assert_eq!(skipped, [Path::new("/var/log"), Path::new("/tmp")]);
        assert!(plan.steps.contains(&Step::Overlay { target: "/etc".into(), unpack: false, passthrough: Vec::new() }));
    }

    #[test]
    fn what_fstab_mounts_later_is_deferred() {
        let mut facts = facts(ROOT);
        facts.fstab.push("/var".into());
        let text = plan(&config(""), &facts).to_string();
        assert!(text.contains("skip /var/log: deferred: it is on /var"), "{text}");
        facts.fstab.push("/persist".into());
        let text = plan(&config(""), &facts).to_string();
        assert!(text.contains("skip /etc: deferred: the store is on /persist"), "{text}");
        assert!(!text.contains("tmpfs for the overlays"), "{text}");
    }

    #[test]
    fn a_cache_on_another_file_system_stays_where_it_is() {
        let mut facts = facts(ROOT);
        facts.persist_device = 2;
        let kept = keep(&config(""), &facts);
        assert_eq!(kept, [Keep { name: "pacman".into(), source: "/var/cache/pacman".into(), moved_from: None }]);
        facts.found.insert("/persist/var/cache/pacman".into(), Found::Directory(2));
        assert_eq!(keep(&config(""), &facts)[0].source, Path::new("/persist/var/cache/pacman"));
    }
}
