//! What overlayfs leaves in an upper directory, and what of it is a user's data.
//!
//! Measured on kernels 6.1, 6.12 and 6.18 with the options of [`OPTIONS`]; docs/overlayfs.md names the test of each
//! fact. Whatever is not known here stops a checkpoint: nothing is guessed.

use crate::attributes::Xattrs;
use crate::token;

/// The mount options that make an upper directory self-contained, spelled out because their defaults differ.
///
/// `redirect_dir=off` can still mean *follow*; without `xino=on` a new directory is not marked opaque, and a file
/// deleted in it after a checkpoint comes back.
pub const OPTIONS: [(&str, &str); 4] =
    [("redirect_dir", "nofollow"), ("metacopy", "off"), ("index", "off"), ("xino", "on")];

/// The prefix of overlayfs' own attributes.
pub const PREFIX: &str = "trusted.overlay.";
/// Marks a directory that hides lower's directory of the same name, on a directory in upper, with the value `y`.
pub const OPAQUE: &str = "trusted.overlay.opaque";
/// How `trusted.overlay.X`, set by an application through the overlay, is kept in upper.
pub const ESCAPED: &str = "trusted.overlay.overlay.";
const PROTATTR: &str = "trusted.overlay.protattr";
/// Bookkeeping of overlayfs that says nothing about the contents.
const BOOKKEEPING: [&str; 3] = ["trusted.overlay.origin", "trusted.overlay.impure", "trusted.overlay.uuid"];
/// XFS shows root every ACL a second time under these names; they are not data.
const SGI_ACL: &[u8] = b"trusted.SGI_ACL_";

/// What an object in upper says beside its contents.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Artefacts {
    /// The user's attributes, as seen through the overlay.
    pub xattrs: Xattrs,
    /// The directory hides lower's.
    pub opaque: bool,
    /// `chattr +i` was done through the overlay.
    pub immutable: bool,
    /// `chattr +a` was done through the overlay.
    pub append_only: bool,
}

/// An attribute in upper that this version does not understand.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the overlay attribute {name}={value:?} is not known; it is made by mount options other than ours")]
pub struct UnknownArtefact {
    /// The attribute's name.
    pub name: String,
    /// Its value, for the message.
    pub value: String,
}

/// Tells the user's attributes from overlayfs' own.
///
/// # Errors
/// Redirects, metacopy, xattr whiteouts, `opaque=x` and any other unknown `trusted.overlay.*`.
pub fn interpret(raw: Xattrs) -> Result<Artefacts, UnknownArtefact> {
    let mut found = Artefacts::default();
    for (name, value) in raw {
        if is_never_data(&name) {
            continue;
        }
        let Some(own) = name.strip_prefix(PREFIX.as_bytes()) else {
            found.xattrs.insert(name, value);
            continue;
        };
        if let Some(escaped) = own.strip_prefix(b"overlay.") {
            found.xattrs.insert([PREFIX.as_bytes(), escaped].concat(), value);
        } else if name == OPAQUE.as_bytes() && value == b"y" {
            found.opaque = true;
        } else if name == PROTATTR.as_bytes() && value.iter().all(|byte| b"ia".contains(byte)) {
            found.immutable = value.contains(&b'i');
            found.append_only = value.contains(&b'a');
        } else if !BOOKKEEPING.iter().any(|known| known.as_bytes() == name) {
            return Err(UnknownArtefact {
                name: String::from_utf8_lossy(&name).into_owned(),
                value: String::from_utf8_lossy(&value).into_owned(),
            });
        }
    }
    Ok(found)
}

/// The inverse of [`interpret`]: the attributes that make upper say this.
#[must_use]
pub fn express(artefacts: &Artefacts) -> Xattrs {
    let mut raw = Xattrs::new();
    for (name, value) in &artefacts.xattrs {
        let name = match name.strip_prefix(PREFIX.as_bytes()) {
            Some(inner) => [ESCAPED.as_bytes(), inner].concat(),
            None => name.clone(),
        };
        raw.insert(name, value.clone());
    }
    if artefacts.opaque {
        raw.insert(OPAQUE.into(), b"y".to_vec());
    }
    let mut flags = Vec::new();
    if artefacts.append_only {
        flags.push(b'a');
    }
    if artefacts.immutable {
        flags.push(b'i');
    }
    if !flags.is_empty() {
        raw.insert(PROTATTR.into(), flags);
    }
    raw
}

/// Attributes that are neither recorded, compared nor written: our token and XFS' second view of ACLs.
#[must_use]
pub fn is_never_data(name: &[u8]) -> bool {
    name == token::XATTR.as_bytes() || name.starts_with(SGI_ACL)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(pairs: &[(&str, &str)]) -> Xattrs {
        pairs.iter().map(|(name, value)| (name.as_bytes().to_vec(), value.as_bytes().to_vec())).collect()
    }

    #[test]
    fn own_attributes_are_told_from_the_users() {
        let raw = set(&[
            ("user.a", "1"),
            ("trusted.overlay.origin", "x"),
            ("trusted.overlay.opaque", "y"),
            ("trusted.overlay.protattr", "ia"),
            ("trusted.overlay.overlay.z", "2"),
            ("trusted.SGI_ACL_FILE", "dup"),
            (token::XATTR, "t"),
        ]);
        let found = interpret(raw).unwrap();
        assert_eq!(found.xattrs, set(&[("trusted.overlay.z", "2"), ("user.a", "1")]));
        assert!(found.opaque && found.immutable && found.append_only);
        assert_eq!(interpret(express(&found)).unwrap(), found);
    }

    #[test]
    fn what_is_not_known_is_refused() {
        for (name, value) in [
            ("trusted.overlay.redirect", "/mv"),
            ("trusted.overlay.metacopy", ""),
            ("trusted.overlay.whiteout", "y"),
            ("trusted.overlay.opaque", "x"),
            ("trusted.overlay.protattr", "q"),
            ("trusted.overlay.nlink", "U+0"),
        ] {
            assert!(interpret(set(&[(name, value)])).is_err(), "{name}={value} was accepted");
        }
    }
}
