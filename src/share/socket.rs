//! The socket between server and consumers: `SOCK_SEQPACKET`, at a path or at a name without a file.
//!
//! Nothing here waits, whatever the other side does: each call says so itself (`MSG_DONTWAIT`), for what both sides have open could be set
//! by either. Descriptors that come with a message belong to an [`OwnedFd`] from the first: those of a message that is refused are closed
//! with it.

use std::fmt;
use std::fs;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::libc;
use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, accept4, bind, connect,
    getsockname, getsockopt, listen, sendmsg, socket, sockopt,
};
use nix::sys::stat::{Mode, fchmod};

use super::wire::{MAX_FDS, MAX_MESSAGE, Malformed, Message};
use crate::error::{Context, Error, Kind, Result};

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

    fn address(&self) -> nix::Result<UnixAddr> {
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

fn open() -> nix::Result<OwnedFd> {
    socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, None)
}

/// Who is at the other end, as the kernel noted it when it connected (`SO_PEERCRED`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Peer {
    pub pid: u32,
    pub uid: u32,
    pub gid: u32,
}

/// Waits for connections. The socket's file goes when this does.
#[derive(Debug)]
pub(super) struct Listener {
    fd: OwnedFd,
    /// The file, its device and its inode.
    file: Option<(PathBuf, u64, u64)>,
}

impl Listener {
    /// Begins to listen. The file never has a wider mode than `mode`: nobody can connect before this listens, and it listens only when mode
    /// and group are set. The file of a server that is gone is replaced.
    ///
    /// # Errors
    /// [`Kind::Busy`] if another server listens there, or something else is there; what the system says.
    pub(super) fn bind(place: &Place, mode: u32, group: Option<u32>) -> Result<Listener> {
        let about = || place.to_string();
        let address = place.address().context("listen at", about)?;
        let fd = open().context("listen at", about)?;
        let Place::Path(path) = place else {
            match bind(fd.as_raw_fd(), &address) {
                Err(Errno::EADDRINUSE) => return Err(occupied(place)),
                other => other.context("listen at", about)?,
            }
            listen(&fd, Backlog::MAXCONN).context("listen at", about)?;
            return Ok(Listener { fd, file: None });
        };
        remove_stale(place, path)?;
        // The file gets the mode of the socket, less the umask (unix_bind_bsd in net/unix/af_unix.c).
        fchmod(&fd, Mode::S_IRUSR | Mode::S_IWUSR).context("set the mode of", about)?;
        match bind(fd.as_raw_fd(), &address) {
            Err(Errno::EADDRINUSE) => return Err(occupied(place)),
            other => other.context("listen at", about)?,
        }
        let made = fs::symlink_metadata(path).context("look at", about)?;
        // From here on the file goes with this, whatever fails.
        let listener = Listener { fd, file: Some((path.clone(), made.dev(), made.ino())) };
        if group.is_some() {
            chown(path, None, group).context("set the group of", about)?;
        }
        fs::set_permissions(path, fs::Permissions::from_mode(mode & 0o777)).context("set the mode of", about)?;
        listen(&listener.fd, Backlog::MAXCONN).context("listen at", about)?;
        Ok(listener)
    }

    /// Takes over a socket that listens already, as a service manager passes it. Its file is not this process's to remove.
    ///
    /// # Errors
    /// [`Kind::Invalid`] for what is no listening socket of this sort; what the system says.
    pub(super) fn inherit(fd: OwnedFd) -> Result<(Listener, Place)> {
        let about = || "a socket that was passed on";
        let not = |why: &str| Error::new(Kind::Invalid, "listen at", about()).because(why.to_owned());
        let address = getsockname::<UnixAddr>(fd.as_raw_fd()).map_err(|_| not("it is no Unix socket"))?;
        let kind = getsockopt(&fd, sockopt::SockType).context("look at", about)?;
        let listens = getsockopt(&fd, sockopt::AcceptConn).context("look at", about)?;
        if kind != SockType::SeqPacket || !listens {
            let error = not("it does not listen for SOCK_SEQPACKET connections");
            return Err(error.repair("in the unit: ListenSequentialPacket=, and Accept=no"));
        }
        let place = match (address.path(), address.as_abstract()) {
            (Some(path), _) => Place::Path(path.to_owned()),
            (None, Some(name)) => Place::Abstract(String::from_utf8_lossy(name).into_owned()),
            (None, None) => return Err(not("it has no name")),
        };
        let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL).context("look at", about)?);
        fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK)).context("set up", about)?;
        fcntl(&fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).context("set up", about)?;
        Ok((Listener { fd, file: None }, place))
    }

    /// The next connection, if one waits.
    ///
    /// # Errors
    /// What `accept4` says: no descriptor left.
    pub(super) fn accept(&self) -> io::Result<Option<(Socket, Peer)>> {
        let fd = loop {
            match accept4(self.fd.as_raw_fd(), SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK) {
                // Who was first has hung up already.
                Err(Errno::EINTR | Errno::ECONNABORTED) => {}
                Err(Errno::EAGAIN) => return Ok(None),
                Err(errno) => return Err(errno.into()),
                Ok(fd) => break fd,
            }
        };
        // SAFETY: the call succeeded, so its result is a new descriptor that nobody else owns.
        let socket = Socket(unsafe { OwnedFd::from_raw_fd(fd) });
        let peer = socket.peer()?;
        Ok(Some((socket, peer)))
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let Some((path, device, inode)) = &self.file else { return };
        // Not another server's, that was put in its place.
        let ours = fs::symlink_metadata(path).is_ok_and(|there| (there.dev(), there.ino()) == (*device, *inode));
        if ours {
            // Nobody can act on a failure here; the next server finds it stale.
            let _ = fs::remove_file(path);
        }
    }
}

fn occupied(place: &Place) -> Error {
    Error::new(Kind::Busy, "listen at", place.to_string())
        .because("another server listens there")
        .repair("end it, or choose another place")
}

/// Takes the file of a server that is gone away: one that nobody listens at.
fn remove_stale(place: &Place, path: &Path) -> Result<()> {
    let about = || place.to_string();
    let there = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other.context("look at", about)?,
    };
    if !there.file_type().is_socket() {
        let error = Error::new(Kind::Busy, "listen at", about()).because("a file is there that is no socket");
        return Err(error.repair("choose another place"));
    }
    let fd = open().context("look at", about)?;
    match connect(fd.as_raw_fd(), &place.address().context("look at", about)?) {
        Err(Errno::ECONNREFUSED) => fs::remove_file(path).context("replace", about),
        // EAGAIN: more want to connect than the server has let in. EPROTOTYPE: a socket of another type, of whoever.
        Ok(()) | Err(Errno::EAGAIN | Errno::EPROTOTYPE) => Err(occupied(place)),
        Err(errno) => Err(errno).context("look at", about),
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

    fn peer(&self) -> io::Result<Peer> {
        let peer = getsockopt(&self.0, sockopt::PeerCredentials)?;
        // No process is one of another pid namespace.
        Ok(Peer { pid: peer.pid().cast_unsigned(), uid: peer.uid(), gid: peer.gid() })
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

    /// The next message with its descriptors.
    ///
    /// # Errors
    /// [`Rejected`]; what came with it is closed.
    pub(super) fn receive(&self) -> std::result::Result<Received, Rejected> {
        let mut bytes = [0; MAX_MESSAGE];
        let reset = |error: &io::Error| error.raw_os_error() == Some(libc::ECONNRESET);
        let received = match receive(self.0.as_fd(), &mut bytes) {
            // The other side has hung up without reading all. That is told once and before what it has sent (sock_error in
            // __skb_try_recv_datagram), which comes now: the reason perhaps.
            Err(error) if reset(&error) => receive(self.0.as_fd(), &mut bytes),
            other => other,
        };
        let (len, flags, fds) = match received {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Received::Nothing),
            Err(error) if reset(&error) => return Ok(Received::Closed),
            other => other?,
        };
        if flags & libc::MSG_CTRUNC != 0 {
            return Err(Rejected::FdsLost);
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

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Words for the control data of one packet: it has no more than 253 descriptors (`SCM_MAX_FD` in include/net/scm.h), 1,032 bytes.
const CONTROL: usize = 160;

/// `recvmsg`: length, flags and descriptors of one packet. Not by `nix`, which gives no descriptor back of those that came where not all
/// could (`MSG_CTRUNC`, as when this process may have no more): they would stay open for ever.
fn receive(fd: BorrowedFd<'_>, bytes: &mut [u8]) -> io::Result<(usize, libc::c_int, Vec<OwnedFd>)> {
    let mut control = [0_u64; CONTROL];
    let mut part = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    // SAFETY: a C structure of integers and pointers: zeroes are a value of it.
    let mut head: libc::msghdr = unsafe { std::mem::zeroed() };
    head.msg_iov = &mut part;
    head.msg_iovlen = 1;
    head.msg_control = control.as_mut_ptr().cast();
    head.msg_controllen = size_of_val(&control) as _;
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

    fn place(name: &str) -> (PathBuf, Place) {
        let path = std::env::temp_dir().join(format!("dmaflow-{name}-{}", std::process::id()));
        let _ = fs::remove_file(&path);
        (path.clone(), Place::Path(path))
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
        assert!(matches!(other.receive().unwrap(), Received::Nothing));
        let (fd, closed) = tell_tale();
        one.send(&buffer(), &[fd.as_fd()]).unwrap();
        let end = Message::End { reason: Reason::Ended, text: "x".into() };
        one.send(&end, &[]).unwrap();
        drop(fd);
        let Received::Message(message, fds) = other.receive().unwrap() else { unreachable!() };
        assert_eq!((message, fds.len(), closed()), (buffer(), 1, false));
        drop(fds);
        assert!(closed());
        let Received::Message(message, _) = other.receive().unwrap() else { unreachable!() };
        assert_eq!(message, end);
        drop(one);
        assert!(matches!(other.receive().unwrap(), Received::Closed));
        assert_eq!(other.send(&end, &[]).unwrap_err().raw_os_error(), Some(libc::EPIPE));
    }

    #[test]
    fn last_words_come_also_from_who_did_not_listen() {
        let (one, other) = pair();
        let end = Message::End { reason: Reason::Refused, text: "no".into() };
        other.send(&buffer(), &[]).unwrap();
        one.send(&end, &[]).unwrap();
        drop(one);
        let Received::Message(message, _) = other.receive().unwrap() else { unreachable!() };
        assert_eq!(message, end);
        assert!(matches!(other.receive().unwrap(), Received::Closed));
        let (one, other) = pair();
        other.send(&buffer(), &[]).unwrap();
        drop(one);
        assert!(matches!(other.receive().unwrap(), Received::Closed));
    }

    #[test]
    fn descriptors_of_what_is_rejected_are_closed() {
        let (one, other) = pair();
        let end = Message::End { reason: Reason::Ended, text: String::new() };
        let (long, short) = ([0; MAX_MESSAGE + 1], [1, 2, 3]);
        for case in 0..5 {
            let (fd, closed) = tell_tale();
            let raw = vec![fd.as_raw_fd(); if case == 4 { 253 } else { 5 }];
            let bytes = match case {
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
            other.receive().unwrap_err();
            assert!(closed(), "{case}");
        }
    }

    #[test]
    fn nobody_waits_for_who_does_not_read() {
        let (one, _other) = pair();
        let full = (0..100_000).find_map(|_| one.send(&buffer(), &[]).err());
        assert_eq!(full.unwrap().kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn the_file_has_its_mode_and_goes_with_its_listener() {
        let (path, place) = place("mode");
        let listener = Listener::bind(&place, 0o600, None).unwrap();
        assert_eq!(fs::symlink_metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(Listener::bind(&place, 0o600, None).unwrap_err().kind(), Kind::Busy);
        // The second asked whether somebody listens.
        while listener.accept().unwrap().is_some() {}
        let socket = Socket::connect(&place).unwrap();
        let (_, peer) = listener.accept().unwrap().unwrap();
        assert_eq!((peer.pid, peer.uid), (std::process::id(), nix::unistd::getuid().as_raw()));
        drop((socket, listener));
        assert!(!path.exists());
        // Whatever the umask.
        let group = Some(nix::unistd::getgid().as_raw());
        let _listener = Listener::bind(&place, 0o660, group).unwrap();
        assert_eq!(fs::symlink_metadata(&path).unwrap().permissions().mode() & 0o777, 0o660);
    }

    #[test]
    fn a_stale_file_is_replaced_and_no_other_thing() {
        let (path, place) = place("stale");
        let mut listener = Listener::bind(&place, 0o600, None).unwrap();
        // As when a server is killed.
        listener.file = None;
        drop(listener);
        assert!(path.exists());
        let listener = Listener::bind(&place, 0o600, None).unwrap();
        Socket::connect(&place).unwrap();
        // Somebody put another thing in its place: that one stays.
        fs::remove_file(&path).unwrap();
        fs::write(&path, "mine").unwrap();
        drop(listener);
        assert_eq!(Listener::bind(&place, 0o600, None).unwrap_err().kind(), Kind::Busy);
        assert_eq!(fs::read(&path).unwrap(), b"mine");
        fs::remove_file(&path).unwrap();
        assert_eq!(Socket::connect(&place).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn a_socket_is_passed_on() {
        let (path, place) = place("passed");
        let first = Listener::bind(&place, 0o600, None).unwrap();
        let (listener, there) = Listener::inherit(first.fd.try_clone().unwrap()).unwrap();
        assert_eq!(there, place);
        let _socket = Socket::connect(&place).unwrap();
        assert!(listener.accept().unwrap().is_some() && listener.accept().unwrap().is_none());
        drop(listener);
        assert!(path.exists(), "it is the other's");
        let (stream, _) = std::os::unix::net::UnixStream::pair().unwrap();
        for other in [stream.into(), fs::File::open("/dev/null").unwrap().into(), pair().0.0] {
            assert_eq!(Listener::inherit(other).unwrap_err().kind(), Kind::Invalid);
        }
    }

    #[test]
    fn a_name_without_a_file() {
        let place = Place::parse(&format!("@dmaflow-test-{}", std::process::id()));
        assert!(matches!(place, Place::Abstract(_)));
        let listener = Listener::bind(&place, 0o600, None).unwrap();
        assert_eq!(Listener::bind(&place, 0o600, None).unwrap_err().kind(), Kind::Busy);
        let _socket = Socket::connect(&place).unwrap();
        assert!(listener.accept().unwrap().is_some());
        drop(listener);
        assert_eq!(Socket::connect(&place).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    }
}
