//! Going on when something changes: another rung, another format.

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::finish::Until;
use super::{Pipe, Progress};
use crate::clock::now_us;
use crate::endpoint::{JoinError, Refusal, Rung};
use crate::error::{Context, Error, Kind, Result};
use crate::ladder::{self, Joined, NoWay};

/// A step from one rung to another while frames flowed, a change at the source, or what leaves the rung as it was:
/// [news](crate::endpoint::Sink::news) of the sink, and frames that were lost to their fences, told of now and then.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Move {
    /// How many frames had been captured before.
    pub frame: u64,
    /// The rung before.
    pub from: Rung,
    /// The rung after.
    pub to: Rung,
    /// Why.
    pub why: String,
}

/// The rung that was stepped down from, and when it is tried again: after so many frames, twice as many each time.
#[derive(Debug)]
pub(super) struct Above {
    rung: Rung,
    /// How many refusals there were before.
    refusals: usize,
    frames: u64,
    at: u64,
}

/// About a second of most cameras.
const FIRST_TRY: u64 = 60;

impl Pipe<'_> {
    /// Whether this frame was refused, so that a copy might go where it did not.
    pub(super) fn was_refused(&self, error: &Error) -> bool {
        let lasting =
            matches!(error.kind(), Kind::Disconnected | Kind::Ended | Kind::Permission | Kind::Timeout | Kind::Invalid);
        // Of an import or a commit: what fails elsewhere (counting, verifying, a view) fails for copies as well.
        let broken = self.joined.copier.as_ref().is_some_and(|copier| copier.is_broken());
        broken || (self.joined.rung.is_zero_copy() && error.call().is_some() && !lasting && !error.is_of_fence())
    }

    /// A refusal of the rung that holds no longer, where no other is allowed: an error with a [`Refusal`] as its cause.
    pub(super) fn nowhere_to_go(&self, error: &Error) -> Error {
        let refusal = Refusal::from_error(self.joined.rung, error);
        Error::new(error.kind(), error.step(), error.subject()).because(refusal)
    }

    /// From now on copies. The frame that was refused goes that way as well.
    ///
    /// # Errors
    /// The error that made it step down, if copying does not help.
    pub(super) fn step_down(
        &mut self,
        error: &Error,
        until: &Until<'_>,
        progress: &mut dyn FnMut(&Progress<'_>),
    ) -> Result<()> {
        let again = || {
            // The causes alone: step and subject are said again before them.
            let (line, said) = (error.line(), error.to_string());
            let causes = line
                .strip_prefix(&said)
                .map_or(line.as_str(), |rest| rest.trim_start_matches(": "));
            let again = Error::new(error.kind(), error.step(), error.subject()).because(causes);
            again.repair("copying does not help either")
        };
        self.finish_or_end(until, progress)?;
        let (from, refusals) = (self.joined.rung, self.joined.refusals.len());
        self.forget_copier();
        self.joined.refusals.push(Refusal::from_error(from, error));
        let by_gpu = match from {
            Rung::Converted => None,
            _ => match ladder::converted(self.source, self.sink, false, self.watch.as_mut())? {
                Ok(copier) => Some(copier),
                Err(refusal) => {
                    self.joined.refusals.push(refusal);
                    None
                }
            },
        };
        let (rung, copier) = match by_gpu {
            Some(copier) => (Rung::Converted, copier),
            None => (Rung::Copied, ladder::copied(self.source, self.sink, false)?.map_err(|_| again())?),
        };
        (self.joined.rung, self.joined.copier) = (rung, Some(copier));
        self.check_copies();
        self.moved(from, error.line());
        // A GPU that has failed is not asked again.
        if from == Rung::Converted {
            self.above = None;
            return Ok(());
        }
        let frames = self.above.as_ref().map_or(FIRST_TRY, |above| above.frames.saturating_mul(2));
        self.above = Some(Above { rung: from, refusals, frames, at: self.captured.saturating_add(frames) });
        Ok(())
    }

    /// Tries the rung that was stepped down from again, if it is time: what was in the way may be gone. The next frame tells.
    ///
    /// # Errors
    /// A failure of the sink.
    pub(super) fn step_up(&mut self, until: &Until<'_>, progress: &mut dyn FnMut(&Progress<'_>)) -> Result<()> {
        if self.above.as_ref().is_none_or(|above| self.captured < above.at) {
            return Ok(());
        }
        self.finish_or_end(until, progress)?;
        let Some(above) = &mut self.above else { return Ok(()) };
        above.at = self.captured.saturating_add(above.frames);
        let (rung, refusals, from) = (above.rung, above.refusals, self.joined.rung);
        match ladder::exported(self.source, self.sink) {
            Ok(_) => {
                self.forget_copier();
                self.joined.rung = rung;
                // What was refused holds; the move says why it did not for a while.
                self.joined.refusals.truncate(refusals);
                self.moved(from, "it holds again".to_owned());
                Ok(())
            }
            Err(JoinError::Failed(error)) if error.kind() == Kind::Disconnected => Err(error),
            // The sink is as it was, and takes copies. Twice as long until the next try.
            Err(_) => {
                above.frames = above.frames.saturating_mul(2);
                Ok(())
            }
        }
    }

    /// After a change at the source: the picture on screen stays, the source is set up anew, and the ladder is climbed from its top.
    /// Whether frames flow again; not if the order to stop, or the end, came while there was no signal, or while a fence was waited for.
    ///
    /// # Errors
    /// What the source or the sink says, or the refusals of all rungs.
    pub(super) fn follow(&mut self, until: &Until<'_>, progress: &mut dyn FnMut(&Progress<'_>)) -> Result<bool> {
        let from = self.joined.rung;
        if !self.finish(until, progress, false)? {
            return Ok(false);
        }
        let mut not_kept = None;
        if self.joined.copier.is_none() {
            match self.sink.hold() {
                Err(error) if error.kind() == Kind::Disconnected => return Err(error),
                // The frame itself stays on screen then: its memory outlives the source's buffers.
                Err(error) => not_kept = Some(error.line()),
                Ok(()) => {}
            }
        }
        // The account of its frames goes with its buffers.
        self.source.copies().iter().for_each(|copies| self.copies.add(copies));
        if !self.wait_for_signal(until)? {
            return Ok(false);
        }
        self.forget_copier();
        let layout = *self.source.layout();
        self.joined = match ladder::join(self.source, self.sink, self.path, self.watch.as_mut()) {
            Ok(joined) => joined,
            Err(NoWay::Failed(error)) => return Err(error),
            Err(NoWay::Refused(refusals)) => {
                let error = Error::new(Kind::Unsupported, "show the new format of", self.source.name());
                // As for the first frame: of the way that costs nothing where that was demanded, else of the last resort.
                let mut refusals = refusals.into_iter();
                let told = if self.path.is_zero_copy() { refusals.next() } else { refusals.next_back() };
                return Err(match told {
                    Some(refusal) => error.because(refusal),
                    None => error,
                });
            }
        };
        self.check_copies();
        self.above = None;
        let mut why = format!("the source changed to {layout}");
        let lost = self.source.not_kept().join(", ");
        if !lost.is_empty() {
            why = format!("{why}; what was asked for and could not be kept: {lost}");
        }
        if let Some(not_kept) = not_kept {
            why = format!("{why}; meanwhile a frame of before was held: {not_kept}");
        }
        self.moved(from, why);
        self.start(until)
    }

    /// Sets the source up anew; while it has no signal, each further change is another try, until the watchdog's time is up.
    fn wait_for_signal(&mut self, &Until { stop, end }: &Until<'_>) -> Result<bool> {
        let until = self
            .source
            .watchdog()
            .map(|time| now_us().saturating_add(time.as_micros() as u64));
        loop {
            let error = match self.source.follow() {
                Err(error) if error.kind() == Kind::Timeout => error,
                other => return other.map(|()| true),
            };
            let now = now_us();
            if end.is_some_and(|end| now >= end) {
                return Ok(false);
            }
            if until.is_some_and(|until| now >= until) {
                return Err(error);
            }
            let left = until.into_iter().chain(end).min().map(|first| first.saturating_sub(now));
            let timeout = left.map_or(PollTimeout::NONE, |left| {
                PollTimeout::try_from(left.div_ceil(1000)).unwrap_or(PollTimeout::MAX)
            });
            let mut fds = vec![PollFd::new(self.source.as_fd(), PollFlags::POLLPRI)];
            fds.extend(stop.map(|stop| PollFd::new(stop, PollFlags::POLLIN)));
            match poll(&mut fds, timeout) {
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(errno) => return Err(errno).context("wait for", || self.source.name().to_owned()),
            }
            let ready = |fd: &PollFd<'_>| fd.revents().is_some_and(|events| !events.is_empty());
            if fds.get(1).is_some_and(ready) {
                return Ok(false);
            }
        }
    }

    /// The account of a copier that is done with.
    pub(super) fn forget_copier(&mut self) {
        let Joined { copier, .. } = &mut self.joined;
        let Some(copier) = copier.take() else { return };
        for copies in copier.ledger().entries().iter().chain(&copier.view_copies()) {
            self.copies.add(copies);
        }
        self.dropped += copier.dropped();
        if let Some(verdict) = copier.verdict() {
            self.copies_verdict.get_or_insert_default().add(verdict);
        }
    }

    /// A sink that verifies what it shows wants copies compared as well.
    pub(super) fn check_copies(&mut self) {
        if let (Some(copier), true) = (&mut self.joined.copier, self.sink.verdict().is_some()) {
            copier.check();
        }
    }

    pub(super) fn moved(&mut self, from: Rung, why: String) {
        self.moves.push(Move { frame: self.captured, from, to: self.joined.rung, why });
    }
}
