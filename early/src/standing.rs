//! Whether anything is mounted at all in this boot. Chains are merged either way.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use ephemeral_overlay::Layout;
use ephemeral_overlay::cmdline::KernelCmdline;
use ephemeral_overlay::error::{At, SystemError};
use ephemeral_overlay::layout::{COUNTERPART, LoadError, TRIES};
use rustix::fs::{Mode, OFlags, fstat, fsync, openat, renameat};
use rustix::io::Errno;

/// The count while it is written.
const TEMPORARY: &str = ".tmp-tries";
/// How many boots in a row may fail to reach `syncd`.
const TRIES_MAX: u32 = 2;
/// Programs that are a system's init under whatever path.
const INITS: [&str; 4] = ["systemd", "openrc-init", "runit", "dinit"];
/// Words by which systemd and sysvinit are asked for a rescue (kernel-command-line(7), init(8)).
const RESCUE_WORDS: [&str; 6] = ["single", "s", "S", "1", "rescue", "emergency"];

/// What is known about the root before anything is planned.
#[derive(Debug)]
pub(crate) struct Standing {
    /// What is started is the root's own init.
    pub own_init: bool,
    /// The newest checkpoint format that the root's `syncd` knows; `None` when the root has no counterpart of ours.
    pub counterpart: Option<u32>,
    /// How many boots in a row did not reach `syncd`.
    pub tries: u32,
}

impl Standing {
    /// Looks at the root.
    pub(crate) fn observe(layout: &Layout, cmdline: &KernelCmdline, store: Option<&Path>) -> Result<Self, LoadError> {
        let counterpart = layout.read_text(Path::new(COUNTERPART))?;
        let tries = store.and_then(|store| layout.read_text(&store.join(TRIES)).ok().flatten());
        Ok(Self {
            own_init: cmdline.value("init").is_none_or(|init| is_own_init(layout, Path::new(init))),
            counterpart: counterpart.and_then(|text| format_of(&text)),
            tries: tries.and_then(|text| text.trim().parse().ok()).unwrap_or(0),
        })
    }

    /// Why nothing is mounted; `None` for an ordinary boot.
    pub(crate) fn obstacle(&self, cmdline: &KernelCmdline) -> Option<String> {
        if let Some(word) = rescue(cmdline) {
            return Some(format!("{word} on the kernel command line asks for a rescue"));
        }
        if !self.own_init {
            return Some("init= on the kernel command line is not this root's own init".to_owned());
        }
        if self.counterpart.is_none() {
            return Some(format!("the root has no {COUNTERPART}: nobody would save what is in RAM"));
        }
        (self.tries >= TRIES_MAX).then(|| format!("the last {} boots did not come as far as syncd", self.tries))
    }

    /// Counts this boot as one that has not reached `syncd` yet. A root that is still read-only cannot count.
    pub(crate) fn count_try(&self, layout: &Layout, store: &Path) -> Result<(), SystemError> {
        let store = match layout.open(store, OFlags::RDONLY | OFlags::DIRECTORY) {
            // The first boot makes it; there is nothing to count before.
            Err(error) if error.errno() == Some(Errno::NOENT) => return Ok(()),
            other => other?,
        };
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut file = match openat(&store, TEMPORARY, flags, Mode::RUSR | Mode::WUSR) {
            Err(Errno::ROFS) => return Ok(()),
            other => fs::File::from(other.at("openat", TEMPORARY)?),
        };
        writeln!(file, "{}", self.tries + 1).at("write", TRIES)?;
        // A boot that hangs is ended by its power switch.
        file.sync_all().at("fsync", TRIES)?;
        renameat(&store, TEMPORARY, &store, TRIES).at("renameat", TRIES)?;
        fsync(&store).at("fsync", TRIES)
    }
}

/// The word that asks for a rescue.
fn rescue(cmdline: &KernelCmdline) -> Option<String> {
    if let Some(word) = RESCUE_WORDS.iter().find(|word| cmdline.has(word)) {
        return Some((*word).to_owned());
    }
    if cmdline.has("rd.break") || cmdline.value("rd.break").is_some() {
        return Some("rd.break".to_owned());
    }
    let unit = cmdline.value("systemd.unit")?;
    let is_rescue = ["rescue", "emergency"].iter().any(|name| unit.starts_with(name));
    is_rescue.then(|| format!("systemd.unit={unit}"))
}

/// Whether `init` is what the root's `/sbin/init` resolves to, or an init by its name.
fn is_own_init(layout: &Layout, init: &Path) -> bool {
    let identity = |path: &Path| {
        let stat = layout.open(path, OFlags::PATH).ok().and_then(|fd| fstat(fd).ok())?;
        Some((stat.st_dev, stat.st_ino))
    };
    let named = PathBuf::from(init.file_name().unwrap_or_default());
    INITS.iter().any(|known| named == Path::new(known))
        || identity(init).is_some_and(|found| Some(found) == identity(Path::new("/sbin/init")))
}

/// The number in `format = N`.
fn format_of(text: &str) -> Option<u32> {
    text.lines().find_map(|line| {
        let (key, value) = line.split_once('=')?;
        (key.trim() == "format").then(|| value.trim().parse().ok())?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn obstacle(cmdline: &str) -> Option<String> {
        let standing = Standing { own_init: true, counterpart: Some(1), tries: 0 };
        standing.obstacle(&KernelCmdline::parse(cmdline))
    }

    #[test]
    fn an_ordinary_boot_has_no_obstacle() {
        for cmdline in ["", "root=/dev/sda1 rw quiet", "systemd.unit=graphical.target", "rescued", "foo=single"] {
            assert_eq!(obstacle(cmdline), None, "{cmdline}");
        }
    }

    #[test]
    fn a_rescue_is_an_obstacle() {
        for cmdline in [
            "single",
            "quiet s",
            "1",
            "rescue",
            "emergency",
            "rd.break",
            "rd.break=pre-pivot",
            "systemd.unit=rescue.target",
            "systemd.unit=emergency.target",
        ] {
            assert!(obstacle(cmdline).is_some_and(|why| why.contains("rescue")), "{cmdline}");
        }
    }

    #[test]
    fn the_root_decides_too() {
        let cmdline = KernelCmdline::parse("");
        let standing = |own_init, counterpart, tries| Standing { own_init, counterpart, tries }.obstacle(&cmdline);
        assert_eq!(standing(true, Some(1), 1), None);
        assert!(standing(false, Some(1), 0).is_some_and(|why| why.contains("own init")));
        assert!(standing(true, None, 0).is_some_and(|why| why.contains("counterpart")));
        assert!(standing(true, Some(1), 2).is_some_and(|why| why.contains("did not come as far")));
    }

    #[test]
    fn a_counterpart_names_its_format() {
        assert_eq!(format_of("format = 3\n"), Some(3));
        assert_eq!(format_of("format=12"), Some(12));
        for text in ["", "3", "format = x", "version = 1"] {
            assert_eq!(format_of(text), None, "{text:?}");
        }
    }
}
