//! Where dma-bufs come from that no device made: udmabuf over a memfd, the system dma-heap; and plain memory.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::ftruncate;

use crate::dmabuf::DmaBuf;
use crate::error::{Context, Error, Kind, Result};
use crate::uapi;

use super::page_size;

/// The length of a file is a signed number of 64 bits.
const LONGEST: usize = i64::MAX as usize;

/// A place that memory for frames comes from.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Allocator {
    /// `/dev/udmabuf` over a memfd: page-wise memory, cached. The memfd stays reachable ([`DmaBuf::memfd`]).
    Udmabuf,
    /// `/dev/dma_heap/system`: page-wise memory, cached.
    SystemHeap,
    /// A memfd alone: no device can import it.
    Plain,
}

/// One piece of memory from an [`Allocator`].
#[derive(Debug)]
pub enum Memory {
    /// A dma-buf.
    DmaBuf(DmaBuf),
    /// A memfd that is not a dma-buf.
    Plain(OwnedFd),
}

impl Allocator {
    /// All allocators of dma-bufs, best first.
    pub const DMA_BUF: [Allocator; 2] = [Allocator::Udmabuf, Allocator::SystemHeap];

    /// The device node, for allocators that have one.
    pub fn node(self) -> Option<&'static str> {
        match self {
            Allocator::Udmabuf => Some("/dev/udmabuf"),
            Allocator::SystemHeap => Some("/dev/dma_heap/system"),
            Allocator::Plain => None,
        }
    }

    /// Whether this process can use it now.
    ///
    /// # Errors
    /// Why not: the node is missing or may not be opened.
    pub fn available(self) -> Result<()> {
        self.open().map(drop)
    }

    /// The first allocator of dma-bufs that can be used, else [`Allocator::Plain`].
    pub fn best() -> Allocator {
        let usable = Allocator::DMA_BUF.into_iter().find(|allocator| allocator.available().is_ok());
        usable.unwrap_or(Allocator::Plain)
    }

    /// Allocates at least `len` bytes, rounded up to whole pages, zeroed.
    ///
    /// # Errors
    /// The node cannot be opened, or the kernel refuses the allocation (udmabuf allows 64 MiB a buffer by default);
    /// [`Kind::Invalid`] for a length that no file has.
    pub fn allocate(self, len: usize) -> Result<Memory> {
        let about = || format!("{len} bytes from {self}");
        let too_long = || Error::new(Kind::Invalid, "allocate", about()).because("no file is that long");
        let len = len.max(1).checked_next_multiple_of(page_size()).filter(|&len| len <= LONGEST);
        let len = len.ok_or_else(too_long)?;
        let device = self.open()?;
        match (self, device) {
            (Allocator::SystemHeap, Some(heap)) => {
                let fd = uapi::dma_heap_alloc(&heap, len).context("allocate", about)?;
                Ok(Memory::DmaBuf(DmaBuf::new(fd)?))
            }
            (Allocator::Udmabuf, Some(device)) => {
                let memfd = sealed_memfd(len).context("allocate", about)?;
                let fd = uapi::udmabuf_create(&device, memfd.as_fd(), len).context("allocate", about)?;
                Ok(Memory::DmaBuf(DmaBuf::over(fd, Some(memfd))?))
            }
            _ => Ok(Memory::Plain(sealed_memfd(len).context("allocate", about)?)),
        }
    }

    fn open(self) -> Result<Option<File>> {
        let Some(node) = self.node() else { return Ok(None) };
        let opened = File::options().read(true).write(true).open(node);
        opened.map(Some).map_err(|cause| Error::from_io("open", node, cause))
    }
}

impl fmt::Display for Allocator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Allocator::Udmabuf => "udmabuf",
            Allocator::SystemHeap => "the system dma-heap",
            Allocator::Plain => "plain memory",
        })
    }
}

impl Memory {
    /// Length in bytes, whole pages.
    ///
    /// # Errors
    /// What `fstat` says of a memfd.
    pub fn bytes(&self) -> Result<usize> {
        match self {
            Memory::DmaBuf(dma_buf) => Ok(dma_buf.len()),
            Memory::Plain(memfd) => {
                let stat = nix::sys::stat::fstat(memfd).context("learn the size of", || "a memfd")?;
                Ok(usize::try_from(stat.st_size).unwrap_or(0))
            }
        }
    }
}

impl AsFd for Memory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Memory::DmaBuf(buffer) => buffer.as_fd(),
            Memory::Plain(memfd) => memfd.as_fd(),
        }
    }
}

/// udmabuf wants a memfd that cannot shrink under it and can be written (`udmabuf_create`: `F_SEAL_SHRINK`, and not
/// `F_SEAL_WRITE`).
fn sealed_memfd(len: usize) -> io::Result<OwnedFd> {
    let memfd = memfd_create("dmaflow", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
    ftruncate(&memfd, i64::try_from(len).map_err(|_| io::Error::from_raw_os_error(nix::libc::EOVERFLOW))?)?;
    fcntl(&memfd, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW))?;
    Ok(memfd)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_memory_is_always_there() {
        let memory = Allocator::Plain.allocate(5000).unwrap();
        assert!(matches!(memory, Memory::Plain(_)));
        assert_eq!(nix::sys::stat::fstat(memory.as_fd()).unwrap().st_size, 8192);
    }

    #[test]
    fn hostile_lengths_are_refused() {
        for len in [usize::MAX, usize::MAX - 4095, LONGEST + 1] {
            assert_eq!(Allocator::Plain.allocate(len).unwrap_err().kind(), Kind::Invalid, "{len}");
        }
    }
}
