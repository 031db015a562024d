//! Ownership of what libgbm makes, and every call into it.

use std::ffi::{CStr, c_int, c_uint, c_void};
use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;

use super::library::{BoPtr, Functions, IMPORT_FD, IMPORT_FD_MODIFIER, ImportFd, ImportFdModifier};

/// A `gbm_device` and the descriptor that it was made of, which it uses as long as it lives.
pub(super) struct RawDevice {
    functions: &'static Functions,
    device: NonNull<c_void>,
    /// libgbm promises nothing about threads: one call at a time for a device and what it made.
    calls: Mutex<()>,
    // Dropped after `drop` has destroyed the device.
    fd: OwnedFd,
}

// SAFETY: libgbm ties nothing to the thread that made a device (`gbm.c` and Mesa's `gbm_dri.c` have no thread-local state), and every call
// is made under `calls`.
unsafe impl Send for RawDevice {}
// SAFETY: as above; the functions and the descriptor are not changed.
unsafe impl Sync for RawDevice {}

/// A `gbm_bo`. It keeps its device, which libgbm's does not.
pub(super) struct RawBo {
    bo: NonNull<c_void>,
    device: Arc<RawDevice>,
}

// SAFETY: as of `RawDevice`, under whose lock every call with it is made.
unsafe impl Send for RawBo {}
// SAFETY: as above; nothing but its destruction changes it.
unsafe impl Sync for RawBo {}

/// What a call that gives no object has left in errno; 0 where it has left nothing.
fn failure() -> io::Error {
    io::Error::last_os_error()
}

impl RawDevice {
    /// A device of a descriptor of its own.
    ///
    /// # Errors
    /// What the driver's GBM left in errno, which may be 0.
    pub(super) fn new(functions: &'static Functions, fd: OwnedFd) -> Result<RawDevice, io::Error> {
        Errno::clear();
        // SAFETY: the descriptor is open, and stays so until the device is destroyed: both are in one structure.
        let device = unsafe { (functions.create_device)(fd.as_raw_fd()) };
        let device = NonNull::new(device).ok_or_else(failure)?;
        Ok(RawDevice { functions, device, calls: Mutex::default(), fd })
    }

    fn lock(&self) -> MutexGuard<'_, ()> {
        // It protects nothing of ours that a panic could have left half done.
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `struct gbm_device *`
    pub(super) fn as_ptr(&self) -> *mut c_void {
        self.device.as_ptr()
    }

    /// `gbm_device_get_backend_name`, as in `drm`.
    pub(super) fn backend(&self) -> String {
        let _calls = self.lock();
        // SAFETY: the device is alive.
        let name = unsafe { (self.functions.device_get_backend_name)(self.device.as_ptr()) };
        if name.is_null() {
            return String::new();
        }
        // SAFETY: not null, and a string of the backend's that lives as long as the device (`gbm.c`); copied at once.
        unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned()
    }

    /// `gbm_device_is_format_supported`: whether buffers can be made.
    pub(super) fn makes(&self, code: u32, usage: u32) -> bool {
        let _calls = self.lock();
        // SAFETY: the device is alive.
        unsafe { (self.functions.device_is_format_supported)(self.device.as_ptr(), code, usage) != 0 }
    }

    fn own(self: &Arc<Self>, bo: BoPtr) -> io::Result<RawBo> {
        let bo = NonNull::new(bo).ok_or_else(failure)?;
        Ok(RawBo { bo, device: Arc::clone(self) })
    }

    /// `gbm_bo_create`
    ///
    /// # Errors
    /// What was left in errno.
    pub(super) fn create(self: &Arc<Self>, (width, height): (u32, u32), code: u32, usage: u32) -> io::Result<RawBo> {
        let _calls = self.lock();
        Errno::clear();
        // SAFETY: the device is alive; all else are numbers.
        self.own(unsafe { (self.functions.bo_create)(self.device.as_ptr(), width, height, code, usage) })
    }

    /// `gbm_bo_create_with_modifiers2`, or where that is not there `gbm_bo_create_with_modifiers`, which is told of no usage.
    ///
    /// # Errors
    /// What was left in errno.
    pub(super) fn create_with_modifiers(
        self: &Arc<Self>,
        (width, height): (u32, u32),
        code: u32,
        usage: u32,
        modifiers: &[u64],
    ) -> io::Result<RawBo> {
        let count = c_uint::try_from(modifiers.len()).map_err(|_| io::Error::from(Errno::EINVAL))?;
        let (device, list) = (self.device.as_ptr(), modifiers.as_ptr());
        let _calls = self.lock();
        Errno::clear();
        self.own(match self.functions.bo_create_with_modifiers2 {
            // SAFETY: the device is alive; `list` has `count` entries, which are read during the call alone (gbm_dri_bo_create).
            Some(create) => unsafe { create(device, width, height, code, list, count, usage) },
            // SAFETY: as above.
            None => unsafe { (self.functions.bo_create_with_modifiers)(device, width, height, code, list, count) },
        })
    }

    /// `gbm_bo_import` of one descriptor. It stays the caller's: GBM makes a handle of it.
    ///
    /// # Errors
    /// What was left in errno.
    pub(super) fn import_fd(self: &Arc<Self>, mut data: ImportFd, usage: u32) -> io::Result<RawBo> {
        let _calls = self.lock();
        Errno::clear();
        let pointer = (&raw mut data).cast();
        // SAFETY: the device is alive; `data` is the structure that goes with this number, lives across the call, and is only read.
        self.own(unsafe { (self.functions.bo_import)(self.device.as_ptr(), IMPORT_FD, pointer, usage) })
    }

    /// `gbm_bo_import` of one descriptor for each colour plane. They stay the caller's.
    ///
    /// # Errors
    /// What was left in errno.
    pub(super) fn import_fds(self: &Arc<Self>, mut data: ImportFdModifier, usage: u32) -> io::Result<RawBo> {
        let _calls = self.lock();
        Errno::clear();
        let pointer = (&raw mut data).cast();
        // SAFETY: the device is alive; `data` is the structure that goes with this number, with `num_fds` at most its arrays' length (both
        // are made from a layout), lives across the call, and is only read.
        self.own(unsafe { (self.functions.bo_import)(self.device.as_ptr(), IMPORT_FD_MODIFIER, pointer, usage) })
    }
}

impl AsFd for RawDevice {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for RawDevice {
    fn drop(&mut self) {
        // SAFETY: nothing else refers to the device: each of its objects keeps the structure alive. It is destroyed once, here.
        unsafe { (self.functions.device_destroy)(self.device.as_ptr()) };
    }
}

impl fmt::Debug for RawDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RawDevice").field("fd", &self.fd).finish_non_exhaustive()
    }
}

impl RawBo {
    /// `struct gbm_bo *`
    pub(super) fn as_ptr(&self) -> *mut c_void {
        self.bo.as_ptr()
    }

    /// Number of colour planes, those of a tiling's own among them.
    pub(super) fn planes(&self) -> usize {
        let _calls = self.device.lock();
        // SAFETY: the object is alive, and so is its device.
        usize::try_from(unsafe { (self.device.functions.bo_get_plane_count)(self.bo.as_ptr()) }).unwrap_or(0)
    }

    /// Offset and stride of a plane, in bytes.
    pub(super) fn place(&self, plane: c_int) -> (u32, u32) {
        let (functions, bo) = (self.device.functions, self.bo.as_ptr());
        let _calls = self.device.lock();
        // SAFETY: the object is alive; the plane is one of those counted.
        unsafe { ((functions.bo_get_offset)(bo, plane), (functions.bo_get_stride_for_plane)(bo, plane)) }
    }

    /// The tiling as DRM writes it; `DRM_FORMAT_MOD_INVALID` where it is not stated.
    pub(super) fn modifier(&self) -> u64 {
        let _calls = self.device.lock();
        // SAFETY: the object is alive.
        unsafe { (self.device.functions.bo_get_modifier)(self.bo.as_ptr()) }
    }

    /// A new dma-buf descriptor of the memory that holds a plane, for reading and writing where the driver exports so.
    ///
    /// GBM's own export is the second choice: Mesa's software renderer asks for reading alone, and a GEM object's dma-buf stays as it was
    /// first asked for (drm_gem_prime_handle_to_dmabuf). A libgbm without `gbm_bo_get_fd_for_plane` gives that of the first plane for all,
    /// which is right where all are in one.
    ///
    /// # Errors
    /// What was left in errno.
    pub(super) fn export(&self, plane: c_int) -> io::Result<OwnedFd> {
        let (functions, bo) = (self.device.functions, self.bo.as_ptr());
        let _calls = self.device.lock();
        // SAFETY: the object is alive; the plane is one of those counted. GEM's handles are in these bits of the union, whatever else GBM
        // set.
        let handle = unsafe { (functions.bo_get_handle_for_plane)(bo, plane).u32 };
        // -1 where there is none (gbm_dri_bo_get_handle_for_plane); 0 is none of GEM's (drm_gem_handle_create).
        if handle != 0
            && handle != u32::MAX
            && let Ok(exported) = drm_ffi::gem::handle_to_fd(self.device.as_fd(), handle, READ_WRITE)
        {
            // SAFETY: the call succeeded, so `fd` is a new descriptor that nobody else owns (drm_gem_prime_handle_to_fd).
            return Ok(unsafe { OwnedFd::from_raw_fd(exported.fd) });
        }
        Errno::clear();
        let fd = match functions.bo_get_fd_for_plane {
            // SAFETY: the object is alive; the plane is one of those counted.
            Some(export) => unsafe { export(bo, plane) },
            // SAFETY: the object is alive.
            None => unsafe { (functions.bo_get_fd)(bo) },
        };
        if fd < 0 {
            return Err(failure());
        }
        // SAFETY: the call succeeded, so it is a new descriptor that the caller owns (`gbm_bo_get_fd` in gbm.c).
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }
}

/// DRM_CLOEXEC and DRM_RDWR are O_CLOEXEC and O_RDWR (drm.h).
const READ_WRITE: u32 = (nix::libc::O_CLOEXEC | nix::libc::O_RDWR).cast_unsigned();

impl Drop for RawBo {
    fn drop(&mut self) {
        let _calls = self.device.lock();
        // SAFETY: the object is alive and its owner is here; it is destroyed once. The device outlives it.
        unsafe { (self.device.functions.bo_destroy)(self.bo.as_ptr()) };
    }
}

impl fmt::Debug for RawBo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RawBo").field("device", &self.device).finish_non_exhaustive()
    }
}
