//! Puts what changed into one file.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::AsFd;

use ephemeral_overlay::attributes::Handle;
use ephemeral_overlay::error::{At, SystemError};
use rayon::prelude::*;
use rustix::fs::fstat;
use rustix::io::Errno;

use super::{CheckpointStats, Job};
use crate::base;
use crate::chain::Covers;
use crate::content::{self, Read, Sink};
use crate::diff::Draft;
use crate::durable;
use crate::entry::{Base, Change, Content, Kind, Node, State, Stretch};
use crate::error::{Error, Result};
use crate::format::write::{Writer, Written};
use crate::format::{Header, Relation};
use crate::path::RelPath;
use crate::scan::{self, Found, Object, View};
use crate::store::TargetStore;

impl Job<'_> {
    pub(super) fn write(
        &self,
        store: &TargetStore,
        sequence: u64,
        relation: Relation,
        drafts: &[(RelPath, Draft)],
        stats: &mut CheckpointStats,
    ) -> Result<Written> {
        let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let full = matches!(relation, Relation::Full { .. });
        let header = Header {
            target: store.target().to_path_buf(),
            token: self.past.token,
            sequence,
            relation,
            boot_id: boot_id.trim().to_owned(),
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
            let mut writer = Writer::new(file, &path, &header, self.options.compression)?;
            let changes = self.capture(&mut writer, drafts, bases, stats)?;
            if !self.held.is_empty() || !self.patient {
                // What is held and what is new come from different moments: only a whole tree may be written.
                let mut net = self.past.net.clone();
                net.apply(sequence, full, &changes);
                net.check()?;
            }
            writer.finish(changes)
        })
    }

    /// What lower has where something is captured for the first time. A full checkpoint repeats what is known.
    fn bases(&self, drafts: &[(RelPath, Draft)], full: bool) -> Result<Vec<Option<Base>>> {
        let hides = |draft: &Draft| match draft {
            Draft::Present(found, _) => !matches!(found.object, Object::Other(Kind::Dir { opaque: false }, _)),
            Draft::Deleted => true,
            Draft::AsLower => false,
        };
        let mut covers = Covers::of(&self.past.net);
        let mut wanted = Vec::with_capacity(drafts.len());
        for (path, draft) in drafts {
            let hides = hides(draft);
            let is_known = covers.has(path) || !hides && self.past.net.bases.contains_key(path);
            let capture = *draft != Draft::AsLower && !is_known;
            if capture && hides {
                covers.insert(path.clone());
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
        drafts: &[(RelPath, Draft)],
        bases: Vec<Option<Base>>,
        stats: &mut CheckpointStats,
    ) -> Result<Vec<Change>> {
        stats.fuzzy.clear();
        let mut buffer = Vec::new();
        let mut leaders: BTreeMap<u32, Node> = BTreeMap::new();
        let mut changes = Vec::with_capacity(drafts.len());
        for ((path, draft), base) in drafts.iter().zip(bases) {
            let state = match draft {
                Draft::Deleted => State::Deleted,
                Draft::AsLower => State::AsLower,
                Draft::Present(_, group) if leaders.contains_key(group) => State::Present(leaders[group].clone()),
                Draft::Present(found, group) => {
                    let mut node = match self.capture_node(writer, found, &mut buffer) {
                        Err(Error::Moved { .. }) if !self.patient && *group == 0 => {
                            stats.disputed.push(path.clone());
                            continue;
                        }
                        other => other?,
                    };
                    node.group = *group;
                    if node.content().is_some_and(|content| content.fuzzy) {
                        stats.fuzzy.push(path.clone());
                    }
                    if *group != 0 {
                        leaders.insert(*group, node.clone());
                    }
                    State::Present(node)
                }
            };
            changes.push(Change { path: path.clone(), state, base });
        }
        Ok(changes)
    }

    fn capture_node(&self, writer: &mut Writer, found: &Found, buffer: &mut Vec<u8>) -> Result<Node> {
        if let Object::Other(kind, meta) = &found.object {
            return Ok(Node { kind: kind.clone(), meta: meta.clone(), group: 0 });
        }
        let shown = self.upper.show(&found.path);
        let file = self.open(found)?;
        let mut capture = Capture { start: writer.position(), writer, stretches: Vec::new() };
        let Read { size, digest, fuzzy } = content::read(&file, self.past.seed, buffer, &shown, &mut capture)?;
        let stretches = capture.stretches;
        // The metadata of the very inode whose contents were read.
        let raw = Handle::of(file.as_fd()).read_all().at("listxattr", &shown)?;
        let (meta, _) = scan::meta(&fstat(&file).at("fstat", &shown)?, raw, View::Upper, &shown)?;
        Ok(Node { kind: Kind::File(Content { size, digest, fuzzy, stretches }), meta, group: 0 })
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

/// Puts a file's bytes into a checkpoint and keeps where they went.
struct Capture<'w, 'a> {
    writer: &'w mut Writer<'a>,
    start: u64,
    stretches: Vec<Stretch>,
}

impl Sink for Capture<'_, '_> {
    fn begin(&mut self) {
        self.writer.rewind(self.start);
        self.stretches.clear();
    }

    fn data(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        let data = self.writer.position();
        let length = bytes.len() as u64;
        match self.stretches.last_mut() {
            Some(last) if last.offset + last.length == offset && last.data + last.length == data => {
                last.length += length;
            }
            _ => self.stretches.push(Stretch { offset, length, data }),
        }
        self.writer.data(bytes)
    }
}
