//! The log, the order of the world: a line each, appended by one write(2), which the kernel puts one after the other.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::op::Op;
use super::system::Ended;

/// A line.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) enum Event {
    /// A writer has read the tree.
    Ready,
    /// An operation in a part begins.
    Begin { number: u32, part: usize, op: Op },
    /// It is over; whether it did anything.
    End { number: u32, done: bool },
    /// A checkpoint is started.
    Start { run: usize },
    /// It has ended.
    Finish { run: usize, ended: Ended },
}

/// The log as one process sees it.
#[derive(Debug)]
pub(super) struct Log {
    file: File,
    /// How far it was read, in bytes: whole lines.
    offset: u64,
    /// The lines so far.
    pub(super) events: Vec<Event>,
    done: usize,
}

impl Log {
    /// A new one, in the place of an older.
    pub(super) fn create(path: &Path) -> Self {
        File::create(path).unwrap();
        Self::open(path)
    }

    /// Another process' log.
    pub(super) fn open(path: &Path) -> Self {
        let file = OpenOptions::new().read(true).append(true).open(path).unwrap();
        Self { file, offset: 0, events: Vec::new(), done: 0 }
    }

    pub(super) fn append(&mut self, event: &Event) {
        let mut line = serde_json::to_vec(event).unwrap();
        line.push(b'\n');
        let written = self.file.write(&line).unwrap();
        assert_eq!(written, line.len(), "a line was cut");
    }

    /// Reads what was appended since, by whomever.
    pub(super) fn catch_up(&mut self) {
        let mut buffer = vec![0; 1 << 20];
        loop {
            let length = self.file.read_at(&mut buffer, self.offset).unwrap();
            let whole = buffer[..length].iter().rposition(|&byte| byte == b'\n').map_or(0, |last| last + 1);
            if whole == 0 {
                return;
            }
            for line in buffer[..whole - 1].split(|&byte| byte == b'\n') {
                let event = serde_json::from_slice(line).unwrap();
                self.done += usize::from(matches!(event, Event::End { done: true, .. }));
                self.events.push(event);
            }
            self.offset += whole as u64;
        }
    }

    /// How many operations there were that did something.
    pub(super) fn done(&self) -> usize {
        self.done
    }
}
