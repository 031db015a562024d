//! How YUV samples become RGB: encoding (the matrix) and range.

use std::fmt;

/// The matrix between YUV and RGB.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Encoding {
    /// ITU-R BT.601, standard definition.
    #[default]
    Bt601,
    /// ITU-R BT.709, high definition.
    Bt709,
    /// ITU-R BT.2020, ultra high definition, non-constant luminance.
    Bt2020,
}

/// The span of the sample values.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Range {
    /// Y from 16 to 235, U and V from 16 to 240 (scaled up for more than 8 bits). Hue from 0 to 179, in steps of two degrees.
    #[default]
    Limited,
    /// All values of the sample. Hue in 256 steps.
    Full,
}

/// What a buffer's numbers mean as colours. Only YUV formats need it, and HSV the range;
/// for RGB it is carried and not used.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Colour {
    /// The matrix between YUV and RGB.
    pub encoding: Encoding,
    /// The span of the sample values.
    pub range: Range,
}

impl Encoding {
    /// The weights of red and blue in luma: ITU-R BT.601-7 2.5.1, BT.709-6 3.2, BT.2020-2 table 4.
    pub(crate) fn weights(self) -> (f64, f64) {
        match self {
            Encoding::Bt601 => (0.299, 0.114),
            Encoding::Bt709 => (0.2126, 0.0722),
            Encoding::Bt2020 => (0.2627, 0.0593),
        }
    }
}

impl Range {
    /// Black, the step from black to white, the middle of chroma and the step across chroma, in samples of `bits` bits, 8 at least.
    pub(crate) fn levels(self, bits: u8) -> [f64; 4] {
        let unit = f64::from(1u32 << (bits - 8));
        match self {
            Range::Limited => [16.0 * unit, 219.0 * unit, 128.0 * unit, 224.0 * unit],
            Range::Full => [0.0, 256.0 * unit - 1.0, 128.0 * unit, 256.0 * unit - 1.0],
        }
    }
}

impl Colour {
    /// Resolves the four numbers of a `v4l2_pix_format` (`colorspace`, `ycbcr_enc`, `quantization`), whose zero
    /// means "the default of that colour space", as `V4L2_MAP_YCBCR_ENC_DEFAULT` and
    /// `V4L2_MAP_QUANTIZATION_DEFAULT` in `videodev2.h` do. An encoding that has no matrix here is taken as BT.601.
    pub fn from_v4l2(colorspace: u32, ycbcr_enc: u32, quantization: u32) -> Colour {
        const REC709: u32 = 3;
        const JPEG: u32 = 7;
        const BT2020: u32 = 10;
        const DCI_P3: u32 = 12;
        let encoding = match (ycbcr_enc, colorspace) {
            // V4L2_YCBCR_ENC_709, _XV709; the default of REC709 and DCI-P3.
            (2 | 4, _) | (0, REC709 | DCI_P3) => Encoding::Bt709,
            // V4L2_YCBCR_ENC_BT2020, _BT2020_CONST_LUM.
            (6 | 7, _) | (0, BT2020) => Encoding::Bt2020,
            _ => Encoding::Bt601,
        };
        let range = match (quantization, colorspace) {
            // V4L2_QUANTIZATION_FULL_RANGE, or the default of JPEG; the default of all others is limited for YUV.
            (1, _) | (0, JPEG) => Range::Full,
            _ => Range::Limited,
        };
        Colour { encoding, range }
    }

    /// The same for an HSV format, whose `ycbcr_enc` is an `hsv_enc`. One that is not stated is taken for 256 steps of hue, because that is
    /// what vivid gives then (`color_to_hsv` in `v4l2-tpg-core.c`, once an RGB format was set).
    pub fn from_v4l2_hsv(hsv_enc: u32) -> Colour {
        const STEPS_180: u32 = 128;
        let range = if hsv_enc == STEPS_180 { Range::Limited } else { Range::Full };
        Colour { range, ..Colour::default() }
    }
}

impl fmt::Display for Colour {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let encoding = match self.encoding {
            Encoding::Bt601 => "BT.601",
            Encoding::Bt709 => "BT.709",
            Encoding::Bt2020 => "BT.2020",
        };
        let range = match self.range {
            Range::Limited => "limited",
            Range::Full => "full",
        };
        write!(f, "{encoding} {range}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn v4l2_defaults_resolve_by_colour_space() {
        let srgb = Colour::from_v4l2(8, 0, 0);
        assert_eq!((srgb.encoding, srgb.range), (Encoding::Bt601, Range::Limited));
        assert_eq!(Colour::from_v4l2(3, 0, 0).encoding, Encoding::Bt709);
        assert_eq!(Colour::from_v4l2(7, 0, 0).range, Range::Full);
        assert_eq!(Colour::from_v4l2(7, 0, 2).range, Range::Limited);
        assert_eq!(Colour::from_v4l2(10, 0, 0).encoding, Encoding::Bt2020);
        assert_eq!(Colour::from_v4l2(8, 2, 1), Colour { encoding: Encoding::Bt709, range: Range::Full });
    }
}
