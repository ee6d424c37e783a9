//! `syncd status` beside a release: it alarms nobody about an overlay that is not there for the moment.

use std::fs;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::{is_overlay, said};
use crate::sweep::strace_command;
use crate::tools::text;
use crate::world::{ETC, World, expect};

/// A command that waits for some seconds at its first unmount, before or after it.
fn waits(world: &World, command: &str, when: &str) -> Child {
    let fault = format!("inject=umount2:{when}=4000000:when=1");
    let mut strace = strace_command(&world.syncd_command(&[command]), &["-o", "/dev/null", "-e", &fault]);
    strace.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
}

fn until(what: &str, is_so: impl Fn() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < Duration::from_secs(20), "{what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn status(world: &World) -> Value {
    let output = world.syncd(&["status", "--json"]);
    expect(&output, 0);
    serde_json::from_slice::<Value>(&output.stdout).unwrap()["targets"][0].clone()
}

pub(super) fn it_is_being_released() {
    let world = World::new(ETC);
    let etc = world.at("etc");
    world.boot();
    fs::write(etc.join("file"), "in RAM").unwrap();
    let release = waits(&world, "release", "delay_exit");
    until("nothing is unmounted", || !is_overlay(&etc));
    let output = world.syncd(&["status"]);
    let target = status(&world);
    assert!(!is_overlay(&etc), "the release was over too soon, or was waited for");
    let released = release.wait_with_output().unwrap();
    expect(&released, 0);
    expect(&output, 0);
    said(&output, "being released");
    said(&output, "/etc: it is being released; until that is done nothing can be written to it");
    assert!(!text(&output).contains("not mounted"), "{}", text(&output));
    assert_eq!(target["being_released"], true, "{target}");
    for unknown in ["problem", "pending", "unsaved", "written_in_all_bytes"] {
        assert!(target[unknown].is_null(), "{target}");
    }
    let target = status(&world);
    assert_eq!((&target["being_released"], &target["mounted"]), (&false.into(), &true.into()), "{target}");
    assert!(target["written_in_all_bytes"].as_u64() > Some(0), "{target}");
}

/// It waits for whoever has the store, and looks at what is mounted after that.
pub(super) fn a_release_that_begins() {
    let world = World::new(ETC);
    let etc = world.at("etc");
    world.boot();
    fs::write(etc.join("file"), "in RAM").unwrap();
    let release = waits(&world, "deactivate", "delay_enter");
    until("nothing is saved", || !world.checkpoints().is_empty());
    let target = status(&world);
    expect(&release.wait_with_output().unwrap(), 0);
    assert!(!is_overlay(&etc));
    assert_eq!((&target["being_released"], &target["mounted"]), (&false.into(), &false.into()), "{target}");
    assert!(target["problem"].is_null(), "{target}");
}
