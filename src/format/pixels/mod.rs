//! Single pixels of any format: what test cards, pictures and checks need. Never for speed.

use std::ops::Range as Span;

use super::table::Bits;
use super::{Colour, Format, Kind, Layout, MAX_PLANES, Range};

/// A colour of 8 bits a channel, as sRGB files and people write it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Rgb {
    /// Red.
    pub r: u8,
    /// Green.
    pub g: u8,
    /// Blue.
    pub b: u8,
}

impl Rgb {
    /// The colour with these channels.
    pub const fn new(r: u8, g: u8, b: u8) -> Rgb {
        Rgb { r, g, b }
    }
}

/// A pixel's numbers as they lie in memory, not yet taken for a colour.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Raw {
    /// A pixel of an RGB format.
    Rgb {
        /// Red, green and blue.
        values: [u16; 3],
        /// The bits that each of them has.
        widths: [u8; 3],
        /// Alpha and its bits, where the format has one.
        alpha: Option<(u16, u8)>,
    },
    /// A pixel of a YUV format. Where the format has no chroma, `u` and `v` are the middle value.
    Yuv {
        /// Luma.
        y: u16,
        /// Difference of blue.
        u: u16,
        /// Difference of red.
        v: u16,
        /// The bits that each of them has. P010's are its upper 10.
        bits: u8,
    },
    /// A pixel of an HSV format.
    Hsv {
        /// Hue, in steps that the colour's range says.
        h: u8,
        /// Saturation.
        s: u8,
        /// Value.
        v: u8,
    },
    /// The one sample that a pixel of a Bayer format has.
    Bayer {
        /// Its value.
        value: u16,
        /// The bits that it has.
        bits: u8,
    },
}

/// One row of a picture, to read: the bytes of that row in each colour plane.
///
/// Reads past the end of what was given yield zeros, so a short slice is a black edge and never a panic.
#[derive(Clone, Copy, Debug)]
pub struct Pixels<'a> {
    format: Format,
    rows: [&'a [u8]; MAX_PLANES],
}

impl<'a> Pixels<'a> {
    /// The row whose bytes in colour plane 0, 1, … are `rows`. For a row of subsampled chroma give the chroma row that
    /// it shares with its neighbour.
    pub fn new(format: Format, rows: &[&'a [u8]]) -> Pixels<'a> {
        let mut all: [&[u8]; MAX_PLANES] = [&[]; MAX_PLANES];
        for (slot, row) in all.iter_mut().zip(rows) {
            *slot = row;
        }
        Pixels { format, rows: all }
    }

    /// Row `y` of a picture that lies in `memory` (one slice a memory plane) as `layout` says.
    pub fn at(layout: &Layout, memory: &[&'a [u8]], y: u32) -> Pixels<'a> {
        let mut rows: [&[u8]; MAX_PLANES] = [&[]; MAX_PLANES];
        for (plane, slot) in rows.iter_mut().enumerate().take(layout.format().planes()) {
            let (index, span) = row_span(layout, plane, y);
            *slot = memory.get(index).and_then(|bytes| bytes.get(span)).unwrap_or_default();
        }
        Pixels { format: layout.format(), rows }
    }

    /// The numbers of pixel `x`. Chroma is that of the sample which the pixel shares, without interpolation.
    pub fn raw(&self, x: u32) -> Raw {
        let x = x as usize;
        let chroma = x / self.format.subsampling().0 as usize;
        match self.format.kind() {
            Kind::Rgb { channels, alpha } => {
                let word = self.word(x);
                Raw::Rgb {
                    values: channels.map(|bits| field(word, bits)),
                    widths: channels.map(|bits| bits.width),
                    alpha: alpha.map(|bits| (field(word, bits), bits.width)),
                }
            }
            Kind::Packed422 { y, u, v } => {
                let group = x / 2 * 4;
                let at = |position: u8| u16::from(self.byte(0, group + usize::from(position)));
                Raw::Yuv { y: at(y[x % 2]), u: at(u), v: at(v), bits: 8 }
            }
            Kind::SemiPlanar { swapped, sample } => {
                let (u, v) = if swapped { (1, 0) } else { (0, 1) };
                let at = |plane, index| self.sample(plane, index, sample);
                let bits = if sample == 1 { 8 } else { 10 };
                Raw::Yuv { y: at(0, x), u: at(1, 2 * chroma + u), v: at(1, 2 * chroma + v), bits }
            }
            Kind::Planar { swapped } => {
                let (u, v) = if swapped { (2, 1) } else { (1, 2) };
                let at = |plane, index| self.sample(plane, index, 1);
                Raw::Yuv { y: at(0, x), u: at(u, chroma), v: at(v, chroma), bits: 8 }
            }
            Kind::Grey => Raw::Yuv { y: self.sample(0, x, 1), u: 128, v: 128, bits: 8 },
            Kind::DeepGrey { bits } => {
                let middle = 1 << (bits - 1);
                Raw::Yuv { y: self.deep(x, bits), u: middle, v: middle, bits }
            }
            Kind::YuvWord { channels, .. } => {
                let word = self.word(x);
                let [y, u, v] = channels.map(|bits| field(word, bits) << (8 - bits.width));
                Raw::Yuv { y, u, v, bits: 8 }
            }
            Kind::Hsv { before } => {
                let first = x * self.format.row_bytes(0, 1) as usize + usize::from(before);
                let [h, s, v] = [0, 1, 2].map(|byte| self.byte(0, first + byte));
                Raw::Hsv { h, s, v }
            }
            Kind::Bayer { bits, .. } => Raw::Bayer { value: self.deep(x, bits), bits },
        }
    }

    /// The colour of pixel `x`, rounded to the nearest. `colour` says what YUV numbers mean; grey is of full range
    /// whatever it says, as V4L2's GREY is. Alpha is not applied. A Bayer format's one sample is taken as grey: for its colour see
    /// [`demosaic`](super::demosaic).
    pub fn rgb(&self, x: u32, colour: Colour) -> Rgb {
        self.colour_of(self.raw(x), colour)
    }

    /// [`rgb`](Pixels::rgb) for one pixel after the other: where one has the numbers of the one asked for before it, as in areas of one
    /// colour, its colour is not computed again.
    pub fn colours(&self, colour: Colour) -> impl FnMut(u32) -> Rgb + use<'a> {
        let pixels = *self;
        let mut last = None;
        move |x| {
            let raw = pixels.raw(x);
            match last {
                Some((same, rgb)) if same == raw => rgb,
                _ => {
                    let rgb = pixels.colour_of(raw, colour);
                    last = Some((raw, rgb));
                    rgb
                }
            }
        }
    }

    fn colour_of(&self, raw: Raw, colour: Colour) -> Rgb {
        match raw {
            Raw::Rgb { values, widths, .. } => {
                let channel = |i: usize| {
                    let top = (1 << widths[i]) - 1;
                    byte(f64::from(values[i]) / f64::from(top) * 255.0)
                };
                Rgb::new(channel(0), channel(1), channel(2))
            }
            Raw::Yuv { y, u, v, bits } => from_yuv([y, u, v], bits, meaning(self.format, colour)),
            Raw::Hsv { h, s, v } => from_hsv([h, s, v], colour.range),
            Raw::Bayer { value, bits } => {
                let level = to_level(value, bits);
                Rgb::new(level, level, level)
            }
        }
    }

    /// The one sample of pixel `x`, of so many bits, as 8 bits.
    pub(super) fn level(&self, x: u32, bits: u8) -> u8 {
        to_level(self.deep(x as usize, bits), bits)
    }

    /// Pixel `x` as one word.
    fn word(&self, x: usize) -> u32 {
        let size = self.format.row_bytes(0, 1) as usize;
        let big = self.format.is_big_endian();
        (0..size).fold(0, |word, i| {
            let byte = u32::from(self.byte(0, x * size + i));
            word | byte << (8 * if big { size - 1 - i } else { i })
        })
    }

    /// Sample `index` of one byte or, with more than 8 bits, two.
    fn deep(&self, index: usize, bits: u8) -> u16 {
        if bits == 8 {
            return u16::from(self.byte(0, index));
        }
        let bytes = [self.byte(0, 2 * index), self.byte(0, 2 * index + 1)];
        let value = if self.format.is_big_endian() { u16::from_be_bytes(bytes) } else { u16::from_le_bytes(bytes) };
        value & (u16::MAX >> (16 - bits))
    }

    fn byte(&self, plane: usize, index: usize) -> u8 {
        self.rows.get(plane).and_then(|row| row.get(index)).copied().unwrap_or(0)
    }

    fn sample(&self, plane: usize, index: usize, size: u8) -> u16 {
        match size {
            1 => u16::from(self.byte(plane, index)),
            _ => u16::from_le_bytes([self.byte(plane, 2 * index), self.byte(plane, 2 * index + 1)]) >> 6,
        }
    }
}

/// One row of a picture, to write: the bytes of that row in each colour plane.
///
/// Writes past the end of what was given do nothing. An empty slice therefore leaves a plane out, which is what the
/// rows without chroma of their own need. Subsampled chroma is written from the pixels at even `x`; those at odd `x`
/// leave it.
#[derive(Debug)]
pub struct PixelsMut<'a> {
    format: Format,
    rows: [&'a mut [u8]; MAX_PLANES],
}

impl<'a> PixelsMut<'a> {
    /// The row whose bytes in colour plane 0, 1, … are `rows`.
    pub fn new(format: Format, rows: impl IntoIterator<Item = &'a mut [u8]>) -> PixelsMut<'a> {
        let mut all: [&mut [u8]; MAX_PLANES] = Default::default();
        for (slot, row) in all.iter_mut().zip(rows) {
            *slot = row;
        }
        PixelsMut { format, rows: all }
    }

    /// Row `y` of a picture that lies in `memory` (one slice a memory plane) as `layout` says. Where chroma is shared
    /// by two rows, only the first of them writes it. Planes that overlap an earlier one are left out.
    pub fn at(layout: &Layout, memory: &'a mut [&mut [u8]], y: u32) -> PixelsMut<'a> {
        let format = layout.format();
        let mut rows: [&'a mut [u8]; MAX_PLANES] = Default::default();
        for (index, bytes) in memory.iter_mut().enumerate() {
            let mut spans = [(0, 0, 0); MAX_PLANES];
            let mut count = 0;
            for plane in 0..format.planes() {
                let (home, span) = row_span(layout, plane, y);
                if home == index && (plane == 0 || y.is_multiple_of(format.subsampling().1)) {
                    spans[count] = (span.start, span.end, plane);
                    count += 1;
                }
            }
            spans[..count].sort_unstable();
            // Cut the rows out of the memory from its start to its end; `cut` is where `rest` starts.
            let (mut rest, mut cut): (&'a mut [u8], usize) = (&mut **bytes, 0);
            for &(start, end, plane) in &spans[..count] {
                let Some(skip) = start.checked_sub(cut) else { continue };
                let Some((_, tail)) = std::mem::take(&mut rest).split_at_mut_checked(skip) else { break };
                let Some((row, tail)) = tail.split_at_mut_checked(end - start) else { break };
                rows[plane] = row;
                (rest, cut) = (tail, end);
            }
        }
        PixelsMut { format, rows }
    }

    /// Gives pixel `x` a colour, rounded to the nearest that the format has: opaque where it has alpha, all ones in
    /// bits that it does not use. `colour` says what YUV numbers are to mean; grey is of full range whatever it says.
    pub fn set(&mut self, x: u32, rgb: Rgb, colour: Colour) {
        self.put(x, Value::of(self.format, rgb, colour));
    }

    /// Gives all pixels of `columns` one colour, as [`PixelsMut::set`] does.
    pub fn fill(&mut self, columns: Span<u32>, rgb: Rgb, colour: Colour) {
        let value = Value::of(self.format, rgb, colour);
        for x in columns {
            self.put(x, value);
        }
    }

    fn put(&mut self, x: u32, value: Value) {
        let x = x as usize;
        let (horizontal, _) = self.format.subsampling();
        let (chroma, owner) = (x / horizontal as usize, x.is_multiple_of(horizontal as usize));
        let [y, u, v] = value.yuv;
        match self.format.kind() {
            Kind::Rgb { .. } | Kind::YuvWord { .. } | Kind::Hsv { .. } => {
                let size = self.format.row_bytes(0, 1) as usize;
                let mut bytes = value.word.to_le_bytes();
                if self.format.is_big_endian() {
                    bytes[..size].reverse();
                }
                if let (Some(pixel), Some(bytes)) = (self.rows[0].get_mut(x * size..(x + 1) * size), bytes.get(..size))
                {
                    pixel.copy_from_slice(bytes);
                }
            }
            Kind::Packed422 { y: places, u: u_place, v: v_place } => {
                let group = x / 2 * 4;
                self.put_sample(0, group + usize::from(places[x % 2]), 1, y);
                if owner {
                    self.put_sample(0, group + usize::from(u_place), 1, u);
                    self.put_sample(0, group + usize::from(v_place), 1, v);
                }
            }
            Kind::SemiPlanar { swapped, sample } => {
                let (first, second) = if swapped { (v, u) } else { (u, v) };
                self.put_sample(0, x, sample, y);
                if owner {
                    self.put_sample(1, 2 * chroma, sample, first);
                    self.put_sample(1, 2 * chroma + 1, sample, second);
                }
            }
            Kind::Planar { swapped } => {
                let (first, second) = if swapped { (v, u) } else { (u, v) };
                self.put_sample(0, x, 1, y);
                if owner {
                    self.put_sample(1, chroma, 1, first);
                    self.put_sample(2, chroma, 1, second);
                }
            }
            Kind::Grey | Kind::Bayer { bits: 8, .. } => self.put_sample(0, x, 1, y),
            Kind::DeepGrey { .. } | Kind::Bayer { .. } => {
                let bytes = if self.format.is_big_endian() { y.to_be_bytes() } else { y.to_le_bytes() };
                if let Some(sample) = self.rows[0].get_mut(2 * x..2 * x + 2) {
                    sample.copy_from_slice(&bytes);
                }
            }
        }
    }

    fn put_sample(&mut self, plane: usize, index: usize, size: u8, value: u16) {
        let row = &mut self.rows[plane];
        if size == 1 {
            if let Some(byte) = row.get_mut(index) {
                // 8-bit values only: `Value::of` made them.
                *byte = value.to_le_bytes()[0];
            }
        } else if let Some(bytes) = row.get_mut(2 * index..2 * index + 2) {
            bytes.copy_from_slice(&(value << 6).to_le_bytes());
        }
    }
}

/// A colour in a format's own numbers: `word` for RGB, `yuv` for the others.
#[derive(Clone, Copy, Default)]
struct Value {
    word: u32,
    yuv: [u16; 3],
}

impl Value {
    fn of(format: Format, rgb: Rgb, colour: Colour) -> Value {
        match format.kind() {
            Kind::Rgb { channels, .. } => {
                let mut word = u32::MAX;
                for (bits, value) in channels.into_iter().zip([rgb.r, rgb.g, rgb.b]) {
                    let top = (1u32 << bits.width) - 1;
                    let scaled = (u32::from(value) * top + 127) / 255;
                    word = word & !(top << bits.shift) | scaled << bits.shift;
                }
                Value { word, ..Value::default() }
            }
            Kind::SemiPlanar { sample: 2, .. } => Value { yuv: to_yuv(rgb, 10, colour), ..Value::default() },
            Kind::DeepGrey { bits } | Kind::Bayer { bits, .. } => {
                Value { yuv: to_yuv(rgb, bits, meaning(format, colour)), ..Value::default() }
            }
            Kind::YuvWord { channels, .. } => {
                let mut word = u32::MAX;
                for (bits, value) in channels.into_iter().zip(to_yuv(rgb, 8, colour)) {
                    let top = (1u32 << bits.width) - 1;
                    // The nearest of those whose upper bits these are.
                    let half = (1 << (8 - bits.width)) / 2;
                    let upper = ((u32::from(value) + half) >> (8 - bits.width)).min(top);
                    word = word & !(top << bits.shift) | upper << bits.shift;
                }
                Value { word, ..Value::default() }
            }
            Kind::Hsv { before } => {
                let [h, s, v] = to_hsv(rgb, colour.range);
                let word = u32::from_le_bytes([h, s, v, 0xff]).rotate_left(8 * u32::from(before));
                Value { word, ..Value::default() }
            }
            _ => Value { yuv: to_yuv(rgb, 8, meaning(format, colour)), ..Value::default() },
        }
    }
}

/// Memory plane and bytes of the row of `plane` that row `y` of the picture uses.
fn row_span(layout: &Layout, plane: usize, y: u32) -> (usize, Span<usize>) {
    let format = layout.format();
    let vertical = if plane == 0 { 1 } else { format.subsampling().1 };
    let Some(place) = layout.planes().get(plane).filter(|_| y < layout.height()) else { return (0, 0..0) };
    let start = place.offset as usize + place.stride as usize * (y / vertical) as usize;
    (place.memory as usize, start..start + format.row_bytes(plane, layout.width()) as usize)
}

fn field(word: u32, bits: Bits) -> u16 {
    // At most 8 bits wide (`Bits`), so nothing is cut.
    ((word >> bits.shift) & ((1 << bits.width) - 1)) as u16
}

fn meaning(format: Format, colour: Colour) -> Colour {
    match format.kind() {
        Kind::Grey | Kind::DeepGrey { .. } | Kind::Bayer { .. } => Colour { range: Range::Full, ..colour },
        _ => colour,
    }
}

/// A sample of so many bits as 8 bits: the lowest of them are less than a step.
fn to_level(value: u16, bits: u8) -> u8 {
    (value >> (bits - 8)).to_le_bytes()[0]
}

fn from_yuv(yuv: [u16; 3], bits: u8, colour: Colour) -> Rgb {
    let (kr, kb) = colour.encoding.weights();
    let [black, luma, middle, chroma] = colour.range.levels(bits);
    let y = (f64::from(yuv[0]) - black) / luma;
    let r = y + 2.0 * (1.0 - kr) * (f64::from(yuv[2]) - middle) / chroma;
    let b = y + 2.0 * (1.0 - kb) * (f64::from(yuv[1]) - middle) / chroma;
    let g = (y - kr * r - kb * b) / (1.0 - kr - kb);
    Rgb::new(byte(r * 255.0), byte(g * 255.0), byte(b * 255.0))
}

fn to_yuv(rgb: Rgb, bits: u8, colour: Colour) -> [u16; 3] {
    let (kr, kb) = colour.encoding.weights();
    let [black, luma, middle, chroma] = colour.range.levels(bits);
    let [r, g, b] = [rgb.r, rgb.g, rgb.b].map(|value| f64::from(value) / 255.0);
    let y = kr * r + (1.0 - kr - kb) * g + kb * b;
    let top = f64::from((1u32 << bits) - 1);
    let sample = |value: f64| value.round().clamp(0.0, top) as u16;
    [
        sample(black + luma * y),
        sample(middle + chroma * (b - y) / (2.0 * (1.0 - kb))),
        sample(middle + chroma * (r - y) / (2.0 * (1.0 - kr))),
    ]
}

/// The steps of a full turn of hue: `V4L2_HSV_ENC_180` and `V4L2_HSV_ENC_256`.
fn turn(range: Range) -> f64 {
    match range {
        Range::Limited => 180.0,
        Range::Full => 256.0,
    }
}

fn from_hsv([h, s, v]: [u8; 3], range: Range) -> Rgb {
    let (hue, value) = (f64::from(h) / turn(range) * 6.0, f64::from(v));
    let chroma = value * f64::from(s) / 255.0;
    // How far red, green and blue are below the value: by the distance of the hue to theirs.
    let channel = |shift: f64| {
        let place = (shift + hue) % 6.0;
        byte(value - chroma * place.min(4.0 - place).clamp(0.0, 1.0))
    };
    Rgb::new(channel(5.0), channel(3.0), channel(1.0))
}

fn to_hsv(rgb: Rgb, range: Range) -> [u8; 3] {
    let [r, g, b] = [rgb.r, rgb.g, rgb.b].map(f64::from);
    let value = r.max(g).max(b);
    let chroma = value - r.min(g).min(b);
    if chroma == 0.0 {
        return [0, 0, byte(value)];
    }
    let hue = if value == r {
        (g - b) / chroma
    } else if value == g {
        2.0 + (b - r) / chroma
    } else {
        4.0 + (r - g) / chroma
    };
    let steps = (hue.rem_euclid(6.0) / 6.0 * turn(range)).round() % turn(range);
    [byte(steps), byte(chroma / value * 255.0), byte(value)]
}

fn byte(value: f64) -> u8 {
    value.round().clamp(0.0, 255.0) as u8
}

#[cfg(test)]
mod tests;
