//! For tests only, and only in a build with the feature `points`: who arms points and faults. The script of the extension does not name
//! these functions; a test creates them, as a superuser, in schema `awa_points`.
use pgrx::PgSqlErrorCode as Code;
use pgrx::pg_sys::Datum;

use crate::error::{Error, Result};
use crate::pg::call::{Call, Ret, text_datum};
use crate::pg::points;
use crate::sql_function;

sql_function!(awa_points_arm, 4, arm);
sql_function!(awa_points_release, 1, release);
sql_function!(awa_points_disarm_all, 0, disarm_all);
sql_function!(awa_points_reached, 0, reached);
sql_function!(awa_points_fail_nth, 2, fail_nth);
sql_function!(awa_points_clear_fault, 0, clear_fault);
sql_function!(awa_points_jitter, 2, jitter);
sql_function!(awa_points_set_clock, 1, set_clock);

fn arm(call: &mut Call) -> Result<Ret> {
    let (name, action) = (call.text(0).unwrap_or_default(), call.text(1).unwrap_or_default());
    let Some((_, action)) = points::ACTIONS.iter().find(|(known, _)| *known == action) else {
        return Err(Error::new(Code::ERRCODE_INVALID_PARAMETER_VALUE, format!("a point cannot \"{action}\"")));
    };
    points::arm(&name, *action, call.i32(2).unwrap_or(0).max(0) as u32, call.i32(3).unwrap_or(0))?;
    Ok(Ret::Void)
}

fn release(call: &mut Call) -> Result<Ret> {
    Ok(Ret::bool(points::release(&call.text(0).unwrap_or_default())?))
}

fn disarm_all(_call: &mut Call) -> Result<Ret> {
    points::disarm_all()?;
    Ok(Ret::Void)
}

fn reached(call: &mut Call) -> Result<Ret> {
    let mut rows = call.rows()?;
    for seen in points::reached()? {
        let action = points::ACTIONS.iter().find(|(_, action)| *action == seen.action).map_or("", |(name, _)| name);
        rows.put(&[
            Some(text_datum(&seen.name)),
            Some(text_datum(action)),
            Some(Datum::from(i64::from(seen.hits))),
            (seen.waiting != 0).then(|| Datum::from(seen.waiting)),
        ])?;
    }
    Ok(Ret::Rows)
}

fn fail_nth(call: &mut Call) -> Result<Ret> {
    points::fail_nth(&call.text(0).unwrap_or_default(), call.i32(1).unwrap_or(0).max(0) as u32)?;
    Ok(Ret::Void)
}

fn clear_fault(_call: &mut Call) -> Result<Ret> {
    Ok(Ret::i64(i64::from(points::clear_fault())))
}

fn jitter(call: &mut Call) -> Result<Ret> {
    points::set_jitter(call.i32(0).unwrap_or(0).max(0) as u32, call.i32(1).unwrap_or(0).max(0) as u32);
    Ok(Ret::Void)
}

fn set_clock(call: &mut Call) -> Result<Ret> {
    points::set_clock(call.i64(0).unwrap_or(0));
    Ok(Ret::Void)
}
