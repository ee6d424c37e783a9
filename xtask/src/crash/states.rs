//! What a disk may hold after a power cut.
//!
//! The cut comes when the device has completed some number of requests. Everything that was written before the last
//! flush among them is there, and so is what was written with FUA. Of the rest each block of 4 KiB is there or is not,
//! in any combination: a disk writes its cache back in an order of its own, and a cut may come in the middle of a write.
//!
//! A state is a few numbers, and always the same for the same log.

use std::collections::HashMap;
use std::fmt;
use std::str::FromStr;

use anyhow::{Context, Result};
use fastrand::Rng;

use super::image::{Image, pieces};
use super::log::Log;

/// A state of the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct State {
    /// How many requests had been completed.
    pub at: usize,
    /// Which of those since the last flush are there: all, or a choice that this number makes; [`NOTHING`] for none.
    pub choice: Option<u64>,
}

/// The choice of nothing but what is durable.
const NOTHING: u64 = 0;

/// States with the same contents, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Distinct(pub Vec<State>);

impl Distinct {
    /// One of them.
    pub(crate) fn first(&self) -> State {
        self.0[0]
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.choice {
            None => write!(f, "{}", self.at),
            Some(choice) => write!(f, "{}/{choice}", self.at),
        }
    }
}

impl FromStr for State {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (at, choice) = text.split_once('/').map_or((text, None), |(at, choice)| (at, Some(choice)));
        let choice = choice.map(str::parse).transpose().context("a choice is a number")?;
        Ok(Self { at: at.parse().context("a crash point is a number")?, choice })
    }
}

/// How a choice is made.
#[derive(Debug, Clone, Copy)]
enum Manner {
    /// Each block, with this probability.
    Blocks(f64),
    /// Each request, with this probability.
    Requests(f64),
    /// All requests but this one.
    AllBut(usize),
    /// This request only.
    Only(usize),
    /// None.
    Nothing,
}

/// The states of one log, from the first crash point to the last, over what the disk held before.
#[derive(Debug)]
pub(crate) struct States<'a> {
    log: &'a Log,
    /// Everything up to the last flush.
    durable: Image,
    /// Up to where that is.
    applied: usize,
}

impl<'a> States<'a> {
    /// Begins with what the disk held before the log.
    pub(crate) fn new(base: &Image, log: &'a Log) -> Self {
        Self { log, durable: base.clone(), applied: 0 }
    }

    /// The contents of a state. Crash points must not go back.
    pub(crate) fn image(&mut self, state: State) -> Image {
        self.advance(state.at);
        let mut image = self.durable.clone();
        chosen(self.log, state).for_each(|(_, offset, piece)| image.write(offset, piece));
        image
    }

    /// The digest of these contents.
    fn digest(&mut self, state: State) -> u128 {
        self.advance(state.at);
        self.durable.digest_with(chosen(self.log, state).map(|(_, offset, piece)| (offset, piece)))
    }

    /// Applies what is durable at a crash point.
    fn advance(&mut self, at: usize) {
        let from = flushed(self.log, at);
        debug_assert!(self.applied <= from, "crash points go back");
        for entry in &self.log.entries()[self.applied..from] {
            self.durable.write(entry.offset, self.log.data(entry));
        }
        self.applied = from;
    }
}

/// Up to where everything is durable after a crash point.
fn flushed(log: &Log, at: usize) -> usize {
    let entries = &log.entries()[..at];
    entries.iter().rposition(|entry| entry.flush).unwrap_or(0)
}

/// The pieces since the last flush that are there, each with the number of its request.
fn chosen(log: &Log, state: State) -> impl Iterator<Item = (usize, u64, &[u8])> {
    let from = flushed(log, state.at);
    let mut rng = Rng::with_seed(state.choice.unwrap_or_default());
    let manner = state.choice.map(|choice| match choice {
        NOTHING => Manner::Nothing,
        _ => manner(&mut rng, from, state.at),
    });
    (from..state.at).flat_map(move |index| {
        let entry = &log.entries()[index];
        let whole = match manner {
            None => true,
            Some(Manner::Requests(probability)) => rng.f64() < probability,
            Some(Manner::AllBut(one)) => index != one,
            Some(Manner::Only(one)) => index == one,
            Some(Manner::Blocks(_) | Manner::Nothing) => false,
        };
        let mut keep = Vec::new();
        for (offset, piece) in pieces(entry.offset, log.data(entry)) {
            let torn = matches!(manner, Some(Manner::Blocks(probability)) if rng.f64() < probability);
            if whole || torn || entry.fua {
                keep.push((index, offset, piece));
            }
        }
        keep
    })
}

fn manner(rng: &mut Rng, from: usize, at: usize) -> Manner {
    let probability = [0.1, 0.5, 0.9][rng.usize(..3)];
    match rng.u32(..8) {
        0..=2 => Manner::Blocks(probability),
        3..=5 => Manner::Requests(probability),
        6 => Manner::AllBut(rng.usize(from..at)),
        _ => Manner::Only(rng.usize(from..at)),
    }
}

/// What of the requests since the last flush is missing, for a message.
pub(crate) fn missing(log: &Log, state: State) -> String {
    let from = flushed(log, state.at);
    let mut there = chosen(log, state).map(|(index, offset, _)| (index, offset)).peekable();
    let mut words = Vec::new();
    for index in from..state.at {
        let entry = &log.entries()[index];
        for (offset, piece) in pieces(entry.offset, log.data(entry)) {
            if there.next_if_eq(&(index, offset)).is_none() {
                words.push(format!("{index}:{offset:#x}+{}", piece.len()));
            }
        }
    }
    match words.len() {
        0 => "nothing".to_owned(),
        1..=12 => words.join(" "),
        count => format!("{} and {} more blocks", words[..12].join(" "), count - 12),
    }
}

/// At most `budget` distinct states, in the order of their crash points: what is durable at each of the `moments`, and
/// of the rest prefixes of the log, evenly thinned out where they are more than half, and random choices. Each has to
/// be right at all crash points that may leave it, wherever nothing or all is there since the last flush.
pub(crate) fn plan(base: &Image, log: &Log, moments: &[usize], budget: usize, rng: &mut Rng) -> Vec<Distinct> {
    let end = log.entries().len();
    let mut all: Vec<State> =
        (0..=end).flat_map(|at| [None, Some(NOTHING)].map(|choice| State { at, choice })).collect();
    let writes: Vec<usize> = (0..end).filter(|&index| !log.data(&log.entries()[index]).is_empty()).collect();
    for _ in 0..budget * 2 {
        let Some(&write) = rng.choice(&writes) else { break };
        let next = log.entries()[write..].iter().position(|entry| entry.flush).map_or(end, |flush| write + flush);
        let at = rng.usize(write..next.max(write + 1)) + 1;
        all.push(State { at, choice: Some(rng.u64(NOTHING + 1..1 << 32)) });
    }
    all.sort();
    let mut states = States::new(base, log);
    let mut known: HashMap<u128, usize> = HashMap::new();
    let mut distinct: Vec<Distinct> = Vec::new();
    for state in all {
        let index = *known.entry(states.digest(state)).or_insert_with(|| {
            distinct.push(Distinct(Vec::new()));
            distinct.len() - 1
        });
        distinct[index].0.push(state);
    }
    let of_a_moment = |state: &State| state.choice == Some(NOTHING) && moments.contains(&state.at);
    let (mut plan, others): (Vec<_>, Vec<_>) =
        distinct.into_iter().partition(|distinct| distinct.0.iter().any(of_a_moment));
    let (prefixes, mut choices): (Vec<_>, Vec<_>) =
        others.into_iter().partition(|distinct| distinct.first().choice.is_none());
    let budget = budget.saturating_sub(plan.len());
    rng.shuffle(&mut choices);
    let share = prefixes.len().min((budget / 2).max(budget.saturating_sub(choices.len())));
    choices.truncate(budget - share);
    let count = prefixes.len().max(1);
    let step = |index: usize| index * share / count;
    let prefixes = prefixes.into_iter().enumerate();
    plan.extend(prefixes.filter(|(index, _)| step(*index) != step(index + 1)).map(|(_, kept)| kept));
    plan.extend(choices);
    plan.sort_by_key(Distinct::first);
    plan
}

#[cfg(test)]
mod tests {
    use super::super::image::BLOCK;
    use super::super::log::tests::log;
    use super::*;

    /// Two writes, a flush, and two writes, one of two blocks.
    fn example() -> Log {
        log(&[Some((0, 8, 1)), Some((8, 8, 2)), None, Some((0, 8, 3)), Some((8, 16, 4))])
    }

    fn bytes(image: &Image) -> [u8; 3] {
        [0, 1, 2].map(|number| image.block(number).map_or(0, |block: &[u8; BLOCK]| block[0]))
    }

    #[test]
    fn a_prefix_has_all_that_was_completed() {
        let log = example();
        let mut states = States::new(&Image::default(), &log);
        let found: Vec<_> = (0..=5).map(|at| bytes(&states.image(State { at, choice: None }))).collect();
        assert_eq!(found, [[0, 0, 0], [1, 0, 0], [1, 2, 0], [1, 2, 0], [3, 2, 0], [3, 4, 4]]);
    }

    #[test]
    fn a_choice_loses_nothing_that_was_flushed_and_anything_else() {
        let log = example();
        let mut seen = std::collections::BTreeSet::new();
        for choice in 0..400 {
            let mut states = States::new(&Image::default(), &log);
            seen.insert(bytes(&states.image(State { at: 5, choice: Some(choice) })));
        }
        let all: Vec<_> =
            [1, 3].iter().flat_map(|&first| [[first, 2, 0], [first, 2, 4], [first, 4, 0], [first, 4, 4]]).collect();
        assert_eq!(seen.into_iter().collect::<Vec<_>>(), all);
    }

    #[test]
    fn a_state_has_a_name_and_is_always_the_same() {
        let log = example();
        let state: State = "5/17".parse().unwrap();
        assert_eq!(state, State { at: 5, choice: Some(17) });
        assert_eq!(state.to_string().parse::<State>().unwrap(), state);
        assert_eq!("5".parse::<State>().unwrap(), State { at: 5, choice: None });
        let image = |state| States::new(&Image::default(), &log).image(state).digest();
        assert_eq!(image(state), image(state));
        assert_eq!(missing(&log, State { at: 5, choice: None }), "nothing");
    }

    #[test]
    fn what_was_written_with_fua_is_there() {
        let log = log(&[Some((0, 8, 1)), Some((8, 8, 2))]).with_fua(1);
        for choice in 0..100 {
            let state = State { at: 2, choice: Some(choice) };
            assert_eq!(bytes(&States::new(&Image::default(), &log).image(state))[1], 2);
        }
    }

    #[test]
    fn the_same_contents_are_one_state_with_all_its_crash_points() {
        let log = example();
        let plan = plan(&Image::default(), &log, &[], 500, &mut Rng::with_seed(1));
        let all = plan.iter().map(|distinct| States::new(&Image::default(), &log).digest(distinct.first()));
        assert_eq!(all.collect::<std::collections::BTreeSet<_>>().len(), plan.len());
        // Before and after the flush the disk holds the same, and after all that follows it may.
        let flush = plan.iter().find(|distinct| distinct.first() == State { at: 2, choice: None }).unwrap();
        for (at, choice) in [(3, None), (3, Some(NOTHING)), (4, Some(NOTHING)), (5, Some(NOTHING))] {
            assert!(flush.0.contains(&State { at, choice }), "{flush:?}");
        }
        // Four that the first two writes can make, and eight of which one is the same.
        assert_eq!(plan.len(), 11);
    }

    #[test]
    fn a_small_budget_thins_the_prefixes_out() {
        let entries: Vec<_> = (0..100).map(|number| Some((number * 8, 8, 1))).collect();
        let log = log(&entries);
        let plan = plan(&Image::default(), &log, &[], 20, &mut Rng::with_seed(1));
        assert_eq!(plan.len(), 20);
        assert_eq!(plan.iter().filter(|distinct| distinct.first().choice.is_none()).count(), 10);
        assert!(plan.is_sorted_by_key(Distinct::first));
    }

    #[test]
    fn what_is_durable_at_a_moment_is_never_left_out() {
        let entries: Vec<_> = (0..100).flat_map(|number| [Some((number * 8, 8, 1)), None]).collect();
        let log = log(&entries);
        let moments = [31, 97, 180];
        let plan = plan(&Image::default(), &log, &moments, 5, &mut Rng::with_seed(1));
        assert_eq!(plan.len(), 5);
        for at in moments {
            let state = State { at, choice: Some(NOTHING) };
            assert!(plan.iter().any(|distinct| distinct.0.contains(&state)), "{plan:?}");
        }
    }
}
