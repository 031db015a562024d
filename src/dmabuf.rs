//! `DmaBuf`: shared ownership of one dma-buf, and its identity.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Weak};

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
        Ok(DmaBuf(Arc::new(Inner { fd, identity: Identity { device: stat.st_dev, inode: stat.st_ino }, len, memfd })))
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

    /// A reference that does not keep the descriptor open.
    pub fn downgrade(&self) -> WeakDmaBuf {
        WeakDmaBuf(Arc::downgrade(&self.0))
    }
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

    #[test]
    fn identity_is_the_inode() {
        let file = File::open("/proc/self/exe").unwrap();
        let same = DmaBuf::new(file.try_clone().unwrap().into()).unwrap();
        let again = DmaBuf::new(File::open("/proc/self/exe").unwrap().into()).unwrap();
        let other = DmaBuf::new(File::open("/etc/passwd").unwrap().into()).unwrap();
        assert_eq!(same.identity(), again.identity());
        assert_ne!(same.identity(), other.identity());
        assert!(!same.is_empty());
        let weak = same.downgrade();
        assert!(weak.upgrade().is_some());
        drop(same);
        assert!(weak.upgrade().is_none());
    }
}
