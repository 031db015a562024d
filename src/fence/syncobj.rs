//! `Syncobj`: DRM's container of a fence, which some drivers and programs pass on in place of sync files.

use std::os::fd::{AsFd, OwnedFd};

use super::SyncFile;
use crate::error::{Context, Error, Kind, Result};
use crate::uapi;

/// A handle to a DRM syncobj: a binary one holds a fence, or none; a timeline holds one for each of its points. Destroyed on drop; whom
/// the fence, or the syncobj itself, was handed to keeps it.
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

    /// A handle to the syncobj that a descriptor stands for: one that was [shared](Syncobj::share), also by another process, device or
    /// API (Mesa's `VK_EXTERNAL_SEMAPHORE_HANDLE_TYPE_OPAQUE_FD_BIT`). Cost: one system call.
    ///
    /// # Errors
    /// What `DRM_IOCTL_SYNCOBJ_FD_TO_HANDLE` says: `EINVAL` if the descriptor is no syncobj.
    pub fn open(device: D, shared: impl AsFd) -> Result<Syncobj<D>> {
        let opened = drm_ffi::syncobj::fd_to_handle(device.as_fd(), shared.as_fd(), false);
        let opened = opened.context("open", || "a syncobj").map_err(|error| match error.errno() {
            Some(nix::libc::EINVAL) => {
                let error = error.said_by("DRM_IOCTL_SYNCOBJ_FD_TO_HANDLE").kind_is(Kind::Invalid);
                error.repair("the descriptor is no syncobj")
            }
            _ => explained(error, "DRM_IOCTL_SYNCOBJ_FD_TO_HANDLE"),
        });
        Ok(Syncobj { handle: opened?.handle, device })
    }

    /// A descriptor, close-on-exec, that stands for this syncobj: to pass it on. It is no sync file, and cannot be polled. Cost: one system
    /// call.
    ///
    /// # Errors
    /// For want of descriptors.
    pub fn share(&self) -> Result<OwnedFd> {
        self.descriptor(false)
            .context("share", || "a syncobj")
            .map_err(|error| error.said_by(TO_FD))
    }

    fn descriptor(&self, sync_file: bool) -> std::io::Result<OwnedFd> {
        let exported = drm_ffi::syncobj::handle_to_fd(self.device.as_fd(), self.handle, sync_file)?;
        // SAFETY: the call succeeded, so `fd` is a new descriptor that nobody else owns (drm_syncobj_handle_to_fd,
        // drm_syncobj_export_sync_file).
        Ok(unsafe { <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(exported.fd) })
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
        let exported = self.descriptor(true).map(SyncFile::from);
        exported
            .context("take the fence out of", || "a syncobj")
            .map_err(|error| explained(error, TO_FD))
    }

    /// Adds the fences of this sync file as a point of the timeline, which is to be higher than those before (`dma_fence_chain_init`) and
    /// comes after them. Cost: four system calls.
    ///
    /// # Errors
    /// [`Kind::Unsupported`] from a driver without timelines (`DRIVER_SYNCOBJ_TIMELINE`); otherwise as [`Syncobj::import`].
    pub fn import_at(&self, point: u64, file: &SyncFile) -> Result<()> {
        let binary = Syncobj::from_sync_file(self.device.as_fd(), file)?;
        let added = drm_ffi::syncobj::transfer(self.device.as_fd(), binary.handle, self.handle, 0, point);
        let added = added.context("put a fence into", || "a timeline");
        added.map(drop).map_err(|error| explained(error, TRANSFER))
    }

    /// The fence of a point of the timeline, as a sync file: it signals when that point and all before it have. Cost: four system calls.
    ///
    /// # Errors
    /// [`Kind::Invalid`] while nobody has added that point or one after it; [`Kind::Unsupported`] as [`Syncobj::import_at`].
    pub fn export_at(&self, point: u64) -> Result<SyncFile> {
        let binary = Syncobj::new(self.device.as_fd())?;
        let taken = drm_ffi::syncobj::transfer(self.device.as_fd(), self.handle, binary.handle, point, 0);
        let taken = taken.context("take a fence out of", || "a timeline");
        taken.map_err(|error| explained(error, TRANSFER))?;
        binary.export()
    }

    /// The device's number of it, for the driver's own calls.
    pub fn handle(&self) -> u32 {
        self.handle
    }
}

const TO_FD: &str = "DRM_IOCTL_SYNCOBJ_HANDLE_TO_FD";
const TRANSFER: &str = "DRM_IOCTL_SYNCOBJ_TRANSFER";

fn explained(error: Error, call: &'static str) -> Error {
    let error = error.said_by(call);
    match error.errno() {
        Some(nix::libc::EOPNOTSUPP) if call == TRANSFER => {
            error.kind_is(Kind::Unsupported).repair("its driver has no timelines")
        }
        Some(nix::libc::EINVAL) if call == TRANSFER => error
            .kind_is(Kind::Invalid)
            .repair("nobody has added that point yet, or one after it"),
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
