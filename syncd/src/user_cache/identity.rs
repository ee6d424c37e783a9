//! Threads that are a user, for the kernel: what they open, make, rename and remove is what that user may. So nothing in a
//! home has to be judged before it is touched: a link to somebody else's file is refused by whoever owns it.
//!
//! Only the effective identity changes, and with it every capability goes. The real and the saved one stay root's: the
//! user can neither stop nor trace these threads.

use ephemeral_overlay::error::At;
use rayon::{ThreadPool, ThreadPoolBuilder};
use rustix::fs::{Gid, Uid};
use rustix::io::Errno;
use rustix::process::geteuid;
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};

use super::users::User;
use crate::error::Result;

/// The threads.
#[derive(Debug)]
pub(super) struct Identity {
    pool: ThreadPool,
}

impl Identity {
    /// Starts threads that are `user`.
    pub(super) fn of(user: &User) -> Result<Self> {
        let pool = ThreadPoolBuilder::new().build().map_err(std::io::Error::other).at("clone", &user.home)?;
        let taken: Vec<_> = pool.broadcast(|_| take(user));
        taken.into_iter().collect::<Result<(), _>>().at("setresuid", &user.home)?;
        Ok(Self { pool })
    }

    /// Does something as the user; what it does in parallel, too.
    pub(super) fn run<T: Send>(&self, act: impl FnOnce() -> T + Send) -> T {
        self.pool.install(act)
    }
}

fn take(user: &User) -> Result<(), Errno> {
    let groups: Vec<_> = user.groups.iter().map(|&group| Gid::from_raw(group)).collect();
    set_thread_groups(&groups)?;
    set_thread_res_gid(None, Gid::from_raw(user.gid), None)?;
    // Last: it takes the capabilities that the others need.
    set_thread_res_uid(None, Uid::from_raw(user.uid), None)?;
    if geteuid() == Uid::from_raw(user.uid) { Ok(()) } else { Err(Errno::PERM) }
}
