//! Which test boots where. Every case holds on every kernel and file system, and all of that is hours; so most runs
//! boot a choice.

use crate::cases::{self, Case};
use crate::debian::Suite;
use crate::disk::Fs;
use crate::kernel::NEWEST;
use crate::machine::System;

/// A case and where it boots.
#[derive(Debug)]
pub(crate) struct Test {
    /// All of it in a name.
    pub name: String,
    /// The kernel's series.
    pub series: &'static str,
    /// The root disk's file system.
    pub fs: Fs,
    /// What is on it.
    pub system: System,
    /// What is tested.
    pub case: Case,
}

/// Where all minimal cases boot.
const EVERYDAY: (&str, Fs) = ("6.12", Fs::Ext4);
/// Where those of [`ELSEWHERE`] boot, too.
const OTHERS: [(&str, Fs); 2] = [("6.1", Fs::Ext4), ("6.12", Fs::Btrfs)];
/// What differs between kernels and between file systems, if anything does.
const ELSEWHERE: [&str; 6] = [
    "a_fresh_boot_mounts_everything",
    "a_checkpoint_survives_a_power_cut",
    "the_last_stage_leaves_nothing_pending",
    "a_read_only_root_is_written_to_for_the_merge_only",
    "a_full_disk_shows_the_checkpoint_from_ram",
    "everything_comes_back_from_a_checkpoint_and_to_the_disk",
];
/// What boots only when everything does: it takes minutes.
const FULL: [&str; 1] = ["what_is_written_to_is_as_it_was_during_the_checkpoint"];
/// The release of which some cases boot always, and those.
const EVERYDAY_DEBIAN: Suite = Suite::Trixie;
const EVERYDAY_CASES: [&str; 6] = [
    "the_main_job_from_a_busybox_initramfs",
    "the_main_job_from_a_systemd_initramfs",
    "last_words_and_a_clean_journal",
    "a_separate_log_is_activated_late",
    "the_last_logout_and_a_suspend_save_what_is_in_ram",
    "the_units_may_do_what_they_are_for_and_no_more",
];

/// What is measured in the place of tests, when asked for.
pub(crate) fn measurements() -> Vec<Test> {
    let (series, fs) = EVERYDAY;
    let name = format!("linux_{series}::{}::what_the_hook_costs", fs.name());
    vec![Test { name, series, fs, system: System::Minimal, case: cases::cost::run }]
}

/// All tests, or the choice.
pub(crate) fn tests(full: bool) -> Vec<Test> {
    let mut tests = Vec::new();
    for series in ["6.1", "6.12", NEWEST] {
        for fs in [Fs::Ext4, Fs::Btrfs, Fs::Xfs] {
            for (module, cases) in cases::MINIMAL {
                for &(name, case) in cases {
                    let here = (series, fs);
                    // There is no boot from such a disk with XFS, which writes to its log when it is mounted, read-only or
                    // not, and with btrfs, which cannot be read any more after the first write that failed.
                    if fs != Fs::Ext4 && name == "a_disk_that_refuses_writes_shows_the_checkpoint_from_ram" {
                        continue;
                    }
                    if full
                        || here == EVERYDAY && !FULL.contains(&name)
                        || OTHERS.contains(&here) && ELSEWHERE.contains(&name)
                    {
                        let name = format!("linux_{series}::{}::{module}::{name}", fs.name());
                        tests.push(Test { name, series, fs, system: System::Minimal, case });
                    }
                }
            }
        }
    }
    for (suite, series) in [(Suite::Bookworm, "6.1"), (Suite::Trixie, "6.12"), (Suite::Sid, NEWEST)] {
        for (module, cases) in cases::DEBIAN {
            for &(name, case) in cases {
                // systemd has it since 254.
                let exists = suite != Suite::Bookworm || name != "a_soft_reboot_keeps_what_is_in_ram";
                if exists && (full || suite == EVERYDAY_DEBIAN && EVERYDAY_CASES.contains(&name)) {
                    let name = format!("{}::{module}::{name}", suite.name());
                    tests.push(Test { name, series, fs: Fs::Ext4, system: System::Debian(suite), case });
                }
            }
        }
    }
    let (module, cases) = cases::OPENRC;
    for &(name, case) in cases {
        // They take minutes.
        if full {
            let (suite, (series, fs)) = (EVERYDAY_DEBIAN, EVERYDAY);
            let name = format!("{}::{module}::{name}", suite.name());
            tests.push(Test { name, series, fs, system: System::OpenRc(suite), case });
        }
    }
    tests
}
