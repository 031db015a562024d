//! What a server does besides giving frames: it hears its consumers, and does what is a matter of time.

use nix::errno::Errno;
use nix::sys::epoll::{EpollEvent, EpollTimeout};

use super::*;

impl Server {
    /// What waits for a time: connections without a hello, the listener, the source. Nothing does with nearly every frame.
    #[inline]
    pub(super) fn tend(&mut self, now: u64) -> Result<()> {
        let timed = self.paused_until_us.is_some() || self.timer.at_us().is_some() || self.untold;
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
        if next == self.timer.at_us() { Ok(()) } else { self.set_timer(next) }
    }

    fn set_timer(&mut self, at_us: Option<u64>) -> Result<()> {
        self.timer.set(at_us).context("set the timer of", || self.name.as_str())
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
                TIMER => self.set_timer(None)?,
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
