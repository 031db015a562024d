//! dmaflow's images as wgpu's textures, and who owns what.
//!
//! - Image and memory are dmaflow's. wgpu only borrows the handle: it is told so by a drop callback, and calls that when it has destroyed
//!   its own texture, which is not before the GPU has ended all work with it. The callback holds a share of the image; so the image is
//!   destroyed, and its memory freed, when both wgpu and the [`CameraTexture`] have let it go.
//! - The contents belong to the camera, a foreign owner to Vulkan, but for the time between [`acquire`](CameraTexture::acquire) and
//!   [`release`](CameraTexture::release). To wgpu the texture is always the same, ready to be sampled, so that it makes no transitions of
//!   its own.
//! - The frame's lease, which keeps the camera from filling the buffer, is the caller's to hold until the release has been executed.

use std::sync::Arc;

use dmaflow::endpoint::{Importer, Refusal, Rung};
use dmaflow::frame::Buffer;
use dmaflow::vulkan::ash::vk;
use dmaflow::vulkan::{GpuImporter, Image};
use wgpu::hal::api::Vulkan;

use crate::gpu;

/// The layout in which wgpu has a texture that is only sampled (`derive_image_layout` of wgpu-hal).
const SAMPLED: vk::ImageLayout = vk::ImageLayout::SHADER_READ_ONLY_OPTIMAL;
/// Where it is sampled.
const STAGE: vk::PipelineStageFlags = vk::PipelineStageFlags::FRAGMENT_SHADER;

/// Imports a camera's buffers as textures of one device.
pub struct Textures {
    importer: GpuImporter,
    /// Last: the importer uses its handles.
    device: wgpu::Device,
}

/// A texture over a buffer's memory.
pub struct CameraTexture {
    view: wgpu::TextureView,
    /// As [`Textures`] has it.
    image: Arc<Image>,
    device: wgpu::Device,
}

impl Textures {
    pub fn new(device: &wgpu::Device) -> anyhow::Result<Textures> {
        let importer = GpuImporter::new(gpu::share(device)?, vk::ImageUsageFlags::SAMPLED);
        Ok(Textures { importer, device: device.clone() })
    }
}

impl Importer for Textures {
    type Image = CameraTexture;

    fn name(&self) -> &str {
        self.importer.name()
    }

    fn import(&mut self, buffer: &Buffer) -> Result<CameraTexture, Refusal> {
        let image = Arc::new(self.importer.import(buffer)?);
        let format = match image.format() {
            vk::Format::B8G8R8A8_UNORM => wgpu::TextureFormat::Bgra8Unorm,
            vk::Format::R8G8B8A8_UNORM => wgpu::TextureFormat::Rgba8Unorm,
            other => return Err(refuse(format!("{other:?} is not among the formats of this example"))),
        };
        let (width, height) = image.size();
        let size = wgpu::Extent3d { width, height, depth_or_array_layers: 1 };
        let wanted = wgpu::TextureDescriptor {
            label: Some("camera"),
            size,
            mip_level_count: 1,
            sample_count: 1,
            dimension: wgpu::TextureDimension::D2,
            format,
            usage: wgpu::TextureUsages::TEXTURE_BINDING,
            view_formats: &[],
        };
        let as_made = wgpu::hal::TextureDescriptor {
            label: wanted.label,
            size,
            mip_level_count: 1,
            sample_count: 1,
            dimension: wanted.dimension,
            format,
            usage: wgpu::TextureUses::RESOURCE,
            memory_flags: wgpu::hal::MemoryFlags::empty(),
            view_formats: Vec::new(),
        };
        let kept = Arc::clone(&image);
        // SAFETY: the image is of this device and as described: of this size and format, one level, one layer, for sampling. It lives until
        // the callback has been called, and is destroyed by nobody else. Nothing is to be cleared in it, and the state that is told here
        // is the one in which `acquire` puts it before each use.
        let texture = unsafe {
            let raw = self.device.as_hal::<Vulkan>();
            let raw = raw.ok_or_else(|| refuse("the device is not one by Vulkan".to_owned()))?;
            let memory = wgpu::hal::vulkan::TextureMemory::External;
            let texture = raw.texture_from_raw(image.raw(), &as_made, Some(Box::new(move || drop(kept))), memory);
            self.device
                .create_texture_from_hal::<Vulkan>(texture, &wanted, wgpu::TextureUses::RESOURCE)
        };
        // The view keeps the texture.
        let view = texture.create_view(&wgpu::TextureViewDescriptor::default());
        Ok(CameraTexture { view, image, device: self.device.clone() })
    }
}

impl CameraTexture {
    pub fn view(&self) -> &wgpu::TextureView {
        &self.view
    }

    /// Commands that take the image over from the camera: before those that sample it, once for each frame.
    pub fn acquire(&self) -> wgpu::CommandBuffer {
        self.transfer(
            vk::PipelineStageFlags::TOP_OF_PIPE,
            STAGE,
            self.image.acquire(SAMPLED, vk::AccessFlags::SHADER_READ),
        )
    }

    /// Commands that give it back: after them.
    pub fn release(&self) -> wgpu::CommandBuffer {
        self.transfer(
            STAGE,
            vk::PipelineStageFlags::BOTTOM_OF_PIPE,
            self.image.release(SAMPLED, vk::AccessFlags::empty()),
        )
    }

    /// wgpu wants an encoder to be recorded either by itself or by others, not by both; so this is one of its own, and wgpu submits it
    /// with its own, in order: nobody else has to touch the queue.
    fn transfer(
        &self,
        from: vk::PipelineStageFlags,
        to: vk::PipelineStageFlags,
        barrier: vk::ImageMemoryBarrier<'static>,
    ) -> wgpu::CommandBuffer {
        let mut encoder = self.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        // SAFETY: the command buffer is open, and recorded by nobody else meanwhile; image and barrier are of this device and its queue's
        // family. The caller submits it together with the work that uses the texture, which keeps the image.
        unsafe {
            let device = self.device.as_hal::<Vulkan>();
            encoder.as_hal_mut::<Vulkan, _, _>(|commands| {
                if let (Some(device), Some(commands)) = (device, commands) {
                    let none = vk::DependencyFlags::empty();
                    let commands = commands.raw_handle();
                    device
                        .raw_device()
                        .cmd_pipeline_barrier(commands, from, to, none, &[], &[], &[barrier]);
                }
            });
        }
        encoder.finish()
    }
}

fn refuse(why: String) -> Refusal {
    let repair = "ask the camera for XR24 or XB24".to_owned();
    Refusal { rung: Rung::Exported, step: "import", errno: None, why, repair }
}
