//! Waiting for whatever comes first: a frame, a display's event, or the order to stop.
//!
//! By epoll, which keeps its list in the kernel. `poll` would enter and leave the wait queue of each descriptor, and ask each of
//! them twice, for every frame.

use std::io;
use std::iter;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use crate::endpoint::Ready;
use crate::fence::SyncFile;

const SOURCE: u64 = 0;
const STOP: u64 = 1;
const SINK: u64 = 2;

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

    /// Waits, for ever without a timeout, for the sink only if asked to: one system call, and one more with fences. `None` when the time
    /// is up; an empty [`Wake`] when a signal came, or a fence of the source has signalled.
    ///
    /// # Errors
    /// What `epoll_wait` and `poll` say.
    pub(super) fn wait(&self, timeout: Option<Duration>, sink: bool, fences: &Fences<'_>) -> io::Result<Option<Wake>> {
        let list = self.with_sink.as_ref().filter(|_| sink).unwrap_or(&self.without_sink);
        // Rounded up: a wait that is too short would be taken for a stall.
        let timeout = timeout.map(|time| time.saturating_add(Duration::from_millis(1)));
        if fences.sink.is_empty() && fences.source.is_empty() {
            let timeout =
                timeout.map_or(EpollTimeout::NONE, |time| EpollTimeout::try_from(time).unwrap_or(EpollTimeout::MAX));
            return Waiter::look(list, timeout);
        }
        // A fence is waited for once and no more: to put it on the list and take it off would be two calls.
        let source = fences.source.iter().map(|fence| fence.as_fd());
        let all = iter::once(list.0.as_fd()).chain(fences.sink.iter().copied()).chain(source);
        let mut fds: Vec<_> = all.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
        let timeout = timeout.map_or(PollTimeout::NONE, |time| PollTimeout::try_from(time).unwrap_or(PollTimeout::MAX));
        match poll(&mut fds, timeout) {
            Ok(0) => return Ok(None),
            Ok(_) => {}
            Err(Errno::EINTR) => return Ok(Some(Wake::default())),
            Err(errno) => return Err(errno.into()),
        }
        let ready = |fd: &PollFd<'_>| fd.any().unwrap_or(false);
        let fence = fds.iter().skip(1).take(fences.sink.len()).any(ready);
        let wake = match fds.first().is_some_and(ready) {
            true => Waiter::look(list, EpollTimeout::ZERO)?.unwrap_or_default(),
            false => Wake::default(),
        };
        Ok(Some(Wake { fence, ..wake }))
    }

    fn look(list: &Epoll, timeout: EpollTimeout) -> io::Result<Option<Wake>> {
        let mut events = [EpollEvent::empty(); 3];
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
        assert_eq!(waiter.wait(Some(Duration::ZERO), true, &Fences::default()).unwrap(), None);
        write(&sink.1, b"x").unwrap();
        assert_eq!(waiter.wait(None, true, &Fences::default()).unwrap(), Some(Wake { sink: true, ..Wake::default() }));
        assert_eq!(
            waiter.wait(Some(Duration::ZERO), false, &Fences::default()).unwrap(),
            None,
            "nobody asked for the sink"
        );
        write(&stop.1, b"x").unwrap();
        assert_eq!(
            waiter.wait(None, true, &Fences::default()).unwrap(),
            Some(Wake { sink: true, stop: true, ..Wake::default() })
        );
        write(&source.1, b"x").unwrap();
        assert_eq!(waiter.wait(None, true, &Fences::default()).unwrap().unwrap().source, Some(Ready::FRAME));
    }

    #[test]
    fn fences_end_the_wait() {
        let [source, sink, acquire, release] = [0; 4].map(|_| pipe().unwrap());
        let waiter = Waiter::new(&source.0, None, Some(sink.0.as_fd())).unwrap();
        let held = Arc::new(SyncFile::from(release.0));
        let fences = Fences { sink: vec![acquire.0.as_fd()], source: vec![held] };
        assert_eq!(waiter.wait(Some(Duration::ZERO), true, &fences).unwrap(), None);
        write(&release.1, b"x").unwrap();
        assert_eq!(waiter.wait(None, true, &fences).unwrap(), Some(Wake::default()), "nothing for the sink");
        write(&acquire.1, b"x").unwrap();
        assert_eq!(waiter.wait(None, true, &fences).unwrap(), Some(Wake { fence: true, ..Wake::default() }));
        write(&source.1, b"x").unwrap();
        let wake = Wake { source: Some(Ready::FRAME), fence: true, ..Wake::default() };
        assert_eq!(waiter.wait(None, true, &fences).unwrap(), Some(wake));
    }

    #[test]
    fn a_source_that_is_gone_has_failed() {
        let (source, end) = pipe().unwrap();
        let waiter = Waiter::new(&source, None, None).unwrap();
        drop(end);
        assert!(
            waiter
                .wait(None, true, &Fences::default())
                .unwrap()
                .unwrap()
                .source
                .unwrap()
                .failed
        );
    }
}
