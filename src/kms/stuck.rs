//! A fence that does not signal, between a display and its end.
//!
//! The kernel waits for the fence of a commit without limit, and a commit cannot be taken back. Whatever waits for that commit waits as
//! long: another commit, which holds the card's locks meanwhile, and the removal of a framebuffer that it has to do with. The latter is
//! done by a worker, which no signal reaches (`drm_mode_rmfb` in drm_framebuffer.c, `drm_atomic_helper_swap_state`), also for each
//! framebuffer of a file that is closed (`drm_fb_release`), and after the last close of a card its console comes back by a commit
//! (`drm_lastclose`). So nothing of that is done here while such a fence is open.

use std::mem;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::Display;
use super::display::Present;
use super::import::Framebuffer;
use crate::endpoint::Sink;
use crate::error::{Context, Result};
use crate::fence::SyncFile;
use crate::frame::Frame;
use crate::memory::Access;

/// The picture of before waits so many times as long as a frame does: longer than drivers let a job run, which is several seconds.
const RESTORE_PATIENCE: u32 = 3;

impl Display {
    /// The fences that the next call would wait for: `present` of this frame, or `finish`.
    pub(super) fn fences_before<'a>(&'a self, next: Option<&'a Frame>) -> Vec<&'a SyncFile> {
        let of = |frame: &'a Frame| frame.acquire_fence();
        let pending = self.pending.as_ref().and_then(of).filter(|_| self.in_turn() && !self.given_up);
        let lit = || self.way.as_ref().is_some_and(|way| way.lit);
        // A frame in a mailbox waits there.
        let by_cpu =
            || self.request.verify || self.request.present == Present::Fifo && self.waits_by_cpu().is_some() || !lit();
        let next = next.and_then(of).filter(|_| by_cpu());
        pending.into_iter().chain(next).collect()
    }

    /// Gives up what waits for a fence: what is held, and to wait for what is on its way.
    pub(super) fn give_up_fenced(&mut self) {
        self.mailbox.clear();
        // What has come on screen meanwhile is told.
        let open = |frame: &Frame| frame.acquire_fence().is_some_and(|fence| !fence.is_signalled());
        if self.in_turn()
            && !self.given_up
            && self.fifo.read(&self.card).is_ok()
            && self.pending.as_ref().is_some_and(open)
        {
            self.given_up = true;
            self.lost += 1;
        }
    }

    /// Before a commit that waits for everything on its way: that this will come to an end.
    ///
    /// # Errors
    /// [`Kind::Timeout`](crate::error::Kind::Timeout), naming a fence.
    pub(super) fn wait_for_pending(&mut self) -> Result<()> {
        let patience = self.fence_timeout().saturating_mul(RESTORE_PATIENCE);
        loop {
            let landed = self.landed();
            if let Ok(true) = landed {
                return Ok(());
            }
            let open = self.open_fences();
            let Some(first) = open.first() else { return Ok(()) };
            let since = *self.restoring_since.get_or_insert_with(Instant::now);
            let left = patience.saturating_sub(since.elapsed());
            if left.is_zero() {
                return Err(first
                    .overdue(since.elapsed())
                    .repair("the kernel cannot put back the picture before that frame has been shown"));
            }
            // Events that cannot be read do not end the wait.
            let card = landed.is_ok().then(|| (*self.card).as_fd());
            let fences = open.iter().map(|fence| fence.as_fd());
            let mut fds: Vec<_> = fences.chain(card).map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
            let left = left.saturating_add(Duration::from_millis(1));
            match poll(&mut fds, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno).context("wait for the fences of", || self.name.clone()),
            }
        }
    }

    /// Whether nothing is on its way, as far as the card's events tell.
    fn landed(&mut self) -> Result<bool> {
        let there = match (&self.pending, self.in_turn()) {
            (None, _) => return Ok(true),
            (Some(_), true) => {
                self.fifo.read(&self.card)?;
                self.fifo.all_read()
            }
            (Some(_), false) => self.card.read_flip()?.is_some(),
        };
        if let Some(frame) = self.pending.take_if(|_| there) {
            self.put_on_screen(frame);
        }
        Ok(there)
    }

    /// The fences that the kernel waits for before it shows what is on its way: the one that came with it, or those in its memory.
    fn open_fences(&self) -> Vec<Arc<SyncFile>> {
        let Some(frame) = &self.pending else { return Vec::new() };
        let carried = frame.shared_acquire_fence();
        let implied = (0u32..)
            .map_while(|memory| frame.buffer().dma_buf(memory))
            // Before Linux 6.0 they cannot be asked for.
            .filter_map(|dma_buf| SyncFile::export(dma_buf, Access::Read).ok().map(Arc::new));
        carried
            .into_iter()
            .chain(implied)
            .filter(|fence| !fence.is_signalled())
            .collect()
    }

    /// Whether what is on its way waits for a fence still.
    pub(super) fn is_stuck(&self) -> bool {
        !self.open_fences().is_empty()
    }

    /// Leaves everything to the kernel: framebuffers that it removes when it has shown others, the memory that it scans out, and the card,
    /// which would bring its console back.
    pub(super) fn abandon(&mut self) {
        self.framebuffers.take_all().for_each(Framebuffer::close);
        // Leases that never end: what the kernel still reads is not filled again.
        for frame in [self.pending.take(), self.on_screen.take(), self.leaving.take()] {
            mem::forget(frame);
        }
        // Another process, or this one, may drive the card's other displays.
        self.card.give_up_master();
        mem::forget(Arc::clone(&self.card));
    }
}
