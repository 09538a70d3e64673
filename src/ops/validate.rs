//! The one place where input is checked, for every way in: functions, INSERT and COPY.

use awa_protocol::limits;
use pgrx::PgSqlErrorCode as Code;
use pgrx::pg_sys;
use pgrx::pg_sys::Datum;

use crate::error::{Error, Result};
use crate::pg::call::{array_elements, datum_size};

fn invalid(message: String) -> Error {
    Error::new(Code::ERRCODE_INVALID_PARAMETER_VALUE, message)
}

pub fn not_null<T>(value: Option<T>, argument: &str) -> Result<T> {
    value.ok_or_else(|| {
        Error::new(Code::ERRCODE_NULL_VALUE_NOT_ALLOWED, format!("{argument} must not be null"))
            .hint("Give a value, or leave the argument out where it has a default.")
    })
}

pub fn queue_name(name: &[u8]) -> Result<()> {
    if name.is_empty() || name.len() > limits::QUEUE_NAME_BYTES {
        return Err(invalid(format!("queue name must have 1 to {} bytes", limits::QUEUE_NAME_BYTES))
            .detail(format!("It has {}.", name.len()))
            .hint("Choose a shorter name, not an empty one."));
    }
    Ok(())
}

/// From 1..4 as users see it to 0..3.
pub fn priority(value: i32) -> Result<u8> {
    u8::try_from(value).ok().filter(|p| (1..=limits::PRIORITIES as u8).contains(p)).map(|p| p - 1).ok_or_else(|| {
        invalid(format!("priority must be between 1 and {}", limits::PRIORITIES))
            .detail(format!("It is {value}."))
            .hint("1 is the most urgent.")
    })
}

pub fn max_attempts(value: i32) -> Result<i16> {
    if !(1..=limits::MAX_ATTEMPTS).contains(&value) {
        return Err(invalid(format!("max_attempts must be between 1 and {}", limits::MAX_ATTEMPTS))
            .detail(format!("It is {value}."))
            .hint("1 means that a job is never tried again."));
    }
    Ok(value as i16)
}

pub fn run_at(value: Option<i64>) -> Result<Option<i64>> {
    // A timestamp far outside any calendar would leave no room to count keys upwards.
    const LAST: i64 = i64::MAX / 2;
    match value {
        Some(at) if !(-LAST..LAST).contains(&at) => Err(invalid("run_at is out of range".to_owned())
            .detail("It is infinite, or further away than any calendar reaches.")
            .hint("Give a time within the next 100,000 years, or leave run_at out to run the job at once.")),
        other => Ok(other),
    }
}

/// A length of time; `None` and zero mean "none" where the caller says so.
pub fn duration(value: Option<i64>, argument: &str) -> Result<i64> {
    const LONGEST: i64 = 100 * 366 * 86_400 * 1_000_000;
    match value {
        Some(length) if length < 0 => Err(invalid(format!("{argument} must not be negative"))
            .detail(format!("It is {} ms.", length / 1000))
            .hint("Zero means none.")),
        Some(length) if length > LONGEST => Err(invalid(format!("{argument} must not be longer than 100 years"))
            .detail(format!("It is {} days.", length / 86_400_000_000))
            .hint("Zero means none.")),
        other => Ok(other.unwrap_or(0)),
    }
}

/// Bytes of a value without its length word.
fn content_size(value: Datum) -> usize {
    datum_size(value).saturating_sub(4)
}

pub fn payload(value: Datum, argument: &str) -> Result<()> {
    let size = content_size(value);
    if size > limits::PAYLOAD_BYTES {
        return Err(Error::new(Code::ERRCODE_PROGRAM_LIMIT_EXCEEDED, format!("{argument} is too large for a job"))
            .detail(format!("It has {size} bytes; the limit is {}.", limits::PAYLOAD_BYTES))
            .hint("Store the content in a table of your own and put its key into the job."));
    }
    Ok(())
}

pub fn tags(value: Option<Datum>) -> Result<()> {
    let Some(array) = value else { return Ok(()) };
    let tags = array_elements(array, pg_sys::TEXTOID)?;
    if tags.len() > limits::TAGS {
        return Err(invalid(format!("a job has at most {} tags", limits::TAGS))
            .detail(format!("There are {}.", tags.len()))
            .hint("Put further values into metadata."));
    }
    for tag in tags {
        let tag = not_null(tag, "a tag")?;
        if content_size(tag) > limits::TAG_BYTES {
            return Err(invalid(format!("a tag has at most {} bytes", limits::TAG_BYTES))
                .detail(format!("One has {}.", content_size(tag)))
                .hint("Put long values into metadata."));
        }
    }
    Ok(())
}

pub fn batch_size(value: Option<i32>) -> Result<usize> {
    jobs_of_a_call(value, "batch_size")
}

pub fn max_jobs(value: Option<i32>) -> Result<usize> {
    jobs_of_a_call(value, "max_jobs")
}

fn jobs_of_a_call(value: Option<i32>, argument: &str) -> Result<usize> {
    let value = not_null(value, argument)?;
    usize::try_from(value).ok().filter(|n| (1..=limits::JOBS_PER_CALL).contains(n)).ok_or_else(|| {
        invalid(format!("{argument} must be between 1 and {}", limits::JOBS_PER_CALL))
            .detail(format!("It is {value}."))
            .hint("Use several calls for more.")
    })
}

pub fn batch_length(length: usize) -> Result<()> {
    if length > limits::JOBS_PER_CALL {
        return Err(Error::new(
            Code::ERRCODE_PROGRAM_LIMIT_EXCEEDED,
            format!("a call handles at most {} jobs", limits::JOBS_PER_CALL),
        )
        .detail(format!("There are {length}."))
        .hint("Use several calls in one transaction."));
    }
    Ok(())
}

pub fn same_length(what: &str, length: usize, other: &str, other_length: usize) -> Result<()> {
    if length != other_length {
        return Err(Error::new(Code::ERRCODE_ARRAY_ELEMENT_ERROR, format!("{what} and {other} must have the same length"))
            .detail(format!("{what} has {length} elements, {other} has {other_length}."))
            .hint("Give one element for each job."));
    }
    Ok(())
}
