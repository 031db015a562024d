//! Showing every frame without waiting for each: what is on its way, and when what was on its way came on screen.
//!
//! A commit that does not wait is refused with `EBUSY` while an earlier one is on its way, and "currently no driver" keeps a queue
//! of them (`drm_mode_config_funcs.atomic_commit` in drm_mode_config.h; `stall_checks` in drm_atomic_helper.c). So the commit of
//! one frame that is accepted says that the frame before is on screen, and its event need not be read for that. Events are read
//! many at a time, for the times that they carry.
//!
//! When frame N+1 is accepted, then, the flip of N is done, scanout hardware has left N-1, and N-1 may be filled again. A driver that
//! [reads late](super::quirks::reads_late) may read it still: it has certainly ended when the commit of N is cleaned up. The commit
//! of N+2 waits for that, without a system call of ours (`stall_checks`: `cleanup_done` of the commit before the last). So for such
//! a driver N-1 is held for one frame more; where there are too few buffers for that, each commit waits, which includes its cleaning up.

use std::collections::VecDeque;

use super::Card;
use super::flip::MAX_FLIPS;
use crate::clock::now_us;
use crate::endpoint::Shown;
use crate::error::Result;
use crate::frame::FrameMeta;

/// After a commit that had to wait, this many wait at once: while frames come faster than, or just as, the display takes them, a
/// first try would be a system call for nothing.
const PATIENCE: u32 = 64;

/// Events are read when so many are there, or the last look is so long ago, in µs: a person follows the numbers.
const READ_AFTER: usize = MAX_FLIPS;
const READ_AFTER_US: u64 = 500_000;

/// The frames submitted whose flip events have not been read, and those shown that have not been told of.
#[derive(Debug)]
pub(super) struct Fifo {
    unread: VecDeque<FrameMeta>,
    shown: VecDeque<Shown>,
    read_at_us: u64,
    waits_left: u32,
}

impl Fifo {
    pub(super) fn new() -> Fifo {
        // Never more than that many, so that nothing is allocated later.
        let room = 4 * READ_AFTER;
        Fifo {
            unread: VecDeque::with_capacity(room),
            shown: VecDeque::with_capacity(room),
            read_at_us: 0,
            waits_left: 0,
        }
    }

    /// Whether the next commit is to wait without a first try.
    pub(super) fn waits(&mut self) -> bool {
        self.waits_left = self.waits_left.saturating_sub(1);
        self.waits_left > 0
    }

    /// A first try was refused: commits wait for a while.
    pub(super) fn refused(&mut self) {
        self.waits_left = PATIENCE;
    }

    /// A frame was committed with an event. Commits come on screen, and their events, in this order.
    pub(super) fn submitted(&mut self, meta: FrameMeta) {
        self.unread.push_back(meta);
    }

    /// Whether the events of all frames have been read.
    pub(super) fn all_read(&self) -> bool {
        self.unread.is_empty()
    }

    /// The next frame to tell of. Looks for events only now and then: a system call for many frames. `pending` is how many
    /// frames, at most, can still be on their way.
    ///
    /// # Errors
    /// What `read` says.
    pub(super) fn next_shown(&mut self, card: &Card, pending: usize) -> Result<Option<Shown>> {
        if self.unread.len() >= READ_AFTER || now_us().saturating_sub(self.read_at_us) >= READ_AFTER_US {
            self.read(card)?;
            if self.unread.len() > pending {
                // The driver took a commit while an earlier one was on its way: one that keeps a queue. It is waited for from now on.
                self.waits_left = u32::MAX;
            }
        }
        Ok(self.shown.pop_front())
    }

    /// Reads what events there are.
    ///
    /// # Errors
    /// What `read` says.
    pub(super) fn read(&mut self, card: &Card) -> Result<()> {
        self.read_at_us = now_us();
        while card.read_flips(&mut |flip| {
            if let Some(meta) = self.unread.pop_front() {
                self.shown.push_back(Shown { meta, at_us: flip.at_us });
            }
        })? == MAX_FLIPS
        {}
        Ok(())
    }

    /// The next frame to tell of among those whose events have been read.
    pub(super) fn told(&mut self) -> Option<Shown> {
        self.shown.pop_front()
    }

    /// Forgets everything: the display was restored.
    pub(super) fn clear(&mut self) {
        *self = Fifo::new();
    }
}
