//! A folder is copied to another file system, and compared, by the user it belongs to: called as that user, on trees that
//! nothing leads out of.
//!
//! What stands in the copy under its own name with the right size and times is there whole (it got these last), so a copy
//! that was cut goes on where it was. That it is the same is not believed but read, at the end.

use std::collections::BTreeMap;

use ephemeral_overlay::attributes::Xattrs;
use ephemeral_overlay::error::At;
use rustix::fs::{FileType, Mode, fchmod, fstatvfs};

use super::{Event, Tell};
use crate::content;
use crate::copy;
use crate::digest::Digest;
use crate::entry::{Kind, Meta};
use crate::error::{Error, Result};
use crate::path::RelPath;
use crate::scan::{Found, Object, Stamp, View, file_meta, scan, scan_below};
use crate::tree::Tree;

/// Makes `to` a copy of `from`, where everything belongs to the user `uid`.
pub(super) fn copy(from: &Tree, to: &Tree, uid: u32, tell: Tell<'_>) -> Result<()> {
    let found = scan(from, View::Plain)?;
    let (missing, bytes) = missing(&found, to)?;
    let free = fstatvfs(to.root()).map(|stat| stat.f_bavail.saturating_mul(stat.f_frsize)).at("fstatvfs", to.path())?;
    if bytes > free {
        return Err(left(
            from,
            format!("{bytes} bytes of it have to be copied to {}, where {free} are free", to.path().display()),
        ));
    }
    tell(Event::Copy { from: from.path(), to: to.path(), bytes });
    let place = copy::place(to);
    let mut leaders = BTreeMap::new();
    let mut files = missing.into_iter();
    let mut wanted = |found: &Found, meta: &mut Meta| {
        if meta.uid != uid {
            return Err(left(from, format!("{} in it belongs to the user {}", found.path, meta.uid)));
        }
        meta.xattrs = carried(&meta.xattrs);
        let is_missing = files.next().unwrap_or(true);
        if let Some(leader) = leader(&mut leaders, found) {
            place.link(&leader, &found.path)?;
            return Ok(false);
        }
        Ok(is_missing)
    };
    copy::copy(from, &found, &place, &mut wanted, &mut |bytes| tell(Event::Copied(bytes)))?;
    Ok(rustix::fs::syncfs(to.root()).at("syncfs", to.path())?)
}

/// Which of the objects are not in the copy yet, and what they take.
fn missing(found: &[Found], to: &Tree) -> Result<(Vec<bool>, u64)> {
    let mut bytes = 0;
    let mut missing = Vec::with_capacity(found.len());
    for found in found {
        let there = if matches!(found.object, Object::File) { to.stat(&found.path)? } else { None };
        let is_there = there.is_some_and(|stat| {
            FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile
                && (Stamp::of(&stat).size, Stamp::of(&stat).mtime) == (found.stamp.size, found.stamp.mtime)
        });
        if !is_there {
            bytes += found.stamp.blocks.saturating_mul(512);
        }
        missing.push(!is_there);
    }
    Ok((missing, bytes))
}

/// Checks that the two are the same, in everything that a user can set.
pub(super) fn compare(from: &Tree, to: &Tree) -> Result<()> {
    let (ours, theirs) = (lines(to)?, lines(from)?);
    if ours == theirs {
        return Ok(());
    }
    let same = theirs.iter().zip(&ours).take_while(|(theirs, ours)| theirs == ours).count();
    let path = theirs.get(same).or(ours.get(same)).map(|line| line.path.clone()).unwrap_or_default();
    Err(left(
        from,
        format!("{path} in it changed while it was copied, or cannot be as it is in {}", to.path().display()),
    ))
}

/// An object, as it has to be in both.
#[derive(PartialEq)]
struct Line {
    path: RelPath,
    kind: Option<Kind>,
    meta: Meta,
    content: Option<Digest>,
    leader: Option<RelPath>,
}

fn lines(tree: &Tree) -> Result<Vec<Line>> {
    let mut leaders = BTreeMap::new();
    let mut buffer = Vec::new();
    let mut lines = Vec::new();
    for found in scan(tree, View::Plain)? {
        let leader = leader(&mut leaders, &found);
        let (kind, mut meta, content) = match found.object {
            Object::Other(kind, meta) => (Some(kind), *meta, None),
            Object::File => {
                let (file, shown) = (tree.open_file(&found.path)?, tree.show(&found.path));
                let read = content::hash(&file, 0, &mut buffer, &shown)?;
                (None, file_meta(&file, View::Plain, &shown)?.0, Some(read.digest))
            }
            Object::Whiteout => continue,
        };
        meta.xattrs = carried(&meta.xattrs);
        lines.push(Line { path: found.path, kind, meta, content, leader });
    }
    Ok(lines)
}

/// The first name of the file that this is another name of.
fn leader(leaders: &mut BTreeMap<u64, RelPath>, found: &Found) -> Option<RelPath> {
    if found.stamp.nlink < 2 || matches!(found.object, Object::Other(Kind::Dir { .. }, _)) {
        return None;
    }
    let first = leaders.entry(found.stamp.ino).or_insert_with(|| found.path.clone());
    (*first != found.path).then(|| first.clone())
}

/// What a user can set: labels follow from the place.
fn carried(all: &Xattrs) -> Xattrs {
    let is_carried = |name: &[u8]| name.starts_with(b"user.") || name.starts_with(b"system.posix_acl_");
    all.iter().filter(|(name, _)| is_carried(name)).map(|(name, value)| (name.clone(), value.clone())).collect()
}

fn left(from: &Tree, why: String) -> Error {
    Error::Left { path: from.path().to_path_buf(), why }
}

/// Lets the owner remove what is in the directories at and below `path`; most need nothing.
pub(super) fn make_writable(tree: &Tree, path: &RelPath) -> Result<()> {
    for found in scan_below(tree, View::Plain, path)? {
        if let Object::Other(Kind::Dir { .. }, meta) = &found.object
            && meta.mode & 0o300 != 0o300
        {
            fchmod(tree.open_dir(&found.path)?, Mode::RWXU).at("fchmod", tree.show(&found.path))?;
        }
    }
    Ok(())
}
