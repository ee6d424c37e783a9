//! A process that writes to the target all the time, before, during and after releases. Whatever it saw succeed is there
//! in the end: in the target, or in the store as the version that lost.

use std::collections::BTreeMap;
use std::fs;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use crate::tools::text;
use crate::world::{ETC, World};

/// What the writer believes: each name, and what it has.
type Model = BTreeMap<PathBuf, Vec<u8>>;

fn number(name: &str, default: usize) -> usize {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

/// Ends the writer, also when a release fails.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

pub(super) fn what_a_writer_saw_succeed_is_there() {
    let world = World::new(ETC);
    let etc = world.at("etc");
    fs::create_dir(etc.join("dir")).unwrap();
    world.boot();
    let done = AtomicBool::new(false);
    let refused = AtomicUsize::new(0);
    let rounds = number("RELEASE_ROUNDS", 6);
    let (model, released) = std::thread::scope(|scope| {
        let writer = scope.spawn(|| write_all_the_time(&etc, &done, &refused));
        let end = End(&done);
        let mut released = 0;
        for _ in 0..rounds * 50 {
            let output = world.syncd(&["release"]);
            match output.status.code() {
                Some(0) => released += 1,
                Some(3) => {}
                _ => panic!("{}", text(&output)),
            }
            if released >= rounds {
                break;
            }
        }
        drop(end);
        (writer.join().unwrap(), released)
    });
    println!("{} names, {released} releases, {} writes refused", model.len(), refused.into_inner());
    assert!(released >= rounds, "only {released} releases");
    judge(&world, &model, "the view");
    world.checkpoint();
    world.cut();
    world.boot();
    judge(&world, &model, "the next boot");
}

/// Makes, replaces, appends to and removes files, each in one go, until it is told to end.
fn write_all_the_time(etc: &Path, done: &AtomicBool, refused: &AtomicUsize) -> Model {
    let mut model = Model::new();
    let mut step: usize = 0;
    while !done.load(Ordering::SeqCst) {
        step += 1;
        let parent = if step.is_multiple_of(2) { "dir" } else { "" };
        let path = Path::new(parent).join(format!("file {}", step % 40));
        let content = format!("{step}\n").into_bytes();
        let result = match step % 5 {
            0 => replace(etc, &path, &content).map(|()| Some(content)),
            1 => append(&etc.join(&path), &content).map(|()| {
                let before = model.get(&path).cloned().unwrap_or_default();
                Some([before, content].concat())
            }),
            2 => fs::remove_file(etc.join(&path)).map(|()| None),
            _ => fs::write(etc.join(&path), &content).map(|()| Some(content)),
        };
        match result {
            Ok(Some(content)) => drop(model.insert(path, content)),
            Ok(None) => drop(model.remove(&path)),
            Err(error) if error.kind() == ErrorKind::NotFound && !model.contains_key(&path) => {}
            // It is told that it did not succeed.
            Err(error) if error.kind() == ErrorKind::ReadOnlyFilesystem => {
                refused.fetch_add(1, Ordering::SeqCst);
            }
            Err(error) => panic!("step {step}, {}: {error}", path.display()),
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    model
}

fn append(path: &Path, content: &[u8]) -> std::io::Result<()> {
    fs::OpenOptions::new().append(true).create(true).open(path)?.write_all(content)
}

/// As editors do; what is left of one that was refused is no file of the model.
fn replace(etc: &Path, path: &Path, content: &[u8]) -> std::io::Result<()> {
    let temporary = etc.join(".temporary");
    fs::write(&temporary, content)?;
    fs::rename(&temporary, etc.join(path))
}

/// Compares with the target, and with what is kept of conflicts.
fn judge(world: &World, model: &Model, when: &str) {
    let mut seen = Model::new();
    let etc = world.at("etc");
    for directory in ["", "dir"] {
        for entry in fs::read_dir(etc.join(directory)).unwrap().map(Result::unwrap) {
            let name = Path::new(directory).join(entry.file_name());
            if entry.file_type().unwrap().is_file() && entry.file_name() != ".temporary" {
                seen.insert(name, fs::read(entry.path()).unwrap());
            }
        }
    }
    let lists = fs::read_dir(world.store().join("conflicts")).map_or_else(|_| Vec::new(), Iterator::collect);
    let kept: Vec<_> = lists.into_iter().map(|entry| entry.unwrap().path()).collect();
    for path in model.keys().chain(seen.keys()) {
        let (wanted, found) = (model.get(path), seen.get(path));
        if wanted == found {
            continue;
        }
        // What was written to the disk in the moment before it was covered lost against RAM, and is kept.
        let lines = |content: Option<&Vec<u8>>| -> Vec<String> {
            content.map_or_else(Vec::new, |bytes| String::from_utf8_lossy(bytes).lines().map(str::to_owned).collect())
        };
        let copies: Vec<_> = kept.iter().flat_map(|place| lines(fs::read(place.join(path)).ok().as_ref())).collect();
        let is_listed = kept.iter().any(|place| {
            fs::read_to_string(place).is_ok_and(|list| list.contains(path.to_str().expect("it is of the model")))
        });
        let there = lines(found);
        let is_kept = is_listed && lines(wanted).iter().all(|line| there.contains(line) || copies.contains(line));
        println!("{when}: {} differs, and was kept: {is_kept}", path.display());
        assert!(is_kept, "{when}: {}: {wanted:?} was written, {found:?} is there, {copies:?} is kept", path.display());
    }
}
