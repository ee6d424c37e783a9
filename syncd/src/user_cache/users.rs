//! Who a user is: by NSS on the running system, by `etc/passwd` and `etc/group` below any other root.

use std::path::{Path, PathBuf};

use ephemeral_overlay::Layout;
use ephemeral_overlay::error::At;
use ephemeral_overlay::layout::{GROUP, PASSWD};
use procfs::ProcError;

use crate::error::Result;

/// The numbers of people: above those of the system, below `nobody`.
const PEOPLE: std::ops::Range<u32> = 1000..65534;
/// Shells of accounts that nobody logs in to.
const NO_SHELLS: [&str; 2] = ["nologin", "false"];

/// A user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// The number.
    pub uid: u32,
    /// The number of the primary group.
    pub gid: u32,
    /// The numbers of all groups.
    pub groups: Vec<u32>,
    /// The home directory, below the root.
    pub home: PathBuf,
    /// The shell.
    pub shell: PathBuf,
}

impl User {
    /// The user with a number, if there is one.
    ///
    /// # Errors
    /// When the users cannot be read.
    pub fn find(layout: &Layout, uid: u32) -> Result<Option<Self>> {
        #[cfg(not(target_feature = "crt-static"))]
        if std::fs::canonicalize(layout.root()).is_ok_and(|root| root == Path::new("/")) {
            return nss(uid);
        }
        let read = |path: &str| Ok::<_, crate::Error>(layout.read_text(Path::new(path))?.unwrap_or_default());
        Ok(parse(&read(PASSWD)?, &read(GROUP)?, uid))
    }

    /// Everybody in `etc/passwd` who may log in. Whoever only NSS knows is not in there: who that may be all together,
    /// a directory server for one need not tell.
    ///
    /// # Errors
    /// When the users cannot be read.
    pub fn people(layout: &Layout) -> Result<Vec<Self>> {
        let passwd = layout.read_text(Path::new(PASSWD))?.unwrap_or_default();
        let mut people = Vec::new();
        for uid in passwd.lines().filter_map(|line| line.split(':').nth(2)?.parse().ok()) {
            people.extend(Self::find(layout, uid)?.filter(|user| user.is_no_person().is_none()));
        }
        people.dedup_by_key(|user| user.uid);
        Ok(people)
    }

    /// Whether a process of this user runs, whatever it is doing.
    ///
    /// # Errors
    /// When the processes cannot be listed.
    pub fn runs_anything(&self) -> Result<bool> {
        let failed = |error: ProcError| std::io::Error::other(error);
        let processes = procfs::process::all_processes().map_err(failed).at("read", "/proc")?;
        // One that is gone meanwhile is nobody's.
        let all = processes.filter_map(|process| process.ok()?.status().ok());
        Ok(all.into_iter().any(|status| [status.ruid, status.euid, status.suid].contains(&self.uid)))
    }

    /// Why the cache of this user stays on disk, unless it is one of a person who logs in.
    #[must_use]
    pub fn is_no_person(&self) -> Option<&'static str> {
        let shell = self.shell.file_name().unwrap_or_default();
        if !PEOPLE.contains(&self.uid) {
            Some("a user of the system")
        } else if NO_SHELLS.iter().any(|name| shell == *name) {
            Some("a user who does not log in")
        } else if !self.home.is_absolute() || self.home.parent().is_none() {
            Some("a user without a home")
        } else {
            None
        }
    }
}

#[cfg(not(target_feature = "crt-static"))]
fn nss(uid: u32) -> Result<Option<User>> {
    use nix::unistd::{self, Uid, getgrouplist};
    let failed = |errno: nix::Error| std::io::Error::from(errno);
    let Some(found) = unistd::User::from_uid(Uid::from_raw(uid)).map_err(failed).at("getpwuid_r", PASSWD)? else {
        return Ok(None);
    };
    let name = std::ffi::CString::new(found.name).map_err(std::io::Error::from).at("getpwuid_r", PASSWD)?;
    let groups = getgrouplist(&name, found.gid).map_err(failed).at("getgrouplist", GROUP)?;
    let groups = groups.into_iter().map(unistd::Gid::as_raw).collect();
    Ok(Some(User { uid, gid: found.gid.as_raw(), groups, home: found.dir, shell: found.shell }))
}

fn parse(passwd: &str, group: &str, uid: u32) -> Option<User> {
    passwd.lines().find_map(|line| {
        // name:password:uid:gid:comment:home:shell
        let fields: Vec<_> = line.split(':').collect();
        let &[name, _, number, gid, _, home, shell] = fields.as_slice() else { return None };
        let gid = gid.parse().ok()?;
        let is_it = number.parse() == Ok(uid);
        is_it.then(|| User { uid, gid, groups: groups_of(group, name, gid), home: home.into(), shell: shell.into() })
    })
}

fn groups_of(group: &str, name: &str, primary: u32) -> Vec<u32> {
    let mut all = vec![primary];
    all.extend(group.lines().filter_map(|line| {
        // name:password:gid:member,member
        let fields: Vec<_> = line.split(':').collect();
        let &[_, _, gid, members] = fields.as_slice() else { return None };
        let is_member = members.split(',').any(|member| member == name);
        if is_member { gid.parse::<u32>().ok() } else { None }
    }));
    all
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may unwrap")]

    use super::*;

    const TEXT: &str = "root:x:0:0::/root:/bin/bash\nbroken\na:x:1000:100:A,,:/home/a:/bin/sh\n\
        git:x:1001:1001::/srv/git:/usr/bin/nologin\nnobody:x:65534:65534::/:/bin/sh\nb:x:1002:1002:::/bin/sh\n";

    #[test]
    fn a_person_is_told_from_an_account() {
        let user = |uid| parse(TEXT, "wheel:x:10:b,a\nusers:x:100:\nodd:x:11:aa\n", uid);
        let a = user(1000).unwrap();
        assert_eq!((a.gid, a.groups.as_slice(), a.home.as_path()), (100, &[100, 10][..], Path::new("/home/a")));
        assert_eq!(a.is_no_person(), None);
        for uid in [0, 1001, 1002, 65534] {
            assert!(user(uid).unwrap().is_no_person().is_some(), "{uid}");
        }
        assert_eq!(user(1003), None);
    }
}
