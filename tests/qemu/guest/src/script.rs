//! The commands of a script, one on each line, with blanks between the words.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use ephemeral_overlay::attributes::Handle;
use rustix::io::Errno;
use test_support::live::{self, System};
use test_support::model::Model;
use test_support::snapshot;

use crate::say;

/// Where programs are.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin";

/// What is brought into RAM in the system of `live`.
const LIVE: &str = "overlay.dirs = ['/etc']\ntmpfs = { '/tmp' = false, '/var/tmp' = false, '/var/cache' = false }\n";

/// Carries out one command. What it saw is said; it fails only when it could not be carried out.
pub(crate) fn execute(line: &str) -> Result<()> {
    let (name, rest) = line.trim().split_once(' ').unwrap_or((line.trim(), ""));
    match name {
        "write" => write(rest, false),
        "append" => write(rest, true),
        "mkdir" => Ok(fs::create_dir_all(rest)?),
        "remove" => Ok(fs::remove_file(rest)?),
        "cat" => cat(rest),
        "list" => list(rest),
        "model" => model(rest),
        "live" => live(rest),
        "snapshot" => {
            for line in snapshot::lines(&snapshot::take(Path::new(rest))) {
                say(&format!("TREE {rest}: {line}"));
            }
            Ok(())
        }
        "mounts" => mounts(),
        "run" => run(&mut program(rest)?),
        "sh" => run(Command::new("/bin/sh").args(["-c", rest])),
        "spawn" => spawn(rest),
        "sync" => {
            rustix::fs::sync();
            Ok(())
        }
        "mark" => {
            say(&format!("MARK {rest}"));
            Ok(())
        }
        "hold" => hold(rest),
        "panic" => std::process::exit(1),
        _ => bail!("no such command"),
    }
}

/// `write PATH TEXT`, `append PATH TEXT`: the text and a newline.
fn write(rest: &str, append: bool) -> Result<()> {
    let (path, text) = rest.split_once(' ').context("a text is missing")?;
    let mut options = fs::OpenOptions::new();
    options.create(true).write(true).append(append).truncate(!append);
    Ok(writeln!(options.open(path)?, "{text}")?)
}

/// `cat PATH`: `FILE PATH: LINE` for each line, or `FILE PATH (missing)`.
fn cat(path: &str) -> Result<()> {
    match fs::read(path) {
        Ok(bytes) => {
            String::from_utf8_lossy(&bytes).lines().for_each(|line| say(&format!("FILE {path}: {line}")));
            Ok(())
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            say(&format!("FILE {path} (missing)"));
            Ok(())
        }
        Err(error) => Err(error.into()),
    }
}

/// `list PATH`: `LIST PATH: NAMES`, sorted.
fn list(path: &str) -> Result<()> {
    let mut names = Vec::new();
    for entry in fs::read_dir(path)? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    say(&format!("LIST {path}: {}", names.join(" ")));
    Ok(())
}

/// `model PATH SEED STEPS`: random changes in a tree; without steps it is filled first.
fn model(rest: &str) -> Result<()> {
    let words: Vec<&str> = rest.split_whitespace().collect();
    let [path, seed, steps] = words[..] else { bail!("a path, a seed and a number of steps") };
    let mut model = Model::new(Path::new(path), seed.parse()?);
    let probe = Handle::child(fs::File::open("/")?.as_fd(), "run".as_ref()).write(b"user.probe", b"");
    model.user_attributes = probe != Err(Errno::NOTSUP);
    model.mounted = crate::is_mount_point(path);
    match steps.parse()? {
        0 => model.populate(),
        steps => (0..steps).for_each(|_| model.step()),
    }
    Ok(())
}

/// `live PATH SEED OPERATIONS`: a system of its own in a directory, in which two processes write while checkpoints are
/// taken and the RAM is lost again and again; `LIVE FIGURES`.
fn live(rest: &str) -> Result<()> {
    let words: Vec<&str> = rest.split_whitespace().collect();
    let [path, seed, operations] = words[..] else { bail!("a path, a seed and a number of operations") };
    let root = Path::new(path).join("root");
    let beside = Path::new("/run/live");
    fs::create_dir_all(beside)?;
    live::prepare(&root);
    let system = System {
        root,
        run: beside.join("run"),
        config: beside.join("config"),
        beside: beside.to_path_buf(),
        early: "/usr/bin/early".into(),
        syncd: "/usr/bin/syncd".into(),
    };
    fs::write(&system.config, LIVE)?;
    // What comes between the rounds takes long where the processor is an emulated one.
    say(&format!("LIVE {}", live::run(&system, seed.parse()?, operations.parse()?, 6000)));
    Ok(())
}

/// `mounts`: `MOUNT POINT TYPE OPTIONS` for each mount.
fn mounts() -> Result<()> {
    for line in fs::read_to_string("/proc/self/mounts")?.lines() {
        let fields: Vec<&str> = line.split(' ').collect();
        if let [_, point, fs_type, options, ..] = fields[..] {
            say(&format!("MOUNT {point} {fs_type} {options}"));
        }
    }
    Ok(())
}

/// The program and the arguments in `rest`.
fn program(rest: &str) -> Result<Command> {
    let mut words = rest.split_whitespace();
    let mut command = Command::new(words.next().context("a program is missing")?);
    command.args(words);
    Ok(command)
}

/// `run PROGRAM ARGUMENTS`, `sh COMMAND LINE`: `OUT LINE` for each line that it writes, then `EXIT CODE`.
fn run(command: &mut Command) -> Result<()> {
    let (reader, writer) = std::io::pipe()?;
    command.env("PATH", PATH).stdin(Stdio::null()).stdout(writer.try_clone()?).stderr(writer);
    let mut child = command.spawn().context("execve")?;
    // The pipe ends when no copy of its writing end is left.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    for line in BufReader::new(reader).split(b'\n') {
        say(&format!("OUT {}", String::from_utf8_lossy(&line?)));
    }
    match child.wait()?.code() {
        Some(code) => say(&format!("EXIT {code}")),
        None => say("EXIT killed"),
    }
    Ok(())
}

/// `spawn PROGRAM ARGUMENTS`: in the background, until the shutdown.
fn spawn(rest: &str) -> Result<()> {
    // Whom nobody waits for, the shutdown kills.
    drop(program(rest)?.env("PATH", PATH).stdin(Stdio::null()).spawn().context("execve")?);
    Ok(())
}

/// `hold NAME`: says the mark and waits for the harness to kill the machine; not for ever, should the harness be gone.
fn hold(name: &str) -> Result<()> {
    say(&format!("MARK {name}"));
    std::thread::sleep(Duration::from_secs(60));
    bail!("nobody cut the power")
}
