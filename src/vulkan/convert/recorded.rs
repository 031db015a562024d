//! The commands that convert from one buffer into another: recorded once, run for every frame.

use std::sync::Arc;

use ash::vk;

use super::job::Job;
use super::pipeline::{BINDINGS, Pipeline};
use crate::endpoint::{Importer, Refusal, Rung};
use crate::error::Result;
use crate::fence::SyncFile;
use crate::frame::Buffer;
use crate::vulkan::buffer::GpuBuffer;
use crate::vulkan::failure::{code, refuse};
use crate::vulkan::gpu::Gpu;
use crate::vulkan::submission::Submission;
use crate::vulkan::sync::Semaphore;

/// Imports all memory planes of a buffer as bytes.
#[derive(Debug)]
pub(super) struct Bytes(pub(super) Gpu);

impl Importer for Bytes {
    type Image = Arc<Vec<GpuBuffer>>;

    fn name(&self) -> &str {
        &self.0.info().name
    }

    fn import(&mut self, buffer: &Buffer) -> Result<Self::Image, Refusal> {
        let planes = (0u32..).zip(buffer.memory()).map(|(plane, _)| plane);
        let imported = planes.map(|plane| GpuBuffer::import(&self.0, buffer, plane, Job::USAGE));
        Ok(Arc::new(imported.collect::<Result<_, _>>().map_err(of_conversion)?))
    }
}

/// The refusal as one of the rung that it is for.
pub(super) fn of_conversion(refusal: Refusal) -> Refusal {
    Refusal { rung: Rung::Converted, ..refusal }
}

/// Descriptors and commands for a pair of buffers, which it keeps imported.
pub(super) struct Recorded {
    pipeline: Arc<Pipeline>,
    submission: Submission,
    /// What it waits for, and what it signals, made when they are first wanted.
    after: Option<Semaphore>,
    done: Option<Semaphore>,
    descriptors: vk::DescriptorPool,
    pool: vk::CommandPool,
    commands: vk::CommandBuffer,
    _source: Arc<Vec<GpuBuffer>>,
    _target: Arc<Vec<GpuBuffer>>,
}

fn no(call: &'static str, result: vk::Result) -> Refusal {
    let why = format!("the GPU's driver says {}", code(result));
    of_conversion(refuse(call, why, "use fewer or smaller buffers, or let frames be copied"))
}

impl Recorded {
    /// Records the job for these buffers, whose layouts are those that it was made for.
    ///
    /// # Errors
    /// The driver's refusal.
    pub(super) fn new(
        pipeline: &Arc<Pipeline>,
        job: &Job,
        size: (u32, u32),
        source: &Arc<Vec<GpuBuffer>>,
        target: &Arc<Vec<GpuBuffer>>,
    ) -> Result<Recorded, Refusal> {
        let submission =
            Submission::new(&pipeline.gpu).map_err(|error| Refusal::from_error(Rung::Converted, &error))?;
        // Filled step by step; dropping it destroys what there is so far.
        let mut made = Recorded {
            pipeline: Arc::clone(pipeline),
            submission,
            after: None,
            done: None,
            descriptors: vk::DescriptorPool::null(),
            pool: vk::CommandPool::null(),
            commands: vk::CommandBuffer::null(),
            _source: Arc::clone(source),
            _target: Arc::clone(target),
        };
        let set = made.describe(job, source, target)?;
        made.record(job, size, set, source, target)?;
        Ok(made)
    }

    fn describe(
        &mut self,
        job: &Job,
        source: &[GpuBuffer],
        target: &[GpuBuffer],
    ) -> Result<vk::DescriptorSet, Refusal> {
        let device = self.pipeline.gpu.device();
        let sizes = [vk::DescriptorPoolSize { ty: vk::DescriptorType::STORAGE_BUFFER, descriptor_count: BINDINGS }];
        let info = vk::DescriptorPoolCreateInfo::default().max_sets(1).pool_sizes(&sizes);
        // SAFETY: here and below: the device lives, and what the structures point to lives until the calls return.
        self.descriptors = unsafe { device.create_descriptor_pool(&info, None) }
            .map_err(|result| no("vkCreateDescriptorPool", result))?;
        let layouts = [self.pipeline.set_layout];
        let info = vk::DescriptorSetAllocateInfo::default()
            .descriptor_pool(self.descriptors)
            .set_layouts(&layouts);
        // SAFETY: as above; the pool has room for it.
        let sets = unsafe { device.allocate_descriptor_sets(&info) }
            .map_err(|result| no("vkAllocateDescriptorSets", result))?;
        let set = sets.first().copied().unwrap_or_default();
        let bound: Vec<_> = job
            .memories()
            .iter()
            .filter_map(|&memory| source.get(memory as usize))
            .chain(target.first())
            .collect();
        if bound.len() != BINDINGS as usize {
            let why = "the buffers have fewer memory planes than their layouts";
            return Err(of_conversion(refuse("bind", why, "let frames be copied")));
        }
        // What the job reaches and no more: all of the memory may be more than a shader can be given (maxStorageBufferRange).
        let mut infos = [[vk::DescriptorBufferInfo::default()]; BINDINGS as usize];
        for ((info, buffer), reach) in infos.iter_mut().zip(bound).zip(job.reach()) {
            if buffer.len() < reach {
                let why = format!("words up to byte {reach} are read or written, and the memory has {}", buffer.len());
                return Err(of_conversion(refuse("bind", why, "make the memory a multiple of 4 bytes long")));
            }
            *info = [vk::DescriptorBufferInfo::default().buffer(buffer.raw()).range(reach)];
        }
        let writes: Vec<_> = (0u32..)
            .zip(&infos)
            .map(|(binding, info)| {
                vk::WriteDescriptorSet::default()
                    .dst_set(set)
                    .dst_binding(binding)
                    .descriptor_type(vk::DescriptorType::STORAGE_BUFFER)
                    .buffer_info(info)
            })
            .collect();
        // SAFETY: as above; the set is new, so nothing uses it.
        unsafe { device.update_descriptor_sets(&writes, &[]) };
        Ok(set)
    }

    /// Take both over from whoever filled or showed them; convert; give them back.
    fn record(
        &mut self,
        job: &Job,
        size: (u32, u32),
        set: vk::DescriptorSet,
        source: &[GpuBuffer],
        target: &[GpuBuffer],
    ) -> Result<(), Refusal> {
        let (pipeline, gpu) = (&self.pipeline, &self.pipeline.gpu);
        let device = gpu.device();
        let info = vk::CommandPoolCreateInfo::default().queue_family_index(gpu.queue_family());
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
        let commands = self.commands;
        let (read, write) = (vk::AccessFlags::SHADER_READ, vk::AccessFlags::SHADER_WRITE);
        let acquire = source.iter().map(|plane| plane.acquire(read));
        let acquire: Vec<_> = acquire.chain(target.iter().map(|plane| plane.acquire(write))).collect();
        let release = source.iter().map(|plane| plane.release(vk::AccessFlags::empty()));
        let release: Vec<_> = release.chain(target.iter().map(|plane| plane.release(write))).collect();
        let (shader, end) = (vk::PipelineStageFlags::COMPUTE_SHADER, vk::PipelineStageFlags::BOTTOM_OF_PIPE);
        let none = vk::DependencyFlags::empty();
        let (across, down) = Job::groups(size);
        let compute = vk::PipelineBindPoint::COMPUTE;
        // SAFETY: as above; the commands are in the state that each call wants; the set's buffers hold every word that
        // the job reaches (`describe`), and the device takes so many workgroups in x and y (`GpuConverter::new`).
        unsafe {
            device
                .begin_command_buffer(commands, &vk::CommandBufferBeginInfo::default())
                .map_err(|result| no("vkBeginCommandBuffer", result))?;
            // From the stage on in which a semaphore is waited for (`Submission::start`): not before that do they take anything over.
            device.cmd_pipeline_barrier(commands, shader, shader, none, &[], &acquire, &[]);
            device.cmd_bind_pipeline(commands, compute, pipeline.raw);
            device.cmd_bind_descriptor_sets(commands, compute, pipeline.layout, 0, &[set], &[]);
            device.cmd_push_constants(commands, pipeline.layout, vk::ShaderStageFlags::COMPUTE, 0, &job.bytes());
            device.cmd_dispatch(commands, across, down, 1);
            device.cmd_pipeline_barrier(commands, shader, end, none, &[], &release, &[]);
            device
                .end_command_buffer(commands)
                .map_err(|result| no("vkEndCommandBuffer", result))
        }
    }

    /// Converts, and waits. No allocation of ours.
    ///
    /// # Errors
    /// As [`Submission::run`].
    pub(super) fn run(&self) -> Result<()> {
        // SAFETY: the commands were recorded above for this GPU's queue family, without ONE_TIME_SUBMIT, and use what this value owns
        // or keeps.
        unsafe { self.submission.run(self.commands) }
    }

    /// Has the GPU convert when `after` has signalled, and gives what signals when it has; `None` if it has already.
    ///
    /// # Errors
    /// As [`Submission::start`], and of the fences.
    pub(super) fn start(&mut self, after: Option<SyncFile>) -> Result<Option<SyncFile>> {
        // Neither semaphore is in use after this.
        self.submission.ended()?;
        let gpu = &self.pipeline.gpu;
        let done = made(&mut self.done, gpu)?;
        let wait = match after {
            None => None,
            Some(fence) => {
                let semaphore = made(&mut self.after, gpu)?;
                semaphore.import(Some(fence))?;
                Some(semaphore.raw())
            }
        };
        // SAFETY: as in `run`; the semaphores are this value's, nothing uses them, and one that is waited for has an import.
        let started = unsafe { self.submission.start(self.commands, wait, Some(done.raw())) };
        // SAFETY: it was submitted to be signalled, all that this depends on was as well, and nobody waits for it.
        let fence = started.and_then(|()| unsafe { done.export() });
        if fence.is_err() {
            // An import may be left in the one, a signal in the other: not to be used again. If the work does not end they stay behind.
            self.submission.settle();
            (self.after, self.done) = (None, None);
        }
        fence
    }
}

/// The semaphore of this place, made now if there is none.
fn made<'a>(place: &'a mut Option<Semaphore>, gpu: &Gpu) -> Result<&'a mut Semaphore> {
    let semaphore = match place.take() {
        Some(there) => there,
        None => Semaphore::new(gpu)?,
    };
    Ok(place.insert(semaphore))
}

impl Drop for Recorded {
    fn drop(&mut self) {
        if !self.submission.settle() {
            return;
        }
        let device = self.pipeline.gpu.device();
        // SAFETY: both are ours or null, which is allowed, and no submission that uses them is left.
        unsafe {
            device.destroy_command_pool(self.pool, None);
            device.destroy_descriptor_pool(self.descriptors, None);
        }
    }
}
