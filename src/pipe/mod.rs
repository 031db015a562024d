//! The loop from a source to a sink.
//!
//! In the steady state it makes four system calls a frame (`epoll_wait`, `DQBUF`, `ATOMIC`, `QBUF`; in mailbox mode one or two
//! more for the flip event) and allocates nothing. Fences add to that, and frames without one do not.

mod account;
mod finish;
mod losses;
mod moves;
mod wait;

use std::os::fd::BorrowedFd;
use std::time::Duration;

use crate::clock::now_us;
use crate::endpoint::{Refusal, Rung, Shown, Sink, Source, Verdict};
use crate::error::{Context, Kind, Result};
use crate::fence::{FenceUse, PATIENCE};
use crate::format;
use crate::frame::{Clock, Frame};
use crate::ladder::{self, Joined, NoWay, Path, Watch};
use crate::ledger::Ledger;
use crate::memory::{Access, CpuAccess};
use account::cpu_time;
use finish::Until;
use losses::Failing;
use wait::{Fences, Waiter, Wake};

pub use account::{Account, Latency, Progress};
use moves::Above;
pub use moves::Move;

/// When a pipe ends, besides at its source's end and when it is told to.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Limits {
    /// After this many captured frames.
    pub frames: Option<u64>,
    /// After this time.
    pub duration: Option<Duration>,
}

/// A source and a sink, joined.
pub struct Pipe<'a> {
    source: &'a mut dyn Source,
    sink: &'a mut dyn Sink,
    path: Path,
    watch: Option<Watch>,
    joined: Joined,
    moves: Vec<Move>,
    above: Option<Above>,
    /// The copies of copiers that are gone, what was dropped there, and what was wrong.
    copies: Ledger,
    dropped: u64,
    copies_verdict: Option<Verdict>,
    limits: Limits,
    corrupt: Option<u64>,
    captured: u64,
    presented: u64,
    first_shown_us: u64,
    last_shown_us: u64,
    /// When the last frame came, or the source started; for the watchdog.
    last_came_us: u64,
    /// Until when fences kept every buffer of the source.
    starved_us: u64,
    /// Fences that went wrong before the sink had to do with them.
    fences: FenceUse,
    failing: Option<Failing>,
    /// How many had when that was last told.
    told_lost: u64,
    /// Frames that who shares them took back before the sink was done with them.
    revoked: u64,
    latency: Latency,
}

impl<'a> Pipe<'a> {
    /// Joins a source to a sink by the first rung of the [ladder] that holds. Nothing flows yet.
    ///
    /// # Errors
    /// [`NoWay`]: what every rung that is allowed said, or a failure.
    pub fn join(
        source: &'a mut dyn Source,
        sink: &'a mut dyn Sink,
        path: Path,
        limits: Limits,
    ) -> Result<Pipe<'a>, NoWay> {
        Pipe::join_watched(source, sink, path, limits, None)
    }

    /// The same, with Vulkan's validation layer watching the GPUs that convert; what it says is in [`Account::watch`].
    ///
    /// # Errors
    /// As [`Pipe::join`]; where there is no such layer, the rung [`Rung::Converted`] is refused.
    pub fn join_watched(
        source: &'a mut dyn Source,
        sink: &'a mut dyn Sink,
        path: Path,
        limits: Limits,
        mut watch: Option<Watch>,
    ) -> Result<Pipe<'a>, NoWay> {
        let joined = ladder::join(source, sink, path, watch.as_mut())?;
        let mut pipe = Pipe {
            source,
            sink,
            path,
            watch,
            joined,
            moves: Vec::new(),
            above: None,
            copies: Ledger::new(),
            dropped: 0,
            copies_verdict: None,
            limits,
            corrupt: None,
            captured: 0,
            presented: 0,
            first_shown_us: 0,
            last_shown_us: 0,
            last_came_us: 0,
            starved_us: 0,
            fences: FenceUse::default(),
            failing: None,
            told_lost: 0,
            revoked: 0,
            latency: Latency::new()?,
        };
        pipe.check_copies();
        Ok(pipe)
    }

    /// How the two are joined.
    pub fn rung(&self) -> Rung {
        self.joined.rung
    }

    /// Why the rungs above do not hold.
    pub fn refusals(&self) -> &[Refusal] {
        &self.joined.refusals
    }

    /// Changes one byte of the frame at this place (counted from 0) between capture and show: a sink that verifies must notice.
    pub fn corrupt_frame(&mut self, place: u64) {
        self.corrupt = Some(place);
    }

    /// Lets frames flow until a limit is reached, the source ends, or `stop` becomes readable. `progress` is called after each
    /// frame shown, with the numbers so far. Frames whose fences are still waited for when it is told to stop, or when its time is up,
    /// count as dropped; after the last of a number of frames they are waited for.
    ///
    /// A frame whose fence fails (its GPU was reset, say) or takes too long is lost, and the flow goes on: how many is in
    /// [`Account::fences`], and [`Account::moves`] tells of them now and then. It ends when none goes well for twice the sink's
    /// [`fence_timeout`](Sink::fence_timeout) after the first, three at least, or when fences keep every buffer of the source for
    /// that long; and when a flow that was not told to stop ends without having shown anything for that reason.
    ///
    /// A frame that who shares it takes back before the sink is done with it ([`Kind::Revoked`]) counts as dropped by the sink, and the flow
    /// goes on.
    ///
    /// # Errors
    /// The first failure of source or sink; of fences as above, naming the last. The source is stopped either way; a display goes on showing the last frame.
    pub fn run(mut self, stop: Option<BorrowedFd<'_>>, progress: &mut dyn FnMut(&Progress<'_>)) -> Result<Account> {
        let cpu = cpu_time();
        let start = now_us();
        let flowed = self.flow(start, stop, progress);
        let stopped = self.source.stop();
        flowed?;
        // A camera that is gone cannot be stopped; the failure that matters was reported above.
        stopped?;
        let duration = Duration::from_micros(now_us().saturating_sub(start));
        let shown = self.last_shown_us.saturating_sub(self.first_shown_us);
        let gpu = self.joined.copier.as_ref().and_then(ladder::Copier::gpu);
        self.forget_copier();
        self.source.copies().iter().for_each(|copies| self.copies.add(copies));
        let fps = (self.presented > 1 && shown > 0).then(|| (self.presented - 1) as f64 * 1e6 / shown as f64);
        Ok(Account {
            rung: self.joined.rung,
            gpu,
            watch: self.watch,
            refusals: self.joined.refusals,
            moves: self.moves,
            copies: self.copies,
            copies_verdict: self.copies_verdict,
            captured: self.captured,
            presented: self.presented,
            lost: self.source.counts(),
            dropped_by_sink: self.sink.dropped() + self.dropped,
            duration,
            fps,
            latency: self.latency,
            fences: self.sink.fence_use().and(FenceUse { good: 0, ..self.fences }),
            cpu: cpu.and_then(|before| cpu_time()?.checked_sub(before)),
        })
    }

    fn flow(
        &mut self,
        start: u64,
        stop: Option<BorrowedFd<'_>>,
        progress: &mut dyn FnMut(&Progress<'_>),
    ) -> Result<()> {
        let end = self
            .limits
            .duration
            .map(|duration| start + u64::try_from(duration.as_micros()).unwrap_or(u64::MAX / 2));
        let until = &Until { stop, end };
        let waiter = Waiter::new(self.source.as_fd(), stop, self.sink.event_fd());
        let mut waiter = waiter.context("wait for", || self.source.name())?;
        let mut goes_on = self.start(until)?;
        while goes_on {
            self.source.recycle()?;
            if end.is_some_and(|end| now_us() >= end) {
                break;
            }
            let Some(wake) = self.wait(&mut waiter, end)?.filter(|wake| !wake.stop) else { break };
            // With a frame there as well, `present` handles the event: the frame that it shows next is to be the newest.
            if (wake.sink || wake.fence) && wake.source.is_none() {
                let shown = self.sink.dispatch();
                let shown = self.hear(shown)?;
                self.account(shown, progress);
            }
            let Some(ready) = wake.source else { continue };
            let next = match self.source.try_next(ready) {
                Ok(next) => next,
                Err(error) if error.kind() == Kind::Ended => break,
                Err(error) if error.kind() == Kind::FormatChanged => match self.follow(until, progress)? {
                    true => continue,
                    false => break,
                },
                Err(error) => return Err(error),
            };
            let Some(frame) = next else {
                // Something came, as a damaged buffer does, and no frame: that may not go on for ever.
                if self.stalled_at_us(false).is_some_and(|stalled| now_us() >= stalled) {
                    return Err(self.source.stalled());
                }
                continue;
            };
            match self.present(frame, until, progress) {
                // Nobody reads any more, or it was told to stop while a fence was waited for.
                Err(error) if error.kind() == Kind::Ended => break,
                other => other?,
            }
            goes_on = self.limits.frames.is_none_or(|frames| self.captured < frames);
            // After the sink, which may have waited for its reader: that is no fault of the source's.
            self.last_came_us = now_us();
        }
        self.finish(until, progress, true)?;
        self.has_shown(until)
    }

    /// One frame, by the rung that holds; if that turns out not to hold, by one below it.
    fn present(&mut self, frame: Frame, until: &Until<'_>, progress: &mut dyn FnMut(&Progress<'_>)) -> Result<()> {
        let place = self.captured;
        self.captured += 1;
        if self.above.is_some() && self.joined.copier.is_some() {
            self.step_up(until, progress)?;
        }
        let shown = self.pass(&frame, place, until, progress);
        let shown = self.hear_of_frame(shown)?;
        // Where each call has something shown to tell, its error would never come.
        if frame.acquire_fence().is_some()
            && let Some(error) = self.sink.untold()
        {
            self.hear::<()>(Err(error))?;
        }
        if let Some(news) = self.sink.news() {
            self.moved(self.joined.rung, news);
        }
        self.account(shown, progress);
        Ok(())
    }

    fn pass(
        &mut self,
        frame: &Frame,
        place: u64,
        until: &Until<'_>,
        progress: &mut dyn FnMut(&Progress<'_>),
    ) -> Result<Option<Shown>> {
        self.acquire(frame, place, until)?;
        match self.send(frame, place) {
            Err(error) if self.was_refused(&error) => {
                if self.path != Path::Auto {
                    return Err(self.nowhere_to_go(&error));
                }
                self.step_down(&error, until, progress)?;
                self.acquire(frame, place, until)?;
                self.send(frame, place)
            }
            other => other,
        }
    }

    fn send(&mut self, frame: &Frame, place: u64) -> Result<Option<Shown>> {
        let frame = match &mut self.joined.copier {
            None => frame.clone(),
            Some(copier) => match copier.copy(frame, place)? {
                Some(copy) => copy,
                None => return Ok(None),
            },
        };
        self.sink.inspect(&frame, place)?;
        if self.corrupt == Some(place) {
            corrupt(&frame)?;
        }
        self.sink.present(frame)
    }

    /// Waits for the source, the sink or the order to stop; `None` when the time is up.
    fn wait(&mut self, waiter: &mut Waiter, end: Option<u64>) -> Result<Option<Wake>> {
        let fences = Fences { sink: self.sink.acquire_fences(), source: self.source.release_fences() };
        let starves = !fences.source.is_empty() && self.source.starves();
        let stalled = self.stalled_at_us(starves);
        // Rounded up: when the time is up it is up for the sink as well.
        let late = self.sink.acquire_time_left().map(|left| {
            let left = u64::try_from(left.as_micros()).unwrap_or(u64::MAX);
            now_us().saturating_add(left).saturating_add(1)
        });
        let until = [stalled, end, late].into_iter().flatten().min();
        let wake = waiter
            .wait(until, self.sink.wants_event(), &fences)
            .context("wait for", || self.source.name())?;
        drop(fences);
        if starves {
            self.starved_us = now_us();
        }
        if wake.is_none() && late.is_some() && late == until {
            // No fence has signalled, and that is for the sink to tell.
            return Ok(Some(Wake { fence: true, ..Wake::default() }));
        }
        if wake.is_some() || end.is_some_and(|end| stalled.is_none_or(|stalled| end <= stalled)) {
            return Ok(wake);
        }
        Err(self.stalled(starves))
    }

    fn account(&mut self, shown: Option<Shown>, progress: &mut dyn FnMut(&Progress<'_>)) {
        let Some(shown) = shown else { return };
        self.presented += 1;
        self.look_for_recovery();
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
        let counts = self.source.counts();
        progress(&Progress {
            captured: self.captured,
            presented: self.presented,
            rung: self.joined.rung,
            // What a server says that it has skipped may be anything.
            dropped: (counts.dropped + self.sink.dropped() + self.dropped).saturating_add(counts.skipped),
            at_us: shown.at_us,
            latency_us,
            moves: &self.moves,
        });
    }
}

/// Changes one byte that counts (green or luma) in the middle of the picture.
fn corrupt(frame: &Frame) -> Result<()> {
    let layout = frame.buffer().layout();
    let row = layout.height() / 2;
    let byte = match layout.format().kind() {
        format::Kind::Rgb { channels: [_, green, _], .. } => usize::from(green.shift / 8),
        format::Kind::Packed422 { y: [first, _], .. } => usize::from(first),
        format::Kind::SemiPlanar { sample, .. } => usize::from(sample) - 1,
        format::Kind::Planar { .. } | format::Kind::Grey | format::Kind::Bayer { bits: 8, .. } => 0,
        format::Kind::DeepGrey { .. } | format::Kind::Bayer { .. } => 1,
        format::Kind::YuvWord { channels: [luma, ..], .. } => usize::from(luma.shift / 8),
        format::Kind::Hsv { before } => usize::from(before) + 2,
    };
    let Some(place) = layout.planes().first() else { return Ok(()) };
    let offset = place.offset as usize + place.stride as usize * row as usize + byte;
    frame.wait_acquired(PATIENCE)?;
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
