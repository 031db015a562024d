//! The picture that a stack of planes makes: the composition model of KMS (`drm_blend.c`, "overview"), on the CPU. For
//! pictures that people look at, not for speed.

use std::ops::Range as Span;

use crate::error::Result;
use crate::format::{MAX_PLANES, Pixels, Raw, Rgb};
use crate::frame::Buffer;
use drm_ffi::{DRM_MODE_REFLECT_X, DRM_MODE_REFLECT_Y, DRM_MODE_ROTATE_90, DRM_MODE_ROTATE_180, DRM_MODE_ROTATE_270};

/// What the alpha of a pixel does: the values of the property "pixel blend mode".
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::kms) enum Blend {
    /// Nothing.
    Ignore,
    /// Its colour is multiplied by it already.
    Premultiplied,
    /// Its colour is not.
    Coverage,
}

/// What one plane shows, and where.
#[derive(Clone, Debug)]
pub(in crate::kms) struct Layer {
    /// The picture in memory.
    pub buffer: Buffer,
    /// The part of it that is shown: left, top, width and height in 65536ths of a pixel.
    pub source: [u32; 4],
    /// Where its upper left corner is on the screen.
    pub at: (i32, i32),
    /// How large it is there.
    pub size: (u32, u32),
    /// `DRM_MODE_ROTATE_*` and `DRM_MODE_REFLECT_*`.
    pub rotation: u32,
    /// How opaque all of it is, out of 65535.
    pub alpha: u16,
    /// What the alpha of its pixels does.
    pub blend: Blend,
}

/// Whole pixels of a buffer, decoded: the least that hold the part which is shown.
struct Part {
    left: u32,
    top: u32,
    width: u32,
    height: u32,
    /// Red, green, blue, alpha, row after row.
    pixels: Vec<[u8; 4]>,
}

impl Layer {
    /// All of a buffer as it is, in the upper left corner, its alpha ignored.
    pub(in crate::kms) fn whole(buffer: Buffer) -> Layer {
        let (width, height) = buffer.layout().size();
        Layer {
            buffer,
            source: [0, 0, width.saturating_mul(1 << 16), height.saturating_mul(1 << 16)],
            at: (0, 0),
            size: (width, height),
            rotation: 0,
            alpha: u16::MAX,
            blend: Blend::Ignore,
        }
    }

    /// Whether pixels of the buffer are not pixels of the screen, so that the display's filter decides what is seen.
    pub(in crate::kms) fn is_scaled(&self) -> bool {
        let [left, top, width, height] = self.source;
        let (width, height) = if self.is_turned() { (height, width) } else { (width, height) };
        (left | top | width | height) & 0xffff != 0 || (width >> 16, height >> 16) != self.size
    }

    /// Whether rows of the buffer are columns of the screen.
    fn is_turned(&self) -> bool {
        self.rotation & (DRM_MODE_ROTATE_90 | DRM_MODE_ROTATE_270) != 0
    }

    /// Reads the part that is shown.
    fn part(&self) -> Result<Part> {
        let layout = self.buffer.layout();
        let format = layout.format();
        let [x, y, w, h] = self.source;
        let whole = |start: u32, len: u32, limit: u32| {
            let end = (u64::from(start) + u64::from(len)).div_ceil(1 << 16).min(u64::from(limit));
            let start = (start >> 16).min(limit);
            // Below `limit`, so that nothing is cut.
            (start, (end as u32).saturating_sub(start))
        };
        let (left, width) = whole(x, w, layout.width());
        let (top, height) = whole(y, h, layout.height());
        let mut pixels = Vec::with_capacity(width as usize * height as usize);
        let reader = self.buffer.read()?;
        let mut rows: [Vec<u8>; MAX_PLANES] = Default::default();
        for (plane, row) in rows.iter_mut().enumerate().take(format.planes()) {
            row.resize(format.row_bytes(plane, layout.width()) as usize, 0);
        }
        for y in top..top + height {
            for (plane, row) in rows.iter_mut().enumerate().take(format.planes()) {
                let vertical = if plane == 0 { 1 } else { format.subsampling().1 };
                reader.row(plane, y / vertical, row);
            }
            let row = Pixels::new(format, &rows.each_ref().map(|row| row.as_slice()));
            let mut colour = row.colours(layout.colour());
            pixels.extend((left..left + width).map(|x| {
                let Rgb { r, g, b } = colour(x);
                [r, g, b, alpha_of(row.raw(x))]
            }));
        }
        Ok(Part { left, top, width, height, pixels })
    }

    /// For each of these columns and rows of the plane as it is on the screen, how far from the part's first pixel its
    /// pixel is: the sum of both is the pixel's index. The nearest pixel is taken.
    fn steps(&self, part: &Part, columns: Span<u32>, rows: Span<u32>) -> (Vec<usize>, Vec<usize>) {
        let [x, y, w, h] = self.source;
        // Reflection comes before rotation, and rotation is counter-clockwise (drm_rect_rotate): so turned by 90
        // degrees the first row of the screen is the last column of the buffer.
        let turn = |bits: u32| self.rotation & bits != 0;
        let back_x = turn(DRM_MODE_ROTATE_90 | DRM_MODE_ROTATE_180) != turn(DRM_MODE_REFLECT_X);
        let back_y = turn(DRM_MODE_ROTATE_180 | DRM_MODE_ROTATE_270) != turn(DRM_MODE_REFLECT_Y);
        let index = |place: u32, count: u32, back: bool, start: u32, len: u32, first: u32, limit: u32| {
            // The middle of a pixel of the screen, as a fraction of all of them.
            let (middle, all) = (2 * u64::from(place) + 1, 2 * u64::from(count));
            let middle = if back { all - middle } else { middle };
            let at = (u64::from(start) + u64::from(len) * middle / all) >> 16;
            at.saturating_sub(u64::from(first)).min(u64::from(limit.saturating_sub(1))) as usize
        };
        let along_x = |place, count| index(place, count, back_x, x, w, part.left, part.width);
        let along_y = |place, count| index(place, count, back_y, y, h, part.top, part.height) * part.width as usize;
        let (width, height) = self.size;
        if self.is_turned() {
            (columns.map(|c| along_y(c, width)).collect(), rows.map(|r| along_x(r, height)).collect())
        } else {
            (columns.map(|c| along_x(c, width)).collect(), rows.map(|r| along_y(r, height)).collect())
        }
    }

    /// Lays the plane over a picture of `size`.
    fn draw(&self, (width, height): (u32, u32), picture: &mut [u8]) -> Result<()> {
        let (left, columns) = meet(self.at.0, self.size.0, width);
        let (top, rows) = meet(self.at.1, self.size.1, height);
        if columns.is_empty() || rows.is_empty() || self.alpha == 0 {
            return Ok(());
        }
        let part = self.part()?;
        let (across, down) = self.steps(&part, columns, rows);
        let lines = picture.chunks_exact_mut(3 * width as usize).skip(top as usize);
        for (line, down) in lines.zip(down) {
            for (under, across) in line.chunks_exact_mut(3).skip(left as usize).zip(&across) {
                if let Some(&[r, g, b, alpha]) = part.pixels.get(across + down) {
                    for (under, over) in under.iter_mut().zip([r, g, b]) {
                        *under = self.mix(*under, over, alpha);
                    }
                }
            }
        }
        Ok(())
    }

    /// The formulas of "pixel blend mode" in `drm_blend.c`, rounded to the nearest.
    fn mix(&self, under: u8, over: u8, alpha: u8) -> u8 {
        const ONE: u64 = 255 * 65535;
        let (pixel, plane) = (u64::from(alpha), u64::from(self.alpha));
        let (shown, covered) = match self.blend {
            Blend::Ignore => (plane * 255, plane * 255),
            Blend::Premultiplied => (plane * 255, plane * pixel),
            Blend::Coverage => (plane * pixel, plane * pixel),
        };
        let sum = u64::from(over) * shown + u64::from(under) * (ONE - covered);
        // A colour that is brighter than its alpha allows is no pre-multiplied one: it is cut at white.
        ((sum + ONE / 2) / ONE).min(255) as u8
    }
}

/// Alpha out of 255; opaque where the format has none.
fn alpha_of(pixel: Raw) -> u8 {
    match pixel {
        Raw::Rgb { alpha: Some((value, bits)), .. } => {
            let top = (1u32 << bits) - 1;
            ((u32::from(value) * 255 + top / 2) / top) as u8
        }
        _ => u8::MAX,
    }
}

/// Where a plane of `len` pixels at `at` and a screen of `limit` pixels meet: the first pixel of the screen, and
/// which of the plane's.
fn meet(at: i32, len: u32, limit: u32) -> (u32, Span<u32>) {
    let place = u32::try_from(at).unwrap_or(0);
    let start = at.min(0).unsigned_abs();
    let end = len.min(start.saturating_add(limit.saturating_sub(place)));
    (place, start..end)
}

/// Lays planes, the lowest first, over one colour: 3 bytes a pixel, row after row.
///
/// # Errors
/// If a buffer cannot be read by the CPU.
pub(in crate::kms) fn compose(size: (u32, u32), background: Rgb, layers: &[Layer]) -> Result<Vec<u8>> {
    let pixels = size.0 as usize * size.1 as usize;
    let mut picture = [background.r, background.g, background.b].repeat(pixels);
    layers.iter().try_for_each(|layer| layer.draw(size, &mut picture))?;
    Ok(picture)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{Colour, Format, Layout, PixelsMut};
    use crate::memory::{Access, Allocator};

    const BLACK: Rgb = Rgb::new(0, 0, 0);

    /// A picture of letters, each a colour; its rows are apart by more than their bytes.
    fn picture(format: &str, rows: &[&str]) -> Buffer {
        let format = Format::parse(format).unwrap().0;
        let size = (rows[0].len() as u32, rows.len() as u32);
        let layout = Layout::packed(format, size, 64).unwrap();
        let len = layout.memory_len(0);
        let buffer = Buffer::new(layout, vec![Allocator::Plain.allocate(len).unwrap()], &[len]).unwrap();
        let mut bytes = vec![0; len];
        for (y, row) in rows.iter().enumerate() {
            let mut memory = [&mut bytes[..]];
            let mut pixels = PixelsMut::at(&layout, &mut memory, y as u32);
            (0..)
                .zip(row.bytes())
                .for_each(|(x, letter)| pixels.set(x, colour(letter), Colour::default()));
        }
        buffer.map(Access::ReadWrite).unwrap()[0].write(0, &bytes);
        buffer
    }

    fn colour(letter: u8) -> Rgb {
        if letter == b'.' { BLACK } else { Rgb::new(letter, letter, letter) }
    }

    /// One pixel of a format with alpha.
    fn glass(alpha: u8, value: u8) -> Layer {
        let buffer = picture("AR24", &["a"]);
        buffer.map(Access::ReadWrite).unwrap()[0].write(0, &[value, value, value, alpha]);
        Layer { blend: Blend::Premultiplied, ..Layer::whole(buffer) }
    }

    fn shows(size: (u32, u32), layers: &[Layer]) -> Vec<String> {
        let bytes = compose(size, BLACK, layers).unwrap();
        let letter = |pixel: &[u8]| if pixel[0] == 0 { '.' } else { char::from(pixel[0]) };
        bytes
            .chunks(3 * size.0 as usize)
            .map(|row| row.chunks(3).map(letter).collect())
            .collect()
    }

    #[test]
    fn planes_cover_each_other_in_order_and_black_is_below() {
        let low = Layer { at: (1, 1), ..Layer::whole(picture("XR24", &["aaa", "aaa"])) };
        let high = Layer { at: (3, 2), ..Layer::whole(picture("RG24", &["bb"])) };
        assert_eq!(shows((5, 4), &[low.clone(), high.clone()]), [".....", ".aaa.", ".aabb", "....."]);
        assert_eq!(shows((5, 4), &[high, low]), [".....", ".aaa.", ".aaab", "....."]);
        assert_eq!(compose((1, 1), Rgb::new(1, 2, 3), &[]).unwrap(), [1, 2, 3]);
    }

    #[test]
    fn what_is_outside_is_cut() {
        let plane = |x, y| Layer { at: (x, y), ..Layer::whole(picture("XR24", &["abc", "def", "ghi"])) };
        assert_eq!(shows((3, 3), &[plane(-1, -2)]), ["hi.", "...", "..."]);
        assert_eq!(shows((3, 3), &[plane(2, 1)]), ["...", "..a", "..d"]);
        assert_eq!(shows((2, 1), &[plane(-1, -1)]), ["ef"]);
        for (x, y) in [(3, 0), (0, 3), (-3, 0), (0, i32::MIN), (i32::MAX, i32::MAX)] {
            assert_eq!(shows((3, 3), &[plane(x, y)]), ["...", "...", "..."]);
        }
    }

    #[test]
    fn a_part_of_the_buffer_is_shown_and_scaled_to_the_nearest() {
        let whole = Layer::whole(picture("XR24", &["abcd", "efgh", "ijkl"]));
        let part = Layer { source: [1 << 16, 1 << 16, 2 << 16, 2 << 16], size: (2, 2), ..whole.clone() };
        assert_eq!(shows((3, 2), std::slice::from_ref(&part)), ["fg.", "jk."]);
        assert!(!part.is_scaled() && !whole.is_scaled());
        let large = Layer { size: (4, 2), ..part.clone() };
        assert_eq!(shows((4, 2), std::slice::from_ref(&large)), ["ffgg", "jjkk"]);
        assert!(large.is_scaled());
        let small = Layer { size: (2, 1), ..whole.clone() };
        assert_eq!(shows((2, 1), &[small]), ["fh"]);
        let beyond = Layer { source: [3 << 16, 2 << 16, 9 << 16, 9 << 16], size: (2, 1), ..whole };
        assert_eq!(shows((2, 1), &[beyond]), ["ll"]);
    }

    #[test]
    fn turned_counter_clockwise_after_mirroring() {
        let turned = |rotation, size| {
            let layer = Layer { rotation, size, ..Layer::whole(picture("XR24", &["abc", "def"])) };
            assert!(!layer.is_scaled());
            shows(size, &[layer])
        };
        assert_eq!(turned(DRM_MODE_ROTATE_90, (2, 3)), ["cf", "be", "ad"]);
        assert_eq!(turned(DRM_MODE_ROTATE_180, (3, 2)), ["fed", "cba"]);
        assert_eq!(turned(DRM_MODE_ROTATE_270, (2, 3)), ["da", "eb", "fc"]);
        assert_eq!(turned(DRM_MODE_REFLECT_X, (3, 2)), ["cba", "fed"]);
        assert_eq!(turned(DRM_MODE_REFLECT_Y, (3, 2)), ["def", "abc"]);
        assert_eq!(turned(DRM_MODE_REFLECT_X | DRM_MODE_ROTATE_90, (2, 3)), ["ad", "be", "cf"]);
        assert_eq!(turned(DRM_MODE_REFLECT_X | DRM_MODE_REFLECT_Y, (3, 2)), ["fed", "cba"]);
    }

    #[test]
    fn alpha_of_pixels_and_planes() {
        let below = Layer::whole(picture("XR24", &["d"]));
        let mixed = |layer: Layer| compose((1, 1), BLACK, &[below.clone(), layer]).unwrap()[0];
        let (half, all) = (32768, u16::MAX);
        // 'd' is 100.
        assert_eq!(mixed(glass(0, 0)), 100);
        assert_eq!(mixed(glass(255, 20)), 20);
        assert_eq!(mixed(glass(51, 20)), 20 + 80);
        assert_eq!(mixed(Layer { blend: Blend::Coverage, ..glass(51, 20) }), 4 + 80);
        assert_eq!(mixed(Layer { blend: Blend::Ignore, ..glass(51, 20) }), 20);
        assert_eq!(mixed(Layer { alpha: half, ..glass(255, 20) }), 60);
        assert_eq!(mixed(Layer { alpha: half, blend: Blend::Ignore, ..glass(0, 20) }), 60);
        assert_eq!(mixed(Layer { alpha: half, blend: Blend::Coverage, ..glass(51, 20) }), 92);
        assert_eq!(mixed(Layer { alpha: 0, ..glass(255, 20) }), 100);
        assert_eq!(mixed(Layer { alpha: all, ..glass(0, 250) }), 255);
        // The X of XRGB is no alpha.
        let opaque = Layer { blend: Blend::Premultiplied, ..Layer::whole(picture("XR24", &["."])) };
        assert_eq!(mixed(opaque), 0);
    }

    #[test]
    fn yuv_rows_share_their_chroma() {
        let rows = ["abcd", "efgh", "ijkl", "mnop"];
        let near: Vec<_> = compose((4, 4), BLACK, &[Layer::whole(picture("NV12", &rows))]).unwrap();
        let letters = rows.concat().into_bytes();
        assert!(
            near.chunks(3)
                .zip(letters)
                .all(|(pixel, letter)| pixel.iter().all(|c| c.abs_diff(letter) <= 2))
        );
    }
}
