//! Where a stream of bytes goes: a file, a pipe, or what stdout is.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::error::{Context, Error, Kind, Result};
use crate::memory::{SPANS, Span, page_size, unread, vmsplice, write_spans};

/// Where bytes go. A pipe is written without ever waiting inside a system call for it: what waits is `poll`, which an order to stop
/// ends as well.
#[derive(Debug)]
pub(super) struct Output {
    name: String,
    place: Place,
    stop: Option<OwnedFd>,
    fd: Option<OwnedFd>,
    sort: Sort,
    /// The kernel writes to it without waiting, when told so: not to pipes before Linux 6.4, nor to those that were ever spliced into
    /// (`pipe_clear_nowait`).
    nowait: bool,
    /// Bytes that went in so far.
    sent: u64,
    /// Nobody reads any more, or it was told to stop in the middle of a frame: no byte may follow.
    over: bool,
}

#[derive(Debug)]
enum Place {
    Stdout,
    File(PathBuf),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Sort {
    /// Something that takes all that it is given, or not open yet: a file, a device.
    Waits,
    Pipe,
    Socket,
}

/// How bytes go into it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum How {
    /// By reference to their pages.
    Splice,
    /// By a copy in the kernel.
    Write,
}

/// After an order to stop, the reader has so long to take the rest of a frame that was begun.
const GRACE: Duration = Duration::from_secs(1);

/// How often a named pipe is looked at for a reader. The kernel announces none.
const LOOK: Duration = Duration::from_millis(20);

/// What a pipe takes without waiting when `poll` has said that it takes anything (`PIPE_BUF`).
const ATOMIC: usize = 4096;

impl Output {
    /// A file or, for `-`, stdout; its `kind` is for its name. Nothing is opened yet.
    pub(super) fn new(kind: &str, place: &Path) -> Output {
        let stdout = place == Path::new("-");
        Output {
            name: format!("{kind}:{}", place.display()),
            place: if stdout { Place::Stdout } else { Place::File(place.to_owned()) },
            stop: None,
            fd: None,
            sort: Sort::Waits,
            nowait: true,
            sent: 0,
            over: false,
        }
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// When `stop` becomes readable, waiting ends.
    pub(super) fn stop_at(&mut self, stop: OwnedFd) {
        self.stop = Some(stop);
    }

    /// Opens it, the first time. For a named pipe this waits for its reader.
    ///
    /// # Errors
    /// What the file system says; [`Kind::Invalid`] for a terminal; [`Kind::Ended`] if an order to stop came first.
    pub(super) fn open(&mut self) -> Result<()> {
        if self.fd.is_some() {
            return Ok(());
        }
        let fd = match &self.place {
            Place::Stdout => {
                let stdout = io::stdout();
                if io::IsTerminal::is_terminal(&stdout) {
                    return Err(self
                        .about(Kind::Invalid)
                        .because("stdout is a terminal")
                        .repair("send it to a file or a pipe"));
                }
                stdout.as_fd().try_clone_to_owned().context("write", || self.name.clone())?
            }
            Place::File(path) => self.open_file(path)?,
        };
        let is = fs::metadata(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fd)));
        let is = is.context("write", || self.name.clone())?.file_type();
        self.sort = match (is.is_fifo(), is.is_socket()) {
            (true, _) => Sort::Pipe,
            (_, true) => Sort::Socket,
            _ => Sort::Waits,
        };
        self.fd = Some(fd);
        Ok(())
    }

    fn open_file(&self, path: &Path) -> Result<OwnedFd> {
        loop {
            // A named pipe without a reader: ENXIO, where it would wait otherwise, deaf to any order.
            let opened = File::options()
                .write(true)
                .create(true)
                .truncate(true)
                .custom_flags(libc::O_NONBLOCK)
                .open(path);
            match opened {
                Err(error) if error.raw_os_error() == Some(libc::ENXIO) && is_fifo(path) => {
                    if !self.wait(LOOK).context("wait for a reader of", || self.name.clone())? {
                        return Err(self.about(Kind::Ended).because("told to stop before anyone read it"));
                    }
                }
                other => return other.map(OwnedFd::from).context("write", || self.name.clone()),
            }
        }
    }

    /// Whether it is a pipe, so that memory may go into it without a copy.
    pub(super) fn is_pipe(&self) -> bool {
        self.sort == Sort::Pipe
    }

    /// Whether it takes all that it is given: a file.
    pub(super) fn takes_all(&self) -> bool {
        self.sort == Sort::Waits
    }

    /// Whether no byte may follow.
    pub(super) fn is_over(&self) -> bool {
        self.over
    }

    /// Gives a pipe room for `pages` pages and for less than twice as many, or for as many as this user may have
    /// (`/proc/sys/fs/pipe-max-size`): less room costs more wake-ups and nothing else. Whether it has less than twice as much now.
    pub(super) fn make_room(&self, pages: usize) -> bool {
        let Some(fd) = self.fd.as_ref().filter(|_| self.is_pipe()) else { return false };
        let wanted = pages.max(1).next_power_of_two();
        let most = fs::read_to_string("/proc/sys/fs/pipe-max-size")
            .ok()
            .and_then(|text| text.trim().parse().ok());
        let most = most.unwrap_or(1 << 16) / page_size();
        let set = |pages: usize| {
            let bytes = libc::c_int::try_from(pages.saturating_mul(page_size())).unwrap_or(libc::c_int::MAX);
            fcntl(fd, FcntlArg::F_SETPIPE_SZ(bytes))
        };
        // Refused when so many pages are in it already, by another writer.
        let set = set(wanted.min(most)).or_else(|_| fcntl(fd, FcntlArg::F_GETPIPE_SZ));
        set.is_ok_and(|bytes| usize::try_from(bytes).is_ok_and(|bytes| bytes / page_size() <= wanted))
    }

    /// Bytes that went in so far.
    pub(super) fn sent(&self) -> u64 {
        self.sent
    }

    /// Of the bytes that went in, those that a reader of the pipe has taken out. All, where it is none.
    pub(super) fn taken(&self) -> u64 {
        let left = self.fd.as_ref().filter(|_| self.is_pipe()).map(|fd| unread(fd.as_fd()));
        // A pipe that cannot be asked any more is nobody's.
        self.sent.saturating_sub(left.and_then(io::Result::ok).unwrap_or(0))
    }

    /// Sends all of `spans`. Waits while a pipe is full. `false` if that ended early, because nobody reads any more or an order to stop
    /// came; then no byte may follow.
    ///
    /// # Errors
    /// What the system says, `EFAULT` for memory that cannot be spliced before a byte of it went.
    pub(super) fn send(&mut self, spans: &[Span<'_>], how: How) -> Result<bool> {
        match self.try_send(spans, how) {
            Ok(sent) => {
                self.over |= !sent;
                Ok(sent)
            }
            Err(error) if error.raw_os_error() == Some(libc::EPIPE) => {
                self.over = true;
                Ok(false)
            }
            Err(error) => {
                let call = if how == How::Splice { "vmsplice" } else { "writev" };
                Err(Error::from_io("write", self.name.clone(), error).said_by(call))
            }
        }
    }

    fn try_send(&mut self, spans: &[Span<'_>], how: How) -> io::Result<bool> {
        let (mut index, mut offset) = (0, 0);
        let mut deadline = None;
        while index < spans.len() {
            if self.over {
                return Ok(false);
            }
            let taken = match self.send_some(&spans[index..], offset, how) {
                Ok(taken) => taken,
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINTR) => 0,
                    Some(libc::EAGAIN) => {
                        if !self.wait_for_room(&mut deadline)? {
                            return Ok(false);
                        }
                        0
                    }
                    Some(libc::EOPNOTSUPP) if self.nowait && how == How::Write => {
                        self.nowait = false;
                        0
                    }
                    _ => return Err(error),
                },
            };
            self.sent += taken as u64;
            offset += taken;
            while let Some(span) = spans.get(index).filter(|span| offset >= span.len()) {
                offset -= span.len();
                index += 1;
            }
        }
        Ok(true)
    }

    /// One system call's worth, from byte `offset` of the first span on.
    fn send_some(&self, spans: &[Span<'_>], offset: usize, how: How) -> io::Result<usize> {
        let fd = self
            .fd
            .as_ref()
            .ok_or_else(|| io::Error::from_raw_os_error(libc::EBADF))?
            .as_fd();
        let mut some = [Span::EMPTY; SPANS];
        let count = spans.len().min(SPANS);
        some[..count].copy_from_slice(&spans[..count]);
        let first = some[0];
        some[0] = first.part(offset, first.len() - offset).unwrap_or(Span::EMPTY);
        match (how, self.sort) {
            (How::Splice, _) => vmsplice(fd, &some[..count]),
            (How::Write, Sort::Waits) => write_spans(fd, &some[..count], true),
            (How::Write, _) if self.nowait => write_spans(fd, &some[..count], false),
            (How::Write, _) => {
                if !writable(fd, None, PollTimeout::ZERO)?.0 {
                    return Err(io::Error::from_raw_os_error(libc::EAGAIN));
                }
                let piece = some[0].part(0, some[0].len().min(ATOMIC)).unwrap_or(Span::EMPTY);
                write_spans(fd, &[piece], true)
            }
        }
    }

    /// Waits until a full pipe has room. `false` if an order to stop came and the time after it is up.
    fn wait_for_room(&self, deadline: &mut Option<Instant>) -> io::Result<bool> {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        if left == Some(Duration::ZERO) {
            return Ok(false);
        }
        let stop = self.stop.as_ref().filter(|_| left.is_none());
        let timeout = left.map_or(PollTimeout::NONE, timeout);
        let fd = self.fd.as_ref().ok_or_else(|| io::Error::from_raw_os_error(libc::EBADF))?;
        let (_, stopped) = writable(fd.as_fd(), stop.map(AsFd::as_fd), timeout)?;
        if stopped {
            *deadline = Some(Instant::now() + GRACE);
        }
        Ok(true)
    }

    /// Waits so long, or for the order to stop; `false` if that came.
    fn wait(&self, time: Duration) -> io::Result<bool> {
        let stop = self.stop.as_ref().map(|stop| PollFd::new(stop.as_fd(), PollFlags::POLLIN));
        match poll(&mut stop.into_iter().collect::<Vec<_>>(), timeout(time)) {
            Ok(stopped) => Ok(stopped == 0),
            Err(Errno::EINTR) => Ok(true),
            Err(errno) => Err(errno.into()),
        }
    }

    fn about(&self, kind: Kind) -> Error {
        Error::new(kind, "write", self.name.clone())
    }
}

fn is_fifo(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|there| there.file_type().is_fifo())
}

fn timeout(time: Duration) -> PollTimeout {
    PollTimeout::try_from(time + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX)
}

fn ready(fd: &PollFd<'_>) -> bool {
    fd.revents().is_some_and(|events| !events.is_empty())
}

/// Waits until `fd` can be written or has failed (the next write says how), or the order to stop came: which of them is so.
fn writable(fd: BorrowedFd<'_>, stop: Option<BorrowedFd<'_>>, timeout: PollTimeout) -> io::Result<(bool, bool)> {
    let stop = stop.map(|stop| PollFd::new(stop, PollFlags::POLLIN));
    let both = stop.is_some();
    let mut fds = [PollFd::new(fd, PollFlags::POLLOUT), stop.unwrap_or(PollFd::new(fd, PollFlags::empty()))];
    let count = if both { 2 } else { 1 };
    match poll(&mut fds[..count], timeout) {
        Ok(_) => Ok((ready(&fds[0]), both && ready(&fds[1]))),
        Err(Errno::EINTR) => Ok((false, false)),
        Err(errno) => Err(errno.into()),
    }
}
