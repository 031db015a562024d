//! How a side that sleeps is woken: an eventfd, rung by a write and never read.
//!
//! It stays readable once it was rung, so whoever waits for it does so edge-triggered (`EPOLLET`): each write is an event of its own, also
//! while the count is above zero (`eventfd_write` wakes its waiters every time).
//!
//! Whoever holds a descriptor of an eventfd can make its writers block: `O_NONBLOCK` is a property of what both sides have open, and can be
//! cleared by either, and a count that is full lets nobody write. So the server, which may wait for no consumer, keeps the eventfds that it
//! rings to itself and gives away a [`BellWatch`] of each: an epoll descriptor that is readable when the bell was rung. Through it nobody
//! gets at the eventfd.
//!
//! Of the bell that consumers ring the server has made the eventfd, and each consumer gets that: a hostile server can make its consumers
//! wait when they ring. They depend on it for their frames in any case; who cannot afford that writes to it from a thread of its own.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::eventfd::{EfdFlags, EventFd};

/// The side that rings.
#[derive(Debug)]
pub(super) struct Bell(OwnedFd);

/// What the side that sleeps gets of another's bell; to be polled edge-triggered.
#[derive(Debug)]
pub(super) struct BellWatch(OwnedFd);

impl Bell {
    /// # Errors
    /// What `eventfd2` says: no descriptor left.
    pub(super) fn new() -> io::Result<Bell> {
        Ok(Bell(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?.into()))
    }

    /// One that another process has made.
    pub(super) fn from_fd(fd: OwnedFd) -> Bell {
        Bell(fd)
    }

    /// Wakes who waits for it: one system call, which does not wait. A count that is full was rung before and says so still.
    ///
    /// # Errors
    /// What `write` says of a descriptor that is no eventfd.
    pub(super) fn ring(&self) -> io::Result<()> {
        loop {
            match nix::unistd::write(&self.0, &1u64.to_ne_bytes()) {
                Ok(_) | Err(Errno::EAGAIN) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// What to give to the side that sleeps. It works for as long as this bell is open.
    ///
    /// # Errors
    /// What `epoll_create1` and `epoll_ctl` say.
    pub(super) fn watch(&self) -> io::Result<BellWatch> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(&self.0, EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, 0))?;
        Ok(BellWatch(epoll.0))
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsFd for BellWatch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::epoll::EpollTimeout;

    /// How many events there are for who waits as the two sides do: in a list of its own, which another one waits for.
    fn waiting(fd: impl AsFd) -> impl FnMut() -> (usize, usize) {
        let (inner, outer) = ([(); 2].map(|()| Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap())).into();
        inner
            .add(fd, EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, 0))
            .unwrap();
        outer.add(&inner.0, EpollEvent::new(EpollFlags::EPOLLIN, 0)).unwrap();
        move || {
            let count = |epoll: &Epoll| epoll.wait(&mut [EpollEvent::empty(); 4], EpollTimeout::ZERO).unwrap();
            (count(&outer), count(&inner))
        }
    }

    #[test]
    fn each_ring_is_heard_once_and_nothing_need_be_read() {
        let bell = Bell::new().unwrap();
        let watch = bell.watch().unwrap();
        let mut by_watch = waiting(&watch);
        let mut by_bell = waiting(&bell);
        for _ in 0..3 {
            assert_eq!((by_watch(), by_bell()), ((0, 0), (0, 0)));
            bell.ring().unwrap();
            bell.ring().unwrap();
            assert_eq!((by_watch(), by_bell()), ((1, 1), (1, 1)));
        }
        assert_eq!((by_watch(), by_bell()), ((0, 0), (0, 0)));
    }

    #[test]
    fn a_full_bell_does_not_make_its_ringer_wait() {
        let bell = Bell::new().unwrap();
        nix::unistd::write(&bell, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        bell.ring().unwrap();
        // What is no eventfd at all.
        assert!(Bell::from_fd(std::fs::File::open("/dev/null").unwrap().into()).ring().is_err());
    }

    #[test]
    fn through_a_watch_nobody_gets_at_the_bell() {
        let watch = Bell::new().unwrap().watch().unwrap();
        assert_eq!(nix::unistd::write(&watch, &[0; 8]), Err(Errno::EINVAL));
    }
}
