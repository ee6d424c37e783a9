//! Puts what changed into one file.

use std::collections::{BTreeMap, BTreeSet};

use ephemeral_overlay::attributes::Handle;
use ephemeral_overlay::error::{At, SystemError};
use rayon::prelude::*;
use rustix::io::Errno;

use super::capture::Capture;
use super::{CheckpointStats, Job};
use crate::base;
use crate::chain;
use crate::diff::{Draft, Looked};
use crate::durable;
use crate::entry::{Base, Change, Kind, Node, State};
use crate::error::Result;
use crate::format::write::{Writer, Written};
use crate::format::{Header, Relation};
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
        if self.past.chain.is_none() {
            // `early` puts the token on lower and never syncs: a chain must not name one that a cut takes away.
            rustix::fs::fsync(self.lower.root()).at("fsync", self.lower.path())?;
        }
        let bases = self.bases(drafts, full)?;
        let name = TargetStore::file_name(sequence);
        let path = store.directory().join(&name);
        durable::write_file(store.directory(), &name, |file| {
            let mut writer = Writer::new(file, &path, &header)?;
            let changes = self.capture(&mut writer, &header, drafts, looked, bases, stats)?;
            if !self.held.is_empty() || !self.patient {
                // What is held and what is new come from different moments: only a whole tree may be written.
                let mut net = self.past.net.clone();
                net.apply(sequence, full, changes.clone());
                net.check()?;
            }
            writer.finish(changes, self.options.compression)
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

    fn capture(
        &self,
        writer: &mut Writer,
        header: &Header,
        drafts: &[(&RelPath, Draft)],
        looked: &[(&Found, Looked)],
        bases: Vec<Option<Base>>,
        stats: &mut CheckpointStats,
    ) -> Result<Vec<Change>> {
        stats.fuzzy.clear();
        // Of a link group, the first member stands for all.
        let mut groups = BTreeSet::new();
        let mut files = Vec::new();
        for (_, draft) in drafts {
            if let Draft::Present(found, group) = *draft
                && found.object == Object::File
                && (group == 0 || groups.insert(group))
            {
                files.push((found, group));
            }
        }
        let full = matches!(header.relation, Relation::Full { .. });
        let mut captured = Capture::new(self, header.sequence, full, files, looked).run(writer)?.into_iter();
        let mut leaders: BTreeMap<u32, Node> = BTreeMap::new();
        let mut changes = Vec::with_capacity(drafts.len());
        for ((path, draft), base) in drafts.iter().zip(bases) {
            let state = match draft {
                Draft::Deleted => State::Deleted,
                Draft::AsLower => State::AsLower,
                Draft::Present(_, group) if leaders.contains_key(group) => State::Present(leaders[group].clone()),
                Draft::Present(found, group) => {
                    let (kind, meta) = if let Object::Other(kind, meta) = &found.object {
                        (kind.clone(), meta.clone())
                    } else if let Some((meta, content)) = captured.next().flatten() {
                        (Kind::File(content), meta)
                    } else {
                        stats.disputed.push((*path).clone());
                        continue;
                    };
                    let node = Node { kind, meta, group: *group };
                    if node.content().is_some_and(|content| content.fuzzy) {
                        stats.fuzzy.push((*path).clone());
                    }
                    if *group != 0 {
                        leaders.insert(*group, node.clone());
                    }
                    State::Present(node)
                }
            };
            changes.push(Change { path: (*path).clone(), state, base });
        }
        Ok(changes)
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
