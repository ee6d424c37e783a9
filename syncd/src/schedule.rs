//! When a target is looked at. Time is that of a clock which stands still while the machine is suspended.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use ephemeral_overlay::config::Checkpoint;

/// When each target was looked at last.
#[derive(Debug, Default)]
pub struct Schedule {
    last: BTreeMap<PathBuf, Instant>,
}

impl Schedule {
    /// Which of `targets`, all that are in RAM now, have not been looked at for as long as their interval. One that is
    /// new has its first interval before it.
    pub fn due(&mut self, config: &Checkpoint, targets: &[PathBuf], now: Instant) -> Vec<PathBuf> {
        self.last.retain(|target, _| targets.contains(target));
        for target in targets {
            self.last.entry(target.clone()).or_insert(now);
        }
        let is_due = |target: &&PathBuf| now >= self.last[*target] + config.interval_of(target);
        targets.iter().filter(is_due).cloned().collect()
    }

    /// Notes that a target was looked at.
    pub fn looked(&mut self, target: &Path, now: Instant) {
        self.last.insert(target.to_path_buf(), now);
    }

    /// When the next one is due; `None` when nothing is in RAM.
    #[must_use]
    pub fn next(&self, config: &Checkpoint) -> Option<Instant> {
        self.last.iter().map(|(target, last)| *last + config.interval_of(target)).min()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn seconds(number: u64) -> Duration {
        Duration::from_secs(number)
    }

    #[test]
    fn each_target_has_its_own_interval() {
        let config = Checkpoint::default();
        let (etc, log) = (PathBuf::from("/etc"), PathBuf::from("/var/log"));
        let both = [etc.clone(), log.clone()];
        let (mut schedule, begin) = (Schedule::default(), Instant::now());
        assert_eq!(schedule.next(&config), None);
        assert!(schedule.due(&config, &both, begin).is_empty());
        assert_eq!(schedule.next(&config), Some(begin + seconds(30)));
        assert_eq!(schedule.due(&config, &both, begin + seconds(30)), both[..1]);
        schedule.looked(&etc, begin + seconds(31));
        assert!(schedule.due(&config, &both, begin + seconds(60)).is_empty());
        assert_eq!(schedule.due(&config, &both, begin + seconds(300)), both);
        // What was released is not waited for, and what comes back begins anew.
        assert!(schedule.due(&config, &[], begin + seconds(300)).is_empty());
        assert_eq!(schedule.next(&config), None);
        assert!(schedule.due(&config, &both, begin + seconds(301)).is_empty());
    }
}
