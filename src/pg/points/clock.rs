//! A clock that steps: what the library takes for the time, moved for all sessions of the server. The server's own clock stays.
use std::sync::atomic::{AtomicU64, Ordering};

use super::super::shmem::{self, Attached, Carver, Layout};

struct Clock {
    /// Microseconds, signed.
    offset: &'static [AtomicU64],
}

static CLOCK: Attached<Clock> = Attached::new();

impl Layout for Clock {
    const NAME: &'static core::ffi::CStr = c"awa_clock";

    fn carve(carver: &mut Carver) -> Self {
        Self { offset: carver.atomics_u64(1) }
    }

    fn place() -> &'static Attached<Self> {
        &CLOCK
    }
}

/// From `_PG_init`.
pub fn register() {
    let _ = shmem::register::<Clock>();
}

pub fn set_clock(offset: i64) {
    if let Some(place) = CLOCK.get().and_then(|clock| clock.offset.first()) {
        place.store(offset as u64, Ordering::Relaxed);
    }
}

#[inline]
pub fn clock_offset() -> i64 {
    CLOCK.get().and_then(|clock| clock.offset.first()).map_or(0, |offset| offset.load(Ordering::Relaxed) as i64)
}
