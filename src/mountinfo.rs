//! `/proc/PID/mountinfo`, `proc_pid_mountinfo(5)`, read as bytes: a mount point need not be UTF-8, and one odd mount
//! of a container must not hide all the others.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// Its number, as statx(2) tells it too.
    pub id: u64,
    /// The mount that it is mounted on.
    pub parent: u64,
    /// The peer group with which it shares what is mounted and unmounted on it.
    pub shared: Option<u64>,
    /// The peer group from which it receives that.
    pub master: Option<u64>,
    /// `major:minor` of the superblock.
    pub device: String,
    /// The directory of the file system that is mounted.
    pub root: PathBuf,
    /// Where it is mounted.
    pub mount_point: PathBuf,
    /// The type of the file system.
    pub fs_type: String,
    /// What it was mounted from, as the file system tells it.
    pub source: PathBuf,
    /// The superblock's options, as the kernel prints them.
    pub super_options: Vec<u8>,
}

impl Mount {
    /// The value of `key=…` among the superblock's options, escapes undone.
    #[must_use]
    pub fn option(&self, key: &str) -> Option<PathBuf> {
        // The kernel writes `\` and `,` inside a value as octal escapes (seq_escape).
        self.super_options.split(|&byte| byte == b',').find_map(|option| {
            let value = option.strip_prefix(key.as_bytes())?.strip_prefix(b"=")?;
            Some(unescape(value))
        })
    }
}

/// Parses a mountinfo file. Lines that are not of the documented form are passed over.
#[must_use]
pub fn parse(text: &[u8]) -> Vec<Mount> {
    text.split(|&byte| byte == b'\n').filter_map(parse_line).collect()
}

fn parse_line(line: &[u8]) -> Option<Mount> {
    // 36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue
    let mut fields = line.split(|&byte| byte == b' ');
    let mut number = || std::str::from_utf8(fields.next()?).ok()?.parse().ok();
    let (id, parent) = (number()?, number()?);
    let device = fields.next()?;
    let root = fields.next()?;
    let mount_point = fields.next()?;
    let optional: Vec<_> = fields.by_ref().skip(1).take_while(|field| *field != b"-").collect();
    let group = |key: &[u8]| {
        let group = optional.iter().find_map(|field| field.strip_prefix(key))?;
        std::str::from_utf8(group).ok()?.parse().ok()
    };
    let fs_type = fields.next()?;
    let source = fields.next()?;
    let super_options = fields.next()?;
    Some(Mount {
        id,
        parent,
        shared: group(b"shared:"),
        master: group(b"master:"),
        device: String::from_utf8_lossy(device).into_owned(),
        root: unescape(root),
        mount_point: unescape(mount_point),
        fs_type: String::from_utf8_lossy(fs_type).into_owned(),
        source: unescape(source),
        super_options: super_options.to_vec(),
    })
}

/// Undoes the octal escapes (`\040`) of mountinfo and fstab.
#[must_use]
pub fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        match tail {
            [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', after @ ..] if first == b'\\' => {
                bytes.push((a - b'0') * 64 + (b - b'0') * 8 + (c - b'0'));
                rest = after;
            }
            _ => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    OsString::from_vec(bytes).into()
}

/// A path as one field of mountinfo, fstab or utab: what separates fields, and the backslash, as octal escapes.
#[must_use]
pub fn escape(path: &Path) -> Vec<u8> {
    let mut field = Vec::new();
    for &byte in path.as_os_str().as_bytes() {
        match byte {
            b' ' | b'\t' | b'\n' | b'\\' => field.extend(format!("\\{byte:03o}").as_bytes()),
            _ => field.push(byte),
        }
    }
    field
}

/// The mounts at or below `root`, their mount points made relative to it (with a leading `/`).
#[must_use]
pub fn below(mounts: &[Mount], root: &Path) -> Vec<Mount> {
    mounts
        .iter()
        .filter_map(|mount| {
            let inner = mount.mount_point.strip_prefix(root).ok()?;
            Some(Mount { mount_point: Path::new("/").join(inner), ..mount.clone() })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_taken_apart_and_escapes_are_undone() {
        let text =
            b"36 35 98:0 /mnt1 /mnt\\0402 rw,noatime shared:7 master:1 - ext3 /dev/root rw,errors=continue\ngarbage\n\
            67 63 0:40 / /sysroot/etc rw,relatime - overlay overlay rw,lowerdir=/l\\134:x,upperdir=/run/u,xino=on\n";
        let mounts = parse(text);
        assert_eq!(mounts.len(), 2);
        assert_eq!((mounts[0].id, mounts[0].parent, mounts[0].shared, mounts[0].master), (36, 35, Some(7), Some(1)));
        assert_eq!((mounts[1].id, mounts[1].parent, mounts[1].shared, mounts[1].master), (67, 63, None, None));
        assert_eq!(mounts[0].device, "98:0");
        assert_eq!(mounts[0].root, Path::new("/mnt1"));
        assert_eq!(mounts[0].mount_point, Path::new("/mnt 2"));
        assert_eq!(mounts[0].source, Path::new("/dev/root"));
        assert_eq!(mounts[1].option("upperdir"), Some("/run/u".into()));
        assert_eq!(mounts[1].option("lowerdir"), Some("/l\\:x".into()));
        assert_eq!(below(&mounts, Path::new("/sysroot"))[0].mount_point, Path::new("/etc"));
    }

    #[test]
    fn an_escaped_path_is_one_field() {
        let path = Path::new("/a b\tc\nd\\e\\040f");
        let field = escape(path);
        assert_eq!(field, br"/a\040b\011c\012d\134e\134040f");
        assert_eq!(unescape(&field), path);
    }
}
