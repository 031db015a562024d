//! `Syncobj`: DRM's container of a fence, which some drivers and programs pass on in place of sync files.

use std::os::fd::{AsFd, OwnedFd};

use super::SyncFile;
use crate::error::{Context, Error, Kind, Result};
use crate::uapi;

/// A binary DRM syncobj of a device, which holds one fence at a time, or none. Destroyed on drop; whom the fence was handed to keeps it.
///
/// `D` is the open DRM device (`DRIVER_SYNCOBJ`), as a reference or with its ownership. See drivers/gpu/drm/drm_syncobj.c.
#[derive(Debug)]
pub struct Syncobj<D: AsFd> {
    device: D,
    handle: u32,
}

impl<D: AsFd> Syncobj<D> {
    /// A syncobj without a fence. Cost: one system call.
    ///
    /// # Errors
    /// [`Kind::Unsupported`] from a driver without syncobjs.
    pub fn new(device: D) -> Result<Syncobj<D>> {
        let created = drm_ffi::syncobj::create(device.as_fd(), false).context("make a syncobj on", || "a DRM device");
        let handle = created.map_err(|error| explained(error, "DRM_IOCTL_SYNCOBJ_CREATE"))?.handle;
        Ok(Syncobj { device, handle })
    }

    /// A syncobj that holds the fences of a sync file.
    ///
    /// # Errors
    /// As [`Syncobj::new`] and [`Syncobj::import`].
    pub fn from_sync_file(device: D, file: &SyncFile) -> Result<Syncobj<D>> {
        let syncobj = Syncobj::new(device)?;
        syncobj.import(file)?;
        Ok(syncobj)
    }

    /// From now on holds the fences of this sync file and no other. Cost: one system call.
    ///
    /// # Errors
    /// What `DRM_IOCTL_SYNCOBJ_FD_TO_HANDLE` says: `EINVAL` if it is no sync file.
    pub fn import(&self, file: &SyncFile) -> Result<()> {
        let imported = uapi::syncobj_import(self.device.as_fd(), self.handle, file.as_fd());
        imported
            .context("put a fence into", || "a syncobj")
            .map_err(|error| explained(error, "DRM_IOCTL_SYNCOBJ_FD_TO_HANDLE"))
    }

    /// The fence that it holds now, as a sync file. Cost: one system call.
    ///
    /// # Errors
    /// [`Kind::Invalid`] while it holds none (`EINVAL` of `drm_syncobj_find_fence`).
    pub fn export(&self) -> Result<SyncFile> {
        let exported = drm_ffi::syncobj::handle_to_fd(self.device.as_fd(), self.handle, true);
        let exported = exported
            .context("take the fence out of", || "a syncobj")
            .map_err(|error| explained(error, "DRM_IOCTL_SYNCOBJ_HANDLE_TO_FD"))?;
        // SAFETY: the call succeeded, so `fd` is a new descriptor that nobody else owns (drm_syncobj_export_sync_file).
        let fd = unsafe { <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(exported.fd) };
        Ok(SyncFile::from(fd))
    }

    /// The device's number of it, for the driver's own calls.
    pub fn handle(&self) -> u32 {
        self.handle
    }
}

fn explained(error: Error, call: &'static str) -> Error {
    let error = error.said_by(call);
    match error.errno() {
        Some(nix::libc::EOPNOTSUPP) => error.kind_is(Kind::Unsupported).repair("its driver has no syncobjs"),
        Some(nix::libc::EINVAL) => error
            .kind_is(Kind::Invalid)
            .repair("it holds no fence, or the file is no sync file"),
        _ => error,
    }
}

impl<D: AsFd> Drop for Syncobj<D> {
    fn drop(&mut self) {
        // A failure means that it is gone, which is the aim.
        let _ = drm_ffi::syncobj::destroy(self.device.as_fd(), self.handle);
    }
}
