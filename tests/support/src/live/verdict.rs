//! Whether an object is in a state that it had.

use std::collections::BTreeMap;

use super::content::TORN;
use super::judge::Operation;
use super::op::Op;
use super::tree::{Id, Kind, Node, Tree};

/// An object that was found, to be compared with the states that one had from an operation on.
#[derive(Debug)]
pub(super) struct Check<'a> {
    pub(super) path: &'a str,
    id: Id,
    found: &'a Node,
    from: usize,
    may_be_mixed: bool,
    /// It was in this very state.
    is_state: bool,
    /// It was read within one write(2).
    is_within_write: bool,
    mixture: Mixture,
}

/// What a mixture of the states can be.
#[derive(Debug, Default)]
struct Mixture {
    /// The last state.
    last: Vec<u32>,
    states: usize,
    lengths: Option<(usize, usize)>,
    /// The slots of the found file that are as in some state, and those that were written.
    same: Vec<bool>,
    written: Vec<bool>,
    meta: bool,
}

impl<'a> Check<'a> {
    pub(super) fn new(path: &'a str, id: Id, found: &'a Node, from: usize, may_be_mixed: bool) -> Self {
        Self {
            path,
            id,
            found,
            from,
            may_be_mixed,
            is_state: false,
            is_within_write: false,
            mixture: Mixture::default(),
        }
    }

    /// What is wrong with it.
    pub(super) fn wrong(&self) -> Option<String> {
        let Kind::File(found) = &self.found.kind else {
            return (!self.is_state).then(|| format!("it never was {:?}", self.found.meta));
        };
        if self.is_state || self.is_within_write {
            return None;
        }
        let is_mixture = self.mixture.is(found);
        if is_mixture && self.may_be_mixed {
            return None;
        }
        let torn = found.iter().filter(|&&slot| slot == TORN).count();
        Some(format!(
            "{} of the {} states that it had: {} slots, {torn} of them torn, lengths {:?}, {} slots of no state, {:?}",
            if is_mixture { "a mixture" } else { "none" },
            self.mixture.states,
            found.len(),
            self.mixture.lengths,
            self.mixture.same.iter().filter(|same| !**same).count(),
            self.found.meta,
        ))
    }

    /// Compares it with a state, which a write(2) led to or something else did.
    fn look(&mut self, node: &Node, is_write: bool) {
        match (&node.kind, &self.found.kind) {
            (Kind::Dir(_), Kind::Dir(_)) => self.is_state |= node.meta == self.found.meta,
            (Kind::File(slots), Kind::File(found)) => {
                self.is_state |= node == self.found;
                // A write(2) sets the times when it begins. Who reads after that, and before it ends, sees both states and
                // no change of times: so does every reader, and there is no way to tell.
                self.is_within_write |=
                    is_write && node.meta == self.found.meta && is_between(&self.mixture.last, slots, found);
                self.mixture.meta |= node.meta == self.found.meta;
                self.mixture.add(slots, found);
            }
            _ => self.is_state |= node == self.found,
        }
    }
}

/// Whether each slot is that of one of two states, or was being written.
fn is_between(before: &[u32], after: &[u32], found: &[u32]) -> bool {
    let slot = |(at, found): (usize, &u32)| {
        let (before, after) = (before.get(at), after.get(at));
        before == Some(found) || after == Some(found) || *found == TORN && before != after
    };
    (before.len()..=after.len()).contains(&found.len()) && found.iter().enumerate().all(slot)
}

impl Mixture {
    fn add(&mut self, slots: &[u32], found: &[u32]) {
        let length = slots.len();
        self.lengths =
            Some(self.lengths.map_or((length, length), |(least, most)| (least.min(length), most.max(length))));
        self.same.resize(found.len(), false);
        self.written.resize(found.len(), false);
        for (at, found) in found.iter().enumerate() {
            let now = slots.get(at);
            self.same[at] |= now == Some(found);
            self.written[at] |= self.states > 0 && now != self.last.get(at);
        }
        self.last = slots.to_vec();
        self.states += 1;
    }

    fn is(&self, found: &[u32]) -> bool {
        let fits = |(least, most)| (least..=most).contains(&found.len());
        let slot = |(at, slot): (usize, &u32)| self.same[at] || *slot == TORN && self.written[at];
        self.meta && self.lengths.is_some_and(fits) && found.iter().enumerate().all(slot)
    }
}

/// Lets the first operations happen, and compares all along.
pub(super) fn verdicts(base: &Tree, operations: &[Operation], last: usize, checks: &mut [Check<'_>]) {
    let mut by_id: BTreeMap<Id, Vec<usize>> = BTreeMap::new();
    for (at, check) in checks.iter().enumerate() {
        by_id.entry(check.id).or_default().push(at);
    }
    let mut tree = base.clone();
    for done in 0..=last {
        let touched = match done.checked_sub(1).map(|last| &operations[last]) {
            None => Vec::new(),
            Some(operation) => {
                let touched = tree.apply(operation.number, &operation.op);
                for &check in touched.iter().filter_map(|id| by_id.get(id)).flatten() {
                    // Nobody can see when that is seen.
                    checks[check].may_be_mixed |= done > checks[check].from && matches!(operation.op, Op::Map { .. });
                }
                touched
            }
        };
        let last = done.checked_sub(1).map(|last| &operations[last].op);
        let is_write = matches!(last, Some(Op::Write { .. } | Op::Append { .. }));
        for (id, at) in &by_id {
            let Some(node) = tree.nodes.get(id) else { continue };
            for &at in at {
                let check = &mut checks[at];
                if done == check.from || done > check.from && touched.contains(id) {
                    check.look(node, done > check.from && is_write);
                }
            }
        }
    }
}
