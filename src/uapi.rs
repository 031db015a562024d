//! Kernel interfaces that no crate offers: numbers, `repr(C)` structures, and one safe function each.
//!
//! V4L2's structures come from `v4l`, DRM's from `drm-ffi`; here are dma-buf, dma-heap, udmabuf, sync files and pagemap, with the
//! headers that they were read from.

mod fence;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

use nix::errno::Errno;

pub(crate) use fence::{
    RawFence, close_framebuffer, dma_buf_export_sync_file, dma_buf_import_sync_file, sync_file_fences, sync_file_merge,
    sync_file_status, syncobj_import,
};

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

/// `linux/fs.h`: which pages of a mapping are of which sort.
mod pagemap {
    /// `struct pm_scan_arg`
    #[repr(C)]
    #[derive(Default)]
    pub(super) struct Scan {
        pub(super) size: u64,
        pub(super) flags: u64,
        pub(super) start: u64,
        pub(super) end: u64,
        pub(super) walk_end: u64,
        pub(super) vec: u64,
        pub(super) vec_len: u64,
        pub(super) max_pages: u64,
        pub(super) category_inverted: u64,
        pub(super) category_mask: u64,
        pub(super) category_anyof_mask: u64,
        pub(super) return_mask: u64,
    }
    /// `struct page_region`
    #[repr(C)]
    #[derive(Clone, Copy, Default)]
    pub(super) struct Run {
        pub(super) start: u64,
        pub(super) end: u64,
        pub(super) categories: u64,
    }
    pub(super) const IS_FILE: u64 = 1 << 2;
    pub(super) const IS_PRESENT: u64 = 1 << 3;
    pub(super) const IS_SWAPPED: u64 = 1 << 4;
    nix::ioctl_readwrite!(scan, b'f', 16, Scan);
    const _: () = assert!(size_of::<Scan>() == 96 && size_of::<Run>() == 24);
    /// Bits of an entry of `/proc/PID/pagemap` (Documentation/admin-guide/mm/pagemap.rst).
    pub(super) const FILE: u64 = 1 << 61;
    pub(super) const SWAPPED: u64 = 1 << 62;
    pub(super) const PRESENT: u64 = 1 << 63;
}

const PAGEMAP: &str = "/proc/self/pagemap";

/// Calls `found` with the first page and the number of pages of each run of anonymous pages among the `len` bytes at `start`: in a
/// private mapping of a file, those that were written. `PAGEMAP_SCAN`, from Linux 6.7.
///
/// # Errors
/// The kernel's errno: `ENOTTY` before Linux 6.7.
pub(crate) fn pagemap_scan(
    start: usize,
    len: usize,
    page: usize,
    found: &mut dyn FnMut(usize, usize),
) -> io::Result<()> {
    let file = File::open(PAGEMAP)?;
    let mut runs = [pagemap::Run::default(); 32];
    let end = start as u64 + len as u64;
    let mut from = start as u64;
    while from < end {
        let mut scan = pagemap::Scan {
            size: size_of::<pagemap::Scan>() as u64,
            start: from,
            end,
            vec: runs.as_mut_ptr().expose_provenance() as u64,
            vec_len: runs.len() as u64,
            category_inverted: pagemap::IS_FILE,
            category_mask: pagemap::IS_FILE,
            category_anyof_mask: pagemap::IS_PRESENT | pagemap::IS_SWAPPED,
            return_mask: pagemap::IS_PRESENT,
            ..pagemap::Scan::default()
        };
        // SAFETY: `scan` has the size that the request number carries; `vec` points to `vec_len` runs that live across the call, and
        // the kernel writes no more. Without flags nothing of the address space is changed.
        let count = retry(|| unsafe { pagemap::scan(file.as_raw_fd(), &mut scan) })?;
        for run in runs.iter().take(usize::try_from(count).unwrap_or(0)) {
            let first = run.start.saturating_sub(start as u64) as usize / page;
            found(first, run.end.saturating_sub(run.start) as usize / page);
        }
        if scan.walk_end <= from {
            return Err(io::Error::from(Errno::EIO));
        }
        from = scan.walk_end;
    }
    Ok(())
}

/// The same by the entries of pagemap, on older kernels.
///
/// # Errors
/// The kernel's errno.
pub(crate) fn pagemap_read(
    start: usize,
    len: usize,
    page: usize,
    found: &mut dyn FnMut(usize, usize),
) -> io::Result<()> {
    let file = File::open(PAGEMAP)?;
    let mut bytes = [0; 4096];
    let pages = len / page;
    let mut first = 0;
    while first < pages {
        let wanted = ((pages - first) * 8).min(bytes.len());
        file.read_exact_at(&mut bytes[..wanted], ((start / page + first) * 8) as u64)?;
        for (index, entry) in bytes[..wanted].as_chunks::<8>().0.iter().enumerate() {
            let entry = u64::from_ne_bytes(*entry);
            if entry & (pagemap::PRESENT | pagemap::SWAPPED) != 0 && entry & pagemap::FILE == 0 {
                found(first + index, 1);
            }
        }
        first += wanted / 8;
    }
    Ok(())
}

/// Whether pagemap shows a page at `address`, which was read before. It shows none in mappings of bare frame numbers.
///
/// # Errors
/// The kernel's errno.
pub(crate) fn pagemap_first(address: usize, page: usize) -> io::Result<bool> {
    let mut entry = [0; 8];
    File::open(PAGEMAP)?.read_exact_at(&mut entry, (address / page * 8) as u64)?;
    Ok(u64::from_ne_bytes(entry) & pagemap::PRESENT != 0)
}

/// The same as [`pagemap_scan`] for a private mapping of bare frame numbers, which pagemap skips: `move_pages` without a target tells the
/// node of each page that the kernel knows, and in such a mapping it knows those alone that it made itself (`vm_normal_page`).
///
/// # Errors
/// The kernel's errno: `ENOSYS` from a kernel without NUMA.
pub(crate) fn pages_on_nodes(
    start: *const u8,
    len: usize,
    page: usize,
    found: &mut dyn FnMut(usize, usize),
) -> io::Result<()> {
    const AT_ONCE: usize = 256;
    let mut addresses = [std::ptr::null::<u8>(); AT_ONCE];
    let mut status = [0_i32; AT_ONCE];
    let pages = len / page;
    let mut first = 0;
    while first < pages {
        let count = (pages - first).min(AT_ONCE);
        for (index, address) in addresses.iter_mut().take(count).enumerate() {
            *address = start.wrapping_add((first + index) * page);
        }
        retry(|| {
            // SAFETY: both arrays have at least `count` entries and live across the call; with no target nodes it moves nothing and only
            // writes `status`. The addresses are not followed.
            let result = unsafe {
                nix::libc::syscall(
                    nix::libc::SYS_move_pages,
                    0,
                    count,
                    addresses.as_ptr(),
                    std::ptr::null::<i32>(),
                    status.as_mut_ptr(),
                    0,
                )
            };
            Errno::result(result)
        })?;
        for (index, _) in status.iter().take(count).enumerate().filter(|(_, node)| **node >= 0) {
            found(first + index, 1);
        }
        first += count;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    /// The numbers as the kernel's documentation and `strace` print them.
    #[test]
    fn request_numbers() {
        assert_eq!(nix::request_code_write!(b'b', 0, 8), 0x4008_6200);
        assert_eq!(nix::request_code_readwrite!(b'H', 0, 24), 0xc018_4800);
        assert_eq!(nix::request_code_write!(b'u', 0x42, 24), 0x4018_7542);
        assert_eq!(nix::request_code_readwrite!(b'f', 16, 96), 0xc060_6610);
    }
}
