//! Waiting for a frame, without an event loop.

use std::time::Instant;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::*;

impl Camera {
    /// Waits for the next frame: for programs without an event loop. Starts the flow if need be.
    ///
    /// # Errors
    /// [`Kind::Timeout`] when none came before the watchdog's time was up; otherwise as [`Source::try_next`].
    #[expect(clippy::should_implement_trait, reason = "an iterator could not report failures and go on")]
    pub fn next(&mut self) -> Result<Frame> {
        if !matches!(self.queue, State::Streaming(_)) {
            self.start()?;
        }
        let begin = Instant::now();
        loop {
            self.recycle()?;
            let fences = self.release_fences();
            let frames = PollFd::new(self.as_fd(), PollFlags::POLLIN | PollFlags::POLLPRI);
            // Damaged buffers and fences wake it as well, and are no frames.
            let left = self.watchdog.saturating_sub(begin.elapsed());
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            let ready = match wait_for(frames, &fences, timeout) {
                Err(nix::errno::Errno::EINTR) => continue,
                other => other.context("wait for", || self.name.clone())?,
            };
            let Some(events) = ready else { return Err(self.stalled()) };
            if let Some(frame) = self.try_next(Ready::from(events))? {
                return Ok(frame);
            }
            if begin.elapsed() >= self.watchdog {
                return Err(self.stalled());
            }
        }
    }

    /// Before a flow starts: where release fences keep every slot that nobody holds, waits until one is free. A flow that has not had a
    /// buffer yet counts as failed for whoever polls it (`waiting_for_buffers` in videobuf2-core.c). Without fences no system call.
    pub(super) fn wait_for_a_slot(&self) -> Result<()> {
        let begin = Instant::now();
        while self.starves() {
            let fences = self.release_fences();
            if fences.is_empty() {
                // All that are not queued are held by somebody: no affair of fences.
                break;
            }
            let mut fds: Vec<_> = fences
                .iter()
                .map(|fence| PollFd::new(fence.as_fd(), PollFlags::POLLIN))
                .collect();
            let left = self.watchdog.saturating_sub(begin.elapsed());
            match poll(&mut fds, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)) {
                Ok(0) => return Err(self.stalled()),
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(errno) => return Err::<(), _>(errno).context("wait for", || self.name.clone()),
            }
        }
        Ok(())
    }
}

/// What came of a camera's descriptor, which is nothing if one of the fences has signalled first; `None` when the time is up.
fn wait_for(frames: PollFd<'_>, fences: &[Arc<SyncFile>], timeout: PollTimeout) -> nix::Result<Option<PollFlags>> {
    let (mut alone, mut all);
    let fds: &mut [PollFd<'_>] = match fences {
        [] => {
            alone = [frames];
            &mut alone
        }
        fences => {
            let fences = fences.iter().map(|fence| PollFd::new(fence.as_fd(), PollFlags::POLLIN));
            all = std::iter::once(frames).chain(fences).collect::<Vec<_>>();
            &mut all
        }
    };
    let ready = poll(fds, timeout)?;
    let events = fds.first().and_then(PollFd::revents).unwrap_or(PollFlags::empty());
    Ok((ready > 0).then_some(events))
}

impl From<PollFlags> for Ready {
    fn from(events: PollFlags) -> Ready {
        Ready {
            frame: events.contains(PollFlags::POLLIN),
            event: events.contains(PollFlags::POLLPRI),
            failed: events.intersects(PollFlags::POLLERR | PollFlags::POLLHUP | PollFlags::POLLNVAL),
        }
    }
}
