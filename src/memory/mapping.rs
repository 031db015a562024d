//! A shared mapping of a dma-buf, and the bracket around the CPU's use of it.

use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::NonNull;

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use crate::dmabuf::DmaBuf;
use crate::error::{Context, Error, Kind, Result};
use crate::uapi::{Access, dma_buf_sync};

use super::span::{Span, copy};

/// A shared mapping (`MAP_SHARED`) of a buffer. Unmapped on drop.
#[derive(Debug)]
pub struct Mapping {
    start: NonNull<u8>,
    len: NonZeroUsize,
    access: Access,
}

// SAFETY: the mapping is memory that belongs to no thread; it may be used and unmapped from any.
unsafe impl Send for Mapping {}
// SAFETY: through a shared reference the memory is only read, by raw copies that make no reference to it; writing takes an exclusive
// one. What devices and other processes do meanwhile is not of this program.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes from the start of `fd` (a dma-buf, or a memfd).
    ///
    /// # Errors
    /// [`Kind::Invalid`] for a length of 0; otherwise what `mmap` says (some exporters refuse).
    pub fn new(fd: BorrowedFd<'_>, len: usize, access: Access) -> Result<Mapping> {
        Mapping::at(fd, 0, len, access)
    }

    /// Maps `len` bytes of `fd` from `offset` on; of a device, what its driver has given that offset to.
    ///
    /// # Errors
    /// As [`Mapping::new`].
    pub(crate) fn at(fd: BorrowedFd<'_>, offset: u64, len: usize, access: Access) -> Result<Mapping> {
        let past = |_| Error::new(Kind::Invalid, "map", format!("a buffer from {offset} on"));
        let offset = nix::libc::off_t::try_from(offset).map_err(past)?;
        let len = NonZeroUsize::new(len).ok_or_else(|| Error::new(Kind::Invalid, "map", "a buffer of 0 bytes"))?;
        let protection = match access {
            Access::Read => ProtFlags::PROT_READ,
            Access::ReadWrite => ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
        };
        // SAFETY: a new mapping at an address that the kernel chooses takes nothing away from anybody; the bytes are
        // only ever copied, so that the device changing them breaks no reference.
        let start = unsafe { mmap(None, len, protection, MapFlags::MAP_SHARED, fd, offset) };
        let start = start.context("map", || format!("{len} bytes of a buffer for the CPU"))?;
        Ok(Mapping { start: start.cast(), len, access })
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len.get()
    }

    /// Never: a mapping has at least one byte.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Copies bytes out, from `offset` on. Bytes past the end of the mapping are zero in `out`.
    pub fn read(&self, offset: usize, out: &mut [u8]) {
        self.span().read(offset, out);
    }

    /// The whole of it as a [`Span`].
    pub fn span(&self) -> Span<'_> {
        // SAFETY: it is mapped readable for as long as `self` lives, and there is no reference into it.
        unsafe { Span::new(self.start, self.len()) }
    }

    /// Copies all of `from` to `offset` on, or nothing if it does not fit. A mapping for reading takes nothing. Whether it did.
    pub fn copy_from(&mut self, offset: usize, from: Span<'_>) -> bool {
        let fits =
            self.access == Access::ReadWrite && self.len().checked_sub(offset).is_some_and(|room| from.len() <= room);
        if let (true, Some(start)) = (fits, NonNull::new(from.as_ptr().cast_mut())) {
            // SAFETY: `offset` and the length of `from` end inside the mapping (checked), which is mapped writable for the life of
            // `self`; `from` is readable. `self` is borrowed exclusively, so `from` is not a part of it: they do not overlap.
            unsafe { copy(start, self.start.add(offset), from.len()) };
        }
        fits
    }

    /// Copies bytes in, from `offset` on, and returns how many fitted. A mapping for reading takes none.
    pub fn write(&mut self, offset: usize, bytes: &[u8]) -> usize {
        let fits = self.len().saturating_sub(offset).min(bytes.len());
        if fits == 0 || self.access == Access::Read {
            return 0;
        }
        // SAFETY: `offset + fits` is at most the mapping's length, mapped writable (checked) for the life of `self`;
        // `bytes` cannot overlap it, as above.
        unsafe { copy(NonNull::from(bytes).cast(), self.start.add(offset), fits) };
        fits
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: start and length are those of the mapping made in `new`, and no reference into it exists.
        // The call can only fail for an address range that was never mapped.
        let _ = unsafe { munmap(self.start.cast(), self.len.get()) };
    }
}

/// The bracket that the kernel wants around CPU access to a dma-buf: caches are made right at its ends.
///
/// Ended by [`CpuAccess::end`], or by drop, which cannot report a failure.
#[derive(Debug)]
#[must_use = "CPU access ends when this is dropped"]
pub struct CpuAccess<'fd> {
    fd: Option<BorrowedFd<'fd>>,
    access: Access,
}

impl<'fd> CpuAccess<'fd> {
    /// Begins CPU access to the dma-buf `fd`. Cost: one system call, and a cache flush on machines that need it.
    ///
    /// # Errors
    /// What `DMA_BUF_IOCTL_SYNC` says.
    pub fn begin(fd: &'fd impl AsFd, access: Access) -> Result<CpuAccess<'fd>> {
        let fd = fd.as_fd();
        dma_buf_sync(fd, access, false).context("begin CPU access to", || "a dma-buf")?;
        Ok(CpuAccess { fd: Some(fd), access })
    }

    /// Ends CPU access.
    ///
    /// # Errors
    /// What `DMA_BUF_IOCTL_SYNC` says.
    pub fn end(mut self) -> Result<()> {
        match self.fd.take() {
            Some(fd) => dma_buf_sync(fd, self.access, true).context("end CPU access to", || "a dma-buf"),
            None => Ok(()),
        }
    }
}

impl Drop for CpuAccess<'_> {
    fn drop(&mut self) {
        if let Some(fd) = self.fd.take() {
            // Nobody can act on a failure here; `end` is for those who want to know.
            let _ = dma_buf_sync(fd, self.access, true);
        }
    }
}

/// [`CpuAccess`] that keeps the dma-buf open itself, for reading.
#[derive(Debug)]
#[must_use = "CPU access ends when this is dropped"]
pub(crate) struct OwnedAccess(DmaBuf);

impl OwnedAccess {
    /// Begins CPU access.
    ///
    /// # Errors
    /// What `DMA_BUF_IOCTL_SYNC` says.
    pub(crate) fn begin(dma_buf: &DmaBuf) -> Result<OwnedAccess> {
        dma_buf_sync(dma_buf.as_fd(), Access::Read, false).context("begin CPU access to", || "a dma-buf")?;
        Ok(OwnedAccess(dma_buf.clone()))
    }
}

impl Drop for OwnedAccess {
    fn drop(&mut self) {
        // Nobody can act on a failure here.
        let _ = dma_buf_sync(self.0.as_fd(), Access::Read, true);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::memfd::{MFdFlags, memfd_create};

    #[test]
    fn copies_stay_inside() {
        let memfd = memfd_create("test", MFdFlags::MFD_CLOEXEC).unwrap();
        nix::unistd::ftruncate(&memfd, 4096).unwrap();
        let mut map = Mapping::new(memfd.as_fd(), 4096, Access::ReadWrite).unwrap();
        assert_eq!(map.write(4090, &[1, 2, 3, 4, 5, 6, 7, 8]), 6);
        assert_eq!(map.write(4096, &[1]), 0);
        let mut out = [9; 8];
        map.read(4092, &mut out);
        assert_eq!(out, [3, 4, 5, 6, 0, 0, 0, 0]);
        map.read(usize::MAX, &mut out);
        assert_eq!(out, [0; 8]);
        let mut read_only = Mapping::new(memfd.as_fd(), 4096, Access::Read).unwrap();
        assert_eq!(read_only.write(0, &[1]), 0);
        assert!(Mapping::new(memfd.as_fd(), 0, Access::Read).is_err());
    }
}
