//! Kernel interfaces that no crate offers: numbers, `repr(C)` structures, and one safe function each.
//!
//! V4L2's structures come from `v4l`, DRM's from `drm-ffi`; here are dma-buf, dma-heap and udmabuf, with the headers
//! that they were read from.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;

/// Runs a system call again while a signal interrupted it or the kernel asks to try again at once.
fn retry<T>(mut call: impl FnMut() -> nix::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(Errno::EINTR | Errno::EAGAIN) => {}
            result => return result.map_err(io::Error::from),
        }
    }
}

/// `linux/dma-buf.h`
mod dma_buf {
    /// `struct dma_buf_sync`
    #[repr(C)]
    pub(super) struct Sync {
        pub(super) flags: u64,
    }
    pub(super) const SYNC_READ: u64 = 1;
    pub(super) const SYNC_WRITE: u64 = 2;
    pub(super) const SYNC_END: u64 = 4;
    nix::ioctl_write_ptr!(sync, b'b', 0, Sync);
    const _: () = assert!(size_of::<Sync>() == 8);
}

/// `linux/dma-heap.h`
mod dma_heap {
    /// `struct dma_heap_allocation_data`
    #[repr(C)]
    pub(super) struct Allocation {
        pub(super) len: u64,
        pub(super) fd: u32,
        pub(super) fd_flags: u32,
        pub(super) heap_flags: u64,
    }
    nix::ioctl_readwrite!(alloc, b'H', 0, Allocation);
    const _: () = assert!(size_of::<Allocation>() == 24);
}

/// `linux/udmabuf.h`
mod udmabuf {
    /// `struct udmabuf_create`
    #[repr(C)]
    pub(super) struct Create {
        pub(super) memfd: u32,
        pub(super) flags: u32,
        pub(super) offset: u64,
        pub(super) size: u64,
    }
    pub(super) const FLAGS_CLOEXEC: u32 = 1;
    // The kernel defines it as _IOW; its answer is the new descriptor.
    nix::ioctl_write_ptr!(create, b'u', 0x42, Create);
    const _: () = assert!(size_of::<Create>() == 24);
}

/// Which way the CPU uses a dma-buf between the two calls of `DMA_BUF_IOCTL_SYNC`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// The CPU reads.
    Read,
    /// The CPU reads and writes.
    ReadWrite,
}

/// `DMA_BUF_IOCTL_SYNC`: begins or ends CPU access.
///
/// # Errors
/// The kernel's errno. `EINTR` and `EAGAIN` are retried, as the documentation of the ioctl asks.
pub(crate) fn dma_buf_sync(fd: BorrowedFd<'_>, access: Access, end: bool) -> io::Result<()> {
    let direction = match access {
        Access::Read => dma_buf::SYNC_READ,
        Access::ReadWrite => dma_buf::SYNC_READ | dma_buf::SYNC_WRITE,
    };
    let sync = dma_buf::Sync { flags: direction | if end { dma_buf::SYNC_END } else { 0 } };
    // SAFETY: `sync` has the size that the request number carries (asserted above), lives across the call, and is only read.
    retry(|| unsafe { dma_buf::sync(fd.as_raw_fd(), &sync) }).map(drop)
}

/// `DMA_HEAP_IOCTL_ALLOC`: a new dma-buf of `len` bytes, close-on-exec.
///
/// # Errors
/// The kernel's errno.
pub(crate) fn dma_heap_alloc(heap: &File, len: usize) -> io::Result<OwnedFd> {
    let flags = (nix::libc::O_CLOEXEC | nix::libc::O_RDWR).cast_unsigned();
    let mut allocation = dma_heap::Allocation { len: len as u64, fd: 0, fd_flags: flags, heap_flags: 0 };
    // SAFETY: `allocation` has the size that the request number carries and lives across the call.
    retry(|| unsafe { dma_heap::alloc(heap.as_raw_fd(), &mut allocation) })?;
    // SAFETY: the call succeeded, so `fd` is a new descriptor that nobody else owns (dma_heap_ioctl_allocate).
    Ok(unsafe { OwnedFd::from_raw_fd(allocation.fd.cast_signed()) })
}

/// `UDMABUF_CREATE`: a dma-buf over `len` bytes of a sealed memfd, from its start, close-on-exec.
///
/// # Errors
/// The kernel's errno: `EINVAL` for a memfd without `F_SEAL_SHRINK` or with `F_SEAL_WRITE`, or a length that is not a
/// multiple of the page size.
pub(crate) fn udmabuf_create(device: &File, memfd: BorrowedFd<'_>, len: usize) -> io::Result<OwnedFd> {
    let create = udmabuf::Create {
        memfd: memfd.as_raw_fd().cast_unsigned(),
        flags: udmabuf::FLAGS_CLOEXEC,
        offset: 0,
        size: len as u64,
    };
    // SAFETY: `create` has the size that the request number carries, lives across the call, and is only read.
    let fd = retry(|| unsafe { udmabuf::create(device.as_fd().as_raw_fd(), &create) })?;
    // SAFETY: the call succeeded, so its result is a new descriptor that nobody else owns (udmabuf_create).
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    /// The numbers as the kernel's documentation and `strace` print them.
    #[test]
    fn request_numbers() {
        assert_eq!(nix::request_code_write!(b'b', 0, 8), 0x4008_6200);
        assert_eq!(nix::request_code_readwrite!(b'H', 0, 24), 0xc018_4800);
        assert_eq!(nix::request_code_write!(b'u', 0x42, 24), 0x4018_7542);
    }
}
