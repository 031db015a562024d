//! Showing every frame without waiting for each: what is on its way, and when what was on its way came on screen.
//!
//! A commit that does not wait is refused with `EBUSY` while an earlier one is on its way, and "currently no driver" keeps a queue
//! of them (`drm_mode_config_funcs.atomic_commit` in drm_mode_config.h; `stall_checks` in drm_atomic_helper.c). So the commit of
//! one frame that is accepted says that the frame before is on screen, and its event need not be read for that. Events are read
//! many at a time, for the times that they carry. A frame whose commit waited came on screen at the last vertical blank before the
//! return. That time follows from an earlier event's and the mode's refresh, so most such commits need no event. (A driver that
//! cleans up for longer than a period makes it late by whole periods: vkms, when it composes slowly and somebody reads its CRCs.)
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

/// So long is an event's time good for the times of later flips: a pixel clock is right to a fraction of a thousandth, and modes of
/// 60 or 59.94 Hz are told apart by their refresh.
const FOLLOWS_US: u64 = 1_000_000;

/// The frames submitted whose flip events have not been read, and those shown that have not been told of.
#[derive(Debug)]
pub(super) struct Fifo {
    unread: VecDeque<FrameMeta>,
    shown: VecDeque<Shown>,
    read_at_us: u64,
    /// The newest flip whose event has been read, in µs of `CLOCK_MONOTONIC`; 0 if there is none.
    flipped_us: u64,
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
            flipped_us: 0,
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

    /// Whether a commit that waits is to have an event: only that would say when its frame came on screen.
    pub(super) fn wants_event(&self) -> bool {
        now_us().saturating_sub(self.flipped_us) >= FOLLOWS_US
    }

    /// A frame was committed, with an event or without, by a commit that has waited until the frame is on screen. `period_us` is
    /// the time from one flip to the next.
    ///
    /// # Errors
    /// What `read` says.
    pub(super) fn arrived(&mut self, card: &Card, meta: FrameMeta, event: bool, period_us: u64) -> Result<()> {
        let now = now_us();
        if event {
            self.submitted(meta);
        }
        // They are all there: those frames are on screen, or were.
        if !self.all_read() {
            self.read(card)?;
        }
        if !event {
            let at_us = flip_before(self.flipped_us, period_us, now);
            self.shown.push_back(Shown { meta, at_us });
        }
        Ok(())
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
        let due = || now_us().saturating_sub(self.read_at_us) >= READ_AFTER_US;
        if !self.all_read() && (self.unread.len() >= READ_AFTER || due()) {
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
            self.flipped_us = flip.at_us;
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

/// The last time before `now` at which a flip can have been, one having been at `flipped`; all in µs.
fn flip_before(flipped: u64, period: u64, now: u64) -> u64 {
    // A flip may come sooner than the refresh says: what is as near as that is not a whole period away.
    let since = now.saturating_sub(flipped) + period / 50;
    (flipped + since / period * period).min(now)
}

#[cfg(test)]
mod tests {
    use super::flip_before;

    #[test]
    fn a_flip_is_whole_periods_after_another() {
        let before = |now| flip_before(1_000_000, 16_667, now);
        assert_eq!(before(1_000_000), 1_000_000);
        assert_eq!(before(1_010_000), 1_000_000);
        assert_eq!(before(1_018_000), 1_016_667, "the commit returned late");
        assert_eq!(before(1_016_600), 1_016_600, "a little sooner than expected is not the flip before");
        assert_eq!(before(1_000_000 + 60 * 16_667 + 1), 1_000_000 + 60 * 16_667);
        // Without an earlier flip, as good as nothing is known: the time of the return.
        assert_eq!(flip_before(0, 1, 5_000_000), 5_000_000);
        assert_eq!(flip_before(2_000_000, 16_667, 1_999_990), 1_999_990, "a time stamp may lie ahead of the clock");
    }
}
