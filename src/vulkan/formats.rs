//! Pixel formats as Vulkan has them.

use ash::vk;

use crate::format::{Bits, Format, Kind, MAX_PLANES};

/// How the channels of one texel lie in a little-endian word: what a shader reads of it, and what the CPU predicts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Texel {
    /// Bytes of the word, 1 to 4.
    pub(super) bytes: u32,
    /// Red, green, blue and alpha as the shader gets them; `None` for one that is not there or means nothing.
    pub(super) channels: [Option<(u8, u8)>; 4],
}

impl Texel {
    const fn of(bytes: u32, channels: [Option<(u8, u8)>; 4]) -> Texel {
        Texel { bytes, channels }
    }

    /// One channel of so many bits, at this bit.
    const fn one(shift: u8, width: u8) -> Texel {
        Texel::of((shift as u32 + width as u32).div_ceil(8), [Some((shift, width)), None, None, None])
    }

    /// The integer that each channel's 1.0 stands for; 0 where there is none.
    pub(super) fn levels(&self) -> [u32; 4] {
        self.channels.map(|channel| channel.map_or(0, |(_, width)| (1 << width) - 1))
    }
}

/// One colour plane of an image.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct GpuPlane {
    /// Its index in the [`Layout`](crate::format::Layout): `YV12` has its chroma planes in the other order than Vulkan.
    pub(super) plane: usize,
    /// The format of a view of this plane alone.
    pub(super) view: vk::Format,
    /// The aspect of such a view.
    pub(super) aspect: vk::ImageAspectFlags,
    /// What a texel of it is.
    pub(super) texel: Texel,
}

/// A format as Vulkan has it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct GpuFormat {
    /// The image's.
    pub(super) image: vk::Format,
    planes: [Option<GpuPlane>; MAX_PLANES],
}

impl GpuFormat {
    /// The format with the same bytes in memory; `None` where Vulkan has none whose planes can be read as they lie. The packed YUV
    /// formats are among those: Vulkan reads them through a colour conversion alone ("Formats requiring sampler Y′CBCR conversion").
    /// A format without alpha is Vulkan's with alpha, which is not to be looked at then. Samples of more than 8 bits in two bytes, and
    /// those of a sensor, are plain numbers.
    pub(super) fn of(format: Format) -> Option<GpuFormat> {
        let code = format.drm().map(|code| code.0.to_le_bytes());
        match (code.as_ref(), format.kind()) {
            (Some(code), Kind::Rgb { channels, alpha }) => rgb(format, code, channels, alpha),
            (Some(code), _) => yuv(code),
            (None, Kind::Grey | Kind::Bayer { bits: 8, .. }) => Some(single(vk::Format::R8_UNORM, Texel::one(0, 8))),
            (None, Kind::DeepGrey { .. } | Kind::Bayer { .. }) if !format.is_big_endian() => {
                Some(single(vk::Format::R16_UNORM, Texel::one(0, 16)))
            }
            (None, _) => None,
        }
    }

    /// The colour planes in Vulkan's order.
    pub(super) fn planes(&self) -> impl Iterator<Item = &GpuPlane> {
        self.planes.iter().flatten()
    }

    /// Each colour plane as an image by itself, in Vulkan's order, with its index in the layout.
    pub(super) fn apart(&self) -> impl Iterator<Item = (usize, GpuFormat)> {
        self.planes().map(|plane| (plane.plane, single(plane.view, plane.texel)))
    }

    /// Whether the colour planes are apart, so that a view of one needs another format than the image's.
    pub(super) fn is_multi_planar(&self) -> bool {
        self.planes().count() > 1
    }

    /// The formats of all views, the image's own first: what a mutable image must be made with.
    pub(super) fn view_formats(&self) -> Vec<vk::Format> {
        let mut formats = vec![self.image];
        for plane in self.planes() {
            if !formats.contains(&plane.view) {
                formats.push(plane.view);
            }
        }
        formats
    }
}

fn single(image: vk::Format, texel: Texel) -> GpuFormat {
    let plane = GpuPlane { plane: 0, view: image, aspect: vk::ImageAspectFlags::COLOR, texel };
    GpuFormat { image, planes: [Some(plane), None, None, None] }
}

/// Vulkan names the packed formats from the most significant bit, as DRM does, and the others by bytes in memory order.
fn rgb(format: Format, code: &[u8; 4], channels: [Bits; 3], alpha: Option<Bits>) -> Option<GpuFormat> {
    use vk::Format as F;
    let image = match code {
        b"XR24" | b"AR24" => F::B8G8R8A8_UNORM,
        b"XB24" | b"AB24" => F::R8G8B8A8_UNORM,
        b"RG24" => F::B8G8R8_UNORM,
        b"BG24" => F::R8G8B8_UNORM,
        b"RG16" => F::R5G6B5_UNORM_PACK16,
        b"XR15" | b"AR15" => F::A1R5G5B5_UNORM_PACK16,
        b"RX15" | b"RA15" => F::R5G5B5A1_UNORM_PACK16,
        b"BX15" | b"BA15" => F::B5G5R5A1_UNORM_PACK16,
        b"RX12" | b"RA12" => F::R4G4B4A4_UNORM_PACK16,
        b"BX12" | b"BA12" => F::B4G4R4A4_UNORM_PACK16,
        _ => return None,
    };
    let place = |bits: Bits| Some((bits.shift, bits.width));
    let [red, green, blue] = channels.map(place);
    let texel = Texel::of(format.row_bytes(0, 1), [red, green, blue, alpha.and_then(place)]);
    Some(single(image, texel))
}

fn yuv(code: &[u8; 4]) -> Option<GpuFormat> {
    use vk::Format as F;
    const BYTE: Texel = Texel::one(0, 8);
    const TWO: Texel = Texel::of(2, [Some((0, 8)), Some((8, 8)), None, None]);
    const TEN: Texel = Texel::one(6, 10);
    const TWO_TENS: Texel = Texel::of(4, [Some((6, 10)), Some((22, 10)), None, None]);
    let semi =
        |image, luma: (F, Texel), chroma: (F, Texel)| several(image, &[(0, luma.0, luma.1), (1, chroma.0, chroma.1)]);
    let byte = (F::R8_UNORM, BYTE);
    let three = |image, u, v| several(image, &[(0, F::R8_UNORM, BYTE), (u, F::R8_UNORM, BYTE), (v, F::R8_UNORM, BYTE)]);
    Some(match code {
        b"NV12" => semi(F::G8_B8R8_2PLANE_420_UNORM, byte, (F::R8G8_UNORM, TWO)),
        b"NV16" => semi(F::G8_B8R8_2PLANE_422_UNORM, byte, (F::R8G8_UNORM, TWO)),
        b"P010" => semi(
            F::G10X6_B10X6R10X6_2PLANE_420_UNORM_3PACK16,
            (F::R10X6_UNORM_PACK16, TEN),
            (F::R10X6G10X6_UNORM_2PACK16, TWO_TENS),
        ),
        b"YU12" => three(F::G8_B8_R8_3PLANE_420_UNORM, 1, 2),
        b"YV12" => three(F::G8_B8_R8_3PLANE_420_UNORM, 2, 1),
        b"YU16" => three(F::G8_B8_R8_3PLANE_422_UNORM, 1, 2),
        b"YV16" => three(F::G8_B8_R8_3PLANE_422_UNORM, 2, 1),
        b"YU24" => three(F::G8_B8_R8_3PLANE_444_UNORM, 1, 2),
        b"YV24" => three(F::G8_B8_R8_3PLANE_444_UNORM, 2, 1),
        _ => return None,
    })
}

fn several(image: vk::Format, of: &[(usize, vk::Format, Texel)]) -> GpuFormat {
    const ASPECTS: [vk::ImageAspectFlags; 3] =
        [vk::ImageAspectFlags::PLANE_0, vk::ImageAspectFlags::PLANE_1, vk::ImageAspectFlags::PLANE_2];
    let mut planes = [None; MAX_PLANES];
    for ((slot, &(plane, view, texel)), aspect) in planes.iter_mut().zip(of).zip(ASPECTS) {
        *slot = Some(GpuPlane { plane, view, aspect, texel });
    }
    GpuFormat { image, planes }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn planes_and_texels_are_those_of_the_format() {
        let mut known = 0;
        for format in Format::all() {
            let Some(gpu) = GpuFormat::of(format) else { continue };
            known += 1;
            let mut planes: Vec<_> = gpu.planes().map(|plane| plane.plane).collect();
            planes.sort_unstable();
            assert_eq!(planes, (0..format.planes()).collect::<Vec<_>>(), "{format}");
            for plane in gpu.planes() {
                // A chroma sample stands for as many pixels as the format is subsampled by.
                let pixels = if plane.plane == 0 { 1 } else { format.subsampling().0 };
                assert_eq!(plane.texel.bytes, format.row_bytes(plane.plane, pixels), "{format} plane {}", plane.plane);
                for (shift, width) in plane.texel.channels.iter().flatten() {
                    assert!(u32::from(shift + width) <= 8 * plane.texel.bytes, "{format}");
                }
            }
            assert_eq!(gpu.view_formats().len() > 1, gpu.is_multi_planar(), "{format}");
        }
        assert!(known >= 30, "{known}");
    }

    #[test]
    fn what_cannot_be_read_as_it_lies_has_none() {
        for name in ["YUYV", "RX24", "RG16-BE", "HSV3", "NV21", "Y16 -BE"] {
            if let Some((format, _)) = Format::parse(name) {
                assert_eq!(GpuFormat::of(format), None, "{name}");
            }
        }
        let of = |name| GpuFormat::of(Format::parse(name).unwrap().0).unwrap();
        assert_eq!(of("XR24").planes().next().unwrap().texel.levels(), [255, 255, 255, 0]);
        assert_eq!(of("RG16").planes().next().unwrap().texel.levels(), [31, 63, 31, 0]);
        assert_eq!(of("YV12").planes().map(|plane| plane.plane).collect::<Vec<_>>(), [0, 2, 1]);
    }
}
