//! What a pipe has done, in numbers.

use std::time::Duration;

use hdrhistogram::Histogram;
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeVal;

use super::moves::Move;
use crate::endpoint::{Refusal, Rung, SourceCounts};
use crate::error::{Error, Kind, Result};
use crate::fence::FenceUse;
use crate::ladder::{ByGpu, Watch};
use crate::ledger::Ledger;

/// What a pipe has done.
#[derive(Clone, Debug)]
pub struct Account {
    /// How source and sink were joined at the end.
    pub rung: Rung,
    /// The GPU that converted at the end, on the rung [`Rung::Converted`].
    pub gpu: Option<ByGpu>,
    /// What Vulkan's validation layer has said of GPUs that converted, where it watched ([`Pipe::join_watched`](super::Pipe::join_watched)).
    pub watch: Option<Watch>,
    /// Why the rungs above it did not hold, in the order in which they were tried.
    pub refusals: Vec<Refusal>,
    /// The steps from rung to rung, and the changes at the source, while frames flowed.
    pub moves: Vec<Move>,
    /// What the CPU copied on the way from source to sink; the sink's own copies are in [`Sink::ledger`].
    ///
    /// [`Sink::ledger`]: crate::endpoint::Sink::ledger
    pub copies: Ledger,
    /// What was found where frames were copied and the copies compared with them.
    pub copies_verdict: Option<crate::endpoint::Verdict>,
    /// Frames that came from the source undamaged.
    pub captured: u64,
    /// Frames that were shown or stored.
    pub presented: u64,
    /// What the source lost.
    pub lost: SourceCounts,
    /// Frames that were never shown because a newer one came first.
    pub dropped_by_sink: u64,
    /// From the start of the flow to its end.
    pub duration: Duration,
    /// Frames a second, from the first shown to the last; `None` with fewer than two.
    pub fps: Option<f64>,
    /// From capture to show.
    pub latency: Latency,
    /// How the acquire fences of frames were waited for; all zero for frames without one.
    pub fences: FenceUse,
    /// CPU time of this process while frames flowed, user and system together; `None` if the system did not tell.
    pub cpu: Option<Duration>,
}

/// Times from capture to show, in µs. Counted are frames stamped by `CLOCK_MONOTONIC` whose stamp is not later than their show:
/// some cameras (vivid is one) stamp a frame with the end of its period and deliver it before.
#[derive(Clone)]
pub struct Latency(pub(super) Histogram<u32>);

impl Latency {
    /// The longest time told apart, a minute.
    pub(super) const MAX_US: u64 = 60_000_000;

    pub(super) fn new() -> Result<Latency> {
        // Two significant digits; all of its memory is allocated here.
        let histogram = Histogram::new_with_bounds(1, Latency::MAX_US, 2);
        let error = |cause| Error::new(Kind::System, "measure", "latencies").because(format!("{cause}"));
        histogram.map(Latency).map_err(error)
    }

    /// The time that a share of the frames did not exceed, `None` if none was measured. `quantile` is from 0 to 1.
    pub fn quantile(&self, quantile: f64) -> Option<u64> {
        (!self.0.is_empty()).then(|| self.0.value_at_quantile(quantile).min(self.0.max()))
    }

    /// How many were measured.
    pub fn count(&self) -> u64 {
        self.0.len()
    }
}

impl std::fmt::Debug for Latency {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Latency({} measured, median {:?} µs)", self.count(), self.quantile(0.5))
    }
}

/// The numbers of a pipe while it runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Progress<'pipe> {
    /// Frames that came from the source undamaged.
    pub captured: u64,
    /// Frames that were shown or stored.
    pub presented: u64,
    /// How source and sink are joined now.
    pub rung: Rung,
    /// Frames lost by source and sink together, and those that came too late to be had.
    pub dropped: u64,
    /// When the last frame was shown, in µs of `CLOCK_MONOTONIC`.
    pub at_us: u64,
    /// From the last frame's capture to its show, in µs, where its clock allows the comparison.
    pub latency_us: Option<u64>,
    /// The steps to another rung and the changes of the source until now.
    pub moves: &'pipe [Move],
}

/// CPU time of this process, user and system together.
pub(super) fn cpu_time() -> Option<Duration> {
    let usage = getrusage(UsageWho::RUSAGE_SELF).ok()?;
    let micros = |time: TimeVal| {
        let (seconds, micros) = (u64::try_from(time.tv_sec()).ok()?, u64::try_from(time.tv_usec()).ok()?);
        Some(Duration::from_secs(seconds) + Duration::from_micros(micros))
    };
    Some(micros(usage.user_time())? + micros(usage.system_time())?)
}
