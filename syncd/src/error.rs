//! Everything that can go wrong, each meaning a variant that names its path and what to do next.

use std::io::ErrorKind;
use std::path::PathBuf;

use ephemeral_overlay::SystemError;
use ephemeral_overlay::layout::LoadError;
use ephemeral_overlay::overlay::UnknownArtefact;
use ephemeral_overlay::state::StateError;

use rustix::io::Errno;

use crate::path::RelPath;

/// This crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why something was not done. The state before it is intact unless a variant says otherwise.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A system call failed.
    #[error(transparent)]
    System(#[from] SystemError),
    /// The configuration could not be had.
    #[error(transparent)]
    Config(#[from] LoadError),
    /// The boot state could not be had.
    #[error(transparent)]
    State(#[from] StateError),
    /// Upper holds something that our mount options never make.
    #[error("{}: it is not checkpointed further; mount the overlay with the options of `early`", path.display())]
    Artefact {
        /// Where in upper.
        path: PathBuf,
        /// What.
        source: UnknownArtefact,
    },
    /// A checkpoint or another record in the store is not what was written.
    #[error("{} is damaged: {what}; nothing of its target was applied. `syncd merge --accept-prefix` applies the checkpoints before it, `syncd merge --set-aside` moves the chain away", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// A checkpoint was written by a newer version.
    #[error("{} has format {found}, this syncd reads up to {}; install the newer version, nothing was changed", path.display(), ephemeral_overlay::CHECKPOINT_FORMAT)]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its format.
        found: u32,
    },
    /// The merge in the initramfs could not read what this version writes.
    #[error(
        "the initramfs of this boot reads checkpoints up to format {reads}, this syncd writes {}; rebuild it and reboot, or go back to the older version: nothing is saved until then",
        ephemeral_overlay::CHECKPOINT_FORMAT
    )]
    OldInitramfs {
        /// The newest format that it reads.
        reads: u32,
    },
    /// The overlay of a target is mounted, or something still uses it.
    #[error("{} is not merged: {why}", target.display())]
    Alive {
        /// The target.
        target: PathBuf,
        /// Who has it.
        why: String,
    },
    /// Something is on a file system that fstab names and that is not mounted.
    #[error("{what} is on {}, which is not mounted; mount it and try again, nothing was changed", mount_point.display())]
    NotMounted {
        /// What.
        what: &'static str,
        /// Where the file system belongs.
        mount_point: PathBuf,
    },
    /// The bind of a target's directory on disk, without which neither a checkpoint nor a merge can be made.
    #[error(
        "{}: somebody unmounted the bind of its directory on disk, {}; nothing was changed, the next boot merges what was saved",
        target.display(),
        bind.display()
    )]
    LowerGone {
        /// The target.
        target: PathBuf,
        /// Where it was.
        bind: PathBuf,
    },
    /// Overlays of ours are mounted that the boot state does not know.
    #[error(
        "the overlays on {targets} are mounted, but boot.json does not know them: nothing of them can be saved by syncd; copy what you need elsewhere and reboot"
    )]
    UnknownOverlays {
        /// The targets.
        targets: String,
    },
    /// A chain of another state of the disk.
    #[error("the checkpoints of {} do not belong to this state of the disk", target.display())]
    Foreign {
        /// The target.
        target: PathBuf,
    },
    /// Lower has no room for what a merge would write.
    #[error("{}: merging needs {need} bytes and {inodes} inodes, {free} bytes are free; make room and run `syncd merge` again, nothing was changed", target.display())]
    NoRoom {
        /// The target.
        target: PathBuf,
        /// Bytes needed at the most.
        need: u64,
        /// Bytes free.
        free: u64,
        /// Inodes needed.
        inodes: u64,
    },
    /// What a merge wrote is not what it reads back.
    #[error("{} reads back different from what was written ({what}); the checkpoints were kept, check the disk and run `syncd merge` again", path.display())]
    Mismatch {
        /// The file.
        path: PathBuf,
        /// What differs.
        what: &'static str,
    },
    /// A file was moved away while it was read; the checkpoint starts over.
    #[error("{path} was moved while it was read")]
    Moved {
        /// The path.
        path: RelPath,
    },
    /// Upper was never quiet enough to be read.
    #[error("{}: files are moved faster than they can be read; the previous checkpoint stays, run `syncd checkpoint` again", path.display())]
    Unsettled {
        /// The upper directory.
        path: PathBuf,
    },
    /// No such target.
    #[error("{} is not a target; known are: {known}", target.display())]
    UnknownTarget {
        /// What was asked for.
        target: PathBuf,
        /// What there is.
        known: String,
    },
    /// A user's cache, or a part of it, stays where it is.
    #[error("{} is left as it is: {why}", path.display())]
    Left {
        /// The directory.
        path: PathBuf,
        /// Why.
        why: String,
    },
    /// Something could not be mounted; nothing of it is.
    #[error("{}: mounting it failed", path.display())]
    Mount {
        /// Where.
        path: PathBuf,
        /// What the kernel said.
        source: anyhow::Error,
    },
    /// No such user.
    #[error("there is no user with the number {uid}")]
    UnknownUser {
        /// The number.
        uid: u32,
    },
    /// A composed chain that contradicts itself.
    #[error("checkpoint {seq} is damaged: {path} {what}")]
    Inconsistent {
        /// The checkpoint's sequence number.
        seq: u64,
        /// The path.
        path: RelPath,
        /// What is wrong.
        what: &'static str,
    },
}

impl Error {
    /// Whether the disk, or a quota on it, is full. The kind tells, where a library has put a path around the number.
    #[must_use]
    pub fn is_full_disk(&self) -> bool {
        let Self::System(error) = self else { return false };
        matches!(error.source.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded)
    }
}

/// What to do about the disk, where it is that which kept a checkpoint from being taken.
#[must_use]
pub fn remedy(error: &anyhow::Error) -> Option<&'static str> {
    let error = error.chain().find_map(|cause| cause.downcast_ref::<std::io::Error>())?;
    match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
            Some("make room on the disk; what is in RAM is not saved until then")
        }
        ErrorKind::ReadOnlyFilesystem => Some(
            "the disk is read-only; remount it read-write, what is in RAM is not saved until then. Where the kernel \
             refuses that after an error, copy what you need elsewhere and reboot: it shows what was saved last",
        ),
        _ if Errno::from_io_error(error) == Some(Errno::IO) => Some(
            "the disk fails, see dmesg; what is in RAM is not saved until it works again. Where it does not, copy what \
             you need elsewhere and reboot: it shows what was saved last",
        ),
        _ => None,
    }
}
