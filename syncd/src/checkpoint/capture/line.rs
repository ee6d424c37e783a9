//! The line of work: begun in order, done by whoever is free, taken in and written in order. No thread waits for a
//! round to end, and the same tree gives the same bytes: what a piece of work may refer to depends on its number only.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use super::{Capture, Captured, Done, Long, Work};
use crate::error::{Error, Result};
use crate::format::write::{Frame, Writer};

/// How many pieces of work may be under way, or done before one that stands before them: they are in memory, raw or
/// compressed. A piece refers only to what is so far behind it that it is taken in for certain.
pub(super) const AHEAD: u64 = 8;

/// A line, and who waits at it.
pub(super) struct Line<'a, 'w> {
    /// No more than keeps the threads busy.
    ahead: u64,
    state: Mutex<State<'a, 'w>>,
    moved_on: Condvar,
}

/// Where the line is.
pub(super) struct State<'a, 'w> {
    pub(super) queue: VecDeque<Work>,
    /// The long files that are open.
    pub(super) long: BTreeMap<usize, Long>,
    pub(super) captured: Vec<Captured>,
    /// The length of the data so far.
    pub(super) position: u64,
    /// The number of the work that is begun next, and of the one that is taken in next.
    begun: u64,
    pub(super) next: u64,
    /// What is done, and waits for something before it.
    done: BTreeMap<u64, (Work, Done)>,
    /// Nothing while a thread writes.
    writer: Option<&'w mut Writer<'a>>,
    /// What ended it early.
    failed: Option<Error>,
    stopped: bool,
}

/// What a thread does next.
enum Step<'a, 'w> {
    Begin(u64, Work),
    Write(&'w mut Writer<'a>, Vec<Frame>),
    Wait,
    Leave,
}

impl<'a, 'w> Line<'a, 'w> {
    pub(super) fn new(queue: VecDeque<Work>, files: usize, writer: &'w mut Writer<'a>) -> Self {
        let captured = std::iter::repeat_with(|| None).take(files).collect();
        let state = State {
            queue,
            long: BTreeMap::new(),
            captured,
            position: 0,
            begun: 0,
            next: 0,
            done: BTreeMap::new(),
            writer: Some(writer),
            failed: None,
            stopped: false,
        };
        let ahead = AHEAD.min(2 * rayon::current_num_threads() as u64);
        Self { ahead, state: Mutex::new(state), moved_on: Condvar::new() }
    }

    /// Runs it to its end, with all threads.
    pub(super) fn run(self, capture: &Capture<'_>) -> Result<Vec<Captured>> {
        rayon::broadcast(|_| self.help(capture));
        let state = self.state.into_inner().unwrap_or_else(PoisonError::into_inner);
        state.failed.map_or(Ok(state.captured), Err)
    }

    /// What one thread does. It waits only while another one is at work.
    fn help(&self, capture: &Capture<'_>) {
        let _stop = Stop(self);
        let mut state = self.lock();
        loop {
            let step = state.step(capture, self.ahead).unwrap_or_else(|error| {
                state.fail(error);
                Step::Leave
            });
            match step {
                Step::Begin(number, work) => {
                    drop(state);
                    let done = capture.act(number, &work);
                    state = self.lock();
                    match done {
                        Ok(done) => drop(state.done.insert(number, (work, done))),
                        Err(error) => state.fail(error),
                    }
                }
                Step::Write(writer, frames) => {
                    drop(state);
                    let written = frames.iter().try_for_each(|frame| writer.frame(frame));
                    frames.into_iter().map(Frame::into_buffer).for_each(|buffer| capture.give_buffer(buffer));
                    state = self.lock();
                    state.writer = Some(writer);
                    if let Err(error) = written {
                        state.fail(error);
                    }
                }
                Step::Wait => {
                    state = self.moved_on.wait(state).unwrap_or_else(PoisonError::into_inner);
                    continue;
                }
                Step::Leave => return,
            }
            self.moved_on.notify_all();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State<'a, 'w>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<'a, 'w> State<'a, 'w> {
    fn step(&mut self, capture: &Capture<'_>, ahead: u64) -> Result<Step<'a, 'w>> {
        if self.stopped {
            return Ok(Step::Leave);
        }
        // Writing comes first: it makes room.
        if let Some(writer) = self.writer.take() {
            if let Some((work, done)) = self.done.remove(&self.next) {
                capture.take_in(self, &work, done.parts)?;
                self.position += done.frames.iter().map(Frame::raw_len).sum::<u64>();
                self.next += 1;
                return Ok(Step::Write(writer, done.frames));
            }
            self.writer = Some(writer);
        }
        if self.begun - self.next < ahead
            && let Some(work) = capture.next_work(self)?
        {
            self.begun += 1;
            return Ok(Step::Begin(self.begun - 1, work));
        }
        let is_all = self.begun == self.next && self.writer.is_some();
        Ok(if is_all { Step::Leave } else { Step::Wait })
    }

    /// The first error is the one to report.
    fn fail(&mut self, error: Error) {
        self.failed.get_or_insert(error);
        self.stopped = true;
    }
}

/// Ends the line when a thread panics: the others would wait for what never comes.
struct Stop<'l, 'a, 'w>(&'l Line<'a, 'w>);

impl Drop for Stop<'_, '_, '_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.lock().stopped = true;
        }
        self.0.moved_on.notify_all();
    }
}
