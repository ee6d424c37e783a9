//! What the kernel does, and the code relies on: overlayfs, tmpfs and a few calls, measured on bare mounts without any
//! program of ours. docs/overlayfs.md says why each fact matters. A failure here on a new kernel means that the code
//! has to be looked at, not the test.

use std::collections::BTreeSet;
use std::ffi::{CString, OsStr};
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use ephemeral_overlay::attributes::{Handle, Xattrs};
use ephemeral_overlay::overlay::{self, OPAQUE, OPTIONS};
use rustix::fs::{
    CWD, FileType, IFlags, Mode, OFlags, fchmod, inotify, ioctl_getflags, ioctl_setflags, makedev, mknodat, openat,
    statfs,
};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, FsPickFlags, MountAttrFlags, MountFlags, UnmountFlags, fsconfig_create,
    fsconfig_reconfigure, fsconfig_set_string, fsmount, fsopen, fspick, mount, mount_bind, unmount,
};

use crate::tools;
use crate::world::{Disk, Fs};
use test_support::mapped::Mapping;

pub(crate) const TESTS: &[(&str, fn())] = &[
    ("a_new_directory_is_opaque_with_xino_on", a_new_directory_is_opaque_with_xino_on),
    ("a_deletion_in_a_new_directory_holds_with_xino_on", a_deletion_in_a_new_directory_holds_with_xino_on),
    ("opaqueness_is_inherited", opaqueness_is_inherited),
    ("a_deletion_leaves_a_whiteout", a_deletion_leaves_a_whiteout),
    ("nothing_else_looks_like_a_whiteout", nothing_else_looks_like_a_whiteout),
    ("marks_made_by_hand_before_the_mount_count", marks_made_by_hand_before_the_mount_count),
    ("a_directory_of_lower_cannot_be_renamed", a_directory_of_lower_cannot_be_renamed),
    ("a_link_of_lower_is_broken_by_a_write", a_link_of_lower_is_broken_by_a_write),
    ("the_root_of_the_view_is_that_of_upper", the_root_of_the_view_is_that_of_upper),
    ("upper_holds_no_bookkeeping_that_we_do_not_know", upper_holds_no_bookkeeping_that_we_do_not_know),
    ("an_applications_overlay_attribute_is_escaped", an_applications_overlay_attribute_is_escaped),
    ("overlay_attributes_of_lower_are_hidden", overlay_attributes_of_lower_are_hidden),
    ("flags_of_chattr_become_an_attribute", flags_of_chattr_become_an_attribute),
    ("the_first_chattr_on_a_file_of_ext4_fails_and_works", the_first_chattr_on_a_file_of_ext4_fails_and_works),
    ("an_immutable_file_can_be_neither_written_nor_replaced", an_immutable_file_can_be_neither_written_nor_replaced),
    ("xfs_shows_an_acl_twice", xfs_shows_an_acl_twice),
    ("tmpfs_may_lack_user_attributes", tmpfs_may_lack_user_attributes),
    ("a_write_through_a_mapping_changes_no_times", a_write_through_a_mapping_changes_no_times),
    ("a_long_write_is_stamped_before_its_bytes_are_there", a_long_write_is_stamped_before_its_bytes_are_there),
    ("only_a_probe_with_an_index_is_refused_while_the_overlay_lives", only_a_probe_with_an_index_is_refused),
    ("an_open_file_keeps_the_overlay_mounted", an_open_file_keeps_the_overlay_mounted),
    ("statfs_tells_an_overlay", statfs_tells_an_overlay),
    ("a_tmpfs_without_inodes_is_full", a_tmpfs_without_inodes_is_full),
    ("a_tmpfs_grows_while_it_is_used", a_tmpfs_grows_while_it_is_used),
    ("a_new_mount_is_changed_only_through_its_opened_root", a_new_mount_is_changed_only_through_its_opened_root),
    ("a_bind_of_a_read_only_mount_stays_read_only", a_bind_of_a_read_only_mount_stays_read_only),
    ("a_bind_of_a_shared_mount_gets_later_mounts", a_bind_of_a_shared_mount_gets_later_mounts),
    ("what_was_open_before_the_mount_is_lost_to_the_view", what_was_open_before_the_mount_is_lost_to_the_view),
    ("chown_clears_setuid_and_capabilities", chown_clears_setuid_and_capabilities),
    ("renaming_onto_another_name_of_the_same_file_does_nothing", renaming_onto_another_name_of_the_same_file),
];

/// Options that differ from ours in `xino` alone.
const WITHOUT_XINO: [(&str, &str); 4] =
    [("redirect_dir", "nofollow"), ("metacopy", "off"), ("index", "off"), ("xino", "off")];

/// A tmpfs.
struct Ram(tempfile::TempDir);

impl Ram {
    fn new(options: &str) -> Self {
        let directory = tempfile::Builder::new().prefix("eo-fact-").tempdir().unwrap();
        tools::run("mount", &["-t", "tmpfs", "-o", options, "fact", directory.path().to_str().unwrap()]);
        Self(directory)
    }

    fn at(&self, path: &str) -> PathBuf {
        self.0.path().join(path)
    }
}

impl Drop for Ram {
    fn drop(&mut self) {
        // Nothing, when a test has done it.
        let _gone = unmount(self.0.path(), UnmountFlags::DETACH);
    }
}

/// An overlay with its upper directory on tmpfs and its lower one on a disk.
struct Overlay {
    ram: Ram,
    disk: Disk,
}

impl Overlay {
    /// With our options, on ext4.
    fn new(populate: impl Fn(&Path)) -> Self {
        Self::with(&OPTIONS, Fs::Ext4, populate)
    }

    fn with(options: &[(&str, &str)], fs: Fs, populate: impl Fn(&Path)) -> Self {
        let disk = Disk::new(fs, if fs == Fs::Xfs { 320 } else { 32 });
        let overlay = Self { ram: Ram::new("mode=0755"), disk };
        for directory in [overlay.lower(""), overlay.upper(""), overlay.view(""), overlay.ram.at("work")] {
            fs::create_dir(directory).unwrap();
        }
        populate(&overlay.lower(""));
        overlay.mount(options).unwrap();
        overlay
    }

    fn mount(&self, options: &[(&str, &str)]) -> rustix::io::Result<()> {
        let text = |path: PathBuf| path.to_str().unwrap().to_owned();
        let mut data = format!(
            "lowerdir={},upperdir={},workdir={}",
            text(self.lower("")),
            text(self.upper("")),
            text(self.ram.at("work"))
        );
        for (key, value) in options {
            data = format!("{data},{key}={value}");
        }
        mount("fact", self.view(""), "overlay", MountFlags::empty(), CString::new(data).unwrap().as_c_str())
    }

    fn unmount(&self, flags: UnmountFlags) -> rustix::io::Result<()> {
        unmount(self.view(""), flags)
    }

    fn lower(&self, path: &str) -> PathBuf {
        join(&self.disk.path().join("lower"), path)
    }

    fn upper(&self, path: &str) -> PathBuf {
        join(&self.ram.at("upper"), path)
    }

    fn view(&self, path: &str) -> PathBuf {
        join(&self.ram.at("view"), path)
    }

    /// Makes the kernel forget what it has in its cache of names, for this overlay alone.
    fn forget(&self) {
        let context = fspick(CWD, self.view(""), FsPickFlags::FSPICK_CLOEXEC).unwrap();
        fsconfig_reconfigure(context.as_fd()).unwrap();
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        // Nothing, when a test has done it.
        let _gone = self.unmount(UnmountFlags::DETACH);
    }
}

fn join(directory: &Path, path: &str) -> PathBuf {
    if path.is_empty() { directory.to_path_buf() } else { directory.join(path) }
}

/// The attributes of an object, which is not followed if it is a symlink.
fn xattrs(path: &Path) -> Xattrs {
    let parent = File::open(path.parent().unwrap()).unwrap();
    Handle::child(parent.as_fd(), path.file_name().unwrap()).read_all().unwrap()
}

fn xattr(path: &Path, name: &str) -> Option<Vec<u8>> {
    xattrs(path).remove(name.as_bytes())
}

fn set_xattr(path: &Path, name: &str, value: &[u8]) -> rustix::io::Result<()> {
    let parent = File::open(path.parent().unwrap()).unwrap();
    Handle::child(parent.as_fd(), path.file_name().unwrap()).write(name.as_bytes(), value)
}

fn is_whiteout(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|stat| stat.file_type().is_char_device() && stat.rdev() == 0)
}

fn names(path: &Path) -> BTreeSet<String> {
    fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

fn errno<T: std::fmt::Debug>(result: std::io::Result<T>) -> Option<Errno> {
    Errno::from_io_error(&result.unwrap_err())
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().mode() & 0o7777
}

fn a_new_directory_is_opaque_with_xino_on() {
    let overlay = Overlay::new(|lower| fs::create_dir(lower.join("old")).unwrap());
    for path in ["new", "old/new"] {
        fs::create_dir(overlay.view(path)).unwrap();
        assert_eq!(xattr(&overlay.upper(path), OPAQUE), Some(b"y".to_vec()), "{path}");
    }
    assert_eq!(xattr(&overlay.upper("old"), OPAQUE), None, "a directory that lower has");
    let overlay = Overlay::with(&WITHOUT_XINO, Fs::Ext4, |_| {});
    fs::create_dir(overlay.view("new")).unwrap();
    assert_eq!(xattr(&overlay.upper("new"), OPAQUE), None, "xino=on is no longer what makes it so");
}

fn a_deletion_in_a_new_directory_holds_with_xino_on() {
    for (options, comes_back) in [(&OPTIONS, false), (&WITHOUT_XINO, true)] {
        let overlay = Overlay::with(options, Fs::Ext4, |_| {});
        fs::create_dir(overlay.view("new")).unwrap();
        fs::write(overlay.view("new/file"), "in RAM").unwrap();
        // What a program that writes to lower while the overlay is mounted would do.
        fs::create_dir(overlay.lower("new")).unwrap();
        fs::write(overlay.lower("new/file"), "on disk").unwrap();
        fs::remove_file(overlay.view("new/file")).unwrap();
        assert!(!overlay.upper("new/file").exists(), "there is no whiteout in either case");
        assert!(!overlay.view("new/file").exists());
        overlay.forget();
        assert_eq!(overlay.view("new/file").exists(), comes_back, "{options:?}");
    }
}

fn opaqueness_is_inherited() {
    let overlay = Overlay::new(|lower| {
        fs::create_dir_all(lower.join("dir/sub")).unwrap();
        fs::write(lower.join("dir/sub/old"), "on disk").unwrap();
    });
    fs::remove_dir_all(overlay.view("dir")).unwrap();
    fs::create_dir_all(overlay.view("dir/sub")).unwrap();
    fs::write(overlay.view("dir/sub/new"), "in RAM").unwrap();
    fs::write(overlay.view("dir/sub/brief"), "in RAM").unwrap();
    fs::remove_file(overlay.view("dir/sub/brief")).unwrap();
    overlay.forget();
    assert_eq!(xattr(&overlay.upper("dir"), OPAQUE), Some(b"y".to_vec()));
    assert_eq!(xattr(&overlay.upper("dir/sub"), OPAQUE), None, "there is a mark below an opaque directory");
    assert_eq!(names(&overlay.view("dir/sub")), ["new".to_owned()].into());
    assert_eq!(names(&overlay.upper("dir/sub")), ["new".to_owned()].into(), "a deletion is more than absence there");
}

fn a_deletion_leaves_a_whiteout() {
    let overlay = Overlay::new(|lower| {
        for name in ["one", "two", "three"] {
            fs::write(lower.join(name), name).unwrap();
        }
        fs::create_dir(lower.join("dir")).unwrap();
    });
    fs::remove_file(overlay.view("one")).unwrap();
    fs::rename(overlay.view("two"), overlay.view("moved")).unwrap();
    fs::remove_dir(overlay.view("dir")).unwrap();
    for name in ["one", "two", "dir"] {
        assert!(is_whiteout(&overlay.upper(name)), "{name}");
        assert_eq!(xattrs(&overlay.upper(name)), Xattrs::new(), "{name}");
    }
    assert!(!is_whiteout(&overlay.upper("moved")) && !overlay.upper("three").exists());
    // They are names of one inode: a link count above 1 says nothing of a whiteout.
    let stat = |name| fs::symlink_metadata(overlay.upper(name)).unwrap();
    assert_eq!(stat("one").ino(), stat("dir").ino());
    assert!(stat("one").nlink() > 1);
}

fn nothing_else_looks_like_a_whiteout() {
    let overlay = Overlay::new(|_| {});
    let make =
        |name, device| mknodat(CWD, overlay.view(name), FileType::CharacterDevice, Mode::from_raw_mode(0o600), device);
    assert_eq!(make("zero", makedev(0, 0)), Err(Errno::PERM));
    make("null", makedev(1, 3)).unwrap();
    assert!(!is_whiteout(&overlay.upper("null")));
    assert_eq!(names(&overlay.upper("")), ["null".to_owned()].into());
}

fn marks_made_by_hand_before_the_mount_count() {
    let overlay = Overlay::new(|lower| {
        fs::create_dir(lower.join("dir")).unwrap();
        for name in ["file", "kept", "dir/old"] {
            fs::write(lower.join(name), "on disk").unwrap();
        }
    });
    overlay.unmount(UnmountFlags::empty()).unwrap();
    mknodat(CWD, overlay.upper("file"), FileType::CharacterDevice, Mode::empty(), makedev(0, 0)).unwrap();
    fs::create_dir(overlay.upper("dir")).unwrap();
    set_xattr(&overlay.upper("dir"), OPAQUE, b"y").unwrap();
    fs::write(overlay.upper("dir/new"), "in RAM").unwrap();
    overlay.mount(&OPTIONS).unwrap();
    assert_eq!(names(&overlay.view("")), ["dir", "kept"].map(str::to_owned).into());
    assert_eq!(names(&overlay.view("dir")), ["new".to_owned()].into());
    assert!(!overlay.view("file").exists());
}

fn a_directory_of_lower_cannot_be_renamed() {
    let overlay = Overlay::new(|lower| {
        fs::create_dir(lower.join("dir")).unwrap();
        fs::write(lower.join("dir/file"), "x").unwrap();
    });
    // So that there are no redirects to be understood: whoever moves it copies it.
    assert_eq!(errno(fs::rename(overlay.view("dir"), overlay.view("other"))), Some(Errno::XDEV));
    fs::write(overlay.view("dir/new"), "x").unwrap();
    assert_eq!(errno(fs::rename(overlay.view("dir"), overlay.view("other"))), Some(Errno::XDEV), "merged");
    fs::rename(overlay.view("dir/file"), overlay.view("file")).unwrap();
    fs::create_dir(overlay.view("fresh")).unwrap();
    fs::rename(overlay.view("fresh"), overlay.view("renamed")).unwrap();
    assert_eq!(xattr(&overlay.upper("renamed"), OPAQUE), Some(b"y".to_vec()));
    assert_eq!(xattr(&overlay.upper("renamed"), "trusted.overlay.redirect"), None);
}

fn a_link_of_lower_is_broken_by_a_write() {
    let overlay = Overlay::new(|lower| {
        fs::write(lower.join("one"), "old").unwrap();
        fs::hard_link(lower.join("one"), lower.join("two")).unwrap();
    });
    fs::write(overlay.view("one"), "new").unwrap();
    overlay.forget();
    assert_eq!(fs::read_to_string(overlay.view("two")).unwrap(), "old");
    assert_eq!(fs::metadata(overlay.upper("one")).unwrap().nlink(), 1);
    assert!(!overlay.upper("two").exists());
    // Names that were linked in RAM stay one file.
    fs::hard_link(overlay.view("one"), overlay.view("three")).unwrap();
    fs::write(overlay.view("three"), "newer").unwrap();
    assert_eq!(fs::read_to_string(overlay.view("one")).unwrap(), "newer");
    assert_eq!(fs::metadata(overlay.upper("one")).unwrap().nlink(), 2);
}

fn the_root_of_the_view_is_that_of_upper() {
    let overlay = Overlay::new(|lower| {
        fs::set_permissions(lower, fs::Permissions::from_mode(0o751)).unwrap();
        chown(lower, Some(7), Some(8)).unwrap();
        set_xattr(lower, "trusted.mine", b"x").unwrap();
    });
    // Nothing copies lower's root up: whoever mounts has to do it.
    let stat = fs::metadata(overlay.view("")).unwrap();
    assert_eq!((stat.mode() & 0o7777, stat.uid(), stat.gid()), (mode(&overlay.upper("")), 0, 0));
    assert_eq!(xattr(&overlay.view(""), "trusted.mine"), None);
}

/// Everything at and below a directory.
fn walk(path: &Path, all: &mut Vec<PathBuf>) {
    all.push(path.to_path_buf());
    if fs::symlink_metadata(path).unwrap().is_dir() {
        for name in names(path) {
            walk(&path.join(name), all);
        }
    }
}

fn upper_holds_no_bookkeeping_that_we_do_not_know() {
    let overlay = Overlay::new(|lower| {
        fs::create_dir_all(lower.join("dir/deep")).unwrap();
        for name in ["file", "moved", "linked", "one", "dir/deep/file", "gone"] {
            fs::write(lower.join(name), "on disk").unwrap();
        }
        fs::hard_link(lower.join("one"), lower.join("two")).unwrap();
        std::os::unix::fs::symlink("file", lower.join("symlink")).unwrap();
        mknodat(CWD, lower.join("fifo"), FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
    });
    let at = |path| overlay.view(path);
    File::options().append(true).open(at("file")).unwrap().write_all(b"more").unwrap();
    fs::rename(at("moved"), at("dir/moved")).unwrap();
    fs::hard_link(at("linked"), at("dir/link")).unwrap();
    fs::write(at("one"), "in RAM").unwrap();
    std::os::unix::fs::lchown(at("symlink"), Some(5), Some(5)).unwrap();
    chown(at("fifo"), Some(5), Some(5)).unwrap();
    fs::set_permissions(at("dir/deep"), fs::Permissions::from_mode(0o700)).unwrap();
    fs::write(at("dir/deep/file"), "in RAM").unwrap();
    fs::remove_file(at("gone")).unwrap();
    fs::create_dir(at("gone")).unwrap();
    fs::create_dir(at("fresh")).unwrap();
    fs::rename(at("fresh"), at("dir/fresh")).unwrap();

    let mut all = Vec::new();
    walk(&overlay.upper(""), &mut all);
    let mut seen = BTreeSet::new();
    for path in &all {
        let found = xattrs(path);
        seen.extend(found.keys().map(|name| String::from_utf8(name.clone()).unwrap()));
        let artefacts = overlay::interpret(found).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        assert_eq!(artefacts.xattrs, Xattrs::new(), "{}", path.display());
    }
    let known = ["impure", "opaque", "origin", "uuid"].map(|name| format!("trusted.overlay.{name}"));
    assert_eq!(seen, known.into());
}

fn an_applications_overlay_attribute_is_escaped() {
    let overlay = Overlay::new(|lower| fs::write(lower.join("file"), "x").unwrap());
    for name in ["file", "new"] {
        fs::write(overlay.view(name), "y").unwrap();
        set_xattr(&overlay.view(name), "trusted.overlay.opaque", b"mine").unwrap();
        let raw = xattrs(&overlay.upper(name));
        assert_eq!(raw.get(b"trusted.overlay.overlay.opaque".as_slice()), Some(&b"mine".to_vec()), "{raw:?}");
        assert!(!raw.contains_key(OPAQUE.as_bytes()), "{raw:?}");
        assert_eq!(xattr(&overlay.view(name), "trusted.overlay.opaque"), Some(b"mine".to_vec()));
    }
}

fn overlay_attributes_of_lower_are_hidden() {
    let overlay = Overlay::new(|lower| {
        fs::write(lower.join("file"), "x").unwrap();
        set_xattr(&lower.join("file"), "trusted.overlay.left", b"over").unwrap();
        set_xattr(&lower.join("file"), "trusted.mine", b"x").unwrap();
    });
    let seen = || xattrs(&overlay.view("file")).into_keys().collect::<Vec<_>>();
    assert_eq!(seen(), [b"trusted.mine"]);
    // It is not copied up either.
    File::options().append(true).open(overlay.view("file")).unwrap().write_all(b"more").unwrap();
    assert_eq!(seen(), [b"trusted.mine"]);
    assert_eq!(xattr(&overlay.upper("file"), "trusted.overlay.left"), None);
}

fn flags(path: &Path) -> IFlags {
    ioctl_getflags(File::open(path).unwrap()).unwrap() & (IFlags::IMMUTABLE | IFlags::APPEND)
}

fn set_flags(path: &Path, wanted: IFlags) {
    let file = File::open(path).unwrap();
    let others = ioctl_getflags(&file).unwrap() - (IFlags::IMMUTABLE | IFlags::APPEND);
    ioctl_setflags(&file, others | wanted).unwrap();
}

fn flags_of_chattr_become_an_attribute() {
    let overlay = Overlay::new(|lower| {
        for name in ["i", "a", "cleared"] {
            fs::write(lower.join(name), "x").unwrap();
        }
        set_flags(&lower.join("cleared"), IFlags::IMMUTABLE);
    });
    for (name, flag) in [("i", IFlags::IMMUTABLE), ("a", IFlags::APPEND)] {
        // Copied up first, see the next test.
        drop(File::options().append(true).open(overlay.view(name)).unwrap());
        set_flags(&overlay.view(name), flag);
        assert_eq!(flags(&overlay.view(name)), flag);
        assert_eq!(xattr(&overlay.upper(name), "trusted.overlay.protattr"), Some(name.into()));
        assert_eq!(flags(&overlay.upper(name)), IFlags::empty(), "the raw file has it too");
        assert_eq!(flags(&overlay.lower(name)), IFlags::empty(), "it went through to lower");
    }
    assert_eq!(errno(OpenOptions::new().write(true).open(overlay.view("i"))), Some(Errno::PERM));
    // Cleared through the overlay, it stays on lower: a merge has to take it away.
    assert_eq!(flags(&overlay.view("cleared")), IFlags::IMMUTABLE);
    ioctl_setflags(File::open(overlay.view("cleared")).unwrap(), IFlags::empty()).unwrap();
    assert_eq!(flags(&overlay.view("cleared")), IFlags::empty());
    assert_eq!(xattr(&overlay.upper("cleared"), "trusted.overlay.protattr").unwrap_or_default(), b"");
    assert_eq!(flags(&overlay.lower("cleared")), IFlags::IMMUTABLE);
}

fn the_first_chattr_on_a_file_of_ext4_fails_and_works() {
    let overlay = Overlay::new(|lower| fs::write(lower.join("file"), "x").unwrap());
    // What chattr does: it passes on the flags that it found, of which tmpfs does not know all.
    let file = File::open(overlay.view("file")).unwrap();
    let found = ioctl_getflags(&file).unwrap();
    assert_eq!(ioctl_setflags(&file, found | IFlags::IMMUTABLE), Err(Errno::NOTSUP));
    assert_eq!(flags(&overlay.view("file")), IFlags::IMMUTABLE);
    assert_eq!(xattr(&overlay.upper("file"), "trusted.overlay.protattr"), Some(b"i".to_vec()));
    set_flags(&overlay.view("file"), IFlags::empty());
    assert_eq!(flags(&overlay.view("file")), IFlags::empty(), "the second one");
}

fn an_immutable_file_can_be_neither_written_nor_replaced() {
    let disk = Disk::new(Fs::Ext4, 32);
    let at = |name: &str| disk.path().join(name);
    fs::write(at("file"), "x").unwrap();
    fs::write(at("other"), "y").unwrap();
    set_flags(&at("file"), IFlags::IMMUTABLE);
    assert_eq!(errno(OpenOptions::new().write(true).open(at("file"))), Some(Errno::PERM));
    assert_eq!(errno(fs::rename(at("other"), at("file"))), Some(Errno::PERM));
    assert_eq!(errno(fs::remove_file(at("file"))), Some(Errno::PERM));
    fs::create_dir(at("dir")).unwrap();
    set_flags(&at("dir"), IFlags::APPEND);
    fs::write(at("dir/new"), "z").unwrap();
    assert_eq!(errno(fs::remove_file(at("dir/new"))), Some(Errno::PERM));
    set_flags(&at("dir"), IFlags::IMMUTABLE);
    assert_eq!(errno(File::create(at("dir/newer"))), Some(Errno::PERM));
}

/// An access control list (version 2, `linux/posix_acl_xattr.h`) with one named user.
fn acl() -> Vec<u8> {
    let mut bytes = 2u32.to_le_bytes().to_vec();
    let entries = [(1u16, 6u16, u32::MAX), (2, 4, 4321), (4, 4, u32::MAX), (16, 4, u32::MAX), (32, 4, u32::MAX)];
    for (tag, permissions, id) in entries {
        bytes.extend_from_slice(&tag.to_le_bytes());
        bytes.extend_from_slice(&permissions.to_le_bytes());
        bytes.extend_from_slice(&id.to_le_bytes());
    }
    bytes
}

fn xfs_shows_an_acl_twice() {
    let overlay = Overlay::with(&OPTIONS, Fs::Xfs, |lower| {
        fs::write(lower.join("file"), "x").unwrap();
        set_xattr(&lower.join("file"), "system.posix_acl_access", &acl()).unwrap();
    });
    let twice = [b"system.posix_acl_access".to_vec(), b"trusted.SGI_ACL_FILE".to_vec()];
    assert_eq!(xattrs(&overlay.lower("file")).into_keys().collect::<Vec<_>>(), twice);
    // Copied up, the second one is an attribute like any other.
    File::options().append(true).open(overlay.view("file")).unwrap().write_all(b"more").unwrap();
    let raw = xattrs(&overlay.upper("file"));
    assert!(twice.iter().all(|name| raw.contains_key(name)), "{raw:?}");
    let data = overlay::interpret(raw).unwrap().xattrs;
    assert_eq!(data.into_keys().collect::<Vec<_>>(), twice[..1]);
}

fn tmpfs_may_lack_user_attributes() {
    let overlay = Overlay::new(|lower| {
        fs::write(lower.join("file"), "x").unwrap();
        set_xattr(&lower.join("file"), "user.a", b"1").unwrap();
        set_xattr(&lower.join("file"), "trusted.b", b"2").unwrap();
    });
    let ram = overlay.ram.at("probe");
    fs::write(&ram, "x").unwrap();
    set_xattr(&ram, "trusted.b", b"2").unwrap();
    let has_them = match set_xattr(&ram, "user.a", b"1") {
        Ok(()) => true,
        Err(Errno::NOTSUP) => false,
        Err(error) => panic!("setxattr user.a: {error}"),
    };
    // 6.6 brought them.
    let release = rustix::system::uname().release().to_str().unwrap().to_owned();
    let numbers: Vec<u32> = release.split(['.', '-']).map_while(|part| part.parse().ok()).take(2).collect();
    assert_eq!(has_them, numbers >= vec![6, 6], "kernel {release}");
    // Without them a copy-up goes well and drops them silently.
    File::options().append(true).open(overlay.view("file")).unwrap().write_all(b"more").unwrap();
    let found = xattrs(&overlay.view("file"));
    assert_eq!(found.contains_key(b"user.a".as_slice()), has_them);
    assert!(found.contains_key(b"trusted.b".as_slice()));
}

type Times = (i64, i64, i64, i64);

fn times(path: &Path) -> Times {
    let stat = fs::metadata(path).unwrap();
    (stat.mtime(), stat.mtime_nsec(), stat.ctime(), stat.ctime_nsec())
}

/// What inotify has to say.
fn events(inotify: &OwnedFd) -> Vec<inotify::ReadFlags> {
    let mut buffer = [MaybeUninit::uninit(); 4096];
    let mut reader = inotify::Reader::new(inotify, &mut buffer);
    std::iter::from_fn(|| match reader.next() {
        Ok(event) => Some(event.events()),
        Err(Errno::AGAIN) => None,
        Err(error) => panic!("read inotify: {error}"),
    })
    .collect()
}

fn a_long_write_is_stamped_before_its_bytes_are_there() {
    const LENGTH: usize = 128 << 20;
    let overlay = Overlay::new(|_| {});
    let path = overlay.view("file");
    fs::write(&path, vec![0; LENGTH]).unwrap();
    let file = File::options().read(true).write(true).open(&path).unwrap();
    let byte = |at: usize| {
        let mut byte = [0];
        file.read_exact_at(&mut byte, at as u64).unwrap();
        byte[0]
    };
    // Whoever looks may be held up until the write is over.
    let was_seen = (1..20).any(|new| {
        let bytes = vec![new; LENGTH];
        std::thread::scope(|threads| {
            threads.spawn(|| assert_eq!(file.write_at(&bytes, 0).unwrap(), LENGTH));
            while byte(0) != new {}
            let early = times(&path);
            let in_the_midst = byte(LENGTH - 1) != new;
            while byte(LENGTH - 1) != new {}
            assert_eq!(times(&path), early, "the end of a write changed the times");
            in_the_midst
        })
    });
    assert!(was_seen, "no write was seen in the midst");
}

fn a_write_through_a_mapping_changes_no_times() {
    let overlay = Overlay::new(|lower| fs::write(lower.join("old"), "old!").unwrap());
    fs::write(overlay.view("new"), "old!").unwrap();
    fs::write(overlay.ram.at("raw"), "old!").unwrap();
    let cases = [
        (overlay.view("old"), overlay.upper("old")),
        (overlay.view("new"), overlay.upper("new")),
        (overlay.ram.at("raw"), overlay.ram.at("raw")),
    ];
    for (path, raw) in cases {
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let watch = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK).unwrap();
        let mapping = Mapping::new(&file, 4);
        // The first write makes the page writable, and that changes the times.
        mapping.write(b"once");
        inotify::add_watch(&watch, &raw, inotify::WatchFlags::ALL_EVENTS).unwrap();
        inotify::add_watch(&watch, raw.parent().unwrap(), inotify::WatchFlags::ALL_EVENTS).unwrap();
        let before = (times(&path), times(&raw));
        std::thread::sleep(std::time::Duration::from_millis(20));
        mapping.write(b"new!");
        assert_eq!((times(&path), times(&raw)), before, "{}", path.display());
        assert_eq!(events(&watch), [], "{}", path.display());
        let mut found = [0; 4];
        File::open(&raw).unwrap().read_exact_at(&mut found, 0).unwrap();
        assert_eq!(&found, b"new!");
        // Not even when the mapping goes.
        drop(mapping);
        drop(file);
        assert_eq!((times(&path), times(&raw)), before, "{}", path.display());
    }
}

/// Asks the kernel for another overlay on the same upper directory.
fn probe(overlay: &Overlay, index: &str) -> rustix::io::Result<()> {
    let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).unwrap();
    let directories =
        [("lowerdir", overlay.lower("")), ("upperdir", overlay.upper("")), ("workdir", overlay.ram.at("work"))];
    for (key, path) in directories {
        fsconfig_set_string(context.as_fd(), key, path).unwrap();
    }
    fsconfig_set_string(context.as_fd(), "index", index).unwrap();
    fsconfig_create(context.as_fd())
}

fn only_a_probe_with_an_index_is_refused() {
    let overlay = Overlay::new(|lower| fs::write(lower.join("file"), "x").unwrap());
    assert_eq!(probe(&overlay, "on"), Err(Errno::BUSY), "mounted");
    assert_eq!(probe(&overlay, "off"), Ok(()), "without an index the kernel only warns");
    let file = File::open(overlay.view("file")).unwrap();
    overlay.unmount(UnmountFlags::DETACH).unwrap();
    assert_eq!(probe(&overlay, "on"), Err(Errno::BUSY), "lazily unmounted, with an open file");
    drop(file);
    assert_eq!(probe(&overlay, "on"), Ok(()), "nothing uses it any more");
}

fn an_open_file_keeps_the_overlay_mounted() {
    let overlay = Overlay::new(|lower| fs::write(lower.join("file"), "x").unwrap());
    let unmount = || overlay.unmount(UnmountFlags::empty());
    for flags in [OFlags::RDONLY, OFlags::PATH] {
        let file = openat(CWD, overlay.view("file"), flags | OFlags::CLOEXEC, Mode::empty()).unwrap();
        assert_eq!(unmount(), Err(Errno::BUSY), "{flags:?}");
        drop(file);
    }
    let file = File::options().read(true).write(true).open(overlay.view("file")).unwrap();
    let mapping = Mapping::new(&file, 1);
    drop(file);
    assert_eq!(unmount(), Err(Errno::BUSY), "a mapping of a closed file");
    drop(mapping);
    assert_eq!(unmount(), Ok(()));
}

fn statfs_tells_an_overlay() {
    let overlay = Overlay::new(|_| {});
    let kind = |path: PathBuf| u64::try_from(statfs(path).unwrap().f_type);
    // OVERLAYFS_SUPER_MAGIC, linux/magic.h
    assert_eq!(kind(overlay.view("")), Ok(0x794c_7630));
    assert_ne!(kind(overlay.lower("")), Ok(0x794c_7630));
    assert_ne!(kind(overlay.upper("")), Ok(0x794c_7630));
}

/// Creates empty files until it fails; how many there were, and why it failed.
fn fill_with_files(directory: &Path) -> (usize, Option<Errno>) {
    for number in 0.. {
        if let Err(error) = File::create(directory.join(format!("f{number}"))) {
            return (number, Errno::from_io_error(&error));
        }
    }
    unreachable!("there is no last number")
}

fn a_tmpfs_without_inodes_is_full() {
    let ram = Ram::new("size=16m,nr_inodes=64");
    let (made, error) = fill_with_files(&ram.at(""));
    assert_eq!(error, Some(Errno::NOSPC));
    assert!((32..64).contains(&made), "{made}");
    // There is room for contents nevertheless.
    fs::write(ram.at("f0"), [b'x'; 4096]).unwrap();
}

fn a_tmpfs_grows_while_it_is_used() {
    let ram = Ram::new("size=1m,nr_inodes=64");
    let mut file = File::create(ram.at("file")).unwrap();
    let block = vec![b'x'; 1 << 16];
    let error = (0..100).find_map(|_| file.write_all(&block).err()).unwrap();
    assert_eq!(error.kind(), ErrorKind::StorageFull);
    let (made, error) = fill_with_files(&ram.at(""));
    assert_eq!(error, Some(Errno::NOSPC));
    let resize = |options: &str| {
        let context = fspick(CWD, ram.at(""), FsPickFlags::FSPICK_CLOEXEC).unwrap();
        for option in options.split(',') {
            let (key, value) = option.split_once('=').unwrap();
            fsconfig_set_string(context.as_fd(), key, value)?;
        }
        fsconfig_reconfigure(context.as_fd())
    };
    resize("size=4m,nr_inodes=256").unwrap();
    file.write_all(&block).unwrap();
    File::create(ram.at(&format!("f{made}"))).unwrap();
    assert_eq!(resize("size=512k,nr_inodes=256"), Err(Errno::INVAL), "below what is used");
}

fn a_new_mount_is_changed_only_through_its_opened_root() {
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).unwrap();
    fsconfig_create(context.as_fd()).unwrap();
    let detached = fsmount(context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty()).unwrap();
    // It is an O_PATH descriptor.
    assert_eq!(fchmod(&detached, Mode::RWXU), Err(Errno::BADF));
    let root = openat(&detached, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).unwrap();
    fchmod(&root, Mode::RWXU).unwrap();
    // Nothing of it is to be seen, and nothing is left when it is closed.
    let device = rustix::fs::fstat(&root).unwrap().st_dev;
    let device = format!(" {}:{} ", rustix::fs::major(device), rustix::fs::minor(device));
    assert!(!fs::read_to_string("/proc/self/mountinfo").unwrap().contains(&device));
}

fn a_bind_of_a_read_only_mount_stays_read_only() {
    let disk = Disk::new(Fs::Ext4, 32);
    let ram = Ram::new("mode=0755");
    let (disk, bind) = (disk.path(), ram.at("bind"));
    fs::create_dir(&bind).unwrap();
    let (disk_text, bind_text) = (disk.to_str().unwrap(), bind.to_str().unwrap());
    tools::run("mount", &["-o", "remount,ro", disk_text]);
    mount_bind(&disk, &bind).unwrap();
    tools::run("mount", &["-o", "remount,rw", disk_text]);
    fs::write(disk.join("file"), "x").unwrap();
    assert_eq!(errno(File::create(bind.join("other"))), Some(Errno::ROFS));
    tools::run("mount", &["-o", "remount,bind,rw", bind_text]);
    File::create(bind.join("other")).unwrap();
    unmount(&bind, UnmountFlags::DETACH).unwrap();
}

fn a_bind_of_a_shared_mount_gets_later_mounts() {
    let ram = Ram::new("mode=0755");
    let at = |name: &str| ram.at(name);
    for name in ["shared", "peer", "private"] {
        fs::create_dir(at(name)).unwrap();
    }
    let run = |arguments: &[&str]| tools::run("mount", arguments);
    let text = |path: PathBuf| path.to_str().unwrap().to_owned();
    run(&["-t", "tmpfs", "fact", &text(at("shared"))]);
    run(&["--make-shared", &text(at("shared"))]);
    fs::create_dir(at("shared/etc")).unwrap();
    for name in ["peer", "private"] {
        mount_bind(at("shared"), at(name)).unwrap();
    }
    run(&["--make-private", &text(at("private"))]);
    run(&["-t", "tmpfs", "later", &text(at("shared/etc"))]);
    fs::write(at("shared/etc/file"), "x").unwrap();
    assert!(at("peer/etc/file").exists(), "nothing was propagated");
    assert!(!at("private/etc/file").exists(), "it was propagated into a private bind");
}

fn what_was_open_before_the_mount_is_lost_to_the_view() {
    let overlay = Overlay::new(|lower| fs::write(lower.join("file"), "1").unwrap());
    let append = |path: PathBuf| OpenOptions::new().append(true).open(path).unwrap();
    let mut before = append(overlay.lower("file"));
    before.write_all(b"2").unwrap();
    assert_eq!(fs::read_to_string(overlay.view("file")).unwrap(), "12", "lower shows through");
    append(overlay.view("file")).write_all(b"3").unwrap();
    before.write_all(b"4").unwrap();
    assert_eq!(fs::read_to_string(overlay.view("file")).unwrap(), "123");
    assert_eq!(fs::read_to_string(overlay.lower("file")).unwrap(), "124");
}

fn chown_clears_setuid_and_capabilities() {
    // Version 2, effective: cap_net_bind_service.
    let mut capability = vec![1, 0, 0, 2, 0, 4, 0, 0];
    capability.extend_from_slice(&[0; 12]);
    let disk = Disk::new(Fs::Ext4, 32);
    let ram = Ram::new("mode=0755");
    for path in [disk.path().join("file"), ram.at("file")] {
        fs::write(&path, "x").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o6755)).unwrap();
        set_xattr(&path, "security.capability", &capability).unwrap();
        assert_eq!(mode(&path), 0o6755, "a capability changes no mode");
        chown(&path, Some(1000), Some(1000)).unwrap();
        assert_eq!(mode(&path), 0o755, "{}", path.display());
        assert_eq!(xattr(&path, "security.capability"), None, "{}", path.display());
    }
}

fn renaming_onto_another_name_of_the_same_file() {
    let disk = Disk::new(Fs::Ext4, 32);
    let ram = Ram::new("mode=0755");
    for directory in [disk.path(), ram.at("")] {
        fs::write(directory.join("one"), "x").unwrap();
        fs::hard_link(directory.join("one"), directory.join("two")).unwrap();
        fs::rename(directory.join("one"), directory.join("two")).unwrap();
        let both: BTreeSet<_> = ["one", "two"].map(str::to_owned).into();
        assert!(names(&directory).is_superset(&both), "{}", directory.display());
        assert!(directory.join(OsStr::new("one")).exists());
    }
}
