//! `Gpu`: a Vulkan device to import into, its own or a program's.

use std::ffi::CStr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use ash::{khr, vk};

use super::convert;
use super::failure::failed;
use super::instance::Instance;
use super::messages::Messages;
use super::offers::{GpuOffer, HandleOffer};
use super::physical::{FENCES, GpuInfo, GpuKind, NEEDED, Physical};
use super::sync::{SyncFds, SyncOffer};
use crate::error::{Error, Kind, Result};

/// Which GPU, and how.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct GpuRequest {
    /// A DRM node (`/dev/dri/renderD128`), or a part of the name of device or driver; otherwise the best that can import: discrete
    /// before integrated, software last.
    pub name: Option<String>,
    /// Of several GPUs rather the one that is, or belongs to, the device of this DRM node: that of a display, whose memory it reaches.
    pub near: Option<PathBuf>,
    /// Has the validation layer check every call, synchronization included: see [`Gpu::messages`]. Slow, for tests.
    pub validation: bool,
}

/// A GPU of this machine, and what it can import, or why it cannot.
#[derive(Clone, Debug)]
pub struct GpuListing {
    /// What it is.
    pub info: GpuInfo,
    /// The formats that it can import for sampling.
    pub offers: Vec<GpuOffer>,
    /// The kinds of memory handles that it knows.
    pub handles: Vec<HandleOffer>,
    /// Which way fences go.
    pub sync: SyncOffer,
}

/// A program's own device, for [`Gpu::from_raw`].
#[derive(Clone)]
pub struct RawGpu {
    /// The instance.
    pub instance: ash::Instance,
    /// The physical device.
    pub physical: vk::PhysicalDevice,
    /// The device.
    pub device: ash::Device,
    /// The family of the queue.
    pub queue_family: u32,
    /// The queue that [`Vulkan`](super::Vulkan) and [`GpuConverter`](super::GpuConverter) submit to, and wait for. An import alone uses none.
    pub queue: vk::Queue,
    /// Whether the device was made with the feature `samplerYcbcrConversion`. Without it, as wgpu makes its devices, there are no images
    /// of several colour planes: NV12 and its like are imported [plane by plane](super::GpuImporter::import_planes).
    pub ycbcr: bool,
    /// Whether the device was made with [`Gpu::FENCE_EXTENSIONS`]. Without them fences are waited for by the CPU.
    pub sync_fd: bool,
}

/// A Vulkan device. Clones are cheap and share it; images keep it.
#[derive(Clone)]
pub struct Gpu(Arc<Inner>);

struct Inner {
    device: ash::Device,
    memory_fd: khr::external_memory_fd::Device,
    /// Where the device was made with the extensions.
    sync_fds: Option<SyncFds>,
    physical: Physical,
    memory: vk::PhysicalDeviceMemoryProperties,
    queue_family: u32,
    queue: Mutex<vk::Queue>,
    /// Whether commands that compute can be submitted to the queue.
    computes: bool,
    /// Whether work was submitted that did not end.
    stuck: AtomicBool,
    convert: convert::Shared,
    /// Where the device is ours; last, because everything above is of it.
    owned: Option<Instance>,
}

impl std::fmt::Debug for Gpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Gpu({})", self.info().name)
    }
}

impl Gpu {
    /// The device extensions that an import needs; in Vulkan 1.1 also `VK_KHR_image_format_list`.
    pub const EXTENSIONS: [&CStr; 4] = NEEDED;

    /// The device extensions that fences need to go in and out ([`Semaphore`](super::Semaphore), [`GpuFence`](super::GpuFence)). A GPU
    /// that is opened here has them where its driver does.
    pub const FENCE_EXTENSIONS: [&CStr; 2] = FENCES;

    /// Opens a GPU: loads the Vulkan loader, makes an instance and a device of its own. Tens of milliseconds and more.
    ///
    /// # Errors
    /// [`Kind::NotFound`] where there is no loader, no driver or no GPU of that name; [`Kind::Unsupported`] where it cannot import
    /// dma-bufs, naming the extensions that are missing.
    pub fn open(request: &GpuRequest) -> Result<Gpu> {
        let instance = Instance::new(request.validation)?;
        let best = suited(&instance, request)?.into_iter().next();
        best.map_or_else(|| Err(none(request, &[])), |physical| Gpu::of(instance, physical))
    }

    /// Every GPU that suits the request, the best first, which is the one that [`Gpu::open`] opens. Each is opened when the iterator comes to
    /// it, with an instance of its own; one that cannot be is an error, and not the end.
    pub fn open_each(request: &GpuRequest) -> impl Iterator<Item = Result<Gpu>> + use<> {
        let (request, mut next) = (request.clone(), Some(0));
        std::iter::from_fn(move || {
            let place = next.take()?;
            match Gpu::open_at(&request, place) {
                Ok(opened) => {
                    next = Some(place + 1);
                    opened
                }
                // What fails for all.
                Err(error) => Some(Err(error)),
            }
        })
    }

    /// The GPU at this place of those that suit; none behind the last.
    fn open_at(request: &GpuRequest, place: usize) -> Result<Option<Result<Gpu>>> {
        let instance = Instance::new(request.validation)?;
        let physical = suited(&instance, request)?.into_iter().nth(place);
        Ok(physical.map(|physical| Gpu::of(instance, physical)))
    }

    /// A device of its own.
    fn of(instance: Instance, physical: Physical) -> Result<Gpu> {
        physical.can_import()?;
        if let Some(messages) = &instance.messages
            && physical.lacks_second_list()
        {
            messages.pass_over_no_features();
        }
        let name = physical.info.name.clone();
        // SAFETY: the physical device is of this instance.
        let families = unsafe { instance.raw.get_physical_device_queue_family_properties(physical.raw) };
        let has = |wanted| families.iter().position(|family| family.queue_flags.contains(wanted));
        let (graphics, compute) = (vk::QueueFlags::GRAPHICS, vk::QueueFlags::COMPUTE);
        let family = has(graphics | compute).or_else(|| has(compute));
        let family = family.and_then(|family| u32::try_from(family).ok());
        let family = family
            .ok_or_else(|| Error::new(Kind::Unsupported, "compute on", &name).because("it has no queue for it"))?;
        let priorities = [1.0];
        let queues = [vk::DeviceQueueCreateInfo::default()
            .queue_family_index(family)
            .queue_priorities(&priorities)];
        let extensions: Vec<_> = physical.device_extensions().iter().map(|name| name.as_ptr()).collect();
        let mut ycbcr =
            vk::PhysicalDeviceSamplerYcbcrConversionFeatures::default().sampler_ycbcr_conversion(physical.ycbcr);
        let info = vk::DeviceCreateInfo::default()
            .queue_create_infos(&queues)
            .enabled_extension_names(&extensions)
            .push_next(&mut ycbcr);
        // SAFETY: the physical device is of this instance and has these extensions and features; all that `info` points to lives
        // until the call returns.
        let device = unsafe { instance.raw.create_device(physical.raw, &info, None) }
            .map_err(|result| failed("vkCreateDevice", "open", &name, result))?;
        // SAFETY: this family was asked for above, with one queue.
        let queue = unsafe { device.get_device_queue(family, 0) };
        // SAFETY: as for the families.
        let memory = unsafe { instance.raw.get_physical_device_memory_properties(physical.raw) };
        let memory_fd = khr::external_memory_fd::Device::new(&instance.raw, &device);
        // SAFETY: the device is of this instance and has the extensions (`device_extensions`).
        let sync_fds = physical.has_sync_fd().then(|| unsafe { SyncFds::new(&device, &physical) });
        let queue = Mutex::new(queue);
        Ok(Gpu(Arc::new(Inner {
            device,
            memory_fd,
            sync_fds,
            physical,
            memory,
            queue_family: family,
            queue,
            computes: true,
            stuck: AtomicBool::new(false),
            convert: convert::Shared::default(),
            owned: Some(instance),
        })))
    }

    /// A program's own device. It stays the program's: nothing of it is destroyed here, and images that are imported are the program's
    /// to use as it does its own.
    ///
    /// Where the queue's family does not compute, imports are all there is: [`Vulkan`](super::Vulkan) and
    /// [`GpuConverter`](super::GpuConverter) refuse to be made. If one of them fails with [`Kind::Timeout`], what it had given to the GPU
    /// stays in the device, never destroyed.
    ///
    /// # Safety
    /// - All handles of `raw` are valid and of each other, the instance has Vulkan 1.1 or later, and all outlive the last clone of this
    ///   and everything imported through it. The queue is of this family, made without flags (`vkGetDeviceQueue`).
    /// - The device was made with [`Gpu::EXTENSIONS`], with `VK_KHR_image_format_list` where the instance's `apiVersion` or the physical
    ///   device's version is below 1.2, and with what `raw` says of it.
    /// - While a [`Vulkan`](super::Vulkan) or a [`GpuConverter`](super::GpuConverter) of this exists, in whatever thread, whoever else uses
    ///   the queue holds the lock of [`Gpu::queue`] meanwhile: `vkQueueSubmit` and its like want the queue externally synchronized ("Host
    ///   Synchronization" of each).
    ///
    /// # Errors
    /// [`Kind::Unsupported`] where the physical device lacks an extension; [`Kind::Invalid`] for a family that it does not have.
    pub unsafe fn from_raw(raw: RawGpu) -> Result<Gpu> {
        let RawGpu { instance, physical, device, queue_family, queue, ycbcr, sync_fd } = raw;
        let memory_fd = khr::external_memory_fd::Device::new(&instance, &device);
        // SAFETY: by this function's contract.
        let memory = unsafe { instance.get_physical_device_memory_properties(physical) };
        // SAFETY: as above.
        let families = unsafe { instance.get_physical_device_queue_family_properties(physical) };
        // SAFETY: as above.
        let mut physical = unsafe { Physical::new(instance, physical) }?;
        physical.can_import()?;
        physical.ycbcr &= ycbcr;
        let computes = computes(&families, queue_family).ok_or_else(|| {
            let error = Error::new(Kind::Invalid, "use the queue of", &physical.info.name);
            error.because(format!("it has {} queue families, and none at {queue_family}", families.len()))
        })?;
        // SAFETY: by this function's contract the device was made with the extensions if `raw` says so.
        let sync_fds = (sync_fd && physical.has_sync_fd()).then(|| unsafe { SyncFds::new(&device, &physical) });
        Ok(Gpu(Arc::new(Inner {
            device,
            memory_fd,
            sync_fds,
            physical,
            memory,
            queue_family,
            queue: Mutex::new(queue),
            computes,
            stuck: AtomicBool::new(false),
            convert: convert::Shared::default(),
            owned: None,
        })))
    }

    /// Whether commands that compute can be submitted.
    ///
    /// # Errors
    /// [`Kind::Unsupported`] with a queue that was handed in and is of another sort.
    pub(super) fn can_compute(&self) -> Result<()> {
        if self.0.computes {
            return Ok(());
        }
        let error = Error::new(Kind::Unsupported, "compute on", &self.info().name);
        let error =
            error.because(format!("queue family {}, which was handed in, does not compute", self.0.queue_family));
        Err(error.repair("hand in a queue of a family with VK_QUEUE_COMPUTE_BIT"))
    }

    /// Whether work was submitted that did not end in time, and may still use what it was given: nothing of that is destroyed any more.
    pub(super) fn is_stuck(&self) -> bool {
        self.0.stuck.load(Ordering::Acquire)
    }

    /// Remembers that work did not end. From now on the device stays, also when its last user is gone.
    pub(super) fn give_up(&self) {
        if !self.0.stuck.swap(true, Ordering::AcqRel) {
            std::mem::forget(self.clone());
        }
    }

    /// Every GPU of the machine: what it is and can import, or why it cannot.
    ///
    /// # Errors
    /// [`Kind::NotFound`] where there is no loader or no driver.
    pub fn list() -> Result<Vec<Result<GpuListing>>> {
        let instance = Instance::new(false)?;
        let list = |raw| {
            // SAFETY: the device is of this instance, which outlives this function's closure and its results' making.
            let physical = unsafe { Physical::new(instance.raw.clone(), raw) }?;
            physical.can_import()?;
            let offers = physical.offers(vk::ImageUsageFlags::SAMPLED);
            let (handles, sync) = (physical.handles(), SyncOffer::of(&physical));
            Ok(GpuListing { info: physical.info.clone(), offers, handles, sync })
        };
        Ok(instance.physical_devices()?.into_iter().map(list).collect())
    }

    /// What it is.
    pub fn info(&self) -> &GpuInfo {
        &self.0.physical.info
    }

    /// The formats that it can import for this use, with their modifiers; none for a use that [`GpuImporter`](super::GpuImporter) refuses.
    /// Some hundred calls of the driver.
    pub fn offers(&self, usage: vk::ImageUsageFlags) -> Vec<GpuOffer> {
        self.0.physical.offers(usage)
    }

    /// The kinds of memory handles that it knows.
    pub fn handles(&self) -> Vec<HandleOffer> {
        self.0.physical.handles()
    }

    /// Which way fences go between it and the kernel: none for a program's device without [`Gpu::FENCE_EXTENSIONS`].
    pub fn sync(&self) -> SyncOffer {
        self.0.sync_fds.as_ref().map(|fds| fds.offer).unwrap_or_default()
    }

    pub(super) fn sync_fds(&self) -> Option<&SyncFds> {
        self.0.sync_fds.as_ref()
    }

    /// The device, to use what was imported.
    pub fn device(&self) -> &ash::Device {
        &self.0.device
    }

    /// The family of the queue, which acquires images from their foreign owner.
    pub fn queue_family(&self) -> u32 {
        self.0.queue_family
    }

    /// What the validation layer said, if it was asked for. Keep it to see also what is said at the end.
    pub fn messages(&self) -> Option<Messages> {
        self.0.owned.as_ref()?.messages.clone()
    }

    /// The queue; whoever holds the lock may submit, and wait for it.
    pub fn queue(&self) -> &Mutex<vk::Queue> {
        &self.0.queue
    }

    /// What the device takes at most.
    pub(super) fn limits(&self) -> vk::PhysicalDeviceLimits {
        self.0.physical.limits()
    }

    /// What conversions on it share.
    pub(super) fn conversions(&self) -> &convert::Shared {
        &self.0.convert
    }

    pub(super) fn physical(&self) -> &Physical {
        &self.0.physical
    }

    pub(super) fn memory_fd(&self) -> &khr::external_memory_fd::Device {
        &self.0.memory_fd
    }

    /// The first memory type of those in `bits` that has all of `wanted`. `bits` are those of
    /// `VkMemoryRequirements::memoryTypeBits`.
    pub fn memory_type(&self, bits: u32, wanted: vk::MemoryPropertyFlags) -> Option<u32> {
        let types = self.0.memory.memory_types_as_slice();
        (0u32..).zip(types).find_map(|(index, memory)| {
            let fits = bits & (1 << index) != 0 && memory.property_flags.contains(wanted);
            fits.then_some(index)
        })
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if self.owned.is_some() {
            // SAFETY: the device is ours, and whatever was made of it held a clone of this and is gone. Whoever submitted work has
            // waited for its end; this waits for what a failure has left. The instance goes after this, with the field.
            unsafe {
                let _ = self.device.device_wait_idle();
                self.device.destroy_device(None);
            }
        }
    }
}

/// Whether this family computes; `None` if there is no such family.
fn computes(families: &[vk::QueueFamilyProperties], family: u32) -> Option<bool> {
    let family = families.get(usize::try_from(family).ok()?)?;
    Some(family.queue_flags.contains(vk::QueueFlags::COMPUTE))
}

/// Lower is better: what can import, then what is near, then hardware with memory of its own. One that cannot import comes last, to say why.
fn rank(imports: bool, near: bool, kind: GpuKind) -> impl Ord {
    (!imports, !near, kind)
}

/// The GPUs that the request can mean, the best first.
///
/// # Errors
/// [`Kind::NotFound`] if there is none.
fn suited(instance: &Instance, request: &GpuRequest) -> Result<Vec<Physical>> {
    let (mut there, mut names) = (Vec::new(), Vec::new());
    for raw in instance.physical_devices()? {
        // SAFETY: the device is of this instance, which the caller keeps for as long as the result.
        let physical = unsafe { Physical::new(instance.raw.clone(), raw) }?;
        names.push(physical.info.name.clone());
        let is_meant = request.name.as_deref().map_or(Ok(true), |name| physical.is_called(name));
        if is_meant? {
            there.push(physical);
        }
    }
    if there.is_empty() {
        return Err(none(request, &names));
    }
    there.sort_by_cached_key(|physical| {
        // A display without a node is near to none.
        let near = request
            .near
            .as_deref()
            .is_some_and(|node| physical.is_at(node).unwrap_or(false));
        rank(physical.can_import().is_ok(), near, physical.info.kind)
    });
    Ok(there)
}

fn none(request: &GpuRequest, names: &[String]) -> Error {
    let name = request.name.as_deref();
    let subject = name.map_or_else(|| "a GPU".to_owned(), |name| format!("a GPU called \"{name}\""));
    Error::new(Kind::NotFound, "find", subject).repair(match names {
        [] => "install a Vulkan driver (Debian: mesa-vulkan-drivers)".to_owned(),
        _ => format!("there is {}", names.join(", ")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_of_several() {
        use GpuKind::{Discrete, Integrated, Software};
        // What can import, whether it is near, of what sort.
        let best_first = [
            (true, true, Integrated),
            (true, false, Discrete),
            (true, false, Integrated),
            (true, false, Software),
            (false, true, Discrete),
            (false, false, Discrete),
        ];
        for pair in best_first.windows(2) {
            let [(imports, near, kind), (other_imports, other_near, other_kind)] = [pair[0], pair[1]];
            assert!(rank(imports, near, kind) < rank(other_imports, other_near, other_kind), "{pair:?}");
        }
    }

    #[test]
    fn families() {
        let family = |flags| vk::QueueFamilyProperties { queue_flags: flags, ..Default::default() };
        let (graphics, compute) = (vk::QueueFlags::GRAPHICS, vk::QueueFlags::COMPUTE);
        let families = [family(graphics | compute), family(vk::QueueFlags::TRANSFER), family(compute)];
        let all: Vec<_> = (0..4).map(|index| computes(&families, index)).collect();
        assert_eq!(all, [Some(true), Some(false), Some(true), None]);
    }
}
