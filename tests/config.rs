//! The configuration as a user meets it: files in, values or a message out.

#![allow(clippy::unwrap_used, reason = "tests may unwrap")]

use std::path::{Path, PathBuf};
use std::time::Duration;

use ephemeral_overlay::config::{Activate, Config, ConfigError, OnLogout, Pattern, Size};

/// The files are `/0.toml`, `/1.toml` and so on.
fn parse(files: &[&str]) -> Result<Config, ConfigError> {
    let sources = files.iter().enumerate();
    Config::parse(&sources.map(|(n, text)| (format!("/{n}.toml").into(), (*text).to_owned())).collect::<Vec<_>>())
}

fn message(files: &[&str]) -> String {
    parse(files).unwrap_err().to_string()
}

/// The documented defaults, spelled out.
const DOCUMENTED: &str = r#"
[overlay]
dirs = ["/etc", "/var/log"]
size = "90%"
activate = "boot"
passthrough = []
[tmpfs]
"/tmp" = "5G"
"/var/tmp" = "1G"
"/var/cache" = "2G"
user_cache = "2G"
[persist]
root = "/persist"
var_cache = ["pacman"]
user_cache = ["paru", "nvidia", "mesa_shader_cache", "mesa_shader_cache_db", "TauonMusicBox"]
[checkpoint]
on_logout = "checkpoint"
interval = "5min"
per_target = { "/etc" = "30s" }
snapshot = true
compression = 1
history = 5
[cleanup]
interval = "60s"
stale = "10min"
exclude = []
[log]
file = "/var/log/ramoverlay.log"
"#;

#[test]
fn no_file_an_empty_file_and_the_documented_defaults_are_the_same() {
    for files in [&[][..], &[""], &["[overlay]\n[checkpoint.per_target]"], &[DOCUMENTED], &[DOCUMENTED, DOCUMENTED]] {
        assert_eq!(parse(files).unwrap(), Config::default());
    }
}

#[test]
fn every_key_is_read() {
    let config = parse(&[r#"
        overlay = { dirs = ["/etc", "/opt"], size = 4096, activate = "login", passthrough = ["/opt/keep"] }
        tmpfs."/tmp" = "50%"
        tmpfs."/var/tmp" = false
        tmpfs."/srv/scratch" = "1.5GiB"
        tmpfs.user_cache = false
        persist = { root = "/data", var_cache = [], user_cache = ["..."] }
        cleanup = { interval = "1h 30min", stale = "2days", exclude = ["/tmp/keep-*", "/var/tmp/**/x"] }
        [checkpoint]
        on_logout = "release"
        interval = "1min"
        per_target."/opt" = "10s"
        snapshot = false
        compression = 19
        history = 0
        [log]
        file = "/opt/log"
    "#])
    .unwrap();
    assert_eq!(config.overlay.dirs, [Path::new("/etc"), Path::new("/opt")]);
    assert_eq!(config.overlay.size, Size::Bytes(4096));
    assert_eq!(config.overlay.activate, Activate::Login);
    assert_eq!(config.overlay.passthrough, [Path::new("/opt/keep")]);
    let mounts: Vec<_> = config.tmpfs.mounts.iter().map(|(path, size)| (path.to_str().unwrap(), *size)).collect();
    let expected =
        [("/srv/scratch", Size::Bytes(3 << 29)), ("/tmp", Size::Percent(50)), ("/var/cache", Size::Bytes(2 << 30))];
    assert_eq!(mounts, expected);
    assert_eq!(config.tmpfs.user_cache, None);
    assert_eq!(config.persist.root, Path::new("/data"));
    assert!(config.persist.var_cache.is_empty());
    assert_eq!(config.persist.user_cache, ["..."]);
    assert_eq!(config.checkpoint.on_logout, OnLogout::Release);
    assert_eq!(config.checkpoint.interval, Duration::from_secs(60));
    assert_eq!(config.checkpoint.interval_of(Path::new("/opt")), Duration::from_secs(10));
    assert_eq!(config.checkpoint.interval_of(Path::new("/etc")), Duration::from_secs(30));
    assert_eq!(config.checkpoint.interval_of(Path::new("/srv")), Duration::from_secs(60));
    assert!(!config.checkpoint.snapshot);
    assert_eq!((config.checkpoint.compression, config.checkpoint.history), (19, 0));
    assert_eq!(config.cleanup.interval, Duration::from_secs(90 * 60));
    assert_eq!(config.cleanup.stale, Duration::from_secs(2 * 86400));
    assert_eq!(
        config.cleanup.exclude.iter().map(Pattern::as_str).collect::<Vec<_>>(),
        ["/tmp/keep-*", "/var/tmp/**/x"]
    );
    assert_eq!(config.log.file, Path::new("/opt/log"));
}

#[test]
fn arrays_replace_and_tables_merge_across_files() {
    let config = parse(&[
        "overlay = { dirs = ['/etc', '/opt'], size = '1G' }\n\
         persist.var_cache = ['a']\n\
         checkpoint.per_target.'/opt' = '1s'",
        "[overlay]\ndirs = ['/opt', '/etc', '/srv']\n[tmpfs]\n'/var/lib/x' = '1M'\n'/tmp' = false\n",
        "[tmpfs]\n'/tmp' = '7M'\n'/var/tmp' = false\n[checkpoint.per_target]\n'/srv' = '2s'\n'/opt' = '3s'",
    ])
    .unwrap();
    assert_eq!(config.overlay.dirs, ["/opt", "/etc", "/srv"].map(PathBuf::from));
    assert_eq!(config.overlay.size, Size::Bytes(1 << 30));
    assert_eq!(config.persist.var_cache, ["a"]);
    assert_eq!(config.persist.user_cache, Config::default().persist.user_cache);
    let mounts = [("/tmp", 7 << 20), ("/var/cache", 2 << 30), ("/var/lib/x", 1 << 20)];
    assert_eq!(config.tmpfs.mounts, mounts.map(|(path, bytes)| (path.into(), Size::Bytes(bytes))).into());
    let intervals = [("/etc", 30), ("/opt", 3), ("/srv", 2)];
    assert_eq!(
        config.checkpoint.per_target,
        intervals.map(|(path, secs)| (path.into(), Duration::from_secs(secs))).into()
    );
}

#[test]
fn a_wrong_value_is_named_with_its_line_and_what_is_allowed() {
    let path = "expected an absolute path without \".\" and \"..\", without doubled and trailing slashes";
    let size = "expected a size above zero such as \"512M\", \"1.5GiB\" or \"90%\" (1% to 100% of RAM)";
    let time = "expected a time above zero such as \"30s\" or \"5min\"";
    let glob = &format!("{path}, in which *, ?, [...] and a whole component ** stand for others");
    let name = "expected the name of one directory, without slashes, not \".\" or \"..\"";
    for (text, place, expected) in [
        ("overlay = []", "overlay is an array", "expected a table"),
        ("[[tmpfs]]", "tmpfs is an array", "expected a table"),
        ("checkpoint.per_target = '30s'", "checkpoint.per_target is \"30s\"", "expected a table"),
        ("overlay.dirs = '/etc'", "overlay.dirs is \"/etc\"", "expected an array"),
        ("overlay.dirs = [1]", "overlay.dirs[0] is 1", path),
        ("overlay.dirs = ['etc']", "overlay.dirs[0] is \"etc\"", path),
        ("overlay.dirs = ['/etc/']", "overlay.dirs[0] is \"/etc/\"", path),
        ("overlay.dirs = ['//etc']", "overlay.dirs[0] is \"//etc\"", path),
        ("overlay.dirs = ['/a', '/b/../c']", "overlay.dirs[1] is \"/b/../c\"", path),
        ("overlay.passthrough = ['/etc/./x']", "overlay.passthrough[0] is \"/etc/./x\"", path),
        ("persist.root = ''", "persist.root is \"\"", path),
        ("log.file = \"/a\\u0000\"", "log.file is \"/a\\0\"", path),
        ("overlay.size = '0%'", "overlay.size is \"0%\"", size),
        ("overlay.size = '101%'", "overlay.size is \"101%\"", size),
        ("overlay.size = 0", "overlay.size is 0", size),
        ("overlay.size = -5", "overlay.size is -5", size),
        ("overlay.size = 1.5", "overlay.size is 1.5", size),
        ("overlay.size = false", "overlay.size is false", size),
        ("tmpfs.'/tmp' = '0'", "tmpfs.\"/tmp\" is \"0\"", &format!("{size}, or false")),
        ("tmpfs.user_cache = true", "tmpfs.user_cache is true", &format!("{size}, or false")),
        ("overlay.activate = 'Boot'", "overlay.activate is \"Boot\"", "expected \"boot\" or \"login\""),
        ("checkpoint.on_logout = 1", "checkpoint.on_logout is 1", "expected \"checkpoint\" or \"release\""),
        ("checkpoint.interval = 30", "checkpoint.interval is 30", time),
        ("checkpoint.interval = '30'", "checkpoint.interval is \"30\"", time),
        ("cleanup.interval = '0s'", "cleanup.interval is \"0s\"", time),
        ("cleanup.stale = '-1s'", "cleanup.stale is \"-1s\"", time),
        (
            "cleanup.stale = '18446744073709551615s 1000000000ns'",
            "cleanup.stale is \"18446744073709551615s 1000000000ns\"",
            time,
        ),
        ("cleanup.exclude = '/tmp/x'", "cleanup.exclude is \"/tmp/x\"", "expected an array"),
        ("cleanup.exclude = ['/tmp/a', 'b*']", "cleanup.exclude[1] is \"b*\"", glob),
        ("cleanup.exclude = ['/tmp/**x']", "cleanup.exclude[0] is \"/tmp/**x\"", glob),
        ("cleanup.exclude = ['/tmp/[x']", "cleanup.exclude[0] is \"/tmp/[x\"", glob),
        ("checkpoint.per_target.'/etc' = '0'", "checkpoint.per_target.\"/etc\" is \"0\"", time),
        ("checkpoint.snapshot = 'yes'", "checkpoint.snapshot is \"yes\"", "expected true or false"),
        ("checkpoint.compression = 0", "checkpoint.compression is 0", "expected an integer from 1 to 19"),
        ("checkpoint.compression = 20", "checkpoint.compression is 20", "expected an integer from 1 to 19"),
        ("checkpoint.history = -1", "checkpoint.history is -1", "expected an integer from 0 to 4294967295"),
        (
            "checkpoint.history = 1979-05-27",
            "checkpoint.history is a date or time",
            "expected an integer from 0 to 4294967295",
        ),
        ("persist.var_cache = ['']", "persist.var_cache[0] is \"\"", name),
        ("persist.var_cache = ['a/b']", "persist.var_cache[0] is \"a/b\"", name),
        ("persist.user_cache = ['.']", "persist.user_cache[0] is \".\"", name),
        ("persist.user_cache = ['..']", "persist.user_cache[0] is \"..\"", name),
    ] {
        let text = format!("# a comment\n\n{text}\n# the end\n");
        assert_eq!(message(&["", &text]), format!("/1.toml:3: {place}, {expected}"));
    }
}

#[test]
fn items_of_an_array_have_their_own_lines() {
    let text = "[overlay]\ndirs = [\n  '/etc',\n  # more\n  'opt',\n]\n";
    assert!(message(&[text]).starts_with("/0.toml:5: overlay.dirs[1] is \"opt\""));
}

#[test]
fn an_unknown_key_is_named_with_the_nearest_known_one() {
    let tables = "allowed here: overlay, tmpfs, persist, checkpoint, cleanup, log";
    let overlay = "allowed here: dirs, size, activate, passthrough";
    let per_target = "allowed here: \"/etc\", any other absolute path";
    let tmpfs = "allowed here: user_cache, \"/tmp\", \"/var/cache\", \"/var/tmp\", any other absolute path";
    for (text, expected) in [
        ("[overlays]", format!("overlays, did you mean overlay?; {tables}")),
        ("[network]", format!("network; {tables}")),
        ("'a b'.c = 1", format!("\"a b\"; {tables}")),
        ("overlay.dir = ['/etc']", format!("overlay.dir, did you mean dirs?; {overlay}")),
        ("overlay = { sise = '1G' }", format!("overlay.sise, did you mean size?; {overlay}")),
        ("overlay.bandwidth = 1", format!("overlay.bandwidth; {overlay}")),
        ("tmpfs.tmp = '1G'", format!("tmpfs.tmp, did you mean \"/tmp\"?; {tmpfs}")),
        ("tmpfs.user_cash = '1G'", format!("tmpfs.user_cash, did you mean user_cache?; {tmpfs}")),
        (
            "checkpoint.per_target.etc = '1s'",
            format!("checkpoint.per_target.etc, did you mean \"/etc\"?; {per_target}"),
        ),
        (
            "cleanup.excludes = []",
            "cleanup.excludes, did you mean exclude?; allowed here: interval, stale, exclude".to_owned(),
        ),
        ("log.path = '/x'", "log.path; allowed here: file".to_owned()),
    ] {
        assert_eq!(message(&[&format!("\n\n\n{text}")]), format!("/0.toml:4: unknown key {expected}"));
    }
}

#[test]
fn the_first_unknown_key_of_a_table_is_reported() {
    let text = "[cleanup]\nzzz = 1\naaa = 1\n";
    assert!(message(&[text]).starts_with("/0.toml:2: unknown key cleanup.zzz"));
}

#[test]
fn paths_as_keys_are_normalised_too() {
    for key in ["/tmp/", "//tmp", "/a/../b"] {
        let text = format!("[tmpfs]\n'{key}' = '1G'");
        assert!(
            message(&[&text]).starts_with(&format!("/0.toml:2: tmpfs.\"{key}\": a path here must be an absolute path"))
        );
    }
}

#[test]
fn a_syntax_error_has_its_line() {
    for text in ["[overlay]\nsize = \n", "[overlay]\nsize = '1G\n", "a = 1\na = 2\n", "[log]\n[log\n"] {
        let error = parse(&["", text]).unwrap_err();
        assert!(matches!(error, ConfigError::Syntax { .. }), "{error}");
        assert!(error.to_string().starts_with("/1.toml:2: not valid TOML: "), "{error}");
    }
}
