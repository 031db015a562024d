//! The end of a flow, and waiting for fences without being deaf to it.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{Pipe, Progress};
use crate::clock::now_us;
use crate::endpoint::Sink;
use crate::error::{Context, Error, Kind, Result};
use crate::fence::SyncFile;
use crate::frame::Frame;

/// What ends a flow from outside.
pub(super) struct Until<'a> {
    /// Readable when it is to stop.
    pub stop: Option<BorrowedFd<'a>>,
    /// In µs of `CLOCK_MONOTONIC`.
    pub end: Option<u64>,
}

/// How a wait for fences ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Waited {
    /// One of them has signalled.
    Signalled,
    /// The time for fences is up.
    Late,
    /// The flow is to end.
    End,
}

impl Until<'_> {
    /// Waits until one of these is readable, `timeout` at most.
    ///
    /// # Errors
    /// What `poll` says.
    fn wait(&self, fences: &[BorrowedFd<'_>], timeout: Duration) -> nix::Result<Waited> {
        let late = now_us().saturating_add(u64::try_from(timeout.as_micros()).unwrap_or(u64::MAX));
        let mut fds: Vec<_> = fences
            .iter()
            .copied()
            .chain(self.stop)
            .map(|fd| PollFd::new(fd, PollFlags::POLLIN))
            .collect();
        loop {
            let now = now_us();
            let over = self.end.is_some_and(|end| now >= end);
            let first = self.end.map_or(late, |end| end.min(late));
            // Rounded up: the last millisecond is waited for as well.
            let left = first.saturating_sub(now).div_ceil(1000);
            match poll(&mut fds, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)) {
                Ok(_) => {}
                Err(Errno::EINTR) => continue,
                Err(errno) => return Err(errno),
            }
            let ready = |fd: &PollFd<'_>| fd.any().unwrap_or(false);
            if fds.iter().take(fences.len()).any(ready) {
                return Ok(Waited::Signalled);
            }
            if over || fds.iter().skip(fences.len()).any(ready) {
                return Ok(Waited::End);
            }
            if now >= late {
                return Ok(Waited::Late);
            }
        }
    }

    /// Waits for each of these, as long as the sink does: one that takes longer is the sink's to tell of. Whether the flow goes on.
    fn wait_for_all(&self, sink: &dyn Sink, fences: &[&SyncFile]) -> Result<bool> {
        for fence in fences {
            let waited = self.wait(&[fence.as_fd()], sink.fence_timeout());
            match waited.context("wait for a fence for", || sink.name())? {
                Waited::Signalled => {}
                Waited::Late => return Err(fence.overdue(sink.fence_timeout())),
                Waited::End => return Ok(false),
            }
        }
        Ok(true)
    }
}

impl Pipe<'_> {
    /// Waits for the fences that the CPU would wait for on this frame's way to the sink, where nothing else would be listened to.
    ///
    /// # Errors
    /// [`Kind::Timeout`], naming the fence; [`Kind::Ended`] if the flow is to end: the frame counts as dropped.
    pub(super) fn acquire(&mut self, frame: &Frame, until: &Until<'_>) -> Result<()> {
        let next = match self.joined.copier {
            // It reads the frame. Its copies have a fence where a GPU makes them from frames that are there: it signals soon.
            Some(_) => None,
            None => Some(frame),
        };
        let own = frame.acquire_fence().filter(|_| next.is_none());
        let mut fences = self.sink.waits_for(next);
        fences.extend(own);
        if until.wait_for_all(&*self.sink, &fences)? && self.wait_for_a_copy(until)? {
            return Ok(());
        }
        self.dropped += 1;
        Err(Error::new(Kind::Ended, "wait for a fence for", self.sink.name()))
    }

    /// Where the sink's devices read every copy that is free, and the sink takes its time (it has no event to tell that it is ready for
    /// another frame), waits until one is done, as the source would for its own buffers. Whether the flow goes on.
    fn wait_for_a_copy(&self, until: &Until<'_>) -> Result<bool> {
        let Some(copier) = self.joined.copier.as_ref().filter(|_| self.sink.event_fd().is_none()) else {
            return Ok(true);
        };
        loop {
            let fences = copier.blocked_by();
            if fences.is_empty() {
                return Ok(true);
            }
            let fds: Vec<_> = fences.iter().map(|fence| fence.as_fd()).collect();
            let waited = until.wait(&fds, self.sink.fence_timeout());
            match waited.context("wait for a fence for", || self.sink.name())? {
                Waited::Signalled => {}
                // The frame is dropped then, and counted.
                Waited::Late => return Ok(true),
                Waited::End => return Ok(false),
            }
        }
    }

    /// Waits for the frames that are on their way, and for those that the sink holds back until their fences signal, unless the flow was
    /// told to stop or its time is up: then they are given up. Whether it was not.
    pub(super) fn finish(&mut self, until: &Until<'_>, progress: &mut dyn FnMut(&Progress<'_>)) -> Result<bool> {
        let mut all = true;
        loop {
            let held = self.sink.acquire_fences();
            if held.is_empty() {
                break;
            }
            let left = self.sink.acquire_time_left().unwrap_or_else(|| self.sink.fence_timeout());
            let waited = until.wait(&held, left).context("wait for a fence for", || self.sink.name())?;
            if waited == Waited::End {
                all = false;
                break;
            }
            let shown = self.sink.dispatch()?;
            self.account(shown, progress);
        }
        all = all && until.wait_for_all(&*self.sink, &self.sink.waits_for(None))?;
        if !all {
            self.sink.give_up();
        }
        while let Some(shown) = self.sink.finish()? {
            self.account(Some(shown), progress);
        }
        Ok(all)
    }

    /// As [`finish`](Pipe::finish), where the flow goes on afterwards with the frame at hand.
    ///
    /// # Errors
    /// [`Kind::Ended`] if it is not to: that frame counts as dropped.
    pub(super) fn finish_or_end(&mut self, until: &Until<'_>, progress: &mut dyn FnMut(&Progress<'_>)) -> Result<()> {
        match self.finish(until, progress)? {
            true => Ok(()),
            false => {
                self.dropped += 1;
                Err(Error::new(Kind::Ended, "wait for a fence for", self.sink.name()))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::unistd::{pipe, write};

    const LONG: Duration = Duration::from_secs(60);
    const SHORT: Duration = Duration::from_millis(20);

    /// What has signalled goes before the order to stop, that before the end of the patience, and nothing is waited for when the time is
    /// up.
    #[test]
    fn the_first_ends_the_wait() {
        let [fence, other, stop] = [0; 3].map(|_| pipe().unwrap());
        let fences = [fence.0.as_fd(), other.0.as_fd()];
        let until = Until { stop: Some(stop.0.as_fd()), end: None };
        assert_eq!(until.wait(&fences, SHORT).unwrap(), Waited::Late);
        let ends = |end| Until { stop: None, end: Some(end) };
        let start = now_us();
        assert_eq!(ends(start + 20_000).wait(&fences, LONG).unwrap(), Waited::End);
        assert!((start + 20_000..start + 30_000_000).contains(&now_us()));
        write(&stop.1, b"x").unwrap();
        assert_eq!(until.wait(&fences, LONG).unwrap(), Waited::End);
        write(&other.1, b"x").unwrap();
        assert_eq!(until.wait(&fences, LONG).unwrap(), Waited::Signalled);
        assert_eq!(ends(0).wait(&fences, LONG).unwrap(), Waited::Signalled);
        assert_eq!(ends(0).wait(&fences[..1], LONG).unwrap(), Waited::End);
    }
}
