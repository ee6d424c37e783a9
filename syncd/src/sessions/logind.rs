//! org.freedesktop.login1 (systemd-logind or elogind), by its signals.
//!
//! A user is logged in by a session of the class `user` or one of its kin; a user manager, a greeter or a cron job is
//! none. A logout is over when logind has removed the user: until then the user manager writes, for 10 seconds or so
//! after the last session (`UserStopDelaySec`, logind.conf(5)).

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;

use zbus::MatchRule;
use zbus::blocking::{Connection, MessageIterator, fdo::DBusProxy, fdo::PropertiesProxy};
use zbus::message::Type;
use zbus::names::InterfaceName;
use zbus::zvariant::{self, OwnedObjectPath};

use super::Change;

const SERVICE: &str = "org.freedesktop.login1";
const PATH: &str = "/org/freedesktop/login1";
const MANAGER: &str = "org.freedesktop.login1.Manager";
/// Users whose sessions have ended and whose manager is being stopped.
const CLOSING: &str = "closing";

/// A connection to it.
#[derive(Debug)]
pub(super) struct Logind {
    connection: Connection,
}

impl Logind {
    /// Connects to the system bus and sees that somebody answers there.
    pub(super) fn connect() -> zbus::Result<Self> {
        let logind = Self { connection: Connection::system()? };
        logind.sessions()?;
        Ok(logind)
    }

    /// Has changes told, by threads that end with the connection.
    pub(super) fn watch(&self, tell: impl Fn(Change) + Clone + Send + 'static) -> zbus::Result<()> {
        let rule = || MatchRule::builder().msg_type(Type::Signal);
        let manager = rule().interface(MANAGER)?.path(PATH)?.build();
        let owner = rule()
            .sender("org.freedesktop.DBus")?
            .interface("org.freedesktop.DBus")?
            .member("NameOwnerChanged")?
            .add_arg(SERVICE)?
            .build();
        self.follow(manager, tell.clone())?;
        self.follow(owner, tell)
    }

    fn follow(&self, rule: MatchRule<'_>, tell: impl Fn(Change) + Send + 'static) -> zbus::Result<()> {
        let rule = rule.into_owned();
        let messages = MessageIterator::for_match_rule(rule, &self.connection, None)?;
        let connection = self.connection.clone();
        std::thread::spawn(move || {
            for message in messages {
                let Ok(message) = message else { break };
                let header = message.header();
                match header.member().map(zbus::names::MemberName::as_str) {
                    Some("SessionNew" | "SessionRemoved" | "UserNew" | "UserRemoved") => tell(Change::Sessions),
                    Some("PrepareForSleep") => {
                        let begins = message.body().deserialize::<bool>().unwrap_or(true);
                        tell(if begins { Change::Sleep } else { Change::Awake });
                    }
                    // It ended, or was started again: what we hold of it (the inhibitor) is gone.
                    Some("NameOwnerChanged") => break,
                    _ => {}
                }
            }
            // Ends the other thread as well: whoever finds logind again connects anew.
            let _closed = connection.close();
            tell(Change::Lost);
        });
        Ok(())
    }

    /// Who is logged in, by number; `before` is what it was at the last look.
    pub(super) fn present(&self, before: Option<&BTreeSet<String>>) -> zbus::Result<BTreeSet<String>> {
        let classes = self.sessions()?;
        let users: Vec<(u32, String, OwnedObjectPath)> = self.ask("ListUsers", &())?;
        let mut states = Vec::new();
        for (user, _, path) in users {
            if let Some(state) = self.property(&path, "org.freedesktop.login1.User", "State")? {
                states.push((user, state));
            }
        }
        Ok(present(before, &classes, &states))
    }

    /// Each session's user and class.
    fn sessions(&self) -> zbus::Result<Vec<(u32, String)>> {
        let sessions: Vec<(String, u32, String, String, OwnedObjectPath)> = self.ask("ListSessions", &())?;
        let mut classes = Vec::new();
        for (_, user, _, _, path) in sessions {
            if let Some(class) = self.property(&path, "org.freedesktop.login1.Session", "Class")? {
                classes.push((user, class));
            }
        }
        Ok(classes)
    }

    /// Has a suspend wait until the descriptor is closed, at most `InhibitDelayMaxSec` (logind.conf(5)).
    pub(super) fn delay_sleep(&self) -> zbus::Result<OwnedFd> {
        let why = ("sleep", "Ephemeral Overlay", "what is in RAM is saved", "delay");
        let lock: zvariant::OwnedFd = self.ask("Inhibit", &why)?;
        Ok(lock.into())
    }

    fn ask<B, R>(&self, method: &str, body: &B) -> zbus::Result<R>
    where
        B: serde::Serialize + zvariant::DynamicType,
        R: serde::de::DeserializeOwned + zvariant::Type,
    {
        self.connection.call_method(Some(SERVICE), PATH, Some(MANAGER), method, body)?.body().deserialize()
    }

    /// A property; `None` when the object has gone since it was listed.
    fn property(&self, path: &OwnedObjectPath, interface: &'static str, name: &str) -> zbus::Result<Option<String>> {
        let properties = PropertiesProxy::builder(&self.connection).destination(SERVICE)?.path(path)?.build()?;
        match properties.get(InterfaceName::from_static_str(interface)?, name) {
            Ok(value) => Ok(Some(value.try_into()?)),
            Err(_) if self.is_there()? => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn is_there(&self) -> zbus::Result<bool> {
        Ok(DBusProxy::new(&self.connection)?.name_has_owner(SERVICE.try_into()?)?)
    }
}

/// Who is logged in: who has a session that is a login, and who was and is not gone yet.
fn present(before: Option<&BTreeSet<String>>, sessions: &[(u32, String)], users: &[(u32, String)]) -> BTreeSet<String> {
    let with_session = sessions.iter().filter(|(_, class)| class.starts_with("user")).map(|(user, _)| user.to_string());
    let closing = users.iter().filter(|(_, state)| state == CLOSING).map(|(user, _)| user.to_string());
    let was_there = |user: &String| before.is_none_or(|before| before.contains(user));
    with_session.chain(closing.filter(was_there)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(all: &[(u32, &str)]) -> Vec<(u32, String)> {
        all.iter().map(|(user, word)| (*user, (*word).to_owned())).collect()
    }

    fn names(all: &[u32]) -> BTreeSet<String> {
        all.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_login_is_a_session_of_a_user_until_the_user_is_gone() {
        let look = |before: Option<&[u32]>, sessions: &[(u32, &str)], users: &[(u32, &str)]| {
            present(before.map(names).as_ref(), &pairs(sessions), &pairs(users))
        };
        let manager = (1000, "manager");
        // A user manager, a greeter and a job are no logins.
        assert_eq!(look(Some(&[]), &[manager, (42, "greeter"), (0, "background")], &[(1000, "lingering")]), names(&[]));
        let all = look(Some(&[]), &[manager, (1000, "user"), (0, "user-early")], &[(1000, "active"), (0, "online")]);
        assert_eq!(all, names(&[0, 1000]));
        // Its session has ended, its manager has not.
        assert_eq!(look(Some(&[1000]), &[manager], &[(1000, "closing")]), names(&[1000]));
        // It stays, and nobody is there.
        assert_eq!(look(Some(&[1000]), &[manager], &[(1000, "lingering")]), names(&[]));
        assert_eq!(look(Some(&[1000]), &[], &[]), names(&[]));
        // A job that is ending was no login.
        assert_eq!(look(Some(&[]), &[], &[(0, "closing")]), names(&[]));
        // At our start it may have been one.
        assert_eq!(look(None, &[], &[(1000, "closing")]), names(&[1000]));
    }
}
