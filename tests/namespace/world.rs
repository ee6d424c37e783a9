//! A small system in a loop image: a root with `/etc` and `/var/log`, a run directory, and a power switch.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use ephemeral_overlay::mountinfo;
use rustix::fs::statvfs;
use rustix::mount::{UnmountFlags, unmount};

use crate::tools;

/// A file system that is tested on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fs {
    Ext4,
    Btrfs,
    Xfs,
}

/// A loop image with a file system, mounted.
#[derive(Debug)]
pub(crate) struct Disk {
    directory: tempfile::TempDir,
    /// The image, in the directory.
    image: &'static str,
}

impl Disk {
    /// A new file system of `megabytes`.
    pub(crate) fn new(fs: Fs, megabytes: u64) -> Self {
        let directory = tempfile::Builder::new().prefix("eo-test-").tempdir().unwrap();
        let image = directory.path().join("image");
        fs::File::create(&image).unwrap().set_len(megabytes << 20).unwrap();
        let path = image.to_str().unwrap();
        match fs {
            Fs::Ext4 => tools::run("mkfs.ext4", &["-q", path]),
            Fs::Btrfs => tools::run("mkfs.btrfs", &["-q", path]),
            Fs::Xfs => tools::run("mkfs.xfs", &["-q", path]),
        };
        let disk = Self { directory, image: "image" };
        fs::create_dir(disk.path()).unwrap();
        disk.mount();
        disk
    }

    /// A new ext4 on a thin device: [`Disk::take_room`] takes away what the file system has not used yet.
    pub(crate) fn thin(megabytes: u64) -> Self {
        let directory = tempfile::Builder::new().prefix("eo-test-").tempdir().unwrap();
        let disk = Self { directory, image: "pool/image" };
        let (pool, image) = (disk.beside("pool"), disk.beside("pool/image"));
        fs::create_dir(&pool).unwrap();
        tools::run(
            "mount",
            &["-t", "tmpfs", "-o", &format!("size={}M", 2 * megabytes), "tmpfs", pool.to_str().unwrap()],
        );
        let (path, size) = (image.to_str().unwrap(), format!("{megabytes}M"));
        tools::run("truncate", &["-s", &size, path]);
        tools::run("mkfs.ext4", &["-q", "-E", "lazy_itable_init=0", path]);
        // mkfs makes holes where it writes zeros.
        tools::run("fallocate", &["-l", &size, path]);
        fs::create_dir(disk.path()).unwrap();
        disk.mount();
        disk
    }

    /// Takes all room away from a thin device but what is in use and `bytes`.
    pub(crate) fn take_room(&self, bytes: u64) {
        // What was removed is free only once that is in the journal, and would be room that nobody counts.
        rustix::fs::syncfs(fs::File::open(self.path()).unwrap()).unwrap();
        tools::run("fstrim", &[self.path().to_str().unwrap()]);
        let free = statvfs(self.beside("pool")).map(|stat| stat.f_bavail * stat.f_frsize).unwrap();
        let length = free.checked_sub(bytes).unwrap().to_string();
        tools::run("fallocate", &["-l", &length, self.beside("pool/filler").to_str().unwrap()]);
    }

    /// Gives all room back.
    pub(crate) fn give_room(&self) {
        fs::remove_file(self.beside("pool/filler")).unwrap();
    }

    /// From now on every read and write fails that is not in a cache, and nothing more comes to the disk.
    pub(crate) fn vanish(&self) {
        tools::run("xfs_io", &["-x", "-c", "shutdown", self.path().to_str().unwrap()]);
    }

    /// The file system is remounted: `ro` or `rw`.
    pub(crate) fn remount(&self, how: &str) {
        let remount =
            || Command::new("mount").args(["-o", &format!("remount,{how}")]).arg(self.path()).output().unwrap();
        // It is busy while something is written.
        for _ in 0..100 {
            if remount().status.success() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        panic!("{}", tools::text(&remount()));
    }

    /// The kernel finds an error in the file system, and does with it what `errors=remount-ro` says.
    pub(crate) fn fail(&self) {
        self.remount("errors=remount-ro");
        let mount = tools::mounts_on(&self.path()).pop().unwrap();
        let device = Path::new(&mount.source).file_name().unwrap().to_owned();
        fs::write(Path::new("/sys/fs/ext4").join(device).join("trigger_fs_error"), "1").unwrap();
    }

    /// It is mounted anew, with nothing in any cache.
    pub(crate) fn come_back(&self) {
        let gone = || unmount(self.path(), UnmountFlags::empty());
        // Another test's child may hold our descriptors for a moment, between its fork and its exec.
        for _ in 0..100 {
            if gone() != Err(rustix::io::Errno::BUSY) {
                return self.mount();
            }
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        gone().unwrap();
    }

    fn mount(&self) {
        let image = self.beside(self.image);
        tools::run("mount", &["-o", "loop", image.to_str().unwrap(), self.path().to_str().unwrap()]);
    }

    /// Where it is mounted.
    pub(crate) fn path(&self) -> PathBuf {
        self.directory.path().join("disk")
    }

    /// A directory beside the image, for what is not on the disk.
    fn beside(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        unmount_all(self.directory.path());
    }
}

/// A root and its run directory.
#[derive(Debug)]
pub(crate) struct World {
    /// The root of the system.
    pub root: PathBuf,
    /// Its run directory.
    pub run: PathBuf,
    config: PathBuf,
    /// The disk, where it is this system's own; dropped, and so unmounted, last.
    disk: Option<Disk>,
}

/// Only `/etc`, and no tmpfs: what most tests want.
pub(crate) const ETC: &str =
    "overlay.dirs = ['/etc']\ntmpfs = { '/tmp' = false, '/var/tmp' = false, '/var/cache' = false }\n";

impl World {
    /// A system of its own on a small ext4 disk.
    pub(crate) fn new(config: &str) -> Self {
        Self::on(Disk::new(Fs::Ext4, 64), config)
    }

    /// A system of its own on `disk`.
    pub(crate) fn on(disk: Disk, config: &str) -> Self {
        let mut world = Self::within(&disk, "root", config);
        world.disk = Some(disk);
        world
    }

    /// A system in the directory `name` of a disk that several share.
    pub(crate) fn within(disk: &Disk, name: &str, config: &str) -> Self {
        let root = disk.path().join(name);
        for directory in ["etc", "var/log", "var/tmp", "var/cache", "tmp", "persist", "usr/lib/ephemeral-overlay"] {
            fs::create_dir_all(root.join(directory)).unwrap();
        }
        fs::write(root.join("usr/lib/ephemeral-overlay/counterpart"), "format = 1\n").unwrap();
        let path = disk.beside(&format!("{name}.toml"));
        fs::write(&path, config).unwrap();
        Self { root, run: disk.beside(&format!("{name}.run")), config: path, disk: None }
    }

    /// Another root on the disk of `world`, with the same configuration.
    pub(crate) fn beside(world: &Self, name: &str) -> Self {
        Self::within(world.disk(), name, &fs::read_to_string(&world.config).unwrap())
    }

    /// The disk that is this system's own.
    pub(crate) fn disk(&self) -> &Disk {
        self.disk.as_ref().expect("it has a disk of its own")
    }

    /// A path of the system, from here.
    pub(crate) fn at(&self, path: &str) -> PathBuf {
        self.root.join(path)
    }

    /// The raw upper directory of `/etc`.
    pub(crate) fn upper(&self) -> PathBuf {
        self.run.join("ram/etc/upper")
    }

    /// The store's directory of `/etc`.
    pub(crate) fn store(&self) -> PathBuf {
        self.at("persist/ephemeral-overlay/targets/etc")
    }

    /// The checkpoint files of `/etc`, oldest first.
    pub(crate) fn checkpoints(&self) -> Vec<PathBuf> {
        let Ok(entries) = fs::read_dir(self.store()) else { return Vec::new() };
        let mut files: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
        files.retain(|path| path.extension().is_some_and(|extension| extension == "ckpt"));
        files.sort();
        files
    }

    /// Replaces the configuration.
    pub(crate) fn configure(&self, config: &str) {
        fs::write(&self.config, config).unwrap();
    }

    /// `early`, ready to be run.
    pub(crate) fn early_command(&self, cmdline: &str) -> Command {
        tools::syncd();
        let mut command = Command::new(tools::early());
        command.arg("--root").arg(&self.root).arg("--run-dir").arg(&self.run);
        command.arg("--config").arg(&self.config).args(["--cmdline", cmdline]);
        command
    }

    /// Boots: runs `early` and expects it to do everything.
    pub(crate) fn boot(&self) {
        let output = self.early_command("").output().unwrap();
        assert_eq!(tools::code(&output), 0, "{}", tools::text(&output));
    }

    /// `syncd` on the running system, ready to be run.
    pub(crate) fn syncd_command(&self, args: &[&str]) -> Command {
        let mut command = self.offline_command(args);
        command.arg("--run-dir").arg(&self.run);
        command
    }

    /// `syncd` on this root as a foreign disk, ready to be run.
    pub(crate) fn offline_command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(tools::syncd());
        command.args(args).arg("--root").arg(&self.root).arg("--config").arg(&self.config);
        command
    }

    /// Runs `syncd` on the running system.
    pub(crate) fn syncd(&self, args: &[&str]) -> Output {
        self.syncd_command(args).output().unwrap()
    }

    /// Runs `syncd` on this root as a foreign disk.
    pub(crate) fn offline(&self, args: &[&str]) -> Output {
        self.offline_command(args).output().unwrap()
    }

    /// Takes a checkpoint and expects it to be exact.
    pub(crate) fn checkpoint(&self) {
        expect(&self.syncd(&["checkpoint"]), 0);
    }

    /// Merges as the next early boot does, and expects it to be exact.
    pub(crate) fn merge(&self) {
        expect(&self.offline(&["merge"]), 0);
    }

    /// A power cut: everything in RAM is gone.
    pub(crate) fn cut(&self) {
        unmount_all(&self.root);
        unmount_all(&self.run);
        if self.run.exists() {
            fs::remove_dir_all(&self.run).unwrap();
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        unmount_all(&self.root);
        unmount_all(&self.run);
    }
}

/// Expects an exit status.
pub(crate) fn expect(output: &Output, status: i32) {
    assert_eq!(tools::code(output), status, "{}", tools::text(output));
}

/// Unmounts everything strictly below `path`.
fn unmount_all(path: &Path) {
    let mounts = mountinfo::parse(&fs::read("/proc/self/mountinfo").unwrap());
    for mount in mounts.iter().rev() {
        if mount.mount_point.starts_with(path) && mount.mount_point != path {
            // A test that left something open has failed already; the image goes with the namespace.
            let _gone = unmount(&mount.mount_point, UnmountFlags::DETACH);
        }
    }
}
