//! The keys: what is not asked for here does not exist.

use super::section::Section;
use super::value::{between, boolean, duration, glob, name, one_of, path, size, size_or_off};
use super::{Activate, Config, ConfigError, OnLogout};

/// Applies one file to `config`.
pub(super) fn apply(root: &mut Section<'_, '_>, config: &mut Config) -> Result<(), ConfigError> {
    let Config { overlay, tmpfs, persist, checkpoint, cleanup, log } = config;
    root.table("overlay", |section| {
        section.list("dirs", &mut overlay.dirs, path)?;
        section.set("size", &mut overlay.size, size)?;
        section.set(
            "activate",
            &mut overlay.activate,
            one_of([("boot", Activate::Boot), ("login", Activate::Login)]),
        )?;
        section.list("passthrough", &mut overlay.passthrough, path)
    })?;
    root.table("tmpfs", |section| {
        section.set("user_cache", &mut tmpfs.user_cache, size_or_off)?;
        section.paths(&mut tmpfs.mounts, size_or_off)
    })?;
    root.table("persist", |section| {
        section.set("root", &mut persist.root, path)?;
        section.list("var_cache", &mut persist.var_cache, name)?;
        section.list("user_cache", &mut persist.user_cache, name)
    })?;
    root.table("checkpoint", |section| {
        section.set(
            "on_logout",
            &mut checkpoint.on_logout,
            one_of([("checkpoint", OnLogout::Checkpoint), ("release", OnLogout::Release)]),
        )?;
        section.set("interval", &mut checkpoint.interval, duration)?;
        section.table("per_target", |targets| {
            targets.paths(&mut checkpoint.per_target, |value| duration(value).map(Some))
        })?;
        section.set("snapshot", &mut checkpoint.snapshot, boolean)?;
        section.set("compression", &mut checkpoint.compression, between(1, 19))?;
        section.set("history", &mut checkpoint.history, between(0, u32::MAX))
    })?;
    root.table("cleanup", |section| {
        section.set("interval", &mut cleanup.interval, duration)?;
        section.set("stale", &mut cleanup.stale, duration)?;
        section.list("exclude", &mut cleanup.exclude, glob)
    })?;
    root.table("log", |section| section.set("file", &mut log.file, path))
}
