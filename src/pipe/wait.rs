//! Waiting for whatever comes first: a frame, a display's event, or the order to stop.
//!
//! By epoll, which keeps its list in the kernel. `poll` would enter and leave the wait queue of each descriptor, and ask each of
//! them twice, for every frame.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use crate::endpoint::Ready;

const SOURCE: u64 = 0;
const STOP: u64 = 1;
const SINK: u64 = 2;

/// What came.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Wake {
    pub source: Option<Ready>,
    pub stop: bool,
    pub sink: bool,
}

/// The descriptors to wait for. The kernel forgets one of them when it is closed.
pub(super) struct Waiter {
    /// Source and stop: while the sink has nothing to say that matters before the next frame.
    without_sink: Epoll,
    /// The same and the sink's; none if it has none. A second list costs nothing while it is not used, and changing one would be
    /// a system call each time.
    with_sink: Option<Epoll>,
}

impl Waiter {
    /// # Errors
    /// What `epoll_create1` and `epoll_ctl` say: no descriptor left, or one that cannot be waited for.
    pub(super) fn new(
        source: impl AsFd,
        stop: Option<BorrowedFd<'_>>,
        sink: Option<BorrowedFd<'_>>,
    ) -> io::Result<Waiter> {
        let list = |sink: Option<BorrowedFd<'_>>| -> io::Result<Epoll> {
            let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
            epoll.add(&source, EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLPRI, SOURCE))?;
            for (fd, name) in [(stop, STOP), (sink, SINK)] {
                if let Some(fd) = fd {
                    epoll.add(fd, EpollEvent::new(EpollFlags::EPOLLIN, name))?;
                }
            }
            Ok(epoll)
        };
        Ok(Waiter { without_sink: list(None)?, with_sink: sink.map(|sink| list(Some(sink))).transpose()? })
    }

    /// Waits, for ever without a timeout, for the sink only if asked to: one system call. `None` when the time is up; an empty [`Wake`] when a signal came.
    ///
    /// # Errors
    /// What `epoll_wait` says.
    pub(super) fn wait(&self, timeout: Option<Duration>, sink: bool) -> io::Result<Option<Wake>> {
        // Rounded up: a wait that is too short would be taken for a stall.
        let timeout = timeout.map_or(EpollTimeout::NONE, |time| {
            EpollTimeout::try_from(time + Duration::from_millis(1)).unwrap_or(EpollTimeout::MAX)
        });
        let mut events = [EpollEvent::empty(); 3];
        let list = self.with_sink.as_ref().filter(|_| sink).unwrap_or(&self.without_sink);
        let count = match list.wait(&mut events, timeout) {
            Ok(0) => return Ok(None),
            Ok(count) => count,
            Err(Errno::EINTR) => 0,
            Err(errno) => return Err(errno.into()),
        };
        let mut wake = Wake::default();
        for event in events.iter().take(count) {
            match event.data() {
                SOURCE => wake.source = Some(ready(event.events())),
                STOP => wake.stop = true,
                _ => wake.sink = true,
            }
        }
        Ok(Some(wake))
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
    use nix::unistd::{pipe, write};

    #[test]
    fn each_descriptor_is_told_apart() {
        let [source, stop, sink] = [0; 3].map(|_| pipe().unwrap());
        let waiter = Waiter::new(&source.0, Some(stop.0.as_fd()), Some(sink.0.as_fd())).unwrap();
        assert_eq!(waiter.wait(Some(Duration::ZERO), true).unwrap(), None);
        write(&sink.1, b"x").unwrap();
        assert_eq!(waiter.wait(None, true).unwrap(), Some(Wake { sink: true, ..Wake::default() }));
        assert_eq!(waiter.wait(Some(Duration::ZERO), false).unwrap(), None, "nobody asked for the sink");
        write(&stop.1, b"x").unwrap();
        assert_eq!(waiter.wait(None, true).unwrap(), Some(Wake { sink: true, stop: true, source: None }));
        write(&source.1, b"x").unwrap();
        assert_eq!(waiter.wait(None, true).unwrap().unwrap().source, Some(Ready::FRAME));
    }

    #[test]
    fn a_source_that_is_gone_has_failed() {
        let (source, end) = pipe().unwrap();
        let waiter = Waiter::new(&source, None, None).unwrap();
        drop(end);
        assert!(waiter.wait(None, true).unwrap().unwrap().source.unwrap().failed);
    }
}
