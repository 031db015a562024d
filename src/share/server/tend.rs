//! What a server does besides giving frames: it hears its consumers, and does what is a matter of time.

use nix::errno::Errno;
use nix::sys::epoll::{EpollEvent, EpollTimeout};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{Expiration, TimerSetTimeFlags};

use super::*;

impl Server {
    /// What waits for a time: connections without a hello, the listener, the source. Nothing does with nearly every frame.
    #[inline]
    pub(super) fn tend(&mut self, now: u64) -> Result<()> {
        let timed = self.paused_until_us.is_some() || self.armed_us.is_some() || self.untold;
        let nothing = self.waiting.is_empty() && !timed && self.passing.is_none();
        if nothing && !self.is_short() { Ok(()) } else { self.tend_what_waits(now) }
    }

    #[cold]
    fn tend_what_waits(&mut self, now: u64) -> Result<()> {
        self.waiting.retain(|waiting| waiting.until_us > now);
        if self.paused_until_us.is_some_and(|until| until <= now) {
            self.paused_until_us = None;
            self.listen(true);
        }
        let untold = self.tell_again(now);
        let short = self.relieve(now);
        let waiting = self.waiting.iter().map(|waiting| waiting.until_us).min();
        let next = [short, waiting, untold, self.paused_until_us].into_iter().flatten().min();
        if next == self.armed_us {
            return Ok(());
        }
        let set = match next {
            Some(at) => {
                // A time of 0 would stop it.
                let at = TimeSpec::from_duration(Duration::from_micros(at.max(1)));
                self.timer.set(Expiration::OneShot(at), TimerSetTimeFlags::TFD_TIMER_ABSTIME)
            }
            None => self.timer.unset(),
        };
        set.context("set the timer of", || self.name.as_str())?;
        self.armed_us = next;
        Ok(())
    }

    pub(super) fn look(&mut self) -> Result<()> {
        let mut events = [EpollEvent::empty(); 64];
        let count = match self.epoll.wait(&mut events, EpollTimeout::ZERO) {
            Err(Errno::EINTR) => 0,
            other => other.context("wait for", || self.name.as_str())?,
        };
        let now = now_us();
        self.looked_us = now;
        for event in events.iter().take(count) {
            match event.data() {
                LISTENER => self.accept(now),
                // It is set anew, or stopped, which also says that it was heard (timerfd_setup in fs/timerfd.c).
                TIMER => self.armed_us = Some(0),
                token if token % 2 == 0 => self.hear(token),
                bell => {
                    let consumer = self.consumers.iter_mut().find(|consumer| consumer.token + 1 == bell);
                    let Some(consumer) = consumer else { continue };
                    let token = consumer.token;
                    if let Err(lost) = consumer.heard() {
                        self.lose(token, lost);
                    }
                }
            }
        }
        self.tend(now)
    }
}
