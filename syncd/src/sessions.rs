//! Who is logged in. logind tells, over D-Bus; where nothing answers there, utmp and the sockets of displays do.

mod files;
mod logind;

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;

use files::Files;
use logind::Logind;

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// Somebody may have logged in or out.
    Sessions,
    /// The machine is about to be suspended, and waits for us as long as logind lets it.
    Sleep,
    /// It woke up.
    Awake,
    /// Whoever tells us of changes is gone: [`Sessions::find`] may find another.
    Lost,
}

/// Who tells us.
#[derive(Debug)]
pub struct Sessions {
    source: Source,
    /// Who is logged in, by a name that means something to the source only; `None` where nobody knows.
    present: Option<BTreeSet<String>>,
    /// The last look missed somebody.
    left: bool,
}

#[derive(Debug)]
enum Source {
    Logind(Logind),
    Files(Files),
    Nothing,
}

/// What a look at the sessions came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// Nothing that matters.
    None,
    /// The first one logged in.
    FirstLogin,
    /// The last one logged out, and all that they had running has ended.
    LastLogout,
}

impl Sessions {
    /// Finds out who tells us, and has every change told to `tell`, from a thread of its own.
    pub fn find(tell: impl Fn(Change) + Clone + Send + 'static) -> Self {
        let logind = Logind::connect().and_then(|logind| logind.watch(tell.clone()).map(|()| logind));
        let source = match logind {
            Ok(logind) => Source::Logind(logind),
            Err(error) => {
                tracing::debug!("logind: {error}");
                Files::watch(tell).map_or_else(
                    |error| {
                        tracing::warn!("no session is seen: {error}");
                        Source::Nothing
                    },
                    Source::Files,
                )
            }
        };
        Self { source, present: None, left: false }
    }

    /// Who it is, in a word.
    #[must_use]
    pub fn source(&self) -> &'static str {
        match &self.source {
            Source::Logind(_) => "logind",
            Source::Files(files) => files.source(),
            Source::Nothing => "nothing",
        }
    }

    /// Whether every change is told.
    #[must_use]
    pub fn tells_all(&self) -> bool {
        matches!(self.source, Source::Logind(_))
    }

    /// Looks who is logged in now. The first look turns nothing: nobody logged in or out before our eyes.
    pub fn look(&mut self) -> Turn {
        let before = self.present.take();
        let now = match &self.source {
            Source::Logind(logind) => match logind.present(before.as_ref()) {
                Ok(present) => Some(present),
                Err(error) => {
                    tracing::warn!("logind: {error}");
                    // It is asked again when it tells the next change.
                    before.clone()
                }
            },
            Source::Files(files) => files.present(),
            Source::Nothing => None,
        };
        let turn = turn(before.as_ref(), now.as_ref());
        self.left = before.zip(now.as_ref()).is_some_and(|(before, now)| !before.is_subset(now));
        self.present = now;
        turn
    }

    /// Whether somebody who was logged in before the last look no longer was.
    #[must_use]
    pub fn somebody_left(&self) -> bool {
        self.left
    }

    /// How many are logged in; `None` where nobody knows.
    #[must_use]
    pub fn count(&self) -> Option<usize> {
        self.present.as_ref().map(BTreeSet::len)
    }

    /// Goes on from what another one knew: that a source changed is no login.
    #[must_use]
    pub fn after(mut self, other: &Self) -> Self {
        if matches!((&self.source, &other.source), (Source::Logind(_), Source::Logind(_))) {
            self.present.clone_from(&other.present);
        }
        self
    }

    /// Has a suspend wait for us until the descriptor is closed; `None` where there is no logind.
    #[must_use]
    pub fn delay_sleep(&self) -> Option<OwnedFd> {
        let Source::Logind(logind) = &self.source else { return None };
        logind
            .delay_sleep()
            .inspect_err(|error| tracing::warn!("logind, Inhibit: {error}; a suspend will not wait"))
            .ok()
    }
}

fn turn(before: Option<&BTreeSet<String>>, now: Option<&BTreeSet<String>>) -> Turn {
    match (before.map(BTreeSet::is_empty), now.map(BTreeSet::is_empty)) {
        (Some(true), Some(false)) => Turn::FirstLogin,
        (Some(false), Some(true)) => Turn::LastLogout,
        _ => Turn::None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_first_and_the_last_turn_anything() {
        let set = |names: &[&str]| Some(names.iter().map(ToString::to_string).collect::<BTreeSet<_>>());
        let cases = [
            (None, set(&["a"]), Turn::None),
            (None, set(&[]), Turn::None),
            (set(&[]), set(&["a"]), Turn::FirstLogin),
            (set(&["a"]), set(&["a", "b"]), Turn::None),
            (set(&["a", "b"]), set(&["b"]), Turn::None),
            (set(&["b"]), set(&[]), Turn::LastLogout),
            // Unknown is not empty.
            (set(&["b"]), None, Turn::None),
        ];
        for (before, now, expected) in cases {
            assert_eq!(turn(before.as_ref(), now.as_ref()), expected, "{before:?} {now:?}");
        }
    }
}
