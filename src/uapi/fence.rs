//! Fences: sync files, their way into and out of dma-bufs, and into a DRM syncobj; and how to let go of a framebuffer that waits for one.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use super::{Access, retry};

/// `linux/dma-buf.h`
mod dma_buf {
    /// `struct dma_buf_export_sync_file` and `struct dma_buf_import_sync_file`, which are alike.
    #[repr(C)]
    pub(super) struct SyncFile {
        pub(super) flags: u32,
        pub(super) fd: i32,
    }
    pub(super) const SYNC_READ: u32 = 1;
    pub(super) const SYNC_WRITE: u32 = 2;
    nix::ioctl_readwrite!(export_sync_file, b'b', 2, SyncFile);
    nix::ioctl_write_ptr!(import_sync_file, b'b', 3, SyncFile);
    const _: () = assert!(size_of::<SyncFile>() == 8);
}

/// `linux/sync_file.h`
mod sync_file {
    /// `struct sync_merge_data`
    #[repr(C)]
    #[derive(Default)]
    pub(super) struct Merge {
        pub(super) name: [u8; 32],
        pub(super) fd2: i32,
        pub(super) fence: i32,
        pub(super) flags: u32,
        pub(super) pad: u32,
    }
    /// `struct sync_file_info`
    #[repr(C)]
    #[derive(Default)]
    pub(super) struct Info {
        pub(super) name: [u8; 32],
        pub(super) status: i32,
        pub(super) flags: u32,
        pub(super) num_fences: u32,
        pub(super) pad: u32,
        pub(super) sync_fence_info: u64,
    }
    nix::ioctl_readwrite!(merge, b'>', 3, Merge);
    nix::ioctl_readwrite!(info, b'>', 4, Info);
    const _: () = assert!(size_of::<Merge>() == 48 && size_of::<Info>() == 56);
}

/// `drm/drm.h`
mod syncobj {
    /// `struct drm_syncobj_handle` without the `point` that Linux 6.16 added behind it: DRM takes a structure of any length and reads
    /// what is missing as zero (`drm_ioctl`).
    #[repr(C)]
    pub(super) struct Handle {
        pub(super) handle: u32,
        pub(super) flags: u32,
        pub(super) fd: i32,
        pub(super) pad: u32,
    }
    /// `DRM_SYNCOBJ_FD_TO_HANDLE_FLAGS_IMPORT_SYNC_FILE`
    pub(super) const IMPORT_SYNC_FILE: u32 = 1;
    nix::ioctl_readwrite!(fd_to_handle, b'd', 0xc2, Handle);
    const _: () = assert!(size_of::<Handle>() == 16);
}

/// `drm/drm_mode.h`
mod mode {
    /// `struct drm_mode_closefb`
    #[repr(C)]
    pub(super) struct CloseFramebuffer {
        pub(super) id: u32,
        pub(super) pad: u32,
    }
    nix::ioctl_readwrite!(close_framebuffer, b'd', 0xd0, CloseFramebuffer);
    const _: () = assert!(size_of::<CloseFramebuffer>() == 8);
}

/// `struct sync_fence_info`: one fence of a sync file.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct RawFence {
    /// The timeline's name.
    pub(crate) obj_name: [u8; 32],
    pub(crate) driver_name: [u8; 32],
    /// 1 signalled, 0 active, negative a failure's errno.
    pub(crate) status: i32,
    flags: u32,
    /// When it signalled, in ns of `CLOCK_MONOTONIC`; 0 while it has not.
    pub(crate) timestamp_ns: u64,
}
const _: () = assert!(size_of::<RawFence>() == 80);

fn flags(access: Access) -> u32 {
    match access {
        Access::Read => dma_buf::SYNC_READ,
        Access::ReadWrite => dma_buf::SYNC_READ | dma_buf::SYNC_WRITE,
    }
}

/// `DMA_BUF_IOCTL_EXPORT_SYNC_FILE`: a new sync file, close-on-exec, of the fences that such an access has to wait for.
///
/// # Errors
/// The kernel's errno: `ENOTTY` before Linux 6.0.
pub(crate) fn dma_buf_export_sync_file(dma_buf: BorrowedFd<'_>, access: Access) -> io::Result<OwnedFd> {
    let mut export = dma_buf::SyncFile { flags: flags(access), fd: -1 };
    // SAFETY: `export` has the size that the request number carries (asserted above) and lives across the call.
    retry(|| unsafe { dma_buf::export_sync_file(dma_buf.as_raw_fd(), &mut export) })?;
    // SAFETY: the call succeeded, so `fd` is a new descriptor that nobody else owns (dma_buf_export_sync_file).
    Ok(unsafe { OwnedFd::from_raw_fd(export.fd) })
}

/// `DMA_BUF_IOCTL_IMPORT_SYNC_FILE`: others wait for the sync file's fences as for such an access.
///
/// # Errors
/// The kernel's errno: `ENOTTY` before Linux 6.0, `EINVAL` for a descriptor that is no sync file.
pub(crate) fn dma_buf_import_sync_file(
    dma_buf: BorrowedFd<'_>,
    sync_file: BorrowedFd<'_>,
    access: Access,
) -> io::Result<()> {
    let import = dma_buf::SyncFile { flags: flags(access), fd: sync_file.as_raw_fd() };
    // SAFETY: `import` has the size that the request number carries, lives across the call, and is only read.
    retry(|| unsafe { dma_buf::import_sync_file(dma_buf.as_raw_fd(), &import) }).map(drop)
}

/// `SYNC_IOC_MERGE`: a new sync file, close-on-exec, of the fences of both. `name` is what the kernel shows it by.
///
/// # Errors
/// The kernel's errno: `ENOENT` if `second` is no sync file, `ENOTTY` if `first` is none.
pub(crate) fn sync_file_merge(first: BorrowedFd<'_>, second: BorrowedFd<'_>, name: &[u8]) -> io::Result<OwnedFd> {
    let mut merge = sync_file::Merge { fd2: second.as_raw_fd(), fence: -1, ..sync_file::Merge::default() };
    // The last byte stays 0: the name ends there.
    for (to, from) in merge.name[..31].iter_mut().zip(name) {
        *to = *from;
    }
    // SAFETY: `merge` has the size that the request number carries and lives across the call.
    retry(|| unsafe { sync_file::merge(first.as_raw_fd(), &mut merge) })?;
    // SAFETY: the call succeeded, so `fence` is a new descriptor that nobody else owns (sync_file_ioctl_merge).
    Ok(unsafe { OwnedFd::from_raw_fd(merge.fence) })
}

/// `SYNC_IOC_FILE_INFO` without the fences: the status of all together, as [`RawFence::status`], and how many there are.
///
/// # Errors
/// The kernel's errno: `ENOTTY` if it is no sync file.
pub(crate) fn sync_file_status(fd: BorrowedFd<'_>) -> io::Result<(i32, u32)> {
    let mut info = sync_file::Info::default();
    // SAFETY: `info` has the size that the request number carries and lives across the call; with `num_fences` 0 the kernel follows no
    // pointer in it (sync_file_ioctl_fence_info).
    retry(|| unsafe { sync_file::info(fd.as_raw_fd(), &mut info) })?;
    Ok((info.status, info.num_fences))
}

/// `SYNC_IOC_FILE_INFO`: as many of the fences as there are.
///
/// # Errors
/// The kernel's errno: `EINVAL` if `fences` has room for fewer, which does not happen with the number of [`sync_file_status`]: the
/// fences of a sync file never change.
pub(crate) fn sync_file_fences(fd: BorrowedFd<'_>, fences: &mut [RawFence]) -> io::Result<usize> {
    let room = u32::try_from(fences.len()).map_err(|_| io::Error::from_raw_os_error(nix::libc::EINVAL))?;
    if room == 0 {
        return Ok(0);
    }
    let start = fences.as_mut_ptr().expose_provenance() as u64;
    let mut info = sync_file::Info { num_fences: room, sync_fence_info: start, ..sync_file::Info::default() };
    // SAFETY: `info` has the size that the request number carries and lives across the call; `sync_fence_info` points to `num_fences`
    // structures that live as long, and the kernel writes no more (sync_file_ioctl_fence_info).
    retry(|| unsafe { sync_file::info(fd.as_raw_fd(), &mut info) })?;
    Ok(fences.len().min(info.num_fences as usize))
}

/// `DRM_IOCTL_SYNCOBJ_FD_TO_HANDLE` with `IMPORT_SYNC_FILE`: the syncobj `handle` becomes the sync file's fence.
///
/// `drm-ffi` has this call without a place for the handle, which the kernel then looks for in vain (`drm_syncobj_import_sync_file_fence`).
///
/// # Errors
/// The kernel's errno: `ENOENT` if there is no such syncobj, `EINVAL` for a descriptor that is no sync file, `EOPNOTSUPP` from a driver
/// without syncobjs.
pub(crate) fn syncobj_import(device: BorrowedFd<'_>, handle: u32, sync_file: BorrowedFd<'_>) -> io::Result<()> {
    let mut import = syncobj::Handle { handle, flags: syncobj::IMPORT_SYNC_FILE, fd: sync_file.as_raw_fd(), pad: 0 };
    // SAFETY: `import` has the size that the request number carries and lives across the call.
    retry(|| unsafe { syncobj::fd_to_handle(device.as_raw_fd(), &mut import) }).map(drop)
}

/// `DRM_IOCTL_MODE_CLOSEFB`: the file lets go of a framebuffer, and what shows it goes on doing so. It waits for nothing, in contrast to
/// `RMFB` (`drm_mode_closefb`).
///
/// # Errors
/// The kernel's errno: `EINVAL` before Linux 6.8, `ENOENT` if the file has no such framebuffer.
pub(crate) fn close_framebuffer(card: BorrowedFd<'_>, id: u32) -> io::Result<()> {
    let mut close = mode::CloseFramebuffer { id, pad: 0 };
    // SAFETY: `close` has the size that the request number carries and lives across the call.
    retry(|| unsafe { mode::close_framebuffer(card.as_raw_fd(), &mut close) }).map(drop)
}

#[cfg(test)]
mod tests {
    /// The numbers as `strace` prints them.
    #[test]
    fn request_numbers() {
        assert_eq!(nix::request_code_readwrite!(b'b', 2, 8), 0xc008_6202);
        assert_eq!(nix::request_code_write!(b'b', 3, 8), 0x4008_6203);
        assert_eq!(nix::request_code_readwrite!(b'>', 3, 48), 0xc030_3e03);
        assert_eq!(nix::request_code_readwrite!(b'>', 4, 56), 0xc038_3e04);
        assert_eq!(nix::request_code_readwrite!(b'd', 0xc2, 16), 0xc010_64c2);
        assert_eq!(nix::request_code_readwrite!(b'd', 0xd0, 8), 0xc008_64d0);
    }
}
