//! Has the kernel answer a call with an error, and judges what the command makes of it.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::Command;

use crate::sweep::{CALLS, strace, trace};
use crate::tools::text;

/// How many points of a command are tried.
const SAMPLE: usize = 8;

/// A command over which is swept.
pub(super) struct Case<'a> {
    pub(super) name: &'a str,
    /// The directory on disk.
    pub(super) lower: &'a Path,
    pub(super) command: &'a Command,
    /// How it ends without errors.
    pub(super) usual: i32,
    /// Makes the state before it anew.
    pub(super) prepare: &'a dyn Fn(),
    /// Looks at what it left.
    pub(super) check: &'a dyn Fn(&Verdict),
}

/// What a command said of itself.
pub(super) enum Verdict {
    /// As without an error: everything has to be there.
    Done,
    /// Something cannot be on the disk.
    Partly(String),
    /// It failed.
    Failed,
}

/// One point of a run, and what is done to it.
struct Injection<'a> {
    call: &'a str,
    number: usize,
    errno: &'static str,
    /// All calls from there on fail.
    for_good: bool,
    /// Only what is made in this directory counts.
    within: Option<&'a str>,
}

impl fmt::Display for Injection<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let more = if self.for_good { "+" } else { "" };
        write!(f, "{}:error={}:when={}{more}", self.call, self.errno, self.number)?;
        self.within.map_or(Ok(()), |path| write!(f, " -P {path}"))
    }
}

/// How many points were tried, and how many of these the command did not survive.
#[derive(Default)]
struct Count {
    points: usize,
    failed: usize,
}

/// Runs a command once for every point and error.
pub(super) fn sweep(case: &Case<'_>) {
    let is_full = std::env::var("ERRORS").is_ok_and(|value| value == "full");
    let only = std::env::var("ERRORS_AT").ok();
    (case.prepare)();
    let lower = case.lower.to_str().unwrap();
    let lines = trace(case.command, CALLS, &[]);
    (case.prepare)();
    // Others open so much that the threads which make files never come to such a number.
    let made = trace(case.command, "openat", &["-P", lower]);
    let mut injections = Vec::new();
    let all = lines.iter().map(|all| (all, None)).chain(made.iter().map(|all| (all, Some(lower))));
    for ((call, lines), within) in all.filter(|((call, _), _)| only.as_ref().is_none_or(|only| only == *call)) {
        for (index, lines) in lines.iter().enumerate() {
            // Of what is opened only what is made counts.
            if call == "openat" && !lines.iter().any(|line| line.contains("O_CREAT")) {
                continue;
            }
            for (errno, for_good) in [("EIO", false), ("ENOSPC", false), ("EIO", true), ("ENOSPC", true)] {
                injections.push(Injection { call, number: index + 1, errno, for_good, within });
            }
        }
    }
    let all = injections.len();
    // Odd, so that both errors, and both ways to meet them, have their turn.
    let stride = if is_full || only.is_some() { 1 } else { (all / SAMPLE) | 1 };
    let mut counts: BTreeMap<(&str, &str, bool), Count> = BTreeMap::new();
    let mut violations = Vec::new();
    // A merge hangs on its one syncfs(2).
    let is_chosen =
        |(index, injection): &(usize, &Injection<'_>)| index % stride == stride / 2 || injection.call == "syncfs";
    for (_, injection) in injections.iter().enumerate().filter(is_chosen) {
        (case.prepare)();
        let result = catch_unwind(AssertUnwindSafe(|| one(case, injection)));
        let count = counts.entry((injection.call, injection.errno, injection.for_good)).or_default();
        match result {
            Ok(None) => continue,
            Ok(Some(Verdict::Failed)) => count.failed += 1,
            Ok(Some(_)) => {}
            Err(_said) => violations.push(injection.to_string()),
        }
        count.points += 1;
    }
    let (mut points, mut failed) = (0, 0);
    for ((call, errno, for_good), count) in &counts {
        let how = if *for_good { "for good" } else { "once" };
        println!("{}: {call} {errno} {how}: {} points, {} failed", case.name, count.points, count.failed);
        points += count.points;
        failed += count.failed;
    }
    println!("{}: {points} of {all} points, {failed} failed, {} violations", case.name, violations.len());
    assert!(violations.is_empty(), "{}: inject {}", case.name, violations.join("\ninject "));
    // How many there are at the end depends on what else the machine runs.
    assert!(only.is_some() || points > all / stride * 3 / 4 && failed > 0, "{}: too few", case.name);
}

/// Runs a command with one injection; nothing when it never came there.
fn one(case: &Case<'_>, injection: &Injection<'_>) -> Option<Verdict> {
    let log = tempfile::NamedTempFile::new().unwrap();
    let more = if injection.for_good { "+" } else { "" };
    let inject = format!("inject={}:error={}:when={}{more}", injection.call, injection.errno, injection.number);
    let mut options = vec!["-y", "-e", &inject, "-o", log.path().to_str().unwrap()];
    options.extend(injection.within.iter().flat_map(|path| ["-P", *path]));
    let output = strace(case.command, &options);
    let log = fs::read_to_string(log.path()).unwrap();
    let met = &injected(&log)?;
    let words = text(&output);
    let shown = format!("{injection}\n{met}\n{words}");
    println!("{shown}");
    // ext4 says so of one attribute that does not fit, too.
    let is_left = injection.errno == "ENOSPC" && injection.call.ends_with("setxattr") && said(injection, met, &words);
    let verdict = match output.status.code() {
        // The loader did not find a library.
        Some(127) => return None,
        Some(1) => Verdict::Failed,
        Some(3) if is_left => Verdict::Partly(words.clone()),
        Some(code) if code == case.usual => Verdict::Done,
        _ => panic!("it is neither done nor did it fail\n{shown}"),
    };
    // What goes to standard error may be lost itself.
    let is_told = met.contains("(2<") || injection.for_good && injection.call == "write" && output.stderr.is_empty();
    assert!(
        matches!(verdict, Verdict::Done) || is_told || said(injection, met, &words),
        "the error is not named\n{shown}"
    );
    // Nothing shows what was not synced before the power is cut. There may be a reserve or not.
    let is_sync = ["fsync", "fdatasync", "syncfs"].contains(&injection.call);
    let is_reserve = ["/ephemeral-overlay/.tmp-", "/ephemeral-overlay>"].iter().any(|path| met.contains(path));
    assert!(!is_sync || is_reserve || !matches!(verdict, Verdict::Done), "a failed sync was passed over\n{shown}");
    (case.check)(&verdict);
    Some(verdict)
}

/// The call that was made to fail, whole: what another thread did meanwhile may stand between its two halves.
fn injected(log: &str) -> Option<String> {
    let (before, from) = log.split_at(log.find("(INJECTED)")?);
    let (before, line) = before.rsplit_once('\n').unwrap_or(("", before));
    let end = from.lines().next().unwrap_or_default();
    let Some((thread, rest)) = line.split_once("<... ") else { return Some(format!("{line}{end}")) };
    let begun = before.lines().rfind(|line| line.starts_with(thread) && line.ends_with("<unfinished ...>"))?;
    Some(format!("{begun} {rest}{end}"))
}

/// Whether a message names the call, a path and the error.
fn said(injection: &Injection<'_>, met: &str, words: &str) -> bool {
    let error = if injection.errno == "EIO" { "Input/output error" } else { "No space left on device" };
    words.lines().any(|line| {
        // Who only opens to read says what for.
        let is_look = injection.call == "openat" && !met.contains("O_CREAT");
        let is_named = line.split([' ', '(']).any(|word| root(word) == root(injection.call));
        (is_look || is_named) && line.contains(error) && line.split([' ', '(']).any(|word| word.starts_with('/'))
    })
}

/// What the names of a call have in common: `fchownat` is `chown`.
fn root(call: &str) -> &str {
    let call = call.trim_end_matches(':').trim_end_matches(|c: char| c.is_ascii_digit());
    let call = call.strip_suffix("at").unwrap_or(call);
    match call {
        "rmdir" => "unlink",
        "fsync" | "syncfs" | "fallocate" | "fdatasync" | "link" => call,
        _ => call.strip_prefix(['f', 'l']).unwrap_or(call),
    }
}
