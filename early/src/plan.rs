//! The plan: a pure function of the configuration and the facts, printable before anything is done.

use std::fmt;
use std::path::{Path, PathBuf};

use ephemeral_overlay::config::{Activate, Config};
use ephemeral_overlay::layout::STORE_DIR;
use ephemeral_overlay::mountinfo::Mount;
use ephemeral_overlay::state::Skipped;

use crate::facts::{Facts, Found, kept_paths};

/// The folder whose directory skeleton is kept and whose persistent parts are bound back.
pub const VAR_CACHE: &str = "/var/cache";

/// What will be done, in order, and what will not.
#[derive(Debug, PartialEq, Eq)]
pub struct Plan {
    /// What will be done.
    pub steps: Vec<Step>,
    /// What has to wait until the system has mounted its file systems.
    pub deferred: Vec<PathBuf>,
    /// What was asked for and will not be done now.
    pub skipped: Vec<Skipped>,
}

/// One thing to do. A step that fails is undone alone.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
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
pub struct Keep {
    /// Its name in the tmpfs.
    pub name: String,
    /// Where it lives.
    pub source: PathBuf,
    /// Where it lived until now: to be renamed to `source` first.
    pub moved_from: Option<PathBuf>,
}

/// Decides what to do.
#[must_use]
pub fn plan(config: &Config, facts: &Facts) -> Plan {
    let mut steps = Vec::new();
    let mut deferred = Vec::new();
    let mut skipped = Vec::new();
    let mut skip = |path: &Path, reason: String| skipped.push(Skipped { path: path.to_path_buf(), reason });

    let mut targets = Vec::new();
    for dir in &config.overlay.dirs {
        if config.overlay.activate == Activate::Login {
            skip(dir, "it is activated at login".to_owned());
        } else if let Some(reason) = waits(facts, &[("it", dir), ("the store", &config.persist.root)]) {
            // Before what stands there: that is something else once the file system is mounted.
            skip(dir, reason);
            deferred.push(dir.clone());
        } else if let Some(reason) = obstacle(facts, dir) {
            skip(dir, reason);
        } else {
            targets.push(dir.clone());
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
        let is_cache = path == Path::new(VAR_CACHE);
        // A cache that is moved below a mount point is out of sight when that is mounted.
        let needs_store = is_cache && !config.persist.var_cache.is_empty();
        let needed = [("it", path), ("the directory of what is kept of it", &config.persist.root)];
        if facts.fstab.iter().any(|entry| entry.mount_point == *path) {
            skip(path, "fstab mounts it; remove one of the two".to_owned());
        } else if let Some(reason) = waits(facts, &needed[..=usize::from(needs_store)]) {
            skip(path, reason);
            deferred.push(path.clone());
        } else if let Some(reason) = obstacle(facts, path) {
            skip(path, reason);
        } else {
            steps.push(Step::Tmpfs {
                path: path.clone(),
                size: size.bytes(facts.total_ram),
                skeleton: is_cache,
                keep: if is_cache { keep(config, facts) } else { Vec::new() },
            });
        }
    }
    Plan { steps, deferred, skipped }
}

/// Why nothing can be mounted on `path`.
fn obstacle(facts: &Facts, path: &Path) -> Option<String> {
    let mut mounts = facts.mounted.iter().filter(|mount| mount.mount_point == path && mount.fs_type != "autofs");
    // A subvolume of its own is what the disk has there; an overlay of somebody else hides that.
    let is_of_fstab = |mount: &Mount| {
        let same_kind = |kind: &str| kind == mount.fs_type || mount.fs_type != "overlay";
        facts.fstab.iter().any(|entry| entry.mount_point == path && same_kind(&entry.fs_type))
    };
    if mounts.next().is_some_and(|mount| !is_of_fstab(mount)) || mounts.next().is_some() {
        return Some("something is mounted there already".to_owned());
    }
    match facts.at(path) {
        Found::Directory(_) => None,
        Found::Symlink => Some("it is a symlink, or below one; name the directory it leads to".to_owned()),
        Found::Missing => Some("there is no such directory".to_owned()),
        Found::Other => Some("it is not a directory".to_owned()),
    }
}

/// Why something has to wait until the system has mounted its file systems.
fn waits(facts: &Facts, needed: &[(&str, &PathBuf)]) -> Option<String> {
    needed.iter().find_map(|(what, path)| {
        let mount_point = facts.missing(path)?;
        Some(format!("deferred: {what} is on {}, which is not mounted yet", mount_point.display()))
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
    use ephemeral_overlay::fstab;

    use super::*;

    fn facts(found: &[(&str, Found)]) -> Facts {
        Facts {
            total_ram: 1 << 30,
            mounted: vec![mount("/", "ext4")],
            fstab: fstab::parse("/dev/a / ext4"),
            found: found.iter().map(|(path, found)| (path.into(), *found)).collect(),
            persist_device: 1,
            pending: Vec::new(),
        }
    }

    fn mount(at: &str, kind: &str) -> Mount {
        ephemeral_overlay::mountinfo::parse(format!("1 1 0:1 / {at} rw - {kind} x rw\n").as_bytes()).remove(0)
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
        facts.mounted.push(mount("/tmp", "tmpfs"));
        let plan = plan(&config(""), &facts);
        let skipped: Vec<_> = plan.skipped.iter().map(|skipped| skipped.path.as_path()).collect();
        assert_eq!(skipped, [Path::new("/var/log"), Path::new("/tmp")]);
        assert!(plan.steps.contains(&Step::Overlay { target: "/etc".into(), unpack: false, passthrough: Vec::new() }));
    }

    #[test]
    fn what_fstab_mounts_later_is_deferred() {
        let mut facts = facts(ROOT);
        // On the root there may be nothing at all, or something else.
        facts.found.remove(Path::new("/var/tmp"));
        facts.found.insert("/var/log".into(), Found::Symlink);
        facts.fstab = fstab::parse("/dev/b /var ext4");
        let plan_of = |facts: &Facts| plan(&config(""), facts);
        let found = plan_of(&facts);
        let text = found.to_string();
        assert_eq!(found.deferred, [Path::new("/var/log"), Path::new("/var/cache"), Path::new("/var/tmp")]);
        assert!(text.contains("skip /var/log: deferred: it is on /var"), "{text}");
        assert!(text.contains("overlay on /etc") && text.contains("tmpfs on /tmp"), "{text}");

        facts.fstab = fstab::parse("/dev/b /persist ext4");
        facts.found.insert("/var/log".into(), Found::Directory(1));
        let found = plan_of(&facts);
        let text = found.to_string();
        assert!(text.contains("skip /etc: deferred: the store is on /persist"), "{text}");
        assert!(!text.contains("tmpfs for the overlays"), "{text}");
        // Else the kept caches would be moved below a mount point.
        assert_eq!(found.deferred, [Path::new("/etc"), Path::new("/var/log"), Path::new("/var/cache")]);
        let nothing_kept = plan(&config("persist.var_cache = []"), &facts);
        assert_eq!(nothing_kept.deferred, [Path::new("/etc"), Path::new("/var/log")]);

        facts.mounted.push(mount("/persist", "ext4"));
        assert!(plan_of(&facts).deferred.is_empty());
    }

    #[test]
    fn a_subvolume_of_its_own_is_no_obstacle_and_an_overlay_is() {
        let mut facts = facts(ROOT);
        facts.fstab = fstab::parse("/dev/b /var/log btrfs subvol=@log");
        facts.mounted.push(mount("/var/log", "btrfs"));
        assert_eq!(obstacle(&facts, Path::new("/var/log")), None);
        facts.mounted.push(mount("/var/log", "overlay"));
        assert!(obstacle(&facts, Path::new("/var/log")).is_some());
        facts.mounted.remove(1);
        assert!(obstacle(&facts, Path::new("/var/log")).is_some());
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
