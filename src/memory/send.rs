//! Memory into a pipe, a file or a socket, from where it lies: by the kernel, without a reference to it here.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::libc;

use super::Span;

/// The addresses and lengths of spans, for one system call. More than [`SPANS`] are left for the next.
fn iovecs(spans: &[Span<'_>]) -> ([libc::iovec; SPANS], usize) {
    let mut all = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; SPANS];
    for (iovec, span) in all.iter_mut().zip(spans) {
        *iovec = libc::iovec { iov_base: span.as_ptr().cast_mut().cast(), iov_len: span.len() };
    }
    (all, spans.len().min(SPANS))
}

/// The most spans that one system call takes here. The kernel takes 1024.
pub(crate) const SPANS: usize = 128;

/// `vmsplice`: puts the pages of memory into a pipe, without a copy and without waiting, and tells how many bytes it took. They stay the
/// same pages: what is written there later, the reader sees.
///
/// # Errors
/// `EAGAIN` when the pipe is full; `EPIPE` when nobody reads it; `EFAULT` for memory whose pages the kernel does not know
/// (`VM_PFNMAP`); `EBADF` for what is no pipe.
pub(crate) fn vmsplice(pipe: BorrowedFd<'_>, spans: &[Span<'_>]) -> io::Result<usize> {
    let (iovecs, count) = iovecs(spans);
    // SAFETY: the first `count` of `iovecs` are addresses and lengths of memory that is readable while `spans` are borrowed; the call
    // keeps references to its pages, not to its addresses.
    let taken = unsafe { libc::vmsplice(pipe.as_raw_fd(), iovecs.as_ptr(), count, libc::SPLICE_F_NONBLOCK) };
    length(taken)
}

/// `pwritev2` at the file's position: writes memory to a pipe or a socket without waiting (`RWF_NOWAIT`), or to anything with waiting.
///
/// # Errors
/// `EAGAIN` when it would wait; `EPIPE` when nobody reads; `EOPNOTSUPP` where not waiting is not known: pipes before Linux 6.4, named
/// pipes, and pipes once something was spliced into them (`pipe_clear_nowait`).
pub(crate) fn write_spans(fd: BorrowedFd<'_>, spans: &[Span<'_>], wait: bool) -> io::Result<usize> {
    let (iovecs, count) = iovecs(spans);
    let flags = if wait { 0 } else { libc::RWF_NOWAIT };
    // At most SPANS.
    let count = count as libc::c_int;
    // SAFETY: as above; the call only reads the memory, and is done with it when it returns.
    length(unsafe { libc::pwritev2(fd.as_raw_fd(), iovecs.as_ptr(), count, -1, flags) })
}

/// What a call says that returns a length or -1.
fn length(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

// `asm-generic/ioctls.h`: a number from before the scheme of numbers.
nix::ioctl_read_bad!(fionread, libc::FIONREAD, libc::c_int);

/// `FIONREAD`: the bytes in a pipe that nobody has read yet. Works at either end (`pipe_ioctl`).
///
/// # Errors
/// The kernel's errno.
pub(crate) fn unread(pipe: BorrowedFd<'_>) -> io::Result<u64> {
    let mut unread: libc::c_int = 0;
    // SAFETY: the call writes one int, to a live variable.
    unsafe { fionread(pipe.as_raw_fd(), &mut unread) }?;
    Ok(u64::try_from(unread).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Access, Mapping};
    use nix::sys::memfd::{MFdFlags, memfd_create};
    use std::os::fd::AsFd;

    #[test]
    fn pages_go_into_a_pipe_and_bytes_are_counted() {
        let memfd = memfd_create("test", MFdFlags::MFD_CLOEXEC).unwrap();
        nix::unistd::ftruncate(&memfd, 8192).unwrap();
        let mut mapping = Mapping::new(memfd.as_fd(), 8192, Access::ReadWrite).unwrap();
        mapping.write(0, &[7; 8192]);
        let (reader, writer) = nix::unistd::pipe().unwrap();
        let span = mapping.span();
        let parts = [span.part(10, 100).unwrap(), span.part(4000, 1000).unwrap()];
        assert_eq!(vmsplice(writer.as_fd(), &parts).unwrap(), 1100);
        let error = write_spans(writer.as_fd(), &parts[..1], false).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EOPNOTSUPP), "a pipe that was spliced into");
        assert_eq!(write_spans(writer.as_fd(), &parts[..1], true).unwrap(), 100);
        assert_eq!(unread(writer.as_fd()).unwrap(), 1200);
        let mut bytes = [0; 1300];
        assert_eq!(nix::unistd::read(&reader, &mut bytes).unwrap(), 1200);
        assert_eq!(unread(writer.as_fd()).unwrap(), 0);
        assert!(bytes[..1200] == [7; 1200]);
        drop(reader);
        assert_eq!(vmsplice(writer.as_fd(), &parts).unwrap_err().raw_os_error(), Some(libc::EPIPE));
        let error = vmsplice(memfd.as_fd(), &parts).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EBADF));
    }
}
