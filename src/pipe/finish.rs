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

/// What ends a flow from outside.
pub(super) struct Until<'a> {
    /// Readable when it is to stop.
    pub stop: Option<BorrowedFd<'a>>,
    /// In µs of `CLOCK_MONOTONIC`.
    pub end: Option<u64>,
}

/// How a wait for fences ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Waited {
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
    pub(super) fn wait(&self, fences: &[BorrowedFd<'_>], timeout: Duration) -> nix::Result<Waited> {
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

    /// Whether the order to stop has come; it stays there to be read.
    pub(super) fn is_told(&self) -> bool {
        self.stop.is_some_and(|stop| {
            poll(&mut [PollFd::new(stop, PollFlags::POLLIN)], PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
        })
    }

    /// Waits for each of these, as long as the sink does. Whether the flow goes on.
    ///
    /// # Errors
    /// That of a fence that takes longer.
    pub(super) fn wait_for_all(&self, sink: &dyn Sink, fences: &[&SyncFile]) -> Result<bool> {
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
    /// Where the sink's devices read every copy that is free, and the sink takes its time (it has no event to tell that it is ready for
    /// another frame), waits until one is done, as the source would for its own buffers. Whether the flow goes on.
    pub(super) fn wait_for_a_copy(&self, until: &Until<'_>) -> Result<bool> {
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
    /// told to stop or its time is up: then they are given up. Whether it was not. One that takes too long is given up as well at the end
    /// of the flow; before a step after which it goes on nothing may be on its way, and so it is waited for as long as a flow may fail.
    pub(super) fn finish(
        &mut self,
        until: &Until<'_>,
        progress: &mut dyn FnMut(&Progress<'_>),
        at_end: bool,
    ) -> Result<bool> {
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
            let shown = self.sink.dispatch();
            let shown = self.hear(shown)?;
            self.account(shown, progress);
        }
        while all {
            match until.wait_for_all(&*self.sink, &self.sink.waits_for(None)) {
                Err(late) if late.is_of_fence() => {
                    if at_end {
                        self.fences.lose(&late);
                        all = false;
                    }
                    self.hear(Err::<(), _>(late))?;
                }
                waited => {
                    all = waited?;
                    break;
                }
            }
        }
        if !all {
            self.sink.give_up();
        }
        loop {
            let told = self.sink.finish();
            let lost = told.is_err();
            match self.hear(told)? {
                None if lost => {}
                None => break,
                shown => self.account(shown, progress),
            }
        }
        Ok(all)
    }

    /// As [`finish`](Pipe::finish), where the flow goes on afterwards with the frame at hand.
    ///
    /// # Errors
    /// [`Kind::Ended`] if it is not to: that frame counts as dropped.
    pub(super) fn finish_or_end(&mut self, until: &Until<'_>, progress: &mut dyn FnMut(&Progress<'_>)) -> Result<()> {
        match self.finish(until, progress, false)? {
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
