//! Debian's releases: their package lists beside the machine's own, and whole systems made of them.
//!
//! The mirror is the one from which this machine has its own packages; what is made is kept below the target directory.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::tools::{self, kept, run};

/// What a system with systemd has beside the minimum.
const SYSTEMD: &str = "systemd,systemd-sysv,dbus,udev,kmod,libpam-systemd,procps,util-linux,passwd,logrotate";
/// What one with OpenRC has. `fuser` is what OpenRC kills with.
const OPENRC: &str = "openrc,kmod,psmisc,util-linux,passwd";

/// A release.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Suite {
    /// Debian 12, systemd 252.
    Bookworm,
    /// Debian 13, systemd 257.
    Trixie,
    /// What comes next, with the newest systemd.
    Sid,
}

impl Suite {
    /// Its code name.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Bookworm => "bookworm",
            Self::Trixie => "trixie",
            Self::Sid => "sid",
        }
    }

    /// The tree of a whole system with systemd, made once. Nobody changes it.
    pub(crate) fn root(self) -> Result<PathBuf> {
        self.root_of(self.name(), SYSTEMD)
    }

    /// The same with OpenRC.
    pub(crate) fn openrc_root(self) -> Result<PathBuf> {
        self.root_of(&format!("{}-openrc", self.name()), OPENRC)
    }

    fn root_of(self, name: &str, packages: &str) -> Result<PathBuf> {
        let roots = kept("roots");
        fs::create_dir_all(&roots).with_context(|| format!("mkdir {}", roots.display()))?;
        let root = roots.join(name);
        if root.exists() {
            return Ok(root);
        }
        let fresh = tempfile::Builder::new().prefix(".debootstrap-").tempdir_in(&roots).context("mkdtemp")?;
        let tree = fresh.path().join("root");
        let include = format!("--include={packages}");
        let mut debootstrap = tools::command("debootstrap")?;
        debootstrap.args(["--variant=minbase", &include, self.name()]).arg(&tree).arg(mirror()?);
        // An older debootstrap does not know the newer releases, which are made as sid is.
        let script = PathBuf::from("/usr/share/debootstrap/scripts");
        if !script.join(self.name()).exists() {
            debootstrap.arg(script.join("sid"));
        }
        tools::finish(&mut debootstrap)?;
        // Nothing of this is needed to boot, and all of it would be copied onto every disk.
        for path in ["usr/share/doc", "usr/share/locale", "usr/share/man", "var/cache/apt", "var/lib/apt/lists"] {
            run("rm", &["-rf".into(), tree.join(path)])?;
        }
        fs::write(tree.join("etc/fstab"), "").context("write fstab")?;
        fs::rename(&tree, &root).with_context(|| format!("rename to {}", root.display()))?;
        Ok(root)
    }
}

/// `apt-get` or `apt-cache` with the lists of a release; with the machine's own for `None`.
pub(crate) fn apt(program: &str, suite: Option<Suite>) -> Result<Command> {
    let mut command = tools::command(program)?;
    let Some(suite) = suite else { return Ok(command) };
    let directory = kept("apt").join(suite.name());
    let list = directory.join("sources.list");
    let lists = directory.join("lists");
    let options = |command: &mut Command| {
        for (option, path) in [
            ("Etc::sourcelist", list.as_path()),
            ("Etc::sourceparts", "/dev/null".as_ref()),
            ("State::lists", &lists),
            ("Cache::pkgcache", "".as_ref()),
            ("Cache::srcpkgcache", "".as_ref()),
        ] {
            command.arg("-o").arg(format!("Dir::{option}={}", path.display()));
        }
    };
    options(&mut command);
    if !list.exists() {
        fs::create_dir_all(lists.join("partial")).with_context(|| format!("mkdir {}", lists.display()))?;
        let text = format!("deb {} {} main\n", mirror()?, suite.name());
        let fresh = directory.join("sources.list.new");
        fs::write(&fresh, text).context("write sources.list")?;
        let mut update = tools::command("apt-get")?;
        options(&mut update);
        // Before the list has its name: an update that failed is done again.
        update.arg("-o").arg(format!("Dir::Etc::sourcelist={}", fresh.display()));
        tools::finish(update.arg("update"))?;
        fs::rename(&fresh, &list).with_context(|| format!("rename to {}", list.display()))?;
    }
    Ok(command)
}

/// From where this machine has Debian's packages.
fn mirror() -> Result<String> {
    let targets =
        run("apt-get", &["indextargets", "--format", "$(REPO_URI) $(ORIGIN) $(LABEL)", "Created-By: Packages"])?;
    let targets = String::from_utf8(targets)?;
    // Updates of a stable release come under the same name; security has a label of its own.
    let mirror = targets.lines().find_map(|line| line.strip_suffix(" Debian Debian"));
    let mirror = mirror.context("apt has no repository of Debian (has `apt-get update` been run? is this Debian?)")?;
    ensure!(!mirror.contains(' '), "apt names a repository with a blank in it: {mirror}");
    Ok(mirror.to_owned())
}
