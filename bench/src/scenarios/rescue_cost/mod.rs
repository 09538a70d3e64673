//! What deadlines cost, and what they give: the same load with and without, and a wedged attempt that comes back.

mod deadlines;
mod wedged;

use anyhow::Result;
use clap::Args;

use crate::Target;
use crate::report::Recorder;
use crate::systems::SystemName;

const ONLY_OURS: &str = "deadlines that the server itself enforces are measured for awa_queue only";

#[derive(Args)]
pub struct RescueCostArgs {
    #[command(flatten)]
    deadlines: deadlines::DeadlinesArgs,
    #[command(flatten)]
    wedged: wedged::WedgedArgs,
    /// Only the load with deadlines and without
    #[arg(long)]
    only_load: bool,
    /// Only the attempts that are left to expire (needs the maintainer)
    #[arg(long, conflicts_with = "only_load")]
    only_wedged: bool,
}

pub fn run(target: &Target, args: &RescueCostArgs, recorder: &mut Recorder) -> Result<()> {
    for name in target.systems.iter().filter(|name| **name != SystemName::Awa) {
        recorder.absent("rescue-cost", "deadlines", name.as_str(), ONLY_OURS)?;
    }
    if !args.only_wedged {
        deadlines::run(target, &args.deadlines, recorder)?;
    }
    if !args.only_load {
        wedged::run(target, &args.wedged, recorder)?;
    }
    Ok(())
}
