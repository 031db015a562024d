//! A wgpu device that dmaflow can import into.

use anyhow::{Context, bail};
use dmaflow::vulkan::{Gpu, RawGpu};
use wgpu::hal::api::Vulkan;

/// Opens wgpu's choice of GPU, with the extensions of an import beside those that wgpu wants.
pub fn open() -> anyhow::Result<(wgpu::Device, wgpu::Queue)> {
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor {
        backends: wgpu::Backends::VULKAN,
        ..wgpu::InstanceDescriptor::new_without_display_handle()
    });
    let options = wgpu::RequestAdapterOptions {
        power_preference: wgpu::PowerPreference::HighPerformance,
        ..wgpu::RequestAdapterOptions::default()
    };
    let adapter = pollster::block_on(instance.request_adapter(&options))?;
    let wanted = wgpu::DeviceDescriptor::default();
    // SAFETY: the adapter is the one just opened, and its handles are used for this call alone. Extensions that the device has are added
    // to wgpu's, none is taken away; features, limits and hints are those that wgpu is told of below.
    let opened = unsafe {
        let raw = adapter.as_hal::<Vulkan>().context("not a GPU by Vulkan")?;
        let lacks: Vec<_> = Gpu::EXTENSIONS
            .into_iter()
            .filter(|name| !raw.physical_device_capabilities().supports_extension(name))
            .map(|name| name.to_string_lossy())
            .collect();
        if !lacks.is_empty() {
            bail!("{} cannot import dma-bufs: its driver lacks {}", adapter.get_info().name, lacks.join(", "));
        }
        // VK_KHR_image_format_list, which Vulkan 1.1 needs as well, wgpu asks for by itself.
        let add = |arguments: wgpu::hal::vulkan::CreateDeviceCallbackArgs<'_, '_, '_>| {
            for name in Gpu::EXTENSIONS {
                if !arguments.extensions.contains(&name) {
                    arguments.extensions.push(name);
                }
            }
        };
        raw.open_with_callback(
            wanted.required_features,
            &wanted.required_limits,
            &wanted.memory_hints,
            Some(Box::new(add)),
        )?
    };
    // SAFETY: the device was opened from this adapter, with these features.
    Ok(unsafe { adapter.create_device_from_hal(opened, &wanted) }?)
}

/// The same device, for imports. Nothing of it is destroyed with the result, which must not outlive the device.
pub fn share(device: &wgpu::Device) -> anyhow::Result<Gpu> {
    // SAFETY: handles of one device, which was made with the extensions above and by an instance of Vulkan 1.1 or later (wgpu asks for
    // the newest there is, and a loader of Vulkan 1.0 alone has no such extensions). The caller keeps it long enough: `Textures` has a
    // clone, and wgpu's textures hold their device, which holds its instance. Only wgpu submits to the queue.
    unsafe {
        let raw = device.as_hal::<Vulkan>().context("not a device by Vulkan")?;
        Ok(Gpu::from_raw(RawGpu {
            instance: raw.shared_instance().raw_instance().clone(),
            physical: raw.raw_physical_device(),
            device: raw.raw_device().clone(),
            queue_family: raw.queue_family_index(),
            queue: raw.raw_queue(),
            // wgpu 30 never asks for it (`PhysicalDeviceFeatures` of wgpu-hal).
            ycbcr: false,
            // The example waits for its work itself.
            sync_fd: false,
        })?)
    }
}
