//! A process that writes to the target all the time, before, during and after releases. Whatever it saw succeed is there
//! in the end.

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

/// Compares with the target.
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
    for path in model.keys().chain(seen.keys()) {
        let text = |content: Option<&Vec<u8>>| content.map(|bytes| String::from_utf8_lossy(bytes).into_owned());
        assert_eq!(text(seen.get(path)), text(model.get(path)), "{when}: {}", path.display());
    }
    // It never met the disk.
    assert!(!world.store().join("conflicts").exists());
}
