//! `DmaBuf`: shared ownership of one dma-buf, and its identity.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, OnceLock, Weak};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::stat::fstat;
use nix::unistd::{Whence, lseek};

use crate::error::{Context, Result};

/// What makes two descriptors the same dma-buf: the kernel's inode, never the descriptor's number.
///
/// Every dma-buf has an inode of its own in the kernel's dma-buf file system (`dma_buf_export`, since Linux 5.3).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Identity {
    device: u64,
    inode: u64,
}

impl Identity {
    /// The inode number, as `/sys/kernel/debug/dma_buf/bufinfo` prints it.
    pub fn inode(self) -> u64 {
        self.inode
    }
}

/// One dma-buf. Clones are cheap and share one open descriptor, which closes with the last of them.
#[derive(Clone, Debug)]
pub struct DmaBuf(Arc<Inner>);

/// What a cache holds: it follows a [`DmaBuf`] and does not keep it open.
#[derive(Clone, Debug)]
pub struct WeakDmaBuf(Weak<Inner>);

#[derive(Debug)]
struct Inner {
    fd: OwnedFd,
    identity: Identity,
    len: usize,
    memfd: Option<OwnedFd>,
    read_only: OnceLock<OwnedFd>,
}

impl DmaBuf {
    /// Takes over a dma-buf descriptor and learns its identity and its length. Cost: two system calls.
    ///
    /// # Errors
    /// When the descriptor's length or inode cannot be read, as of a pipe or a socket.
    pub fn new(fd: OwnedFd) -> Result<DmaBuf> {
        DmaBuf::over(fd, None)
    }

    /// The same for a udmabuf, with the memfd whose pages it is made of from its start.
    pub(crate) fn over(fd: OwnedFd, memfd: Option<OwnedFd>) -> Result<DmaBuf> {
        let stat = fstat(&fd).context("identify", || "the dma-buf")?;
        // Seeking to the end tells a dma-buf's size and moves nothing (dma_buf_llseek).
        let len = lseek(&fd, 0, Whence::SeekEnd).context("learn the size of", || "the dma-buf")?;
        let len = usize::try_from(len).map_err(|_| io::Error::from_raw_os_error(nix::libc::EOVERFLOW));
        let len = len.context("learn the size of", || "the dma-buf")?;
        let identity = Identity { device: stat.st_dev, inode: stat.st_ino };
        Ok(DmaBuf(Arc::new(Inner { fd, identity, len, memfd, read_only: OnceLock::new() })))
    }

    /// The kernel's identity of the buffer.
    pub fn identity(&self) -> Identity {
        self.0.identity
    }

    /// Whether this number is an open descriptor of this dma-buf: a number, because it may be closed, or of something else.
    #[cfg(feature = "vulkan")]
    pub(crate) fn is_behind(&self, number: std::os::fd::RawFd) -> bool {
        use std::os::unix::fs::MetadataExt;
        let there = std::fs::metadata(format!("/proc/self/fd/{number}"));
        there.is_ok_and(|there| Identity { device: there.dev(), inode: there.ino() } == self.0.identity)
    }

    /// Length in bytes, a multiple of the page size.
    pub fn len(&self) -> usize {
        self.0.len
    }

    /// Whether it has no bytes at all.
    pub fn is_empty(&self) -> bool {
        self.0.len == 0
    }

    /// The memfd under a udmabuf that this process made: the same pages, from the same start. It maps privately, which the
    /// udmabuf does not (`mmap_udmabuf` wants a shared mapping).
    pub fn memfd(&self) -> Option<BorrowedFd<'_>> {
        self.0.memfd.as_ref().map(AsFd::as_fd)
    }

    /// A descriptor of the same memory by which no CPU mapping can write to it: the one that this is, if it was exported so (`O_RDONLY`), else
    /// the one that its exporter has made besides ([`Source::export_read_only`](crate::endpoint::Source::export_read_only)), which to the
    /// kernel is another dma-buf. `None` if there is none.
    ///
    /// A shared mapping for writing of such a descriptor is refused with `EACCES` (do_mmap in mm/mmap.c), and it cannot be opened anew
    /// through `/proc` (dma-bufs have no `open`: `ENXIO`). A private mapping can be written, and what is written stays with its process.
    ///
    /// Devices are not bound by that: drivers import it as any other (`dma_buf_get` in drivers/dma-buf/dma-buf.c looks at no mode), but for
    /// those that map it for writing, as Mesa's lavapipe. So who also has a device that writes (a V4L2 node that captures into dma-bufs, a
    /// GPU that renders into them) can have that write to it. Cost: one system call.
    pub fn read_only(&self) -> Option<BorrowedFd<'_>> {
        if is_read_only(self.0.fd.as_fd()) { Some(self.0.fd.as_fd()) } else { self.0.read_only.get().map(AsFd::as_fd) }
    }

    /// Adds what [`DmaBuf::read_only`] gives out; the first stays.
    pub(crate) fn add_read_only(&self, fd: OwnedFd) {
        let _ = self.0.read_only.set(fd);
    }

    /// A reference that does not keep the descriptor open.
    pub fn downgrade(&self) -> WeakDmaBuf {
        WeakDmaBuf(Arc::downgrade(&self.0))
    }
}

/// Whether a descriptor was opened, or exported, for reading alone.
pub(crate) fn is_read_only(fd: BorrowedFd<'_>) -> bool {
    let flags = fcntl(fd, FcntlArg::F_GETFL).map(OFlag::from_bits_truncate);
    flags.is_ok_and(|flags| flags & OFlag::O_ACCMODE == OFlag::O_RDONLY)
}

impl AsFd for DmaBuf {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.fd.as_fd()
    }
}

impl WeakDmaBuf {
    /// The buffer, if somebody still holds it.
    pub fn upgrade(&self) -> Option<DmaBuf> {
        self.0.upgrade().map(DmaBuf)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::AsRawFd;

    #[test]
    fn what_can_be_written_is_given_for_reading_by_another_descriptor() {
        let opened = || File::options().read(true).write(true).open("/dev/null").unwrap();
        let buffer = DmaBuf::new(opened().into()).unwrap();
        assert!(buffer.read_only().is_none());
        let twin: OwnedFd = File::open("/dev/null").unwrap().into();
        let number = twin.as_raw_fd();
        buffer.add_read_only(twin);
        buffer.add_read_only(opened().into());
        assert_eq!(buffer.clone().read_only().unwrap().as_raw_fd(), number);
    }

    #[test]
    fn identity_is_the_inode() {
        let file = File::open("/proc/self/exe").unwrap();
        let same = DmaBuf::new(file.try_clone().unwrap().into()).unwrap();
        let again = DmaBuf::new(File::open("/proc/self/exe").unwrap().into()).unwrap();
        let other = DmaBuf::new(File::open("/etc/passwd").unwrap().into()).unwrap();
        assert_eq!(same.identity(), again.identity());
        assert_ne!(same.identity(), other.identity());
        assert!(!same.is_empty());
        assert_eq!(same.read_only().unwrap().as_raw_fd(), same.as_fd().as_raw_fd());
        let weak = same.downgrade();
        assert!(weak.upgrade().is_some());
        drop(same);
        assert!(weak.upgrade().is_none());
    }
}
