//! What a boot does instead of a merge that cannot finish.

use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;

use ephemeral_overlay::attributes::Handle;
use ephemeral_overlay::error::At;
use ephemeral_overlay::token::Token;

use super::leaders;
use crate::chain::{FrameCache, Recorded};
use crate::conflict;
use crate::entry::Kind;
use crate::error::{Error, Result};
use crate::path::RelPath;
use crate::place::{Into, Place, temporary_name};
use crate::progress::Progress;
use crate::scan::{Object, View, dir_meta, scan};
use crate::store::TargetStore;
use crate::tree::{Tree, is_nothing, list};

/// Unpacks the net state of a chain that could not be merged into an upper directory that is not mounted yet. It
/// masks every path that the merge touches, so the view is exact although lower may be half merged. The chain and
/// the mark stay.
///
/// # Errors
/// Anything that goes wrong; upper is then of no use.
pub fn unpack(store: &TargetStore, lower: &Tree, upper: &Tree, progress: &Progress) -> Result<()> {
    let marker = store.marker()?;
    let token = Token::read(&Handle::of(lower.root()), lower.path())?;
    if marker.as_ref().is_some_and(|marker| token == Some(marker.next_token)) {
        // Lower has everything; only the cleaning up could not be done.
        return Ok(());
    }
    let Some(mut chain) = store.chain()? else { return Ok(()) };
    if chain.token() != token {
        return Err(Error::Foreign { target: store.target().to_path_buf() });
    }
    chain.verify(progress)?;
    let mut net = chain.compose()?;
    let left_alone = match &marker {
        Some(marker) if chain.range().0 <= marker.last => marker.left_alone.clone(),
        // Lower is untouched, and newer.
        None if store.booted_from_disk()? => conflict::find(&net, lower, chain.seed())?,
        _ => Vec::new(),
    };
    let only_metadata = conflict::leave_alone(&mut net, &left_alone, lower)?;
    let place = Place::new(upper, Into::Upper, Token::random().at("getrandom", upper.path())?);
    let leaders = leaders(&net);
    let mut frames = FrameCache::default();
    for (path, Recorded { state, seq }) in &net.entries {
        progress.step();
        match (state.node(), leaders.get(path)) {
            (None, _) => place.whiteout(path)?,
            (Some(node), _) if node.is_dir() && path.is_root() => {}
            (Some(node), _) if node.is_dir() => drop(place.make_dir(path)?),
            (Some(_), Some(leader)) if *leader != path => place.link(leader, path)?,
            (Some(node), _) => {
                place.put(path, node, &mut |_, content, sink| chain.contents(*seq, content, &mut frames, sink))?;
            }
        }
    }
    for (path, recorded) in net.entries.iter().rev() {
        let Some(node) = recorded.state.node().filter(|node| node.is_dir()) else { continue };
        if let Some(marker) = marker.as_ref().filter(|_| !node.is_opaque()) {
            mask_temporary(lower, &place, path, marker.next_token)?;
        }
        if only_metadata.contains(path) {
            place.finish_dir(path, &dir_meta(lower, path)?, false)?;
        } else {
            place.finish_dir(path, &node.meta, node.is_opaque())?;
        }
    }
    Ok(())
}

/// Hides the temporary files that a merge which failed left in lower from the overlay that had been merged: its upper
/// masks everything else that the merge touched. The times of the directories stay.
///
/// # Errors
/// When one of the two directories cannot be looked at, or upper not be written to.
pub fn hide_unfinished(store: &TargetStore, lower: &Tree, upper: &Tree) -> Result<()> {
    let Some(marker) = store.marker()? else { return Ok(()) };
    let place = Place::new(upper, Into::Upper, Token::random().at("getrandom", upper.path())?);
    let mut hidden: Option<RelPath> = None;
    for found in scan(upper, View::Upper)? {
        let Object::Other(Kind::Dir { opaque }, meta) = &found.object else { continue };
        // Nothing of lower shows through below.
        if hidden.as_ref().is_some_and(|above| found.path.is_below(above)) {
            continue;
        }
        if *opaque {
            hidden = Some(found.path);
        } else if mask_temporary(lower, &place, &found.path, marker.next_token)? > 0 {
            place.finish_dir(&found.path, meta, false)?;
        }
    }
    Ok(())
}

/// Hides the temporary files that a cut left in a directory of lower; returns how many.
fn mask_temporary(lower: &Tree, place: &Place, path: &RelPath, token: Token) -> Result<usize> {
    let dir = match lower.open_dir(path) {
        Err(error) if is_nothing(error.errno()) => return Ok(0),
        other => other?,
    };
    let (names, ours) = (list(dir.as_fd(), &lower.show(path))?, temporary_name(token));
    let unfinished = names.iter().filter(|name| name.as_bytes().starts_with(ours.as_bytes()));
    let paths: Vec<_> = unfinished.map(|name| path.child(name)).collect();
    paths.iter().try_for_each(|path| place.whiteout(path))?;
    Ok(paths.len())
}
