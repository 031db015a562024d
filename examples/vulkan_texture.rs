//! A camera's frame as a texture: a shader samples it through a `VkSampler`, turned and smaller, and the result goes into a PNG file.
//! No window and no copy of the frame.
//!
//!     cargo run --release --example vulkan_texture -- [CAMERA [FILE.png]]

use std::io::Cursor;
use std::path::Path;
use std::sync::PoisonError;

use anyhow::Context;
use dmaflow::endpoint::Importer;
use dmaflow::format::Format;
use dmaflow::sink::write_png;
use dmaflow::v4l2::{Camera, CameraRequest, Device};
use dmaflow::vulkan::ash::{self, vk};
use dmaflow::vulkan::{Gpu, GpuImporter, GpuRequest, Image};

/// Width and height of the result.
const CANVAS: [u32; 2] = [640, 480];

fn main() -> anyhow::Result<()> {
    let mut names = std::env::args().skip(1);
    let camera = names.next().unwrap_or("vivid".into());
    let file = names.next().unwrap_or("texture.png".into());
    render(&Gpu::open(&GpuRequest::default())?, &camera, Path::new(&file))
}

/// One frame of the camera, drawn into the file.
pub fn render(gpu: &Gpu, camera: &str, file: &Path) -> anyhow::Result<()> {
    let format = Format::parse("XR24").map(|(format, _)| format);
    let mut camera = Camera::open(Device::find(camera)?, &CameraRequest { format, ..CameraRequest::default() })?;
    let frame = camera.next()?;
    // The image is over the camera's own memory; the frame keeps the camera from filling it meanwhile.
    let image = GpuImporter::new(gpu.clone(), vk::ImageUsageFlags::SAMPLED).import(frame.buffer())?;

    // SAFETY: everything is made of the GPU's own device, used as the specification has it (the validation layer agrees), and the image
    // outlives the work.
    let rgba = unsafe { draw(gpu, &image) }?;
    let rgb: Vec<u8> = rgba.chunks_exact(4).flat_map(|pixel| pixel.iter().take(3).copied()).collect();
    write_png(file, CANVAS[0], CANVAS[1], &rgb)?;
    Ok(())
}

/// What is made to draw with, destroyed in any case: also when a call has failed half-way, or the GPU.
struct Made<'a> {
    gpu: &'a Gpu,
    view: vk::ImageView,
    sampler: vk::Sampler,
    canvas: vk::Buffer,
    memory: vk::DeviceMemory,
    set_layout: vk::DescriptorSetLayout,
    descriptors: vk::DescriptorPool,
    layout: vk::PipelineLayout,
    module: vk::ShaderModule,
    pipeline: vk::Pipeline,
    pool: vk::CommandPool,
}

impl Made<'_> {
    /// Nothing yet. Handles that are null may be destroyed like others.
    fn new(gpu: &Gpu) -> Made<'_> {
        Made {
            gpu,
            view: vk::ImageView::null(),
            sampler: vk::Sampler::null(),
            canvas: vk::Buffer::null(),
            memory: vk::DeviceMemory::null(),
            set_layout: vk::DescriptorSetLayout::null(),
            descriptors: vk::DescriptorPool::null(),
            layout: vk::PipelineLayout::null(),
            module: vk::ShaderModule::null(),
            pipeline: vk::Pipeline::null(),
            pool: vk::CommandPool::null(),
        }
    }
}

impl Drop for Made<'_> {
    fn drop(&mut self) {
        let device = self.gpu.device();
        let queue = self.gpu.queue().lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: all are of this device, or null; what was submitted has ended, the queue being locked; the last made go first.
        unsafe {
            let _ = device.queue_wait_idle(*queue);
            device.destroy_command_pool(self.pool, None);
            device.destroy_pipeline(self.pipeline, None);
            device.destroy_shader_module(self.module, None);
            device.destroy_pipeline_layout(self.layout, None);
            device.destroy_descriptor_pool(self.descriptors, None);
            device.destroy_descriptor_set_layout(self.set_layout, None);
            device.destroy_buffer(self.canvas, None);
            device.free_memory(self.memory, None);
            device.destroy_sampler(self.sampler, None);
            device.destroy_image_view(self.view, None);
        }
    }
}

/// The pixels, four bytes each.
unsafe fn draw(gpu: &Gpu, image: &Image) -> anyhow::Result<Vec<u8>> {
    let device = gpu.device();
    let mut made = Made::new(gpu);
    let bytes = u64::from(CANVAS[0]) * u64::from(CANVAS[1]) * 4;
    // SAFETY: as the caller says.
    unsafe {
        let range = vk::ImageSubresourceRange::default()
            .aspect_mask(vk::ImageAspectFlags::COLOR)
            .level_count(1)
            .layer_count(1);
        let info = vk::ImageViewCreateInfo::default()
            .image(image.raw())
            .view_type(vk::ImageViewType::TYPE_2D)
            .format(image.format())
            .subresource_range(range);
        made.view = device.create_image_view(&info, None)?;
        // The nearest texel, which every format that can be sampled has. Filtering is a feature apart (`Gpu::offers` tells it).
        let nearest = vk::SamplerCreateInfo::default();
        made.sampler = device.create_sampler(&nearest, None)?;
        let info = vk::BufferCreateInfo::default()
            .size(bytes)
            .usage(vk::BufferUsageFlags::STORAGE_BUFFER);
        made.canvas = device.create_buffer(&info, None)?;
        made.memory = visible_memory(gpu, made.canvas)?;
        device.bind_buffer_memory(made.canvas, made.memory, 0)?;

        // What the shader gets: the texture, the sampler, and where to write.
        let kinds =
            [vk::DescriptorType::SAMPLED_IMAGE, vk::DescriptorType::SAMPLER, vk::DescriptorType::STORAGE_BUFFER];
        let bindings: Vec<_> = (0..)
            .zip(kinds)
            .map(|(binding, kind)| {
                let slot = vk::DescriptorSetLayoutBinding::default().binding(binding).descriptor_type(kind);
                slot.descriptor_count(1).stage_flags(vk::ShaderStageFlags::COMPUTE)
            })
            .collect();
        made.set_layout = device
            .create_descriptor_set_layout(&vk::DescriptorSetLayoutCreateInfo::default().bindings(&bindings), None)?;
        let sizes = kinds.map(|ty| vk::DescriptorPoolSize { ty, descriptor_count: 1 });
        made.descriptors = device
            .create_descriptor_pool(&vk::DescriptorPoolCreateInfo::default().max_sets(1).pool_sizes(&sizes), None)?;
        let set_layouts = [made.set_layout];
        let info = vk::DescriptorSetAllocateInfo::default()
            .descriptor_pool(made.descriptors)
            .set_layouts(&set_layouts);
        let sets = device.allocate_descriptor_sets(&info)?;
        let set = *sets.first().context("no descriptor set")?;
        let texture = [vk::DescriptorImageInfo::default()
            .image_view(made.view)
            .image_layout(vk::ImageLayout::SHADER_READ_ONLY_OPTIMAL)];
        let filter = [vk::DescriptorImageInfo::default().sampler(made.sampler)];
        let target = [vk::DescriptorBufferInfo::default().buffer(made.canvas).range(vk::WHOLE_SIZE)];
        let write = |binding, kind| {
            vk::WriteDescriptorSet::default()
                .dst_set(set)
                .dst_binding(binding)
                .descriptor_type(kind)
        };
        let writes = [
            write(0, kinds[0]).image_info(&texture),
            write(1, kinds[1]).image_info(&filter),
            write(2, kinds[2]).buffer_info(&target),
        ];
        device.update_descriptor_sets(&writes, &[]);

        let constants = [vk::PushConstantRange::default()
            .stage_flags(vk::ShaderStageFlags::COMPUTE)
            .size(8)];
        let info = vk::PipelineLayoutCreateInfo::default()
            .set_layouts(&set_layouts)
            .push_constant_ranges(&constants);
        made.layout = device.create_pipeline_layout(&info, None)?;
        let shader = include_bytes!(concat!(env!("OUT_DIR"), "/texture.spv"));
        let words = ash::util::read_spv(&mut Cursor::new(&shader[..]))?;
        made.module = device.create_shader_module(&vk::ShaderModuleCreateInfo::default().code(&words), None)?;
        let stage = vk::PipelineShaderStageCreateInfo::default()
            .stage(vk::ShaderStageFlags::COMPUTE)
            .module(made.module)
            .name(c"draw");
        let info = [vk::ComputePipelineCreateInfo::default().stage(stage).layout(made.layout)];
        let pipelines = device
            .create_compute_pipelines(vk::PipelineCache::null(), &info, None)
            .map_err(|(_, result)| result)?;
        made.pipeline = *pipelines.first().context("no pipeline")?;

        made.pool = device
            .create_command_pool(&vk::CommandPoolCreateInfo::default().queue_family_index(gpu.queue_family()), None)?;
        let info = vk::CommandBufferAllocateInfo::default()
            .command_pool(made.pool)
            .command_buffer_count(1);
        let buffers = device.allocate_command_buffers(&info)?;
        let commands = *buffers.first().context("no commands")?;
        device.begin_command_buffer(commands, &vk::CommandBufferBeginInfo::default())?;
        let (shader, host) = (vk::PipelineStageFlags::COMPUTE_SHADER, vk::PipelineStageFlags::HOST);
        // The camera has written: take the image over, contents and all; give it back afterwards.
        let read_only = vk::ImageLayout::SHADER_READ_ONLY_OPTIMAL;
        let acquire = [image.acquire(read_only, vk::AccessFlags::SHADER_READ)];
        let none = vk::DependencyFlags::empty();
        device.cmd_pipeline_barrier(commands, vk::PipelineStageFlags::TOP_OF_PIPE, shader, none, &[], &[], &acquire);
        device.cmd_bind_pipeline(commands, vk::PipelineBindPoint::COMPUTE, made.pipeline);
        device.cmd_bind_descriptor_sets(commands, vk::PipelineBindPoint::COMPUTE, made.layout, 0, &[set], &[]);
        let size: Vec<u8> = CANVAS.iter().flat_map(|value| value.to_ne_bytes()).collect();
        device.cmd_push_constants(commands, made.layout, vk::ShaderStageFlags::COMPUTE, 0, &size);
        device.cmd_dispatch(commands, CANVAS[0].div_ceil(8), CANVAS[1].div_ceil(8), 1);
        let drawn = [vk::MemoryBarrier::default()
            .src_access_mask(vk::AccessFlags::SHADER_WRITE)
            .dst_access_mask(vk::AccessFlags::HOST_READ)];
        device.cmd_pipeline_barrier(commands, shader, host, none, &drawn, &[], &[]);
        // By itself: a transfer between owners must not be with the host's stage.
        let release = [image.release(read_only, vk::AccessFlags::empty())];
        let end = vk::PipelineStageFlags::BOTTOM_OF_PIPE;
        device.cmd_pipeline_barrier(commands, shader, end, none, &[], &[], &release);
        device.end_command_buffer(commands)?;
        {
            let queue = gpu.queue().lock().map_err(|_| anyhow::anyhow!("another thread failed"))?;
            device.queue_submit(*queue, &[vk::SubmitInfo::default().command_buffers(&buffers)], vk::Fence::null())?;
            device.queue_wait_idle(*queue)?;
        }

        let address = device.map_memory(made.memory, 0, vk::WHOLE_SIZE, vk::MemoryMapFlags::empty())?;
        let pixels = std::slice::from_raw_parts(address.cast::<u8>(), usize::try_from(bytes)?).to_vec();
        Ok(pixels)
    }
}

/// Memory for the buffer that the CPU sees.
unsafe fn visible_memory(gpu: &Gpu, buffer: vk::Buffer) -> anyhow::Result<vk::DeviceMemory> {
    // SAFETY: the buffer is of this device.
    let needs = unsafe { gpu.device().get_buffer_memory_requirements(buffer) };
    let wanted = vk::MemoryPropertyFlags::HOST_VISIBLE | vk::MemoryPropertyFlags::HOST_COHERENT;
    let found = gpu
        .memory_type(needs.memory_type_bits, wanted)
        .context("no memory that the CPU sees")?;
    let info = vk::MemoryAllocateInfo::default()
        .allocation_size(needs.size)
        .memory_type_index(found);
    // SAFETY: the type is one of the buffer's.
    Ok(unsafe { gpu.device().allocate_memory(&info, None) }?)
}
