//! An imported image with all that reading it takes: views, descriptors, and commands recorded once.

use std::sync::Arc;

use ash::vk;

use super::checksum::salt;
use super::failure::{code, refuse};
use super::formats::{GpuFormat, Texel};
use super::image::{GpuImporter, Image};
use super::memory::is_of_memory;
use super::pass::{APART, CONSTANTS_BYTES, Pass};
use crate::endpoint::{Importer, Refusal};
use crate::error::Result;
use crate::format::MAX_PLANES;
use crate::frame::Buffer;

/// Imports buffers for a pass.
#[derive(Debug)]
pub(super) struct Sampler {
    importer: GpuImporter,
    pass: Arc<Pass>,
    /// Why the planes of the newest buffer were imported one by one, if they were.
    apart: Option<Refusal>,
}

impl Sampler {
    pub(super) fn new(pass: Arc<Pass>) -> Sampler {
        Sampler { importer: GpuImporter::new(pass.gpu.clone(), vk::ImageUsageFlags::SAMPLED), pass, apart: None }
    }

    pub(super) fn apart(&self) -> Option<&Refusal> {
        self.apart.as_ref()
    }
}

/// One image, ready to be read.
#[derive(Debug)]
pub(super) struct Sampled {
    pass: Arc<Pass>,
    /// One of all planes, or one of each.
    images: Vec<Image>,
    /// One of each colour plane, in Vulkan's order.
    views: Vec<vk::ImageView>,
    descriptors: vk::DescriptorPool,
    pool: vk::CommandPool,
    commands: vk::CommandBuffer,
}

impl Importer for Sampler {
    type Image = Sampled;

    fn name(&self) -> &str {
        self.importer.name()
    }

    fn import(&mut self, buffer: &Buffer) -> Result<Sampled, Refusal> {
        // As one image where the driver has such; else, and in odd sizes, plane by plane.
        self.apart = None;
        let images = match self.importer.import(buffer) {
            Ok(image) => vec![image],
            Err(refusal) if buffer.layout().planes().len() > 1 => match self.importer.import_planes(buffer) {
                Ok(images) => {
                    self.apart = Some(refusal);
                    images
                }
                Err(apart) => return Err(if is_of_memory(&apart) { apart } else { refusal }),
            },
            Err(refusal) => return Err(refusal),
        };
        // One workgroup reads a row.
        let [most, ..] = self.pass.gpu.limits().max_compute_work_group_count;
        let height = buffer.layout().height();
        if height > most {
            let why = format!("{height} rows are more than the GPU reads at once ({most})");
            return Err(refuse("maxComputeWorkGroupCount", why, "choose a smaller size"));
        }
        // Filled step by step; dropping it destroys what there is so far.
        let mut sampled = Sampled {
            pass: Arc::clone(&self.pass),
            images,
            views: Vec::with_capacity(MAX_PLANES),
            descriptors: vk::DescriptorPool::null(),
            pool: vk::CommandPool::null(),
            commands: vk::CommandBuffer::null(),
        };
        sampled.make_views()?;
        let sets = sampled.make_descriptors()?;
        let format = GpuFormat::of(buffer.layout().format());
        let planes = format.iter().flat_map(GpuFormat::planes);
        let planes: Vec<_> = planes
            .map(|plane| (plane.texel, buffer.layout().format().rows(plane.plane, height)))
            .collect();
        sampled.record(&sets, &planes)?;
        Ok(sampled)
    }
}

fn no(call: &'static str, result: vk::Result) -> Refusal {
    let why = format!("the GPU's driver says {}", code(result));
    refuse(call, why, "use fewer or smaller buffers, or let frames be copied")
}

impl Sampled {
    /// Reads every texel, waits, and tells the checksum. No allocation.
    ///
    /// # Errors
    /// As [`Pass::run`].
    pub(super) fn checksum(&self) -> Result<u32> {
        // SAFETY: the commands were recorded below for this pass, without ONE_TIME_SUBMIT, and use what this value and the pass own.
        unsafe { self.pass.run(self.commands, self.views.len()) }
    }

    /// A view of each plane alone: the plane's numbers as they lie in memory, which a view of all planes with a colour conversion
    /// would hide behind arithmetic that drivers do each in their own precision.
    fn make_views(&mut self) -> Result<(), Refusal> {
        let planes = self
            .images
            .iter()
            .flat_map(|image| image.planes().planes().map(move |plane| (image, plane)));
        for (image, plane) in planes {
            let range = vk::ImageSubresourceRange::default()
                .aspect_mask(plane.aspect)
                .level_count(1)
                .layer_count(1);
            let info = vk::ImageViewCreateInfo::default()
                .image(image.raw())
                .view_type(vk::ImageViewType::TYPE_2D)
                .format(plane.view)
                .subresource_range(range);
            // SAFETY: the image is ours, mutable where it has several planes, and was made with this view's format in its list.
            let view = unsafe { self.pass.gpu.device().create_image_view(&info, None) };
            self.views.push(view.map_err(|result| no("vkCreateImageView", result))?);
        }
        Ok(())
    }

    fn make_descriptors(&mut self) -> Result<Vec<vk::DescriptorSet>, Refusal> {
        let device = self.pass.gpu.device();
        let count = u32::try_from(self.views.len()).unwrap_or(0);
        let size = |ty| vk::DescriptorPoolSize { ty, descriptor_count: count };
        let sizes = [size(vk::DescriptorType::SAMPLED_IMAGE), size(vk::DescriptorType::STORAGE_BUFFER)];
        let info = vk::DescriptorPoolCreateInfo::default().max_sets(count).pool_sizes(&sizes);
        // SAFETY: here and below: the device lives, and what the structures point to lives until the calls return.
        self.descriptors = unsafe { device.create_descriptor_pool(&info, None) }
            .map_err(|result| no("vkCreateDescriptorPool", result))?;
        let layouts = vec![self.pass.set_layout; self.views.len()];
        let info = vk::DescriptorSetAllocateInfo::default()
            .descriptor_pool(self.descriptors)
            .set_layouts(&layouts);
        // SAFETY: as above; the pool has room for them.
        let sets = unsafe { device.allocate_descriptor_sets(&info) }
            .map_err(|result| no("vkAllocateDescriptorSets", result))?;
        for ((&set, &view), place) in sets.iter().zip(&self.views).zip(0..) {
            let layout = vk::ImageLayout::SHADER_READ_ONLY_OPTIMAL;
            let image = [vk::DescriptorImageInfo::default().image_view(view).image_layout(layout)];
            let word = vk::DescriptorBufferInfo::default()
                .buffer(self.pass.result)
                .offset(APART * place)
                .range(4);
            let word = [word];
            let write = |binding, kind| {
                vk::WriteDescriptorSet::default()
                    .dst_set(set)
                    .dst_binding(binding)
                    .descriptor_type(kind)
                    .descriptor_count(1)
            };
            let writes = [
                write(0, vk::DescriptorType::SAMPLED_IMAGE).image_info(&image),
                write(1, vk::DescriptorType::STORAGE_BUFFER).buffer_info(&word),
            ];
            // SAFETY: as above; the sets are new, so nothing uses them.
            unsafe { device.update_descriptor_sets(&writes, &[]) };
        }
        Ok(sets)
    }

    /// Clear the sums; take the image over; one dispatch for each plane; give the image back, and the sums to the CPU.
    fn record(&mut self, sets: &[vk::DescriptorSet], planes: &[(Texel, u32)]) -> Result<(), Refusal> {
        let device = self.pass.gpu.device();
        let info = vk::CommandPoolCreateInfo::default().queue_family_index(self.pass.gpu.queue_family());
        // SAFETY: here and below: the device lives, the handles are ours.
        self.pool =
            unsafe { device.create_command_pool(&info, None) }.map_err(|result| no("vkCreateCommandPool", result))?;
        let info = vk::CommandBufferAllocateInfo::default()
            .command_pool(self.pool)
            .level(vk::CommandBufferLevel::PRIMARY)
            .command_buffer_count(1);
        // SAFETY: as above.
        let made = unsafe { device.allocate_command_buffers(&info) };
        let made = made.map_err(|result| no("vkAllocateCommandBuffers", result))?;
        self.commands = made.first().copied().unwrap_or_default();
        let (commands, pass) = (self.commands, &self.pass);
        let (shader, host) = (vk::PipelineStageFlags::COMPUTE_SHADER, vk::PipelineStageFlags::HOST);
        let both = vk::AccessFlags::SHADER_READ | vk::AccessFlags::SHADER_WRITE;
        let sums = |from, to| {
            [vk::BufferMemoryBarrier::default()
                .buffer(pass.result)
                .size(vk::WHOLE_SIZE)
                .src_queue_family_index(vk::QUEUE_FAMILY_IGNORED)
                .dst_queue_family_index(vk::QUEUE_FAMILY_IGNORED)
                .src_access_mask(from)
                .dst_access_mask(to)]
        };
        let none = vk::DependencyFlags::empty();
        let read_only = vk::ImageLayout::SHADER_READ_ONLY_OPTIMAL;
        // SAFETY: as above; the commands are in the state that each call wants, the image was made for sampling, each set has a view
        // of a plane with so many rows, and a dispatch of one workgroup a row is within what the device takes (`import`).
        unsafe {
            device
                .begin_command_buffer(commands, &vk::CommandBufferBeginInfo::default())
                .map_err(|result| no("vkBeginCommandBuffer", result))?;
            device.cmd_fill_buffer(commands, pass.result, 0, vk::WHOLE_SIZE, 0);
            let transfer = vk::PipelineStageFlags::TRANSFER;
            let acquire = self
                .images
                .iter()
                .map(|image| image.acquire(read_only, vk::AccessFlags::SHADER_READ));
            let acquire: Vec<_> = acquire.collect();
            let cleared = sums(vk::AccessFlags::TRANSFER_WRITE, both);
            device.cmd_pipeline_barrier(commands, transfer, shader, none, &[], &cleared, &acquire);
            device.cmd_bind_pipeline(commands, vk::PipelineBindPoint::COMPUTE, pass.pipeline);
            for ((index, (texel, rows)), &set) in planes.iter().enumerate().zip(sets) {
                let mut constants = [0; CONSTANTS_BYTES as usize];
                let levels = texel.levels().map(|level| (level as f32).to_ne_bytes());
                let words = levels.into_iter().chain([salt(index).to_ne_bytes()]);
                constants.iter_mut().zip(words.flatten()).for_each(|(to, from)| *to = from);
                device.cmd_bind_descriptor_sets(commands, vk::PipelineBindPoint::COMPUTE, pass.layout, 0, &[set], &[]);
                device.cmd_push_constants(commands, pass.layout, vk::ShaderStageFlags::COMPUTE, 0, &constants);
                device.cmd_dispatch(commands, *rows, 1, 1);
            }
            let release = self
                .images
                .iter()
                .map(|image| image.release(read_only, vk::AccessFlags::empty()));
            let release: Vec<_> = release.collect();
            let end = vk::PipelineStageFlags::BOTTOM_OF_PIPE;
            device.cmd_pipeline_barrier(commands, shader, end, none, &[], &[], &release);
            // By itself: a transfer between owners must not be with the host's stage (VUID-vkCmdPipelineBarrier-srcStageMask-09633).
            let summed = sums(vk::AccessFlags::SHADER_WRITE, vk::AccessFlags::HOST_READ);
            device.cmd_pipeline_barrier(commands, shader, host, none, &[], &summed, &[]);
            device
                .end_command_buffer(commands)
                .map_err(|result| no("vkEndCommandBuffer", result))
        }
    }
}

impl Drop for Sampled {
    fn drop(&mut self) {
        if !self.pass.settle() {
            return;
        }
        let device = self.pass.gpu.device();
        // SAFETY: all are ours or null, which is allowed, and no submission that uses them is left.
        unsafe {
            device.destroy_command_pool(self.pool, None);
            device.destroy_descriptor_pool(self.descriptors, None);
            for &view in &self.views {
                device.destroy_image_view(view, None);
            }
        }
    }
}
