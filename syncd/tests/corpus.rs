//! Whatever the fuzzer of the reader found worth keeping.

#![allow(clippy::print_stdout, reason = "a test says which file it was at")]

#[test]
fn the_corpus_of_the_reader() {
    let corpus = forge::fuzz::corpus("reader");
    assert!(corpus.len() > 10, "{} files", corpus.len());
    for (name, bytes) in corpus {
        println!("{name}");
        forge::fuzz::reader::read(&bytes);
    }
}
