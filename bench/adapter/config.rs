//! What the harness says by environment variables.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, Result, bail};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Producer {
    /// The harness sends a token for each batch.
    Tokens,
    /// A rate of our own keeping
    Rate,
    /// As many as keep so many jobs waiting
    Depth,
}

#[derive(Clone, Debug)]
pub struct Config {
    pub database: postgres::Config,
    pub producer: Producer,
    pub produces: bool,
    pub rate: f64,
    pub rate_file: Option<PathBuf>,
    pub target_depth: i64,
    pub batch_max: usize,
    pub batch_interval: Duration,
    pub workers: usize,
    pub payload_bytes: usize,
    pub work: Duration,
    pub sample_every: Duration,
    pub deadline: Option<Duration>,
    pub instance: u32,
}

impl Config {
    pub fn read(get: impl Fn(&str) -> Option<String>) -> Result<Config> {
        let scenario = get("SCENARIO").unwrap_or_else(|| "long_horizon".to_owned());
        if scenario != "long_horizon" {
            bail!("there is no scenario {scenario} here, only long_horizon");
        }
        let mode = get("PRODUCER_MODE").unwrap_or_else(|| "fixed".to_owned());
        let pacing = get("PRODUCER_PACING").unwrap_or_else(|| "harness".to_owned());
        let producer = match (mode.as_str(), pacing.as_str()) {
            ("fixed", "harness") => Producer::Tokens,
            ("fixed", "adapter") => Producer::Rate,
            ("depth-target", _) => Producer::Depth,
            _ => bail!("PRODUCER_MODE={mode} with PRODUCER_PACING={pacing} is unknown"),
        };
        let instance = number(&get, "BENCH_INSTANCE_ID", 0_u32)?;
        let only_first = number(&get, "PRODUCER_ONLY_INSTANCE_ZERO", 0_u32)? != 0;
        let deadline_ms = number(&get, "LEASE_DEADLINE_MS", 0_u64)?;
        Ok(Config {
            database: get("DATABASE_URL").context("DATABASE_URL is not set")?.parse().context("DATABASE_URL")?,
            producer,
            produces: instance == 0 || !only_first,
            rate: number(&get, "PRODUCER_RATE", 0.0)?,
            rate_file: get("PRODUCER_RATE_CONTROL_FILE").map(PathBuf::from),
            target_depth: number(&get, "TARGET_DEPTH", 1_000)?,
            batch_max: number(&get, "PRODUCER_BATCH_MAX", 128)?.clamp(1, 10_000),
            batch_interval: Duration::from_millis(number(&get, "PRODUCER_BATCH_MS", 25_u64)?.max(1)),
            workers: number(&get, "WORKER_COUNT", 32)?.clamp(1, 4_096),
            payload_bytes: number(&get, "JOB_PAYLOAD_BYTES", 256)?.min(1 << 20),
            work: Duration::from_millis(number(&get, "JOB_WORK_MS", 1)?),
            sample_every: Duration::from_secs(number(&get, "SAMPLE_EVERY_S", 5_u64)?.max(1)),
            deadline: (deadline_ms > 0).then(|| Duration::from_millis(deadline_ms)),
            instance,
        })
    }

    /// The rate now: the harness changes the file in phases of higher load.
    pub fn rate_now(&self) -> f64 {
        let told = self.rate_file.as_ref().and_then(|file| std::fs::read_to_string(file).ok());
        told.and_then(|text| text.trim().parse().ok()).unwrap_or(self.rate)
    }
}

fn number<T: FromStr>(get: impl Fn(&str) -> Option<String>, name: &str, usual: T) -> Result<T> {
    match get(name).filter(|text| !text.trim().is_empty()) {
        Some(text) => text.trim().parse().map_err(|_| anyhow::anyhow!("{name}={text} is not a number of the right kind")),
        None => Ok(usual),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(pairs: &[(&str, &str)]) -> Result<Config> {
        Config::read(|name| pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned()))
    }

    #[test]
    fn the_harness_paces_unless_it_says_otherwise() -> Result<()> {
        let url = ("DATABASE_URL", "postgres://bench@localhost/b");
        assert_eq!(read(&[url])?.producer, Producer::Tokens);
        assert_eq!(read(&[url, ("PRODUCER_PACING", "adapter")])?.producer, Producer::Rate);
        assert_eq!(read(&[url, ("PRODUCER_MODE", "depth-target")])?.producer, Producer::Depth);
        assert!(read(&[]).is_err());
        assert!(read(&[url, ("SCENARIO", "cron")]).is_err());
        assert!(read(&[url, ("WORKER_COUNT", "many")]).is_err());
        Ok(())
    }

    #[test]
    fn only_the_first_instance_produces_when_so_told() -> Result<()> {
        let url = ("DATABASE_URL", "postgres://bench@localhost/b");
        let second = ("BENCH_INSTANCE_ID", "1");
        assert!(read(&[url, second])?.produces);
        assert!(!read(&[url, second, ("PRODUCER_ONLY_INSTANCE_ZERO", "1")])?.produces);
        Ok(())
    }
}
