//! How a side that sleeps is woken: by a byte through a pair of stream sockets (socketpair(2)), of which each side has one end.
//!
//! The server makes the pair and gives one end away with the welcome. It is rung by sending a byte, whatever byte, where the other side has
//! said that it sleeps (`ring.rs`), and once for that. Who sleeps waits for its end to be readable; edge-triggered (`EPOLLET`), it need not
//! read each time, for each byte that comes is an event of its own: it reads when it has been woken so often that the other side could find
//! no room ([`UNREAD`]). A consumer that has rung more often than it has given frames back, or that closes its end, is disconnected.
//!
//! Not an eventfd, which both sides would have open: whoever has that can make the other wait. `O_NONBLOCK` is a property of what is open
//! and not of who has it; a count that is full lets nobody write; and the last close of a file waits for every epoll list that it is in
//! (`eventpoll_release_file` in fs/eventpoll.c), also for another process's, which can keep its list from being left for as long as it
//! likes. The end of a socket that is kept here nobody else has. (The end that is given away the server has as well until it has sent it.)

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, getsockopt, recv, send, setsockopt, socketpair, sockopt,
};

use super::socket::let_descriptors_come;

/// So often one may have been woken before it reads: each byte takes the room of some hundreds in the kernel (`SKB_TRUESIZE`), of 208 KiB
/// (net.core.wmem_default).
pub(super) const UNREAD: u32 = 64;

/// One end.
#[derive(Debug)]
pub(super) struct Bell(OwnedFd);

impl Bell {
    /// A pair: the end that is kept, by which no descriptors come, and the one that is given away.
    ///
    /// # Errors
    /// What `socketpair` says: no descriptor left.
    pub(super) fn pair() -> io::Result<(Bell, OwnedFd)> {
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC)?;
        let_descriptors_come(&ours, false)?;
        // What is sent by MSG_OOB is a ring as well: else it would wake who waits, and not be counted (manage_oob in net/unix/af_unix.c).
        setsockopt(&ours, sockopt::OobInline, &true)?;
        Ok((Bell(ours), theirs))
    }

    /// The end that another process has given away.
    ///
    /// # Errors
    /// `EINVAL` for what is no Unix stream socket: to write to that could take for ever.
    pub(super) fn from_fd(fd: OwnedFd) -> io::Result<Bell> {
        // `ENOTSOCK` for what is none.
        let unix = nix::sys::socket::getsockname::<nix::sys::socket::UnixAddr>(fd.as_raw_fd()).is_ok();
        if !unix || getsockopt(&fd, sockopt::SockType)? != SockType::Stream {
            return Err(Errno::EINVAL.into());
        }
        let_descriptors_come(&fd, false)?;
        Ok(Bell(fd))
    }

    /// Wakes who waits at the other end: one system call, which does not wait. If there is no room for another ring the other side has
    /// not read many that it was woken by, against the rules; and one that is gone needs none.
    ///
    /// # Errors
    /// What `send` says of a descriptor that is no such socket.
    pub(super) fn ring(&self) -> io::Result<()> {
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        loop {
            match send(self.0.as_raw_fd(), &[1], flags) {
                Ok(_) | Err(Errno::EAGAIN | Errno::EPIPE | Errno::ECONNRESET) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// How often it was rung since this was asked, 4096 at most: more may be there then. None if the other end is closed, or says nothing
    /// any more: then it is readable for ever. One system call, which does not wait. Descriptors that came along are let go of by the kernel.
    pub(super) fn heard(&self) -> Option<usize> {
        loop {
            match recv(self.0.as_raw_fd(), &mut [0; 4096], MsgFlags::MSG_DONTWAIT) {
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Some(0),
                Ok(0) | Err(_) => return None,
                Ok(count) => return Some(count),
            }
        }
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

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
    fn each_ring_is_an_event_and_need_not_be_read() {
        let (ours, theirs) = Bell::pair().unwrap();
        let theirs = Bell::from_fd(theirs).unwrap();
        let (mut here, mut there) = (waiting(&ours), waiting(&theirs));
        for _ in 0..UNREAD / 2 {
            assert_eq!((here(), there()), ((0, 0), (0, 0)));
            ours.ring().unwrap();
            ours.ring().unwrap();
            assert_eq!((here(), there()), ((0, 0), (1, 1)));
            theirs.ring().unwrap();
            assert_eq!((here(), there()), ((1, 1), (0, 0)));
        }
        assert_eq!((ours.heard(), theirs.heard()), (Some(UNREAD as usize / 2), Some(UNREAD as usize)));
        assert_eq!((ours.heard(), theirs.heard()), (Some(0), Some(0)));
    }

    #[test]
    fn who_rings_does_not_wait_for_who_does_not_read() {
        let (ours, theirs) = Bell::pair().unwrap();
        for _ in 0..10_000 {
            ours.ring().unwrap();
        }
        drop(theirs);
        ours.ring().unwrap();
        assert_eq!(ours.heard(), None);
    }

    #[test]
    fn what_could_make_its_ringer_wait_is_no_bell() {
        let flags = SockFlag::SOCK_CLOEXEC;
        let (packets, _end) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap();
        let (pipe, _other) = nix::unistd::pipe().unwrap();
        let file = std::fs::File::open("/dev/null").unwrap();
        let inet = nix::sys::socket::socket(AddressFamily::Inet, SockType::Stream, flags, None).unwrap();
        for fd in [packets, pipe, file.into(), inet] {
            assert!(Bell::from_fd(fd).is_err());
        }
    }
}
