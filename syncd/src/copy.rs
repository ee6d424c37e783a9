//! Copies a tree as it is, object by object: new content by temporary name and rename, the directories' metadata last,
//! so that what has its own name and times in the copy is there whole.

use ephemeral_overlay::token::Token;

use crate::content;
use crate::digest::Digest;
use crate::entry::{Content, Kind, Meta, Node};
use crate::error::Result;
use crate::path::RelPath;
use crate::place::{Into, Place};
use crate::scan::{Found, Object, View, file_meta};
use crate::tree::Tree;

/// Nobody else guesses names where copies are made.
const COPIES: Token = Token(0);

/// What makes a copy in `to`.
#[must_use]
pub fn place(to: &Tree) -> Place<'_> {
    Place::new(to, Into::Copy, COPIES)
}

/// Copies what a plain scan of `from` found. `wanted` may change the metadata that an object gets, or say that the object
/// needs no copy; `written` is told how many bytes of contents were.
///
/// # Errors
/// Any failing call, and whatever `wanted` says. What was copied until then stays.
pub fn copy(
    from: &Tree,
    found: &[Found],
    place: &Place<'_>,
    wanted: &mut dyn FnMut(&Found, &mut Meta) -> Result<bool>,
    written: &mut dyn FnMut(u64),
) -> Result<()> {
    let mut contents = |path: &RelPath, _: &Content, sink: &mut dyn FnMut(u64, &[u8]) -> Result<()>| {
        let (file, shown) = (from.open_file(path)?, from.show(path));
        let stamp = content::stamp(&file, &shown)?;
        content::blocks_of(&file, &stamp, 0..stamp.size, &mut Vec::new(), &shown, |block| {
            written(block.bytes.len() as u64);
            block.data.iter().try_for_each(|data| sink(block.offset + data.start as u64, &block.bytes[data.clone()]))
        })
        .map(drop)
    };
    let mut directories = Vec::new();
    for found in found {
        let (kind, mut meta) = match &found.object {
            Object::Other(kind, meta) => (kind.clone(), (**meta).clone()),
            Object::File => {
                let (meta, _) = file_meta(&from.open_file(&found.path)?, View::Plain, &from.show(&found.path))?;
                let (stretches, blocks) = (Vec::new(), Vec::new());
                let content = Content { size: found.stamp.size, digest: Digest(0), fuzzy: false, stretches, blocks };
                (Kind::file(content), meta)
            }
            Object::Whiteout => continue,
        };
        let is_wanted = wanted(found, &mut meta)?;
        if matches!(kind, Kind::Dir { .. }) {
            place.make_dir(&found.path)?;
            directories.push((&found.path, meta));
        } else if is_wanted {
            place.put(&found.path, &Node { kind, meta, group: 0 }, &mut contents)?;
        }
    }
    directories.iter().rev().try_for_each(|(path, meta)| place.finish_dir(path, meta, false))
}
