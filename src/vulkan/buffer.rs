//! Import: a memory plane becomes a `VkBuffer`, for shaders that compute on its bytes.

use ash::vk;

use super::failure::{OTHER_MEMORY, code, refuse};
use super::gpu::Gpu;
use super::memory::{self, Dedicated, Needs};
use super::usage::{self, OTHER_USE};
use crate::endpoint::Refusal;
use crate::frame::Buffer;

/// The bytes of a `u32`, which shaders load and store.
const WORD: usize = 4;

/// One memory plane as a `VkBuffer`: its bytes, whatever pixels they are. Keeps the memory; as [`Image`](super::Image) otherwise.
#[derive(Debug)]
pub struct GpuBuffer {
    gpu: Gpu,
    raw: vk::Buffer,
    memory: vk::DeviceMemory,
    len: u64,
}

impl GpuBuffer {
    /// Imports memory plane `plane` of a buffer, to be used so: `STORAGE_BUFFER`, `TRANSFER_SRC` and what else Vulkan 1.0 has. The modifier
    /// does not matter: these are the bytes as they lie.
    ///
    /// # Errors
    /// The refusal, with step, reason and repair.
    pub fn import(gpu: &Gpu, buffer: &Buffer, plane: u32, usage: vk::BufferUsageFlags) -> Result<GpuBuffer, Refusal> {
        let (Some(dma_buf), Some(&bytes)) = (buffer.dma_buf(plane), buffer.memory_lens().get(plane as usize)) else {
            let why = format!("memory plane {plane} is none, or plain memory, which is not imported");
            return Err(refuse("import", why, "make /dev/udmabuf or a dma-heap available to this user"));
        };
        usage::of_buffer(usage).map_err(|why| refuse("usage", why, OTHER_USE))?;
        // VUID-VkBufferCreateInfo-size-00912.
        if bytes == 0 {
            return Err(refuse("import", format!("memory plane {plane} has no bytes"), "leave it out of the buffer"));
        }
        let kind = vk::ExternalMemoryHandleTypeFlags::DMA_BUF_EXT;
        let features = gpu.physical().buffer_features(kind, usage);
        if !features.contains(vk::ExternalMemoryFeatureFlags::IMPORTABLE) {
            let why = "the GPU's driver imports no dma-bufs as buffers of this use";
            return Err(refuse("vkGetPhysicalDeviceExternalBufferProperties", why, "import it as an image"));
        }
        // Shaders load whole words, and a driver's length (V4L2's `sizeimage`) may end within one; the dma-buf, which is whole pages, goes
        // on behind it.
        let bytes = bytes.next_multiple_of(WORD).min(dma_buf.len());
        let len = u64::try_from(bytes).unwrap_or(u64::MAX);
        let mut external = vk::ExternalMemoryBufferCreateInfo::default().handle_types(kind);
        let info = vk::BufferCreateInfo::default()
            .size(len)
            .usage(usage)
            .sharing_mode(vk::SharingMode::EXCLUSIVE)
            .push_next(&mut external);
        // SAFETY: the device lives; the driver has said that it takes such buffers.
        let raw = unsafe { gpu.device().create_buffer(&info, None) }.map_err(|result| {
            refuse("vkCreateBuffer", format!("the GPU's driver makes no such buffer ({})", code(result)), OTHER_MEMORY)
        })?;
        // From here on dropping it frees what there is so far.
        let mut made = GpuBuffer { gpu: gpu.clone(), raw, memory: vk::DeviceMemory::null(), len };
        let mut wants = vk::MemoryDedicatedRequirements::default();
        let mut requirements = vk::MemoryRequirements2::default().push_next(&mut wants);
        let of = vk::BufferMemoryRequirementsInfo2::default().buffer(raw);
        // SAFETY: the buffer is ours.
        unsafe { gpu.device().get_buffer_memory_requirements2(&of, &mut requirements) };
        let vk::MemoryRequirements { size, memory_type_bits, .. } = requirements.memory_requirements;
        let dedicated = wants.prefers_dedicated_allocation == vk::TRUE
            || wants.requires_dedicated_allocation == vk::TRUE
            || features.contains(vk::ExternalMemoryFeatureFlags::DEDICATED_ONLY);
        let dedicated = if dedicated { Dedicated::Buffer(raw) } else { Dedicated::No };
        let told_by = "vkGetBufferMemoryRequirements2";
        made.memory = memory::import(gpu, dma_buf, Needs { told_by, size, bits: memory_type_bits, dedicated })?;
        // SAFETY: both are ours and not bound, the memory is as large as the buffer asks for.
        unsafe { gpu.device().bind_buffer_memory(raw, made.memory, 0) }.map_err(|result| {
            refuse(
                "vkBindBufferMemory",
                format!("the GPU's driver does not put the buffer there ({})", code(result)),
                OTHER_MEMORY,
            )
        })?;
        Ok(made)
    }

    /// The buffer. It stays this value's.
    pub fn raw(&self) -> vk::Buffer {
        self.raw
    }

    /// Its length in bytes: the memory plane's, up to the end of its last word of 4 bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The barrier that takes it over from whoever filled it, to be read so.
    pub fn acquire(&self, access: vk::AccessFlags) -> vk::BufferMemoryBarrier<'static> {
        self.barrier()
            .src_queue_family_index(vk::QUEUE_FAMILY_FOREIGN_EXT)
            .dst_queue_family_index(self.gpu.queue_family())
            .dst_access_mask(access)
    }

    /// The barrier that gives it back. `access` is what was written to it, if anything.
    pub fn release(&self, access: vk::AccessFlags) -> vk::BufferMemoryBarrier<'static> {
        self.barrier()
            .src_queue_family_index(self.gpu.queue_family())
            .dst_queue_family_index(vk::QUEUE_FAMILY_FOREIGN_EXT)
            .src_access_mask(access)
    }

    fn barrier(&self) -> vk::BufferMemoryBarrier<'static> {
        vk::BufferMemoryBarrier::default().buffer(self.raw).size(vk::WHOLE_SIZE)
    }

    /// Gives buffer and memory away; nothing is destroyed here any more.
    pub fn into_raw(mut self) -> (vk::Buffer, vk::DeviceMemory) {
        let buffer = std::mem::replace(&mut self.raw, vk::Buffer::null());
        (buffer, std::mem::replace(&mut self.memory, vk::DeviceMemory::null()))
    }
}

impl Drop for GpuBuffer {
    fn drop(&mut self) {
        if self.gpu.is_stuck() {
            return;
        }
        // SAFETY: both are ours or null, which is allowed; who used them has waited.
        unsafe {
            self.gpu.device().destroy_buffer(self.raw, None);
            self.gpu.device().free_memory(self.memory, None);
        }
    }
}
