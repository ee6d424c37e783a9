//! What the store says of a target before a checkpoint.

use ephemeral_overlay::attributes::Handle;
use ephemeral_overlay::error::At;
use ephemeral_overlay::token::Token;

use super::CheckpointStats;
use crate::chain::{Chain, Net};
use crate::error::{Error, Result};
use crate::store::TargetStore;
use crate::tree::Tree;
use crate::written::Account;

/// What is recorded so far.
pub(super) struct Past {
    pub(super) chain: Option<Chain>,
    pub(super) net: Net,
    pub(super) seed: u64,
    pub(super) token: Option<Token>,
    /// The chain in the store belongs to another state of the disk.
    pub(super) foreign: bool,
    /// The next checkpoint has to be full whatever else holds.
    pub(super) must_be_full: bool,
    /// What was written to the disk for the target.
    pub(super) written: Account,
}

impl Past {
    pub(super) fn load(store: &TargetStore, lower: &Tree, dry_run: bool, stats: &mut CheckpointStats) -> Result<Self> {
        let token = Token::read(&Handle::of(lower.root()), lower.path())?;
        let marker = store.marker()?;
        if let Some(marker) = marker.as_ref().filter(|marker| token == Some(marker.next_token) && !dry_run) {
            // That merge was complete but for the cleaning up.
            rustix::fs::syncfs(lower.root()).at("syncfs", lower.path())?;
            store.end_merge(marker.last, &store.written())?;
        }
        let loaded = store.chain().and_then(|mut chain| {
            let net = chain.as_mut().map(Chain::compose).transpose()?.unwrap_or_default();
            Ok((chain, net))
        });
        let (mut chain, mut net) = match loaded {
            // Upper has everything: whatever is wrong with what was written of it, it can be written anew.
            Err(error @ (Error::Damaged { .. } | Error::Inconsistent { .. } | Error::System(_))) => {
                stats.healed = Some(with_causes(&error));
                (None, Net::default())
            }
            other => other?,
        };
        let written = store.written_up_to(chain.as_ref().map(Chain::last));
        let foreign = chain.as_ref().is_some_and(|chain| chain.token() != token);
        if foreign {
            (chain, net) = (None, Net::default());
        }
        if chain.is_none() && !dry_run {
            // `early` puts the token on lower and never syncs: a chain must not name one that a cut takes away.
            rustix::fs::fsync(lower.root()).at("fsync", lower.path())?;
        }
        let seed = match &chain {
            Some(chain) => chain.seed(),
            None => u64::try_from(Token::random().at("getrandom", "")?.0 & u128::from(u64::MAX)).unwrap_or(0),
        };
        let first = chain.as_ref().map(|chain| chain.range().0);
        let must_be_full = marker.is_some_and(|marker| first.is_none_or(|first| first <= marker.last));
        Ok(Self { chain, net, seed, token, foreign, must_be_full, written })
    }
}

impl Past {
    /// Has the next checkpoint supersede a chain that turned out to be damaged.
    pub(super) fn forget(&mut self, error: &Error, stats: &mut CheckpointStats) {
        stats.healed = Some(with_causes(error));
        (self.chain, self.net) = (None, Net::default());
    }
}

/// An error and its causes, in one line.
fn with_causes(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
