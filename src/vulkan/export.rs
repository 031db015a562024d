//! Export: buffers that the GPU's driver makes, for a camera to fill and a display to show.

use std::os::fd::{FromRawFd, OwnedFd};

use ash::{ext, vk};

use super::failure::failed;
use super::formats::GpuFormat;
use super::gpu::Gpu;
use super::image::MEMORY_PLANES;
use super::memory::Dedicated;
use super::offers::{Use, Way};
use super::usage::{self, OTHER_USE};
use crate::dmabuf::DmaBuf;
use crate::error::{Error, Kind, Result};
use crate::format::{Format, Layout, MAX_PLANES, Modifier, PlaneLayout};
use crate::frame::{Buffer, Room};
use crate::memory::Memory;

const DMA_BUF: vk::ExternalMemoryHandleTypeFlags = vk::ExternalMemoryHandleTypeFlags::DMA_BUF_EXT;

/// What an object asks of its memory.
struct Asked {
    requirements: vk::MemoryRequirements,
    /// Of it alone, if at all.
    dedicated: Dedicated,
    /// It can be in no other.
    only_dedicated: bool,
}

impl Gpu {
    /// Makes a buffer for a picture of this format, size and colour, as the driver lays out an image that is used so. `room` is what
    /// others want of the memory, `modifiers` the tilings that they can take: the driver chooses one of these, or with none given one of
    /// all that it exports, and the layout states it.
    ///
    /// Where the GPU has such, the memory is one that the CPU reaches, because others than the GPU are to fill it. It lives as long as
    /// the buffer and whoever has imported it: the image that it was made with is gone when this returns, and
    /// [`GpuImporter`](super::GpuImporter) makes a new one of it. What is in it at first is not defined.
    ///
    /// # Errors
    /// [`Kind::Unsupported`] for a format or tilings in which the driver exports no image; [`Kind::Invalid`] where there is to be more
    /// room than the driver gives, and for uses that shared memory is not put to; otherwise what the driver says.
    pub fn make_buffer(
        &self,
        layout: &Layout,
        room: &Room,
        usage: vk::ImageUsageFlags,
        modifiers: &[Modifier],
    ) -> Result<Buffer> {
        let (format, size) = (layout.format(), layout.size());
        usage::of_image(usage).map_err(|why| self.not_used_so(format, why))?;
        let gpu_format =
            GpuFormat::of(format).ok_or_else(|| self.makes_none(format).because("Vulkan has no such format"))?;
        let (horizontal, vertical) = format.subsampling();
        // VUID-VkImageCreateInfo-format-04712 and -04713.
        if !size.0.is_multiple_of(horizontal) || !size.1.is_multiple_of(vertical) {
            let error = self.makes_none(format);
            let error = error.because(format!("a chroma sample stands for {horizontal}x{vertical} pixels"));
            return Err(error.repair("choose an even size"));
        }
        let (list, only_dedicated) = self.exportable(format, &gpu_format, size, usage, modifiers)?;
        let how = Use { usage, disjoint: false };
        let mut made = Made::new(self);
        made.image = self.create_image(format, &gpu_format, size, how, &list)?;
        let mut wants = vk::MemoryDedicatedRequirements::default();
        let mut requirements = vk::MemoryRequirements2::default().push_next(&mut wants);
        let of = vk::ImageMemoryRequirementsInfo2::default().image(made.image);
        // SAFETY: the image is ours and not disjoint.
        unsafe { self.device().get_image_memory_requirements2(&of, &mut requirements) };
        let requirements = requirements.memory_requirements;
        let asked = Asked::new(requirements, Dedicated::Image(made.image), only_dedicated, wants);
        // The strides are known with the image, before there is memory.
        let described = self.describe(&made, layout, &gpu_format)?;
        made.memory = self.allocate(asked, room.len(&described, 0)?, format)?;
        // SAFETY: both are ours and not bound, the memory is as large as the image asks for (`allocate`).
        unsafe { self.device().bind_image_memory(made.image, made.memory, 0) }
            .map_err(|result| self.failed("vkBindImageMemory", format, result))?;
        let dma_buf = made.export(format)?;
        self.enough(&dma_buf, room.len(&described, 0)?, layout)?;
        buffer(described, vec![dma_buf])
    }

    /// Makes a buffer of plain rows, laid out as `layout` has them: the memory of a `VkBuffer` that is used so, one for each memory plane.
    /// As [`Gpu::make_buffer`] otherwise; its modifier is [`Modifier::LINEAR`], because the bytes of a `VkBuffer` lie as they are
    /// addressed. For formats of which the driver exports no image.
    ///
    /// # Errors
    /// [`Kind::Unsupported`] where the driver exports no buffers of this use; [`Kind::Invalid`] for a layout that states another tiling,
    /// and for uses that shared memory is not put to; otherwise what the driver says.
    pub fn make_bytes(&self, layout: &Layout, room: &Room, usage: vk::BufferUsageFlags) -> Result<Buffer> {
        let format = layout.format();
        if let Some(other) = layout.modifier().filter(|&modifier| modifier != Modifier::LINEAR) {
            let error = Error::new(Kind::Invalid, "make a buffer of", self.subject(format));
            let error = error.because(format!("the layout is tiled ({other}), and these are rows"));
            return Err(error.repair("ask for an image (`make_buffer`)"));
        }
        usage::of_buffer(usage).map_err(|why| self.not_used_so(format, why))?;
        let features = self.physical().buffer_features(DMA_BUF, usage);
        if !features.contains(vk::ExternalMemoryFeatureFlags::EXPORTABLE) {
            return Err(self
                .makes_none(format)
                .because("its driver exports no dma-bufs of buffers of this use"));
        }
        let mut memory = Vec::with_capacity(layout.memory_planes());
        for plane in (0u32..).take(layout.memory_planes()) {
            let needed = room.len(layout, plane)?.max(1);
            let mut made = Made::new(self);
            let mut external = vk::ExternalMemoryBufferCreateInfo::default().handle_types(DMA_BUF);
            let info = vk::BufferCreateInfo::default()
                .size(bytes(needed))
                .usage(usage)
                .sharing_mode(vk::SharingMode::EXCLUSIVE)
                .push_next(&mut external);
            // SAFETY: the device lives; the driver has said that it exports such buffers.
            made.buffer = unsafe { self.device().create_buffer(&info, None) }
                .map_err(|result| self.failed("vkCreateBuffer", format, result))?;
            let mut wants = vk::MemoryDedicatedRequirements::default();
            let mut requirements = vk::MemoryRequirements2::default().push_next(&mut wants);
            let of = vk::BufferMemoryRequirementsInfo2::default().buffer(made.buffer);
            // SAFETY: the buffer is ours.
            unsafe { self.device().get_buffer_memory_requirements2(&of, &mut requirements) };
            let requirements = requirements.memory_requirements;
            let only_dedicated = features.contains(vk::ExternalMemoryFeatureFlags::DEDICATED_ONLY);
            let asked = Asked::new(requirements, Dedicated::Buffer(made.buffer), only_dedicated, wants);
            made.memory = self.allocate(asked, needed, format)?;
            // SAFETY: both are ours and not bound, the memory is as large as the buffer asks for (`allocate`).
            unsafe { self.device().bind_buffer_memory(made.buffer, made.memory, 0) }
                .map_err(|result| self.failed("vkBindBufferMemory", format, result))?;
            let dma_buf = made.export(format)?;
            self.enough(&dma_buf, needed, layout)?;
            memory.push(dma_buf);
        }
        buffer(layout.with_modifier(Some(Modifier::LINEAR)), memory)
    }

    /// The tilings of those asked for in which an image can be exported, and whether one of them wants memory of its own.
    fn exportable(
        &self,
        format: Format,
        gpu_format: &GpuFormat,
        (width, height): (u32, u32),
        usage: vk::ImageUsageFlags,
        modifiers: &[Modifier],
    ) -> Result<(Vec<u64>, bool)> {
        let asked_for = |modifier| modifiers.is_empty() || modifiers.contains(&modifier);
        let offers: Vec<_> = self
            .physical()
            .modifiers(gpu_format.image)
            .into_iter()
            .filter(|known| asked_for(known.modifier))
            .filter_map(|known| self.physical().offer(gpu_format, known, usage, Way::Export).ok())
            // A tiling with planes of its own (compression) is for those who ask Vulkan, not for those who read pixels.
            .filter(|offer| offer.planes as usize == format.planes())
            .filter(|offer| width <= offer.max_size.0 && height <= offer.max_size.1)
            .collect();
        if offers.is_empty() {
            let names: Vec<_> = modifiers.iter().map(ToString::to_string).collect();
            let which = if names.is_empty() { String::new() } else { format!(" tiled as {}", names.join(" or ")) };
            return Err(self
                .makes_none(format)
                .said_by("vkGetPhysicalDeviceImageFormatProperties2")
                .because(format!("its driver exports no such image{which}"))
                .repair("ask for another format or tiling, or use buffers of a dma-heap or udmabuf"));
        }
        let list = offers.iter().map(|offer| offer.modifier.to_drm()).collect();
        Ok((list, offers.iter().any(|offer| offer.dedicated)))
    }

    fn create_image(
        &self,
        format: Format,
        gpu_format: &GpuFormat,
        size: (u32, u32),
        how: Use,
        modifiers: &[u64],
    ) -> Result<vk::Image> {
        let views = gpu_format.view_formats();
        let mut list = vk::ImageFormatListCreateInfo::default().view_formats(&views);
        let mut tiling = vk::ImageDrmFormatModifierListCreateInfoEXT::default().drm_format_modifiers(modifiers);
        let mut external = vk::ExternalMemoryImageCreateInfo::default().handle_types(DMA_BUF);
        let mut info = how.info(gpu_format, size).push_next(&mut tiling).push_next(&mut external);
        if gpu_format.is_multi_planar() {
            info = info.push_next(&mut list);
        }
        // SAFETY: the device lives, and has the extensions whose structures are chained; the driver has said that it exports images
        // of each of these modifiers (`exportable`); what `info` points to lives until the call returns.
        unsafe { self.device().create_image(&info, None) }
            .map_err(|result| self.failed("vkCreateImage", format, result))
    }

    /// The layout that the driver has chosen, all of it in one memory.
    fn describe(&self, made: &Made<'_>, wished: &Layout, gpu_format: &GpuFormat) -> Result<Layout> {
        let format = wished.format();
        let device = ext::image_drm_format_modifier::Device::new(self.physical().instance(), self.device());
        let mut chosen = vk::ImageDrmFormatModifierPropertiesEXT::default();
        // SAFETY: the image is ours, and of a DRM format modifier.
        unsafe { device.get_image_drm_format_modifier_properties(made.image, &mut chosen) }
            .map_err(|result| self.failed("vkGetImageDrmFormatModifierPropertiesEXT", format, result))?;
        let mut places = [PlaneLayout::default(); MAX_PLANES];
        let count = format.planes().min(MAX_PLANES);
        for (plane, aspect) in gpu_format.planes().zip(MEMORY_PLANES) {
            let which = vk::ImageSubresource::default().aspect_mask(aspect);
            // SAFETY: the image is ours and has this memory plane: as many as the format has colour planes (`exportable`).
            let place = unsafe { self.device().get_image_subresource_layout(made.image, which) };
            let (offset, stride) = (u32::try_from(place.offset), u32::try_from(place.row_pitch));
            let (Ok(offset), Ok(stride)) = (offset, stride) else {
                return Err(self.makes_none(format).because("its rows end behind 4 GiB"));
            };
            if let Some(slot) = places.get_mut(plane.plane) {
                *slot = PlaneLayout { memory: 0, offset, stride };
            }
        }
        let layout = Layout::new(format, wished.size(), &places[..count]);
        let layout = layout.map_err(|cause| self.makes_none(format).because(cause))?;
        let modifier = Modifier::from_drm(chosen.drm_format_modifier);
        Ok(layout.with_modifier(modifier).with_colour(wished.colour()))
    }

    /// Memory that can be exported, of `needed` bytes where its size is free.
    fn allocate(&self, asked: Asked, needed: usize, format: Format) -> Result<vk::DeviceMemory> {
        let vk::MemoryRequirements { size, memory_type_bits, .. } = asked.requirements;
        // Of an object's own its size is not free (VUID-VkMemoryDedicatedAllocateInfo-image-02964, -buffer-02965).
        let dedicated = if asked.only_dedicated || bytes(needed) <= size { asked.dedicated } else { Dedicated::No };
        let size = if matches!(dedicated, Dedicated::No) { size.max(bytes(needed)) } else { size };
        let visible = vk::MemoryPropertyFlags::HOST_VISIBLE;
        let kinds = [visible | vk::MemoryPropertyFlags::HOST_CACHED, visible, vk::MemoryPropertyFlags::empty()];
        let memory_type = kinds.into_iter().find_map(|wanted| self.memory_type(memory_type_bits, wanted));
        let memory_type = memory_type.ok_or_else(|| self.makes_none(format).because("it has no memory for it"))?;
        let mut export = vk::ExportMemoryAllocateInfo::default().handle_types(DMA_BUF);
        let mut only = vk::MemoryDedicatedAllocateInfo::default();
        let mut info = vk::MemoryAllocateInfo::default()
            .allocation_size(size)
            .memory_type_index(memory_type)
            .push_next(&mut export);
        info = match dedicated {
            Dedicated::No => info,
            Dedicated::Image(image) => {
                only = only.image(image);
                info.push_next(&mut only)
            }
            Dedicated::Buffer(buffer) => {
                only = only.buffer(buffer);
                info.push_next(&mut only)
            }
        };
        // SAFETY: the device lives; the type is one that the object can be in, and what `info` points to lives until the call returns.
        unsafe { self.device().allocate_memory(&info, None) }
            .map_err(|result| self.failed("vkAllocateMemory", format, result))
    }

    /// Whether there is room.
    fn enough(&self, dma_buf: &DmaBuf, needed: usize, layout: &Layout) -> Result<()> {
        let have = dma_buf.len();
        if have >= needed {
            return Ok(());
        }
        let error = Error::new(Kind::Invalid, "make a buffer of", format!("{} for {layout}", self.info().name));
        let error = error.because(format!("{needed} bytes are asked for, and the driver makes {have}"));
        Err(error.repair("use buffers of a dma-heap or udmabuf"))
    }

    fn subject(&self, format: Format) -> String {
        format!("{} for {format}", self.info().name)
    }

    fn not_used_so(&self, format: Format, why: String) -> Error {
        let error = Error::new(Kind::Invalid, "make a buffer of", self.subject(format));
        error.because(why).repair(OTHER_USE)
    }

    fn makes_none(&self, format: Format) -> Error {
        let error = Error::new(Kind::Unsupported, "make a buffer of", self.subject(format));
        error.repair("use buffers of a dma-heap or udmabuf")
    }

    fn failed(&self, call: &'static str, format: Format, result: vk::Result) -> Error {
        failed(call, "make a buffer of", self.subject(format), result)
    }
}

impl Asked {
    fn new(
        requirements: vk::MemoryRequirements,
        of_it_alone: Dedicated,
        only_dedicated: bool,
        wants: vk::MemoryDedicatedRequirements<'_>,
    ) -> Asked {
        let only_dedicated = only_dedicated || wants.requires_dedicated_allocation == vk::TRUE;
        let dedicated =
            if only_dedicated || wants.prefers_dedicated_allocation == vk::TRUE { of_it_alone } else { Dedicated::No };
        Asked { requirements, dedicated, only_dedicated }
    }
}

/// What memory is made with, destroyed on drop. No command has ever used it.
struct Made<'a> {
    gpu: &'a Gpu,
    image: vk::Image,
    buffer: vk::Buffer,
    memory: vk::DeviceMemory,
}

impl Made<'_> {
    fn new(gpu: &Gpu) -> Made<'_> {
        let (image, buffer, memory) = (vk::Image::null(), vk::Buffer::null(), vk::DeviceMemory::null());
        Made { gpu, image, buffer, memory }
    }

    /// The memory as a dma-buf, which keeps it alive by itself ("Exporting memory" in the specification: the payload lives as long as
    /// the handle).
    fn export(&self, format: Format) -> Result<DmaBuf> {
        let info = vk::MemoryGetFdInfoKHR::default().memory(self.memory).handle_type(DMA_BUF);
        // SAFETY: the memory is ours, and was allocated to be exported so.
        let fd = unsafe { self.gpu.memory_fd().get_memory_fd(&info) }
            .map_err(|result| self.gpu.failed("vkGetMemoryFdKHR", format, result))?;
        // SAFETY: each call makes a descriptor that is the caller's (vkGetMemoryFdKHR).
        DmaBuf::new(unsafe { OwnedFd::from_raw_fd(fd) })
    }
}

impl Drop for Made<'_> {
    fn drop(&mut self) {
        // SAFETY: all are ours or null, which is allowed, and unused; the image and the buffer go before their memory.
        unsafe {
            self.gpu.device().destroy_image(self.image, None);
            self.gpu.device().destroy_buffer(self.buffer, None);
            self.gpu.device().free_memory(self.memory, None);
        }
    }
}

fn bytes(len: usize) -> vk::DeviceSize {
    u64::try_from(len).unwrap_or(u64::MAX)
}

fn buffer(layout: Layout, memory: Vec<DmaBuf>) -> Result<Buffer> {
    let lens: Vec<_> = memory.iter().map(DmaBuf::len).collect();
    Buffer::new(layout, memory.into_iter().map(Memory::DmaBuf).collect(), &lens)
}
