//! The cleaner of stale files: what it removes, and above all what it does not.

mod cases;
mod hostile;

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::path::Path;
use std::process::Command;
use std::thread::sleep;
use std::time::Duration;

use ephemeral_overlay::Layout;
use ephemeral_overlay::config::Config;
use rustix::fs::{
    AtFlags, CWD, FlockOperation, Mode, OFlags, RenameFlags, flock, mkdirat, openat, renameat_with, statat,
};
use rustix::mount::{UnmountFlags, mount_bind, unmount};
use syncd::clean::{CleanOptions, CleanStats, Moment, Seen, pass};
use test_support::mapped::Mapping;

use crate::tools::{self, text};
use crate::world::{World, expect};
use cases::{CASES, Then, below, plain};

pub(crate) const TESTS: &[(&str, fn())] = &[
    ("what_goes_and_what_stays", what_goes_and_what_stays),
    ("a_dry_run_lists_what_would_go", a_dry_run_lists_what_would_go),
    ("a_clock_that_is_set_ages_nothing", a_clock_that_is_set_ages_nothing),
    ("a_file_is_as_old_as_we_have_known_it", a_file_is_as_old_as_we_have_known_it),
    ("only_what_exists_is_remembered", only_what_exists_is_remembered),
    ("what_was_in_use_is_young", what_was_in_use_is_young),
    ("a_tree_deeper_than_any_limit_goes", a_tree_deeper_than_any_limit_goes),
    ("a_moved_directory_does_not_lead_out", a_moved_directory_does_not_lead_out),
    ("directories_of_the_cache_stay", directories_of_the_cache_stay),
    ("what_is_mounted_elsewhere_stays_in_a_part_of_a_tmpfs", mounted_elsewhere_from_a_part),
    ("only_a_tmpfs_is_cleaned", only_a_tmpfs_is_cleaned),
    ("nothing_is_removed_by_a_config_that_cannot_be_read", a_config_that_cannot_be_read),
    ("looking_changes_no_time", looking_changes_no_time),
    ("hostile_races_do_not_lead_out", hostile::hostile_races_do_not_lead_out),
];

/// One folder, and no overlay.
const TMP: &str = "overlay.dirs = []\ntmpfs = { '/tmp' = '64M', '/var/tmp' = false, '/var/cache' = false }\n";
/// Longer than what a test needs to lay its files out, and to touch some of them between two passes.
const STALE: Duration = Duration::from_millis(800);

fn world(more: &str) -> World {
    let world = World::new(&format!("{TMP}cleanup.stale = '800ms'\n{more}"));
    world.boot();
    world
}

/// The library, on a world's own terms.
struct Cleaner {
    layout: Layout,
    config: Config,
    seen: Seen,
}

impl Cleaner {
    fn new(world: &World, config: &str) -> Self {
        let config = Config::parse(&[("test.toml".into(), config.to_owned())]).unwrap();
        Self { layout: Layout::new(&world.root, Some(&world.run), None), config, seen: Seen::default() }
    }

    fn pass(&mut self, now: Moment) -> CleanStats {
        let options = CleanOptions { now, dry_run: false };
        pass(&self.layout, &self.config, &options, &mut self.seen, &mut |_| {}).unwrap()
    }
}

fn what_goes_and_what_stays() {
    let world = world("cleanup.exclude = ['/tmp/keep-*']\n");
    let tmp = world.at("tmp");
    for (directory, file, lines) in [
        ("usr/lib/tmpfiles.d", "a.conf", "x /tmp/line-x-*\nX %T/line-X*\nd /tmp/line-d 1777 root root 1s\n"),
        ("usr/lib/tmpfiles.d", "masked.conf", "x /tmp/masked\n"),
        ("etc/tmpfiles.d", "masked.conf", ""),
        ("etc/tmpfiles.d", "not-a-conf", "x /tmp\n"),
    ] {
        fs::create_dir_all(world.at(directory)).unwrap();
        fs::write(world.at(directory).join(file), lines).unwrap();
    }
    fs::create_dir(world.at("canary")).unwrap();
    plain(&world.at("canary/file"));
    let not_text = OsString::from_vec(b"not-\xff-text".to_vec());
    let long = OsString::from("n".repeat(255));
    plain(&tmp.join(&not_text));
    plain(&tmp.join(&long));
    let mut holders = Vec::new();
    for (_, name, make, _) in CASES {
        holders.push(make(&tmp.join(name)));
    }
    let output = world.syncd(&["clean"]);
    expect(&output, 0);
    assert!(text(&output).contains("0 files and 0 directories removed"), "{}", text(&output));
    sleep(STALE + Duration::from_millis(100));
    for (_, name, _, then) in CASES {
        if let Then::Touched(touch) = then {
            touch(&tmp.join(name));
        }
    }
    let output = world.syncd(&["clean"]);
    let mut wrong = Vec::new();
    for (what, name, _, then) in CASES {
        let is_there = tmp.join(name).symlink_metadata().is_ok();
        if is_there == matches!(then, Then::Goes) {
            wrong.push(format!("{what} ({name}) {}", if is_there { "stayed" } else { "went" }));
        }
    }
    for (what, name) in [("a name that is no UTF-8", &not_text), ("a name of 255 bytes", &long)] {
        if tmp.join(name).exists() {
            wrong.push(format!("{what} stayed"));
        }
    }
    let canary = fs::read(world.at("canary/file"));
    drop(holders);
    for mount in ["mounted", "bound"] {
        unmount(tmp.join(mount), UnmountFlags::DETACH).unwrap();
    }
    assert!(wrong.is_empty(), "{wrong:#?}\n{}", text(&output));
    expect(&output, 0);
    assert_eq!(canary.unwrap(), b"content");
    assert!(!text(&output).contains(" 0 files"), "{}", text(&output));
}

fn a_dry_run_lists_what_would_go() {
    let world = world("");
    let tmp = world.at("tmp");
    for name in ["a", "open", "dir/b", "locked/c"] {
        below(&tmp.join(name));
    }
    let open = File::open(tmp.join("open")).unwrap();
    let locked = File::open(tmp.join("locked")).unwrap();
    flock(&locked, FlockOperation::NonBlockingLockShared).unwrap();
    // It notes nothing, either: the run after it is the first one.
    expect(&world.syncd(&["clean", "--dry-run"]), 0);
    sleep(STALE);
    let output = world.syncd(&["clean"]);
    assert!(text(&output).contains("5 old, but not known for long enough"), "{}", text(&output));
    sleep(STALE + Duration::from_millis(100));
    let output = world.syncd(&["clean", "--dry-run"]);
    expect(&output, 0);
    let said = String::from_utf8(output.stdout.clone()).unwrap();
    let names: Vec<_> = said.lines().map(|line| line.split_once(" (").unwrap().0).collect();
    assert_eq!(names, ["/tmp/a", "/tmp/dir/b", "/tmp/dir"]);
    assert!(said.contains("/tmp/a (0s)") || said.contains("/tmp/a (1s)"), "{said}");
    assert!(tmp.join("a").exists() && tmp.join("dir/b").exists(), "a dry run removed something");

    let output = world.syncd(&["clean", "--json"]);
    expect(&output, 0);
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((report["version"].as_u64(), report["dry_run"].as_bool()), (Some(1), Some(false)));
    let folder = &report["folders"][0];
    let number = |key: &str| folder[key].as_u64().unwrap_or_else(|| panic!("{key}: {folder}"));
    assert_eq!(folder["path"], "/tmp");
    assert_eq!(["files", "directories", "in_use", "waiting", "failed"].map(number), [2, 1, 2, 0, 0]);
    assert_eq!(number("bytes"), 8192);
    let removed: Vec<_> = report["removed"].as_array().unwrap().iter().map(|gone| gone["path"].as_str()).collect();
    assert_eq!(removed, [Some("/tmp/a"), Some("/tmp/dir/b"), Some("/tmp/dir")]);
    assert_eq!((&report["removed"][0]["kind"], &report["removed"][2]["kind"]), (&"file".into(), &"directory".into()));
    assert!(!tmp.join("a").exists() && !tmp.join("dir").exists());
    drop((open, locked));
}

const HOUR: Duration = Duration::from_secs(3600);
const MINUTE: Duration = Duration::from_secs(60);

/// Later by both clocks.
fn later(now: Moment, by: Duration) -> Moment {
    Moment { wall: now.wall + by, awake: now.awake + by }
}

fn a_clock_that_is_set_ages_nothing() {
    let world = world("");
    let path = world.at("tmp/file");
    plain(&path);
    let mut cleaner = Cleaner::new(&world, TMP);
    let start = Moment::now();
    // Known for long, and touched: an hour passes on the wall alone, by a step of the clock or a suspend.
    cleaner.pass(start);
    plain(&path);
    let stats = cleaner.pass(Moment { wall: start.wall + HOUR, awake: start.awake + 9 * MINUTE });
    assert_eq!((stats.folders[0].files, stats.folders[0].waiting), (0, 1));
    assert!(path.exists(), "it was touched a moment ago, before the clock was set");
    cleaner.pass(Moment { wall: start.wall + 2 * HOUR, awake: start.awake + 18 * MINUTE });
    assert!(path.exists());
    // The clock goes back: the file is from the future.
    cleaner.pass(Moment { wall: start.wall.saturating_sub(HOUR), awake: start.awake + HOUR });
    assert!(path.exists(), "its times are younger than now");
    cleaner.pass(Moment { wall: start.wall + HOUR, awake: start.awake + HOUR });
    assert!(!path.exists());
}

fn a_file_is_as_old_as_we_have_known_it() {
    let world = world("");
    let path = world.at("tmp/file");
    plain(&path);
    let mut cleaner = Cleaner::new(&world, TMP);
    let start = later(Moment::now(), 24 * HOUR);
    assert_eq!(cleaner.pass(start).folders[0].waiting, 1);
    assert!(path.exists(), "nobody knows for how long it was there");
    cleaner.pass(later(start, 10 * MINUTE));
    assert!(path.exists(), "ten minutes are not more than ten minutes");
    // Another file of the same name.
    fs::write(world.at("tmp/other"), "other").unwrap();
    fs::rename(world.at("tmp/other"), &path).unwrap();
    cleaner.pass(later(start, 11 * MINUTE));
    assert!(path.exists(), "it was taken for another one");
    cleaner.pass(later(start, 22 * MINUTE));
    assert!(!path.exists());
}

fn only_what_exists_is_remembered() {
    let world = world("");
    let record = world.run.join("cleaner");
    for name in 0..1000 {
        plain(&world.at(&format!("tmp/{name}")));
    }
    expect(&world.syncd(&["clean"]), 0);
    let many = fs::metadata(&record).unwrap().len();
    assert!((10_000..40_000).contains(&many), "{many} bytes for 1000 files");
    for name in 0..1000 {
        fs::remove_file(world.at(&format!("tmp/{name}"))).unwrap();
    }
    expect(&world.syncd(&["clean"]), 0);
    assert!(fs::metadata(&record).unwrap().len() < 200, "what is gone is still remembered");
    // A damaged record is none.
    plain(&world.at("tmp/file"));
    fs::write(&record, "damaged").unwrap();
    expect(&world.syncd(&["clean"]), 0);
    sleep(STALE + Duration::from_millis(100));
    expect(&world.syncd(&["clean"]), 0);
    assert!(!world.at("tmp/file").exists());
}

/// What is written through a mapping changes no times.
fn what_was_in_use_is_young() {
    let world = world("");
    let path = world.at("tmp/file");
    plain(&path);
    let mapping = Mapping::new(&OpenOptions::new().read(true).write(true).open(&path).unwrap(), 7);
    // The first one does.
    mapping.write(b"written");
    let mut cleaner = Cleaner::new(&world, TMP);
    let start = Moment::now();
    cleaner.pass(start);
    assert_eq!(cleaner.pass(later(start, HOUR)).folders[0].in_use, 1);
    mapping.write(b"changed");
    drop(mapping);
    cleaner.pass(later(start, HOUR + MINUTE));
    assert!(path.exists(), "it was in use a minute ago");
    cleaner.pass(later(start, HOUR + 11 * MINUTE));
    assert!(!path.exists());
}

/// Makes a chain of `depth` directories named `d` and puts a file into the last one.
fn deep(at: &Path, depth: usize) {
    let mut dir: OwnedFd = File::open(at).unwrap().into();
    for _ in 0..depth {
        mkdirat(&dir, "d", Mode::RWXU).unwrap();
        dir = openat(&dir, "d", OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap();
    }
    openat(dir, "file", OFlags::CREATE | OFlags::WRONLY, Mode::RUSR).unwrap();
}

fn a_tree_deeper_than_any_limit_goes() {
    let world = world("");
    deep(&world.at("tmp"), 5000);
    let clean = || {
        let mut command = world.syncd_command(&["clean"]);
        // Neither descriptors nor a stack for so many levels.
        let words: Vec<_> = command.get_args().map(OsStr::to_owned).collect();
        let program = command.get_program().to_owned();
        command = Command::new("sh");
        command.args(["-c", r#"ulimit -n 128 && ulimit -s 512 && exec "$0" "$@""#]).arg(program).args(words);
        command.output().unwrap()
    };
    expect(&clean(), 0);
    sleep(STALE + Duration::from_millis(100));
    let output = clean();
    expect(&output, 0);
    assert!(text(&output).contains("1 file and 5000 directories removed"), "{}", text(&output));
    assert_eq!(fs::read_dir(world.at("tmp")).unwrap().count(), 0);
}

/// What was opened on the way down is closed again in a deep tree, and may be elsewhere when the walk comes back.
fn a_moved_directory_does_not_lead_out() {
    let world = world("");
    let tmp = world.at("tmp");
    fs::create_dir_all(tmp.join("a/d")).unwrap();
    deep(&tmp.join("a/d"), 200);
    // Where it is moved to there are old files that must not be taken for the walk's own.
    fs::create_dir_all(tmp.join("keep-1/d")).unwrap();
    plain(&tmp.join("keep-1/canary"));
    let mut cleaner = Cleaner::new(&world, &format!("{TMP}cleanup.exclude = ['/tmp/keep-*']\n"));
    let start = Moment::now();
    cleaner.pass(start);
    let options = CleanOptions { now: later(start, HOUR), dry_run: false };
    let mut moved = false;
    let stats = pass(&cleaner.layout, &cleaner.config, &options, &mut cleaner.seen, &mut |_| {
        if !moved {
            moved = true;
            renameat_with(CWD, tmp.join("a/d"), CWD, tmp.join("keep-1/d"), RenameFlags::EXCHANGE).unwrap();
        }
    });
    let stats = stats.unwrap();
    assert!(moved && tmp.join("keep-1/canary").exists());
    assert!(tmp.join("keep-1/d").exists(), "it was removed where it is now, which nobody looked at");
    assert_eq!(stats.folders[0].failed, 0, "{stats:?}");
}

fn directories_of_the_cache_stay() {
    let world = World::new(
        "overlay.dirs = []\ntmpfs = { '/tmp' = false, '/var/tmp' = false, '/var/cache' = '64M' }\n\
         cleanup.stale = '300ms'\npersist.var_cache = ['kept']\n",
    );
    for directory in ["archives/partial", "kept"] {
        fs::create_dir_all(world.at("var/cache").join(directory)).unwrap();
    }
    plain(&world.at("var/cache/kept/file"));
    world.boot();
    plain(&world.at("var/cache/archives/file"));
    expect(&world.syncd(&["clean"]), 0);
    sleep(Duration::from_millis(400));
    expect(&world.syncd(&["clean"]), 0);
    assert!(!world.at("var/cache/archives/file").exists());
    assert!(world.at("var/cache/archives/partial").exists(), "programs expect the directories of /var/cache");
    assert!(world.at("var/cache/kept/file").exists(), "what is kept on disk was cleaned");
}

/// The kernel tells mounts by paths inside the file system, of which the folder is not the root here.
fn mounted_elsewhere_from_a_part() {
    let world = world("");
    let (tmp, elsewhere) = (world.at("tmp"), world.at("elsewhere"));
    fs::create_dir(tmp.join("part")).unwrap();
    mount_bind(tmp.join("part"), &tmp).unwrap();
    for directory in [&tmp.join("bound"), &tmp.join("empty"), &elsewhere] {
        fs::create_dir(directory).unwrap();
    }
    mount_bind(tmp.join("bound"), &elsewhere).unwrap();
    let mut cleaner = Cleaner::new(&world, TMP);
    let start = Moment::now();
    cleaner.pass(start);
    cleaner.pass(later(start, HOUR));
    let left = ["bound", "empty"].map(|name| tmp.join(name).exists());
    unmount(&elsewhere, UnmountFlags::DETACH).unwrap();
    unmount(&tmp, UnmountFlags::DETACH).unwrap();
    assert_eq!(left, [true, false]);
}

fn only_a_tmpfs_is_cleaned() {
    let world = World::new(&format!("{}cleanup.stale = '300ms'\n", TMP.replace("'64M'", "'64M', '/srv/x' = '1M'")));
    plain(&world.at("tmp/file"));
    // A mount, and no tmpfs; a tmpfs, and not its root.
    mount_bind(world.at("tmp"), world.at("tmp")).unwrap();
    fs::create_dir(world.at("srv")).unwrap();
    tools::run("mount", &["-t", "tmpfs", "tmpfs", world.at("srv").to_str().unwrap()]);
    below(&world.at("srv/x/file"));
    for _ in 0..2 {
        let output = world.syncd(&["clean"]);
        expect(&output, 0);
        assert!(text(&output).contains("none of the folders in [tmpfs] is a tmpfs"), "{}", text(&output));
        sleep(Duration::from_millis(400));
    }
    assert!(world.at("tmp/file").exists(), "a folder on disk was cleaned");
    assert!(world.at("srv/x/file").exists(), "somebody else's tmpfs was cleaned");
    // One that somebody else mounted is.
    tools::run("mount", &["-t", "tmpfs", "tmpfs", world.at("tmp").to_str().unwrap()]);
    plain(&world.at("tmp/file"));
    expect(&world.syncd(&["clean"]), 0);
    sleep(Duration::from_millis(400));
    expect(&world.syncd(&["clean"]), 0);
    assert!(!world.at("tmp/file").exists());
    expect(&world.offline(&["clean"]), 1);
}

fn a_config_that_cannot_be_read() {
    let world = world("");
    plain(&world.at("tmp/file"));
    expect(&world.syncd(&["clean"]), 0);
    sleep(STALE + Duration::from_millis(100));
    world.configure(&format!("{TMP}cleanup.stale = '300ms'\ncleanup.excludes = ['/tmp/file']\n"));
    let output = world.syncd(&["clean"]);
    expect(&output, 1);
    assert!(text(&output).contains("did you mean exclude?"), "{}", text(&output));
    assert!(world.at("tmp/file").exists());
}

fn looking_changes_no_time() {
    let world = world("");
    let tmp = world.at("tmp");
    for name in ["file", "dir/sub/file", "open"] {
        below(&tmp.join(name));
    }
    let _open = File::open(tmp.join("open")).unwrap();
    let times = || {
        [".", "file", "dir", "dir/sub", "dir/sub/file", "open"].map(|name| {
            let stat = statat(CWD, tmp.join(name), AtFlags::SYMLINK_NOFOLLOW).unwrap();
            let nanos = [stat.st_atime_nsec, stat.st_mtime_nsec, stat.st_ctime_nsec];
            ([stat.st_atime, stat.st_mtime, stat.st_ctime], nanos)
        })
    };
    let before = times();
    expect(&world.syncd(&["clean"]), 0);
    sleep(STALE + Duration::from_millis(100));
    expect(&world.syncd(&["clean", "--dry-run"]), 0);
    assert_eq!(before, times());
}
