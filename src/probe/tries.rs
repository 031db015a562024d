//! One rung in one format, with frames that are shown.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{Candidate, End, Held, Offer, Outcome};
use crate::endpoint::{JoinError, Ready, Refusal, Rung, Sink, Source};
use crate::error::{Context, Error, Kind, Result};
use crate::format::Layout;
use crate::frame::Frame;
use crate::ladder::{self, Copier, Maker};

/// The first sets the mode, the second is what all further ones are.
const FRAMES: u64 = 2;

/// A source that makes no frames is given up after this long.
const PATIENCE: Duration = Duration::from_secs(5);

/// What a try needs.
pub(super) struct Bench<'a> {
    pub candidate: &'a mut dyn Candidate,
    pub sink: &'a mut dyn Sink,
    pub stop: Option<BorrowedFd<'a>>,
    pub offer: Offer,
}

/// Why no frame was shown.
enum Unshown {
    /// This way does not hold.
    Refused(Error),
    /// Nothing holds any more.
    Ended(End),
}

impl Bench<'_> {
    /// What the source's frames are like.
    ///
    /// # Errors
    /// If the source cannot be opened in this format.
    pub(super) fn layout(&mut self) -> Result<Layout> {
        Ok(*self.candidate.open(&self.offer)?.layout())
    }

    /// The source's own buffers; where the sink wants other rows, with those.
    pub(super) fn exported(&mut self) -> Result<Outcome, End> {
        let mut source = self.open()?;
        let refusal = match ladder::exported(source.as_ref(), self.sink) {
            Ok(Rung::Copied) => return Ok(Outcome::Refused(vec![ladder::reads_itself()])),
            Ok(_) => return self.outcome(Rung::Exported, source, None, Vec::new(), Some(Memory::Source)),
            Err(JoinError::Refused(refusal)) => refusal,
            Err(JoinError::Failed(error)) => self.survivable(Rung::Exported, error)?,
        };
        let layout = *source.layout();
        let lacks = ladder::lacks_format(&layout, self.sink, None).is_some();
        if !lacks && ladder::other_rows(source.as_mut(), self.sink, &layout).is_ok() {
            return self.outcome(Rung::Exported, source, None, vec![refusal], Some(Memory::Source));
        }
        Ok(Outcome::Refused(vec![refusal]))
    }

    /// The buffers of each maker in turn, until one holds.
    pub(super) fn reverse(&mut self, exported: Option<&Refusal>) -> Result<Outcome, End> {
        let mut refused = Vec::new();
        for maker in Maker::of_dma_bufs(self.sink) {
            let mut source = self.open()?;
            if let Some(refusal) = self.never_reverse(source.as_ref(), exported) {
                return Ok(Outcome::Refused(vec![Refusal { rung: Rung::Reverse, ..refusal }]));
            }
            let count = ladder::buffer_count(source.as_ref());
            match ladder::reverse_by(source.as_mut(), self.sink, maker, count).map_err(End::Failed)? {
                Ok(_) => match self.outcome(Rung::Reverse, source, None, refused, Some(Memory::Of(maker)))? {
                    Outcome::Refused(refusals) => refused = refusals,
                    holds => return Ok(holds),
                },
                Err(refusal) => refused.push(refusal),
            }
        }
        Ok(Outcome::Refused(refused))
    }

    /// What no maker of buffers can cure.
    fn never_reverse(&self, source: &dyn Source, exported: Option<&Refusal>) -> Option<Refusal> {
        let reads_itself = exported.filter(|refusal| **refusal == ladder::reads_itself());
        reads_itself
            .cloned()
            .or_else(|| ladder::lacks_format(source.layout(), self.sink, exported))
    }

    /// A copy by the CPU.
    pub(super) fn copied(&mut self) -> Result<Outcome, End> {
        let source = self.open()?;
        // A sink that reads frames with the CPU copies by itself.
        if matches!(ladder::exported(source.as_ref(), self.sink), Ok(Rung::Copied)) {
            return self.outcome(Rung::Copied, source, None, Vec::new(), Some(Memory::Source));
        }
        match ladder::copied(source.as_ref(), self.sink, true) {
            Ok(Ok(copier)) => self.outcome(Rung::Copied, source, Some(copier), Vec::new(), None),
            Ok(Err(refusal)) => Ok(Outcome::Refused(vec![refusal])),
            Err(error) => Ok(Outcome::Refused(vec![self.survivable(Rung::Copied, error)?])),
        }
    }

    fn open(&mut self) -> Result<Box<dyn Source>, End> {
        if told(self.stop) {
            return Err(End::Stopped);
        }
        self.candidate.open(&self.offer).map_err(End::Failed)
    }

    /// The refusal that a failure is, unless nothing else will do better.
    fn survivable(&self, rung: Rung, error: Error) -> Result<Refusal, End> {
        match error.kind() {
            Kind::Disconnected | Kind::Permission | Kind::NotFound => Err(End::Failed(error)),
            _ => Ok(Refusal::from_error(rung, &error)),
        }
    }

    /// Shows frames of a source that was joined.
    fn outcome(
        &mut self,
        rung: Rung,
        mut source: Box<dyn Source>,
        mut copier: Option<Copier>,
        mut refused: Vec<Refusal>,
        memory: Option<Memory>,
    ) -> Result<Outcome, End> {
        let shown = self.show(source.as_mut(), copier.as_mut());
        if shown.is_err() {
            // What is on its way is in the way of the next try.
            while let Ok(Some(_)) = self.sink.finish() {}
        }
        // A camera that is gone cannot be stopped; the failure that matters is the one before.
        let stopped = source.stop();
        let shown = shown.and_then(|()| stopped.map_err(Unshown::Refused));
        let memory = memory.map(|memory| match memory {
            Memory::Source => source.name().to_owned(),
            Memory::Of(maker) => maker.name(self.sink),
        });
        match shown {
            Ok(()) => {
                let layout = copier.as_ref().map_or(source.layout(), Copier::layout);
                Ok(Outcome::Holds(Held { shown: *layout, memory, refused }))
            }
            Err(Unshown::Ended(end)) => Err(end),
            // A source that sends nothing sends nothing on any rung; but it may be other buffers that it does not fill.
            Err(Unshown::Refused(error)) if error.kind() == Kind::Timeout && rung != Rung::Reverse => {
                Err(End::Failed(error))
            }
            Err(Unshown::Refused(error)) => {
                refused.push(self.survivable(rung, error)?);
                Ok(Outcome::Refused(refused))
            }
        }
    }

    fn show(&mut self, source: &mut dyn Source, mut copier: Option<&mut Copier>) -> Result<(), Unshown> {
        source.start()?;
        for place in 0..FRAMES {
            let frame = self.next(source)?;
            let frame = match copier.as_deref_mut() {
                None => Some(frame),
                Some(copier) => copier.copy(&frame, place)?,
            };
            let Some(frame) = frame else { continue };
            self.sink.inspect(&frame, place)?;
            self.sink.present(frame)?;
        }
        while self.sink.finish()?.is_some() {}
        Ok(())
    }

    fn next(&self, source: &mut dyn Source) -> Result<Frame, Unshown> {
        let patience = source.watchdog().unwrap_or(PATIENCE);
        let timeout = PollTimeout::try_from(patience).unwrap_or(PollTimeout::MAX);
        loop {
            source.recycle()?;
            let mut fds = vec![PollFd::new(source.as_fd(), PollFlags::POLLIN | PollFlags::POLLPRI)];
            fds.extend(self.stop.map(|stop| PollFd::new(stop, PollFlags::POLLIN)));
            match poll(&mut fds, timeout) {
                Ok(0) => return Err(source.stalled().into()),
                Err(Errno::EINTR) => continue,
                other => other.context("wait for", || source.name()).map(drop)?,
            }
            let mut events = fds.iter().map(|fd| fd.revents().unwrap_or(PollFlags::empty()));
            let ready = Ready::from(events.next().unwrap_or(PollFlags::empty()));
            if events.next().is_some_and(|stop| !stop.is_empty()) {
                return Err(Unshown::Ended(End::Stopped));
            }
            if let Some(frame) = source.try_next(ready)? {
                return Ok(frame);
            }
        }
    }
}

/// Whose memory the frames are in.
enum Memory {
    Source,
    Of(Maker),
}

impl From<Error> for Unshown {
    fn from(error: Error) -> Unshown {
        Unshown::Refused(error)
    }
}

/// Whether the order to stop has come.
fn told(stop: Option<BorrowedFd<'_>>) -> bool {
    let Some(stop) = stop else { return false };
    let mut fds = [PollFd::new(stop.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
}
