//! One table of one file. The keys it knows are exactly those it was asked for.

use std::collections::BTreeMap;
use std::path::PathBuf;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::ConfigError;
use super::origins::{Origins, Place, full_key, quoted};
use super::value;

/// A table that is being read.
#[derive(Debug)]
pub(super) struct Section<'a, 's> {
    name: String,
    table: &'a DeTable<'a>,
    file: usize,
    origins: &'a mut Origins<'s>,
    known: Vec<String>,
    takes_paths: bool,
}

/// Reads the `file`-th source: `read` asks for what it knows, everything else is an error.
pub(super) fn read_file<F>(file: usize, origins: &mut Origins<'_>, read: F) -> Result<(), ConfigError>
where
    F: FnOnce(&mut Section<'_, '_>) -> Result<(), ConfigError>,
{
    let document = DeTable::parse(origins.text(file)).map_err(|error| {
        let (path, line) = origins.locate(origins.place(file, &error.span().unwrap_or_default()));
        ConfigError::Syntax { path, line, message: error.message().to_owned() }
    })?;
    Section::new(String::new(), document.get_ref(), file, origins).read(read)
}

impl<'a, 's> Section<'a, 's> {
    fn new(name: String, table: &'a DeTable<'a>, file: usize, origins: &'a mut Origins<'s>) -> Self {
        Self { name, table, file, origins, known: Vec::new(), takes_paths: false }
    }

    fn read<F>(mut self, read: F) -> Result<(), ConfigError>
    where
        F: FnOnce(&mut Section<'_, '_>) -> Result<(), ConfigError>,
    {
        read(&mut self)?;
        self.finish()
    }

    /// Reads the table `key`, if there is one.
    pub(super) fn table<F>(&mut self, key: &str, read: F) -> Result<(), ConfigError>
    where
        F: FnOnce(&mut Section<'_, '_>) -> Result<(), ConfigError>,
    {
        let Some(value) = self.ask(key) else { return Ok(()) };
        let name = full_key(&self.name, key);
        match value.get_ref() {
            DeValue::Table(table) => Section::new(name, table, self.file, self.origins).read(read),
            _ => Err(self.wrong(name, value, "a table".to_owned())),
        }
    }

    /// Sets `slot` to the value of `key`, if there is one.
    pub(super) fn set<T>(
        &mut self,
        key: &str,
        slot: &mut T,
        parse: impl Fn(&DeValue<'_>) -> Result<T, String>,
    ) -> Result<(), ConfigError> {
        if let Some(value) = self.ask(key) {
            *slot = self.value(full_key(&self.name, key), value, parse)?;
        }
        Ok(())
    }

    /// Replaces `slot` by the array `key`, if there is one.
    pub(super) fn list<T>(
        &mut self,
        key: &str,
        slot: &mut Vec<T>,
        parse: impl Fn(&DeValue<'_>) -> Result<T, String>,
    ) -> Result<(), ConfigError> {
        let Some(value) = self.ask(key) else { return Ok(()) };
        let name = full_key(&self.name, key);
        let DeValue::Array(items) = value.get_ref() else {
            return Err(self.wrong(name, value, "an array".to_owned()));
        };
        let items = items.iter().enumerate();
        *slot = items
            .map(|(index, item)| self.value(format!("{name}[{index}]"), item, &parse))
            .collect::<Result<_, _>>()?;
        Ok(())
    }

    /// Merges every key that is a path into `slot`; a value that parses to `None` removes its key.
    pub(super) fn paths<T>(
        &mut self,
        slot: &mut BTreeMap<PathBuf, T>,
        parse: impl Fn(&DeValue<'_>) -> Result<Option<T>, String>,
    ) -> Result<(), ConfigError> {
        self.takes_paths = true;
        self.known.extend(slot.keys().map(|path| path.to_string_lossy().into_owned()));
        for (key, value) in self.table {
            if !key.get_ref().starts_with('/') {
                continue;
            }
            let name = full_key(&self.name, key.get_ref());
            let Some(path) = value::normal_path(key.get_ref()) else {
                let (path, line) = self.origins.locate(self.place(key));
                let reason = format!("a path here must be {}", value::NORMAL_PATH);
                return Err(ConfigError::Refused { path, line, key: name, reason });
            };
            match self.value(name, value, &parse)? {
                Some(parsed) => slot.insert(path, parsed),
                None => slot.remove(&path),
            };
        }
        Ok(())
    }

    fn ask(&mut self, key: &str) -> Option<&'a Spanned<DeValue<'a>>> {
        self.known.push(key.to_owned());
        self.table.get(key)
    }

    fn value<T>(
        &mut self,
        name: String,
        value: &Spanned<DeValue<'_>>,
        parse: impl Fn(&DeValue<'_>) -> Result<T, String>,
    ) -> Result<T, ConfigError> {
        match parse(value.get_ref()) {
            Ok(parsed) => {
                let place = self.place(value);
                self.origins.record(name, place);
                Ok(parsed)
            }
            Err(expected) => Err(self.wrong(name, value, expected)),
        }
    }

    fn place<T>(&self, spanned: &Spanned<T>) -> Place {
        self.origins.place(self.file, &spanned.span())
    }

    fn wrong(&self, key: String, value: &Spanned<DeValue<'_>>, expected: String) -> ConfigError {
        let (path, line) = self.origins.locate(self.place(value));
        ConfigError::Value { path, line, key, found: value::describe(value.get_ref()), expected }
    }

    /// Reports the first key of the table that nobody asked for.
    fn finish(self) -> Result<(), ConfigError> {
        let is_known =
            |key: &str| self.known.iter().any(|known| known == key) || (self.takes_paths && key.starts_with('/'));
        let unknown = self.table.keys().filter(|key| !is_known(key.get_ref()));
        let Some(key) = unknown.min_by_key(|key| key.span().start) else { return Ok(()) };
        let (path, line) = self.origins.locate(self.place(key));
        let mut allowed: Vec<String> = self.known.iter().map(|known| quoted(known)).collect();
        if self.takes_paths {
            allowed.push("any other absolute path".to_owned());
        }
        Err(ConfigError::UnknownKey {
            path,
            line,
            key: full_key(&self.name, key.get_ref()),
            nearest: nearest(key.get_ref(), &self.known).map(quoted),
            allowed: allowed.join(", "),
        })
    }
}

/// The known key that takes the fewest edits to get from `key`, unless a third of it would have to change.
fn nearest<'k>(key: &str, known: &'k [String]) -> Option<&'k str> {
    let distance = |known: &str| strsim::osa_distance(key, known);
    let best = known.iter().min_by_key(|known| distance(known))?;
    let longer = key.chars().count().max(best.chars().count());
    (distance(best) <= (longer / 3).max(1)).then_some(best)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_key_is_reasonably_near() {
        let known = ["dirs", "size", "activate", "/tmp"].map(str::to_owned);
        for (key, expected) in [
            ("dir", Some("dirs")),
            ("Dirs", Some("dirs")),
            ("szie", Some("size")),
            ("pass", None),
            ("activation", Some("activate")),
            ("tmp", Some("/tmp")),
            ("bandwidth", None),
            ("x", None),
        ] {
            assert_eq!(nearest(key, &known), expected, "{key}");
        }
        assert_eq!(nearest("x", &[]), None);
    }
}
