//! The payload of a job: about 100 bytes of JSON, sent as `jsonb`, or as the type that a system wants, and never decoded.

use std::error::Error;

use bytes::{BufMut, BytesMut};
use postgres::types::{FromSql, IsNull, ToSql, Type, to_sql_checked};

const JSONB_WIRE_VERSION: u8 = 1;

#[derive(Clone, Debug)]
pub struct Payload(String);

impl Payload {
    /// Distinct content, constant size.
    pub fn numbered(number: u64) -> Self {
        Payload(format!(
            r#"{{"n": "{number:016}", "to": "someone@example.org", "template": "welcome", "locale": "en", "try": true}}"#
        ))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl ToSql for Payload {
    fn to_sql(&self, ty: &Type, out: &mut BytesMut) -> Result<IsNull, Box<dyn Error + Sync + Send>> {
        if *ty == Type::JSONB {
            out.put_u8(JSONB_WIRE_VERSION);
        }
        out.put_slice(self.0.as_bytes());
        Ok(IsNull::No)
    }

    fn accepts(ty: &Type) -> bool {
        [Type::JSONB, Type::JSON, Type::TEXT].contains(ty)
    }

    to_sql_checked!();
}

/// A received value, measured and dropped.
pub struct PayloadBytes(pub usize);

impl FromSql<'_> for PayloadBytes {
    fn from_sql(_: &Type, raw: &[u8]) -> Result<Self, Box<dyn Error + Sync + Send>> {
        Ok(PayloadBytes(raw.len()))
    }

    fn accepts(ty: &Type) -> bool {
        [Type::JSONB, Type::JSON].contains(ty)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_payload_is_about_100_bytes_of_json() -> anyhow::Result<()> {
        let payload = Payload::numbered(u64::MAX);
        serde_json::from_str::<serde_json::Value>(&payload.0)?;
        assert!((90..130).contains(&payload.0.len()), "{}", payload.0.len());
        Ok(())
    }
}
