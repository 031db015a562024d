//! The frames that wait for their turn when the newest is to be shown, and which of them that is while fences are open.
//!
//! A frame whose acquire fence has not signalled is not committed: a commit cannot be taken back, and every newer frame would have to
//! wait behind it. It is held here, and the newest frame that is ready is the one that is shown; those before it are dropped.
//!
//! Two are held at most. The first in line keeps its place until its fence signals or a newer frame is ready; of those behind it only the
//! newest stays. Were the first in line replaced as well, a device that takes longer for a picture than the time between two would
//! never have one shown: each would be dropped before it is done.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::error::{Context, Result};
use crate::frame::Frame;

/// See the [module](self).
#[derive(Debug, Default)]
pub(super) struct Mailbox {
    first: Option<Held>,
    /// Newer than the first, and not ready.
    newer: Option<Held>,
    dropped: u64,
}

#[derive(Debug)]
struct Held {
    frame: Frame,
    /// Since when its fence has been waited for; `None` for a frame that is ready.
    since: Option<Instant>,
}

impl Held {
    /// Whether it is ready now. A system call only while it was not.
    ///
    /// # Errors
    /// If the work that its fence stands for has failed.
    fn look(&mut self) -> Result<bool> {
        let done = match (self.since, self.frame.acquire_fence()) {
            (Some(_), Some(fence)) => fence.check()?,
            _ => true,
        };
        if done {
            self.since = None;
        }
        Ok(done)
    }
}

impl Mailbox {
    /// Adds a frame, newer than all before, whatever it returns. Without a fence no system call.
    ///
    /// # Errors
    /// If the work that the fence of a frame stands for has failed: that frame is dropped, whichever it is. The first of such failures.
    pub(super) fn put(&mut self, frame: Frame) -> Result<()> {
        // What has become ready meanwhile is not given up for one that is not.
        let looked = self.look();
        let since = frame.acquire_fence().map(|_| Instant::now());
        self.dropped += u64::from(self.newer.replace(Held { frame, since }).is_some());
        looked.and(self.look_at_newer())
    }

    /// Looks which frames are ready. Without fences no system call.
    ///
    /// # Errors
    /// As [`put`](Mailbox::put).
    pub(super) fn look(&mut self) -> Result<()> {
        let newer = self.look_at_newer();
        let first = self.first.as_mut().map_or(Ok(true), Held::look);
        if first.is_err() {
            self.drop_first();
        }
        newer.and(first.map(drop))
    }

    /// The newer frame is the first in line if it is ready, or nothing is before it.
    fn look_at_newer(&mut self) -> Result<()> {
        let Some(newer) = &mut self.newer else { return Ok(()) };
        match newer.look() {
            Ok(ready) if ready || self.first.is_none() => {
                let newer = self.newer.take();
                self.dropped += u64::from(std::mem::replace(&mut self.first, newer).is_some());
            }
            Ok(_) => {}
            Err(failed) => {
                self.newer = None;
                self.dropped += 1;
                return Err(failed);
            }
        }
        Ok(())
    }

    /// The first in line is not shown; the one behind it takes its place.
    fn drop_first(&mut self) {
        self.dropped += u64::from(self.first.is_some());
        self.first = self.newer.take();
    }

    /// How many frames were dropped: for newer ones, or because their fences failed or took too long.
    pub(super) fn dropped(&self) -> u64 {
        self.dropped
    }

    /// The frame to show next, if one is ready. What is behind it waits on.
    pub(super) fn take_ready(&mut self) -> Option<Frame> {
        let first = self.first.take_if(|first| first.since.is_none())?;
        self.first = self.newer.take();
        Some(first.frame)
    }

    /// Whether a frame is ready.
    pub(super) fn is_ready(&self) -> bool {
        self.first.as_ref().is_some_and(|first| first.since.is_none())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.first.is_none()
    }

    /// The fences that have not signalled as far as is known.
    pub(super) fn fences(&self) -> Vec<BorrowedFd<'_>> {
        let held = [&self.first, &self.newer].into_iter().flatten();
        let open = held.filter(|held| held.since.is_some());
        open.filter_map(|held| held.frame.acquire_fence()).map(AsFd::as_fd).collect()
    }

    /// What the first in line has left of `timeout`; `None` if it is ready, or there is none.
    pub(super) fn time_left(&self, timeout: Duration) -> Option<Duration> {
        let since = self.first.as_ref()?.since?;
        Some(timeout.saturating_sub(since.elapsed()))
    }

    /// # Errors
    /// If the first in line has waited longer than `timeout`: it is dropped.
    pub(super) fn check_time(&mut self, timeout: Duration) -> Result<()> {
        let Some(Held { frame, since: Some(since) }) = &self.first else { return Ok(()) };
        let waited = since.elapsed();
        if waited < timeout {
            return Ok(());
        }
        // It may have signalled since the last look, and is late all the same.
        let late = frame.acquire_fence().map_or(Ok(()), |fence| Err(fence.overdue(waited)));
        self.drop_first();
        late
    }

    /// Waits until a frame is ready, as long as the first in line has left of `timeout`.
    ///
    /// # Errors
    /// As [`look`](Mailbox::look) and [`check_time`](Mailbox::check_time): a frame was dropped, and there may be another to wait for. What
    /// `poll` says.
    pub(super) fn wait(&mut self, timeout: Duration) -> Result<()> {
        loop {
            self.look()?;
            let Some(left) = self.time_left(timeout) else { return Ok(()) };
            if left.is_zero() {
                return self.check_time(timeout);
            }
            let mut fds: Vec<_> = self.fences().into_iter().map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
            // Rounded up: the last millisecond is waited for as well.
            let step = PollTimeout::try_from(left.saturating_add(Duration::from_millis(1))).unwrap_or(PollTimeout::MAX);
            match poll(&mut fds, step) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno).context("wait for", || "the fences of frames"),
            }
        }
    }

    /// Gives up what is held; that counts as dropped.
    pub(super) fn clear(&mut self) {
        self.drop_first();
        self.drop_first();
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

    #[test]
    fn without_fences_the_newest_is_shown() {
        let mut mailbox = Mailbox::default();
        (0..4).for_each(|sequence| mailbox.put(frame(sequence)).unwrap());
        assert_eq!((mailbox.dropped(), next(&mut mailbox), next(&mut mailbox)), (3, Some(3), None));
        assert!(mailbox.is_empty() && mailbox.fences().is_empty());
    }

    #[test]
    fn an_open_fence_does_not_block_newer_frames() {
        let mut mailbox = Mailbox::default();
        let (held, _end) = open(0);
        mailbox.put(held).unwrap();
        assert!(!mailbox.is_ready() && !mailbox.is_empty() && mailbox.fences().len() == 1);
        mailbox.put(frame(1)).unwrap();
        assert_eq!((next(&mut mailbox), mailbox.is_empty(), mailbox.dropped()), (Some(1), true, 1));
    }

    /// A frame that is ready is not given up for one that is not.
    #[test]
    fn an_open_fence_does_not_drop_what_is_ready() {
        let mut mailbox = Mailbox::default();
        mailbox.put(frame(0)).unwrap();
        let (held, _end) = open(1);
        mailbox.put(held).unwrap();
        assert_eq!((next(&mut mailbox), next(&mut mailbox), mailbox.dropped()), (Some(0), None, 0));
        assert_eq!(mailbox.fences().len(), 1, "the other is first in line now");
    }

    /// Nor is one that became ready behind another that is not, and that nobody has looked at since. A pipe is no sync file, so here its
    /// signal is told as the failure of what it stands for: by then the frame has been looked at.
    #[test]
    fn a_frame_is_looked_at_before_it_is_replaced() {
        let mut mailbox = Mailbox::default();
        let ([(first, _first_end), (newer, end), (last, _last_end)], mut told) = ([0, 1, 2].map(open), Vec::new());
        mailbox.put(first).unwrap();
        mailbox.put(newer).unwrap();
        write(&end, b"x").unwrap();
        told.extend(mailbox.put(last).err());
        assert_eq!(told.len(), 1, "the newer was replaced without a look");
        assert_eq!((mailbox.fences().len(), mailbox.dropped()), (2, 1), "the last was put all the same");
    }

    /// What one frame's fence stands for fails: the others are neither lost nor left.
    #[test]
    fn a_failure_is_of_its_frame_alone() {
        let mut mailbox = Mailbox::default();
        mailbox.put(frame(0)).unwrap();
        let (held, end) = open(1);
        mailbox.put(held).unwrap();
        write(&end, b"x").unwrap();
        assert!(mailbox.look().is_err());
        assert_eq!((next(&mut mailbox), next(&mut mailbox), mailbox.dropped()), (Some(0), None, 1));
        // Both at once: one is told, both are counted.
        let (frames, ends): (Vec<_>, Vec<_>) = (2..4).map(open).unzip();
        frames.into_iter().for_each(|frame| mailbox.put(frame).unwrap());
        ends.iter().for_each(|end| assert_eq!(write(end, b"x").unwrap(), 1));
        assert!(mailbox.look().is_err() && mailbox.look().is_ok());
        assert_eq!((mailbox.is_empty(), mailbox.dropped()), (true, 3));
        // With the frame that comes: the failed one is another.
        let (held, end) = open(4);
        mailbox.put(held).unwrap();
        write(&end, b"x").unwrap();
        assert!(mailbox.put(frame(5)).is_err());
        assert_eq!((next(&mut mailbox), mailbox.dropped()), (Some(5), 4));
    }

    /// The end of a wait is any signal's, not the first in line's alone.
    #[test]
    fn the_wait_is_for_any() {
        let mut mailbox = Mailbox::default();
        let (frames, ends): (Vec<_>, Vec<_>) = (0..2).map(open).unzip();
        frames.into_iter().for_each(|frame| mailbox.put(frame).unwrap());
        let newer = std::thread::spawn({
            let end = ends[1].try_clone().unwrap();
            move || {
                std::thread::sleep(Duration::from_millis(20));
                write(&end, b"x").unwrap()
            }
        });
        let start = Instant::now();
        assert_eq!(mailbox.wait(Duration::from_secs(60)).unwrap_err().kind(), Kind::Unsupported);
        assert!(start.elapsed() < Duration::from_secs(30));
        newer.join().unwrap();
        assert_eq!((mailbox.fences().len(), mailbox.dropped()), (1, 1));
    }

    /// The first in line is not starved by those that come after it.
    #[test]
    fn the_first_in_line_keeps_its_place() {
        let mut mailbox = Mailbox::default();
        let (frames, ends): (Vec<_>, Vec<_>) = (0..5).map(open).unzip();
        frames.into_iter().for_each(|frame| mailbox.put(frame).unwrap());
        assert_eq!((mailbox.dropped(), mailbox.fences().len()), (3, 2));
        // A pipe is no sync file, so its signal is told as the failure of what it stands for: the first alone.
        write(&ends[0], b"x").unwrap();
        assert_eq!(mailbox.look().unwrap_err().kind(), Kind::Unsupported);
        mailbox.look().unwrap();
        assert_eq!(mailbox.fences().len(), 1, "the newest has taken its place");
        write(&ends[4], b"x").unwrap();
        assert_eq!(mailbox.look().unwrap_err().kind(), Kind::Unsupported);
        assert!(mailbox.is_empty());
        assert_eq!(mailbox.dropped(), 5, "every frame is accounted for");
    }

    #[test]
    fn a_fence_that_takes_too_long_is_an_error_once() {
        let mut mailbox = Mailbox::default();
        let (held, _end) = open(0);
        mailbox.put(held).unwrap();
        assert!(mailbox.time_left(Duration::from_secs(60)).unwrap() > Duration::from_secs(50));
        mailbox.check_time(Duration::from_secs(60)).unwrap();
        assert_eq!(mailbox.check_time(Duration::ZERO).unwrap_err().kind(), Kind::Timeout);
        assert!(mailbox.is_empty() && mailbox.time_left(Duration::ZERO).is_none());
        mailbox.check_time(Duration::ZERO).unwrap();
        let (held, _end) = open(1);
        mailbox.put(held).unwrap();
        assert_eq!(mailbox.wait(Duration::from_millis(5)).unwrap_err().kind(), Kind::Timeout);
        assert!(mailbox.is_empty());
        mailbox.wait(Duration::ZERO).unwrap();
        // Given up with the display.
        let frames: Vec<_> = [2, 3].map(open).into();
        frames.iter().for_each(|(frame, _)| mailbox.put(frame.clone()).unwrap());
        mailbox.clear();
        assert!(mailbox.is_empty());
        assert_eq!(mailbox.dropped(), 4);
    }
}
