//! One system as the commands see it: its layout, its configuration, and whether it is the one that booted.

use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use ephemeral_overlay::config::Config;
use ephemeral_overlay::error::At;
use ephemeral_overlay::layout::{LoadError, STORE_DIR};
use ephemeral_overlay::state::{self, BootState};
use ephemeral_overlay::{Layout, fstab, mountinfo};
use rustix::fs::OFlags;
use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::store::Store;
use crate::tree::Tree;

/// A system.
#[derive(Debug)]
pub struct System {
    /// Where everything is.
    pub layout: Layout,
    /// What its user wants; the defaults if that could not be read.
    pub config: Config,
    /// Why it could not be read. What is in RAM or pending is saved all the same.
    pub config_error: Option<LoadError>,
    /// What `early` did in this boot; `None` when the hook was not active, and for a system that is not running:
    /// the boot state of this machine says nothing about a foreign disk.
    pub boot: Option<BootState>,
    /// This is the system that runs.
    pub live: bool,
}

impl System {
    /// Looks at the system at `root`. It is the running one if that is `/`, or if a run directory is named.
    ///
    /// # Errors
    /// When the boot state cannot be read.
    pub fn open(root: &Path, run_dir: Option<&Path>, config: Option<&Path>) -> Result<Self> {
        let layout = Layout::new(root, run_dir, config);
        let live = run_dir.is_some() || std::fs::canonicalize(root).is_ok_and(|path| path == Path::new("/"));
        let boot = boot_of(&layout, live)?;
        let (config, config_error) = match layout.load_config() {
            Ok(config) => (config, None),
            Err(error) => (Config::default(), Some(error)),
        };
        Ok(Self { layout, config, config_error, boot, live })
    }

    /// The same system as it is at this moment, with the configuration that it had.
    ///
    /// # Errors
    /// When the boot state cannot be read.
    pub fn now(&self) -> Result<Self> {
        let boot = boot_of(&self.layout, self.live)?;
        let (layout, config) = (self.layout.clone(), self.config.clone());
        Ok(Self { layout, config, config_error: None, boot, live: self.live })
    }

    /// Locks the boot state of the running system until the descriptor is closed, and reads it again: whoever does
    /// something and changes it does that before everything else, also before the store is locked.
    ///
    /// # Errors
    /// When it cannot be locked or read.
    pub fn lock(&mut self) -> Result<Option<OwnedFd>> {
        if !self.live {
            return Ok(None);
        }
        let lock = state::lock(self.layout.run_dir())?;
        self.boot = boot_of(&self.layout, self.live)?;
        Ok(lock)
    }

    /// Where the store is: where `early` looks for it at the next boot. Its bind is that, whatever has been mounted over
    /// the path since, or unmounted.
    ///
    /// # Errors
    /// When `persist.root` cannot be resolved.
    pub fn store_path(&self) -> Result<PathBuf> {
        let path = self.resolved_store()?;
        let bind = self.store_bind()?;
        let identity = |path: &Path| std::fs::metadata(path).map(|stat| (stat.dev(), stat.ino())).ok();
        // The path is what people know.
        Ok(bind.filter(|bind| identity(bind) != identity(&path)).unwrap_or(path))
    }

    /// The bind of the store that `early` made in this boot, if it did.
    ///
    /// # Errors
    /// When the mount table cannot be read.
    pub fn store_bind(&self) -> Result<Option<PathBuf>> {
        let bind = self.layout.store_bind();
        let table = std::fs::read("/proc/self/mountinfo").at("read", "/proc/self/mountinfo")?;
        let is_mounted = mountinfo::parse(&table).iter().any(|mount| mount.mount_point == bind);
        // Somebody removed the store: its bind leads nowhere any more.
        let is_there = is_mounted && std::fs::metadata(&bind).is_ok_and(|stat| stat.nlink() > 0);
        Ok(Some(bind).filter(|_| self.boot.is_some() && is_there))
    }

    /// Resolved inside the root: an absolute symlink does not lead out of it.
    fn resolved_store(&self) -> Result<PathBuf> {
        let store = self.persist().join(STORE_DIR);
        // The store itself may not exist yet; what is above it decides where it is.
        for above in store.ancestors() {
            match self.layout.open(above, OFlags::PATH | OFlags::DIRECTORY) {
                Ok(directory) => {
                    let handle = ephemeral_overlay::attributes::Handle::of(std::os::fd::AsFd::as_fd(&directory));
                    let real = std::fs::read_link(handle.path()).unwrap_or_else(|_| self.layout.below_root(above));
                    return Ok(real.join(store.strip_prefix(above).unwrap_or(Path::new(""))));
                }
                Err(error) if error.errno() == Some(Errno::NOENT) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(self.layout.below_root(&store))
    }

    /// Checks that the file system is mounted that fstab has for `path`: what stands there else is not `what`, and
    /// must not be taken for it.
    ///
    /// # Errors
    /// [`Error::NotMounted`] where it is not.
    pub fn check_mounted(&self, what: &'static str, path: &Path) -> Result<()> {
        let fstab = self.layout.fstab()?;
        let root = std::fs::canonicalize(self.layout.root()).at("realpath", self.layout.root())?;
        // An automount mounts as soon as somebody looks.
        drop(self.layout.open_dir(path));
        let table = std::fs::read("/proc/self/mountinfo").at("read", "/proc/self/mountinfo")?;
        let mounted = mountinfo::below(&mountinfo::parse(&table), &root);
        match fstab::missing(&fstab, &mounted, path) {
            None => Ok(()),
            Some(mount_point) => Err(Error::NotMounted { what, mount_point: mount_point.to_path_buf() }),
        }
    }

    /// The directory that holds the store: where `early` found it in a running system, whatever became of the
    /// configuration.
    #[must_use]
    pub fn persist(&self) -> &Path {
        self.boot.as_ref().map_or(&self.config.persist.root, |boot| &boot.persist)
    }

    /// The targets that a command is about: those named, or all that `early` mounted and that are still in RAM.
    ///
    /// # Errors
    /// [`Error::UnknownTarget`] for a name that is neither configured nor mounted.
    pub fn mounted_targets(&self, named: &[PathBuf]) -> Result<Vec<PathBuf>> {
        let mounted: Vec<_> = self.boot.iter().flat_map(|boot| &boot.targets).collect();
        let all: Vec<_> = mounted.iter().map(|state| &state.path).chain(&self.config.overlay.dirs).cloned().collect();
        check_known(named, &all)?;
        let wanted = |path: &PathBuf| named.is_empty() || named.contains(path);
        Ok(mounted
            .into_iter()
            .filter(|state| !state.released && wanted(&state.path))
            .map(|state| state.path.clone())
            .collect())
    }

    /// The targets that have something in the store, of those named or of all.
    ///
    /// # Errors
    /// [`Error::UnknownTarget`] for a name that the store and the configuration do not know.
    pub fn stored_targets(&self, store: &Store, named: &[PathBuf]) -> Result<Vec<PathBuf>> {
        let stored: Vec<_> = store.targets()?.iter().map(|target| target.target().to_path_buf()).collect();
        let all: Vec<_> = stored.iter().chain(&self.config.overlay.dirs).cloned().collect();
        check_known(named, &all)?;
        Ok(stored.into_iter().filter(|path| named.is_empty() || named.contains(path)).collect())
    }

    /// A target's upper directory and what it lies over.
    ///
    /// # Errors
    /// When one of them cannot be opened.
    pub fn upper_and_lower(&self, target: &Path) -> Result<(Tree, Tree)> {
        Ok((Tree::open(&self.layout.upper(target))?, self.lower(target)?))
    }

    /// What a target that is in RAM lies over, by its bind.
    ///
    /// # Errors
    /// [`Error::LowerGone`] where that is not mounted: the empty directory below it is not the target's.
    pub fn lower(&self, target: &Path) -> Result<Tree> {
        let bind = self.layout.lower(target);
        if !early::sys::is_mounted(&bind) {
            return Err(Error::LowerGone { target: target.to_path_buf(), bind });
        }
        Ok(Tree::open(&bind)?)
    }
}

/// What `early` did in this boot to the root of a layout, if that is the one that booted.
fn boot_of(layout: &Layout, live: bool) -> Result<Option<BootState>> {
    let root = layout.root();
    let stat = std::fs::metadata(root).at("stat", root)?;
    let boot = if live { BootState::read(&layout.boot_state())? } else { None };
    // A chroot may see the run directory of the system around it.
    Ok(boot.filter(|boot| boot.root == (stat.dev(), stat.ino())))
}

/// Checks that every name is among those that are known.
///
/// # Errors
/// [`Error::UnknownTarget`] for the first that is not.
pub fn check_known(named: &[PathBuf], known: &[PathBuf]) -> Result<()> {
    match named.iter().find(|name| !known.contains(name)) {
        None => Ok(()),
        Some(name) => {
            let mut known: Vec<_> = known.iter().map(|path| path.display().to_string()).collect();
            known.sort_unstable();
            known.dedup();
            Err(Error::UnknownTarget { target: name.clone(), known: known.join(", ") })
        }
    }
}
