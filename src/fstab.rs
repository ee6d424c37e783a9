//! `fstab`, fstab(5): the mounts that will exist later, and so decide which targets are deferred.

use std::path::{Path, PathBuf};

use crate::mountinfo::{Mount, unescape};

/// One line of an fstab.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Where it is mounted.
    pub mount_point: PathBuf,
    /// The type of the file system; may be `auto`.
    pub fs_type: String,
    /// The options, as they are written.
    pub options: String,
}

impl Entry {
    /// Whether `option` is among the options.
    #[must_use]
    pub fn has(&self, option: &str) -> bool {
        self.options.split(',').any(|given| given == option)
    }
}

/// The mounts that an fstab names, in its order; swap and `none` are left out.
#[must_use]
pub fn parse(text: &str) -> Vec<Entry> {
    text.lines()
        .filter_map(|line| {
            let mut fields = line.split_ascii_whitespace();
            let source = fields.next()?;
            let mount_point = fields.next()?;
            let (fs_type, options) = (fields.next().unwrap_or("auto"), fields.next().unwrap_or("defaults"));
            (!source.starts_with('#') && mount_point.starts_with('/')).then(|| Entry {
                mount_point: unescape(mount_point.as_bytes()).components().collect(),
                fs_type: fs_type.to_owned(),
                options: options.to_owned(),
            })
        })
        .collect()
}

/// The mount points of `fstab` that `path` lies on, other than `/`.
pub fn above<'a>(fstab: &'a [Entry], path: &Path) -> impl Iterator<Item = &'a Entry> {
    fstab.iter().filter(|entry| path.starts_with(&entry.mount_point) && entry.mount_point != Path::new("/"))
}

/// The mount point that `path` lies on according to `fstab`, when nothing is mounted there yet.
#[must_use]
pub fn missing<'a>(fstab: &'a [Entry], mounted: &[Mount], path: &Path) -> Option<&'a Path> {
    let innermost = above(fstab, path).max_by_key(|entry| entry.mount_point.components().count())?;
    let is_there = mounted.iter().any(|mount| mount.mount_point == innermost.mount_point && mount.fs_type != "autofs");
    (!is_there).then_some(innermost.mount_point.as_path())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_innermost_mount_point_counts() {
        let text = "# comment\n/dev/a / ext4 defaults 0 1\nUUID=b /var/ btrfs\n\n/dev/c\t/var/log\\040x  ext4 rw,nofail\nswap none swap\n";
        let fstab = parse(text);
        let points: Vec<_> = fstab.iter().map(|entry| entry.mount_point.to_str().unwrap()).collect();
        assert_eq!(points, ["/", "/var", "/var/log x"]);
        assert_eq!((fstab[1].fs_type.as_str(), fstab[1].options.as_str()), ("btrfs", "defaults"));
        assert!(fstab[2].has("nofail") && !fstab[2].has("fail"));

        let mount = |point: &str, fs_type: &str| {
            crate::mountinfo::parse(format!("1 1 0:1 / {point} rw - {fs_type} x rw\n").as_bytes()).remove(0)
        };
        let missing = |mounted: &[Mount], path: &str| {
            missing(&fstab, mounted, Path::new(path)).map(|point| point.to_str().unwrap().to_owned())
        };
        assert_eq!(missing(&[], "/var/log x/a").as_deref(), Some("/var/log x"));
        assert_eq!(missing(&[], "/var/log").as_deref(), Some("/var"));
        assert_eq!(missing(&[], "/etc"), None);
        assert_eq!(missing(&[mount("/var", "btrfs")], "/var/log"), None);
        // Mounted as soon as somebody looks.
        assert_eq!(missing(&[mount("/var", "autofs")], "/var/log").as_deref(), Some("/var"));
        assert_eq!(above(&fstab, Path::new("/var/log x/a")).count(), 2);
    }
}
