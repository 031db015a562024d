//! The compute pipeline of the conversion: made once for a GPU, and shared by all conversions on it.

use std::io::Cursor;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use ash::vk;

use super::job::JOB_BYTES;
use crate::error::{Error, Result};
use crate::vulkan::failure::failed;
use crate::vulkan::gpu::Gpu;

/// The memory of Y, U and V, and the destination.
pub(super) const BINDINGS: u32 = 4;

/// The pipeline of a GPU for as long as somebody uses it. It keeps the GPU, so the GPU does not keep it.
#[derive(Debug, Default)]
pub(in crate::vulkan) struct Shared(Mutex<Weak<Pipeline>>);

/// The pipeline with its layouts. Not changed once it is made.
#[derive(Debug)]
pub(in crate::vulkan) struct Pipeline {
    pub(super) gpu: Gpu,
    pub(super) set_layout: vk::DescriptorSetLayout,
    pub(super) layout: vk::PipelineLayout,
    pub(super) raw: vk::Pipeline,
}

impl Pipeline {
    /// The pipeline of this GPU, compiled now if nobody uses it.
    ///
    /// # Errors
    /// What the driver says.
    pub(super) fn of(gpu: &Gpu) -> Result<Arc<Pipeline>> {
        // A thread that panicked has left either a pipeline or none.
        let mut shared = gpu.conversions().0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = shared.upgrade() {
            return Ok(known);
        }
        let made = Arc::new(Pipeline::new(gpu)?);
        *shared = Arc::downgrade(&made);
        Ok(made)
    }

    fn new(gpu: &Gpu) -> Result<Pipeline> {
        // Filled step by step; dropping it destroys what there is so far.
        let mut made = Pipeline {
            gpu: gpu.clone(),
            set_layout: vk::DescriptorSetLayout::null(),
            layout: vk::PipelineLayout::null(),
            raw: vk::Pipeline::null(),
        };
        made.make_layouts()?;
        made.make_pipeline()?;
        Ok(made)
    }

    fn failed(&self, call: &'static str, result: vk::Result) -> Error {
        failed(call, "convert on", &self.gpu.info().name, result)
    }

    fn make_layouts(&mut self) -> Result<()> {
        let device = self.gpu.device();
        let bindings: [_; BINDINGS as usize] = std::array::from_fn(|binding| {
            vk::DescriptorSetLayoutBinding::default()
                .binding(binding as u32)
                .descriptor_type(vk::DescriptorType::STORAGE_BUFFER)
                .descriptor_count(1)
                .stage_flags(vk::ShaderStageFlags::COMPUTE)
        });
        let info = vk::DescriptorSetLayoutCreateInfo::default().bindings(&bindings);
        // SAFETY: here and below: the device lives, all that the structures point to lives until the calls return, and the handles
        // in them are ours.
        self.set_layout = unsafe { device.create_descriptor_set_layout(&info, None) }
            .map_err(|result| self.failed("vkCreateDescriptorSetLayout", result))?;
        let set_layouts = [self.set_layout];
        // 128 bytes is what every device takes ("Required Limits", maxPushConstantsSize).
        let constants = [vk::PushConstantRange::default()
            .stage_flags(vk::ShaderStageFlags::COMPUTE)
            .size(JOB_BYTES)];
        let info = vk::PipelineLayoutCreateInfo::default()
            .set_layouts(&set_layouts)
            .push_constant_ranges(&constants);
        // SAFETY: as above.
        self.layout = unsafe { device.create_pipeline_layout(&info, None) }
            .map_err(|result| self.failed("vkCreatePipelineLayout", result))?;
        Ok(())
    }

    fn make_pipeline(&mut self) -> Result<()> {
        let device = self.gpu.device();
        let shader = include_bytes!(concat!(env!("OUT_DIR"), "/convert.spv"));
        let words = ash::util::read_spv(&mut Cursor::new(&shader[..]))
            .map_err(|cause| Error::from_io("read", "the shader that was built in", cause))?;
        let info = vk::ShaderModuleCreateInfo::default().code(&words);
        // SAFETY: the device lives; the module is SPIR-V that naga has validated, for Vulkan 1.1.
        let module = unsafe { device.create_shader_module(&info, None) }
            .map_err(|result| self.failed("vkCreateShaderModule", result))?;
        let stage = vk::PipelineShaderStageCreateInfo::default()
            .stage(vk::ShaderStageFlags::COMPUTE)
            .module(module)
            .name(c"convert");
        let info = [vk::ComputePipelineCreateInfo::default().stage(stage).layout(self.layout)];
        // SAFETY: as above; the layout has the bindings and constants that the shader declares.
        let made = unsafe { device.create_compute_pipelines(vk::PipelineCache::null(), &info, None) };
        // SAFETY: a pipeline does not need its module any more.
        unsafe { device.destroy_shader_module(module, None) };
        let made = made.map_err(|(_, result)| self.failed("vkCreateComputePipelines", result))?;
        self.raw = made.first().copied().unwrap_or_default();
        Ok(())
    }
}

impl Drop for Pipeline {
    fn drop(&mut self) {
        let device = self.gpu.device();
        // SAFETY: all are ours or null, which is allowed, and no submission that uses them is left: whoever has recorded some keeps
        // this, and has settled (`Recorded`).
        unsafe {
            device.destroy_pipeline(self.raw, None);
            device.destroy_pipeline_layout(self.layout, None);
            device.destroy_descriptor_set_layout(self.set_layout, None);
        }
    }
}
