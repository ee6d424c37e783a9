//! `syncd export`: a layer that, unpacked over lower by the rules of the OCI image specification, gives the view.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use ephemeral_overlay::attributes::Handle;

use crate::sweep::copy;
use crate::tools::{self, text};
use crate::world::{ETC, World, expect};
use test_support::model::Model;
use test_support::snapshot::{self, Snapshot};

pub(crate) const TESTS: &[(&str, fn())] = &[
    ("a_layer_over_lower_is_the_view", a_layer_over_lower_is_the_view),
    ("a_layer_of_an_earlier_checkpoint_is_the_view_of_then", a_layer_of_an_earlier_checkpoint_is_the_view_of_then),
    ("a_layer_is_for_root_alone_and_whole", a_layer_is_for_root_alone_and_whole),
    ("a_long_hole_is_not_written", a_long_hole_is_not_written),
];

/// Unpacks a layer over a directory: first what it hides goes, then what it holds comes.
fn unpack(layer: &Path, root: &Path) {
    for (path, is_dir) in entries(layer) {
        let name = path.file_name().unwrap().as_bytes();
        let parent = root.join(path.parent().unwrap());
        let old = fs::symlink_metadata(root.join(&path)).ok();
        if name == b".wh..wh..opq" {
            fs::read_dir(&parent).into_iter().flatten().for_each(|entry| remove(&entry.unwrap().path()));
        } else if let Some(hidden) = name.strip_prefix(b".wh.") {
            remove(&parent.join(OsStr::from_bytes(hidden)));
        } else if old.as_ref().is_some_and(|old| old.is_dir() && is_dir) {
            // Its attributes are replaced; tar would only add to them.
            let dir = File::open(root.join(&path)).unwrap();
            let handle = Handle::open(dir.as_fd());
            handle.read_all().unwrap().keys().for_each(|name| handle.remove(name).unwrap());
        } else if old.is_some() {
            remove(&root.join(&path));
        }
    }
    let output = Command::new("tar")
        .args(["--extract", "--zstd", "--file"])
        .arg(layer)
        .arg("--directory")
        .arg(root)
        .args(["--exclude=.wh.*", "--delay-directory-restore", "--numeric-owner", "--same-owner"])
        .args(["--preserve-permissions", "--xattrs", "--xattrs-include=*"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", text(&output));
}

/// What is in a layer, and whether it is a directory.
fn entries(layer: &Path) -> Vec<(PathBuf, bool)> {
    let mut archive = tar::Archive::new(zstd::Decoder::new(File::open(layer).unwrap()).unwrap());
    let entries = archive.entries().unwrap().map(|entry| {
        let mut entry = entry.unwrap();
        // This reader takes a line feed in an attribute for the end of a record.
        let records = entry.pax_extensions().unwrap().into_iter().flatten().filter_map(Result::ok);
        let sparse = records.filter(|record| record.key_bytes() == b"GNU.sparse.name").last();
        let sparse = sparse.map(|record| record.value_bytes().to_vec());
        let name = sparse.unwrap_or_else(|| entry.path_bytes().into_owned());
        (PathBuf::from(OsStr::from_bytes(&name)), entry.header().entry_type().is_dir())
    });
    entries.collect()
}

fn remove(path: &Path) {
    match fs::symlink_metadata(path) {
        Err(_nothing) => {}
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path).unwrap(),
        Ok(_) => fs::remove_file(path).unwrap(),
    }
}

/// Exports, and unpacks over a copy of lower; sockets cannot be in an archive, and are taken out of what is expected.
fn expect_view(world: &World, arguments: &[&str], mut view: Snapshot) {
    let layer = world.at("layer.tar.zst");
    let output = world.syncd(&[&["export", "--output", layer.to_str().unwrap()], arguments].concat());
    assert!([0, 3].contains(&tools::code(&output)), "{}", text(&output));
    let root = world.at("unpacked");
    fs::create_dir_all(&root).unwrap();
    copy(&world.run.join("lower/etc"), &root.join("etc"));
    unpack(&layer, &root);
    let list = tools::run("tar", &["--zstd", "-tf", layer.to_str().unwrap()]);
    assert!(list.starts_with("etc"), "{list}");
    let mut found = snapshot::take(&root.join("etc"));
    for tree in [&mut view, &mut found] {
        tree.retain(|_, object| !object.is_socket());
    }
    snapshot::assert_same(&view, &found, &format!("the layer over lower\n{list}"));
}

fn a_layer_over_lower_is_the_view() {
    for seed in 0..6 {
        let world = World::new(ETC);
        let etc = world.at("etc");
        let mut model = Model::new(&etc, 1000 + seed);
        model.populate();
        world.boot();
        model.mounted = true;
        for _ in 0..3 {
            (0..30).for_each(|_| model.step());
            world.checkpoint();
        }
        expect_view(&world, &[], snapshot::take(&etc));
    }
}

fn a_layer_of_an_earlier_checkpoint_is_the_view_of_then() {
    let world = World::new(ETC);
    let etc = world.at("etc");
    fs::write(etc.join("of lower"), "lower").unwrap();
    world.boot();
    fs::write(etc.join("kept"), "first").unwrap();
    fs::remove_file(etc.join("of lower")).unwrap();
    world.checkpoint();
    let then = snapshot::take(&etc);
    fs::write(etc.join("kept"), "second").unwrap();
    fs::write(etc.join("of lower"), "again").unwrap();
    world.checkpoint();
    expect_view(&world, &["--seq", "1", "/etc"], then);
    expect(&world.syncd(&["export", "--seq", "1", "-o", "/dev/null"]), 2);
    expect(&world.syncd(&["export", "--seq", "7", "/etc", "-o", world.at("x").to_str().unwrap()]), 1);
    assert!(!world.at("x").exists(), "half a layer");
}

fn a_layer_is_for_root_alone_and_whole() {
    let world = World::new(ETC);
    world.boot();
    fs::write(world.at("etc/shadow"), "secret").unwrap();
    world.checkpoint();
    let layer = world.at("layer");
    expect(&world.syncd(&["export", "-o", layer.to_str().unwrap()]), 0);
    assert_eq!(fs::metadata(&layer).unwrap().permissions().mode() & 0o7777, 0o600);
    let output = world.syncd(&["export", "-o", "-"]);
    expect(&output, 0);
    assert!(output.stdout == fs::read(&layer).unwrap(), "standard output is another layer");
}

fn a_long_hole_is_not_written() {
    let world = World::new(ETC);
    world.boot();
    let file = File::create(world.at("etc/sparse")).unwrap();
    file.set_len(1 << 40).unwrap();
    file.write_all_at(b"middle", 1 << 39).unwrap();
    drop(file);
    world.checkpoint();
    let layer = world.at("layer");
    expect(&world.syncd(&["export", "-o", layer.to_str().unwrap()]), 0);
    let to = world.run.join("ram/unpacked");
    fs::create_dir(&to).unwrap();
    unpack(&layer, &to);
    let file = File::open(to.join("etc/sparse")).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 1 << 40);
    assert!(file.metadata().unwrap().blocks() < 1000, "the hole was filled");
    let mut bytes = [0; 6];
    file.read_exact_at(&mut bytes, 1 << 39).unwrap();
    assert_eq!(&bytes, b"middle");
}
