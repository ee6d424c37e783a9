//! Extended attributes as whole sets, of objects that the caller holds by a descriptor.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{
    XattrFlags, getxattr, lgetxattr, listxattr, listxattr_query, llistxattr, llistxattr_query, lremovexattr, lsetxattr,
    removexattr, setxattr,
};
use rustix::io::{Errno, Result};

/// A file's extended attributes, by name.
pub type Xattrs = BTreeMap<Vec<u8>, Vec<u8>>;

/// The largest value of one attribute, and the largest list of names, that the kernel hands out (xattr(7)).
const XATTR_MAX: usize = 64 * 1024;

/// An object that the caller holds, reached by a path: the calls on attributes take no `O_PATH` descriptor.
#[derive(Debug, Clone)]
pub struct Handle<'fd> {
    path: PathBuf,
    /// The path is a link in `/proc` whose following leads to the object itself, be it a symlink.
    is_link: bool,
    /// The path means something only as long as the descriptor is open.
    held: PhantomData<BorrowedFd<'fd>>,
}

impl<'fd> Handle<'fd> {
    /// The object behind a descriptor, `O_PATH` ones included.
    #[must_use]
    pub fn of(fd: BorrowedFd<'fd>) -> Self {
        Self { path: format!("/proc/self/fd/{}", fd.as_raw_fd()).into(), is_link: true, held: PhantomData }
    }

    /// The object `name` in the directory behind a descriptor; a symlink is not followed.
    #[must_use]
    pub fn child(dir: BorrowedFd<'fd>, name: &OsStr) -> Self {
        Self { path: Self::of(dir).path.join(name), is_link: false, held: PhantomData }
    }

    /// The path, for calls that follow it exactly when the object is not itself a symlink.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All extended attributes. None where the file system has none.
    ///
    /// # Errors
    /// Whatever listxattr(2) or getxattr(2) says.
    pub fn read_all(&self) -> Result<Xattrs> {
        let needed = if self.is_link { listxattr_query(&self.path) } else { llistxattr_query(&self.path) };
        match needed {
            Ok(0) | Err(Errno::NOTSUP) => return Ok(Xattrs::new()),
            Ok(_) => {}
            Err(error) => return Err(error),
        }
        let mut buffer = vec![0; XATTR_MAX];
        let length = if self.is_link {
            listxattr(&self.path, &mut buffer[..])?
        } else {
            llistxattr(&self.path, &mut buffer[..])?
        };
        let names = buffer[..length].to_vec();
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

    fn read_into(&self, name: &OsStr, buffer: &mut [u8]) -> Result<Option<Vec<u8>>> {
        let length = if self.is_link {
            getxattr(&self.path, name, &mut *buffer)
        } else {
            lgetxattr(&self.path, name, &mut *buffer)
        };
        match length {
            Ok(length) => Ok(Some(buffer[..length].to_vec())),
            Err(Errno::NODATA | Errno::NOTSUP) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Sets one attribute.
    ///
    /// # Errors
    /// Whatever setxattr(2) says.
    pub fn write(&self, name: &[u8], value: &[u8]) -> Result<()> {
        let (name, flags) = (OsStr::from_bytes(name), XattrFlags::empty());
        if self.is_link { setxattr(&self.path, name, value, flags) } else { lsetxattr(&self.path, name, value, flags) }
    }

    /// Removes one attribute.
    ///
    /// # Errors
    /// Whatever removexattr(2) says.
    pub fn remove(&self, name: &[u8]) -> Result<()> {
        let name = OsStr::from_bytes(name);
        if self.is_link { removexattr(&self.path, name) } else { lremovexattr(&self.path, name) }
    }
}
