//! Takes a checkpoint: walk → hash → diff → one file → durable.
//!
//! Contents decide, always: a write through a shared mapping changes no time stamp on tmpfs. A loss (a name that is
//! gone or newly hidden) is believed only when two scans agree on it and nothing was renamed between them, because a
//! live scan can see a file that is being moved in neither place.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ephemeral_overlay::attributes::Handle;
use ephemeral_overlay::error::{At, SystemError};
use ephemeral_overlay::token::Token;
use rayon::prelude::*;
use rustix::fs::{FileType, fstat};
use rustix::io::Errno;

use crate::base;
use crate::chain::{Chain, Covers, Net};
use crate::content::{self, NoSink, Read, Sink};
use crate::diff::{self, Draft};
use crate::digest::Digest;
use crate::durable;
use crate::entry::{Base, Change, Content, Kind, Meta, Node, State, Stretch};
use crate::error::{Error, Result};
use crate::format::write::{Writer, Written};
use crate::format::{Header, Relation};
use crate::path::RelPath;
use crate::scan::{self, Found, Object, View};
use crate::store::TargetStore;
use crate::tree::Tree;

/// How often upper is scanned for a state in which nothing moves.
const TRIES: usize = 3;
/// How often a file that was moved away under a read makes us start over before it is held back.
const RESTARTS: usize = 3;
/// The longest chain; the next checkpoint is full.
const CHAIN_MAX: usize = 64;
/// How long a scan that saw something move waits before the next one: longer than a tick of the clock that stamps
/// files (4 ms at 250 Hz).
const SETTLE: Duration = Duration::from_millis(5);

/// How a checkpoint is taken.
#[derive(Debug, Clone)]
pub struct CheckpointOptions {
    /// Find out what would be written, and write nothing.
    pub dry_run: bool,
    /// zstd's level.
    pub compression: i32,
    /// Our own log: a change of nothing else is no reason to write.
    pub own_log: Option<RelPath>,
}

/// What a checkpoint came to.
#[derive(Debug, Clone, Default)]
pub struct CheckpointStats {
    /// Its number; `None` when nothing had changed, and in a dry run.
    pub sequence: Option<u64>,
    /// It is full, not a delta.
    pub full: bool,
    /// What changed, in path order.
    pub changes: Vec<(RelPath, ChangeKind)>,
    /// The length of the file, in bytes.
    pub written_bytes: u64,
    /// Files that changed while they were read.
    pub fuzzy: Vec<RelPath>,
    /// Losses on which no two scans agreed: they are not recorded.
    pub disputed: Vec<RelPath>,
    /// Names never stood still while they were read: one that was being moved may be missing, or be there twice.
    pub unsettled: bool,
    /// The chain of another state of the disk was moved here.
    pub set_aside: Option<PathBuf>,
    /// The chain so far was damaged: this checkpoint supersedes it.
    pub healed: Option<String>,
}

/// How a path differs from lower, as `diff` shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChangeKind {
    /// New or changed.
    Written,
    /// Deleted.
    Deleted,
    /// As lower again.
    Reverted,
}

impl CheckpointStats {
    /// Whether everything was recorded exactly.
    #[must_use]
    pub fn is_exact(&self) -> bool {
        self.fuzzy.is_empty() && self.disputed.is_empty() && !self.unsettled && self.set_aside.is_none()
    }
}

/// Takes a checkpoint of `upper` over `lower` into `store`, which the caller has locked.
///
/// # Errors
/// Anything that goes wrong; the chain is then what it was before.
pub fn take(store: &TargetStore, upper: &Tree, lower: &Tree, options: &CheckpointOptions) -> Result<CheckpointStats> {
    let mut stats = CheckpointStats::default();
    if !options.dry_run {
        store.prepare()?;
    }
    let past = Past::load(store, lower, options.dry_run, &mut stats)?;
    let mut job = Job { upper, lower, past, options, held: BTreeSet::new() };
    let mut restarts = 0;
    loop {
        let scan = job.scan(&mut stats)?;
        match job.record(store, &scan, &mut stats) {
            Err(Error::Moved { path }) => {
                restarts += 1;
                if restarts >= RESTARTS {
                    stats.disputed.push(path.clone());
                    job.held.insert(path);
                }
                if restarts >= RESTARTS * CHAIN_MAX {
                    return Err(Error::Unsettled { path: upper.path().to_path_buf() });
                }
            }
            done => return done.map(|()| stats),
        }
    }
}

/// What is recorded so far.
struct Past {
    chain: Option<Chain>,
    net: Net,
    seed: u64,
    token: Option<Token>,
    /// The chain in the store belongs to another state of the disk.
    foreign: bool,
    /// The next checkpoint has to be full whatever else holds.
    must_be_full: bool,
}

impl Past {
    fn load(store: &TargetStore, lower: &Tree, dry_run: bool, stats: &mut CheckpointStats) -> Result<Self> {
        let token = Token::read(&Handle::of(lower.root()), lower.path())?;
        let marker = store.marker()?;
        if let Some(marker) = marker.as_ref().filter(|marker| token == Some(marker.next_token) && !dry_run) {
            // That merge was complete but for the cleaning up.
            store.end_merge(marker.last)?;
        }
        let loaded = store.chain().and_then(|chain| {
            let net = chain.as_ref().map(Chain::compose).transpose()?.unwrap_or_default();
            Ok((chain, net))
        });
        let (mut chain, mut net) = match loaded {
            // Upper has everything: whatever is wrong with what was written of it, it can be written anew.
            Err(error @ (Error::Damaged { .. } | Error::Inconsistent { .. } | Error::System(_))) => {
                stats.healed = Some(with_causes(&error));
                (None, Net::default())
            }
            other => other?,
        };
        let foreign = chain.as_ref().is_some_and(|chain| chain.token() != token);
        if foreign {
            (chain, net) = (None, Net::default());
        }
        let seed = match &chain {
            Some(chain) => chain.seed(),
            None => u64::try_from(Token::random().at("getrandom", "")?.0 & u128::from(u64::MAX)).unwrap_or(0),
        };
        let first = chain.as_ref().map(|chain| chain.range().0);
        let must_be_full = marker.is_some_and(|marker| first.is_none_or(|first| first <= marker.last));
        Ok(Self { chain, net, seed, token, foreign, must_be_full })
    }
}

struct Job<'a> {
    upper: &'a Tree,
    lower: &'a Tree,
    past: Past,
    options: &'a CheckpointOptions,
    held: BTreeSet<RelPath>,
}

impl Job<'_> {
    /// A scan whose losses are believed, or held.
    fn scan(&mut self, stats: &mut CheckpointStats) -> Result<Vec<Found>> {
        stats.unsettled = false;
        let mut scan = scan::scan(self.upper, View::Upper)?;
        for last in (0..TRIES).map(|done| done + 1 == TRIES) {
            let losses = |scan: &[Found]| diff::losses(&self.past.net, scan, |path| self.lower_is_dir(path));
            if losses(&scan).is_empty() && scan::is_unmoved(self.upper, &scan)? {
                break;
            }
            // On kernels before 6.13 two changes within one tick leave the same times: the next look is in another one.
            std::thread::sleep(SETTLE);
            let again = scan::scan(self.upper, View::Upper)?;
            let stable = diff::is_stable(&scan, &again);
            scan = again;
            if stable {
                break;
            }
            if last {
                let disputed = losses(&scan);
                stats.unsettled = true;
                self.held.extend(diff::held(&disputed, &scan));
                stats.disputed.extend(disputed);
            }
        }
        self.mark_opaque(&mut scan)?;
        Ok(scan)
    }

    fn lower_is_dir(&self, path: &RelPath) -> bool {
        let stat = self.lower.stat(path).ok().flatten();
        stat.is_some_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Directory)
    }

    /// A directory that lower does not have is opaque, whether or not the kernel had the room to say so: it ignores
    /// a failed setxattr of its own mark (fs/overlayfs/dir.c).
    fn mark_opaque(&self, scan: &mut [Found]) -> Result<()> {
        let mut opaque: Vec<RelPath> = Vec::new();
        for found in scan {
            let Object::Other(Kind::Dir { opaque: is_opaque }, _) = &mut found.object else { continue };
            while opaque.last().is_some_and(|above| !found.path.is_below(above)) {
                opaque.pop();
            }
            if opaque.is_empty() && !*is_opaque && !found.path.is_root() {
                let stat = self.lower.stat(&found.path)?;
                *is_opaque = stat.is_none_or(|stat| FileType::from_raw_mode(stat.st_mode) != FileType::Directory);
            }
            if *is_opaque {
                opaque.push(found.path.clone());
            }
        }
        Ok(())
    }

    /// Finds the changes and writes them, if there are any.
    fn record(&self, store: &TargetStore, scan: &[Found], stats: &mut CheckpointStats) -> Result<()> {
        let digests = self.hash(scan)?;
        let mut drafts = diff::diff(&self.past.net, scan, &digests, &self.held);
        if self.is_nothing(&drafts)? {
            return Ok(());
        }
        let kind = |draft: &Draft| match draft {
            Draft::Present(..) => ChangeKind::Written,
            Draft::Deleted => ChangeKind::Deleted,
            Draft::AsLower => ChangeKind::Reverted,
        };
        stats.changes = drafts.iter().map(|(path, draft)| (path.clone(), kind(draft))).collect();
        if self.options.dry_run {
            return Ok(());
        }
        let relation = self.relation(scan);
        if let Relation::Full { .. } = relation {
            drafts = diff::diff(&Net::default(), scan, &BTreeMap::new(), &self.held);
        }
        stats.full = matches!(relation, Relation::Full { .. });
        let sequence = store.next_sequence()?;
        let written = self.write(store, sequence, relation, &drafts, stats)?;
        stats.sequence = Some(sequence);
        stats.written_bytes = written.bytes;
        // Only now: until the new one is durable the old ones are all that a cut leaves.
        if self.past.foreign {
            stats.set_aside = store.set_aside_before(sequence)?;
        } else if stats.full {
            store.remove_before(sequence)?;
        }
        Ok(())
    }

    fn hash<'a>(&self, scan: &'a [Found]) -> Result<BTreeMap<&'a RelPath, Digest>> {
        let candidates: Vec<&'a Found> = diff::to_hash(&self.past.net, scan);
        candidates
            .into_par_iter()
            .map_init(Vec::new, |buffer, found| {
                let file = self.open(found)?;
                let read = content::read(&file, self.past.seed, buffer, &self.upper.show(&found.path), &mut NoSink)?;
                Ok((&found.path, read.digest))
            })
            .collect()
    }

    /// Opens the file that the scan met; another one by that name, or none, makes us start over.
    fn open(&self, found: &Found) -> Result<fs::File> {
        let moved = || Error::Moved { path: found.path.clone() };
        let file = match self.upper.open_file(&found.path) {
            Err(error) if matches!(error.errno(), Some(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::NXIO)) => {
                return Err(moved());
            }
            other => other?,
        };
        let stat = fstat(&file).at("fstat", self.upper.show(&found.path))?;
        let is_file = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
        if is_file && stat.st_ino == found.stamp.ino { Ok(file) } else { Err(moved()) }
    }

    /// Changes that are no reason to write: our own log, and directories that were copied up on the way to it, or
    /// from the start (the root), and differ in nothing but their times.
    fn is_nothing(&self, drafts: &[(RelPath, Draft)]) -> Result<bool> {
        for (path, draft) in drafts {
            let Draft::Present(found, _) = draft else { return Ok(false) };
            if Some(path) == self.options.own_log.as_ref() {
                continue;
            }
            let leads_to_log = self.options.own_log.as_ref().is_some_and(|log| log.is_below(path));
            let Object::Other(kind @ Kind::Dir { .. }, now) = &found.object else { return Ok(false) };
            let Some((kind_before, mut before)) = self.before(path)? else { return Ok(false) };
            if *kind != kind_before {
                return Ok(false);
            }
            if leads_to_log {
                (before.mtime, before.mtime_nsec) = (now.mtime, now.mtime_nsec);
            }
            if *now != before {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// What an object was at the last checkpoint, or what a directory is in lower.
    fn before(&self, path: &RelPath) -> Result<Option<(Kind, Meta)>> {
        if let Some(recorded) = self.past.net.entries.get(path) {
            return Ok(recorded.state.node().map(|node| (node.kind.clone(), node.meta.clone())));
        }
        let shown = self.lower.show(path);
        let Ok(dir) = self.lower.open_dir(path) else { return Ok(None) };
        let raw = Handle::of(dir.as_fd()).read_all().at("listxattr", &shown)?;
        let (meta, _) = scan::meta(&fstat(&dir).at("fstat", &shown)?, raw, View::Plain, &shown)?;
        Ok(Some((Kind::Dir { opaque: false }, meta)))
    }

    fn relation(&self, scan: &[Found]) -> Relation {
        let Some(chain) = &self.past.chain else { return Relation::Full { supersedes: None } };
        let upper = scan.iter().fold(0u64, |sum, found| sum.saturating_add(found.stamp.size));
        let too_long = chain.checkpoints().len() >= CHAIN_MAX || chain.bytes() > upper.max(1 << 20);
        // What is held is recorded nowhere but in the chain.
        if (too_long || self.past.must_be_full) && self.held.is_empty() {
            Relation::Full { supersedes: Some(chain.range().1) }
        } else {
            Relation::Delta { predecessor: chain.digest() }
        }
    }

    fn write(
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
            if !self.held.is_empty() {
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
                    let mut node = self.capture_node(writer, found, &mut buffer)?;
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

/// An error and its causes, in one line.
fn with_causes(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// The path of our own log below a target, if it is there.
#[must_use]
pub fn own_log(target: &Path, log: &Path) -> Option<RelPath> {
    use std::os::unix::ffi::OsStrExt;
    RelPath::parse(log.strip_prefix(target).ok()?.as_os_str().as_bytes().to_vec()).filter(|path| !path.is_root())
}
