//! Rules that `make mutants` breaks, one at a time, to see that a test notices. `pgrx-tests/src/mutants/list.rs` says what each breaks.
//!
//! `mutant!("name")` is a constant false unless the feature `mutants` is on, which only `make mutants` asks for: neither a release nor a
//! server for the ordinary tests has it. Then the server process names the one rule to break when it starts, and its children inherit it.

/// Is this rule broken in the running server? The rules of `awa_protocol` are broken by the same name.
macro_rules! mutant {
    ($name:literal) => {
        awa_protocol::mutants::is($name)
    };
}

/// From `_PG_init`.
#[cfg(feature = "mutants")]
pub fn choose() {
    if let Ok(name) = std::env::var("AWA_MUTANT") {
        // Once in the life of the server.
        awa_protocol::mutants::set(name.leak());
    }
}
