//! Jitter: sessions sleep at random wherever a point or a fault could be, so that rare orders of events become common.
//! Sleeps by the system's own call: it raises nothing and notices nothing, so it is legal wherever a point is, under a lock and in a callback.
use std::cell::Cell;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use super::super::shmem::{self, Attached, Carver, Layout};
use super::super::xact::my_pid;

struct Jitter {
    /// One in so many places sleeps; 0 for none.
    one_in: &'static [AtomicU32],
    at_most_us: &'static [AtomicU32],
}

static JITTER: Attached<Jitter> = Attached::new();

impl Layout for Jitter {
    const NAME: &'static core::ffi::CStr = c"awa_jitter";

    fn carve(carver: &mut Carver) -> Self {
        Self { one_in: carver.atomics_u32(1), at_most_us: carver.atomics_u32(1) }
    }

    fn place() -> &'static Attached<Self> {
        &JITTER
    }
}

/// From `_PG_init`.
pub fn register() {
    let _ = shmem::register::<Jitter>();
}

/// For all sessions of the server, from now on.
pub fn set_jitter(one_in: u32, at_most_us: u32) {
    let Some(jitter) = JITTER.get() else { return };
    if let (Some(chance), Some(most)) = (jitter.one_in.first(), jitter.at_most_us.first()) {
        most.store(at_most_us, Ordering::Relaxed);
        chance.store(one_in, Ordering::Relaxed);
    }
}

/// Almost nothing while there is no jitter.
#[inline]
pub fn tremble() {
    let Some(jitter) = JITTER.get() else { return };
    let one_in = jitter.one_in.first().map_or(0, |chance| chance.load(Ordering::Relaxed));
    if one_in != 0 {
        tremble_slowly(one_in, jitter.at_most_us.first().map_or(0, |most| most.load(Ordering::Relaxed)));
    }
}

thread_local! {
    static STATE: Cell<u64> = const { Cell::new(0) };
}

/// A sequence of its own for each process (xorshift); which it is does not matter.
fn next_random() -> u64 {
    let mut state = STATE.get();
    if state == 0 {
        state = u64::from(my_pid().unsigned_abs()).wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    }
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    STATE.set(state);
    state
}

#[cold]
fn tremble_slowly(one_in: u32, at_most_us: u32) {
    if next_random() % u64::from(one_in) == 0 && at_most_us != 0 {
        thread::sleep(Duration::from_micros(next_random() % u64::from(at_most_us)));
    }
}
