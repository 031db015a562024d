//! The frames that wait for their turn when the newest is to be shown, and which of them that is while fences are open.
//!
//! A frame whose acquire fence has not signalled is not committed: a commit cannot be taken back, and every newer frame would have to
//! wait behind it. It is held here, and the newest frame that is ready is the one that is shown; those before it are dropped, also those
//! that are not ready, which would come after a newer picture.
//!
//! Every such frame is held, however many there are. To drop one would free nothing: until its fence has signalled its buffer is not
//! filled again, and so is with the device that writes there, whoever holds the frame. And were one replaced by a newer one that is not
//! ready either, a device that takes longer for a picture than the time between two would never have one shown: each would be dropped
//! before it is done. So of the buffers that no other device is busy with, frames with fences take no more than others do: one is on
//! screen, one on its way, and one ready.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::error::{Context, Error, Result};
use crate::frame::Frame;

/// See the [module](self).
#[derive(Debug, Default)]
pub(super) struct Mailbox {
    /// The oldest first. One that is ready comes before all that are not, and is alone.
    held: VecDeque<Held>,
    dropped: u64,
}

#[derive(Debug)]
struct Held {
    frame: Frame,
    /// Since when its fence has been waited for; `None` for a frame that is ready.
    since: Option<Instant>,
}

impl Mailbox {
    /// Adds a frame, newer than all before. Without a fence no system call. What [`look`](Mailbox::look) returns.
    pub(super) fn put(&mut self, frame: Frame) -> Vec<Error> {
        let since = frame.acquire_fence().map(|_| Instant::now());
        self.held.push_back(Held { frame, since });
        self.look()
    }

    /// Looks which frames are ready. Without fences neither a system call nor an allocation; else one call, and two for each fence that
    /// has signalled.
    ///
    /// Returned is an error for each frame whose fence stands for work that has failed, and which is dropped for it.
    pub(super) fn look(&mut self) -> Vec<Error> {
        let mut failed = Vec::new();
        if self.held.iter().any(|held| held.since.is_some()) && self.poll(PollTimeout::ZERO).unwrap_or(true) {
            let dropped = &mut self.dropped;
            self.held.retain_mut(|held| {
                let Held { frame, since: since @ Some(_) } = held else { return true };
                match frame.acquire_fence().map_or(Ok(true), |fence| fence.check()) {
                    Ok(true) => *since = None,
                    Ok(false) => {}
                    Err(error) => {
                        failed.push(error);
                        *dropped += 1;
                        return false;
                    }
                }
                true
            });
        }
        if let Some(newest) = self.held.iter().rposition(|held| held.since.is_none()) {
            self.dropped += newest as u64;
            self.held.drain(..newest);
        }
        failed
    }

    /// How many frames were dropped: for newer ones, or because their fences failed or took too long.
    pub(super) fn dropped(&self) -> u64 {
        self.dropped
    }

    /// The frame to show next, if one is ready. What is newer waits on.
    pub(super) fn take_ready(&mut self) -> Option<Frame> {
        match self.is_ready() {
            true => self.held.pop_front().map(|held| held.frame),
            false => None,
        }
    }

    /// Whether a frame is ready.
    pub(super) fn is_ready(&self) -> bool {
        self.held.front().is_some_and(|first| first.since.is_none())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// The fences that have not signalled as far as is known.
    pub(super) fn fences(&self) -> Vec<BorrowedFd<'_>> {
        let open = self.held.iter().filter(|held| held.since.is_some());
        open.filter_map(|held| held.frame.acquire_fence()).map(AsFd::as_fd).collect()
    }

    /// What the oldest of those fences has left of `timeout`; `None` if there is none.
    pub(super) fn time_left(&self, timeout: Duration) -> Option<Duration> {
        let since = self.held.iter().find_map(|held| held.since)?;
        Some(timeout.saturating_sub(since.elapsed()))
    }

    /// Drops the frames whose fences have been waited for longer than `timeout`. Returned is an error for each.
    pub(super) fn check_time(&mut self, timeout: Duration) -> Vec<Error> {
        let mut late = Vec::new();
        self.held.retain(|held| {
            let (Some(since), Some(fence)) = (held.since, held.frame.acquire_fence()) else { return true };
            let waited = since.elapsed();
            // It may have signalled since the last look, and is late all the same.
            if waited >= timeout {
                late.push(fence.overdue(waited));
            }
            waited < timeout
        });
        self.dropped += late.len() as u64;
        late
    }

    /// Waits until a frame is ready, or was dropped for its fence, as long as the oldest has left of `timeout`. What
    /// [`look`](Mailbox::look) or [`check_time`](Mailbox::check_time) returns, or what `poll` says: there may be more to wait for.
    pub(super) fn wait(&mut self, timeout: Duration) -> Vec<Error> {
        loop {
            let failed = self.look();
            if !failed.is_empty() || self.is_ready() {
                return failed;
            }
            let Some(left) = self.time_left(timeout) else { return Vec::new() };
            if left.is_zero() {
                return self.check_time(timeout);
            }
            // Rounded up: the last millisecond is waited for as well.
            let step = PollTimeout::try_from(left.saturating_add(Duration::from_millis(1))).unwrap_or(PollTimeout::MAX);
            if let Err(error) = self.poll(step) {
                return vec![error];
            }
        }
    }

    /// Whether one of the open fences has signalled within this time; not if a signal came.
    fn poll(&self, timeout: PollTimeout) -> Result<bool> {
        let mut fds: Vec<_> = self.fences().into_iter().map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
        match poll(&mut fds, timeout) {
            Ok(ready) => Ok(ready > 0),
            Err(Errno::EINTR) => Ok(false),
            Err(errno) => Err(errno).context("wait for", || "the fences of frames"),
        }
    }

    /// Gives up what is held; that counts as dropped.
    pub(super) fn clear(&mut self) {
        self.dropped += self.held.len() as u64;
        self.held.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;
    use crate::fence::SyncFile;
    use crate::format::{Format, Layout};
    use crate::frame::{Buffer, FrameMeta, FreeSlot, Room, Slots};
    use crate::memory::Allocator;
    use nix::unistd::{pipe, write};
    use std::os::fd::OwnedFd;

    fn frame(sequence: u32) -> Frame {
        let layout = Layout::packed(Format::parse("GREY").unwrap().0, (8, 8), 1).unwrap();
        let buffer = Buffer::allocate(Allocator::Plain, &layout, &Room::default()).unwrap();
        let slots = Slots::new(1);
        slots.take_free().for_each(FreeSlot::queued);
        Frame::new(buffer, FrameMeta { sequence, ..FrameMeta::default() }, Slots::dequeued(&slots, 0).unwrap())
    }

    /// With a fence that never signals, as far as this test can wait: a pipe is open as a fence is.
    fn open(sequence: u32) -> (Frame, OwnedFd) {
        let (read, end) = pipe().unwrap();
        (frame(sequence).with_acquire_fence(SyncFile::from(read)), end)
    }

    fn next(mailbox: &mut Mailbox) -> Option<u32> {
        mailbox.take_ready().map(|frame| frame.meta().sequence)
    }

    fn put(mailbox: &mut Mailbox, frame: Frame) {
        assert!(mailbox.put(frame).is_empty(), "nothing has failed");
    }

    /// A pipe is no sync file, so its signal is told as the failure of what it stands for.
    fn signal(end: &OwnedFd) {
        assert_eq!(write(end, b"x").unwrap(), 1);
    }

    #[test]
    fn without_fences_the_newest_is_shown() {
        let mut mailbox = Mailbox::default();
        (0..4).for_each(|sequence| put(&mut mailbox, frame(sequence)));
        assert_eq!((mailbox.dropped(), next(&mut mailbox), next(&mut mailbox)), (3, Some(3), None));
        assert!(mailbox.is_empty() && mailbox.fences().is_empty());
    }

    #[test]
    fn an_open_fence_does_not_block_newer_frames() {
        let mut mailbox = Mailbox::default();
        let (held, _end) = open(0);
        put(&mut mailbox, held);
        assert!(!mailbox.is_ready() && !mailbox.is_empty() && mailbox.fences().len() == 1);
        put(&mut mailbox, frame(1));
        assert_eq!((next(&mut mailbox), mailbox.is_empty(), mailbox.dropped()), (Some(1), true, 1));
    }

    /// A frame that is ready is not given up for ones that are not, and they are not for each other.
    #[test]
    fn an_open_fence_drops_nothing() {
        let mut mailbox = Mailbox::default();
        put(&mut mailbox, frame(0));
        let (frames, _ends): (Vec<_>, Vec<_>) = (1..6).map(open).unzip();
        frames.into_iter().for_each(|frame| put(&mut mailbox, frame));
        assert_eq!((next(&mut mailbox), next(&mut mailbox), mailbox.dropped()), (Some(0), None, 0));
        assert_eq!(mailbox.fences().len(), 5);
        // One that is ready goes before all of them.
        put(&mut mailbox, frame(6));
        assert_eq!((next(&mut mailbox), mailbox.is_empty(), mailbox.dropped()), (Some(6), true, 5));
    }

    /// What one frame's fence stands for fails: the others are neither lost nor left.
    #[test]
    fn a_failure_is_of_its_frame_alone() {
        let mut mailbox = Mailbox::default();
        put(&mut mailbox, frame(0));
        let (frames, ends): (Vec<_>, Vec<_>) = (1..5).map(open).unzip();
        frames.into_iter().for_each(|frame| put(&mut mailbox, frame));
        signal(&ends[1]);
        let failed = mailbox.look();
        assert_eq!((failed.len(), mailbox.fences().len(), mailbox.dropped()), (1, 3, 1));
        assert!(mailbox.look().is_empty(), "told once");
        // Two at once: each is told and counted.
        signal(&ends[0]);
        signal(&ends[3]);
        assert_eq!((mailbox.look().len(), mailbox.fences().len(), mailbox.dropped()), (2, 1, 3));
        assert_eq!((next(&mut mailbox), next(&mut mailbox)), (Some(0), None));
        // With the frame that comes: the failed one is another.
        signal(&ends[2]);
        assert_eq!(mailbox.put(frame(5)).len(), 1);
        assert_eq!((next(&mut mailbox), mailbox.is_empty(), mailbox.dropped()), (Some(5), true, 4));
    }

    /// The end of a wait is any signal's, not the oldest frame's alone.
    #[test]
    fn the_wait_is_for_any() {
        let mut mailbox = Mailbox::default();
        let (frames, ends): (Vec<_>, Vec<_>) = (0..3).map(open).unzip();
        frames.into_iter().for_each(|frame| put(&mut mailbox, frame));
        let newer = std::thread::spawn({
            let end = ends[2].try_clone().unwrap();
            move || {
                std::thread::sleep(Duration::from_millis(20));
                write(&end, b"x").unwrap()
            }
        });
        let start = Instant::now();
        let failed = mailbox.wait(Duration::from_secs(60));
        assert_eq!(failed.iter().map(Error::kind).collect::<Vec<_>>(), [Kind::Unsupported]);
        assert!(start.elapsed() < Duration::from_secs(30));
        newer.join().unwrap();
        assert_eq!((mailbox.fences().len(), mailbox.dropped()), (2, 1));
    }

    #[test]
    fn a_fence_that_takes_too_long_is_an_error_once() {
        let mut mailbox = Mailbox::default();
        let (held, _end) = open(0);
        put(&mut mailbox, held);
        assert!(mailbox.time_left(Duration::from_secs(60)).unwrap() > Duration::from_secs(50));
        assert!(mailbox.check_time(Duration::from_secs(60)).is_empty());
        let kinds = |late: Vec<Error>| late.iter().map(Error::kind).collect::<Vec<_>>();
        assert_eq!(kinds(mailbox.check_time(Duration::ZERO)), [Kind::Timeout]);
        assert!(mailbox.is_empty() && mailbox.time_left(Duration::ZERO).is_none());
        assert!(mailbox.check_time(Duration::ZERO).is_empty());
        let (held, _end) = open(1);
        put(&mut mailbox, held);
        assert_eq!(kinds(mailbox.wait(Duration::from_millis(5))), [Kind::Timeout]);
        assert!(mailbox.is_empty() && mailbox.wait(Duration::ZERO).is_empty());
        // Each has its own time, and one that is ready is not late.
        put(&mut mailbox, frame(2));
        let frames: Vec<_> = [3, 4].map(open).into();
        put(&mut mailbox, frames[0].0.clone());
        std::thread::sleep(Duration::from_millis(30));
        put(&mut mailbox, frames[1].0.clone());
        assert_eq!(kinds(mailbox.check_time(Duration::from_millis(30))), [Kind::Timeout]);
        assert_eq!((next(&mut mailbox), mailbox.fences().len(), mailbox.dropped()), (Some(2), 1, 3));
        // Given up with the display.
        put(&mut mailbox, frames[0].0.clone());
        mailbox.clear();
        assert!(mailbox.is_empty());
        assert_eq!(mailbox.dropped(), 5);
    }
}
