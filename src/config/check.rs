//! The rules between values, checked once all files are applied.
//!
//! One rule does most of it: the overlay targets, the tmpfs mounts and the directory of the store are disjoint, so
//! that every path belongs to one of them at most and the store never lies in what it saves.

use std::fmt;
use std::path::{Path, PathBuf};

use super::origins::{Origins, path_key};
use super::{Config, ConfigError};

const KERNEL: &str = "it shows the kernel's own state, which is not on disk";
const OWN_TMPFS: &str = "it is kept in RAM by [tmpfs]";

/// Never overlay targets, nor anything below them.
const REFUSED_TREES: [(&str, &str); 11] = [
    ("/home", "what users keep there must not depend on RAM"),
    ("/proc", KERNEL),
    ("/sys", KERNEL),
    ("/dev", KERNEL),
    ("/run", "it is in RAM already"),
    ("/mnt", "other file systems are mounted there"),
    ("/media", "other file systems are mounted there"),
    ("/boot", "the boot loader reads it from disk"),
    ("/tmp", OWN_TMPFS),
    ("/var/tmp", OWN_TMPFS),
    ("/var/cache", OWN_TMPFS),
];

/// Never overlay targets themselves; directories below them may be.
const REFUSED_DIRS: [(&str, &str); 3] = [
    ("/", "it holds the store and everything that is mounted; name directories that are written to often"),
    ("/var", "it holds /var/tmp and /var/cache, which [tmpfs] is for; name directories below it, such as /var/log"),
    ("/usr", "the system starts from it; name a directory below it, such as /usr/local"),
];

/// The system does not start with an empty directory there.
const NEVER_EMPTY: [&str; 6] = ["/", "/usr", "/proc", "/sys", "/dev", "/run"];

/// Gone after a reboot.
const VOLATILE: [&str; 4] = ["/proc", "/sys", "/dev", "/run"];

/// A path of the configuration, the key that names it, and what it is for.
#[derive(Debug, Clone)]
struct Claim<'a> {
    key: String,
    role: &'static str,
    path: &'a Path,
}

/// Checks the rules, and drops the default intervals of targets that are not among `dirs`.
pub(super) fn check(config: &mut Config, origins: &Origins<'_>) -> Result<(), ConfigError> {
    let targets = listed("overlay.dirs", "overlay target", &config.overlay.dirs);
    let passthrough = listed("overlay.passthrough", "passthrough path", &config.overlay.passthrough);
    let mounts = config.tmpfs.mounts.keys().map(|path| Claim { key: path_key("tmpfs", path), role: "tmpfs", path });
    let mounts: Vec<_> = mounts.collect();
    let store = Claim { key: "persist.root".to_owned(), role: "directory of the store", path: &config.persist.root };

    for target in &targets {
        if let Some(reason) = why_no_target(target.path) {
            return Err(target.refuse(origins, &format!("cannot be an overlay target: {reason}")));
        }
    }
    for mount in &mounts {
        if NEVER_EMPTY.iter().any(|path| mount.path == Path::new(path)) {
            return Err(mount.refuse(origins, "cannot be a tmpfs: the system does not start with nothing in it"));
        }
    }
    if store.path == Path::new("/") {
        return Err(store.refuse(origins, "cannot hold the store: name a directory of its own, such as /persist"));
    }
    if VOLATILE.iter().any(|path| store.path.starts_with(path)) {
        return Err(store.refuse(origins, "cannot hold the store: nothing there survives a reboot"));
    }
    if config.log.file == Path::new("/") {
        return Err(origins.refuse(&["log.file"], "/ is a directory; name a file".to_owned()));
    }
    for path in &passthrough {
        if !targets.iter().any(|target| path.path != target.path && path.path.starts_with(target.path)) {
            let allowed = not_among(&config.overlay.dirs, "is not below an overlay target");
            return Err(path.refuse(origins, &allowed));
        }
    }
    disjoint(&passthrough, origins)?;
    disjoint(&[targets, mounts, vec![store]].concat(), origins)?;

    for path in config.checkpoint.per_target.keys().filter(|path| !config.overlay.dirs.contains(path)) {
        let key = path_key("checkpoint.per_target", path);
        if origins.was_set(&key) {
            let claim = Claim { key, role: "target", path };
            return Err(claim.refuse(origins, &not_among(&config.overlay.dirs, "is not an overlay target")));
        }
    }
    config.checkpoint.per_target.retain(|path, _| config.overlay.dirs.contains(path));
    Ok(())
}

impl Claim<'_> {
    fn refuse(&self, origins: &Origins<'_>, why: &str) -> ConfigError {
        origins.refuse(&[&self.key], format!("{} {why}", self.path.display()))
    }
}

impl fmt::Display for Claim<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.role, self.path.display())
    }
}

fn listed<'a>(key: &str, role: &'static str, paths: &'a [PathBuf]) -> Vec<Claim<'a>> {
    let paths = paths.iter().enumerate();
    paths.map(|(index, path)| Claim { key: format!("{key}[{index}]"), role, path }).collect()
}

fn why_no_target(path: &Path) -> Option<String> {
    let tree = REFUSED_TREES.iter().find(|(tree, _)| path.starts_with(tree));
    match tree {
        Some((tree, reason)) if path == Path::new(tree) => Some((*reason).to_owned()),
        Some((tree, reason)) => Some(format!("nothing in {tree} can be, {reason}")),
        None => REFUSED_DIRS.iter().find(|(dir, _)| path == Path::new(dir)).map(|(_, reason)| (*reason).to_owned()),
    }
}

fn not_among(targets: &[PathBuf], why: &str) -> String {
    let targets: Vec<_> = targets.iter().map(|path| path.display().to_string()).collect();
    let targets = if targets.is_empty() { "there are none".to_owned() } else { targets.join(", ") };
    format!("{why}; overlay.dirs: {targets}")
}

/// Refuses two claims of which one contains the other.
fn disjoint(claims: &[Claim<'_>], origins: &Origins<'_>) -> Result<(), ConfigError> {
    for (index, earlier) in claims.iter().enumerate() {
        for later in claims.iter().skip(index + 1) {
            let relation = match (later.path.starts_with(earlier.path), earlier.path.starts_with(later.path)) {
                (false, false) => continue,
                (true, true) => "is the same as",
                (true, false) => "lies below",
                (false, true) => "contains",
            };
            let reason = format!("the {later} {relation} the {earlier}; they must lie apart");
            return Err(origins.refuse(&[&earlier.key, &later.key], reason));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may unwrap")]

    use super::*;

    fn parse(files: &[&str]) -> Result<Config, ConfigError> {
        let sources = files.iter().enumerate();
        Config::parse(&sources.map(|(n, text)| (format!("/{n}.toml").into(), (*text).to_owned())).collect::<Vec<_>>())
    }

    fn refusal(files: &[&str]) -> String {
        let error = parse(files).unwrap_err();
        assert!(matches!(error, ConfigError::Refused { .. }), "{error}");
        error.to_string()
    }

    fn dirs(dirs: &str) -> String {
        format!("[overlay]\ndirs = [{dirs}]\n")
    }

    #[test]
    fn the_defaults_keep_every_rule() {
        assert_eq!(parse(&[]).unwrap(), Config::default());
    }

    #[test]
    fn places_that_can_be_targets() {
        let allowed = r#""/opt", "/usr/local", "/etc", "/var/log", "/var/lib", "/srv", "/homes", "/root", "/var/tmpx""#;
        assert_eq!(parse(&[&dirs(allowed)]).unwrap().overlay.dirs.len(), 9);
        assert!(parse(&[&dirs("")]).unwrap().overlay.dirs.is_empty());
    }

    #[test]
    fn places_that_cannot_be_targets() {
        for (tree, _) in REFUSED_TREES {
            let message = refusal(&[&dirs(&format!("\"{tree}\""))]);
            assert!(
                message.starts_with(&format!("/0.toml:2: overlay.dirs[0]: {tree} cannot be an overlay target: ")),
                "{message}"
            );
            let message = refusal(&[&dirs(&format!("\"/etc\",\n\"{tree}/x/y\""))]);
            assert!(message.starts_with(&format!("/0.toml:3: overlay.dirs[1]: {tree}/x/y cannot")), "{message}");
            assert!(message.contains(&format!("nothing in {tree} can be")), "{message}");
        }
        for (dir, reason) in REFUSED_DIRS {
            let message = refusal(&[&dirs(&format!("\"{dir}\""))]);
            assert_eq!(message, format!("/0.toml:2: overlay.dirs[0]: {dir} cannot be an overlay target: {reason}"));
        }
    }

    #[test]
    fn targets_lie_apart() {
        for (list, relation) in [
            (r#""/srv", "/etc", "/srv""#, "overlay target /srv is the same as the overlay target /srv"),
            (r#""/srv", "/etc", "/srv/a/b""#, "overlay target /srv/a/b lies below the overlay target /srv"),
            (r#""/srv/a", "/etc", "/srv""#, "overlay target /srv contains the overlay target /srv/a"),
        ] {
            let message = refusal(&[&dirs(list)]);
            assert!(message.starts_with("/0.toml:2: overlay.dirs[2]: "), "{message}");
            assert!(message.contains(relation), "{message}");
        }
        parse(&[&dirs(r#""/srv/a", "/srv/ab", "/srv/b""#)]).unwrap();
    }

    #[test]
    fn targets_and_the_store_lie_apart() {
        for target in ["/data", "/data/persist", "/data/persist/ephemeral-overlay", "/data/persist/ephemeral-overlay/x"]
        {
            let text = dirs(&format!("\"{target}\"")) + "[persist]\nroot = \"/data/persist\"";
            let message = refusal(&[&text]);
            assert!(
                message.starts_with("/0.toml:4: persist.root: the directory of the store /data/persist"),
                "{message}"
            );
            // The same with the default root: now the target is what was set.
            let message = refusal(&[&dirs(&format!("\"{}\"", target.replace("/data", "/persist/persist")))]);
            assert!(message.starts_with("/0.toml:2: overlay.dirs[0]: "), "{message}");
        }
        let message = refusal(&["persist.root = '/etc/store'"]);
        assert!(message.contains("/etc/store lies below the overlay target /etc"), "{message}");
    }

    #[test]
    fn the_line_that_broke_the_rule_is_named() {
        let (target, store) = (dirs("\"/data\""), "\n\npersist.root = \"/data/x\"".to_owned());
        assert!(refusal(&[&target, &store]).starts_with("/1.toml:3: persist.root: "));
        assert!(refusal(&[&store, &target]).starts_with("/1.toml:2: overlay.dirs[0]: "));
    }

    #[test]
    fn a_later_file_may_mend_an_earlier_one() {
        let config = parse(&[&dirs("\"/home\""), &dirs("\"/opt\"")]).unwrap();
        assert_eq!(config.overlay.dirs, [Path::new("/opt")]);
        parse(&["tmpfs.'/etc/x' = '1G'", "tmpfs.'/etc/x' = false"]).unwrap();
    }

    #[test]
    fn the_store_must_survive_a_reboot_and_have_a_directory() {
        for root in ["/", "/proc/x", "/sys", "/dev/x", "/run/store"] {
            let message = refusal(&[&format!("persist.root = '{root}'")]);
            assert!(
                message.starts_with(&format!("/0.toml:1: persist.root: {root} cannot hold the store")),
                "{message}"
            );
        }
        for root in ["/tmp/x", "/var/cache", "/var"] {
            assert!(refusal(&[&format!("persist.root = '{root}'")]).contains("they must lie apart"), "{root}");
        }
        parse(&["persist.root = '/var/lib/persist'"]).unwrap();
    }

    #[test]
    fn tmpfs_mounts_lie_apart_from_everything() {
        for (mount, part) in [
            ("/etc", "is the same as the overlay target /etc"),
            ("/etc/x", "lies below the overlay target /etc"),
            ("/var", "contains the overlay target /var/log"),
            ("/persist", "the same as the tmpfs /persist"),
            ("/persist/x", "store /persist contains the tmpfs /persist/x"),
            ("/tmp/x", "tmpfs /tmp/x lies below the tmpfs /tmp"),
        ] {
            let message = refusal(&[&format!("[tmpfs]\n\"{mount}\" = \"1G\"")]);
            assert!(message.starts_with(&format!("/0.toml:2: tmpfs.\"{mount}\": ")), "{message}");
            assert!(message.contains(part), "{message}");
        }
        for mount in NEVER_EMPTY {
            let message = refusal(&[&format!("tmpfs.'{mount}' = '1G'")]);
            assert!(message.contains(&format!("{mount} cannot be a tmpfs")), "{message}");
        }
        parse(&["tmpfs = { '/var/lib/x' = '1G', '/dev/shm' = '1G' }"]).unwrap();
    }

    #[test]
    fn passthrough_lies_strictly_inside_a_target() {
        for path in ["/etc", "/opt/x", "/etcetera", "/var"] {
            let message = refusal(&[&format!("overlay.passthrough = [\n'/var/log/journal',\n'{path}']")]);
            let expected = format!(
                "/0.toml:3: overlay.passthrough[1]: {path} is not below an overlay target; overlay.dirs: /etc, /var/log"
            );
            assert_eq!(message, expected);
        }
        assert!(
            refusal(&["overlay = { dirs = [], passthrough = ['/etc/x'] }"]).ends_with("overlay.dirs: there are none")
        );
        assert!(refusal(&["overlay.passthrough = ['/etc/x', '/etc/x/y']"]).contains("must lie apart"));
        let config = parse(&["overlay.passthrough = ['/etc/a', '/var/log/journal']"]).unwrap();
        assert_eq!(config.overlay.passthrough.len(), 2);
    }

    #[test]
    fn intervals_are_for_targets() {
        let message = refusal(&["[checkpoint]\nper_target = { '/opt' = '1s' }"]);
        let expected =
            "/0.toml:2: checkpoint.per_target.\"/opt\": /opt is not an overlay target; overlay.dirs: /etc, /var/log";
        assert_eq!(message, expected);
        let etc = "checkpoint.per_target.'/etc' = '30s'\n";
        assert!(refusal(&[&format!("{etc}overlay.dirs = []")]).contains("/etc is not"));
        // The default one is nobody's mistake.
        assert!(parse(&["overlay.dirs = ['/opt']"]).unwrap().checkpoint.per_target.is_empty());
    }

    #[test]
    fn the_log_is_a_file() {
        assert!(refusal(&["log.file = '/'"]).starts_with("/0.toml:1: log.file: "));
    }
}
