//! How a receiver waits, and what it is woken for.
//!
//! Between two calls one of these holds, so that who waits for the descriptor is woken when a frame is there: the word that says "asleep" is
//! set since before the newest frame, and the server rings for the next one; or an event is pending. Whoever takes the events out of the list
//! ([`Receiver::listen`]) makes sure of it before it returns.

use super::*;
use crate::share::bell::UNREAD;
use crate::share::ring::ENTRIES;

/// Hears from now on what the server says and when it rings.
pub(super) fn listen(epoll: &Epoll, server: &Joined) -> nix::Result<()> {
    epoll.add(&server.socket, EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP, SOCKET))?;
    epoll.add(&server.bell, edge(BELL))
}

/// So often a frame may seem to be there that is none, as of a server that says so all the time, until that is left to the next call.
pub(super) const TRIES: usize = 2 * ENTRIES;

impl Receiver {
    /// An event comes at this time, and none before; none at all for `None`. A system call if that is not so yet.
    pub(super) fn set_alarm(&mut self, at_us: Option<u64>) -> Result<()> {
        let about = || self.name.as_str();
        let alarm = match (&mut self.alarm, at_us) {
            (None, None) => return Ok(()),
            (Some(alarm), _) => alarm,
            (empty, Some(_)) => {
                let timer = Timer::new().context("make a timer for", about)?;
                self.epoll
                    .add(&timer, EpollEvent::new(EpollFlags::EPOLLIN, ALARM))
                    .context("wait for", about)?;
                empty.insert(timer)
            }
        };
        if alarm.at_us() == at_us { Ok(()) } else { alarm.set(at_us).context("set the timer of", about) }
    }

    /// Says that this sleeps from now on. `false` if a frame is there: then it does not.
    pub(super) fn falls_asleep(&mut self) -> bool {
        if self.ring.woken >= UNREAD {
            self.server.bell.heard();
            self.ring.woken = 0;
        }
        self.ring.sleep()
    }

    /// Makes an event: somebody must call again who waits.
    pub(super) fn call_again(&self) -> Result<()> {
        self.again.write(1).map(drop).context("wait for", || self.name.as_str())
    }

    /// Waits for what is said or rung, and tells whether there was anything. One system call; and more for what the server has said.
    pub(super) fn listen(&mut self, time: EpollTimeout) -> Result<bool> {
        let mut events = [EpollEvent::empty(); 4];
        let count = match self.epoll.wait(&mut events, time) {
            // As good as an event: who waits looks again.
            Err(Errno::EINTR) => return Ok(true),
            other => other.context("wait for", || self.name.as_str())?,
        };
        if events.iter().take(count).any(|event| event.data() == SOCKET) {
            self.hear();
        }
        Ok(count > 0)
    }

    /// The same for so many ms, and no longer than until a release fence has signalled: what that keeps is to be given back then. Two system
    /// calls if there is one.
    fn wait_for_events(&mut self, ms: u64) -> Result<()> {
        let fences = self.release_fences();
        if fences.is_empty() {
            return self.listen(EpollTimeout::try_from(ms).unwrap_or(EpollTimeout::MAX)).map(drop);
        }
        let all = std::iter::once(self.as_fd()).chain(fences.iter().map(|fence| fence.as_fd()));
        let mut fds: Vec<_> = all.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
        match poll(&mut fds, PollTimeout::try_from(ms).unwrap_or(PollTimeout::MAX)) {
            Ok(_) | Err(Errno::EINTR) => self.listen(EpollTimeout::ZERO).map(drop),
            Err(errno) => Err(errno).context("wait for", || self.name.as_str()),
        }
    }

    /// The next frame, waited for: for programs that wait for nothing else. `None` if the time is up. Others wait for the descriptor
    /// together with what else they wait for, and call [`try_next`](Source::try_next); they may use both.
    ///
    /// Cost: none that is a system call if a frame is there, one if it has to be waited for; a second one if another is there by then.
    ///
    /// # Errors
    /// As [`try_next`](Source::try_next).
    pub fn next_within(&mut self, time: Duration) -> Result<Option<Frame>> {
        let mut listened = false;
        let next = self.wait_next(time, &mut listened);
        // The events that told of this frame are gone. A frame that waits to be followed is in no entry of the ring.
        if listened && (self.next.is_some() || !self.falls_asleep()) {
            self.call_again()?;
        }
        next
    }

    fn wait_next(&mut self, time: Duration, listened: &mut bool) -> Result<Option<Frame>> {
        let until = now_us().saturating_add(u64::try_from(time.as_micros()).unwrap_or(u64::MAX));
        let mut tries = 0;
        loop {
            self.give_back()?;
            if let Some(frame) = self.found()? {
                return Ok(Some(frame));
            }
            if !self.falls_asleep() {
                // The server may have seen that this slept, or not.
                *listened = true;
                tries += 1;
                if tries >= TRIES && now_us() >= until {
                    return Ok(None);
                }
                continue;
            }
            self.ended()?;
            let left = until.saturating_sub(now_us());
            if left == 0 {
                return Ok(None);
            }
            *listened = true;
            self.wait_for_events(left.div_ceil(1000))?;
        }
    }
}
