//! The pixel formats that dmaflow knows, each with its DRM and V4L2 codes.

use super::Fourcc;
use super::table::{Bits, Info, Kind};

const fn code(text: &[u8; 4]) -> Fourcc {
    Fourcc::new(text)
}

const fn bits(shift: u8, width: u8) -> Bits {
    Bits { shift, width }
}

const fn rgb(
    drm: &[u8; 4],
    v4l2: &'static [(Fourcc, u32)],
    channels: [Bits; 3],
    alpha: Option<Bits>,
    group: &'static [u32],
) -> Info {
    Info {
        drm: Some(code(drm)),
        v4l2,
        kind: Kind::Rgb { channels, alpha },
        big_endian: false,
        horizontal: 1,
        vertical: 1,
        group,
    }
}

const fn yuv(
    drm: &[u8; 4],
    v4l2: &'static [(Fourcc, u32)],
    kind: Kind,
    subsampling: (u32, u32),
    group: &'static [u32],
) -> Info {
    Info {
        drm: Some(code(drm)),
        v4l2,
        kind,
        big_endian: false,
        horizontal: subsampling.0,
        vertical: subsampling.1,
        group,
    }
}

const fn packed(text: &[u8; 4], v4l2: &'static [(Fourcc, u32)], y: [u8; 2], u: u8, v: u8) -> Info {
    yuv(text, v4l2, Kind::Packed422 { y, u, v }, (2, 1), &[2])
}

const fn semi(text: &[u8; 4], v4l2: &'static [(Fourcc, u32)], swapped: bool, subsampling: (u32, u32)) -> Info {
    yuv(text, v4l2, Kind::SemiPlanar { swapped, sample: 1 }, subsampling, &[1, 2])
}

const fn planar(text: &[u8; 4], v4l2: &'static [(Fourcc, u32)], swapped: bool, subsampling: (u32, u32)) -> Info {
    yuv(text, v4l2, Kind::Planar { swapped }, subsampling, &[1, 1, 1])
}

/// A format without a DRM code and without subsampling.
const fn v4l2(v4l2: &'static [(Fourcc, u32)], kind: Kind, group: &'static [u32]) -> Info {
    Info { drm: None, v4l2, kind, big_endian: false, horizontal: 1, vertical: 1, group }
}

/// The big-endian one: bit 31 of its DRM code says so (`DRM_FORMAT_BIG_ENDIAN`).
const fn big(info: Info) -> Info {
    let drm = match info.drm {
        Some(Fourcc(code)) => Some(Fourcc(code | 1 << 31)),
        None => None,
    };
    Info { drm, big_endian: true, ..info }
}

const fn be(text: &[u8; 4]) -> Fourcc {
    Fourcc(Fourcc::new(text).0 | 1 << 31)
}

/// Three channels of so many bits each, the first in the highest, above `low` bits.
const fn three(width: u8, low: u8) -> [Bits; 3] {
    [bits(low + 2 * width, width), bits(low + width, width), bits(low, width)]
}

/// The same with the first in the lowest.
const fn turned(width: u8, low: u8) -> [Bits; 3] {
    let [first, second, third] = three(width, low);
    [third, second, first]
}

const fn words(
    codes: &'static [(Fourcc, u32)],
    channels: [Bits; 3],
    alpha: Option<Bits>,
    group: &'static [u32],
) -> Info {
    v4l2(codes, Kind::YuvWord { channels, alpha }, group)
}

const fn grey(codes: &'static [(Fourcc, u32)], bits: u8) -> Info {
    v4l2(codes, Kind::DeepGrey { bits }, &[2])
}

const fn bayer(codes: &'static [(Fourcc, u32)], red: [u8; 2], bits: u8) -> Info {
    v4l2(codes, Kind::Bayer { red, bits }, if bits == 8 { &[1] } else { &[2] })
}

const R8: Bits = bits(16, 8);
const G8: Bits = bits(8, 8);
const B8: Bits = bits(0, 8);

/// DRM names the word from its most significant bit (`drm_fourcc.h`), V4L2 the bytes in memory order for the 32-bit
/// formats ("Packed RGB Formats" of the V4L2 documentation): V4L2's BGR32 with alpha is DRM's ARGB8888, both `AR24`.
pub(super) static TABLE: &[Info] = &[
    rgb(b"XR24", &[(code(b"XR24"), 1), (code(b"BGR4"), 1)], [R8, G8, B8], None, &[4]),
    rgb(b"AR24", &[(code(b"AR24"), 1)], [R8, G8, B8], Some(bits(24, 8)), &[4]),
    rgb(b"XB24", &[(code(b"XB24"), 1)], [B8, G8, R8], None, &[4]),
    rgb(b"AB24", &[(code(b"AB24"), 1)], [B8, G8, R8], Some(bits(24, 8)), &[4]),
    rgb(b"RX24", &[(code(b"RX24"), 1)], [bits(24, 8), bits(16, 8), bits(8, 8)], None, &[4]),
    rgb(b"RA24", &[(code(b"RA24"), 1)], [bits(24, 8), bits(16, 8), bits(8, 8)], Some(bits(0, 8)), &[4]),
    rgb(b"BX24", &[(code(b"BX24"), 1), (code(b"RGB4"), 1)], [bits(8, 8), bits(16, 8), bits(24, 8)], None, &[4]),
    rgb(b"BA24", &[(code(b"BA24"), 1)], [bits(8, 8), bits(16, 8), bits(24, 8)], Some(bits(0, 8)), &[4]),
    rgb(b"RG24", &[(code(b"BGR3"), 1)], [R8, G8, B8], None, &[3]),
    rgb(b"BG24", &[(code(b"RGB3"), 1)], [B8, G8, R8], None, &[3]),
    rgb(b"RG16", &[(code(b"RGBP"), 1)], [bits(11, 5), bits(5, 6), bits(0, 5)], None, &[2]),
    rgb(b"XR15", &[(code(b"XR15"), 1), (code(b"RGBO"), 1)], [bits(10, 5), bits(5, 5), bits(0, 5)], None, &[2]),
    rgb(b"AR15", &[(code(b"AR15"), 1)], [bits(10, 5), bits(5, 5), bits(0, 5)], Some(bits(15, 1)), &[2]),
    semi(b"NV12", &[(code(b"NV12"), 1), (code(b"NM12"), 2)], false, (2, 2)),
    semi(b"NV21", &[(code(b"NV21"), 1), (code(b"NM21"), 2)], true, (2, 2)),
    semi(b"NV16", &[(code(b"NV16"), 1), (code(b"NM16"), 2)], false, (2, 1)),
    semi(b"NV61", &[(code(b"NV61"), 1), (code(b"NM61"), 2)], true, (2, 1)),
    semi(b"NV24", &[(code(b"NV24"), 1)], false, (1, 1)),
    semi(b"NV42", &[(code(b"NV42"), 1)], true, (1, 1)),
    planar(b"YU12", &[(code(b"YU12"), 1), (code(b"YM12"), 3)], false, (2, 2)),
    planar(b"YV12", &[(code(b"YV12"), 1), (code(b"YM21"), 3)], true, (2, 2)),
    planar(b"YU16", &[(code(b"422P"), 1), (code(b"YM16"), 3)], false, (2, 1)),
    planar(b"YV16", &[(code(b"YM61"), 3)], true, (2, 1)),
    planar(b"YU24", &[(code(b"YM24"), 3)], false, (1, 1)),
    planar(b"YV24", &[(code(b"YM42"), 3)], true, (1, 1)),
    packed(b"YUYV", &[(code(b"YUYV"), 1)], [0, 2], 1, 3),
    packed(b"UYVY", &[(code(b"UYVY"), 1)], [1, 3], 0, 2),
    packed(b"YVYU", &[(code(b"YVYU"), 1)], [0, 2], 3, 1),
    packed(b"VYUY", &[(code(b"VYUY"), 1)], [1, 3], 2, 0),
    yuv(b"P010", &[(code(b"P010"), 1)], Kind::SemiPlanar { swapped: false, sample: 2 }, (2, 2), &[2, 4]),
    // DRM's 8-bit single-channel format is red alone (R8); no display shows it as grey, so it has no DRM code here.
    v4l2(&[(code(b"GREY"), 1)], Kind::Grey, &[1]),
    rgb(b"RX15", &[(code(b"RX15"), 1)], three(5, 1), None, &[2]),
    rgb(b"RA15", &[(code(b"RA15"), 1)], three(5, 1), Some(bits(0, 1)), &[2]),
    rgb(b"XB15", &[(code(b"XB15"), 1)], turned(5, 0), None, &[2]),
    rgb(b"AB15", &[(code(b"AB15"), 1)], turned(5, 0), Some(bits(15, 1)), &[2]),
    rgb(b"BX15", &[(code(b"BX15"), 1)], turned(5, 1), None, &[2]),
    rgb(b"BA15", &[(code(b"BA15"), 1)], turned(5, 1), Some(bits(0, 1)), &[2]),
    rgb(b"XR12", &[(code(b"XR12"), 1), (code(b"R444"), 1)], three(4, 0), None, &[2]),
    rgb(b"AR12", &[(code(b"AR12"), 1)], three(4, 0), Some(bits(12, 4)), &[2]),
    rgb(b"RX12", &[(code(b"RX12"), 1)], three(4, 4), None, &[2]),
    rgb(b"RA12", &[(code(b"RA12"), 1)], three(4, 4), Some(bits(0, 4)), &[2]),
    rgb(b"XB12", &[(code(b"XB12"), 1)], turned(4, 0), None, &[2]),
    rgb(b"AB12", &[(code(b"AB12"), 1)], turned(4, 0), Some(bits(12, 4)), &[2]),
    rgb(b"BX12", &[(code(b"BX12"), 1)], turned(4, 4), None, &[2]),
    rgb(b"BA12", &[(code(b"GA12"), 1)], turned(4, 4), Some(bits(0, 4)), &[2]),
    rgb(b"RGB8", &[(code(b"RGB1"), 1)], [bits(5, 3), bits(2, 3), bits(0, 2)], None, &[1]),
    big(rgb(b"RG16", &[(code(b"RGBR"), 1)], [bits(11, 5), bits(5, 6), bits(0, 5)], None, &[2])),
    big(rgb(b"XR15", &[(be(b"XR15"), 1), (code(b"RGBQ"), 1)], three(5, 0), None, &[2])),
    big(rgb(b"AR15", &[(be(b"AR15"), 1)], three(5, 0), Some(bits(15, 1)), &[2])),
    big(v4l2(&[(code(b"BGRH"), 1)], Kind::Rgb { channels: turned(6, 14), alpha: None }, &[4])),
    // DRM has some of these as well, by other codes: V4L2's VUYA is DRM's AYUV.
    words(&[(code(b"AYUV"), 1), (code(b"YUV4"), 1)], turned(8, 8), Some(bits(0, 8)), &[4]),
    words(&[(code(b"XYUV"), 1)], turned(8, 8), None, &[4]),
    words(&[(code(b"VUYA"), 1)], three(8, 0), Some(bits(24, 8)), &[4]),
    words(&[(code(b"VUYX"), 1)], three(8, 0), None, &[4]),
    words(&[(code(b"YUVA"), 1)], turned(8, 0), Some(bits(24, 8)), &[4]),
    words(&[(code(b"YUVX"), 1)], turned(8, 0), None, &[4]),
    words(&[(code(b"YUVP"), 1)], [bits(11, 5), bits(5, 6), bits(0, 5)], None, &[2]),
    words(&[(code(b"YUVO"), 1)], three(5, 0), Some(bits(15, 1)), &[2]),
    words(&[(code(b"Y444"), 1)], three(4, 0), Some(bits(12, 4)), &[2]),
    grey(&[(code(b"Y10 "), 1)], 10),
    grey(&[(code(b"Y12 "), 1)], 12),
    grey(&[(code(b"Y16 "), 1)], 16),
    big(grey(&[(be(b"Y16 "), 1)], 16)),
    v4l2(&[(code(b"HSV3"), 1)], Kind::Hsv { before: 0 }, &[3]),
    v4l2(&[(code(b"HSV4"), 1)], Kind::Hsv { before: 1 }, &[4]),
    bayer(&[(code(b"BA81"), 1)], [1, 1], 8),
    bayer(&[(code(b"GBRG"), 1)], [0, 1], 8),
    bayer(&[(code(b"GRBG"), 1)], [1, 0], 8),
    bayer(&[(code(b"RGGB"), 1)], [0, 0], 8),
    bayer(&[(code(b"BG10"), 1)], [1, 1], 10),
    bayer(&[(code(b"GB10"), 1)], [0, 1], 10),
    bayer(&[(code(b"BA10"), 1)], [1, 0], 10),
    bayer(&[(code(b"RG10"), 1)], [0, 0], 10),
    bayer(&[(code(b"BG12"), 1)], [1, 1], 12),
    bayer(&[(code(b"GB12"), 1)], [0, 1], 12),
    bayer(&[(code(b"BA12"), 1)], [1, 0], 12),
    bayer(&[(code(b"RG12"), 1)], [0, 0], 12),
    bayer(&[(code(b"BYR2"), 1)], [1, 1], 16),
    bayer(&[(code(b"GB16"), 1)], [0, 1], 16),
    bayer(&[(code(b"GR16"), 1)], [1, 0], 16),
    bayer(&[(code(b"RG16"), 1)], [0, 0], 16),
];
