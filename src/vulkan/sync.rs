//! Fences as Vulkan has them: semaphores for a queue to wait for or to signal, and fences for the CPU, each to and from a [`SyncFile`].
//!
//! A handle type with copy transference ("Semaphore/Fence External Handle Types"): what is imported or exported is the state of the
//! moment, not the object. So an import is for one wait, and an export takes the signal out as a wait does.

use std::os::fd::{IntoRawFd, OwnedFd, RawFd};

use ash::{khr, vk};

use super::failure::failed;
use super::gpu::Gpu;
use super::physical::Physical;
use crate::error::{Error, Kind, Result};
use crate::fence::SyncFile;

const SEMAPHORE: vk::ExternalSemaphoreHandleTypeFlags = vk::ExternalSemaphoreHandleTypeFlags::SYNC_FD;
const FENCE: vk::ExternalFenceHandleTypeFlags = vk::ExternalFenceHandleTypeFlags::SYNC_FD;

/// No descriptor: the state of something that has signalled.
const SIGNALLED: RawFd = -1;

/// Which way `SYNC_FD` goes with a GPU's semaphores and fences.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SyncOffer {
    /// A queue can wait for a [`SyncFile`].
    pub import_semaphore: bool,
    /// A [`SyncFile`] can stand for what a queue does.
    pub export_semaphore: bool,
    /// A `VkFence` can stand for a [`SyncFile`].
    pub import_fence: bool,
    /// A [`SyncFile`] can be had of a `VkFence`.
    pub export_fence: bool,
}

impl SyncOffer {
    /// What the driver says; nothing without the extensions.
    pub(super) fn of(physical: &Physical) -> SyncOffer {
        if !physical.has_sync_fd() {
            return SyncOffer::default();
        }
        let info = vk::PhysicalDeviceExternalSemaphoreInfo::default().handle_type(SEMAPHORE);
        let mut semaphore = vk::ExternalSemaphoreProperties::default();
        let fence_info = vk::PhysicalDeviceExternalFenceInfo::default().handle_type(FENCE);
        let mut fence = vk::ExternalFenceProperties::default();
        // SAFETY: `Physical::new`'s contract, and Vulkan 1.1 (`has_sync_fd`), which has both calls.
        unsafe {
            let (instance, raw) = (physical.instance(), physical.raw);
            instance.get_physical_device_external_semaphore_properties(raw, &info, &mut semaphore);
            instance.get_physical_device_external_fence_properties(raw, &fence_info, &mut fence);
        }
        let (semaphore, fence) = (semaphore.external_semaphore_features, fence.external_fence_features);
        SyncOffer {
            import_semaphore: semaphore.contains(vk::ExternalSemaphoreFeatureFlags::IMPORTABLE),
            export_semaphore: semaphore.contains(vk::ExternalSemaphoreFeatureFlags::EXPORTABLE),
            import_fence: fence.contains(vk::ExternalFenceFeatureFlags::IMPORTABLE),
            export_fence: fence.contains(vk::ExternalFenceFeatureFlags::EXPORTABLE),
        }
    }
}

/// The extensions' functions of a device that was made with them.
pub(super) struct SyncFds {
    semaphore: khr::external_semaphore_fd::Device,
    fence: khr::external_fence_fd::Device,
    pub(super) offer: SyncOffer,
}

impl SyncFds {
    /// # Safety
    /// Both handles are valid and of each other, and the device was made with `VK_KHR_external_semaphore_fd` and
    /// `VK_KHR_external_fence_fd`.
    pub(super) unsafe fn new(device: &ash::Device, physical: &Physical) -> SyncFds {
        let instance = physical.instance();
        SyncFds {
            semaphore: khr::external_semaphore_fd::Device::new(instance, device),
            fence: khr::external_fence_fd::Device::new(instance, device),
            offer: SyncOffer::of(physical),
        }
    }
}

/// The functions, if the GPU does `what`.
fn functions<'a>(gpu: &'a Gpu, step: &'static str, does: impl Fn(&SyncOffer) -> bool) -> Result<&'a SyncFds> {
    let name = &gpu.info().name;
    let there = gpu.sync_fds().ok_or_else(|| {
        let error = Error::new(Kind::Unsupported, step, name);
        error.because("its device is without VK_KHR_external_semaphore_fd and VK_KHR_external_fence_fd")
    });
    let error = there.and_then(|there| {
        let no = || Error::new(Kind::Unsupported, step, name).because("its driver does not do that with SYNC_FD");
        does(&there.offer).then_some(there).ok_or_else(no)
    });
    error.map_err(|error| error.repair("wait for the fence with the CPU (`SyncFile::wait`)"))
}

/// What an import gives to the driver, which owns it when the import has succeeded. Only a sync file may be
/// (VUID-VkImportSemaphoreFdInfoKHR-fd-01544), and a [`SyncFile`] may be made of any descriptor: the kernel is asked.
fn given(file: Option<SyncFile>) -> Result<RawFd> {
    let Some(file) = file else { return Ok(SIGNALLED) };
    file.state()?;
    Ok(OwnedFd::from(file).into_raw_fd())
}

/// Takes back what an import that failed has left with us.
fn take_back(fd: RawFd) {
    // SAFETY: `given` has made it nobody's, and only an import that succeeds takes it from the caller (`vkImportSemaphoreFdKHR`,
    // `vkImportFenceFdKHR`).
    drop(unsafe { SyncFile::from_raw(fd) });
}

/// A binary `VkSemaphore` whose signal goes in or out as a [`SyncFile`]: how a GPU waits for a frame's
/// [acquire fence](crate::frame::Frame::acquire_fence), and what gives one for the frame that it draws, or a
/// [release fence](crate::frame::Frame::release_after) for the one that it reads.
///
/// # Who submits
/// Submitting work that waits for it or signals it is the program's (`vkQueueSubmit`), and so are the rules that Vulkan has for that: it is
/// dropped, and [imported](Semaphore::import) into, only when all such work has ended (VUID-vkDestroySemaphore-semaphore-05149).
#[derive(Debug)]
pub struct Semaphore {
    gpu: Gpu,
    raw: vk::Semaphore,
}

impl Semaphore {
    /// One that is not signalled.
    ///
    /// # Errors
    /// [`Kind::Unsupported`] if the GPU gives none out, or its device was made without the extensions ([`Gpu::FENCE_EXTENSIONS`]); what
    /// the driver says.
    pub fn new(gpu: &Gpu) -> Result<Semaphore> {
        let offer =
            functions(gpu, "make a semaphore of", |offer| offer.export_semaphore || offer.import_semaphore)?.offer;
        let mut export = vk::ExportSemaphoreCreateInfo::default().handle_types(SEMAPHORE);
        let mut info = vk::SemaphoreCreateInfo::default();
        // VUID-VkExportSemaphoreCreateInfo-handleTypes-01124.
        if offer.export_semaphore {
            info = info.push_next(&mut export);
        }
        // SAFETY: the device lives, and has the extension whose structure is chained.
        let made = unsafe { gpu.device().create_semaphore(&info, None) };
        let raw =
            made.map_err(|result| failed("vkCreateSemaphore", "make a semaphore of", &gpu.info().name, result))?;
        Ok(Semaphore { gpu: gpu.clone(), raw })
    }

    /// Has the next wait for it be one for this fence; `None` for one that has signalled. The fence is the driver's from then on; if the
    /// import fails, it is closed.
    ///
    /// A temporary import, the only sort that there is of `SYNC_FD` (VUID-VkImportSemaphoreFdInfoKHR-handleType-07307): after that wait it is
    /// what it was before. Work that uses it must have ended.
    ///
    /// That its work fails, a wait by a queue does not tell: who wants to know keeps a clone and [checks](SyncFile::check) it. Cost: one
    /// system call, and those of the driver.
    ///
    /// # Errors
    /// As [`Semaphore::new`]; [`Kind::Unsupported`] for a descriptor that is no sync file, which drivers do not look at.
    pub fn import(&mut self, fence: Option<SyncFile>) -> Result<()> {
        let name = &self.gpu.info().name;
        let functions = functions(&self.gpu, "give a fence to", |offer| offer.import_semaphore)?;
        let fd = given(fence)?;
        let info = vk::ImportSemaphoreFdInfoKHR::default()
            .semaphore(self.raw)
            .flags(vk::SemaphoreImportFlags::TEMPORARY)
            .handle_type(SEMAPHORE)
            .fd(fd);
        // SAFETY: the device lives and has the extension; the semaphore is ours, and unused (this type's contract); the descriptor is open
        // and nobody's, or -1, which the specification allows for this type.
        unsafe { functions.semaphore.import_semaphore_fd(&info) }.map_err(|result| {
            take_back(fd);
            failed("vkImportSemaphoreFdKHR", "give a fence to", name, result)
        })
    }

    /// What signals when the work does that was submitted to signal it; `None` if it has signalled already, and the driver says so instead
    /// of giving a descriptor. The semaphore is as after a wait: not signalled.
    ///
    /// Cost: that of the driver, one descriptor. One of software waits here, without limit, for all that was given to its device.
    ///
    /// # Safety
    /// Work that signals it, and everything that this depends on, was submitted, and nothing waits for it
    /// (VUID-VkSemaphoreGetFdInfoKHR-handleType-03254, -01134). It stands for no import: a queue has waited for that
    /// (VUID-VkSemaphoreGetFdInfoKHR-semaphore-01133).
    ///
    /// # Errors
    /// As [`Semaphore::new`].
    pub unsafe fn export(&mut self) -> Result<Option<SyncFile>> {
        let functions = functions(&self.gpu, "take a fence from", |offer| offer.export_semaphore)?;
        let info = vk::SemaphoreGetFdInfoKHR::default().semaphore(self.raw).handle_type(SEMAPHORE);
        // SAFETY: the device lives and has the extension; the semaphore was made for this handle type; the rest by this function's
        // contract.
        let fd = unsafe { functions.semaphore.get_semaphore_fd(&info) };
        let name = &self.gpu.info().name;
        let fd = fd.map_err(|result| failed("vkGetSemaphoreFdKHR", "take a fence from", name, result))?;
        // SAFETY: new, and the caller's to close (vkGetSemaphoreFdKHR), or negative.
        Ok(unsafe { SyncFile::from_raw(fd) })
    }

    /// The handle, for `vkQueueSubmit`. It stays this value's.
    pub fn raw(&self) -> vk::Semaphore {
        self.raw
    }

    /// Gives the handle away, to be destroyed by whoever has it; nothing is destroyed here any more.
    pub fn into_raw(mut self) -> vk::Semaphore {
        std::mem::replace(&mut self.raw, vk::Semaphore::null())
    }
}

impl Drop for Semaphore {
    fn drop(&mut self) {
        if self.gpu.is_stuck() {
            return;
        }
        // SAFETY: ours or null, which is allowed, and unused (this type's contract).
        unsafe { self.gpu.device().destroy_semaphore(self.raw, None) };
    }
}

/// A `VkFence` that goes in or out as a [`SyncFile`], for programs that keep time by those. As with a [`Semaphore`], submitting is the
/// program's, and it is dropped and imported into only when what was submitted with it has ended (VUID-vkDestroyFence-fence-01120).
#[derive(Debug)]
pub struct GpuFence {
    gpu: Gpu,
    raw: vk::Fence,
}

impl GpuFence {
    /// One that is not signalled.
    ///
    /// # Errors
    /// As [`Semaphore::new`].
    pub fn new(gpu: &Gpu) -> Result<GpuFence> {
        let offer = functions(gpu, "make a fence of", |offer| offer.export_fence || offer.import_fence)?.offer;
        let mut export = vk::ExportFenceCreateInfo::default().handle_types(FENCE);
        let mut info = vk::FenceCreateInfo::default();
        // VUID-VkExportFenceCreateInfo-handleTypes-01446.
        if offer.export_fence {
            info = info.push_next(&mut export);
        }
        // SAFETY: the device lives, and has the extension whose structure is chained.
        let made = unsafe { gpu.device().create_fence(&info, None) };
        let raw = made.map_err(|result| failed("vkCreateFence", "make a fence of", &gpu.info().name, result))?;
        Ok(GpuFence { gpu: gpu.clone(), raw })
    }

    /// Makes it stand for this fence until it is reset; `None` for one that has signalled. As [`Semaphore::import`].
    ///
    /// # Errors
    /// As [`Semaphore::import`].
    pub fn import(&mut self, fence: Option<SyncFile>) -> Result<()> {
        let name = &self.gpu.info().name;
        let functions = functions(&self.gpu, "give a fence to", |offer| offer.import_fence)?;
        let fd = given(fence)?;
        // VUID-VkImportFenceFdInfoKHR-handleType-07306: temporary.
        let info = vk::ImportFenceFdInfoKHR::default()
            .fence(self.raw)
            .flags(vk::FenceImportFlags::TEMPORARY)
            .handle_type(FENCE)
            .fd(fd);
        // SAFETY: as in `Semaphore::import`.
        unsafe { functions.fence.import_fence_fd(&info) }.map_err(|result| {
            take_back(fd);
            failed("vkImportFenceFdKHR", "give a fence to", name, result)
        })
    }

    /// What signals when this does; `None` if it has, and the driver gives no descriptor. The fence is reset by that.
    ///
    /// # Safety
    /// It is signalled, or work was submitted with it (VUID-VkFenceGetFdInfoKHR-handleType-01454). It stands for no import: it was reset
    /// after that (VUID-VkFenceGetFdInfoKHR-fence-01455).
    ///
    /// # Errors
    /// As [`Semaphore::new`].
    pub unsafe fn export(&mut self) -> Result<Option<SyncFile>> {
        let functions = functions(&self.gpu, "take a fence from", |offer| offer.export_fence)?;
        let info = vk::FenceGetFdInfoKHR::default().fence(self.raw).handle_type(FENCE);
        // SAFETY: as in `Semaphore::export`.
        let fd = unsafe { functions.fence.get_fence_fd(&info) };
        let name = &self.gpu.info().name;
        let fd = fd.map_err(|result| failed("vkGetFenceFdKHR", "take a fence from", name, result))?;
        // SAFETY: new, and the caller's to close (vkGetFenceFdKHR), or negative.
        Ok(unsafe { SyncFile::from_raw(fd) })
    }

    /// The handle, for `vkQueueSubmit`, `vkWaitForFences` and so on. It stays this value's.
    pub fn raw(&self) -> vk::Fence {
        self.raw
    }

    /// Gives the handle away, to be destroyed by whoever has it; nothing is destroyed here any more.
    pub fn into_raw(mut self) -> vk::Fence {
        std::mem::replace(&mut self.raw, vk::Fence::null())
    }
}

impl Drop for GpuFence {
    fn drop(&mut self) {
        if self.gpu.is_stuck() {
            return;
        }
        // SAFETY: ours or null, which is allowed, and unused (this type's contract).
        unsafe { self.gpu.device().destroy_fence(self.raw, None) };
    }
}
