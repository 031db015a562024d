//! The compute pass that reads every texel of a picture and sums up a checksum.

use std::io::Cursor;
use std::sync::{Arc, Mutex, PoisonError};

use ash::vk;

use super::failure::failed;
use super::gpu::Gpu;
use super::submission::Submission;
use crate::error::{Error, Kind, Result};
use crate::format::MAX_PLANES;

/// The sum of each plane lies by itself, as far apart as a device may want (minStorageBufferOffsetAlignment is 256 at most).
pub(super) const APART: vk::DeviceSize = 256;
const WORDS_APART: usize = 64;
const RESULT_BYTES: vk::DeviceSize = APART * MAX_PLANES as vk::DeviceSize;

/// The constants of the shader, `struct Plane` there: four floats and one word.
pub(super) const CONSTANTS_BYTES: u32 = 20;

/// Pipeline, result and fence: made once for a GPU, used for every picture.
pub(super) struct Pass {
    pub(super) gpu: Gpu,
    pub(super) set_layout: vk::DescriptorSetLayout,
    pub(super) layout: vk::PipelineLayout,
    pub(super) pipeline: vk::Pipeline,
    /// The sums, by plane, in memory that the CPU sees.
    pub(super) result: vk::Buffer,
    memory: vk::DeviceMemory,
    /// Locked from a submission until its result was read.
    mapped: Mutex<Option<Mapped>>,
    submission: Submission,
}

/// The address of the result.
struct Mapped(*const u32);

// SAFETY: only `Pass::run` reads there; the mapping lives as long as the pass, whatever thread holds it.
unsafe impl Send for Mapped {}

impl std::fmt::Debug for Pass {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Pass({:?})", self.gpu)
    }
}

impl Pass {
    /// Makes the pipeline and the memory for its result.
    ///
    /// # Errors
    /// What the driver says.
    pub(super) fn new(gpu: &Gpu) -> Result<Arc<Pass>> {
        // Filled step by step; dropping it destroys what there is so far.
        let mut pass = Pass {
            gpu: gpu.clone(),
            set_layout: vk::DescriptorSetLayout::null(),
            layout: vk::PipelineLayout::null(),
            pipeline: vk::Pipeline::null(),
            result: vk::Buffer::null(),
            memory: vk::DeviceMemory::null(),
            mapped: Mutex::new(None),
            submission: Submission::new(gpu)?,
        };
        pass.make_pipeline()?;
        pass.make_result()?;
        Ok(Arc::new(pass))
    }

    fn failed(&self, call: &'static str, result: vk::Result) -> Error {
        failed(call, "compute on", &self.gpu.info().name, result)
    }

    fn make_pipeline(&mut self) -> Result<()> {
        let device = self.gpu.device();
        let one = |binding, kind| {
            vk::DescriptorSetLayoutBinding::default()
                .binding(binding)
                .descriptor_type(kind)
                .descriptor_count(1)
                .stage_flags(vk::ShaderStageFlags::COMPUTE)
        };
        let bindings = [one(0, vk::DescriptorType::SAMPLED_IMAGE), one(1, vk::DescriptorType::STORAGE_BUFFER)];
        let info = vk::DescriptorSetLayoutCreateInfo::default().bindings(&bindings);
        // SAFETY: here and below: the device lives, all that the structures point to lives until the calls return, and the handles
        // in them are ours.
        self.set_layout = unsafe { device.create_descriptor_set_layout(&info, None) }
            .map_err(|result| self.failed("vkCreateDescriptorSetLayout", result))?;
        let set_layouts = [self.set_layout];
        let constants = [vk::PushConstantRange::default()
            .stage_flags(vk::ShaderStageFlags::COMPUTE)
            .size(CONSTANTS_BYTES)];
        let info = vk::PipelineLayoutCreateInfo::default()
            .set_layouts(&set_layouts)
            .push_constant_ranges(&constants);
        // SAFETY: as above.
        self.layout = unsafe { device.create_pipeline_layout(&info, None) }
            .map_err(|result| self.failed("vkCreatePipelineLayout", result))?;
        let shader = include_bytes!(concat!(env!("OUT_DIR"), "/checksum.spv"));
        let words = ash::util::read_spv(&mut Cursor::new(&shader[..]))
            .map_err(|cause| Error::from_io("read", "the shader that was built in", cause))?;
        let info = vk::ShaderModuleCreateInfo::default().code(&words);
        // SAFETY: as above; the module is SPIR-V that naga has validated, for Vulkan 1.1.
        let module = unsafe { device.create_shader_module(&info, None) }
            .map_err(|result| self.failed("vkCreateShaderModule", result))?;
        let stage = vk::PipelineShaderStageCreateInfo::default()
            .stage(vk::ShaderStageFlags::COMPUTE)
            .module(module)
            .name(c"checksum");
        let info = [vk::ComputePipelineCreateInfo::default().stage(stage).layout(self.layout)];
        // SAFETY: as above; the layout has the bindings and constants that the shader declares.
        let made = unsafe { device.create_compute_pipelines(vk::PipelineCache::null(), &info, None) };
        // SAFETY: a pipeline does not need its module any more.
        unsafe { device.destroy_shader_module(module, None) };
        let made = made.map_err(|(_, result)| self.failed("vkCreateComputePipelines", result))?;
        self.pipeline = made.first().copied().unwrap_or_default();
        Ok(())
    }

    fn make_result(&mut self) -> Result<()> {
        let device = self.gpu.device();
        let usage = vk::BufferUsageFlags::STORAGE_BUFFER | vk::BufferUsageFlags::TRANSFER_DST;
        let info = vk::BufferCreateInfo::default()
            .size(RESULT_BYTES)
            .usage(usage)
            .sharing_mode(vk::SharingMode::EXCLUSIVE);
        // SAFETY: the device lives.
        self.result =
            unsafe { device.create_buffer(&info, None) }.map_err(|result| self.failed("vkCreateBuffer", result))?;
        // SAFETY: the buffer is ours.
        let needs = unsafe { device.get_buffer_memory_requirements(self.result) };
        let (visible, coherent) = (vk::MemoryPropertyFlags::HOST_VISIBLE, vk::MemoryPropertyFlags::HOST_COHERENT);
        let best = visible | coherent | vk::MemoryPropertyFlags::HOST_CACHED;
        let find = |wanted| self.gpu.memory_type(needs.memory_type_bits, wanted);
        // One that is visible and coherent must be there ("Device Memory Properties").
        let memory_type = find(best).or_else(|| find(visible | coherent)).ok_or_else(|| {
            Error::new(Kind::Unsupported, "compute on", &self.gpu.info().name)
                .because("it has no memory that the CPU sees")
        })?;
        let info = vk::MemoryAllocateInfo::default()
            .allocation_size(needs.size)
            .memory_type_index(memory_type);
        // SAFETY: the type is of those that the buffer can have.
        self.memory =
            unsafe { device.allocate_memory(&info, None) }.map_err(|result| self.failed("vkAllocateMemory", result))?;
        // SAFETY: both are ours, and the memory is as large as the buffer wants.
        unsafe { device.bind_buffer_memory(self.result, self.memory, 0) }
            .map_err(|result| self.failed("vkBindBufferMemory", result))?;
        // SAFETY: the memory can be mapped, and is mapped once; freeing it unmaps it.
        let address = unsafe { device.map_memory(self.memory, 0, vk::WHOLE_SIZE, vk::MemoryMapFlags::empty()) };
        let address = address.map_err(|result| self.failed("vkMapMemory", result))?;
        self.mapped = Mutex::new(Some(Mapped(address.cast_const().cast())));
        Ok(())
    }

    /// Runs commands that were recorded for this pass, waits for their end, and gives the sum over `planes` planes. No allocation.
    ///
    /// # Safety
    /// `commands` was recorded for this pass's queue family, can be submitted again, and all that it uses lives.
    ///
    /// # Errors
    /// As [`Submission::run`].
    pub(super) unsafe fn run(&self, commands: vk::CommandBuffer, planes: usize) -> Result<u32> {
        // Nobody else writes or reads the result meanwhile.
        let mapped = self.mapped.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: by this function's contract.
        unsafe { self.submission.run(commands) }?;
        let Some(Mapped(address)) = &*mapped else { return Ok(0) };
        let sum = (0..planes.min(MAX_PLANES)).map(|plane| {
            // SAFETY: inside the mapping (`RESULT_BYTES`), aligned; the memory is coherent, the commands end with a barrier for the
            // host, and the fence has signalled.
            unsafe { address.add(plane * WORDS_APART).read_volatile() }
        });
        Ok(sum.fold(0, u32::wrapping_add))
    }

    /// Waits for the end of what a failure has left with the GPU; false if it does not come, and nothing may be destroyed.
    pub(super) fn settle(&self) -> bool {
        self.submission.settle()
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        if !self.settle() {
            return;
        }
        let device = self.gpu.device();
        // SAFETY: all are ours or null, which is allowed, and no submission that uses them is left.
        unsafe {
            device.destroy_buffer(self.result, None);
            device.free_memory(self.memory, None);
            device.destroy_pipeline(self.pipeline, None);
            device.destroy_pipeline_layout(self.layout, None);
            device.destroy_descriptor_set_layout(self.set_layout, None);
        }
    }
}
