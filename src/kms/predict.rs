//! What CRC vkms reports for a picture, computed from the picture's bytes.
//!
//! vkms composes each row of the mode in 16-bit channels and runs a CRC over it (`blend` in
//! `drivers/gpu/drm/vkms/vkms_composer.c`). So a display with a CRC tells what it showed, and this module what it had
//! to show: the two are equal only if every pixel arrived.
//!
//! The composition, for one plane that is not scaled, rotated or put through a lookup table:
//! - A pixel is four little-endian 16-bit numbers, alpha, red, green, blue (`struct pixel_argb_u16`). Rows start as
//!   opaque black.
//! - 8-bit channels are multiplied by 257, RGB565 and YUV go through 32.32 fixed point (`vkms_formats.c`,
//!   `include/drm/drm_fixed.h`); both are below.
//! - Blending is pre-multiplied. Over black that leaves the colour channels as they are, and the result is opaque: so
//!   alpha, and the X of XRGB, do not count (`pre_mul_blend_channel`).
//! - The CRC is `crc32_le` started at 0, not inverted at the end, row after row over the whole mode.

use std::fmt;
use std::ops::Range as Span;

use crc32fast::Hasher;

use crate::format::{Colour, Encoding, Format, Kind, Layout, Modifier, Range};

/// Bytes of one composed pixel.
const PIXEL: usize = 8;

/// Opaque black, composed.
const BLACK: [u8; PIXEL] = [0xff, 0xff, 0, 0, 0, 0, 0, 0];

/// A vkms whose arithmetic was read. They compute alike what both can show; the later shows more.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Flavour {
    /// Linux 6.12: XR24, AR24 and RG16.
    V6_12,
    /// Later ones, as of 7.2: 24-bit and other byte orders, and YUV.
    V7_2,
}

impl Flavour {
    /// The flavour of the kernel with this release (`uname -r`).
    ///
    /// Read in full were 6.12.117 and 7.2.12. Between them vkms gained formats, a background colour and colour
    /// pipelines (both off unless set), and formats that a kernel does not have it does not show: so all from 6.13 to
    /// 7.2 count as the later. `None` for older ones, where the rounding of RGB565 was repaired at some point, and for
    /// newer ones, that nobody has read yet.
    pub(crate) fn from_release(release: &str) -> Option<Flavour> {
        let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
        match (numbers.next()?.ok()?, numbers.next()?.ok()?) {
            (6, 12) => Some(Flavour::V6_12),
            (6, 13..) | (7, 0..=2) => Some(Flavour::V7_2),
            _ => None,
        }
    }
}

impl fmt::Display for Flavour {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Flavour::V6_12 => "vkms of Linux 6.12",
            Flavour::V7_2 => "vkms of Linux 7.2",
        })
    }
}

/// Why there is no prediction.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Unpredictable {
    /// A format that vkms does not show.
    #[error("{flavour} does not show {format}")]
    Format {
        /// The format.
        format: Format,
        /// Who was asked.
        flavour: Flavour,
    },
    /// A tiling: vkms reads rows.
    #[error("vkms reads linear buffers, not {0}")]
    Modifier(Modifier),
    /// A mode that cannot be (vkms has none above 8192 pixels).
    #[error("vkms has no mode of {0}x{1}")]
    Mode(u32, u32),
}

/// Predicts the CRC of one picture after the other, all of one layout at one place on one mode.
///
/// It predicts what a vkms that reads every plane where the layout says would report. Up to 7.2 the real one takes the
/// address of *all* planes from the first memory plane, and adds that plane's offset twice (`packed_pixels_addr` over
/// `drm_gem_fb_vmap`'s data pointers): with several memory planes, or a first offset that is not 0, it shows another
/// picture than it was given, and the CRC says so.
///
/// YUV is taken as the layout's [`Colour`] says. The plane must be told: vkms's own default is BT.601, full range
/// (`COLOR_ENCODING` and `COLOR_RANGE`). Gamma, background colour and colour pipeline must be as vkms starts: none.
pub(crate) struct Predictor {
    format: Format,
    /// Rows of the picture that the mode shows.
    rows: Span<u32>,
    /// The state of the CRC before the first of them.
    above: Hasher,
    /// The CRC of all rows after the last of them, as a run of its own.
    below: Hasher,
    /// A composed row of mode and picture together, wherever one sticks out of the other.
    line: Vec<u8>,
    /// The bytes of `line` that the picture fills, and those that the mode has.
    picture: Span<usize>,
    mode: Span<usize>,
    /// A row of plane 0.
    first: Vec<u8>,
    /// A row each of the chroma planes, the second empty if there is but one.
    chroma: [Vec<u8>; 2],
    reader: Reader,
}

/// How a row becomes composed pixels.
enum Reader {
    Bytes(fn(&[u8], &mut [u8])),
    Rgb565(Rgb565),
    Yuv(Box<Yuv>),
}

impl Predictor {
    /// A predictor for pictures of `layout` whose upper left corner is at `at` on a mode of `mode` pixels.
    ///
    /// # Errors
    /// [`Unpredictable`] for a format that this vkms does not show, a tiling, or an empty or too large mode.
    pub(crate) fn new(
        flavour: Flavour,
        mode: (u32, u32),
        layout: &Layout,
        at: (i32, i32),
    ) -> Result<Predictor, Unpredictable> {
        let format = layout.format();
        let reader = Reader::of(flavour, format, layout).ok_or(Unpredictable::Format { format, flavour })?;
        if let Some(modifier) = layout.modifier().filter(|&modifier| modifier != Modifier::LINEAR) {
            return Err(Unpredictable::Modifier(modifier));
        }
        if !(1..=8192).contains(&mode.0) || !(1..=8192).contains(&mode.1) {
            return Err(Unpredictable::Mode(mode.0, mode.1));
        }
        let (left, columns) = overlap(mode.0, at.0, layout.width());
        let (top, mut rows) = overlap(mode.1, at.1, layout.height());
        // Beside the mode: nothing is shown, and the picture needs no room.
        let width = if columns.is_empty() { 0 } else { layout.width() as usize };
        if width == 0 {
            rows = 0..0;
        }
        let before = columns.start as usize;
        let mode_width = mode.0 as usize;
        let line = BLACK.repeat((before + mode_width).max(left as usize + width));
        let bytes = |start: usize, len: usize| start * PIXEL..(start + len) * PIXEL;

        // The kernel's `crc32_le(0, …)` inverts nothing. Started at all ones, the hasher inverts that to 0; `crc` takes
        // back what it does at the end.
        let mut above = Hasher::new_with_initial(u32::MAX);
        let mut below = Hasher::new();
        let background = &BLACK.repeat(mode_width);
        let shown = rows.end - rows.start;
        let first = if shown == 0 { 0 } else { top };
        (0..first).for_each(|_| above.update(background));
        (first + shown..mode.1).for_each(|_| below.update(background));

        let row = |plane| vec![0; format.row_bytes(plane, layout.width()) as usize];
        Ok(Predictor {
            format,
            rows,
            above,
            below,
            line,
            picture: bytes(left as usize, width),
            mode: bytes(before, mode_width),
            first: row(0),
            chroma: [row(1), row(2)],
            reader,
        })
    }

    /// The CRC that vkms reports when it shows the picture whose rows `read` gives: `read(plane, row, out)` copies row
    /// `row` of colour plane `plane` into `out`, which is just as long as the pixels of that row. Each row is read
    /// once, from the top; rows outside the mode are not read.
    pub(crate) fn crc(&mut self, read: &mut dyn FnMut(usize, u32, &mut [u8])) -> u32 {
        let (_, vertical) = self.format.subsampling();
        let planes = self.format.planes();
        let mut sum = self.above.clone();
        let mut chroma_row = None;
        for row in self.rows.clone() {
            read(0, row, &mut self.first);
            if planes > 1 && chroma_row != Some(row / vertical) {
                chroma_row = Some(row / vertical);
                for (plane, bytes) in (1..planes).zip(&mut self.chroma) {
                    read(plane, row / vertical, bytes);
                }
                if let Reader::Yuv(yuv) = &mut self.reader {
                    yuv.chroma(&self.chroma);
                }
            }
            let out = &mut self.line[self.picture.clone()];
            match &self.reader {
                Reader::Bytes(convert) => convert(&self.first, out),
                Reader::Rgb565(table) => table.convert(&self.first, out),
                Reader::Yuv(yuv) => yuv.convert(&self.first, out),
            }
            sum.update(&self.line[self.mode.clone()]);
        }
        sum.combine(&self.below);
        !sum.finalize()
    }
}

impl Reader {
    fn of(flavour: Flavour, format: Format, layout: &Layout) -> Option<Reader> {
        let name = format.drm()?.to_string();
        // `vkms_formats` in `vkms_plane.c`, those of them that dmaflow has.
        let shown = match flavour {
            Flavour::V6_12 => matches!(name.as_str(), "XR24" | "AR24" | "RG16"),
            Flavour::V7_2 => matches!(format.kind(), Kind::Rgb { .. } | Kind::SemiPlanar { .. } | Kind::Planar { .. }),
        };
        if !shown {
            return None;
        }
        Some(match name.as_str() {
            // By the place of red, green and blue among the bytes of a pixel.
            "XR24" | "AR24" => Reader::Bytes(spread::<4, 2, 1, 0>),
            "XB24" | "AB24" => Reader::Bytes(spread::<4, 0, 1, 2>),
            "RA24" => Reader::Bytes(spread::<4, 3, 2, 1>),
            "BA24" => Reader::Bytes(spread::<4, 1, 2, 3>),
            "RG24" => Reader::Bytes(spread::<3, 2, 1, 0>),
            "BG24" => Reader::Bytes(spread::<3, 0, 1, 2>),
            "RG16" => Reader::Rgb565(Rgb565::new()),
            _ if format.is_yuv() => Reader::Yuv(Box::new(Yuv::new(format, layout.width(), layout.colour()))),
            _ => return None,
        })
    }
}

/// Where a picture of `len` at `at` and a mode of `mode` meet: the place on the mode where the picture starts, 0 if
/// that is before it, and the pixels of the picture that the mode shows.
fn overlap(mode: u32, at: i32, len: u32) -> (u32, Span<u32>) {
    let place = u32::try_from(at).unwrap_or(0);
    let start = at.min(0).unsigned_abs();
    let end = len.min(start.saturating_add(mode.saturating_sub(place)));
    if start < end { (place, start..end) } else { (0, 0..0) }
}

/// 8-bit channels at bytes `R`, `G`, `B` of pixels of `N` bytes, times 257: each byte twice (`argb_u16_from_u8888`).
fn spread<const N: usize, const R: usize, const G: usize, const B: usize>(row: &[u8], out: &mut [u8]) {
    for (pixel, out) in row.chunks_exact(N).zip(out.chunks_exact_mut(PIXEL)) {
        let (r, g, b) = (pixel[R], pixel[G], pixel[B]);
        out.copy_from_slice(&[0xff, 0xff, r, r, g, g, b, b]);
    }
}

/// The 16-bit value of each 5-bit and 6-bit one.
struct Rgb565 {
    five: [u16; 32],
    six: [u16; 64],
}

impl Rgb565 {
    /// As `argb_u16_from_RGB565`: the ratio of the largest values, rounded down to 32.32, times the value, rounded to
    /// the nearest.
    fn new() -> Rgb565 {
        let scaled = |value: usize, top: i64| to_u16(mul((value as i64) << 32, (0xffff << 32) / top) + HALF);
        Rgb565 { five: std::array::from_fn(|i| scaled(i, 31)), six: std::array::from_fn(|i| scaled(i, 63)) }
    }

    fn convert(&self, row: &[u8], out: &mut [u8]) {
        for (pixel, out) in row.chunks_exact(2).zip(out.chunks_exact_mut(PIXEL)) {
            let word = usize::from(u16::from_le_bytes([pixel[0], pixel[1]]));
            let (r, g, b) = (self.five[word >> 11], self.six[word >> 5 & 0x3f], self.five[word & 0x1f]);
            put(out, [r, g, b]);
        }
    }
}

/// YUV of any arrangement. vkms multiplies each sample by up to three factors of 32.32 fixed point, adds up, rounds
/// and clamps (`argb_u16_from_yuv161616`). A product depends on one sample: those of 8-bit samples come from tables,
/// and those of chroma are added up once for all pixels that share it. Chroma is the nearest, without interpolation:
/// pixel x has sample x / 2 where it is halved, and row y has row y / 2.
struct Yuv {
    matrix: Matrix,
    wide: bool,
    /// How many pixels share a chroma sample in a row.
    shared: u32,
    /// Which chroma slice, at which distance, has U and V: (slice, first, step).
    u: (usize, usize, usize),
    v: (usize, usize, usize),
    /// For the 8-bit formats, the products of all values: of Y, and of U and V for what they go into.
    luma: Vec<i64>,
    u_terms: Vec<[i64; 2]>,
    v_terms: Vec<[i64; 2]>,
    /// What each chroma sample of the present row adds to red, green and blue, and the half that rounding wants.
    added: Vec<[i64; 3]>,
}

impl Yuv {
    fn new(format: Format, width: u32, colour: Colour) -> Yuv {
        let matrix = Matrix::of(colour);
        let (horizontal, _) = format.subsampling();
        let (wide, u, v) = match format.kind() {
            Kind::SemiPlanar { swapped: false, sample } => (sample == 2, (0, 0, 2), (0, 1, 2)),
            Kind::SemiPlanar { swapped: true, sample } => (sample == 2, (0, 1, 2), (0, 0, 2)),
            Kind::Planar { swapped: true } => (false, (1, 0, 1), (0, 0, 1)),
            _ => (false, (0, 0, 1), (1, 0, 1)),
        };
        // The table's index times 257 is the sample in 16 bits. 16-bit formats need no table.
        let values = || (0..if wide { 0 } else { 256u16 }).map(|value| value * 257);
        Yuv {
            wide,
            shared: horizontal,
            u,
            v,
            luma: values().map(|value| matrix.luma(value)).collect(),
            u_terms: values().map(|value| matrix.u(value)).collect(),
            v_terms: values().map(|value| matrix.v(value)).collect(),
            added: vec![[0; 3]; width.div_ceil(horizontal) as usize],
            matrix,
        }
    }

    /// Takes the chroma rows in.
    fn chroma(&mut self, rows: &[Vec<u8>; 2]) {
        let samples = |(slice, first, step): (usize, usize, usize), bytes: usize| {
            rows[slice].chunks_exact(bytes).skip(first).step_by(step)
        };
        let bytes = if self.wide { 2 } else { 1 };
        for ((added, u), v) in self.added.iter_mut().zip(samples(self.u, bytes)).zip(samples(self.v, bytes)) {
            let ([u_g, u_b], [v_r, v_g]) = match (u, v) {
                (&[u], &[v]) => (self.u_terms[usize::from(u)], self.v_terms[usize::from(v)]),
                (&[u0, u1], &[v0, v1]) => {
                    (self.matrix.u(u16::from_le_bytes([u0, u1])), self.matrix.v(u16::from_le_bytes([v0, v1])))
                }
                _ => continue,
            };
            *added = [v_r + HALF, u_g + v_g + HALF, u_b + HALF];
        }
    }

    /// Composes a row of Y, with the chroma row last taken in.
    fn convert(&self, row: &[u8], out: &mut [u8]) {
        let table = <&[i64; 256]>::try_from(self.luma.as_slice());
        match (self.shared, table) {
            (1, Ok(table)) => self.join::<1, 1>(row, out, |y| table[usize::from(y[0])]),
            (_, Ok(table)) => self.join::<1, 2>(row, out, |y| table[usize::from(y[0])]),
            _ => self.join::<2, 2>(row, out, |y| self.matrix.luma(u16::from_le_bytes([y[0], y[1]]))),
        }
    }

    /// The same for samples of `BYTES` bytes, `SHARED` of which have one chroma sample.
    fn join<const BYTES: usize, const SHARED: usize>(&self, row: &[u8], out: &mut [u8], luma: impl Fn(&[u8]) -> i64) {
        let groups = row.chunks(BYTES * SHARED).zip(out.chunks_mut(PIXEL * SHARED));
        for ((samples, out), added) in groups.zip(&self.added) {
            for (sample, out) in samples.chunks_exact(BYTES).zip(out.chunks_exact_mut(PIXEL)) {
                let luma = luma(sample);
                put(out, added.map(|added| to_u16(luma + added)));
            }
        }
    }
}

/// From YUV to RGB in 32.32 fixed point: `get_conversion_matrix_to_argb_u16`. Y has the same factor everywhere, U none
/// for red and V none for blue.
#[derive(Clone, Copy)]
struct Matrix {
    y: i64,
    v_r: i64,
    u_g: i64,
    v_g: i64,
    u_b: i64,
    /// The value of Y that is black, in 8 bits.
    black: i64,
}

impl Matrix {
    /// The kernel's numbers, which are those of the ITU's recommendations times 2^32.
    fn of(colour: Colour) -> Matrix {
        let full = |v_r, u_g, v_g, u_b| Matrix { y: 4_294_967_296, v_r, u_g, v_g, u_b, black: 0 };
        let limited = |v_r, u_g, v_g, u_b| Matrix { y: 5_020_601_039, v_r, u_g, v_g, u_b, black: 16 };
        match (colour.encoding, colour.range) {
            (Encoding::Bt601, Range::Full) => full(6_021_544_149, -1_478_054_095, -3_067_191_994, 7_610_682_049),
            (Encoding::Bt601, Range::Limited) => limited(6_881_764_740, -1_689_204_679, -3_505_362_278, 8_697_922_339),
            (Encoding::Bt709, Range::Full) => full(6_763_714_498, -804_551_626, -2_010_578_443, 7_969_741_314),
            (Encoding::Bt709, Range::Limited) => limited(7_729_959_424, -919_487_572, -2_297_803_934, 9_108_275_786),
            (Encoding::Bt2020, Range::Full) => full(6_333_358_775, -706_750_298, -2_453_942_994, 8_080_551_471),
            (Encoding::Bt2020, Range::Limited) => limited(7_238_124_312, -807_714_626, -2_804_506_279, 9_234_915_964),
        }
    }

    fn luma(&self, y: u16) -> i64 {
        mul(self.y, (i64::from(y) - self.black * 257) << 32)
    }

    /// What U adds to green and blue.
    fn u(&self, u: u16) -> [i64; 2] {
        let value = (i64::from(u) - 128 * 257) << 32;
        [mul(self.u_g, value), mul(self.u_b, value)]
    }

    /// What V adds to red and green.
    fn v(&self, v: u16) -> [i64; 2] {
        let value = (i64::from(v) - 128 * 257) << 32;
        [mul(self.v_r, value), mul(self.v_g, value)]
    }
}

/// The product of two 32.32 numbers as `drm_fixp_mul` has it: where 63 bits would not hold it, both factors first lose
/// as many low bits as that takes, the first the odd one.
fn mul(a: i64, b: i64) -> i64 {
    let excess = (top_bit(a) + top_bit(b)).saturating_sub(61);
    let product = (a >> excess.div_ceil(2)).wrapping_mul(b >> (excess / 2));
    if excess > 32 { product << (excess - 32) } else { product >> (32 - excess) }
}

/// The highest bit that is not the sign; 0 if there is none (`drm_fixp_msbset`).
fn top_bit(value: i64) -> u32 {
    (value ^ value >> 63).checked_ilog2().unwrap_or(0)
}

/// One half in 32.32.
const HALF: i64 = 1 << 31;

/// The whole part of a 32.32 number, kept in 16 bits. With [`HALF`] added before, that is rounding to the nearest
/// (`drm_fixp2int_round`, `clamp`).
fn to_u16(value: i64) -> u16 {
    // The kernel, too, has the whole part in an `int`; after the clamp nothing is cut.
    ((value >> 32) as i32).clamp(0, 0xffff) as u16
}

fn put(out: &mut [u8], [r, g, b]: [u16; 3]) {
    let pixel = 0xffff | u64::from(r) << 16 | u64::from(g) << 32 | u64::from(b) << 48;
    out.copy_from_slice(&pixel.to_le_bytes());
}

#[cfg(test)]
mod tests;
