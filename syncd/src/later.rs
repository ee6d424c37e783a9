//! What nobody has to wait for.

/// Gives the memory of many thousand objects back while the caller goes on; a program that ends does not do it at all.
pub(crate) fn drop(value: impl Send + 'static) {
    rayon::spawn(move || std::mem::drop(value));
}
