//! A thread that calls the server at intervals, while a load runs, for a system that needs somebody to.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Result, anyhow};

pub struct Helper {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Helper {
    pub fn every(interval: Duration, mut call: impl FnMut() -> Result<()> + Send + 'static) -> Helper {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                call()?;
                thread::sleep(interval);
            }
            Ok(())
        });
        Helper { stop, thread: Some(thread) }
    }

    /// Its connection is closed when this returns.
    pub fn finish(mut self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        match self.thread.take() {
            Some(thread) => thread.join().map_err(|_| anyhow!("a helper thread panicked"))?,
            None => Ok(()),
        }
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}
