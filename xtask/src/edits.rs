//! What a user and a running system do to `/etc` and `/var/log`, chosen by what is there.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// The user that is added.
pub(crate) const USER: &str = "power-cut";
/// The line that is never saved.
pub(crate) const UNSAVED: &str = "written after the checkpoint";

/// Makes two things that every system has some of, so that there is always something to edit and to remove.
pub(crate) fn prepare(root: &Path) -> Result<()> {
    for file in ["etc/demo.conf", "etc/demo.d/10-old.conf", "etc/demo.d/sub/20-older.conf", "var/log/demo.log"] {
        let path = root.join(file);
        fs::create_dir_all(path.parent().context("a file at the root")?)?;
        fs::write(&path, format!("{file}, as it was on disk\n"))
            .with_context(|| format!("write {}", path.display()))?;
    }
    Ok(())
}

/// The command lines, each of which changes something through the overlays.
pub(crate) fn lines(root: &Path) -> Vec<String> {
    let mut lines = vec![
        format!("useradd --prefix $R --no-create-home --shell /bin/sh {USER}"),
        "echo 'edited = true' >>$R/etc/demo.conf".to_owned(),
    ];
    if let Some(name) = a_file_to_delete(&root.join("etc")) {
        lines.push(format!("rm $R/etc/{name}"));
    }
    lines.extend([
        "rm -r $R/etc/demo.d && mkdir -m 750 $R/etc/demo.d && echo new >$R/etc/demo.d/50-new.conf".to_owned(),
        "echo 'a line of today' >>$R/var/log/demo.log".to_owned(),
        "mv $R/var/log/demo.log $R/var/log/demo.log.1 && echo 'rotated' >$R/var/log/demo.log".to_owned(),
    ]);
    lines
}

/// A real file of this machine that the other edits do not need.
fn a_file_to_delete(etc: &Path) -> Option<String> {
    let preferred = ["issue.net", "issue", "debian_version", "arch-release", "os-release", "motd", "services"];
    let is_file = |name: &&&str| fs::symlink_metadata(etc.join(name)).is_ok_and(|metadata| metadata.is_file());
    preferred.iter().find(is_file).map(|name| (*name).to_owned())
}

/// Where the user would be.
pub(crate) fn passwd(root: &Path) -> PathBuf {
    root.join("etc/passwd")
}
