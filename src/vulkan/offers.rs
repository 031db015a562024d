//! What a GPU can import: formats, modifiers, kinds of memory.

use ash::{ext, khr, vk};

use super::failure::code;
use super::formats::GpuFormat;
use super::physical::Physical;
use super::usage;
use crate::format::{Format, Modifier};

/// A format that a GPU can import, with the tilings that it knows of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct GpuOffer {
    /// The format.
    pub format: Format,
    /// Its modifiers, in the driver's order.
    pub modifiers: Vec<ModifierOffer>,
}

/// A modifier in which a GPU can import a format.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ModifierOffer {
    /// The tiling.
    pub modifier: Modifier,
    /// How many planes with an offset and a stride it has: one for each colour plane.
    pub planes: u32,
    /// What images of it can be used for (`drmFormatModifierTilingFeatures`).
    pub features: vk::FormatFeatureFlags,
    /// Whether all colour planes can be one image. Otherwise each is imported by itself
    /// ([`import_planes`](super::GpuImporter::import_planes)).
    pub as_one: bool,
    /// Whether the planes may lie in several dma-bufs.
    pub disjoint: bool,
    /// Whether each image wants a memory object of its own.
    pub dedicated: bool,
    /// Whether images that the GPU made can be exported.
    pub exportable: bool,
    /// The largest width and height in pixels.
    pub max_size: (u32, u32),
}

/// A kind of memory handle, and which way it goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HandleOffer {
    /// The name in the specification, without prefix and suffix: `DMA_BUF`.
    pub name: &'static str,
    /// Whether memory of this kind can be imported into buffers.
    pub importable: bool,
    /// Whether buffers can be exported so.
    pub exportable: bool,
}

/// How an image is to be used, which its creation and every question about it must say alike.
#[derive(Clone, Copy)]
pub(super) struct Use {
    pub(super) usage: vk::ImageUsageFlags,
    pub(super) disjoint: bool,
}

impl Use {
    pub(super) fn flags(self, format: &GpuFormat) -> vk::ImageCreateFlags {
        let mut flags = vk::ImageCreateFlags::empty();
        if format.is_multi_planar() {
            // For views of one plane (VUID-VkImageViewCreateInfo-image-01762).
            flags |= vk::ImageCreateFlags::MUTABLE_FORMAT;
        }
        if self.disjoint {
            flags |= vk::ImageCreateFlags::DISJOINT;
        }
        flags
    }

    /// An image of this format and size whose memory comes from others, or goes to them: what all such have in common.
    pub(super) fn info(self, format: &GpuFormat, (width, height): (u32, u32)) -> vk::ImageCreateInfo<'static> {
        vk::ImageCreateInfo::default()
            .flags(self.flags(format))
            .image_type(vk::ImageType::TYPE_2D)
            .format(format.image)
            .extent(vk::Extent3D { width, height, depth: 1 })
            .mip_levels(1)
            .array_layers(1)
            .samples(vk::SampleCountFlags::TYPE_1)
            .tiling(vk::ImageTiling::DRM_FORMAT_MODIFIER_EXT)
            .usage(self.usage)
            .sharing_mode(vk::SharingMode::EXCLUSIVE)
            // Nothing else goes with external memory (VUID-VkImageCreateInfo-pNext-01443).
            .initial_layout(vk::ImageLayout::UNDEFINED)
    }
}

impl Physical {
    /// The formats that can be imported, with their modifiers; none for a use that shared memory is not put to.
    pub(super) fn offers(&self, usage: vk::ImageUsageFlags) -> Vec<GpuOffer> {
        if usage::of_image(usage).is_err() {
            return Vec::new();
        }
        let offer = |format| {
            let gpu = GpuFormat::of(format)?;
            let modifiers: Vec<_> = self
                .modifiers(gpu.image)
                .into_iter()
                .filter_map(|known| {
                    let as_one = self.offer(&gpu, known, usage, Way::Import).ok();
                    as_one.or_else(|| self.offer_apart(&gpu, known, usage))
                })
                // A compressed tiling has planes for that too, which no `Layout` has a place for.
                .filter(|offer| offer.planes as usize == format.planes())
                .collect();
            (!modifiers.is_empty()).then_some(GpuOffer { format, modifiers })
        };
        Format::all().filter_map(offer).collect()
    }

    /// One modifier of a format, if images of it can be imported, or exported, for this use.
    ///
    /// # Errors
    /// Why not, as a clause.
    pub(super) fn offer(
        &self,
        format: &GpuFormat,
        known: Known,
        usage: vk::ImageUsageFlags,
        way: Way,
    ) -> Result<ModifierOffer, String> {
        // The format's own word, and that of each view: VUID-VkImageViewCreateInfo-usage-02274 asks it of the view's format.
        let wanted = features_of(usage);
        if format.is_multi_planar() && !self.ycbcr {
            return Err("it has no images of several colour planes (samplerYcbcrConversion)".to_owned());
        }
        for view in format.planes().map(|plane| plane.view) {
            let features = self
                .modifiers(view)
                .into_iter()
                .find(|other| other.modifier == known.modifier)
                .map_or(vk::FormatFeatureFlags::empty(), |other| other.features);
            if !features.contains(wanted) {
                return Err(format!("shaders cannot read planes of it ({view:?})"));
            }
        }
        let properties = self.shareable(format, known.modifier, Use { usage, disjoint: false }, way)?;
        let disjoint = known.features.contains(vk::FormatFeatureFlags::DISJOINT)
            && self
                .shareable(format, known.modifier, Use { usage, disjoint: true }, way)
                .is_ok();
        let external = properties.features;
        Ok(ModifierOffer {
            modifier: known.modifier,
            planes: known.planes,
            features: known.features,
            as_one: true,
            disjoint,
            dedicated: external.contains(vk::ExternalMemoryFeatureFlags::DEDICATED_ONLY),
            exportable: external.contains(vk::ExternalMemoryFeatureFlags::EXPORTABLE),
            max_size: properties.max_size,
        })
    }

    /// The same for the planes one by one: what holds for all of them.
    fn offer_apart(&self, format: &GpuFormat, known: Known, usage: vk::ImageUsageFlags) -> Option<ModifierOffer> {
        let planes = format.apart().map(|(_, plane)| {
            let listed = self.modifiers(plane.image);
            let of_plane = listed.into_iter().find(|other| other.modifier == known.modifier)?;
            self.offer(&plane, of_plane, usage, Way::Import)
                .ok()
                .filter(|offer| offer.planes == 1)
        });
        let all: Vec<_> = planes.collect::<Option<_>>()?;
        let one = all.iter().copied().reduce(|one, other| ModifierOffer {
            features: one.features & other.features,
            dedicated: one.dedicated || other.dedicated,
            exportable: one.exportable && other.exportable,
            max_size: (one.max_size.0.min(other.max_size.0), one.max_size.1.min(other.max_size.1)),
            ..one
        })?;
        let planes = u32::try_from(all.len()).ok()?;
        Some(ModifierOffer { planes, as_one: false, disjoint: true, ..one })
    }

    /// The modifiers that the driver lists for a format, whatever they can be used for.
    pub(super) fn modifiers(&self, format: vk::Format) -> Vec<Known> {
        // The list of the extension itself, which every driver fills: its newer form (VkDrmFormatModifierPropertiesList2EXT) tells more
        // features, none of which is asked for here, and stays empty with lavapipe (Mesa 25.0).
        let mut list = vk::DrmFormatModifierPropertiesListEXT::default();
        self.format_properties(format, &mut list);
        let mut all = vec![vk::DrmFormatModifierPropertiesEXT::default(); list.drm_format_modifier_count as usize];
        let mut list = vk::DrmFormatModifierPropertiesListEXT::default().drm_format_modifier_properties(&mut all);
        self.format_properties(format, &mut list);
        let count = list.drm_format_modifier_count as usize;
        let known = all.into_iter().take(count).filter_map(|one| {
            let modifier = Modifier::from_drm(one.drm_format_modifier)?;
            let (planes, features) = (one.drm_format_modifier_plane_count, one.drm_format_modifier_tiling_features);
            Some(Known { modifier, planes, features })
        });
        known.collect()
    }

    fn format_properties(&self, format: vk::Format, list: &mut vk::DrmFormatModifierPropertiesListEXT<'_>) {
        let mut properties = vk::FormatProperties2::default().push_next(list);
        // SAFETY: `Physical::new`'s contract; the list is of an extension that is there (`can_import`), and holds as many
        // entries as it says.
        unsafe {
            self.instance()
                .get_physical_device_format_properties2(self.raw, format, &mut properties)
        };
    }

    /// Whether the driver leaves `VkDrmFormatModifierPropertiesList2EXT` empty where the first list has modifiers, though it has the
    /// extension that brings it: see [`Messages`](super::Messages).
    pub(super) fn lacks_second_list(&self) -> bool {
        let format = vk::Format::B8G8R8A8_UNORM;
        let has_it = self.at_least(1, 3) || self.has(khr::format_feature_flags2::NAME);
        if !has_it || self.modifiers(format).is_empty() {
            return false;
        }
        let mut list = vk::DrmFormatModifierPropertiesList2EXT::default();
        let mut properties = vk::FormatProperties2::default().push_next(&mut list);
        // SAFETY: `Physical::new`'s contract; the list is of extensions that are there, and asks for the count alone.
        unsafe {
            self.instance()
                .get_physical_device_format_properties2(self.raw, format, &mut properties)
        };
        list.drm_format_modifier_count == 0
    }

    /// Whether an image of this sort can be imported from a dma-buf, or exported as one, and what the driver says of it.
    ///
    /// # Errors
    /// Why not, as a clause.
    fn shareable(&self, format: &GpuFormat, modifier: Modifier, how: Use, way: Way) -> Result<Shareable, String> {
        let views = format.view_formats();
        let mut list = vk::ImageFormatListCreateInfo::default().view_formats(&views);
        let mut tiling = vk::PhysicalDeviceImageDrmFormatModifierInfoEXT::default()
            .drm_format_modifier(modifier.to_drm())
            .sharing_mode(vk::SharingMode::EXCLUSIVE);
        let mut external = vk::PhysicalDeviceExternalImageFormatInfo::default()
            .handle_type(vk::ExternalMemoryHandleTypeFlags::DMA_BUF_EXT);
        let mut info = vk::PhysicalDeviceImageFormatInfo2::default()
            .format(format.image)
            .ty(vk::ImageType::TYPE_2D)
            .tiling(vk::ImageTiling::DRM_FORMAT_MODIFIER_EXT)
            .usage(how.usage)
            .flags(how.flags(format))
            .push_next(&mut tiling)
            .push_next(&mut external);
        if format.is_multi_planar() {
            // VUID-VkPhysicalDeviceImageFormatInfo2-tiling-02313.
            info = info.push_next(&mut list);
        }
        let mut told = vk::ExternalImageFormatProperties::default();
        let mut properties = vk::ImageFormatProperties2::default().push_next(&mut told);
        // SAFETY: `Physical::new`'s contract; all that the chains point to lives until the call returns.
        let asked = unsafe {
            self.instance()
                .get_physical_device_image_format_properties2(self.raw, &info, &mut properties)
        };
        let extent = properties.image_format_properties.max_extent;
        match asked {
            Ok(()) => {}
            Err(vk::Result::ERROR_FORMAT_NOT_SUPPORTED) => return Err("its driver has no such images".to_owned()),
            Err(result) => return Err(format!("its driver says {}", code(result))),
        }
        let features = told.external_memory_properties.external_memory_features;
        let (feature, not) = match way {
            Way::Import => {
                (vk::ExternalMemoryFeatureFlags::IMPORTABLE, "its driver imports no such images from dma-bufs")
            }
            Way::Export => {
                (vk::ExternalMemoryFeatureFlags::EXPORTABLE, "its driver exports no such images as dma-bufs")
            }
        };
        if !features.contains(feature) {
            return Err(not.to_owned());
        }
        Ok(Shareable { features, max_size: (extent.width, extent.height) })
    }

    /// The kinds of memory handles that are file descriptors, or the process's own memory.
    pub(super) fn handles(&self) -> Vec<HandleOffer> {
        use vk::ExternalMemoryHandleTypeFlags as Type;
        // The first two are of extensions that are there (`can_import`).
        let host = self
            .has(ext::external_memory_host::NAME)
            .then_some(("HOST_ALLOCATION", Type::HOST_ALLOCATION_EXT));
        let kinds = [("OPAQUE_FD", Type::OPAQUE_FD), ("DMA_BUF", Type::DMA_BUF_EXT)];
        let offer = |(name, handle)| {
            let features = self.buffer_features(handle, vk::BufferUsageFlags::STORAGE_BUFFER);
            let importable = features.contains(vk::ExternalMemoryFeatureFlags::IMPORTABLE);
            let exportable = features.contains(vk::ExternalMemoryFeatureFlags::EXPORTABLE);
            HandleOffer { name, importable, exportable }
        };
        kinds.into_iter().chain(host).map(offer).collect()
    }

    /// Which way memory handles of this kind go with buffers of this use.
    pub(super) fn buffer_features(
        &self,
        handle: vk::ExternalMemoryHandleTypeFlags,
        usage: vk::BufferUsageFlags,
    ) -> vk::ExternalMemoryFeatureFlags {
        let info = vk::PhysicalDeviceExternalBufferInfo::default().usage(usage).handle_type(handle);
        let mut properties = vk::ExternalBufferProperties::default();
        // SAFETY: `Physical::new`'s contract, and Vulkan 1.1 (`can_import`).
        unsafe {
            self.instance()
                .get_physical_device_external_buffer_properties(self.raw, &info, &mut properties);
        }
        properties.external_memory_properties.external_memory_features
    }
}

/// A modifier as the driver lists it.
#[derive(Clone, Copy)]
pub(super) struct Known {
    pub(super) modifier: Modifier,
    pub(super) planes: u32,
    pub(super) features: vk::FormatFeatureFlags,
}

/// Which way memory goes. A driver may do one without the other.
#[derive(Clone, Copy)]
pub(super) enum Way {
    Import,
    Export,
}

/// What the driver says of images that can be shared.
#[derive(Clone, Copy)]
struct Shareable {
    features: vk::ExternalMemoryFeatureFlags,
    max_size: (u32, u32),
}

/// The features that a usage asks of a format ("Format Features, Usage…" of the specification).
fn features_of(usage: vk::ImageUsageFlags) -> vk::FormatFeatureFlags {
    let pairs = [
        (vk::ImageUsageFlags::SAMPLED, vk::FormatFeatureFlags::SAMPLED_IMAGE),
        (vk::ImageUsageFlags::STORAGE, vk::FormatFeatureFlags::STORAGE_IMAGE),
        (vk::ImageUsageFlags::COLOR_ATTACHMENT, vk::FormatFeatureFlags::COLOR_ATTACHMENT),
    ];
    let asked = pairs.into_iter().filter(|(used, _)| usage.contains(*used));
    asked.fold(vk::FormatFeatureFlags::empty(), |all, (_, feature)| all | feature)
}
