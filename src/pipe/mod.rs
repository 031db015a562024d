//! The loop from a source to a sink.
//!
//! In the steady state it makes four system calls a frame (`epoll_wait`, `DQBUF`, `ATOMIC`, `QBUF`; in mailbox mode one or two
//! more for the flip event) and allocates nothing.

mod wait;

use std::os::fd::BorrowedFd;
use std::time::Duration;

use hdrhistogram::Histogram;
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeVal;

use crate::clock::now_us;
use crate::endpoint::{JoinError, Rung, Shown, Sink, Source, SourceCounts};
use crate::error::{Context, Error, Kind, Result};
use crate::format;
use crate::frame::{Clock, Frame};
use crate::memory::{Access, CpuAccess};
use wait::{Waiter, Wake};

/// When a pipe ends, besides at its source's end and when it is told to.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Limits {
    /// After this many captured frames.
    pub frames: Option<u64>,
    /// After this time.
    pub duration: Option<Duration>,
}

/// What a pipe has done.
#[derive(Clone, Debug)]
pub struct Account {
    /// How source and sink are joined.
    pub rung: Rung,
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
    /// CPU time of this process while frames flowed, user and system together; `None` if the system did not tell.
    pub cpu: Option<Duration>,
}

/// Times from capture to show, in µs. Counted are frames stamped by `CLOCK_MONOTONIC` whose stamp is not later than their show:
/// some cameras (vivid is one) stamp a frame with the end of its period and deliver it before.
#[derive(Clone)]
pub struct Latency(Histogram<u32>);

impl Latency {
    /// The longest time told apart, a minute.
    const MAX_US: u64 = 60_000_000;

    fn new() -> Result<Latency> {
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

/// A source and a sink, joined.
pub struct Pipe<'a> {
    source: &'a mut dyn Source,
    sink: &'a mut dyn Sink,
    rung: Rung,
    limits: Limits,
    corrupt: Option<u64>,
    captured: u64,
    presented: u64,
    first_shown_us: u64,
    last_shown_us: u64,
    latency: Latency,
}

impl<'a> Pipe<'a> {
    /// Joins a source to a sink: the sink imports each of the source's buffers. Nothing flows yet.
    ///
    /// # Errors
    /// The sink's refusal, or a failure.
    pub fn join(source: &'a mut dyn Source, sink: &'a mut dyn Sink, limits: Limits) -> Result<Pipe<'a>, JoinError> {
        let rung = sink.join(source.layout(), source.rate(), source.buffers())?;
        Ok(Pipe {
            source,
            sink,
            rung,
            limits,
            corrupt: None,
            captured: 0,
            presented: 0,
            first_shown_us: 0,
            last_shown_us: 0,
            latency: Latency::new()?,
        })
    }

    /// How the two are joined.
    pub fn rung(&self) -> Rung {
        self.rung
    }

    /// Changes one byte of the frame at this place (counted from 0) between capture and show: a sink that verifies must notice.
    pub fn corrupt_frame(&mut self, place: u64) {
        self.corrupt = Some(place);
    }

    /// Lets frames flow until a limit is reached, the source ends, or `stop` becomes readable. `progress` is called after each
    /// frame shown, with the numbers so far.
    ///
    /// # Errors
    /// The first failure of source or sink. The source is stopped either way; a display goes on showing the last frame.
    pub fn run(mut self, stop: Option<BorrowedFd<'_>>, progress: &mut dyn FnMut(&Progress)) -> Result<Account> {
        let cpu = cpu_time();
        let start = now_us();
        let flowed = self.flow(start, stop, progress);
        let stopped = self.source.stop();
        flowed?;
        // A camera that is gone cannot be stopped; the failure that matters was reported above.
        stopped?;
        let duration = Duration::from_micros(now_us().saturating_sub(start));
        let shown = self.last_shown_us.saturating_sub(self.first_shown_us);
        let fps = (self.presented > 1 && shown > 0).then(|| (self.presented - 1) as f64 * 1e6 / shown as f64);
        Ok(Account {
            rung: self.rung,
            captured: self.captured,
            presented: self.presented,
            lost: self.source.counts(),
            dropped_by_sink: self.sink.dropped(),
            duration,
            fps,
            latency: self.latency,
            cpu: cpu.and_then(|before| cpu_time()?.checked_sub(before)),
        })
    }

    fn flow(&mut self, start: u64, stop: Option<BorrowedFd<'_>>, progress: &mut dyn FnMut(&Progress)) -> Result<()> {
        let end = self
            .limits
            .duration
            .map(|duration| start + u64::try_from(duration.as_micros()).unwrap_or(u64::MAX / 2));
        let waiter = Waiter::new(self.source.as_fd(), stop, self.sink.event_fd());
        let waiter = waiter.context("wait for", || self.source.name())?;
        self.source.start()?;
        loop {
            self.source.recycle()?;
            if end.is_some_and(|end| now_us() >= end) {
                break;
            }
            let Some(wake) = self.wait(&waiter, end)?.filter(|wake| !wake.stop) else { break };
            // With a frame there as well, `present` handles the event: the frame that it shows next is to be the newest.
            if wake.sink && wake.source.is_none() {
                let shown = self.sink.dispatch()?;
                self.account(shown, progress);
            }
            let Some(ready) = wake.source else { continue };
            let next = match self.source.try_next(ready) {
                Ok(next) => next,
                Err(error) if error.kind() == Kind::Ended => break,
                Err(error) => return Err(error),
            };
            let Some(frame) = next else { continue };
            self.sink.inspect(&frame)?;
            if self.corrupt == Some(self.captured) {
                corrupt(&frame)?;
            }
            self.captured += 1;
            let shown = self.sink.present(frame)?;
            self.account(shown, progress);
            if self.limits.frames.is_some_and(|frames| self.captured >= frames) {
                break;
            }
        }
        while let Some(shown) = self.sink.finish()? {
            self.account(Some(shown), progress);
        }
        Ok(())
    }

    /// Waits for the source, the sink or the order to stop; `None` when the time is up.
    fn wait(&self, waiter: &Waiter, end: Option<u64>) -> Result<Option<Wake>> {
        let watchdog = self.source.watchdog();
        let remaining = end.map(|end| Duration::from_micros(end.saturating_sub(now_us())));
        let timeout = [watchdog, remaining].into_iter().flatten().min();
        let wake = waiter
            .wait(timeout, self.sink.wants_event())
            .context("wait for", || self.source.name())?;
        if wake.is_some() || remaining.is_some_and(|remaining| watchdog.is_none_or(|watchdog| remaining <= watchdog)) {
            return Ok(wake);
        }
        Err(self.source.stalled())
    }

    fn account(&mut self, shown: Option<Shown>, progress: &mut dyn FnMut(&Progress)) {
        let Some(shown) = shown else { return };
        self.presented += 1;
        if self.presented == 1 {
            self.first_shown_us = shown.at_us;
        }
        self.last_shown_us = shown.at_us;
        let captured_at = shown.meta.timestamp;
        let mut latency_us = None;
        if captured_at.clock == Clock::Monotonic {
            latency_us = shown.at_us.checked_sub(captured_at.us);
        }
        if let Some(latency) = latency_us {
            self.latency.0.saturating_record(latency.min(Latency::MAX_US));
        }
        progress(&Progress {
            captured: self.captured,
            presented: self.presented,
            dropped: self.source.counts().dropped + self.sink.dropped(),
            at_us: shown.at_us,
            latency_us,
        });
    }
}

/// The numbers of a pipe while it runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Progress {
    /// Frames that came from the source undamaged.
    pub captured: u64,
    /// Frames that were shown or stored.
    pub presented: u64,
    /// Frames lost by source and sink together.
    pub dropped: u64,
    /// When the last frame was shown, in µs of `CLOCK_MONOTONIC`.
    pub at_us: u64,
    /// From the last frame's capture to its show, in µs, where its clock allows the comparison.
    pub latency_us: Option<u64>,
}

/// CPU time of this process, user and system together.
fn cpu_time() -> Option<Duration> {
    let usage = getrusage(UsageWho::RUSAGE_SELF).ok()?;
    let micros = |time: TimeVal| {
        let (seconds, micros) = (u64::try_from(time.tv_sec()).ok()?, u64::try_from(time.tv_usec()).ok()?);
        Some(Duration::from_secs(seconds) + Duration::from_micros(micros))
    };
    Some(micros(usage.user_time())? + micros(usage.system_time())?)
}

/// Changes one byte that counts (green or luma) in the middle of the picture.
fn corrupt(frame: &Frame) -> Result<()> {
    let layout = frame.buffer().layout();
    let row = layout.height() / 2;
    let byte = match layout.format().kind() {
        format::Kind::Rgb { channels: [_, green, _], .. } => usize::from(green.shift / 8),
        format::Kind::Packed422 { y: [first, _], .. } => usize::from(first),
        format::Kind::SemiPlanar { sample, .. } => usize::from(sample) - 1,
        format::Kind::Planar { .. } | format::Kind::Grey => 0,
    };
    let Some(place) = layout.planes().first() else { return Ok(()) };
    let offset = place.offset as usize + place.stride as usize * row as usize + byte;
    let mut mappings = frame.buffer().map(Access::ReadWrite)?;
    let bracket = frame
        .buffer()
        .dma_buf(place.memory)
        .map(|dma_buf| CpuAccess::begin(dma_buf, Access::ReadWrite));
    let bracket = bracket.transpose()?;
    if let Some(mapping) = mappings.get_mut(place.memory as usize) {
        let mut value = [0];
        mapping.read(offset, &mut value);
        mapping.write(offset, &[value[0] ^ 0x80]);
    }
    bracket.map_or(Ok(()), CpuAccess::end)
}
