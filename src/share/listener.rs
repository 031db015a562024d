//! Where a server waits for connections: a socket at a path, or at a name without a file.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::libc;
use nix::sys::socket::{
    Backlog, SockFlag, SockType, UnixAddr, accept4, bind, connect, getsockname, getsockopt, listen, sockopt,
};
use nix::sys::stat::{Mode, fchmod};
use nix::unistd::{Gid, fchownat};

use super::lock::Lock;
use super::peer::Peer;
use super::socket::{Place, Socket, let_descriptors_come, open};
use crate::error::{Context, Error, Kind, Result};

/// Waits for connections. The socket's file goes when this does.
#[derive(Debug)]
pub(super) struct Listener {
    fd: OwnedFd,
    /// The file, its device and its inode.
    file: Option<(PathBuf, u64, u64)>,
    /// The file's group, which those are in that its mode lets connect.
    group: Option<u32>,
    /// The mode of a file that another has made.
    passed_mode: Option<u32>,
    /// Says that this lives. Goes after the socket's file, for whoever has it may take that away.
    _lock: Option<Lock>,
}

impl Listener {
    /// Begins to listen. The file never has a wider mode than `mode`: nobody can connect before this listens, and it listens only when mode
    /// and group are set. The file of a server that is gone is replaced. The mode and the group of a name without a file mean nothing.
    ///
    /// # Errors
    /// [`Kind::Busy`] if another server listens there, or something else is there; what the system says.
    pub(super) fn bind(place: &Place, mode: u32, group: Option<u32>) -> Result<Listener> {
        let about = || place.to_string();
        let address = place.address().context("listen at", about)?;
        let fd = open().context("listen at", about)?;
        let_descriptors_come(&fd, false).context("listen at", about)?;
        let Place::Path(path) = place else {
            match bind(fd.as_raw_fd(), &address) {
                Err(Errno::EADDRINUSE) => return Err(occupied(place)),
                other => other.context("listen at", about)?,
            }
            listen(&fd, Backlog::MAXCONN).context("listen at", about)?;
            return Ok(Listener { fd, file: None, group: None, passed_mode: None, _lock: None });
        };
        let lock = Lock::take(path).context("lock", about).map_err(|error| match error.errno() {
            Some(libc::ENOENT) => error.repair("make its folder first, or choose another place"),
            _ => error,
        })?;
        let lock = lock.ok_or_else(|| occupied(place))?;
        remove_stale(place, path)?;
        // The file gets the mode of the socket, less the umask (unix_bind_bsd in net/unix/af_unix.c).
        fchmod(&fd, mode_of(mode)).context("set the mode of", about)?;
        match bind(fd.as_raw_fd(), &address) {
            Err(Errno::EADDRINUSE) => return Err(occupied(place)),
            other => other.context("listen at", about)?,
        }
        let made = fs::symlink_metadata(path).context("look at", about)?;
        // From here on the file goes with this, whatever fails.
        let file = Some((path.clone(), made.dev(), made.ino()));
        let mut listener = Listener { fd, file, group: None, passed_mode: None, _lock: Some(lock) };
        listener.group = Some(open_to(path, mode, group).context("set mode and group of", about)?);
        listen(&listener.fd, Backlog::MAXCONN).context("listen at", about)?;
        Ok(listener)
    }

    /// The group that the socket's file has, if there is one that is known to be its file.
    pub(super) fn group(&self) -> Option<u32> {
        self.group
    }

    /// The mode of the socket's file, if it was [passed on](Listener::inherit).
    pub(super) fn passed_mode(&self) -> Option<u32> {
        self.passed_mode
    }

    /// Takes over a socket that listens already, as a service manager passes it. Its file is not this process's to remove; its mode and
    /// group are what the manager has chosen.
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
        let_descriptors_come(&fd, false).context("set up", about)?;
        // So that others see that somebody serves there. Who started this has chosen the place: if the folder is not this user's, or
        // another server has the place besides, that is no reason not to serve.
        let lock = match &place {
            Place::Path(path) => Lock::take(path).ok().flatten(),
            Place::Abstract(_) => None,
        };
        let file = match &place {
            Place::Path(path) => passed_file(path),
            Place::Abstract(_) => None,
        };
        let (passed_mode, group) = (file.map(|file| file.0), file.map(|file| file.1));
        Ok((Listener { fd, file: None, group, passed_mode, _lock: lock }, place))
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
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let peer = Peer::of(&fd)?;
        let socket = Socket::from(fd);
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

/// Mode and group of the file of a socket that was passed on. None if nothing that is there can be taken for it: the kernel does not tell
/// which file a socket has, so it must be a socket of this user's or of root's, as a manager makes one, and no name besides or instead.
fn passed_file(path: &Path) -> Option<(u32, u32)> {
    let there = fs::symlink_metadata(path).ok().filter(|_| path.is_absolute())?;
    let of_manager = [0, nix::unistd::geteuid().as_raw()].contains(&there.uid());
    let whole = there.file_type().is_socket() && there.nlink() == 1;
    (of_manager && whole).then(|| (there.mode() & 0o777, there.gid()))
}

fn mode_of(mode: u32) -> Mode {
    Mode::from_bits_truncate(mode & 0o777)
}

/// Gives the socket's file at `path` the mode and the group, and tells which it has now. Both go to the file itself: whoever may write to
/// the folder could put another there in place of the one that was just made, and a link to a file of this user's would otherwise open that
/// one. (What they could put there that is taken for it is a socket of this user's that lies where they may move files.)
fn open_to(path: &Path, mode: u32, group: Option<u32>) -> io::Result<u32> {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let file: fs::File = nix::fcntl::open(path, flags, Mode::empty())?.into();
    let there = file.metadata()?;
    if !there.file_type().is_socket() || there.uid() != nix::unistd::geteuid().as_raw() || there.nlink() != 1 {
        return Err(io::Error::other("another file was put in its place"));
    }
    if group.is_some_and(|group| group != there.gid()) {
        fchownat(&file, "", None, group.map(Gid::from_raw), nix::fcntl::AtFlags::AT_EMPTY_PATH)?;
    }
    // The umask has taken some of it. A descriptor that names a file alone cannot be given to fchmod(2); this link leads to just that file
    // (proc_pid_get_link in fs/proc/base.c).
    if there.mode() & 0o777 != mode & 0o777 {
        fs::set_permissions(format!("/proc/self/fd/{}", file.as_raw_fd()), fs::Permissions::from_mode(mode & 0o777))?;
    }
    Ok(group.unwrap_or(there.gid()))
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

#[cfg(test)]
mod tests {
    use super::*;

    fn place(name: &str) -> (PathBuf, Place) {
        let path = std::env::temp_dir().join(format!("dmaflow-{name}-{}", std::process::id()));
        let _ = fs::remove_file(&path);
        (path.clone(), Place::Path(path))
    }

    fn mode(path: &Path) -> u32 {
        fs::symlink_metadata(path).unwrap().mode()
    }

    #[test]
    fn the_file_has_its_mode_and_goes_with_its_listener() {
        let (path, place) = place("mode");
        let listener = Listener::bind(&place, 0o600, None).unwrap();
        assert_eq!(mode(&path) & 0o777, 0o600);
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
        assert_eq!(mode(&path) & 0o777, 0o660);
    }

    #[test]
    fn a_folder_that_is_missing_is_said_so() {
        let (path, _) = place("missing");
        let error = Listener::bind(&Place::Path(path.join("cam.sock")), 0o600, None).unwrap_err();
        assert!(error.kind() == Kind::NotFound && error.line().contains("folder"), "{error:?}");
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
        // Mode and group are those of the file, while that is one.
        let group = nix::unistd::getgid().as_raw();
        assert_eq!((listener.passed_mode(), listener.group()), (Some(0o600), Some(group)));
        assert_eq!((first.passed_mode(), first.group()), (None, Some(group)));
        drop(listener);
        assert!(path.exists(), "it is the other's");
        let again = || Listener::inherit(first.fd.try_clone().unwrap()).unwrap().0;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o662)).unwrap();
        assert_eq!(again().passed_mode(), Some(0o662));
        let aside = path.with_extension("aside");
        fs::hard_link(&path, &aside).unwrap();
        assert_eq!((again().passed_mode(), again().group()), (None, None), "it has another name");
        fs::remove_file(&path).unwrap();
        assert_eq!(again().passed_mode(), None, "its name is gone");
        std::os::unix::fs::symlink(&aside, &path).unwrap();
        assert_eq!(again().passed_mode(), None, "a link is there");
        fs::remove_file(&path).unwrap();
        fs::write(&path, "").unwrap();
        assert_eq!(again().passed_mode(), None, "a file is there");
        fs::remove_file(&aside).unwrap();
        fs::remove_file(&path).unwrap();
        let unbound = open().unwrap();
        let (stream, _) = std::os::unix::net::UnixStream::pair().unwrap();
        for other in [stream.into(), fs::File::open("/dev/null").unwrap().into(), unbound] {
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

    /// Whoever may write to the folder puts a link in place of the socket before its mode is set: what it leads to stays as it is.
    #[test]
    fn mode_and_group_do_not_follow_a_link() {
        let (path, _) = place("link");
        let target = path.with_extension("target");
        fs::write(&target, "secret").unwrap();
        fs::set_permissions(&target, fs::Permissions::from_mode(0o600)).unwrap();
        std::os::unix::fs::symlink(&target, &path).unwrap();
        assert!(open_to(&path, 0o666, None).is_err());
        assert_eq!(mode(&target) & 0o777, 0o600);
        fs::remove_file(&path).unwrap();
        fs::hard_link(&target, &path).unwrap();
        assert!(open_to(&path, 0o666, None).is_err());
        assert_eq!(mode(&target) & 0o777, 0o600);
        // Nor a socket that has another name as well.
        fs::remove_file(&path).unwrap();
        fs::remove_file(&target).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(&target).unwrap();
        fs::hard_link(&target, &path).unwrap();
        assert!(open_to(&path, 0o666, None).is_err());
        fs::remove_file(&target).unwrap();
        assert_eq!((open_to(&path, 0o662, None).is_ok(), mode(&path) & 0o777), (true, 0o662));
        fs::remove_file(&path).unwrap();
    }

    /// One file of a server that was killed, and several that start: one of them serves there, and at its end nothing is left.
    #[test]
    fn servers_that_start_together_do_not_take_away_each_others_socket() {
        for round in 0..40 {
            let (path, place) = place("together");
            drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
            let start = std::sync::Barrier::new(4);
            let bound: Vec<_> = std::thread::scope(|scope| {
                let servers = [(); 4].map(|()| {
                    scope.spawn(|| {
                        start.wait();
                        Listener::bind(&place, 0o600, None)
                    })
                });
                servers.map(|server| server.join().unwrap()).into_iter().collect()
            });
            let (serving, refused): (Vec<_>, Vec<_>) = bound.into_iter().partition(|result| result.is_ok());
            assert_eq!(serving.len(), 1, "round {round}");
            assert!(refused.into_iter().all(|result| result.unwrap_err().kind() == Kind::Busy));
            let _socket = Socket::connect(&place).unwrap();
            drop(serving);
            assert!(!path.exists() && !crate::share::lock::is_held(&path));
        }
    }
}
