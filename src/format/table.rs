//! The pixel formats that dmaflow knows, each with its DRM and V4L2 codes.

use std::fmt;

use super::Fourcc;

/// One field of a packed RGB pixel, counted from the least significant bit of the little-endian word.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Bits {
    /// Position of the lowest bit.
    pub shift: u8,
    /// Number of bits, 1 to 8.
    pub width: u8,
}

/// How a format's samples are arranged.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// One little-endian word of 2 to 4 bytes a pixel.
    Rgb {
        /// Red, green and blue.
        channels: [Bits; 3],
        /// Alpha, where the format has one.
        alpha: Option<Bits>,
    },
    /// Two pixels in four bytes: the byte positions of the two Y, of U and of V.
    Packed422 {
        /// Positions of the first and the second Y.
        y: [u8; 2],
        /// Position of U.
        u: u8,
        /// Position of V.
        v: u8,
    },
    /// A plane of Y and a plane of U and V in turn.
    SemiPlanar {
        /// Whether V comes first.
        swapped: bool,
        /// Bytes of a sample: 1, or 2 with the value in the upper bits (P010).
        sample: u8,
    },
    /// A plane each of Y, U and V.
    Planar {
        /// Whether the plane of V comes before that of U.
        swapped: bool,
    },
    /// Y alone.
    Grey,
}

pub(super) struct Info {
    drm: Option<Fourcc>,
    v4l2: &'static [(Fourcc, u32)],
    kind: Kind,
    horizontal: u32,
    vertical: u32,
    /// Bytes, for each colour plane, of one group: `horizontal` pixels in a chroma plane, one pixel elsewhere.
    group: &'static [u32],
}

/// A pixel format: one entry of a fixed table, cheap to copy and compare.
///
/// Its codes in DRM and in V4L2 are kept both. V4L2 has several codes for formats that are one in DRM, because it also
/// encodes the number of memory planes (`NV12` and `NM12`).
#[derive(Clone, Copy)]
pub struct Format(&'static Info);

impl Format {
    /// The formats known here, in order of preference when nothing else decides.
    pub fn all() -> impl ExactSizeIterator<Item = Format> {
        TABLE.iter().map(Format)
    }

    /// The format that DRM calls `code`.
    pub fn from_drm(code: Fourcc) -> Option<Format> {
        Format::all().find(|format| format.drm() == Some(code))
    }

    /// The format that V4L2 calls `code`, and the number of memory planes which that code stands for.
    pub fn from_v4l2(code: Fourcc) -> Option<(Format, u32)> {
        Format::all().find_map(|format| {
            let &(_, planes) = format.0.v4l2.iter().find(|(v4l2, _)| *v4l2 == code)?;
            Some((format, planes))
        })
    }

    /// What a person calls `text`: a DRM code, or a V4L2 code. A code that only V4L2 has (`NM12`, `RGBP`) also fixes the
    /// number of memory planes and comes back as the second value.
    pub fn parse(text: &str) -> Option<(Format, Option<Fourcc>)> {
        let code = text.to_ascii_uppercase().parse().ok()?;
        if let Some(format) = Format::from_drm(code) {
            return Some((format, None));
        }
        Format::from_v4l2(code).map(|(format, _)| (format, Some(code)))
    }

    /// The DRM code, where DRM has one.
    pub fn drm(self) -> Option<Fourcc> {
        self.0.drm
    }

    /// The V4L2 codes with their numbers of memory planes, fewest first.
    pub fn v4l2(self) -> impl Iterator<Item = (Fourcc, u32)> {
        self.0.v4l2.iter().copied()
    }

    /// The name in output: DRM's code, else V4L2's.
    pub fn name(self) -> Fourcc {
        match (self.0.drm, self.0.v4l2.first()) {
            (Some(code), _) | (None, Some(&(code, _))) => code,
            (None, None) => Fourcc::new(b"????"),
        }
    }

    /// How the samples are arranged.
    pub fn kind(self) -> Kind {
        self.0.kind
    }

    /// Whether the samples are YUV (or Y alone).
    pub fn is_yuv(self) -> bool {
        !matches!(self.0.kind, Kind::Rgb { .. })
    }

    /// Number of colour planes.
    pub fn planes(self) -> usize {
        self.0.group.len()
    }

    /// Horizontal and vertical subsampling of the chroma, in pixels a sample.
    pub fn subsampling(self) -> (u32, u32) {
        (self.0.horizontal, self.0.vertical)
    }

    /// Bytes of `width` pixels in colour plane `plane`, without padding.
    pub fn row_bytes(self, plane: usize, width: u32) -> u32 {
        let Some(&group) = self.0.group.get(plane) else { return 0 };
        match self.0.kind {
            Kind::Packed422 { .. } => width.div_ceil(2).saturating_mul(4),
            _ if plane == 0 => width.saturating_mul(group),
            _ => width.div_ceil(self.0.horizontal).saturating_mul(group),
        }
    }

    /// Rows of colour plane `plane` in a picture of `height` rows.
    pub fn rows(self, plane: usize, height: u32) -> u32 {
        if plane == 0 { height } else { height.div_ceil(self.0.vertical) }
    }

    /// The stride of colour plane `plane` when several colour planes share one memory plane whose first stride is
    /// `stride` bytes (V4L2 documents it per format: "the chroma planes have half the stride", and so on).
    pub fn shared_stride(self, plane: usize, stride: u32) -> u32 {
        let (chroma, luma) = self.stride_ratio(plane);
        u32::try_from(u64::from(stride) * chroma / luma).unwrap_or(u32::MAX)
    }

    /// The inverse of [`Format::shared_stride`]: the least first stride with which colour plane `plane` has `stride` bytes.
    pub(super) fn first_stride(self, plane: usize, stride: u32) -> u32 {
        let (chroma, luma) = self.stride_ratio(plane);
        u32::try_from((u64::from(stride) * luma).div_ceil(chroma)).unwrap_or(u32::MAX)
    }

    /// Bytes of colour plane `plane` to bytes of the first, over the same pixels.
    fn stride_ratio(self, plane: usize) -> (u64, u64) {
        match (plane, self.0.group) {
            (1.., &[luma, ref chroma @ ..]) => {
                let chroma = chroma.get(plane - 1).copied().unwrap_or(1);
                (u64::from(chroma), u64::from(self.0.horizontal * luma))
            }
            _ => (1, 1),
        }
    }
}

impl PartialEq for Format {
    fn eq(&self, other: &Format) -> bool {
        std::ptr::eq(self.0, other.0)
    }
}

impl Eq for Format {}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.name().fmt(f)
    }
}

impl fmt::Debug for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Format({})", self.name())
    }
}

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
    Info { drm: Some(code(drm)), v4l2, kind: Kind::Rgb { channels, alpha }, horizontal: 1, vertical: 1, group }
}

const fn yuv(
    drm: &[u8; 4],
    v4l2: &'static [(Fourcc, u32)],
    kind: Kind,
    subsampling: (u32, u32),
    group: &'static [u32],
) -> Info {
    Info { drm: Some(code(drm)), v4l2, kind, horizontal: subsampling.0, vertical: subsampling.1, group }
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

const R8: Bits = bits(16, 8);
const G8: Bits = bits(8, 8);
const B8: Bits = bits(0, 8);

/// DRM names the word from its most significant bit (`drm_fourcc.h`), V4L2 the bytes in memory order for the 32-bit
/// formats ("Packed RGB Formats" of the V4L2 documentation): V4L2's BGR32 with alpha is DRM's ARGB8888, both `AR24`.
static TABLE: &[Info] = &[
    rgb(b"XR24", &[(code(b"XR24"), 1)], [R8, G8, B8], None, &[4]),
    rgb(b"AR24", &[(code(b"AR24"), 1)], [R8, G8, B8], Some(bits(24, 8)), &[4]),
    rgb(b"XB24", &[(code(b"XB24"), 1)], [B8, G8, R8], None, &[4]),
    rgb(b"AB24", &[(code(b"AB24"), 1)], [B8, G8, R8], Some(bits(24, 8)), &[4]),
    rgb(b"RX24", &[(code(b"RX24"), 1)], [bits(24, 8), bits(16, 8), bits(8, 8)], None, &[4]),
    rgb(b"RA24", &[(code(b"RA24"), 1)], [bits(24, 8), bits(16, 8), bits(8, 8)], Some(bits(0, 8)), &[4]),
    rgb(b"BX24", &[(code(b"BX24"), 1)], [bits(8, 8), bits(16, 8), bits(24, 8)], None, &[4]),
    rgb(b"BA24", &[(code(b"BA24"), 1)], [bits(8, 8), bits(16, 8), bits(24, 8)], Some(bits(0, 8)), &[4]),
    rgb(b"RG24", &[(code(b"BGR3"), 1)], [R8, G8, B8], None, &[3]),
    rgb(b"BG24", &[(code(b"RGB3"), 1)], [B8, G8, R8], None, &[3]),
    rgb(b"RG16", &[(code(b"RGBP"), 1)], [bits(11, 5), bits(5, 6), bits(0, 5)], None, &[2]),
    rgb(b"XR15", &[(code(b"XR15"), 1)], [bits(10, 5), bits(5, 5), bits(0, 5)], None, &[2]),
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
    Info { drm: None, v4l2: &[(code(b"GREY"), 1)], kind: Kind::Grey, horizontal: 1, vertical: 1, group: &[1] },
];

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn codes_are_unique_in_their_namespace() {
        let drm: Vec<_> = Format::all().filter_map(Format::drm).collect();
        assert_eq!(drm.iter().collect::<HashSet<_>>().len(), drm.len());
        let v4l2: Vec<_> = Format::all()
            .flat_map(|f| f.v4l2().collect::<Vec<_>>())
            .map(|(code, _)| code)
            .collect();
        assert_eq!(v4l2.iter().collect::<HashSet<_>>().len(), v4l2.len());
    }

    #[test]
    fn a_code_of_both_namespaces_is_one_format() {
        for format in Format::all() {
            let Some(drm) = format.drm() else { continue };
            if let Some((other, _)) = Format::from_v4l2(drm) {
                assert_eq!(format, other, "{drm} means two things");
            }
        }
    }

    #[test]
    fn names_of_people() {
        assert_eq!(Format::parse("xr24").unwrap().0.name().to_string(), "XR24");
        let (format, code) = Format::parse("NM12").unwrap();
        assert_eq!((format.name().to_string(), code.unwrap().to_string()), ("NV12".into(), "NM12".into()));
        assert_eq!(Format::parse("BGR3").unwrap().0.drm().unwrap().to_string(), "RG24");
        assert_eq!(Format::parse("nonsense"), None);
    }

    #[test]
    fn rows_of_the_documented_examples() {
        let nv12 = Format::parse("NV12").unwrap().0;
        assert_eq!((nv12.row_bytes(0, 641), nv12.row_bytes(1, 641), nv12.rows(1, 361)), (641, 642, 181));
        assert_eq!(nv12.shared_stride(1, 640), 640);
        let yu12 = Format::parse("YU12").unwrap().0;
        assert_eq!((yu12.row_bytes(2, 640), yu12.shared_stride(2, 704)), (320, 352));
        assert_eq!(Format::parse("NV24").unwrap().0.shared_stride(1, 640), 1280);
        assert_eq!(Format::parse("YUYV").unwrap().0.row_bytes(0, 3), 8);
        assert_eq!(Format::parse("P010").unwrap().0.shared_stride(1, 1280), 1280);
    }
}
