//! `Gpu`: a Vulkan device to import into, its own or a program's.

use std::ffi::CStr;
use std::sync::{Arc, Mutex};

use ash::{khr, vk};

use super::convert;
use super::failure::failed;
use super::instance::Instance;
use super::messages::Messages;
use super::offers::{GpuOffer, HandleOffer};
use super::physical::{GpuInfo, NEEDED, Physical};
use crate::error::{Error, Kind, Result};

/// Which GPU, and how.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct GpuRequest {
    /// A DRM node (`/dev/dri/renderD128`), or a part of the name of device or driver; otherwise the best that can import: discrete
    /// before integrated, software last.
    pub name: Option<String>,
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
    /// The queue that a [`Vulkan`](super::Vulkan) sink and a [`GpuConverter`](super::GpuConverter) submit to. An import alone uses none.
    pub queue: vk::Queue,
    /// Whether the device was made with the feature `samplerYcbcrConversion`. Without it, as wgpu makes its devices, there are no images
    /// of several colour planes: NV12 and its like are imported [plane by plane](super::GpuImporter::import_planes).
    pub ycbcr: bool,
}

/// A Vulkan device. Clones are cheap and share it; images keep it.
#[derive(Clone)]
pub struct Gpu(Arc<Inner>);

struct Inner {
    device: ash::Device,
    memory_fd: khr::external_memory_fd::Device,
    physical: Physical,
    memory: vk::PhysicalDeviceMemoryProperties,
    queue_family: u32,
    queue: Mutex<vk::Queue>,
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

    /// Opens a GPU: loads the Vulkan loader, makes an instance and a device of its own. Tens of milliseconds and more.
    ///
    /// # Errors
    /// [`Kind::NotFound`] where there is no loader, no driver or no GPU of that name; [`Kind::Unsupported`] where it cannot import
    /// dma-bufs, naming the extensions that are missing.
    pub fn open(request: &GpuRequest) -> Result<Gpu> {
        let instance = Instance::new(request.validation)?;
        let physical = choose(&instance, request.name.as_deref())?;
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
        let queue = Mutex::new(queue);
        Ok(Gpu(Arc::new(Inner {
            device,
            memory_fd,
            physical,
            memory,
            queue_family: family,
            queue,
            convert: convert::Shared::default(),
            owned: Some(instance),
        })))
    }

    /// A program's own device. It stays the program's: nothing of it is destroyed here, and images that are imported are the program's
    /// to use as it does its own.
    ///
    /// # Safety
    /// - All handles of `raw` are valid and of each other, the instance has Vulkan 1.1 or later, and all outlive the last clone of this
    ///   and everything imported through it.
    /// - The device was made with [`Gpu::EXTENSIONS`], `VK_KHR_image_format_list` if it is of Vulkan 1.1, and with what `raw` says.
    /// - While a [`Vulkan`](super::Vulkan) sink or a [`GpuConverter`](super::GpuConverter) of this is in use, whoever else submits to the
    ///   queue holds [`Gpu::queue`] meanwhile: `vkQueueSubmit` wants the queue externally synchronized.
    ///
    /// # Errors
    /// [`Kind::Unsupported`] where the physical device lacks an extension.
    pub unsafe fn from_raw(raw: RawGpu) -> Result<Gpu> {
        let RawGpu { instance, physical, device, queue_family, queue, ycbcr } = raw;
        let memory_fd = khr::external_memory_fd::Device::new(&instance, &device);
        // SAFETY: by this function's contract.
        let memory = unsafe { instance.get_physical_device_memory_properties(physical) };
        // SAFETY: as above.
        let mut physical = unsafe { Physical::new(instance, physical) }?;
        physical.can_import()?;
        physical.ycbcr &= ycbcr;
        let queue = Mutex::new(queue);
        let convert = convert::Shared::default();
        Ok(Gpu(Arc::new(Inner { device, memory_fd, physical, memory, queue_family, queue, convert, owned: None })))
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
            Ok(GpuListing { info: physical.info.clone(), offers, handles: physical.handles() })
        };
        Ok(instance.physical_devices()?.into_iter().map(list).collect())
    }

    /// What it is.
    pub fn info(&self) -> &GpuInfo {
        &self.0.physical.info
    }

    /// The formats that it can import for this use, with their modifiers. Some hundred calls of the driver.
    pub fn offers(&self, usage: vk::ImageUsageFlags) -> Vec<GpuOffer> {
        self.0.physical.offers(usage)
    }

    /// The kinds of memory handles that it knows.
    pub fn handles(&self) -> Vec<HandleOffer> {
        self.0.physical.handles()
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

    /// The queue; whoever holds it may submit.
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

fn choose(instance: &Instance, name: Option<&str>) -> Result<Physical> {
    let mut there = Vec::new();
    for raw in instance.physical_devices()? {
        // SAFETY: the device is of this instance, which the caller keeps for as long as the result.
        there.push(unsafe { Physical::new(instance.raw.clone(), raw) }?);
    }
    let names: Vec<_> = there.iter().map(|physical| physical.info.name.clone()).collect();
    let chosen = match name {
        Some(name) => {
            let mut chosen = None;
            for physical in there {
                if chosen.is_none() && physical.is_called(name)? {
                    chosen = Some(physical);
                }
            }
            chosen
        }
        // The first of the best; one that cannot import last, to say why.
        None => there
            .into_iter()
            .min_by_key(|physical| (physical.can_import().is_err(), physical.info.kind)),
    };
    chosen.ok_or_else(|| {
        let subject = name.map_or_else(|| "a GPU".to_owned(), |name| format!("a GPU called \"{name}\""));
        Error::new(Kind::NotFound, "find", subject).repair(match names.as_slice() {
            [] => "install a Vulkan driver (Debian: mesa-vulkan-drivers)".to_owned(),
            _ => format!("there is {}", names.join(", ")),
        })
    })
}
