//! Waiting for whatever comes first: a frame, a display's event, the order to stop, or the end of the time.
//!
//! By epoll, which keeps its list in the kernel. `poll` would enter and leave the wait queue of each descriptor, and ask each of
//! them twice, for every frame. For the same reason the time is a timer's, and not `epoll_wait`'s: that would start a timer for
//! every frame and stop it again, which is a tenth of what the wait costs, where the time is up once in seconds or never.

use std::io;
use std::iter;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use crate::clock::now_us;
use crate::endpoint::Ready;
use crate::fence::SyncFile;
use crate::timer::Timer;

const SOURCE: u64 = 0;
const STOP: u64 = 1;
const SINK: u64 = 2;
const TIME: u64 = 3;

/// What came.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Wake {
    pub source: Option<Ready>,
    pub stop: bool,
    pub sink: bool,
    /// A fence that the sink waits for has signalled, or has taken too long.
    pub fence: bool,
}

/// Fences to wait for besides.
#[derive(Default)]
pub(super) struct Fences<'a> {
    /// The sink's, each of which is something for it to handle.
    pub sink: Vec<BorrowedFd<'a>>,
    /// The source's: the wait ends, and what is free is given back before the next.
    pub source: Vec<Arc<SyncFile>>,
}

impl Fences<'_> {
    fn is_none(&self) -> bool {
        self.sink.is_empty() && self.source.is_empty()
    }
}

/// The descriptors to wait for. The kernel forgets one of them when it is closed.
pub(super) struct Waiter {
    /// Source, stop and timer: while the sink has nothing to say that matters before the next frame.
    without_sink: Epoll,
    /// The same and the sink's; none if it has none. A second list costs nothing while it is not used, and changing one would be
    /// a system call each time.
    with_sink: Option<Epoll>,
    /// Goes off never later than the time waited for, and often earlier: that time moves on with every frame, and the timer follows when
    /// it has gone off for nothing.
    timer: Timer,
}

impl Waiter {
    /// # Errors
    /// What `epoll_create1`, `timerfd_create` and `epoll_ctl` say: no descriptor left, or one that cannot be waited for.
    pub(super) fn new(
        source: impl AsFd,
        stop: Option<BorrowedFd<'_>>,
        sink: Option<BorrowedFd<'_>>,
    ) -> io::Result<Waiter> {
        let timer = Timer::new()?;
        let list = |sink: Option<BorrowedFd<'_>>| -> io::Result<Epoll> {
            let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
            epoll.add(&source, EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLPRI, SOURCE))?;
            for (fd, name) in [(stop, STOP), (sink, SINK), (Some(timer.as_fd()), TIME)] {
                if let Some(fd) = fd {
                    epoll.add(fd, EpollEvent::new(EpollFlags::EPOLLIN, name))?;
                }
            }
            Ok(epoll)
        };
        let (without_sink, with_sink) = (list(None)?, sink.map(|sink| list(Some(sink))).transpose()?);
        Ok(Waiter { without_sink, with_sink, timer })
    }

    /// Waits until a time in µs of `CLOCK_MONOTONIC`, for ever without one, for the sink only if asked to: one system call, and one more
    /// with fences. `None` when the time is up; an empty [`Wake`] when a signal came, or a fence of the source has signalled.
    ///
    /// # Errors
    /// What `epoll_wait`, `timerfd_settime` and `poll` say.
    pub(super) fn wait(&mut self, until_us: Option<u64>, sink: bool, fences: &Fences<'_>) -> io::Result<Option<Wake>> {
        loop {
            if let Some(until) = until_us
                && self.timer.at_us().is_none_or(|set| until < set)
            {
                self.timer.set(Some(until))?;
            }
            let (wake, timer) = match fences.is_none() {
                true => self.wait_once(sink, EpollTimeout::NONE)?,
                false => self.wait_with(sink, fences)?,
            };
            // A sink may have something to say all the time: that does not put the end of the time off.
            let for_sink = Wake { sink: wake.sink, ..Wake::default() };
            if wake != for_sink || !timer {
                return Ok(Some(wake));
            }
            match until_us {
                Some(until) if now_us() < until => self.timer.set(Some(until))?,
                Some(_) => return Ok(None),
                // It was set for an earlier wait.
                None => self.timer.set(None)?,
            }
            if wake.sink {
                return Ok(Some(wake));
            }
        }
    }

    /// As [`wait_once`](Waiter::wait_once), also until a fence has signalled. A fence is waited for once and no more: to put it on the list
    /// and take it off would be two calls.
    fn wait_with(&self, sink: bool, fences: &Fences<'_>) -> io::Result<(Wake, bool)> {
        let source = fences.source.iter().map(|fence| fence.as_fd());
        let list = iter::once(self.list(sink).0.as_fd());
        let all = fences.sink.iter().copied().chain(source).chain(list);
        let mut fds: Vec<_> = all.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) => {}
            Err(Errno::EINTR) => return Ok((Wake::default(), false)),
            Err(errno) => return Err(errno.into()),
        }
        let mut ready = fds.iter().map(|fd| fd.any().unwrap_or(false));
        // Each asked for, not only until one is found: they are told apart by their places.
        let fence = ready.by_ref().take(fences.sink.len()).fold(false, |any, ready| any | ready);
        let given_back = ready.by_ref().take(fences.source.len()).fold(false, |any, ready| any | ready);
        let (wake, timer) = match ready.next() {
            Some(true) => self.wait_once(sink, EpollTimeout::ZERO)?,
            _ => (Wake::default(), false),
        };
        // What a fence of the source gives back goes before the end of the time.
        Ok((Wake { fence, ..wake }, timer && !given_back))
    }

    fn list(&self, sink: bool) -> &Epoll {
        self.with_sink.as_ref().filter(|_| sink).unwrap_or(&self.without_sink)
    }

    /// What came, and whether the timer has gone off.
    fn wait_once(&self, sink: bool, timeout: EpollTimeout) -> io::Result<(Wake, bool)> {
        let mut events = [EpollEvent::empty(); 4];
        let count = match self.list(sink).wait(&mut events, timeout) {
            Ok(count) => count,
            Err(Errno::EINTR) => 0,
            Err(errno) => return Err(errno.into()),
        };
        let (mut wake, mut timer) = (Wake::default(), false);
        for event in events.iter().take(count) {
            match event.data() {
                SOURCE => wake.source = Some(ready(event.events())),
                STOP => wake.stop = true,
                TIME => timer = true,
                _ => wake.sink = true,
            }
        }
        Ok((wake, timer))
    }
}

fn ready(events: EpollFlags) -> Ready {
    Ready {
        frame: events.contains(EpollFlags::EPOLLIN),
        event: events.contains(EpollFlags::EPOLLPRI),
        failed: events.intersects(EpollFlags::EPOLLERR | EpollFlags::EPOLLHUP),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::unistd::{pipe, read, write};

    fn wait(waiter: &mut Waiter, until_us: Option<u64>, sink: bool) -> io::Result<Option<Wake>> {
        waiter.wait(until_us, sink, &Fences::default())
    }

    #[test]
    fn each_descriptor_is_told_apart() {
        let [source, stop, sink] = [0; 3].map(|_| pipe().unwrap());
        let mut waiter = Waiter::new(&source.0, Some(stop.0.as_fd()), Some(sink.0.as_fd())).unwrap();
        assert_eq!(wait(&mut waiter, Some(0), true).unwrap(), None);
        write(&sink.1, b"x").unwrap();
        assert_eq!(wait(&mut waiter, None, true).unwrap(), Some(Wake { sink: true, ..Wake::default() }));
        assert_eq!(wait(&mut waiter, Some(0), true).unwrap(), None, "who always says something does not stop the time");
        assert_eq!(wait(&mut waiter, Some(0), false).unwrap(), None, "nobody asked for the sink");
        write(&stop.1, b"x").unwrap();
        assert_eq!(wait(&mut waiter, None, true).unwrap(), Some(Wake { sink: true, stop: true, ..Wake::default() }));
        write(&source.1, b"x").unwrap();
        assert_eq!(wait(&mut waiter, None, true).unwrap().unwrap().source, Some(Ready::FRAME));
    }

    #[test]
    fn fences_end_the_wait() {
        let [source, sink, acquire, release] = [0; 4].map(|_| pipe().unwrap());
        let mut waiter = Waiter::new(&source.0, None, Some(sink.0.as_fd())).unwrap();
        let held = Arc::new(SyncFile::from(release.0));
        let fences = Fences { sink: vec![acquire.0.as_fd()], source: vec![held] };
        assert_eq!(waiter.wait(Some(0), true, &fences).unwrap(), None);
        write(&release.1, b"x").unwrap();
        assert_eq!(waiter.wait(None, true, &fences).unwrap(), Some(Wake::default()), "nothing for the sink");
        write(&acquire.1, b"x").unwrap();
        assert_eq!(waiter.wait(None, true, &fences).unwrap(), Some(Wake { fence: true, ..Wake::default() }));
        write(&source.1, b"x").unwrap();
        let wake = Wake { source: Some(Ready::FRAME), fence: true, ..Wake::default() };
        assert_eq!(waiter.wait(None, true, &fences).unwrap(), Some(wake));
    }

    /// The time is up with open fences too; one that has signalled goes before it.
    #[test]
    fn fences_and_the_time() {
        let [source, release] = [0; 2].map(|_| pipe().unwrap());
        let mut waiter = Waiter::new(&source.0, None, None).unwrap();
        let fences = Fences { sink: Vec::new(), source: vec![Arc::new(SyncFile::from(release.0))] };
        for after_us in [20_000, 60_000, 10_000] {
            let start = now_us();
            assert_eq!(waiter.wait(Some(start + after_us), true, &fences).unwrap(), None);
            let took = now_us() - start;
            assert!((after_us..after_us + 5_000_000).contains(&took), "{took} µs for {after_us}");
        }
        write(&release.1, b"x").unwrap();
        assert_eq!(waiter.wait(Some(0), true, &fences).unwrap(), Some(Wake::default()));
    }

    #[test]
    fn the_time_is_up_when_it_was_said_and_no_sooner() {
        let source = pipe().unwrap();
        let mut waiter = Waiter::new(&source.0, None, None).unwrap();
        // The second moves on, as with every frame: the timer goes off at the first time, for nothing. The third is earlier
        // than the timer's.
        for after_us in [20_000, 60_000, 10_000] {
            write(&source.1, b"x").unwrap();
            let start = now_us();
            let until = Some(start + after_us);
            assert!(
                wait(&mut waiter, until, true).unwrap().unwrap().source.is_some(),
                "what came goes before the time"
            );
            read(&source.0, &mut [0]).unwrap();
            assert_eq!(wait(&mut waiter, until, true).unwrap(), None);
            let took = now_us() - start;
            assert!((after_us..after_us + 5_000_000).contains(&took), "{took} µs for {after_us}");
        }
        // Of a wait for ever the timer is no part, though it is still past its time.
        write(&source.1, b"x").unwrap();
        assert!(wait(&mut waiter, None, true).unwrap().is_some());
    }

    #[test]
    fn a_source_that_is_gone_has_failed() {
        let (source, end) = pipe().unwrap();
        let mut waiter = Waiter::new(&source, None, None).unwrap();
        drop(end);
        assert!(wait(&mut waiter, None, true).unwrap().unwrap().source.unwrap().failed);
    }
}
