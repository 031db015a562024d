//! `libgbm.so.1`, opened at run time: its functions and structures (`gbm.h`).

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;

use libloading::Library;

use crate::error::{Error, Kind, Result};
use crate::format::MAX_PLANES;

/// The name that every distribution gives it: the major version has been 1 since 2012.
const NAME: &str = "libgbm.so.1";

/// `GBM_BO_IMPORT_FD`
pub(super) const IMPORT_FD: u32 = 0x5503;
/// `GBM_BO_IMPORT_FD_MODIFIER`
pub(super) const IMPORT_FD_MODIFIER: u32 = 0x5504;
/// `DRM_FORMAT_MOD_INVALID` (drm_fourcc.h): the modifier is not stated.
pub(super) const INVALID: u64 = 0x00ff_ffff_ffff_ffff;

/// `struct gbm_import_fd_data`
#[repr(C)]
pub(super) struct ImportFd {
    pub(super) fd: c_int,
    pub(super) width: u32,
    pub(super) height: u32,
    pub(super) stride: u32,
    pub(super) format: u32,
}
const _: () = assert!(size_of::<ImportFd>() == 20);

/// `struct gbm_import_fd_modifier_data`
#[repr(C)]
pub(super) struct ImportFdModifier {
    pub(super) width: u32,
    pub(super) height: u32,
    pub(super) format: u32,
    pub(super) num_fds: u32,
    pub(super) fds: [c_int; MAX_PLANES],
    pub(super) strides: [c_int; MAX_PLANES],
    pub(super) offsets: [c_int; MAX_PLANES],
    pub(super) modifier: u64,
}
// GBM_MAX_PLANES is 4.
const _: () = assert!(size_of::<ImportFdModifier>() == 72 && MAX_PLANES == 4);

/// `struct gbm_device *`
pub(super) type DevicePtr = *mut c_void;
/// `struct gbm_bo *`
pub(super) type BoPtr = *mut c_void;

/// `union gbm_bo_handle`: with Mesa's drivers a GEM handle, of the device's file.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) union BoHandle {
    _ptr: *mut c_void,
    pub(super) u32: u32,
    _s64: i64,
}
const _: () = assert!(size_of::<BoHandle>() == 8);

type CreateWithModifiers = unsafe extern "C" fn(DevicePtr, u32, u32, u32, *const u64, c_uint) -> BoPtr;
type CreateWithModifiers2 = unsafe extern "C" fn(DevicePtr, u32, u32, u32, *const u64, c_uint, u32) -> BoPtr;

/// The functions of libgbm that are used here, as `gbm.h` declares them.
pub(super) struct Functions {
    pub(super) create_device: unsafe extern "C" fn(c_int) -> DevicePtr,
    pub(super) device_destroy: unsafe extern "C" fn(DevicePtr),
    pub(super) device_get_backend_name: unsafe extern "C" fn(DevicePtr) -> *const c_char,
    pub(super) device_is_format_supported: unsafe extern "C" fn(DevicePtr, u32, u32) -> c_int,
    pub(super) bo_create: unsafe extern "C" fn(DevicePtr, u32, u32, u32, u32) -> BoPtr,
    pub(super) bo_create_with_modifiers: CreateWithModifiers,
    /// From Mesa 21.3.
    pub(super) bo_create_with_modifiers2: Option<CreateWithModifiers2>,
    pub(super) bo_import: unsafe extern "C" fn(DevicePtr, u32, *mut c_void, u32) -> BoPtr,
    pub(super) bo_destroy: unsafe extern "C" fn(BoPtr),
    pub(super) bo_get_fd: unsafe extern "C" fn(BoPtr) -> c_int,
    /// From Mesa 21.1.
    pub(super) bo_get_fd_for_plane: Option<unsafe extern "C" fn(BoPtr, c_int) -> c_int>,
    pub(super) bo_get_handle_for_plane: unsafe extern "C" fn(BoPtr, c_int) -> BoHandle,
    pub(super) bo_get_plane_count: unsafe extern "C" fn(BoPtr) -> c_int,
    pub(super) bo_get_stride_for_plane: unsafe extern "C" fn(BoPtr, c_int) -> u32,
    pub(super) bo_get_offset: unsafe extern "C" fn(BoPtr, c_int) -> u32,
    pub(super) bo_get_modifier: unsafe extern "C" fn(BoPtr) -> u64,
    /// Never closed: Mesa's drivers leave threads and handlers of the process's end behind.
    _library: Library,
}

impl Functions {
    /// Opens the library the first time.
    ///
    /// # Errors
    /// [`Kind::Unsupported`] if it is not there, or lacks a function; the same each time.
    pub(super) fn load() -> Result<&'static Functions> {
        static LOADED: OnceLock<Result<Functions, String>> = OnceLock::new();
        let loaded = LOADED.get_or_init(|| Functions::open().map_err(|cause| cause.to_string()));
        loaded.as_ref().map_err(|cause| {
            let error = Error::new(Kind::Unsupported, "load", NAME).because(cause.clone());
            error
                .repair("install it: libgbm1 on Debian and Ubuntu, mesa-libgbm on Fedora, mesa on Arch")
                .said_by("dlopen")
        })
    }

    fn open() -> Result<Functions, libloading::Error> {
        // SAFETY: its initialisers, and those of the libraries that it brings, run: they are Mesa's, or of whoever the machine's owner has
        // installed under that name, as they would be for a program that is linked to it.
        let library = unsafe { Library::new(NAME) }?;
        // SAFETY: each type is that of the function's declaration in `gbm.h`, which has been the same since the function came. A copy
        // of the pointer outlives its symbol as long as the library stays open, and that is never closed: see `load`.
        unsafe {
            Ok(Functions {
                create_device: *library.get(b"gbm_create_device\0")?,
                device_destroy: *library.get(b"gbm_device_destroy\0")?,
                device_get_backend_name: *library.get(b"gbm_device_get_backend_name\0")?,
                device_is_format_supported: *library.get(b"gbm_device_is_format_supported\0")?,
                bo_create: *library.get(b"gbm_bo_create\0")?,
                bo_create_with_modifiers: *library.get(b"gbm_bo_create_with_modifiers\0")?,
                bo_create_with_modifiers2: library.get(b"gbm_bo_create_with_modifiers2\0").ok().map(|symbol| *symbol),
                bo_import: *library.get(b"gbm_bo_import\0")?,
                bo_destroy: *library.get(b"gbm_bo_destroy\0")?,
                bo_get_fd: *library.get(b"gbm_bo_get_fd\0")?,
                bo_get_fd_for_plane: library.get(b"gbm_bo_get_fd_for_plane\0").ok().map(|symbol| *symbol),
                bo_get_handle_for_plane: *library.get(b"gbm_bo_get_handle_for_plane\0")?,
                bo_get_plane_count: *library.get(b"gbm_bo_get_plane_count\0")?,
                bo_get_stride_for_plane: *library.get(b"gbm_bo_get_stride_for_plane\0")?,
                bo_get_offset: *library.get(b"gbm_bo_get_offset\0")?,
                bo_get_modifier: *library.get(b"gbm_bo_get_modifier\0")?,
                _library: library,
            })
        }
    }
}
