//! The socket between server and consumers: `SOCK_SEQPACKET`, at a path or at a name without a file.
//!
//! Nothing here waits, whatever the other side does: each call says so itself (`MSG_DONTWAIT`), for what both sides have open could be set
//! by either. Descriptors that come with a message belong to an [`OwnedFd`] from the first: those of a message that is refused are closed
//! with it.
//!
//! To close a descriptor can take for ever, if somebody else has chosen it: close(2) asks the file's owner to write back what it has
//! (`flush`), which for a file of FUSE is whatever program its sender runs. So a server takes none from consumers: it
//! [receives without room for them](Socket::receive), and the kernel lets go of them without that (scm_destroy in net/core/scm.c). What
//! remains is a file whose last close waits, as that of a TCP socket with `SO_LINGER`, or of any file that is in an epoll list which its
//! owner keeps from being left; so from Linux 6.16 on nobody can send it any ([`let_descriptors_come`]).

use std::fmt;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::PathBuf;
use std::ptr::NonNull;

use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, connect, sendmsg, socket,
};

use super::wire::{MAX_FDS, MAX_MESSAGE, Malformed, Message};

/// Where a server listens: a path, or a name in the abstract namespace (unix(7)), which any process of the same network namespace may try.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Place {
    Path(PathBuf),
    Abstract(String),
}

impl Place {
    /// `@name` is abstract; everything else is a path.
    pub(super) fn parse(text: &str) -> Place {
        match text.strip_prefix('@') {
            Some(name) => Place::Abstract(name.to_owned()),
            None => Place::Path(text.into()),
        }
    }

    pub(super) fn address(&self) -> nix::Result<UnixAddr> {
        match self {
            Place::Path(path) => UnixAddr::new(path),
            Place::Abstract(name) => UnixAddr::new_abstract(name.as_bytes()),
        }
    }
}

impl fmt::Display for Place {
    /// As a source is called.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Path(path) => write!(f, "unix:{}", path.display()),
            Place::Abstract(name) => write!(f, "unix:@{name}"),
        }
    }
}

/// A socket of the sort that is spoken through, which neither waits nor goes to other programs.
pub(super) fn open() -> nix::Result<OwnedFd> {
    socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, None)
}

/// `SO_PASSRIGHTS` of asm-generic/socket.h (Linux 6.16), which no crate offers.
const SO_PASSRIGHTS: libc::c_int = 83;

/// Whether others can send descriptors to this end (`SO_PASSRIGHTS`): who tries where they cannot gets `EPERM`. Connections have it from
/// the socket that listens (unix_stream_connect in net/unix/af_unix.c). Kernels before 6.16 let them come always.
///
/// # Errors
/// What `setsockopt` says.
pub(super) fn let_descriptors_come(fd: impl AsFd, come: bool) -> nix::Result<()> {
    let value = libc::c_int::from(come);
    // SAFETY: the kernel reads an `int` there, of which it is given the size.
    let set = unsafe {
        let len = size_of::<libc::c_int>() as libc::socklen_t;
        libc::setsockopt(fd.as_fd().as_raw_fd(), libc::SOL_SOCKET, SO_PASSRIGHTS, (&raw const value).cast(), len)
    };
    match Errno::result(set) {
        Err(Errno::ENOPROTOOPT) => Ok(()),
        other => other.map(drop),
    }
}

/// Why a packet was not taken.
#[derive(Debug, thiserror::Error)]
pub(super) enum Rejected {
    #[error("the socket failed: {0}")]
    Failed(#[from] io::Error),
    #[error("a message was no message: {0}")]
    Malformed(#[from] Malformed),
    #[error("a message is longer than {MAX_MESSAGE} bytes")]
    TooLong,
    #[error("a message came with {0} descriptors that do not belong to it")]
    Fds(usize),
    #[error("a message came with descriptors, and none may")]
    FdsUnwanted,
    #[error("the descriptors of a message could not be received; likely no descriptor is left here")]
    FdsLost,
}

/// What came.
#[derive(Debug)]
pub(super) enum Received {
    Nothing,
    /// The other side has hung up.
    Closed,
    Message(Message, Vec<OwnedFd>),
}

// `asm-generic/ioctls.h`: a number from before the scheme of numbers. (`SIOCOUTQ` is the same.)
nix::ioctl_read_bad!(outq, libc::TIOCOUTQ, libc::c_int);

/// One connection.
#[derive(Debug)]
pub(super) struct Socket(OwnedFd);

impl Socket {
    /// Connects; the server need not have accepted it.
    ///
    /// # Errors
    /// The errno: `ECONNREFUSED` if nobody listens, `EAGAIN` if too many connect at the moment.
    pub(super) fn connect(place: &Place) -> io::Result<Socket> {
        let fd = open()?;
        connect(fd.as_raw_fd(), &place.address()?)?;
        Ok(Socket(fd))
    }

    /// Sends a message whole, with descriptors.
    ///
    /// # Errors
    /// The errno: `EAGAIN` if the other side has not read so much, `EPIPE` if it is gone, `ETOOMANYREFS` if more descriptors are on their
    /// way than this user may have.
    pub(super) fn send(&self, message: &Message, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let bytes = message.encode();
        let raw: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control = if raw.is_empty() { &[][..] } else { &rights[..] };
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        loop {
            match sendmsg::<UnixAddr>(self.0.as_raw_fd(), &[IoSlice::new(&bytes)], control, flags, None) {
                Err(Errno::EINTR) => {}
                // A packet goes whole or not at all.
                other => return Ok(other.map(drop)?),
            }
        }
    }

    /// How much kernel memory those messages take that were sent and that the other side has not read: some hundred bytes each, and what
    /// they carry (`unix_outq_len`). One system call.
    ///
    /// # Errors
    /// The errno.
    pub(super) fn unread(&self) -> io::Result<u64> {
        let mut unread: libc::c_int = 0;
        // SAFETY: the call writes one int, to a live variable (`unix_ioctl` in net/unix/af_unix.c).
        unsafe { outq(self.0.as_raw_fd(), &mut unread) }?;
        Ok(u64::try_from(unread).unwrap_or(0))
    }

    /// Whether the other side has not read all that was sent to it. One system call.
    pub(super) fn is_unread(&self) -> bool {
        self.unread().is_ok_and(|bytes| bytes > 0)
    }

    /// The next message, with its descriptors if there is room for `fds`. Without, the kernel lets go of what comes, and not this by
    /// close(2): for who does not trust the other side, see the [module](self).
    ///
    /// # Errors
    /// [`Rejected`]; what came with it is gone.
    pub(super) fn receive(&self, fds: bool) -> std::result::Result<Received, Rejected> {
        let (mut bytes, room) = ([0; MAX_MESSAGE], fds);
        let reset = |error: &io::Error| error.raw_os_error() == Some(libc::ECONNRESET);
        let received = match receive(self.0.as_fd(), &mut bytes, room) {
            // The other side has hung up without reading all. That is told once and before what it has sent (sock_error in
            // __skb_try_recv_datagram), which comes now: the reason perhaps.
            Err(error) if reset(&error) => receive(self.0.as_fd(), &mut bytes, room),
            other => other,
        };
        let (len, flags, fds) = match received {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Received::Nothing),
            Err(error) if reset(&error) => return Ok(Received::Closed),
            other => other?,
        };
        if flags & libc::MSG_CTRUNC != 0 {
            return Err(if room { Rejected::FdsLost } else { Rejected::FdsUnwanted });
        }
        if flags & libc::MSG_TRUNC != 0 {
            return Err(Rejected::TooLong);
        }
        if len == 0 && fds.is_empty() {
            return Ok(Received::Closed);
        }
        let message = Message::decode(bytes.get(..len).unwrap_or_default())?;
        let fit = match message.fds() {
            Some(count) => fds.len() == count,
            None => (1..=MAX_FDS).contains(&fds.len()),
        };
        if fit { Ok(Received::Message(message, fds)) } else { Err(Rejected::Fds(fds.len())) }
    }
}

impl From<OwnedFd> for Socket {
    /// A connection that was accepted.
    fn from(fd: OwnedFd) -> Socket {
        Socket(fd)
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Words for the control data of one packet: it has no more than 253 descriptors (`SCM_MAX_FD` in include/net/scm.h), 1,032 bytes.
const CONTROL: usize = 160;

/// `recvmsg`: length, flags and descriptors of one packet, if there is room for `fds`. Not by `nix`, which gives no descriptor back of those that came where not all
/// could (`MSG_CTRUNC`, as when this process may have no more): they would stay open for ever.
fn receive(fd: BorrowedFd<'_>, bytes: &mut [u8], fds: bool) -> io::Result<(usize, libc::c_int, Vec<OwnedFd>)> {
    let mut control = [0_u64; CONTROL];
    let mut part = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    // SAFETY: a C structure of integers and pointers: zeroes are a value of it.
    let mut head: libc::msghdr = unsafe { std::mem::zeroed() };
    head.msg_iov = &mut part;
    head.msg_iovlen = 1;
    if fds {
        head.msg_control = control.as_mut_ptr().cast();
        head.msg_controllen = size_of_val(&control) as _;
    }
    let len = loop {
        // SAFETY: `head` names one part and the control data, both writable, as long as it says, and live across the call.
        match Errno::result(unsafe {
            libc::recvmsg(fd.as_raw_fd(), &mut head, libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC)
        }) {
            Err(Errno::EINTR) => {}
            other => break other?,
        }
    };
    let mut fds = Vec::new();
    // SAFETY: the kernel has filled `control` and said in `head` how much of it; it is aligned as its headers are (cmsg(3)).
    let mut next = unsafe { libc::CMSG_FIRSTHDR(&head) };
    while let Some(header) = NonNull::new(next) {
        // SAFETY: CMSG_FIRSTHDR and CMSG_NXTHDR only return headers that lie inside of the control data.
        let (level, kind, size) =
            unsafe { (header.as_ref().cmsg_level, header.as_ref().cmsg_type, header.as_ref().cmsg_len) };
        if level == libc::SOL_SOCKET && kind == libc::SCM_RIGHTS {
            // SAFETY: plain arithmetic on a header inside of the control data.
            let (data, before) = unsafe { (libc::CMSG_DATA(header.as_ptr()), libc::CMSG_LEN(0)) };
            // A length is a `size_t` with glibc, and 32 bits with musl.
            #[allow(clippy::unnecessary_cast)]
            let count = (size as usize).saturating_sub(before as usize) / size_of::<libc::c_int>();
            for index in 0..count {
                // SAFETY: the kernel has written so many descriptors behind the header (scm_detach_fds), which are new and nobody else's.
                fds.push(unsafe { OwnedFd::from_raw_fd(data.cast::<libc::c_int>().add(index).read_unaligned()) });
            }
        }
        // SAFETY: as for the first header.
        next = unsafe { libc::CMSG_NXTHDR(&head, header.as_ptr()) };
    }
    // Never negative: that was an error.
    Ok((usize::try_from(len).unwrap_or(0), head.msg_flags, fds))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::share::wire::Reason;
    use nix::sys::socket::socketpair;

    fn pair() -> (Socket, Socket) {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let (one, other) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap();
        (Socket(one), Socket(other))
    }

    /// The reading end of a pipe to send, and a way to see whether all of its writing ends are closed.
    fn tell_tale() -> (OwnedFd, impl Fn() -> bool) {
        let (reader, writer) = nix::unistd::pipe2(nix::fcntl::OFlag::O_NONBLOCK).unwrap();
        (writer, move || nix::unistd::read(&reader, &mut [0]) == Ok(0))
    }

    fn buffer() -> Message {
        Message::Buffer { generation: 1, index: 0, identity: 9 }
    }

    #[test]
    fn messages_come_whole_with_their_descriptors() {
        let (one, other) = pair();
        assert!(matches!(other.receive(true).unwrap(), Received::Nothing));
        let (fd, closed) = tell_tale();
        one.send(&buffer(), &[fd.as_fd()]).unwrap();
        let end = Message::End { reason: Reason::Ended, text: "x".into() };
        one.send(&end, &[]).unwrap();
        drop(fd);
        let Received::Message(message, fds) = other.receive(true).unwrap() else { unreachable!() };
        assert_eq!((message, fds.len(), closed()), (buffer(), 1, false));
        drop(fds);
        assert!(closed());
        let Received::Message(message, _) = other.receive(true).unwrap() else { unreachable!() };
        assert_eq!(message, end);
        drop(one);
        assert!(matches!(other.receive(true).unwrap(), Received::Closed));
        assert_eq!(other.send(&end, &[]).unwrap_err().raw_os_error(), Some(libc::EPIPE));
    }

    #[test]
    fn last_words_come_also_from_who_did_not_listen() {
        let (one, other) = pair();
        let end = Message::End { reason: Reason::Refused, text: "no".into() };
        other.send(&buffer(), &[]).unwrap();
        one.send(&end, &[]).unwrap();
        drop(one);
        let Received::Message(message, _) = other.receive(true).unwrap() else { unreachable!() };
        assert_eq!(message, end);
        assert!(matches!(other.receive(true).unwrap(), Received::Closed));
        let (one, other) = pair();
        other.send(&buffer(), &[]).unwrap();
        drop(one);
        assert!(matches!(other.receive(true).unwrap(), Received::Closed));
    }

    #[test]
    fn descriptors_of_what_is_rejected_are_closed() {
        let (one, other) = pair();
        let end = Message::End { reason: Reason::Ended, text: String::new() };
        let (long, short) = ([0; MAX_MESSAGE + 1], [1, 2, 3]);
        for case in 0..10 {
            let (fd, closed) = tell_tale();
            let raw = vec![fd.as_raw_fd(); if case / 2 == 4 { 253 } else { 5 }];
            let bytes = match case / 2 {
                0 => buffer().encode(),
                1 => end.encode(),
                2 => long.to_vec(),
                3 => Vec::new(),
                _ => short.to_vec(),
            };
            let control = [ControlMessage::ScmRights(&raw)];
            let flags = MsgFlags::empty();
            sendmsg::<UnixAddr>(one.0.as_raw_fd(), &[IoSlice::new(&bytes)], &control, flags, None).unwrap();
            drop(fd);
            other.receive(case % 2 == 0).unwrap_err();
            assert!(closed(), "{case}");
        }
    }

    #[test]
    fn nobody_waits_for_who_does_not_read() {
        let (one, _other) = pair();
        let full = (0..100_000).find_map(|_| one.send(&buffer(), &[]).err());
        assert_eq!(full.unwrap().kind(), io::ErrorKind::WouldBlock);
    }

    /// Whoever closes a descriptor by close(2) gives up this process's locks on its file (filp_close in fs/open.c, just after `flush`): so
    /// it can be seen that a descriptor never came here.
    #[test]
    fn descriptors_that_may_not_come_never_do() {
        use nix::fcntl::{FcntlArg, fcntl};
        let (one, other) = pair();
        let path = std::env::temp_dir().join(format!("dmaflow-flush-{}", std::process::id()));
        let [locked, sent, asks] = [(); 3].map(|()| {
            let mut options = std::fs::OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false).open(&path).unwrap()
        });
        std::fs::remove_file(&path).unwrap();
        let whole = |kind: i32| libc::flock { l_type: kind as _, l_whence: 0, l_start: 0, l_len: 0, l_pid: 0 };
        let is_locked = || {
            let mut lock = whole(libc::F_WRLCK);
            fcntl(&asks, FcntlArg::F_OFD_GETLK(&mut lock)).unwrap();
            i32::from(lock.l_type) == libc::F_WRLCK
        };
        fcntl(&locked, FcntlArg::F_SETLK(&whole(libc::F_WRLCK))).unwrap();
        assert!(is_locked());
        let end = Message::End { reason: Reason::Ended, text: String::new() };
        one.send(&end, &[sent.as_fd()]).unwrap();
        assert!(matches!(other.receive(false), Err(Rejected::FdsUnwanted)));
        assert!(is_locked(), "it was closed here");
        one.send(&end, &[sent.as_fd()]).unwrap();
        assert!(matches!(other.receive(true), Err(Rejected::Fds(1))));
        assert!(!is_locked(), "it was not: then this test shows nothing");
    }

    /// Nor by a queue that nobody reads, where the kernel can say so.
    #[test]
    fn where_descriptors_do_not_come_they_cannot_be_sent() {
        let (one, other) = pair();
        let (fd, closed) = tell_tale();
        let_descriptors_come(&other.0, false).unwrap();
        let sent = one.send(&buffer(), &[fd.as_fd()]);
        if let Err(error) = &sent {
            assert_eq!(error.raw_os_error(), Some(libc::EPERM));
        }
        drop(fd);
        // Linux before 6.16 lets it through, and here it ends.
        assert_eq!(other.receive(false).is_err(), sent.is_ok());
        assert!(closed());
        let_descriptors_come(&other.0, true).unwrap();
        let (fd, _closed) = tell_tale();
        one.send(&buffer(), &[fd.as_fd()]).unwrap();
        assert!(matches!(other.receive(true).unwrap(), Received::Message(..)));
    }
}
