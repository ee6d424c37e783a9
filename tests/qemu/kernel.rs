//! Kernels out of Debian's packages, unpacked but not installed.
//!
//! A package is fetched once and kept below the target directory under its version; a machine without a network goes
//! on with the newest one that it has. The directory of a version appears by a rename, so it is whole.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, bail};

use crate::debian::{self, Suite};
use crate::tools::{self, kept, run};

/// The series that stands for whatever Debian offers last.
pub(crate) const NEWEST: &str = "newest";

/// A kernel that can be booted.
#[derive(Debug)]
pub(crate) struct Kernel {
    /// The series, such as `6.12`, or [`NEWEST`].
    pub series: &'static str,
    /// The uncompressed image, which QEMU starts without the kernel's own decompressor (PVH).
    pub image: PathBuf,
    /// `lib/modules/VERSION`, with `modules.dep`.
    modules: PathBuf,
}

impl Kernel {
    /// The newest kernel of a series.
    pub(crate) fn of(series: &'static str) -> Result<Self> {
        let cache = kept("kernels");
        fs::create_dir_all(&cache).with_context(|| format!("mkdir {}", cache.display()))?;
        // The machine's own lists have the series by name.
        let suite = (series == NEWEST).then_some(Suite::Sid);
        let directory = match newest_offered(suite, series) {
            Ok((package, file)) => fetch(suite, &cache, &package, &file)?,
            Err(reason) => newest_kept(&cache, series).ok_or(reason)?,
        };
        Ok(Self { series, image: directory.join("vmlinux"), modules: only_child(&directory.join("root/lib/modules"))? })
    }

    /// Its version, as `uname -r` says it.
    pub(crate) fn version(&self) -> String {
        self.modules.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// The directory of its modules.
    pub(crate) fn modules_directory(&self) -> &Path {
        &self.modules
    }

    /// The files of `names` and of all that they need, in the order in which they are to be inserted. What is built
    /// into the kernel has none.
    pub(crate) fn modules(&self, names: &[&str]) -> Result<Vec<PathBuf>> {
        let read = |name: &str| {
            let path = self.modules.join(name);
            fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
        };
        let (dependencies, builtin) = (read("modules.dep")?, read("modules.builtin")?);
        let mut ordered: Vec<&str> = Vec::new();
        for name in names {
            if builtin.lines().any(|path| module_name(path) == *name) {
                continue;
            }
            let line = dependencies.lines().find_map(|line| {
                let (path, needs) = line.split_once(':')?;
                (module_name(path) == *name).then_some((path, needs))
            });
            let (path, needs) = line.with_context(|| format!("{} has no module {name}", self.series))?;
            // depmod(8): what a module needs stands after it, the deepest last.
            for file in needs.split_whitespace().rev().chain([path]) {
                if !ordered.contains(&file) {
                    ordered.push(file);
                }
            }
        }
        Ok(ordered.into_iter().map(|file| self.modules.join(file)).collect())
    }
}

/// `virtio_blk` for `kernel/drivers/block/virtio-blk.ko.xz`.
pub(crate) fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split('.').next().unwrap_or(file).replace('-', "_")
}

/// The contents of a file, decompressed where its name says that it is compressed.
pub(crate) fn decompressed(path: &Path) -> Result<Vec<u8>> {
    let program = match path.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        _ => return fs::read(path).with_context(|| format!("read {}", path.display())),
    };
    tools::finish(tools::command(program)?.arg("-dc").arg(path))
}

/// The newest package of a series that apt offers, and the name of its file.
fn newest_offered(suite: Option<Suite>, series: &str) -> Result<(String, String)> {
    let version = if series == NEWEST { "[0-9.]+".to_owned() } else { series.replace('.', "[.]") + "[.]" };
    let pattern = format!("^linux-image-{version}.*-cloud-amd64(-unsigned)?$");
    let listed = tools::finish(debian::apt("apt-cache", suite)?.args(["search", "--names-only", &pattern]))?;
    let listed = String::from_utf8(listed)?;
    let names = listed.lines().filter_map(|line| line.split_whitespace().next());
    let name = names.max_by_key(|name| numbers(name)).with_context(|| {
        format!("apt offers no linux-image-{series}*-cloud-amd64 (has `apt-get update` been run? is this Debian?)")
    })?;
    // 'URI' FILE SIZE HASH
    let uris = tools::finish(debian::apt("apt-get", suite)?.args(["--print-uris", "download", name]))?;
    let uris = String::from_utf8(uris)?;
    let file =
        uris.split_whitespace().nth(1).with_context(|| format!("apt-get --print-uris download {name}: {uris}"))?;
    Ok((name.to_owned(), file.to_owned()))
}

/// The numbers in a version, for comparing.
fn numbers(text: &str) -> Vec<u64> {
    text.split(|c: char| !c.is_ascii_digit()).filter_map(|digits| digits.parse().ok()).collect()
}

/// The newest kernel of a series that is in the cache.
fn newest_kept(cache: &Path, series: &str) -> Option<PathBuf> {
    let prefix = if series == NEWEST { "linux-image-".to_owned() } else { format!("linux-image-{series}.") };
    let names = fs::read_dir(cache).ok()?.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
    let newest = names.filter(|name| name.starts_with(&prefix)).max_by_key(|name| numbers(name))?;
    Some(cache.join(newest))
}

/// The packages in which newer releases have what is in a kernel's own package elsewhere.
fn parts(suite: Option<Suite>, package: &str) -> Result<Vec<String>> {
    let version = package.trim_start_matches("linux-image-").trim_end_matches("-unsigned").replace('+', "[+]");
    let pattern = format!("^linux-(base|binary|modules)-{version}$");
    let listed = tools::finish(debian::apt("apt-cache", suite)?.args(["search", "--names-only", &pattern]))?;
    let listed = String::from_utf8(listed)?;
    Ok(listed.lines().filter_map(|line| line.split_whitespace().next()).map(str::to_owned).collect())
}

/// The directory of a package in the cache: `root` with what is in it, and `vmlinux`.
fn fetch(suite: Option<Suite>, cache: &Path, package: &str, file: &str) -> Result<PathBuf> {
    let directory = cache.join(file.trim_end_matches(".deb"));
    if directory.exists() {
        return Ok(directory);
    }
    let fresh = tempfile::Builder::new().prefix(".fetch-").tempdir_in(cache).context("mkdtemp")?;
    let mut download = debian::apt("apt-get", suite)?;
    download.args(["download", package]).args(parts(suite, package)?);
    tools::finish(download.current_dir(fresh.path()))?;
    let debs: Vec<PathBuf> = fs::read_dir(fresh.path())?.flatten().map(|entry| entry.path()).collect();
    let root = fresh.path().join("root");
    for deb in debs {
        run("dpkg-deb", &[Path::new("-x"), &deb, &root])?;
        fs::remove_file(&deb).with_context(|| format!("unlink {}", deb.display()))?;
    }
    if !root.join("lib").exists() {
        std::os::unix::fs::symlink("usr/lib", root.join("lib")).context("symlink lib")?;
    }
    let version = only_child(&root.join("lib/modules"))?;
    let version = version.file_name().context("a version")?.to_string_lossy().into_owned();
    run("depmod", &["-b".as_ref(), root.as_os_str(), version.as_ref()])?;
    let places =
        [root.join("boot").join(format!("vmlinuz-{version}")), root.join("lib/modules").join(&version).join("vmlinuz")];
    let image = places.into_iter().find(|path| path.exists()).context("the package has no kernel")?;
    let packed = fs::read(&image).with_context(|| format!("read {}", image.display()))?;
    fs::write(fresh.path().join("vmlinux"), unpacked(&packed, fresh.path())?).context("write vmlinux")?;
    match fs::rename(fresh.path(), &directory) {
        // Another run was faster.
        Err(_) if directory.exists() => {}
        renamed => renamed.with_context(|| format!("rename to {}", directory.display()))?,
    }
    Ok(directory)
}

fn only_child(directory: &Path) -> Result<PathBuf> {
    let mut children = fs::read_dir(directory).with_context(|| format!("readdir {}", directory.display()))?.flatten();
    let child = children.next().with_context(|| format!("{} is empty", directory.display()))?;
    Ok(child.path())
}

/// The ELF image in a bzImage (Documentation/arch/x86/boot.rst).
fn unpacked(bzimage: &[u8], scratch: &Path) -> Result<Vec<u8>> {
    let word = |at: usize| -> Result<usize> {
        let bytes = bzimage.get(at..at + 4).context("the image is too short")?;
        Ok(u32::from_le_bytes(bytes.try_into()?).try_into()?)
    };
    let setup_sectors = usize::from(*bzimage.get(0x1f1).context("the image is too short")?);
    let start = (setup_sectors + 1) * 512 + word(0x248)?;
    let payload = bzimage.get(start..start + word(0x24c)?).context("the payload is not in the image")?;
    // The build appends the unpacked size, which the tools would take for garbage.
    let without_size = &payload[..payload.len().saturating_sub(4)];
    let (program, packed) = match payload.get(..4).context("no payload")? {
        [0x28, 0xb5, 0x2f, 0xfd] => ("zstd", without_size),
        [0xfd, b'7', b'z', b'X'] => ("xz", without_size),
        [0x02, 0x21, 0x4c, 0x18] => ("lz4", without_size),
        [0x1f, 0x8b, ..] => ("gzip", payload),
        other => bail!("a kernel packed with something unknown: {other:x?}"),
    };
    let path = scratch.join("payload");
    fs::write(&path, packed).context("write payload")?;
    let input = fs::File::open(&path).context("open payload")?;
    let image = tools::finish(tools::command(program)?.arg("-dc").stdin(Stdio::from(input)))?;
    fs::remove_file(&path).context("unlink payload")?;
    if !image.starts_with(b"\x7fELF") {
        bail!("what was unpacked with {program} is no ELF image");
    }
    Ok(image)
}
