//! `syncd generator`, for systemd.generator(7): the mounts of fstab that our overlays and the store lie on stay until
//! the very end of a shutdown.
//!
//! PID 1 stops `var-log.mount` by unmounting what is on top at /var/log, which is our overlay, and what is written from
//! then on goes to the disk below. `x-initrd.mount` in utab does not help a unit that comes from fstab. Without
//! `DefaultDependencies` nothing stops it, and systemd-shutdown unmounts everything, from the top. The store is still
//! written to when ordinary mounts are stopped.
//!
//! It is done in every boot, also with `ephemeral_overlay=off`: that a file system is unmounted some seconds later is
//! harmless, and what is activated by hand in such a boot would be lost without it.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use ephemeral_overlay::Layout;
use ephemeral_overlay::error::At;
use ephemeral_overlay::fstab::{self, Entry};
use ephemeral_overlay::state::BootState;

use super::Outcome;

/// File systems that need the network, which is gone at the very end (`fstype_is_network` of systemd).
const NETWORK: [&str; 18] = [
    "afs",
    "ceph",
    "cifs",
    "davfs",
    "gfs",
    "gfs2",
    "glusterfs",
    "lustre",
    "ncp",
    "ncpfs",
    "nfs",
    "nfs4",
    "ocfs2",
    "orangefs",
    "pvfs2",
    "smb3",
    "smbfs",
    "sshfs",
];

/// Writes the drop-ins into `directory`. There is no journal yet: a failure goes to the kernel's log, too.
pub(crate) fn run(layout: &Layout, directory: &Path) -> anyhow::Result<Outcome> {
    generate(layout, directory).inspect_err(|error| {
        let kmsg = fs::OpenOptions::new().write(true).open("/dev/kmsg");
        // It goes to standard error as well.
        let _said = kmsg.and_then(|mut kmsg| kmsg.write_all(format!("<3>ephemeral-overlay: {error:#}\n").as_bytes()));
    })?;
    Ok(Outcome::Done)
}

fn generate(layout: &Layout, directory: &Path) -> anyhow::Result<()> {
    // With a configuration that does not parse nothing new is mounted, but something may be already: this is run again
    // at every daemon-reload.
    let config = layout.load_config().unwrap_or_default();
    let mut paths = config.overlay.dirs;
    paths.push(config.persist.root);
    if let Ok(Some(boot)) = BootState::read(&layout.boot_state()) {
        paths.extend(boot.targets.into_iter().map(|state| state.path));
        paths.push(boot.persist);
    }
    let fstab = layout.fstab()?;
    for (unit, text) in drop_ins(&paths, &fstab) {
        let directory = directory.join(unit + ".d");
        fs::create_dir_all(&directory).at("mkdir", &directory)?;
        let path = directory.join("ephemeral-overlay.conf");
        fs::write(&path, text).at("write", &path)?;
    }
    Ok(())
}

/// The text of the drop-in of each unit that gets one.
fn drop_ins(paths: &[PathBuf], fstab: &[Entry]) -> BTreeMap<String, String> {
    let below = paths.iter().flat_map(|path| fstab::above(fstab, path));
    below.filter(|entry| !needs_network(entry)).map(|entry| (unit_name(&entry.mount_point), text(entry))).collect()
}

fn needs_network(entry: &Entry) -> bool {
    let kind = entry.fs_type.strip_prefix("fuse.").unwrap_or(&entry.fs_type);
    entry.has("_netdev") || NETWORK.contains(&kind)
}

/// What is switched off with the default dependencies: the ordering at start comes back (systemd.mount(5)).
fn text(entry: &Entry) -> String {
    let mut text =
        "# Made by Ephemeral Overlay: see its README.\n[Unit]\nDefaultDependencies=no\nAfter=local-fs-pre.target\n"
            .to_owned();
    if !entry.has("nofail") {
        text.push_str("Before=local-fs.target\n");
    }
    text
}

/// The mount unit of a path, as `systemd-escape --path --suffix=mount` names it.
fn unit_name(mount_point: &Path) -> String {
    use std::fmt::Write;
    use std::os::unix::ffi::OsStrExt;
    let mut name = String::new();
    for &byte in mount_point.strip_prefix("/").unwrap_or(mount_point).as_os_str().as_bytes() {
        match byte {
            b'/' => name.push('-'),
            b'.' if name.is_empty() => name.push_str("\\x2e"),
            b':' | b'_' | b'.' | b'0'..=b'9' | b'a'..=b'z' | b'A'..=b'Z' => name.push(char::from(byte)),
            other => {
                // Writing to a string cannot fail.
                let _written = write!(name, "\\x{other:02x}");
            }
        }
    }
    name + ".mount"
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The units below some paths, with whether each comes before local-fs.target.
    fn units(fstab: &str) -> Vec<(String, bool)> {
        let paths = ["/etc", "/var/log"].map(PathBuf::from);
        let all = drop_ins(&paths, &fstab::parse(fstab));
        for text in all.values() {
            assert!(text.contains("[Unit]\nDefaultDependencies=no\nAfter=local-fs-pre.target\n"), "{text}");
        }
        all.into_iter().map(|(unit, text)| (unit, text.contains("Before=local-fs.target"))).collect()
    }

    #[test]
    fn every_mount_below_a_target_stays() {
        assert_eq!(units("/dev/a / ext4\n/dev/b /home ext4\n/dev/c /var/log/journal ext4\ntmpfs /tmp tmpfs"), []);
        let expected = [("var-log.mount".to_owned(), false), ("var.mount".to_owned(), true)];
        assert_eq!(units("/dev/a /var/ ext4\n/dev/a /var/log btrfs subvol=@log,nofail"), expected);
    }

    #[test]
    fn what_needs_the_network_is_left_alone() {
        for line in ["host:/log /var/log nfs4", "/dev/nbd0 /var ext4 rw,_netdev", "x /var/log fuse.sshfs"] {
            assert_eq!(units(line), [], "{line}");
        }
        assert_eq!(units("/dev/a /var ext4 x_netdev").len(), 1);
    }

    #[test]
    fn units_are_named_as_systemd_names_them() {
        for (path, name) in [
            ("/var", "var.mount"),
            ("/var/log/my-log x", r"var-log-my\x2dlog\x20x.mount"),
            ("/.snapshots/a.b:c_d", r"\x2esnapshots-a.b:c_d.mount"),
            ("/é\\x", r"\xc3\xa9\x5cx.mount"),
        ] {
            assert_eq!(unit_name(Path::new(path)), name);
        }
    }
}
