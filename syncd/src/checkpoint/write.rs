//! Puts what changed into one file.

use std::collections::BTreeMap;

use ephemeral_overlay::attributes::Handle;
use ephemeral_overlay::error::{At, SystemError};
use rayon::prelude::*;
use rustix::io::Errno;

use super::capture::{Capture, Captured};
use super::{CheckpointStats, Job};
use crate::base;
use crate::chain;
use crate::diff::{Draft, Looked};
use crate::durable;
use crate::entry::{Base, Change, Content, Kind, Meta, Node, State};
use crate::error::Result;
use crate::format::write::{Writer, Written};
use crate::format::{Header, Relation};
use crate::later;
use crate::path::RelPath;
use crate::scan::{Found, Object};
use crate::store::TargetStore;
use crate::written::boot_id;

impl Job<'_> {
    pub(super) fn write(
        &self,
        store: &TargetStore,
        sequence: u64,
        relation: Relation,
        drafts: &[(&RelPath, Draft)],
        looked: &[(&Found, Looked)],
        stats: &mut CheckpointStats,
    ) -> Result<Written> {
        let written = self.past.written.seen_from(&boot_id());
        let full = matches!(relation, Relation::Full { .. });
        let header = Header {
            target: store.target().to_path_buf(),
            token: self.past.token,
            sequence,
            relation,
            boot_id: written.boot_id,
            written_in_boot: written.in_boot,
            written_in_all: written.in_all,
            seed: self.past.seed,
            user_xattrs: self.has_user_xattrs()?,
        };
        let bases = self.bases(drafts, full)?;
        let name = TargetStore::file_name(sequence);
        let path = store.directory().join(&name);
        durable::write_file(store.directory(), &name, |file| {
            let mut writer = Writer::new(file, &path, &header)?;
            let made = self.capture(&mut writer, &header, drafts, looked, bases)?;
            stats.fuzzy = made.paths_of(|content| content.is_some_and(|content| content.fuzzy));
            stats.disputed.extend(made.paths_of(|content| content.is_none()));
            if !self.held.is_empty() || !self.patient {
                // What is held and what is new come from different moments: only a whole tree may be written.
                let mut net = self.past.net.clone();
                net.apply(sequence, full, made.changes().flatten().collect());
                net.check()?;
            }
            let written = writer.finish(made.changes(), self.options.compression);
            let Made { which, captured, bases, .. } = made;
            later::drop((which, captured, bases));
            written
        })
    }

    /// What lower has where something is captured for the first time. A full checkpoint repeats what is known.
    fn bases(&self, drafts: &[(&RelPath, Draft)], full: bool) -> Result<Vec<Option<Base>>> {
        let hides = |draft: &Draft| match draft {
            Draft::Present(found, _) => !matches!(found.object, Object::Other(Kind::Dir { opaque: false }, _)),
            Draft::Deleted => true,
            Draft::AsLower => false,
        };
        let mut covers = chain::covers(&self.past.net);
        let mut wanted = Vec::with_capacity(drafts.len());
        for &(path, ref draft) in drafts {
            let hides = hides(draft);
            let is_known = covers.has(path) || !hides && self.past.net.bases.contains_key(path);
            let capture = *draft != Draft::AsLower && !is_known;
            if capture && hides {
                covers.add(path);
            }
            wanted.push((path, hides, capture));
        }
        wanted
            .into_par_iter()
            .map(|(path, hides, capture)| {
                if capture {
                    base::capture(self.lower, path, hides, self.past.seed).map(Some)
                } else if full {
                    Ok(self.past.net.bases.get(path).cloned())
                } else {
                    Ok(None)
                }
            })
            .collect()
    }

    fn capture<'a>(
        &'a self,
        writer: &mut Writer,
        header: &Header,
        drafts: &'a [(&'a RelPath, Draft<'a>)],
        looked: &[(&Found, Looked)],
        bases: Vec<Option<Base>>,
    ) -> Result<Made<'a>> {
        // Of a link group, the first member stands for all.
        let mut leaders = BTreeMap::new();
        let mut files = Vec::new();
        let mut which = Vec::with_capacity(drafts.len());
        for (_, draft) in drafts {
            which.push(match *draft {
                Draft::Present(found, group) if found.object == Object::File => {
                    let next = files.len();
                    let file = if group == 0 { next } else { *leaders.entry(group).or_insert(next) };
                    if file == next {
                        files.push((found, group));
                    }
                    Some(file)
                }
                _ => None,
            });
        }
        let full = matches!(header.relation, Relation::Full { .. });
        let captured = Capture::new(self, header.sequence, full, files, looked).run(writer)?;
        Ok(Made { drafts, which, captured, bases })
    }

    fn has_user_xattrs(&self) -> Result<bool, SystemError> {
        let root = Handle::of(self.upper.root());
        match rustix::fs::getxattr_query(root.path(), "user.ephemeral_overlay") {
            Err(Errno::NOTSUP) => Ok(false),
            Ok(_) | Err(Errno::NODATA) => Ok(true),
            Err(error) => Err(error).at("getxattr", self.upper.path()),
        }
    }
}

/// What a checkpoint will say, in parts: a list of many thousand changes is made a piece at a time.
struct Made<'a> {
    drafts: &'a [(&'a RelPath, Draft<'a>)],
    /// Which of the captured files each draft is, if it is a file.
    which: Vec<Option<usize>>,
    captured: Vec<Captured>,
    bases: Vec<Option<Base>>,
}

impl Made<'_> {
    /// The changes, in path order; nothing where a file was moved away.
    fn changes(&self) -> impl IndexedParallelIterator<Item = Option<Change>> {
        self.drafts.par_iter().zip(&self.which).zip(&self.bases).map(|(((path, draft), which), base)| {
            let state = match draft {
                Draft::Deleted => State::Deleted,
                Draft::AsLower => State::AsLower,
                Draft::Present(found, group) => {
                    let (meta, kind): (&Meta, &Kind) = match &found.object {
                        Object::Other(kind, meta) => (meta, kind),
                        // A whiteout is a deletion.
                        Object::File | Object::Whiteout => {
                            let (meta, kind) = self.captured[(*which)?].as_ref()?;
                            (meta, kind)
                        }
                    };
                    State::Present(Node { kind: kind.clone(), meta: meta.clone(), group: *group })
                }
            };
            Some(Change { path: (*path).clone(), state, base: base.clone() })
        })
    }

    /// The files of which something is so; nothing is known of one that was moved away.
    fn paths_of(&self, is_so: impl Fn(Option<&Content>) -> bool) -> Vec<RelPath> {
        let files = self.drafts.iter().zip(&self.which).filter_map(|((path, _), which)| Some((path, (*which)?)));
        let content = |file: usize| self.captured[file].as_ref().and_then(|(_, kind)| kind.content());
        files.filter(|(_, file)| is_so(content(*file))).map(|(path, _)| (*path).clone()).collect()
    }
}
