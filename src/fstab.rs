//! `fstab`, fstab(5): the mounts that will exist later, and so decide which targets are deferred.

use std::path::{Path, PathBuf};

use crate::mountinfo::unescape;

/// The mount points that an fstab names, in its order; swap and `none` are left out.
#[must_use]
pub fn mount_points(text: &str) -> Vec<PathBuf> {
    text.lines()
        .filter_map(|line| {
            let mut fields = line.split_ascii_whitespace();
            let source = fields.next()?;
            let mount_point = fields.next()?;
            (!source.starts_with('#') && mount_point.starts_with('/')).then(|| unescape(mount_point.as_bytes()))
        })
        .collect()
}

/// The innermost of `mount_points` that `path` lies on, other than `/`.
#[must_use]
pub fn covering<'a>(mount_points: &'a [PathBuf], path: &Path) -> Option<&'a PathBuf> {
    mount_points
        .iter()
        .filter(|mount_point| path.starts_with(mount_point) && mount_point.as_path() != Path::new("/"))
        .max_by_key(|mount_point| mount_point.components().count())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_innermost_mount_point_counts() {
        let text = "# comment\n/dev/a / ext4 defaults 0 1\nUUID=b /var btrfs\n\n/dev/c\t/var/log\\040x  ext4\nswap none swap\n";
        let points = mount_points(text);
        assert_eq!(points, [Path::new("/"), Path::new("/var"), Path::new("/var/log x")]);
        assert_eq!(covering(&points, Path::new("/var/log x/a")), Some(&points[2]));
        assert_eq!(covering(&points, Path::new("/var/log")), Some(&points[1]));
        assert_eq!(covering(&points, Path::new("/etc")), None);
    }
}
