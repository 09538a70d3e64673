//! Rules that a test may break, one at a time, to show that the model notices.
//!
//! `mutant!("name")` is false and costs nothing unless the feature `mutants` is on; then a thread names the rule that it breaks.

#[cfg(feature = "mutants")]
mod active {
    use std::cell::Cell;

    thread_local! {
        static ACTIVE: Cell<&'static str> = const { Cell::new("") };
    }

    pub fn is(name: &'static str) -> bool {
        ACTIVE.with(|active| active.get() == name)
    }

    /// Breaks this rule in this thread from now on; none if empty.
    pub fn set(name: &'static str) {
        ACTIVE.with(|active| active.set(name));
    }
}

#[cfg(feature = "mutants")]
pub use active::{is, set};

#[cfg(not(feature = "mutants"))]
#[inline(always)]
pub const fn is(_name: &'static str) -> bool {
    false
}

macro_rules! mutant {
    ($name:literal) => {
        $crate::mutants::is($name)
    };
}
