//! `syncd export`.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use ephemeral_overlay::error::At;
use syncd::export::Layer;
use syncd::progress::Progress;
use syncd::store::Store;
use syncd::system::System;

use super::Outcome;

pub(crate) fn run(system: &System, targets: &[PathBuf], seq: Option<u64>, output: &Path) -> anyhow::Result<Outcome> {
    if seq.is_some() && targets.len() != 1 {
        tracing::error!("--seq counts the checkpoints of one target: name it");
        return Ok(Outcome::Usage);
    }
    let Some(store) = Store::open_to_read(&system.store_path()?)? else { bail!("there are no checkpoints") };
    let targets = system.stored_targets(&store, targets)?;
    if output == Path::new("-") {
        return layer(&store, &targets, seq, std::io::stdout().lock(), Path::new("standard output")).map(|done| done.0);
    }
    // It holds whatever is in /etc: for root alone, and whole or not there.
    let directory = output.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let file = tempfile::NamedTempFile::new_in(directory).at("open", directory)?;
    let (outcome, writer) = layer(&store, &targets, seq, BufWriter::new(file.as_file()), output)?;
    let written: &File = writer.into_inner().map_err(std::io::IntoInnerError::into_error).at("write", output)?;
    written.sync_all().at("fsync", output)?;
    file.persist(output).map_err(|error| error.error).at("rename", output)?;
    Ok(outcome)
}

/// Writes the layer; returns what it was written to.
fn layer<W: Write>(
    store: &Store,
    targets: &[PathBuf],
    seq: Option<u64>,
    out: W,
    path: &Path,
) -> anyhow::Result<(Outcome, W)> {
    let encoder = zstd::Encoder::new(out, zstd::DEFAULT_COMPRESSION_LEVEL).at("zstd", path)?;
    let mut layer = Layer::new(encoder, path);
    let (mut outcome, mut empty) = (Outcome::Done, true);
    for target in targets {
        let part = store.target(target);
        let Some(mut chain) = part.chain()? else { continue };
        let (first, last) = chain.range();
        if let Some(seq) = seq.filter(|seq| !(first..=last).contains(seq)) {
            bail!("{}: there is no checkpoint {seq}; there are {first} to {last}", target.display());
        }
        chain.verify(&Progress::new(None))?;
        let net = chain.compose_until(seq.unwrap_or(last))?;
        for (path, why) in layer.add(target, &chain, &net)? {
            tracing::warn!("{} is not in the layer: {why}", path.below(target).display());
            outcome = Outcome::Partial;
        }
        empty = false;
    }
    if empty {
        bail!("there are no checkpoints");
    }
    let writer = layer.finish()?.finish().at("zstd", path).context("ending the layer")?;
    Ok((outcome, writer))
}
