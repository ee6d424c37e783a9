//! Extended attributes as whole sets, of objects that the caller holds by a descriptor.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use rustix::fs::{
    Mode, XattrFlags, chmod, fchmod, fgetxattr, flistxattr, fremovexattr, fsetxattr, getxattr, lgetxattr, listxattr,
    llistxattr, lremovexattr, lsetxattr, removexattr, setxattr,
};
use rustix::io::{Errno, Result};

/// A file's extended attributes, by name.
pub type Xattrs = BTreeMap<Vec<u8>, Vec<u8>>;

/// The largest value of one attribute, and the largest list of names, that the kernel hands out (xattr(7)).
const XATTR_MAX: usize = 64 * 1024;

/// The attribute that holds the capabilities of a program.
pub const CAPABILITY: &str = "security.capability";

/// An object that the caller holds. The calls on attributes take no `O_PATH` descriptor, and none of a symlink: those are
/// reached by a path, which means something only as long as the descriptor is open.
#[derive(Debug, Clone)]
pub struct Handle<'fd> {
    fd: BorrowedFd<'fd>,
    way: Way,
}

#[derive(Debug, Clone)]
enum Way {
    /// By the descriptor itself.
    Descriptor,
    /// By a link in `/proc` whose following leads to the object itself, be it a symlink.
    Link(PathBuf),
    /// By its name in a directory; a symlink is not followed.
    Name(PathBuf),
}

impl<'fd> Handle<'fd> {
    /// The object behind a descriptor, `O_PATH` ones included.
    #[must_use]
    pub fn of(fd: BorrowedFd<'fd>) -> Self {
        Self { fd, way: Way::Link(link(fd)) }
    }

    /// The object behind a descriptor that is not an `O_PATH` one.
    #[must_use]
    pub fn open(fd: BorrowedFd<'fd>) -> Self {
        Self { fd, way: Way::Descriptor }
    }

    /// The object `name` in the directory behind a descriptor; a symlink is not followed.
    #[must_use]
    pub fn child(dir: BorrowedFd<'fd>, name: &OsStr) -> Self {
        Self { fd: dir, way: Way::Name(link(dir).join(name)) }
    }

    /// The path, for calls that follow it exactly when the object is not itself a symlink.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        match &self.way {
            Way::Descriptor => link(self.fd),
            Way::Link(path) | Way::Name(path) => path.clone(),
        }
    }

    /// The descriptor: of the object, or of the directory that holds it.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'fd> {
        self.fd
    }

    /// Sets the permission bits; not of a symlink.
    ///
    /// # Errors
    /// Whatever chmod(2) says.
    pub fn set_mode(&self, mode: Mode) -> Result<()> {
        match &self.way {
            Way::Descriptor => fchmod(self.fd, mode),
            Way::Link(path) | Way::Name(path) => chmod(path, mode),
        }
    }

    /// All extended attributes. None where the file system has none.
    ///
    /// # Errors
    /// Whatever listxattr(2) or getxattr(2) says.
    pub fn read_all(&self) -> Result<Xattrs> {
        // Most objects have none, or few.
        let mut few = [0; 1024];
        let names = match self.list(&mut few) {
            Ok(0) | Err(Errno::NOTSUP) => return Ok(Xattrs::new()),
            Ok(length) => few[..length].to_vec(),
            Err(Errno::RANGE) => {
                let mut many = vec![0; XATTR_MAX];
                let length = self.list(&mut many)?;
                many.truncate(length);
                many
            }
            Err(error) => return Err(error),
        };
        let mut buffer = vec![0; XATTR_MAX];
        let mut all = Xattrs::new();
        for name in names.split(|&byte| byte == 0).filter(|name| !name.is_empty()) {
            // It may have been removed since the names were listed.
            if let Some(value) = self.read_into(OsStr::from_bytes(name), &mut buffer)? {
                all.insert(name.to_vec(), value);
            }
        }
        Ok(all)
    }

    /// One attribute's value; `None` where it is not set or the file system has none.
    ///
    /// # Errors
    /// Whatever getxattr(2) says.
    pub fn read(&self, name: &str) -> Result<Option<Vec<u8>>> {
        self.read_into(OsStr::new(name), &mut vec![0; XATTR_MAX])
    }

    /// The names, each with a NUL behind it.
    fn list(&self, buffer: &mut [u8]) -> Result<usize> {
        match &self.way {
            Way::Descriptor => flistxattr(self.fd, buffer),
            Way::Link(path) => listxattr(path, buffer),
            Way::Name(path) => llistxattr(path, buffer),
        }
    }

    fn read_into(&self, name: &OsStr, buffer: &mut [u8]) -> Result<Option<Vec<u8>>> {
        let length = match &self.way {
            Way::Descriptor => fgetxattr(self.fd, name, &mut *buffer),
            Way::Link(path) => getxattr(path, name, &mut *buffer),
            Way::Name(path) => lgetxattr(path, name, &mut *buffer),
        };
        match length {
            Ok(length) => Ok(Some(buffer[..length].to_vec())),
            Err(Errno::NODATA | Errno::NOTSUP) => Ok(None),
            // setxattr(2) takes an empty one, which gives a program nothing, and which nobody can read (commoncap.c).
            Err(Errno::INVAL) if name == CAPABILITY => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Sets one attribute.
    ///
    /// # Errors
    /// Whatever setxattr(2) says.
    pub fn write(&self, name: &[u8], value: &[u8]) -> Result<()> {
        let (name, flags) = (OsStr::from_bytes(name), XattrFlags::empty());
        match &self.way {
            Way::Descriptor => fsetxattr(self.fd, name, value, flags),
            Way::Link(path) => setxattr(path, name, value, flags),
            Way::Name(path) => lsetxattr(path, name, value, flags),
        }
    }

    /// Removes one attribute.
    ///
    /// # Errors
    /// Whatever removexattr(2) says.
    pub fn remove(&self, name: &[u8]) -> Result<()> {
        let name = OsStr::from_bytes(name);
        match &self.way {
            Way::Descriptor => fremovexattr(self.fd, name),
            Way::Link(path) => removexattr(path, name),
            Way::Name(path) => lremovexattr(path, name),
        }
    }
}

fn link(fd: BorrowedFd<'_>) -> PathBuf {
    format!("/proc/self/fd/{}", fd.as_raw_fd()).into()
}
