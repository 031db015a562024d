//! Frames that are lost to their fences: counted and told of, and for how long a flow goes on while each is.

use std::time::Duration;

use super::Pipe;
use super::finish::{Until, Waited};
use crate::clock::now_us;
use crate::error::{Context, Error, Kind, Result};
use crate::frame::Frame;

/// So many times as long as one fence may take, after the first that was late or has failed, fences may go on so (10 s by default): most
/// drivers give a job less than that before they reset its device, and what comes then may be good again.
const RECOVERY: u32 = 2;

/// So many are no chance: of a source that is slow, fewer than that may be all that came in that time.
const FEW: u32 = 3;

/// Fences were late or have failed, and none has been told to be all right since.
#[derive(Debug)]
pub(super) struct Failing {
    since_us: u64,
    times: u32,
    /// How many had gone well by then.
    good: u64,
    error: Error,
}

impl Pipe<'_> {
    /// What a sink says, where one frame's fence is no reason to end the flow.
    ///
    /// # Errors
    /// What the sink says otherwise, and of a fence if none goes well any more.
    pub(super) fn hear<T: Default>(&mut self, said: Result<T>) -> Result<T> {
        match said {
            Err(error) if error.is_of_fence() => self.go_on_after(error).map(|()| T::default()),
            other => other,
        }
    }

    /// What a sink says of a frame, where one that was taken back by who shares it is no reason to end the flow either. It counts as dropped,
    /// which is told less and less often.
    ///
    /// # Errors
    /// As [`hear`](Pipe::hear).
    pub(super) fn hear_of_frame<T: Default>(&mut self, said: Result<T>) -> Result<T> {
        match said {
            Err(error) if error.kind() == Kind::Revoked => {
                self.dropped += 1;
                self.revoked += 1;
                if self.revoked.is_power_of_two() {
                    let frames = self.revoked;
                    self.moved(
                        self.joined.rung,
                        format!(
                            "frames taken back before the sink was done with them: {frames} so far; {}",
                            error.line()
                        ),
                    );
                }
                Ok(T::default())
            }
            other => self.hear(other),
        }
    }

    fn go_on_after(&mut self, error: Error) -> Result<()> {
        let now = now_us();
        self.look_for_recovery();
        let (since_us, before) = self
            .failing
            .as_ref()
            .map_or((now, 0), |failing| (failing.since_us, failing.times));
        let times = before.saturating_add(1);
        if times >= FEW && now >= since_us.saturating_add(micros(self.recovery())) {
            return Err(error);
        }
        // Told less and less often, and the numbers are in the account: there may be one with each frame.
        let lost = self.sink.fence_use().lost() + self.fences.lost();
        let good = self.good();
        if lost > 0 && lost >= self.told_lost.saturating_mul(2) {
            self.told_lost = lost;
            self.moved(
                self.joined.rung,
                format!("frames whose fences failed or took too long: {lost} so far; {}", error.line()),
            );
        }
        self.failing = Some(Failing { since_us, times, good, error });
        Ok(())
    }

    /// Whether a fence has gone well since the last that has not.
    pub(super) fn look_for_recovery(&mut self) {
        if self.failing.as_ref().is_some_and(|failing| self.good() > failing.good) {
            self.failing = None;
        }
    }

    /// Those that the sink knows of, and those that were waited for before it had to do with them: some are both.
    fn good(&self) -> u64 {
        self.sink.fence_use().good + self.fences.good
    }

    fn recovery(&self) -> Duration {
        self.sink.fence_timeout().saturating_mul(RECOVERY)
    }

    /// How long fences may keep every buffer of the source.
    fn starvation(&self) -> Duration {
        let watchdog = self.source.watchdog().unwrap_or_default();
        watchdog.max(self.recovery().saturating_add(self.sink.fence_timeout()))
    }

    /// When the source will have taken too long, in µs of `CLOCK_MONOTONIC`. While fences keep every buffer of it, that is no fault of its
    /// own, and may take as long as fences may.
    pub(super) fn stalled_at_us(&self, starves: bool) -> Option<u64> {
        if !starves {
            let watchdog = micros(self.source.watchdog()?);
            return Some(self.last_came_us.max(self.starved_us).saturating_add(watchdog));
        }
        Some(match &self.failing {
            Some(failing) => self.last_came_us.max(failing.since_us).saturating_add(micros(self.recovery())),
            None => self.last_came_us.saturating_add(micros(self.starvation())),
        })
    }

    /// The error of a source that has taken too long.
    pub(super) fn stalled(&mut self, starves: bool) -> Error {
        match self.failing.take().filter(|_| starves) {
            Some(failing) => failing.error,
            None => self.source.stalled(),
        }
    }

    /// A flow whose frames were all lost to their fences has failed, unless it was told to stop.
    pub(super) fn has_shown(&mut self, until: &Until<'_>) -> Result<()> {
        match self.failing.take() {
            Some(failing) if self.presented == 0 && !until.is_told() => Err(failing.error),
            _ => Ok(()),
        }
    }

    /// Waits for the fences that the CPU would wait for on this frame's way to the sink, where nothing else would be listened to.
    ///
    /// # Errors
    /// As [`SyncFile::wait`](crate::fence::SyncFile::wait); [`Kind::Ended`] if the flow is to end. Either way the frame counts as dropped.
    pub(super) fn acquire(&mut self, frame: &Frame, place: u64, until: &Until<'_>) -> Result<()> {
        match self.wait_for_fences(frame, place, until) {
            Ok(own) => {
                if own {
                    self.fences.went_well();
                }
                Ok(())
            }
            Err(error) => {
                self.dropped += 1;
                self.fences.lose(&error);
                Err(error)
            }
        }
    }

    /// Whether this frame's own fence is known to have gone well.
    fn wait_for_fences(&self, frame: &Frame, place: u64, until: &Until<'_>) -> Result<bool> {
        let next = match self.joined.copier {
            // It reads the frame, and its copies have no fence.
            Some(_) => None,
            None => Some(frame),
        };
        let mut fences = self.sink.waits_for(next);
        let own = frame.acquire_fence();
        if own.is_none() && fences.is_empty() && self.joined.copier.is_none() {
            return Ok(false);
        }
        let is_own = |fence: &crate::fence::SyncFile| own.is_some_and(|own| std::ptr::eq(own, fence));
        let mut reads = fences.iter().any(|fence| is_own(fence));
        if !reads && (next.is_none() || self.corrupt == Some(place)) {
            reads = own.is_some();
            fences.extend(own);
        }
        let goes_on = until.wait_for_all(&*self.sink, &fences)? && self.wait_for_a_copy(until)?;
        // Of work that has failed there is nothing to read. What became of that of the frame before is the sink's to tell.
        if let Some(own) = own.filter(|_| reads && goes_on) {
            own.check()?;
        }
        match goes_on {
            true => Ok(reads),
            false => Err(Error::new(Kind::Ended, "wait for a fence for", self.sink.name())),
        }
    }

    /// Starts the source. Where release fences keep every buffer it would wait for one, and be deaf to all else: they are waited for here.
    /// Whether the flow goes on.
    ///
    /// # Errors
    /// What the source says.
    pub(super) fn start(&mut self, until: &Until<'_>) -> Result<bool> {
        let begin = now_us();
        while self.source.starves() {
            let fences = self.source.release_fences();
            if fences.is_empty() {
                break;
            }
            let fds: Vec<_> = fences.iter().map(std::os::fd::AsFd::as_fd).collect();
            let waited = Duration::from_micros(now_us().saturating_sub(begin));
            let waited = until.wait(&fds, self.starvation().saturating_sub(waited));
            match waited.context("wait for", || self.source.name())? {
                Waited::Signalled => {}
                Waited::Late => return Err(self.source.stalled()),
                Waited::End => return Ok(false),
            }
        }
        self.source.start()?;
        self.last_came_us = now_us();
        Ok(true)
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
