//! Import: a buffer becomes a `VkImage`.

use ash::vk;

use super::failure::{OTHER_MEMORY, code, refuse};
use super::formats::GpuFormat;
use super::gpu::Gpu;
use super::linear::stated_modifier;
use super::memory::{self, Dedicated, Needs};
use super::offers::{ModifierOffer, Use, Way};
use super::usage::{self, OTHER_USE};
use crate::dmabuf::DmaBuf;
use crate::endpoint::{Importer, Refusal};
use crate::format::{Layout, MAX_PLANES, Modifier, PlaneLayout};
use crate::frame::Buffer;

/// The aspects of an image's memory planes, by index.
pub(super) const MEMORY_PLANES: [vk::ImageAspectFlags; MAX_PLANES] = [
    vk::ImageAspectFlags::MEMORY_PLANE_0_EXT,
    vk::ImageAspectFlags::MEMORY_PLANE_1_EXT,
    vk::ImageAspectFlags::MEMORY_PLANE_2_EXT,
    vk::ImageAspectFlags::MEMORY_PLANE_3_EXT,
];

/// Who tells what memory an image needs.
const TOLD_BY: &str = "vkGetImageMemoryRequirements2";

/// Imports buffers as images of one GPU.
#[derive(Clone, Debug)]
pub struct GpuImporter {
    gpu: Gpu,
    usage: vk::ImageUsageFlags,
}

/// An image over a buffer's memory. It keeps the memory, and not the frame's lease.
///
/// Destroyed on drop. Whoever gives its handle to commands (which is unsafe in `ash`) sees to it that they have ended by then.
#[derive(Debug)]
pub struct Image {
    gpu: Gpu,
    raw: vk::Image,
    /// Each once.
    memory: Vec<vk::DeviceMemory>,
    format: GpuFormat,
    modifier: Modifier,
    size: (u32, u32),
}

/// The handles of an [`Image`], to be destroyed by whoever has them: the image, then its memory.
#[derive(Clone, Debug)]
pub struct RawImage {
    /// The image, bound to the memory.
    pub image: vk::Image,
    /// Its memory: one object, or one for each dma-buf of a disjoint image.
    pub memory: Vec<vk::DeviceMemory>,
    /// Its format.
    pub format: vk::Format,
    /// Width and height in pixels.
    pub size: (u32, u32),
    /// Its tiling.
    pub modifier: Modifier,
}

impl GpuImporter {
    /// An importer of images that are used so: `SAMPLED`, `STORAGE`, transfers, attachments of colour. Others are refused with each import.
    pub fn new(gpu: Gpu, usage: vk::ImageUsageFlags) -> GpuImporter {
        GpuImporter { gpu, usage }
    }
}

impl Importer for GpuImporter {
    type Image = Image;

    fn name(&self) -> &str {
        &self.gpu.info().name
    }

    /// A `VkImage` with the explicit modifier and plane layouts of the buffer, over one `VkDeviceMemory` for each distinct dma-buf.
    ///
    /// A stated modifier is taken as it is. One that is not stated is LINEAR where the buffer's exporter knows nothing else
    /// (cameras, dma-heaps, udmabuf, by the kernel's `exp_name`), and refused otherwise: a GPU's buffer may be tiled in any way.
    ///
    /// The image's contents are another's until they are [acquired](Image::acquire).
    fn import(&mut self, buffer: &Buffer) -> Result<Image, Refusal> {
        let (format, memory, modifier) = prepare(buffer)?;
        self.make(&Picture::whole(buffer.layout(), format), &memory, modifier)
    }
}

impl GpuImporter {
    /// Each colour plane as an image by itself, in Vulkan's order: of `R8_UNORM`, `R8G8_UNORM` and so on. For drivers that have no image of
    /// several planes for this modifier or size, and for shaders that convert by themselves. As [`import`](Importer::import) otherwise.
    ///
    /// # Errors
    /// The refusal, with step, reason and repair.
    pub fn import_planes(&self, buffer: &Buffer) -> Result<Vec<Image>, Refusal> {
        let (format, memory, modifier) = prepare(buffer)?;
        let pictures = Picture::apart(buffer.layout(), format);
        pictures
            .iter()
            .map(|picture| {
                // An image of one plane has one memory: that in which the plane lies.
                let place = picture.places.first().map_or(0, |place| memory.of_place(place));
                let dma_bufs = memory.dma_bufs.get(place).copied().into_iter().collect();
                self.make(picture, &Distinct { dma_bufs, of_memory: Vec::new() }, modifier)
            })
            .collect()
    }

    fn make(&self, picture: &Picture, memory: &Distinct<'_>, modifier: Modifier) -> Result<Image, Refusal> {
        usage::of_image(self.usage).map_err(|why| refuse("usage", why, OTHER_USE))?;
        let offer = self.offer(picture, modifier)?;
        let disjoint = memory.dma_bufs.len() > 1;
        check(picture, &offer, disjoint)?;
        let how = Use { usage: self.usage, disjoint };
        let raw = create(&self.gpu, picture, modifier, how)?;
        // From here on dropping it frees what there is so far.
        let memories = Vec::with_capacity(MAX_PLANES);
        let (format, size) = (picture.format, picture.size);
        let mut image = Image { gpu: self.gpu.clone(), raw, memory: memories, format, modifier, size };
        if disjoint {
            image.bind_planes(memory, picture)?;
        } else {
            image.bind_all(memory, offer.dedicated)?;
        }
        Ok(image)
    }

    /// What the driver says of this format and modifier.
    fn offer(&self, picture: &Picture, modifier: Modifier) -> Result<ModifierOffer, Refusal> {
        let physical = self.gpu.physical();
        let all = physical.modifiers(picture.format.image);
        let (gpu, name) = (&self.gpu.info().name, &picture.name);
        let Some(known) = all.iter().find(|known| known.modifier == modifier) else {
            let there: Vec<_> = all.iter().map(|known| known.modifier.to_string()).collect();
            let (why, repair) = if there.is_empty() {
                (format!("{gpu} takes no images of {name} from others"), "choose another format".to_owned())
            } else {
                (format!("{gpu} does not take {name} tiled as {modifier}"), format!("use one of {}", there.join(", ")))
            };
            return Err(refuse("modifiers", why, repair));
        };
        let offer = physical.offer(&picture.format, *known, self.usage, Way::Import);
        offer.map_err(|why| {
            let why = format!("{gpu} does not take {name} with modifier {modifier}: {why}");
            let repair = "choose another format, or let frames be copied";
            refuse("vkGetPhysicalDeviceImageFormatProperties2", why, repair)
        })
    }
}

/// What Vulkan calls a buffer's format, its dma-bufs, and its tiling.
fn prepare(buffer: &Buffer) -> Result<(GpuFormat, Distinct<'_>, Modifier), Refusal> {
    let layout = buffer.layout();
    let format = GpuFormat::of(layout.format()).ok_or_else(|| {
        let why = format!("Vulkan has no format whose planes can be read as those of {}", layout.format());
        refuse("formats", why, "ask the camera for a format that the GPU takes (`dmaflow list`)")
    })?;
    let memory = Distinct::of(buffer)?;
    let modifier = stated_modifier(layout, memory.dma_bufs.iter().copied())?;
    Ok((format, memory, modifier))
}

/// What becomes one image: a picture, or one colour plane of it.
struct Picture {
    /// For people.
    name: String,
    format: GpuFormat,
    size: (u32, u32),
    /// Pixels of the first plane to a sample of the others.
    subsampling: (u32, u32),
    /// The planes' places, in Vulkan's order.
    places: Vec<PlaneLayout>,
}

impl Picture {
    fn whole(layout: &Layout, format: GpuFormat) -> Picture {
        let places = format.planes().filter_map(|plane| layout.planes().get(plane.plane).copied());
        Picture {
            name: layout.to_string(),
            format,
            size: layout.size(),
            subsampling: layout.format().subsampling(),
            places: places.collect(),
        }
    }

    /// Each plane by itself, in Vulkan's order.
    fn apart(layout: &Layout, format: GpuFormat) -> Vec<Picture> {
        let one = |(index, format): (usize, GpuFormat)| {
            let place = *layout.planes().get(index)?;
            let texel = format.planes().next()?.texel;
            let size = (
                layout.format().row_bytes(index, layout.width()) / texel.bytes,
                layout.format().rows(index, layout.height()),
            );
            let name = format!("plane {index} of {layout}");
            Some(Picture { name, format, size, subsampling: (1, 1), places: vec![place] })
        };
        format.apart().filter_map(one).collect()
    }
}

/// The dma-bufs of a buffer, each once however many memory planes lie in it.
struct Distinct<'a> {
    dma_bufs: Vec<&'a DmaBuf>,
    /// For each memory plane of the buffer its dma-buf's place above.
    of_memory: Vec<usize>,
}

impl Distinct<'_> {
    fn of(buffer: &Buffer) -> Result<Distinct<'_>, Refusal> {
        let mut distinct = Distinct { dma_bufs: Vec::new(), of_memory: Vec::new() };
        for (plane, _) in (0u32..).zip(buffer.memory()) {
            let Some(dma_buf) = buffer.dma_buf(plane) else {
                let why = "the frames are in plain memory, which is not imported";
                return Err(refuse("import", why, "make /dev/udmabuf or a dma-heap available to this user"));
            };
            let known = distinct
                .dma_bufs
                .iter()
                .position(|known| known.identity() == dma_buf.identity());
            distinct.of_memory.push(known.unwrap_or(distinct.dma_bufs.len()));
            if known.is_none() {
                distinct.dma_bufs.push(dma_buf);
            }
        }
        Ok(distinct)
    }

    /// Which of the dma-bufs a colour plane lies in.
    fn of_place(&self, place: &PlaneLayout) -> usize {
        self.of_memory.get(place.memory as usize).copied().unwrap_or(0)
    }
}

/// What the specification wants of the layout before the driver is asked.
fn check(picture: &Picture, offer: &ModifierOffer, disjoint: bool) -> Result<(), Refusal> {
    let (width, height) = picture.size;
    let (most_wide, most_high) = offer.max_size;
    if width > most_wide || height > most_high {
        let why = format!("{width}x{height} pixels are more than the GPU takes ({most_wide}x{most_high})");
        return Err(refuse("vkGetPhysicalDeviceImageFormatProperties2", why, "choose a smaller size"));
    }
    let (horizontal, vertical) = picture.subsampling;
    // VUID-VkImageCreateInfo-format-04712 and -04713.
    if !width.is_multiple_of(horizontal) || !height.is_multiple_of(vertical) {
        let why = format!(
            "Vulkan has no image of {}: a chroma sample stands for {horizontal}x{vertical} pixels",
            picture.name
        );
        return Err(refuse("size", why, "choose an even size"));
    }
    if offer.planes as usize != picture.places.len() {
        let (there, wanted) = (picture.places.len(), offer.planes);
        let why =
            format!("{} has {there} planes, and with modifier {} it would have {wanted}", picture.name, offer.modifier);
        return Err(refuse("modifiers", why, "use a modifier without compression"));
    }
    if disjoint && (!offer.disjoint || offer.dedicated) {
        let why = "the planes lie in several dma-bufs, and the GPU's driver takes them from one alone";
        let repair = "ask the camera for one memory plane (NV12 and not NM12)";
        return Err(refuse("vkGetPhysicalDeviceImageFormatProperties2", why, repair));
    }
    for (plane, place) in picture.format.planes().zip(&picture.places) {
        let bytes = plane.texel.bytes;
        if !place.stride.is_multiple_of(bytes) || !place.offset.is_multiple_of(bytes) {
            let (stride, offset) = (place.stride, place.offset);
            let why = format!(
                "{} has rows of {stride} bytes from byte {offset} on: no whole texels of {bytes} bytes",
                picture.name
            );
            return Err(refuse("stride", why, format!("use strides that are multiples of {bytes} bytes")));
        }
    }
    Ok(())
}

fn create(gpu: &Gpu, picture: &Picture, modifier: Modifier, how: Use) -> Result<vk::Image, Refusal> {
    let format = &picture.format;
    let views = format.view_formats();
    let mut list = vk::ImageFormatListCreateInfo::default().view_formats(&views);
    // In Vulkan's order of planes. Size, and the pitches of arrays and depths, must be 0 (VUID-…-size-02267, -arrayPitch-02268,
    // -depthPitch-02269). In a disjoint image an offset counts from the start of its plane's own memory.
    let places: Vec<_> = picture
        .places
        .iter()
        .map(|place| vk::SubresourceLayout {
            offset: place.offset.into(),
            row_pitch: place.stride.into(),
            ..vk::SubresourceLayout::default()
        })
        .collect();
    let mut tiling = vk::ImageDrmFormatModifierExplicitCreateInfoEXT::default()
        .drm_format_modifier(modifier.to_drm())
        .plane_layouts(&places);
    let mut external =
        vk::ExternalMemoryImageCreateInfo::default().handle_types(vk::ExternalMemoryHandleTypeFlags::DMA_BUF_EXT);
    let mut info = how.info(format, picture.size).push_next(&mut tiling).push_next(&mut external);
    if format.is_multi_planar() {
        info = info.push_next(&mut list);
    }
    // SAFETY: the device lives, and has the extensions whose structures are chained; format, modifier, usage and flags are such as
    // the driver has said it takes (`GpuImporter::offer`); what `info` points to lives until the call returns.
    unsafe { gpu.device().create_image(&info, None) }.map_err(|result| {
        let said = code(result);
        match result {
            vk::Result::ERROR_INVALID_DRM_FORMAT_MODIFIER_PLANE_LAYOUT_EXT => refuse(
                "vkCreateImage",
                format!("the GPU does not take the strides or offsets of {} ({said})", picture.name),
                "let the camera make rows of a multiple of 256 bytes (--stride), or capture into buffers with such",
            ),
            _ => refuse(
                "vkCreateImage",
                format!("the GPU's driver refused an image of {} ({said})", picture.name),
                OTHER_MEMORY,
            ),
        }
    })
}

impl Image {
    /// One memory for all planes.
    fn bind_all(&mut self, memory: &Distinct<'_>, dedicated_only: bool) -> Result<(), Refusal> {
        let mut wants = vk::MemoryDedicatedRequirements::default();
        let mut requirements = vk::MemoryRequirements2::default().push_next(&mut wants);
        let info = vk::ImageMemoryRequirementsInfo2::default().image(self.raw);
        // SAFETY: the image is ours and not disjoint.
        unsafe { self.gpu.device().get_image_memory_requirements2(&info, &mut requirements) };
        let vk::MemoryRequirements { size, memory_type_bits, .. } = requirements.memory_requirements;
        let wanted = wants.prefers_dedicated_allocation == vk::TRUE || wants.requires_dedicated_allocation == vk::TRUE;
        let dedicated = if wanted || dedicated_only { Dedicated::Image(self.raw) } else { Dedicated::No };
        let needs = Needs { told_by: TOLD_BY, size, bits: memory_type_bits, dedicated };
        for dma_buf in &memory.dma_bufs {
            self.memory.push(memory::import(&self.gpu, dma_buf, needs)?);
        }
        let binds: Vec<_> = self
            .memory
            .iter()
            .map(|&memory| vk::BindImageMemoryInfo::default().image(self.raw).memory(memory))
            .collect();
        self.bind(&binds)
    }

    /// A memory for each dma-buf; each plane is bound to that in which it lies.
    fn bind_planes(&mut self, memory: &Distinct<'_>, picture: &Picture) -> Result<(), Refusal> {
        // In Vulkan's order: the memory that each plane lies in, what of it the plane needs, and the types that it can be of.
        let mut needs: Vec<(usize, vk::MemoryRequirements)> = Vec::with_capacity(MAX_PLANES);
        for (place, aspect) in picture.places.iter().zip(MEMORY_PLANES) {
            let mut of_plane = vk::ImagePlaneMemoryRequirementsInfo::default().plane_aspect(aspect);
            let info = vk::ImageMemoryRequirementsInfo2::default()
                .image(self.raw)
                .push_next(&mut of_plane);
            let mut requirements = vk::MemoryRequirements2::default();
            // SAFETY: the image is ours, disjoint, and has this memory plane.
            unsafe { self.gpu.device().get_image_memory_requirements2(&info, &mut requirements) };
            needs.push((memory.of_place(place), requirements.memory_requirements));
        }
        for (place, dma_buf) in memory.dma_bufs.iter().enumerate() {
            let here = needs.iter().filter(|(of, _)| *of == place).map(|(_, need)| need);
            let size = here.clone().map(|need| need.size).max().unwrap_or(0);
            let bits = here.fold(u32::MAX, |bits, need| bits & need.memory_type_bits);
            let needs = Needs { told_by: TOLD_BY, size, bits, dedicated: Dedicated::No };
            self.memory.push(memory::import(&self.gpu, dma_buf, needs)?);
        }
        let mut planes: Vec<_> = MEMORY_PLANES
            .iter()
            .take(needs.len())
            .map(|&aspect| vk::BindImagePlaneMemoryInfo::default().plane_aspect(aspect))
            .collect();
        let binds: Vec<_> = planes
            .iter_mut()
            .zip(&needs)
            .filter_map(|(plane, (place, _))| {
                let memory = *self.memory.get(*place)?;
                Some(
                    vk::BindImageMemoryInfo::default()
                        .image(self.raw)
                        .memory(memory)
                        .push_next(plane),
                )
            })
            .collect();
        self.bind(&binds)
    }

    fn bind(&self, binds: &[vk::BindImageMemoryInfo<'_>]) -> Result<(), Refusal> {
        // SAFETY: image and memory are ours, each plane is bound once, at the start of memory that is as large as it asks for
        // (`memory::import`).
        unsafe { self.gpu.device().bind_image_memory2(binds) }.map_err(|result| {
            let why = format!("the GPU's driver does not put the image there ({})", code(result));
            refuse("vkBindImageMemory2", why, OTHER_MEMORY)
        })
    }

    /// The image. It stays this value's.
    pub fn raw(&self) -> vk::Image {
        self.raw
    }

    /// Its format.
    pub fn format(&self) -> vk::Format {
        self.format.image
    }

    /// Width and height in pixels.
    pub fn size(&self) -> (u32, u32) {
        self.size
    }

    /// Its tiling.
    pub fn modifier(&self) -> Modifier {
        self.modifier
    }

    /// Whether its planes lie in several memory objects.
    pub fn is_disjoint(&self) -> bool {
        self.memory.len() > 1
    }

    pub(super) fn planes(&self) -> &GpuFormat {
        &self.format
    }

    /// The barrier that takes the image over from whoever filled it (`VK_QUEUE_FAMILY_FOREIGN_EXT`), to be read by the stages of the
    /// barrier's second scope. The contents stay: the old layout is GENERAL, the one in which foreign owners leave an image, and not
    /// UNDEFINED, which lets a driver clear its metadata. Once for each frame, as the owner has written anew.
    pub fn acquire(&self, layout: vk::ImageLayout, access: vk::AccessFlags) -> vk::ImageMemoryBarrier<'static> {
        self.barrier()
            .src_queue_family_index(vk::QUEUE_FAMILY_FOREIGN_EXT)
            .dst_queue_family_index(self.gpu.queue_family())
            .old_layout(vk::ImageLayout::GENERAL)
            .new_layout(layout)
            .dst_access_mask(access)
    }

    /// The barrier that gives it back. `access` is what was written to it, if anything.
    pub fn release(&self, layout: vk::ImageLayout, access: vk::AccessFlags) -> vk::ImageMemoryBarrier<'static> {
        self.barrier()
            .src_queue_family_index(self.gpu.queue_family())
            .dst_queue_family_index(vk::QUEUE_FAMILY_FOREIGN_EXT)
            .old_layout(layout)
            .new_layout(vk::ImageLayout::GENERAL)
            .src_access_mask(access)
    }

    fn barrier(&self) -> vk::ImageMemoryBarrier<'static> {
        let all = vk::ImageSubresourceRange::default()
            .aspect_mask(vk::ImageAspectFlags::COLOR)
            .level_count(1)
            .layer_count(1);
        vk::ImageMemoryBarrier::default().image(self.raw).subresource_range(all)
    }

    /// Gives the handles away; nothing is destroyed here any more.
    pub fn into_raw(mut self) -> RawImage {
        let image = std::mem::replace(&mut self.raw, vk::Image::null());
        let memory = std::mem::take(&mut self.memory);
        RawImage { image, memory, format: self.format.image, size: self.size, modifier: self.modifier }
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        if self.gpu.is_stuck() {
            return;
        }
        // SAFETY: both are ours, or null and empty, which is allowed; who used them has waited (see the type's documentation). The
        // image goes before its memory.
        unsafe {
            self.gpu.device().destroy_image(self.raw, None);
            for &memory in &self.memory {
                self.gpu.device().free_memory(memory, None);
            }
        }
    }
}
