//! A tmpfs that is mounted nowhere: reached through its descriptor, gone with it. Whatever a merge does, no path of the
//! system leads there, and its device nodes open nothing.

use std::fs;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;

use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen};
use syncd::merge::{MergeOptions, MergeStats, merge};
use syncd::place::{Into, Place};
use syncd::progress::Progress;
use syncd::store::{Store, TargetStore};
use syncd::tree::Tree;
use test_support::snapshot::{self, Snapshot};

use crate::sample::{TARGET, TOKEN};

/// A lower directory with our token, a store, and beside them what nobody may touch.
#[derive(Debug)]
pub struct Scratch {
    mount: OwnedFd,
    canary: Snapshot,
}

impl Default for Scratch {
    fn default() -> Self {
        Self::new()
    }
}

impl Scratch {
    /// A new one. Needs root.
    #[must_use]
    pub fn new() -> Self {
        let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).unwrap();
        for (key, value) in [("size", "128M"), ("nr_inodes", "20000"), ("mode", "0700")] {
            fsconfig_set_string(context.as_fd(), key, value).unwrap();
        }
        fsconfig_create(context.as_fd()).unwrap();
        let attributes =
            MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC;
        let mount = fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes).unwrap();
        let mut scratch = Self { mount, canary: Snapshot::new() };
        for name in ["lower", "upper", "canary/dir", "store/targets"] {
            fs::create_dir_all(scratch.at(name)).unwrap();
        }
        for name in ["canary/file", "canary/dir/file"] {
            fs::write(scratch.at(name), name).unwrap();
        }
        scratch.canary = snapshot::take(&scratch.at("canary"));
        scratch.set_token();
        fs::create_dir_all(scratch.store().directory()).unwrap();
        scratch
    }

    /// A path in it.
    #[must_use]
    pub fn at(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.mount.as_raw_fd())).join(name)
    }

    /// The lower directory.
    #[must_use]
    pub fn lower(&self) -> Tree {
        Tree::open(&self.at("lower")).unwrap()
    }

    /// The store of its target.
    #[must_use]
    pub fn store(&self) -> TargetStore {
        Store::open(&self.at("store")).unwrap().target(TARGET.as_ref())
    }

    /// Gives lower the token of all chains here.
    pub fn set_token(&self) {
        let lower = self.lower();
        // Its root may be protected.
        Place::new(&lower, Into::Copy, TOKEN).write_token(TOKEN).unwrap();
    }

    /// Everything in lower.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        snapshot::take(&self.at("lower"))
    }

    /// Merges the chain in the store. Whatever comes of it: nothing beside lower is touched, and lower only once the
    /// merge has left its mark.
    ///
    /// # Errors
    /// Those of the merge.
    pub fn merge(&self, options: MergeOptions) -> syncd::Result<Option<MergeStats>> {
        let before = self.snapshot();
        let store = self.store();
        let done = merge(&store, &self.lower(), options, &Progress::new(None));
        if done.is_err() && store.marker().unwrap().is_none() {
            snapshot::assert_same(&before, &self.snapshot(), "a refused merge changed lower");
        }
        self.assert_untouched();
        done
    }

    /// Fails when anything outside of lower and the store was touched.
    pub fn assert_untouched(&self) {
        snapshot::assert_same(&self.canary, &snapshot::take(&self.at("canary")), "what is beside lower was touched");
        let mut names: Vec<_> = fs::read_dir(self.at("")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["canary", "lower", "store", "upper"], "something was made beside lower");
    }
}
