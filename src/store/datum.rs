//! By-value datums, spelled once.

use pgrx::pg_sys::Datum;

pub fn i16(value: i16) -> Datum {
    Datum::from(value)
}

pub fn i32(value: i32) -> Datum {
    Datum::from(value)
}

pub fn f64(value: f64) -> Datum {
    Datum::from(value.to_bits())
}

pub fn i64(value: i64) -> Datum {
    Datum::from(value)
}
