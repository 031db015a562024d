//! What a pixel format is: how its samples lie, and its codes in DRM and V4L2. Which there are: `known.rs`.

use std::fmt;

use super::Fourcc;
use super::known::TABLE;

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
    /// One word of 1 to 4 bytes a pixel, little-endian unless [`Format::is_big_endian`].
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
    /// Y alone, of more than 8 bits in two bytes, the value in the lower bits. Little-endian unless [`Format::is_big_endian`].
    DeepGrey {
        /// Bits of a sample: 10, 12 or 16.
        bits: u8,
    },
    /// One little-endian word of 2 or 4 bytes a pixel. Samples of fewer than 8 bits are the upper bits of ones of 8.
    YuvWord {
        /// Y, U and V.
        channels: [Bits; 3],
        /// Alpha, where the format has one.
        alpha: Option<Bits>,
    },
    /// Hue, saturation and value, a byte each, the first `before` bytes into the pixel.
    Hsv {
        /// Bytes before hue.
        before: u8,
    },
    /// What a sensor sees through its colour filters: one sample a pixel, of the colour that its place in a square of two by two pixels has.
    Bayer {
        /// Column and row of red in the square; blue is diagonally opposite, green in both other places.
        red: [u8; 2],
        /// Bits of a sample: 8 in one byte, or more in the lower bits of two, little-endian.
        bits: u8,
    },
}

/// One entry of the table.
pub(super) struct Info {
    pub(super) drm: Option<Fourcc>,
    /// The first with so many memory planes is the usual one, the others are other names for it.
    pub(super) v4l2: &'static [(Fourcc, u32)],
    pub(super) kind: Kind,
    pub(super) big_endian: bool,
    pub(super) horizontal: u32,
    pub(super) vertical: u32,
    /// Bytes, for each colour plane, of one group: `horizontal` pixels in a chroma plane, one pixel elsewhere.
    pub(super) group: &'static [u32],
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
    /// number of memory planes and comes back as the second value. Two codes mean different formats in the two worlds: V4L2's are
    /// called `v4l2:RG16` and `v4l2:BA12`.
    pub fn parse(text: &str) -> Option<(Format, Option<Fourcc>)> {
        let text = text.to_ascii_uppercase();
        if let Some(code) = text.strip_prefix("V4L2:") {
            let code = code.parse().ok()?;
            return Format::from_v4l2(code).map(|(format, _)| (format, Some(code)));
        }
        let code = text.parse().ok()?;
        if let Some(format) = Format::from_drm(code) {
            return Some((format, None));
        }
        Format::from_v4l2(code).map(|(format, _)| (format, Some(code)))
    }

    /// The DRM code, where DRM has one.
    pub fn drm(self) -> Option<Fourcc> {
        self.0.drm
    }

    /// The V4L2 codes with their numbers of memory planes, fewest first, the usual one before other names for the same.
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
        !matches!(self.0.kind, Kind::Rgb { .. } | Kind::Hsv { .. } | Kind::Bayer { .. })
    }

    /// Whether a word or a sample of several bytes has its highest first.
    pub fn is_big_endian(self) -> bool {
        self.0.big_endian
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
        let elsewhere = self.drm().is_none() && Format::from_drm(self.name()).is_some();
        if elsewhere { f.pad(&format!("v4l2:{}", self.name())) } else { self.name().fmt(f) }
    }
}

impl fmt::Debug for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Format({})", self.name())
    }
}

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
                // V4L2's are Bayer formats of 16 and 12 bits; they are told apart by their names.
                let twofold = ["RG16", "BA12"].contains(&drm.to_string().as_str());
                assert_eq!(format == other, !twofold, "{drm} means two things");
                assert_eq!(other.to_string() == format!("v4l2:{drm}"), twofold);
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
        let (bayer, code) = Format::parse("v4l2:RG16").unwrap();
        assert!(matches!(bayer.kind(), Kind::Bayer { red: [0, 0], bits: 16 }) && code.unwrap().to_string() == "RG16");
        assert!(matches!(Format::parse("RG16").unwrap().0.kind(), Kind::Rgb { .. }));
        for format in Format::all() {
            assert_eq!(Format::parse(&format.to_string()).unwrap().0, format);
        }
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
