//! The watermarks, on a tmpfs that is really filled.

use std::fs;

use syncd::room::{self, Action, Fill};
use syncd::system::System;

use super::said;
use crate::world::{ETC, World, expect};

fn system(world: &World) -> System {
    System::open(&world.root, Some(&world.run), Some(&world.disk().path().with_file_name("root.toml"))).unwrap()
}

fn fill(world: &World) -> Fill {
    Fill::of(&system(world)).unwrap()
}

pub(super) fn a_full_tmpfs_grows() {
    let config = |size: &str| ETC.replace("overlay.dirs", &format!("overlay.size = '{size}'\noverlay.dirs"));
    let world = World::new(&config("16M"));
    world.boot();
    let etc = world.at("etc");
    let look = || room::look(&system(&world)).unwrap();
    assert_eq!(look(), []);
    assert_eq!(fill(&world).size_bytes, 16 << 20);
    fs::write(etc.join("most"), vec![1; 12 << 20]).unwrap();
    assert_eq!(look(), [Action::Checkpoint]);
    said(&world.syncd(&["status"]), "RAM was 75 % full: a checkpoint is due");
    // At its ceiling.
    fs::write(etc.join("more"), vec![1; 2 << 20]).unwrap();
    assert_eq!(look(), [Action::Checkpoint, Action::Release]);
    // Beyond that of the boot, by the configuration of today.
    world.configure(&config("24M"));
    let inodes = fill(&world).size_inodes;
    assert_eq!(look(), [Action::Checkpoint, Action::Grow { size: 24 << 20, inodes }, Action::Release]);
    assert_eq!(fill(&world).size_bytes, 24 << 20);
    fs::write(etc.join("even more"), vec![1; 5 << 20]).unwrap();
    let output = world.syncd(&["status"]);
    said(&output, "grown to 24.0 MiB");
    said(&world.syncd(&["status", "--json"]), "\"used_bytes\": ");
    expect(&world.syncd(&["release"]), 0);
    assert_eq!(look(), []);

    // Inodes: 1536 of 24 MiB, six in upper and work for each target or so.
    let inodes = fill(&world).size_inodes;
    let until = |percent: u64| {
        let mut number = fill(&world).used_inodes;
        while fill(&world).percent() < percent {
            fs::write(etc.join(format!("small {number}")), "").unwrap();
            number += 1;
        }
    };
    until(70);
    assert_eq!(look(), [Action::Checkpoint]);
    until(85);
    assert_eq!(look()[1], Action::Grow { size: 24 << 20, inodes: inodes * 2 });
    assert_eq!(fill(&world).size_inodes, inodes * 2);
    assert_eq!(look(), []);
}
