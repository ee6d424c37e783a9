//! What is mounted, as the mount table and `boot.json` say it.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use ephemeral_overlay::mountinfo;
use ephemeral_overlay::state::BootState;

use crate::world::World;

/// One line of mountinfo.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mount {
    pub(super) device: String,
    /// What of its file system it shows.
    pub(super) root: PathBuf,
    pub(super) point: PathBuf,
    pub(super) options: BTreeSet<String>,
    /// `shared:1`, `master:2` and the like.
    pub(super) propagation: Vec<String>,
    pub(super) kind: String,
    pub(super) source: String,
    pub(super) settings: BTreeSet<String>,
}

impl Mount {
    pub(super) fn setting(&self, key: &str) -> Option<&str> {
        self.settings.iter().find_map(|setting| setting.strip_prefix(key)?.strip_prefix('='))
    }
}

/// Every mount strictly below `path`, in the order in which they were made.
pub(super) fn mounts_below(path: &Path) -> Vec<Mount> {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let mounts = text.lines().map(|line| {
        let mut fields = line.split(' ').map(str::to_owned).skip(2);
        let mut next = || fields.next().unwrap();
        let list = |text: String| text.split(',').map(str::to_owned).collect();
        let (device, root, point, options) = (next(), next(), next(), list(next()));
        let propagation = std::iter::from_fn(|| Some(next()).filter(|field| field != "-")).collect();
        let (kind, source, settings) = (next(), next(), list(next()));
        let plain = |text: String| mountinfo::unescape(text.as_bytes());
        Mount { device, root: plain(root), point: plain(point), options, propagation, kind, source, settings }
    });
    mounts.filter(|mount| mount.point.starts_with(path) && mount.point != path).collect()
}

/// Every mount of a world.
pub(super) fn mounts(world: &World) -> Vec<Mount> {
    [mounts_below(&world.root), mounts_below(&world.run)].concat()
}

/// The one mount at a path of the system, if there is one. Below an overlay there is its cover.
pub(super) fn mount_at(world: &World, path: &str) -> Option<Mount> {
    let point = world.at(path);
    let mut found = mounts_below(&world.root);
    found.retain(|mount| mount.point == point);
    let top = found.pop()?;
    let is_covered = top.kind == "overlay" && found.len() == 1 && found[0].options.contains("ro");
    assert!(is_covered || found.is_empty(), "mounted twice: {found:?}, {top:?}");
    Some(top)
}

/// The one mount at a path of the run directory, if there is one.
pub(super) fn mount_in_run(world: &World, path: &str) -> Option<Mount> {
    let point = world.run.join(path);
    let mut found = mounts_below(&world.run);
    found.retain(|mount| mount.point == point);
    assert!(found.len() < 2, "mounted twice: {found:?}");
    found.pop()
}

pub(super) fn is_overlay(world: &World, path: &str) -> bool {
    mount_at(world, path).is_some_and(|mount| mount.kind == "overlay")
}

pub(super) fn assert_nothing_is_mounted(world: &World) {
    assert_eq!(mounts(world), []);
}

/// Every target is mounted with all that belongs to it and known to syncd, or nothing of it is there.
pub(super) fn assert_whole_or_absent(world: &World, what: &str) -> usize {
    let boot = BootState::read(&world.run.join("boot.json")).unwrap();
    let known: Vec<_> = boot.iter().flat_map(|boot| &boot.targets).map(|target| target.path.as_path()).collect();
    let targets = [("etc", "etc"), ("var/log", "var-log")];
    let whole = targets.into_iter().filter(|(target, name)| {
        let parts = [
            is_overlay(world, target),
            mount_in_run(world, &format!("lower/{name}")).is_some(),
            world.run.join("ram").join(name).exists(),
            known.contains(&Path::new("/").join(target).as_path()),
        ];
        assert!(parts == [true; 4] || parts == [false; 4], "{what}: /{target}: overlay, bind, RAM, known: {parts:?}");
        parts[0]
    });
    let whole = whole.count();
    for mount in mounts(world) {
        assert_eq!(mount.propagation, [""; 0], "{what}: {mount:?}");
    }
    whole
}
