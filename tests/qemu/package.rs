//! Our package, as it lies installed.

use std::path::Path;

use anyhow::Result;

use crate::binaries::Binaries;
use crate::tools::{self, repository};

/// Puts all of it below `root`. The system's `syncd` is the static one here, too.
pub(crate) fn install(root: &Path) -> Result<()> {
    let binaries = Binaries::get()?;
    let mut script = tools::command("sh")?;
    script.arg(repository().join("packaging/install.sh")).args([binaries.path(""), binaries.path("syncd")]);
    tools::finish(script.env("DESTDIR", root)).map(drop)
}

/// Puts the package for OpenRC below `root`.
pub(crate) fn install_openrc(root: &Path) -> Result<()> {
    let mut script = tools::command("sh")?;
    script.arg(repository().join("packaging/openrc/install.sh"));
    tools::finish(script.env("DESTDIR", root)).map(drop)
}
