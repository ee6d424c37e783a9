//! What was tried, and what came of it.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Result, bail};
use comfy_table::{CellAlignment, Table, presets};

use super::file_system::FileSystem;
use super::recording::Subject;
use super::workload::Workload;
use crate::say::say;

/// What came of everything so far.
#[derive(Debug)]
pub(crate) struct Found {
    /// A violation is not the end.
    all: bool,
    rows: Mutex<BTreeMap<(FileSystem, Workload), Row>>,
    stop: AtomicBool,
}

/// What came of one file system and workload.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Row {
    /// Requests that were recorded and are no mere flushes.
    pub writes: usize,
    /// Those that are.
    pub flushes: usize,
    /// Distinct states of the disk that were booted from.
    pub states: usize,
    /// Different trees that the file system showed of them, one recording by one.
    pub trees: usize,
    /// States after which the system is not what it must be.
    pub violations: usize,
    /// How long that took.
    pub time: Duration,
}

impl Found {
    /// Nothing yet. Unless `all` are to be counted, the first violation is the end.
    pub(crate) fn new(all: bool) -> Self {
        Self { all, rows: Mutex::default(), stop: AtomicBool::new(false) }
    }

    /// Adds what came of one recording.
    pub(crate) fn add(&self, subject: Subject, row: Row) {
        // A poisoned lock is a panic, which its thread reports.
        if let Ok(mut rows) = self.rows.lock() {
            rows.entry((subject.file_system, subject.workload)).or_default().add(row);
        }
    }

    /// Reports a violation.
    pub(crate) fn violation(&self, words: &str) {
        say(&format!("VIOLATION: {words}\n"));
        if !self.all {
            self.end();
        }
    }

    /// No more is to be tried.
    pub(crate) fn end(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Whether that was said.
    pub(crate) fn is_ended(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// All rows together.
    pub(crate) fn sum(&self) -> Row {
        let mut sum = Row::default();
        if let Ok(rows) = self.rows.lock() {
            rows.values().for_each(|row| sum.add(*row));
        }
        sum
    }

    /// Shows a table; fails if there was a violation.
    pub(crate) fn verdict(&self, time: Duration) -> Result<()> {
        let mut table = Table::new();
        table.load_preset(presets::ASCII_MARKDOWN);
        let head =
            ["file system", "workload", "writes", "flushes", "states", "trees", "violations", "seconds", "states/s"];
        table.set_header(head);
        if let Ok(rows) = self.rows.lock() {
            for ((file_system, workload), row) in rows.iter() {
                table.add_row([file_system.name(), workload.name()].into_iter().chain(row.cells()));
            }
        }
        let sum = Row { time, ..self.sum() };
        table.add_row(["all".to_owned(), String::new()].into_iter().chain(sum.cells()));
        for column in table.column_iter_mut().skip(2) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        say(&table.to_string());
        if sum.violations > 0 {
            bail!("{} of {} states of the disk are not what they must be after a boot", sum.violations, sum.states);
        }
        Ok(())
    }
}

impl Row {
    fn add(&mut self, other: Self) {
        self.writes += other.writes;
        self.flushes += other.flushes;
        self.states += other.states;
        self.trees += other.trees;
        self.violations += other.violations;
        self.time += other.time;
    }

    fn cells(&self) -> [String; 7] {
        let seconds = self.time.as_secs_f64();
        let rate = f64::from(u32::try_from(self.states).unwrap_or(u32::MAX)) / seconds.max(0.001);
        let numbers = [self.writes, self.flushes, self.states, self.trees, self.violations];
        let [writes, flushes, states, trees, violations] = numbers.map(|number| number.to_string());
        [writes, flushes, states, trees, violations, format!("{seconds:.0}"), format!("{rate:.0}")]
    }
}
