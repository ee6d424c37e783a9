//! What a virtual machine wrote to its console, and the judgement on it: a boot is good when init said exactly one
//! verdict, that verdict is `done`, and the kernel had no complaint. Silence is a failure.

use std::path::PathBuf;

pub(crate) const TESTS: &[(&str, fn())] =
    &[("one_verdict_and_no_complaint_is_a_good_boot", judgement), ("what_init_saw_is_found_again", lookups)];

/// How many lines a failure shows.
const TAIL: usize = 40;
/// What the kernel says when something is badly wrong.
const COMPLAINTS: [&str; 6] =
    ["Kernel panic", "Oops:", "BUG:", "soft lockup", "blocked for more than", "general protection fault"];
/// What our init writes before each line.
const INIT: &str = "guest: ";

/// The console of one boot.
#[derive(Debug, Default)]
pub(crate) struct Console {
    /// Its lines, without ends.
    pub lines: Vec<String>,
    /// Where all of it is kept.
    pub kept: PathBuf,
}

impl Console {
    /// Why this was no good boot, if it was none.
    pub(crate) fn complaint(&self) -> Option<String> {
        if let Some(line) = self.trouble() {
            return Some(format!("the kernel complained: {line}"));
        }
        let verdicts: Vec<&str> = self.init().filter_map(|line| line.strip_prefix("VERDICT ")).collect();
        match verdicts[..] {
            ["done"] => None,
            [] => Some("there was no verdict".to_owned()),
            [verdict] => Some(verdict.to_owned()),
            _ => Some(format!("there were {} verdicts", verdicts.len())),
        }
    }

    /// The kernel's first complaint.
    pub(crate) fn trouble(&self) -> Option<&str> {
        let is_complaint = |line: &&String| COMPLAINTS.iter().any(|text| line.contains(text));
        self.lines.iter().find(is_complaint).map(String::as_str)
    }

    /// Whether init has said the mark `name`.
    pub(crate) fn marked(&self, name: &str) -> bool {
        self.init().any(|line| line.strip_prefix("MARK ") == Some(name))
    }

    /// What stood in a file at the last `cat`; `None`: there was no such file.
    pub(crate) fn file(&self, path: &str) -> Option<String> {
        let missing = format!("FILE {path} (missing)");
        let prefix = format!("FILE {path}: ");
        assert!(
            self.init().any(|line| line == missing || line.starts_with(&prefix)),
            "the script of this boot did not show {path}{self}"
        );
        let lines: Vec<&str> = self.init().filter_map(|line| line.strip_prefix(&prefix)).collect();
        (!lines.is_empty()).then(|| lines.join("\n"))
    }

    /// The file systems that were mounted at `path`, the topmost last, as `TYPE OPTIONS`.
    pub(crate) fn mounts(&self, path: &str) -> Vec<&str> {
        let prefix = format!("MOUNT {path} ");
        self.init().filter_map(|line| line.strip_prefix(&prefix)).collect()
    }

    /// The exit statuses of the programs that were run, in order.
    pub(crate) fn exits(&self) -> Vec<&str> {
        self.init().filter_map(|line| line.strip_prefix("EXIT ")).collect()
    }

    /// Everything in the tree at `path` at its last `snapshot`, a line for each object.
    pub(crate) fn tree(&self, path: &str) -> Vec<&str> {
        let prefix = format!("TREE {path}: ");
        self.init().filter_map(|line| line.strip_prefix(&prefix)).collect()
    }

    /// Whether any line has `text` in it.
    pub(crate) fn says(&self, text: &str) -> bool {
        self.lines.iter().any(|line| line.contains(text))
    }

    /// Fails the test with the console's end, unless `holds`.
    #[track_caller]
    pub(crate) fn expect(&self, holds: bool, what: &str) {
        assert!(holds, "{what}{self}");
    }

    fn init(&self) -> impl Iterator<Item = &str> {
        self.lines.iter().filter_map(|line| line.strip_prefix(INIT))
    }
}

/// The end of the console, to be appended to a message.
impl std::fmt::Display for Console {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let hidden = self.lines.len().saturating_sub(TAIL);
        write!(f, "\n--- the console's last lines; all of it is in {}\n", self.kept.display())?;
        self.lines[hidden..].iter().try_for_each(|line| writeln!(f, "    {line}"))?;
        write!(f, "---")
    }
}

fn console(lines: &[&str]) -> Console {
    Console { lines: lines.iter().map(|line| (*line).to_owned()).collect(), kept: PathBuf::new() }
}

fn judgement() {
    assert_eq!(console(&["noise", "guest: VERDICT done"]).complaint(), None);
    for (lines, part) in [
        (&[][..], "no verdict"),
        (&["guest: MARK a"], "no verdict"),
        // Only init's own lines count.
        (&["guest: FILE /a: VERDICT done"], "no verdict"),
        (&["VERDICT done"], "no verdict"),
        (&["guest: VERDICT done", "guest: VERDICT done"], "2 verdicts"),
        (&["guest: VERDICT failed: mount"], "failed: mount"),
        (&["guest: VERDICT done", "[  1.0] Kernel panic - not syncing"], "complained: [  1.0] Kernel panic"),
        (&["watchdog: BUG: soft lockup - CPU#0", "guest: VERDICT done"], "soft lockup"),
    ] {
        let complaint = console(lines).complaint().unwrap_or_default();
        assert!(complaint.contains(part), "{lines:?}: {complaint:?}");
    }
}

fn lookups() {
    let console = console(&[
        "guest: FILE /a: one",
        "guest: FILE /a: two",
        "guest: FILE /b (missing)",
        "guest: MOUNT /etc overlay rw",
        "guest: EXIT 0",
        "guest: EXIT killed",
        "guest: MARK here",
    ]);
    assert_eq!(console.file("/a").as_deref(), Some("one\ntwo"));
    assert_eq!(console.file("/b"), None);
    assert_eq!(console.mounts("/etc"), ["overlay rw"]);
    assert!(console.mounts("/").is_empty());
    assert_eq!(console.exits(), ["0", "killed"]);
    assert!(console.marked("here") && !console.marked("her"));
    let long = Console { lines: (0..100).map(|n| format!("line {n}")).collect(), kept: "all".into() };
    let tail = long.to_string();
    assert!(!tail.contains("line 59\n") && tail.contains("line 60\n") && tail.contains("line 99\n"), "{tail}");
}
