//! Arrays as arguments, and Datums for results. Allocation is in the current memory context and may raise.
use core::ptr;

use pgrx::PgSqlErrorCode as Code;
use pgrx::pg_sys;
use pgrx::pg_sys::{Datum, Oid};

use super::points::{Fault, may_fail};
use crate::error::{Error, Result};

/// Splits a one-dimensional array of exactly this element type. By-reference elements point into the detoasted array, which
/// lives as long as the memory context that is current now.
pub fn array_elements(array: Datum, element: Oid) -> Result<Vec<Option<Datum>>> {
    may_fail(Fault::Read);
    // SAFETY: a non-null array Datum. May raise (reading toast): unwinds. The copy, if any, belongs to the current context.
    let array = unsafe { pg_sys::pg_detoast_datum(array.cast_mut_ptr()) }.cast::<pg_sys::ArrayType>();
    // SAFETY: the detoasted header is in place; reads fields, cannot raise.
    let (dimensions, found) = unsafe { ((*array).ndim, (*array).elemtype) };
    if found != element {
        return Err(Error::new(
            Code::ERRCODE_DATATYPE_MISMATCH,
            format!("array has elements of type {found}, expected {element}"),
        ));
    }
    match dimensions {
        0 => return Ok(Vec::new()),
        1 => (),
        _ => {
            return Err(Error::new(Code::ERRCODE_ARRAY_ELEMENT_ERROR, "array must have one dimension"));
        }
    }
    let layout = Layout::of(element);
    let mut values = ptr::null_mut();
    let mut nulls = ptr::null_mut();
    let mut count = 0;
    may_fail(Fault::Alloc);
    // SAFETY: `array` is a detoasted array of this element type. May raise (out of memory): unwinds.
    unsafe {
        pg_sys::deconstruct_array(
            array,
            element,
            layout.len,
            layout.by_val,
            layout.align,
            &raw mut values,
            &raw mut nulls,
            &raw mut count,
        );
    }
    let elements = (0..count as usize)
        // SAFETY: both arrays have `count` elements, palloc'd in the current context.
        .map(|i| unsafe { (!*nulls.add(i)).then_some(*values.add(i)) })
        .collect();
    for chunk in [values.cast(), nulls.cast()] {
        // SAFETY: palloc'd by deconstruct_array, no longer referenced.
        unsafe { pg_sys::pfree(chunk) }
    }
    Ok(elements)
}

/// Calls `each` for every element of a one-dimensional array of 8-byte integers without nulls, in order. Copies nothing; an array that is
/// something else is refused.
pub fn each_i64(array: Datum, mut each: impl FnMut(usize, i64)) -> Result<usize> {
    may_fail(Fault::Read);
    // SAFETY: a non-null array Datum. May raise (reading toast): unwinds. The copy, if any, belongs to the current context.
    let array = unsafe { pg_sys::pg_detoast_datum(array.cast_mut_ptr()) }.cast::<pg_sys::ArrayType>();
    // SAFETY: the detoasted header is in place; reads fields, cannot raise.
    let (dimensions, has_nulls, element) = unsafe { ((*array).ndim, (*array).dataoffset != 0, (*array).elemtype) };
    if dimensions == 0 {
        return Ok(0);
    }
    if dimensions != 1 || has_nulls || element != pg_sys::INT8OID {
        return Err(Error::new(
            Code::ERRCODE_DATA_CORRUPTED,
            "an array of identifiers has another shape than it was written with",
        ));
    }
    // SAFETY: one dimension: its length follows the header, then the lower bound, then the elements at the next multiple of 8.
    let (count, first) = unsafe {
        let length = array.add(1).cast::<i32>();
        let header = (size_of::<pg_sys::ArrayType>() + 2 * size_of::<i32>()).next_multiple_of(8);
        (length.read(), array.cast::<u8>().add(header))
    };
    let count = usize::try_from(count).unwrap_or(0);
    for index in 0..count {
        // SAFETY: the array has `count` elements of eight bytes; a row's own copy may start at any multiple of four.
        each(index, unsafe { first.add(index * 8).cast::<i64>().read_unaligned() });
    }
    Ok(count)
}

struct Layout {
    len: i32,
    by_val: bool,
    align: core::ffi::c_char,
}

impl Layout {
    /// The types met on every call need no catalog.
    fn of(element: Oid) -> Self {
        match element {
            pg_sys::INT8OID | pg_sys::TIMESTAMPTZOID => Self { len: 8, by_val: true, align: pg_sys::TYPALIGN_DOUBLE as _ },
            pg_sys::INT4OID => Self { len: 4, by_val: true, align: pg_sys::TYPALIGN_INT as _ },
            pg_sys::INT2OID => Self { len: 2, by_val: true, align: pg_sys::TYPALIGN_SHORT as _ },
            pg_sys::TEXTOID | pg_sys::JSONBOID => Self { len: -1, by_val: false, align: pg_sys::TYPALIGN_INT as _ },
            _ => Self::from_catalog(element),
        }
    }

    fn from_catalog(element: Oid) -> Self {
        let (mut len, mut by_val, mut align) = (0i16, false, 0);
        // SAFETY: three out parameters of ours. May raise (unknown type): unwinds.
        unsafe {
            pg_sys::get_typlenbyvalalign(element, &raw mut len, &raw mut by_val, &raw mut align);
        }
        Self { len: i32::from(len), by_val, align }
    }
}

fn array_datum(mut elements: Vec<Datum>, element: Oid) -> Datum {
    let layout = Layout::of(element);
    may_fail(Fault::Alloc);
    // SAFETY: `elements` outlives the call, which copies. May raise (size limit): unwinds, destructors run.
    let array = unsafe {
        pg_sys::construct_array(elements.as_mut_ptr(), elements.len() as i32, element, layout.len, layout.by_val, layout.align)
    };
    Datum::from(array)
}

pub fn i64_array_datum(values: &[i64]) -> Datum {
    array_datum(values.iter().map(|v| Datum::from(*v)).collect(), pg_sys::INT8OID)
}

pub fn i32_array_datum(values: &[i32]) -> Datum {
    array_datum(values.iter().map(|v| Datum::from(*v)).collect(), pg_sys::INT4OID)
}

pub fn i16_array_datum(values: &[i16]) -> Datum {
    array_datum(values.iter().map(|v| Datum::from(*v)).collect(), pg_sys::INT2OID)
}

pub fn timestamptz_array_datum(values: &[i64]) -> Datum {
    array_datum(values.iter().map(|v| Datum::from(*v)).collect(), pg_sys::TIMESTAMPTZOID)
}

/// The elements are copied as they are, so an external toast pointer must be detoasted first.
pub fn datum_array_datum(values: &[Datum], element: Oid) -> Datum {
    array_datum(values.to_vec(), element)
}

pub fn text_array_datum<S: AsRef<str>>(values: &[S]) -> Datum {
    array_datum(values.iter().map(|v| text_datum(v.as_ref())).collect(), pg_sys::TEXTOID)
}

/// A `text` in the current memory context. The server encoding is taken to be UTF-8 (or the text to be ASCII).
pub fn text_datum(value: &str) -> Datum {
    bytes_datum(value.as_bytes())
}

/// A `text` or `bytea` of these bytes.
pub fn bytes_datum(value: &[u8]) -> Datum {
    may_fail(Fault::Alloc);
    // SAFETY: the bytes outlive the call, which copies. May raise (out of memory): unwinds.
    let text = unsafe { pg_sys::cstring_to_text_with_len(value.as_ptr().cast(), value.len() as i32) };
    Datum::from(text)
}

/// A `jsonb` of this text, in the server encoding.
pub fn jsonb_datum(mut text: Vec<u8>) -> Datum {
    text.push(0);
    let input = Datum::from(text.as_ptr());
    may_fail(Fault::Alloc);
    // SAFETY: the argument is a null-terminated string that outlives the call. May raise (not JSON): unwinds.
    unsafe { pgrx::direct_function_call_as_datum(pg_sys::jsonb_in, &[Some(input)]) }.unwrap_or(Datum::null())
}

/// The bytes of a varlena as if detoasted, header included. Reads at most the toast pointer.
pub fn datum_size(value: Datum) -> usize {
    // SAFETY: a non-null varlena Datum. Cannot raise for one that is well-formed.
    unsafe { pg_sys::toast_raw_datum_size(value) }
}

/// A copy in the current memory context of what a varlena says, without toast and without a short header.
pub fn detoast(value: Datum) -> Datum {
    may_fail(Fault::Read);
    // SAFETY: a non-null varlena Datum. May raise (reading toast): unwinds.
    Datum::from(unsafe { pg_sys::pg_detoast_datum(value.cast_mut_ptr()) })
}

/// The contents of a `text` or `bytea`, detoasted.
pub fn bytes_of(value: Datum) -> Vec<u8> {
    may_fail(Fault::Read);
    // SAFETY: a non-null varlena Datum. May raise (reading toast): unwinds.
    let packed = unsafe { pg_sys::pg_detoast_datum_packed(value.cast_mut_ptr()) };
    // SAFETY: detoasted, so the header says how many bytes follow it.
    let bytes = unsafe { core::slice::from_raw_parts(pgrx::vardata_any(packed).cast::<u8>(), pgrx::varsize_any_exhdr(packed)) };
    let bytes = bytes.to_vec();
    if !ptr::eq(packed.cast_const(), value.cast_mut_ptr::<pg_sys::varlena>().cast_const()) {
        // SAFETY: a copy made by detoasting, no longer referenced.
        unsafe { pg_sys::pfree(packed.cast()) }
    }
    bytes
}

pub fn text_of(value: Datum) -> String {
    match String::from_utf8(bytes_of(value)) {
        Ok(text) => text,
        Err(bad) => String::from_utf8_lossy(bad.as_bytes()).into_owned(),
    }
}

/// Copies a value of this width into the current memory context; an external toast pointer stays one.
pub(super) fn copy(value: Datum, by_val: bool, len: i16) -> Datum {
    may_fail(Fault::Alloc);
    // SAFETY: the caller vouches for the Datum and its type. May raise (out of memory): unwinds.
    unsafe { super::raw::datum_copy(value, by_val, i32::from(len)) }
}

/// Copies a varlena into the current memory context; an external toast pointer stays one.
pub fn copy_varlena(value: Datum) -> Datum {
    copy(value, false, -1)
}
