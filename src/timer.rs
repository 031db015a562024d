//! A timer that is a descriptor, for who waits for several things at once.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

/// Readable from the time on that it is set to, until it is set again (timerfd_setup in fs/timerfd.c): nobody need read it.
#[derive(Debug)]
pub(crate) struct Timer {
    fd: TimerFd,
    at_us: Option<u64>,
}

impl Timer {
    /// One that is not set.
    ///
    /// # Errors
    /// What `timerfd_create` says: no descriptor left.
    pub(crate) fn new() -> nix::Result<Timer> {
        let flags = TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK;
        Ok(Timer { fd: TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?, at_us: None })
    }

    /// What it is set to, in µs of `CLOCK_MONOTONIC`, gone off or not.
    pub(crate) fn at_us(&self) -> Option<u64> {
        self.at_us
    }

    /// Sets it to a time in µs of `CLOCK_MONOTONIC`, or to none. It has not gone off then, unless that time is past. One system call.
    ///
    /// # Errors
    /// What `timerfd_settime` says; it is as before.
    pub(crate) fn set(&mut self, at_us: Option<u64>) -> nix::Result<()> {
        match at_us {
            Some(at) => {
                // A time of 0 would stop it.
                let at = TimeSpec::from_duration(Duration::from_micros(at.max(1)));
                self.fd.set(Expiration::OneShot(at), TimerSetTimeFlags::TFD_TIMER_ABSTIME)?;
            }
            None => self.fd.unset()?,
        }
        self.at_us = at_us;
        Ok(())
    }
}

impl AsFd for Timer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;
    use crate::clock::now_us;
    use nix::poll::{PollFd, PollFlags, poll};

    fn has_gone_off(timer: &Timer, ms: u16) -> bool {
        poll(&mut [PollFd::new(timer.as_fd(), PollFlags::POLLIN)], ms).unwrap() == 1
    }

    #[test]
    fn it_goes_off_once_set_and_not_before() {
        let mut timer = Timer::new().unwrap();
        assert!(timer.at_us().is_none() && !has_gone_off(&timer, 0));
        let at = now_us() + 20_000;
        timer.set(Some(at)).unwrap();
        assert!(has_gone_off(&timer, 10_000) && now_us() >= at && timer.at_us() == Some(at));
        assert!(has_gone_off(&timer, 0), "it stays so");
        timer.set(Some(now_us() + 3_600_000_000)).unwrap();
        assert!(!has_gone_off(&timer, 0));
        // A time that is past, the beginning of time too.
        timer.set(Some(0)).unwrap();
        assert!(has_gone_off(&timer, 10_000));
        timer.set(None).unwrap();
        assert!(timer.at_us().is_none() && !has_gone_off(&timer, 0));
    }
}
