//! Which states the merged tree may be in.
//!
//! A checkpoint that reported success saw every name as it was at some moment between its start and its end. When it
//! says that nothing moved, that is one moment for all names, in all parts; a file is then in a state that it had at one
//! moment of the checkpoint. It may be a mixture of the states that it had during the checkpoint when it is called fuzzy,
//! or was written through a mapping meanwhile, which nobody can see; or of those before and after one write(2) that was
//! under way.
//!
//! When it says that names moved, each name counts for itself: it is in a state of its own during the checkpoint; one
//! that was there all the time is there, and one that was not is not. What it names as moving, with all that is above and
//! below it or linked with it, may also be in an earlier state.

use std::collections::{BTreeMap, BTreeSet};

use super::log::{Event, Log};
use super::op::Op;
use super::system::Ended;
use super::tree::{Id, Kind, Node, Tree, name, parent};
use super::verdict::{Check, verdicts};
use super::{Figures, PARTS};

/// An operation that did something, or was under way at the cut.
#[derive(Debug)]
pub(super) struct Operation {
    pub(super) number: u32,
    pub(super) op: Op,
    /// Where in the log it begins and ends.
    begin: usize,
    end: usize,
}

/// A checkpoint.
#[derive(Debug, Clone)]
struct Run {
    start: usize,
    finish: usize,
    ended: Ended,
    /// It did not come to report anything.
    unreported: bool,
}

/// What is known of a round.
#[derive(Debug)]
pub(super) struct Judge<'a> {
    log: &'a Log,
    base: [Tree; PARTS.len()],
    operations: [Vec<Operation>; PARTS.len()],
    runs: Vec<Run>,
}

/// Between which of its operations a part may have been seen: from before the first ones that were over, to after the
/// last ones that had begun.
#[derive(Debug, Clone, Copy)]
struct Window {
    first: usize,
    last: usize,
}

impl<'a> Judge<'a> {
    pub(super) fn new(base: [Tree; PARTS.len()], log: &'a Log) -> Self {
        let mut all: Vec<(usize, Operation)> = Vec::new();
        let mut at: BTreeMap<u32, usize> = BTreeMap::new();
        let mut runs: BTreeMap<usize, Run> = BTreeMap::new();
        let mut failed = BTreeSet::new();
        for (line, event) in log.events.iter().enumerate() {
            match event {
                Event::Ready => {}
                Event::Begin { number, part, op } => {
                    at.insert(*number, all.len());
                    all.push((*part, Operation { number: *number, op: op.clone(), begin: line, end: usize::MAX }));
                }
                Event::End { number, done } => {
                    all[at[number]].1.end = line;
                    if !done {
                        failed.insert(*number);
                    }
                }
                Event::Start { run } => {
                    let ended = Ended::default();
                    runs.insert(*run, Run { start: line, finish: usize::MAX, ended, unreported: true });
                }
                Event::Finish { run, ended } => {
                    let run = runs.get_mut(run).unwrap();
                    (run.finish, run.ended, run.unreported) = (line, ended.clone(), false);
                }
            }
        }
        let mut operations: [Vec<Operation>; PARTS.len()] = Default::default();
        for (part, operation) in all {
            if !failed.contains(&operation.number) && !operation.op.is_impossible() {
                operations[part].push(operation);
            }
        }
        Self { log, base, operations, runs: runs.into_values().collect() }
    }

    /// The highest number of an operation.
    pub(super) fn last_operation(&self) -> u32 {
        let numbers = self.log.events.iter().filter_map(|event| match event {
            Event::Begin { number, .. } => Some(*number),
            _ => None,
        });
        numbers.max().unwrap_or(0)
    }

    /// Judges what a merge left when `newest` was the newest checkpoint.
    pub(super) fn judge(&self, found: &[Tree; PARTS.len()], newest: Option<u64>, figures: &mut Figures) {
        let reported: Vec<&Run> = self.runs.iter().filter(|run| !run.unreported).collect();
        figures.operations += self.log.done();
        figures.given_up += reported.iter().filter(|run| run.ended.gave_up).count();
        let good: Vec<&Run> = reported.into_iter().filter(|run| !run.ended.gave_up).collect();
        figures.checkpoints.0 += good.len();
        let is_exact = |run: &Run| run.ended.moving.is_empty() && !run.ended.unsettled && !run.unreported;
        figures.checkpoints.1 += good.iter().filter(|run| !is_exact(run) || !run.ended.fuzzy.is_empty()).count();
        figures.cuts += 1;
        let run = self.last(&good, newest);
        figures.unreported += usize::from(run.unreported);
        let mut wrong = Vec::new();
        let mut moments: Option<Vec<(usize, usize)>> = None;
        for (part, found) in found.iter().enumerate() {
            let window = self.window(part, &run);
            if is_exact(&run) {
                let here = self.exact(part, found, window, &run.ended, &mut wrong);
                let both = |moments: Vec<(usize, usize)>| {
                    let common =
                        moments.iter().flat_map(|one| here.iter().map(|two| (one.0.max(two.0), one.1.min(two.1))));
                    common.filter(|(begin, end)| begin <= end).collect::<Vec<_>>()
                };
                moments = Some(moments.map_or_else(|| here.clone(), both));
            } else {
                self.loose(part, found, window, &run, &mut wrong);
            }
        }
        if moments.is_some_and(|moments| moments.is_empty()) && wrong.is_empty() {
            wrong.push("the parts are of different moments".to_owned());
        }
        figures.exact += usize::from(is_exact(&run));
        assert!(wrong.is_empty(), "checkpoint {newest:?}, {run:?}:\n{}", wrong.join("\n"));
    }

    /// The checkpoint whose state the tree has to be.
    fn last(&self, good: &[&Run], newest: Option<u64>) -> Run {
        let best = good.iter().filter_map(|run| run.ended.sequence).max();
        assert!(newest >= best, "checkpoint {best:?} was reported, {newest:?} is the newest");
        let of_newest = good.iter().find(|run| run.ended.sequence == newest && newest.is_some());
        if newest.is_some() && of_newest.is_none() {
            let running = self.runs.iter().filter(|run| run.unreported);
            let start = running.map(|run| run.start).min().unwrap();
            return Run { start, finish: usize::MAX, ended: Ended::default(), unreported: true };
        }
        // One that found nothing changed says as much about the same state.
        let since = of_newest.map_or(0, |run| run.finish);
        let nothing_new = good.iter().rfind(|run| run.ended.sequence.is_none() && run.start >= since);
        match nothing_new.or(of_newest) {
            Some(run) => (*run).clone(),
            None => Run { start: 0, finish: 0, ended: Ended::default(), unreported: false },
        }
    }

    fn window(&self, part: usize, run: &Run) -> Window {
        let operations = &self.operations[part];
        Window {
            first: operations.partition_point(|operation| operation.end < run.start),
            last: operations.partition_point(|operation| operation.begin < run.finish),
        }
    }

    /// One moment for all names. Returns the moments, as places in the log.
    fn exact(
        &self,
        part: usize,
        found: &Tree,
        window: Window,
        ended: &Ended,
        wrong: &mut Vec<String>,
    ) -> Vec<(usize, usize)> {
        let operations = &self.operations[part];
        let found_paths = found.paths();
        let mut moments = Vec::new();
        let mut seen: Vec<BTreeMap<String, Id>> = Vec::new();
        let mut differences = Vec::new();
        let mut tree = self.base[part].clone();
        for done in 0..=window.last {
            if let Some(operation) = done.checked_sub(1).map(|last| &operations[last]) {
                tree.apply(operation.number, &operation.op);
            }
            if done < window.first {
                continue;
            }
            let paths = tree.paths();
            let difference = difference(&tree, &paths, found, &found_paths);
            if done == window.first || done == window.last {
                differences.push(difference.clone());
            }
            if difference.is_none() {
                let begin = done.checked_sub(1).map_or(0, |last| operations[last].begin);
                moments.push((begin, operations.get(done).map_or(usize::MAX, |next| next.end)));
                if !seen.contains(&paths) {
                    seen.push(paths);
                }
            }
        }
        let mut all_wrong = Vec::new();
        for paths in &seen {
            let mut checks = Vec::new();
            for (path, &id) in paths {
                let names = paths.iter().filter(|(_, other)| **other == id);
                let is_fuzzy = names.into_iter().any(|(name, _)| ended.fuzzy.contains(&shown(part, name)));
                checks.push(Check::new(path, id, &found.nodes[&found_paths[path]], window.first, is_fuzzy));
            }
            verdicts(&self.base[part], operations, window.last, &mut checks);
            let mut here: Vec<String> = checks
                .iter()
                .filter_map(|check| Some(format!("{}: {}", shown(part, check.path), check.wrong()?)))
                .collect();
            here.extend(self.links(part, paths, found, &found_paths));
            if here.is_empty() {
                return moments;
            }
            all_wrong.extend(here);
        }
        if seen.is_empty() {
            all_wrong.push(format!("{}: at no moment were the names so: {differences:#?}", PARTS[part]));
        }
        wrong.extend(all_wrong.iter().map(|what| self.explain(part, window, what)));
        Vec::new()
    }

    /// Names of one object are names of one file; others are not, save where they were on disk before.
    fn links(
        &self,
        part: usize,
        paths: &BTreeMap<String, Id>,
        found: &Tree,
        found_paths: &BTreeMap<String, Id>,
    ) -> Vec<String> {
        let mut wrong = Vec::new();
        let inode = |path: &String| found.inodes[&found_paths[path]];
        let before = |id: &Id| self.base[part].inodes.get(id);
        let (mut by_id, mut by_inode) = (BTreeMap::new(), BTreeMap::new());
        for (path, id) in paths {
            if *by_id.entry(id).or_insert(inode(path)) != inode(path) {
                wrong.push(format!("{}: a hard link is broken", shown(part, path)));
            }
            let other = *by_inode.entry(inode(path)).or_insert(id);
            if other != id && (before(other).is_none() || before(other) != before(id)) {
                wrong.push(format!("{}: it is linked with what it never was", shown(part, path)));
            }
        }
        wrong
    }

    /// Each name for itself.
    fn loose(&self, part: usize, found: &Tree, window: Window, run: &Run, wrong: &mut Vec<String>) {
        let operations = &self.operations[part];
        let found_paths = found.paths();
        // What stood at each path, before the checkpoint and during it, and which were there throughout.
        let mut before: BTreeMap<String, BTreeSet<Id>> = BTreeMap::new();
        let mut during: BTreeMap<String, BTreeSet<Id>> = BTreeMap::new();
        let mut throughout: Option<BTreeSet<String>> = None;
        let mut tree = self.base[part].clone();
        for done in 0..=window.last {
            let last = done.checked_sub(1).map(|last| &operations[last]);
            if let Some(operation) = last {
                tree.apply(operation.number, &operation.op);
            }
            if done != window.first && last.is_some_and(|operation| !operation.op.moves()) {
                continue;
            }
            let paths = tree.paths();
            let seen = if done < window.first { &mut before } else { &mut during };
            for (path, &id) in &paths {
                seen.entry(path.clone()).or_default().insert(id);
            }
            if done >= window.first {
                match &mut throughout {
                    None => throughout = Some(paths.into_keys().collect()),
                    Some(all) => all.retain(|path| paths.contains_key(path)),
                }
            }
        }
        let throughout = throughout.unwrap_or_default();
        let excused = Excused::new(part, run, &before, &during);
        let is_moved = |path: &str| {
            let mut above = parent(path);
            while !above.is_empty() {
                if !throughout.contains(above) || during[above].len() > 1 {
                    return true;
                }
                above = parent(above);
            }
            false
        };
        let mut checks = Vec::new();
        for (path, found_id) in &found_paths {
            let mut ids = during.get(path).cloned().unwrap_or_default();
            if excused.has(path) {
                ids.extend(before.get(path).into_iter().flatten());
            }
            if is_moved(path) {
                // Its directory was listed while it moved away.
                let same_name = during.iter().filter(|(other, _)| name(other) == name(path));
                ids.extend(same_name.flat_map(|(_, ids)| ids));
            }
            if ids.is_empty() {
                wrong.push(self.explain(part, window, &format!("{}: it was not there", shown(part, path))));
            }
            for id in ids {
                let from = if excused.has(path) { 0 } else { window.first };
                let may_be_mixed = excused.has(path)
                    || run.ended.fuzzy.iter().any(|fuzzy| {
                        let fuzzy = below(part, fuzzy);
                        fuzzy.is_some_and(|fuzzy| during.get(fuzzy).is_some_and(|ids| ids.contains(&id)))
                    });
                checks.push(Check::new(path, id, &found.nodes[found_id], from, may_be_mixed));
            }
        }
        verdicts(&self.base[part], operations, window.last, &mut checks);
        let good: BTreeSet<&str> =
            checks.iter().filter(|check| check.wrong().is_none()).map(|check| check.path).collect();
        for check in checks.iter().filter(|check| !good.contains(check.path)) {
            let what = format!("{}: {}", shown(part, check.path), check.wrong().unwrap_or_default());
            wrong.push(self.explain(part, window, &what));
        }
        for path in &throughout {
            if !found_paths.contains_key(path) && !excused.has(path) && !is_moved(path) {
                wrong.push(self.explain(part, window, &format!("{}: it is missing", shown(part, path))));
            }
        }
    }

    /// With the operations that name the path.
    fn explain(&self, part: usize, window: Window, what: &str) -> String {
        let path = what.split(':').next().and_then(|path| below(part, path)).unwrap_or_default();
        let operations = self.operations[part].iter().enumerate();
        let named = operations.filter(|(_, operation)| format!("{:?}", operation.op).contains(&format!("\"{path}\"")));
        let mut lines: Vec<_> = named.map(|(at, operation)| format!("  {at} {operation:?}")).collect();
        let skipped = lines.len().saturating_sub(25);
        lines.drain(..skipped);
        format!("{what}\n  {window:?}\n{}", lines.join("\n"))
    }
}

/// What need not be as it was during the checkpoint.
struct Excused<'a> {
    all: bool,
    moving: Vec<&'a str>,
    linked: BTreeSet<&'a str>,
}

impl<'a> Excused<'a> {
    fn new(
        part: usize,
        run: &'a Run,
        before: &'a BTreeMap<String, BTreeSet<Id>>,
        during: &'a BTreeMap<String, BTreeSet<Id>>,
    ) -> Self {
        let moving: Vec<&str> = run.ended.moving.iter().filter_map(|path| below(part, path)).collect();
        let mut excused = Self { all: run.unreported, moving, linked: BTreeSet::new() };
        let all = || before.iter().chain(during);
        let ids: BTreeSet<&Id> = all().filter(|(path, _)| excused.has(path)).flat_map(|(_, ids)| ids).collect();
        excused.linked =
            all().filter(|(_, other)| other.iter().any(|id| ids.contains(id))).map(|(path, _)| path.as_str()).collect();
        excused
    }

    fn has(&self, path: &str) -> bool {
        let is_below = |path: &str, above: &str| path.strip_prefix(above).is_some_and(|rest| rest.starts_with('/'));
        let is_near = |moving: &&str| *moving == path || is_below(path, moving) || is_below(moving, path);
        self.all || self.linked.contains(path) || self.moving.iter().any(is_near)
    }
}

/// How `syncd` shows a path of a part.
fn shown(part: usize, path: &str) -> String {
    format!("/etc/{}/{path}", PARTS[part])
}

/// The path in a part.
fn below(part: usize, shown: &str) -> Option<&str> {
    shown.strip_prefix("/etc/")?.strip_prefix(PARTS[part])?.strip_prefix('/')
}

/// The first difference in names, kinds, or what is said of directories.
fn difference(
    tree: &Tree,
    paths: &BTreeMap<String, Id>,
    found: &Tree,
    found_paths: &BTreeMap<String, Id>,
) -> Option<String> {
    for path in paths.keys().chain(found_paths.keys()) {
        let one = paths.get(path).map(|id| &tree.nodes[id]);
        let other = found_paths.get(path).map(|id| &found.nodes[id]);
        let is_same = match (one, other) {
            (Some(Node { kind: Kind::Dir(_), meta }), Some(Node { kind: Kind::Dir(_), meta: found })) => meta == found,
            (Some(Node { kind: Kind::Symlink(to), .. }), Some(Node { kind: Kind::Symlink(found), .. })) => to == found,
            (Some(Node { kind: Kind::File(_), .. }), Some(Node { kind: Kind::File(_), .. })) => true,
            _ => false,
        };
        if !is_same {
            return Some(format!("{path}: {} and not {}", describe(other), describe(one)));
        }
    }
    None
}

fn describe(node: Option<&Node>) -> String {
    match node {
        None => "nothing".to_owned(),
        Some(Node { kind: Kind::Dir(_), meta }) => format!("a directory {meta:?}"),
        Some(Node { kind: Kind::Symlink(target), .. }) => format!("a symlink to {target}"),
        Some(Node { kind: Kind::File(slots), .. }) => format!("a file of {} slots", slots.len()),
    }
}
