//! The one error type: SQLSTATE, message, DETAIL and HINT. Raised only at the boundary in `pg::call`.

use pgrx::PgSqlErrorCode;

use crate::pg::points::{Fault, fails};

pub type Result<T> = std::result::Result<T, Error>;

#[derive(Debug, Clone)]
pub struct Error {
    pub code: PgSqlErrorCode,
    pub message: String,
    pub detail: Option<String>,
    pub hint: Option<String>,
}

impl Error {
    pub fn new(code: PgSqlErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), detail: None, hint: None }
    }

    pub fn detail(mut self, detail: impl Into<String>) -> Self {
        self.detail = Some(detail.into());
        self
    }

    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

pub fn out_of_memory() -> Error {
    Error::new(PgSqlErrorCode::ERRCODE_OUT_OF_MEMORY, "out of memory")
        .detail("The batch or the live segments are too large for the memory that is left.")
        .hint("Use smaller batches, or prune finished segments.")
}

/// Room for `more` elements. Memory that the library takes by itself cannot raise when it runs out: large amounts are asked for here.
pub fn reserve<T>(list: &mut Vec<T>, more: usize) -> Result<()> {
    if fails(Fault::Alloc) {
        return Err(out_of_memory());
    }
    list.try_reserve(more).map_err(|_| out_of_memory())
}
