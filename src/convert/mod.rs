//! A picture in another format, made by the CPU: in one pass, row by row, each byte of the destination written once.
//!
//! The source's rows come through small rows of this program's own, which stay in the processor's nearest cache: nothing here
//! makes a reference to memory that a device may write. Where formats are equal there are no such rows, and memory is copied to
//! memory.
//!
//! What can be made of what, [`Converter::targets`] tells. YUV becomes RGB by the layout's encoding and range, within one step of
//! 8 bits in each channel of what [`Pixels::rgb`](crate::format::Pixels::rgb) computes. Subsampled chroma is that of the sample
//! which pixels share, without interpolation. Measured cost: see `ci/bench`.
//!
//! Compiled twice on x86-64, the second time for AVX2, which is used where the processor has it.

mod recipe;
mod rgb;
#[cfg(test)]
mod tests;
mod yuv;

use crate::format::{Format, Layout, MAX_PLANES, Modifier};
use crate::frame::BufferWriter;
use crate::memory::Span;

use recipe::Recipe;
use yuv::BLOCK;

/// Makes pictures of one layout out of pictures of another. Its rows in between are allocated once, when it is made.
#[derive(Debug)]
pub struct Converter {
    from: Layout,
    to: Layout,
    recipe: Recipe,
    rows: Rows,
    #[cfg(target_arch = "x86_64")]
    avx2: bool,
}

/// The rows in between, each as long as whole blocks of pixels are.
#[derive(Debug, Default)]
struct Rows {
    /// The source's, by colour plane.
    source: [Vec<u8>; MAX_PLANES],
    /// Y, U and V, apart.
    yuv: [Vec<u8>; 3],
    /// Halves of words: the lower, the upper, and both of the pixels beside.
    halves: [Vec<u16>; 4],
    /// Words of blue, green, red and alpha.
    words: Vec<u8>,
    /// The destination's.
    done: Vec<u8>,
}

/// Why a [`Converter`] cannot be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unconvertible {
    /// There is no way from one format to the other.
    #[error("there is no conversion from {from} to {to}")]
    Format {
        /// The source's format.
        from: Format,
        /// The destination's format.
        to: Format,
    },
    /// The pictures are not of one size: nothing here scales.
    #[error("a picture of {}x{} pixels does not become one of {}x{}: nothing here scales", from.0, from.1, to.0, to.1)]
    Size {
        /// Width and height of the source.
        from: (u32, u32),
        /// Width and height of the destination.
        to: (u32, u32),
    },
    /// Rows that are not rows.
    #[error("the {side} is tiled ({modifier}); only linear memory can be converted")]
    Tiled {
        /// `source` or `destination`.
        side: &'static str,
        /// Its modifier.
        modifier: Modifier,
    },
    /// A plane of the destination that overlaps another: one would overwrite the other.
    #[error("plane {plane} of the destination overlaps plane {other}")]
    Overlap {
        /// The colour plane.
        plane: usize,
        /// The one that it overlaps.
        other: usize,
    },
    /// A row that is too long for this machine.
    #[error("a row of {width} pixels is longer than {MAX_WIDTH}")]
    Width {
        /// Its width in pixels.
        width: u32,
    },
}

/// The widest picture, in pixels: four times what any camera or display has, so that the rows in between cannot eat the memory.
pub const MAX_WIDTH: u32 = 65536;

impl Converter {
    /// The formats that can be made of `from`: the same format first, which is a copy; then RGB, best first; then YUV with the
    /// same samples in another order.
    pub fn targets(from: Format) -> impl Iterator<Item = Format> {
        let others = Format::all().filter(move |&to| to != from && Recipe::find(from, to).is_some());
        let (rgb, yuv): (Vec<_>, Vec<_>) = others.partition(|to| !to.is_yuv());
        std::iter::once(from).chain(rgb).chain(yuv)
    }

    /// Makes a converter, with its rows in between.
    ///
    /// # Errors
    /// [`Unconvertible`], with what does not fit.
    pub fn new(from: &Layout, to: &Layout) -> Result<Converter, Unconvertible> {
        if from.size() != to.size() {
            return Err(Unconvertible::Size { from: from.size(), to: to.size() });
        }
        let width = from.width();
        if width > MAX_WIDTH {
            return Err(Unconvertible::Width { width });
        }
        for (side, layout) in [("source", from), ("destination", to)] {
            if let Some(modifier) = layout.modifier().filter(|&modifier| modifier != Modifier::LINEAR) {
                return Err(Unconvertible::Tiled { side, modifier });
            }
        }
        if let Some((other, plane)) = overlap(to) {
            return Err(Unconvertible::Overlap { plane, other });
        }
        let no_way = Unconvertible::Format { from: from.format(), to: to.format() };
        let recipe = Recipe::find(from.format(), to.format()).ok_or(no_way)?.with_colour(from);
        Ok(Converter {
            from: *from,
            to: *to,
            rows: Rows::new(from, to, &recipe),
            recipe,
            #[cfg(target_arch = "x86_64")]
            avx2: std::arch::is_x86_feature_detected!("avx2"),
        })
    }

    /// What it reads.
    pub fn from(&self) -> &Layout {
        &self.from
    }

    /// What it writes.
    pub fn to(&self) -> &Layout {
        &self.to
    }

    /// The bytes that one picture writes: rows times bytes of a row, over the planes of the destination. Padding is not among
    /// them. What goes to the [`Ledger`](crate::ledger::Ledger).
    pub fn bytes(&self) -> u64 {
        self.to.pixel_bytes()
    }

    /// Converts a picture. `read` fills its last argument with the start of a row of the source (colour plane, row); each is asked
    /// for once. `to` must have the layout that this converter was made for. Returns [`Converter::bytes`]. No allocation.
    pub fn convert(&mut self, read: &mut dyn FnMut(usize, u32, &mut [u8]), to: &mut BufferWriter<'_>) -> u64 {
        self.convert_rows(read, &mut |plane, row, bytes| to.row(plane, row, bytes))
    }

    /// As [`Converter::convert`], to anywhere: `write` gets each row of the destination once (colour plane, row, its bytes without
    /// padding), the planes of a row of the picture one after the other.
    pub fn convert_rows(
        &mut self,
        read: &mut dyn FnMut(usize, u32, &mut [u8]),
        write: &mut dyn FnMut(usize, u32, &[u8]),
    ) -> u64 {
        #[cfg(target_arch = "x86_64")]
        if self.avx2 {
            // SAFETY: the processor has AVX2 (`new`), and the function needs nothing else.
            unsafe { self.run_avx2(read, write) };
            return self.bytes();
        }
        self.run(read, write);
        self.bytes()
    }

    /// As [`Converter::convert`], from memory: one span for each memory plane of the source. Between equal formats rows go from
    /// memory to memory, whole planes at once where the strides are equal and the padding has room too. What is outside the
    /// memory reads as zero.
    pub fn copy(&mut self, from: &[Span<'_>], to: &mut BufferWriter<'_>) -> u64 {
        let layout = self.from;
        let at = |plane: usize, row: u32| {
            let place = layout.planes().get(plane)?;
            let span = *from.get(place.memory as usize)?;
            Some((span, place.offset as usize + place.stride as usize * row as usize))
        };
        if !matches!(self.recipe, Recipe::Same) {
            return self.convert(
                &mut |plane, row, out| match at(plane, row) {
                    Some((span, offset)) => span.read(offset, out),
                    None => out.fill(0),
                },
                to,
            );
        }
        for plane in 0..layout.format().planes() {
            let rows = layout.format().rows(plane, layout.height());
            let bytes = layout.format().row_bytes(plane, layout.width()) as usize;
            let part = |row, len| at(plane, row).and_then(|(span, offset)| span.part(offset, len));
            let stride = layout.planes()[plane].stride;
            if stride == self.to.planes()[plane].stride && (stride as usize == bytes || !beside(&self.to, plane)) {
                // The last row without its padding, which may be missing.
                let whole = part(0, stride as usize * (rows - 1) as usize + bytes);
                if whole.is_some_and(|whole| to.rows(plane, 0, whole)) {
                    continue;
                }
            }
            let scratch = &mut self.rows.source[plane];
            for row in 0..rows {
                if !part(row, bytes).is_some_and(|part| to.rows(plane, row, part)) {
                    match at(plane, row) {
                        Some((span, offset)) => span.read(offset, &mut scratch[..bytes]),
                        None => scratch.fill(0),
                    }
                    to.row(plane, row, &scratch[..bytes]);
                }
            }
        }
        self.bytes()
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2")]
    fn run_avx2(&mut self, read: &mut dyn FnMut(usize, u32, &mut [u8]), write: &mut dyn FnMut(usize, u32, &[u8])) {
        self.run(read, write);
    }

    /// In its caller, so that it is compiled for the processor that the caller is for.
    #[inline(always)]
    fn run(&mut self, read: &mut dyn FnMut(usize, u32, &mut [u8]), write: &mut dyn FnMut(usize, u32, &[u8])) {
        let (from, to, width) = (self.from.format(), self.to.format(), self.from.width());
        let (_, vertical) = from.subsampling();
        for y in 0..self.from.height() {
            let chroma = y.is_multiple_of(vertical);
            for plane in 0..from.planes() {
                if plane == 0 || chroma {
                    let row = if plane == 0 { y } else { y / vertical };
                    read(plane, row, &mut self.rows.source[plane][..from.row_bytes(plane, width) as usize]);
                }
            }
            let rows = &mut self.rows;
            match &self.recipe {
                Recipe::Same => {
                    for plane in 0..from.planes() {
                        if plane == 0 || chroma {
                            let row = if plane == 0 { y } else { y / vertical };
                            write(plane, row, &rows.source[plane][..from.row_bytes(plane, width) as usize]);
                        }
                    }
                    continue;
                }
                Recipe::Rgb(decode, encode) => {
                    decode.row(&rows.source[0], &mut rows.words);
                    write(0, y, &encode.row(&mut rows.words, &mut rows.done)[..to.row_bytes(0, width) as usize]);
                }
                Recipe::Grey(encode) => {
                    yuv::grey(&rows.source[0], &mut rows.words);
                    write(0, y, &encode.row(&mut rows.words, &mut rows.done)[..to.row_bytes(0, width) as usize]);
                }
                Recipe::Colours(take, matrix, encode) => {
                    rows.take(*take, chroma);
                    rows.words(*take, matrix, from.subsampling().0 == 2);
                    write(0, y, &encode.row(&mut rows.words, &mut rows.done)[..to.row_bytes(0, width) as usize]);
                }
                Recipe::Samples(take, give) => {
                    rows.take(*take, chroma);
                    rows.give(*take, *give, (y, chroma), (to, width), write);
                }
            }
        }
    }
}

impl Rows {
    /// Rows that the recipe needs, for whole blocks of pixels.
    fn new(from: &Layout, to: &Layout, recipe: &Recipe) -> Rows {
        // At most MAX_WIDTH, of which a block is a part.
        let width = from.width().next_multiple_of(BLOCK as u32);
        let row = |layout: &Layout, plane| vec![0; layout.format().row_bytes(plane, width) as usize];
        let mut rows = Rows::default();
        for (plane, scratch) in rows.source.iter_mut().enumerate().take(from.format().planes()) {
            *scratch = row(from, plane);
        }
        if let Recipe::Colours(take, ..) | Recipe::Samples(take, _) = recipe {
            let len = width as usize * if take.is_wide() { 2 } else { 1 };
            rows.yuv = std::array::from_fn(|_| vec![0; len]);
        }
        if let Recipe::Colours(..) = recipe {
            rows.halves = std::array::from_fn(|_| vec![0; width as usize]);
        }
        if !matches!(recipe, Recipe::Same | Recipe::Samples(..)) {
            rows.words = vec![0; width as usize * 4];
        }
        // The longest row of any plane.
        let longest = (0..to.format().planes()).map(|plane| to.format().row_bytes(plane, width)).max();
        rows.done = vec![0; longest.unwrap_or(0) as usize];
        rows
    }
}

/// Whether another plane starts in what the rows of this one leave free.
fn beside(layout: &Layout, plane: usize) -> bool {
    let planes = layout.planes();
    let own = planes[plane];
    let mut others = planes
        .iter()
        .enumerate()
        .filter(|&(other, place)| other != plane && place.memory == own.memory);
    others.any(|(_, place)| {
        let first = u64::from(own.offset) % u64::from(own.stride.max(1));
        let second = u64::from(place.offset) % u64::from(own.stride.max(1));
        let apart = u64::from(own.stride) * u64::from(layout.format().rows(plane, layout.height()));
        first != second && u64::from(place.offset.abs_diff(own.offset)) < apart
    })
}

/// Two planes of a layout that share bytes.
fn overlap(layout: &Layout) -> Option<(usize, usize)> {
    let span = |plane: usize| {
        let place = layout.planes()[plane];
        let rows = u64::from(layout.format().rows(plane, layout.height()));
        let row = u64::from(layout.format().row_bytes(plane, layout.width()));
        let start = u64::from(place.offset);
        (place, row, start, start + u64::from(place.stride) * (rows - 1) + row)
    };
    let planes = layout.format().planes();
    let mut pairs = (0..planes).flat_map(|first| (first + 1..planes).map(move |second| (first, second)));
    pairs.find(|&(first, second)| {
        let ((one, row, start, end), (other, next, from, to)) = (span(first), span(second));
        if one.memory != other.memory || start >= to || from >= end {
            return false;
        }
        // Side by side: the rows of one in what the rows of the other leave free.
        let stride = u64::from(one.stride);
        let after = (from + stride - start % stride) % stride;
        one.stride != other.stride || after < row || after + next > stride
    })
}
