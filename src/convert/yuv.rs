//! YUV samples: out of the rows that they lie in, into other rows, and into colours.

use crate::format::{Colour, Format, Kind};

use super::Rows;

/// Pixels that are worked on at once. Every row in between has room for a whole number of blocks, so that there is no rest.
pub(super) const BLOCK: usize = 32;

/// Samples of chroma for a block, where two pixels share one.
const HALF: usize = BLOCK / 2;

/// How the samples of a row lie in its planes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Take {
    /// Two pixels in four bytes: positions of the two Y, of U and of V.
    Packed([u8; 4]),
    /// Y; U and V in turn, V first if `swapped`; of two bytes each, the value in the upper ten bits, if `wide`.
    Pairs { swapped: bool, wide: bool },
    /// Y; U; V; or V before U if `swapped`.
    Planes { swapped: bool },
}

impl Take {
    pub(super) fn of(format: Format) -> Option<Take> {
        match format.kind() {
            Kind::Packed422 { y, u, v } => Some(Take::Packed([y[0], y[1], u, v])),
            Kind::SemiPlanar { swapped, sample } => Some(Take::Pairs { swapped, wide: sample == 2 }),
            Kind::Planar { swapped } => Some(Take::Planes { swapped }),
            _ => None,
        }
    }

    /// Whether a sample has two bytes.
    pub(super) fn is_wide(self) -> bool {
        matches!(self, Take::Pairs { wide: true, .. })
    }
}

impl Rows {
    /// Takes the samples of the source's row apart, as far as they are not apart already; those of chroma where it is new.
    #[inline(always)]
    pub(super) fn take(&mut self, take: Take, chroma: bool) {
        let [y, u, v] = &mut self.yuv;
        match take {
            // Where Y comes first, and where it comes second: one loop each, which shifts and does not search.
            Take::Packed([0, 2, first, _]) => {
                packed::<false>(&self.source[0], y, if first == 1 { [u, v] } else { [v, u] })
            }
            Take::Packed([_, _, first, _]) => {
                packed::<true>(&self.source[0], y, if first == 0 { [u, v] } else { [v, u] })
            }
            Take::Pairs { wide, swapped } if chroma => {
                let apart = if swapped { [v, u] } else { [u, v] };
                if wide { pairs::<2>(&self.source[1], apart) } else { pairs::<1>(&self.source[1], apart) }
            }
            Take::Pairs { .. } | Take::Planes { .. } => {}
        }
    }

    /// Y, U and V, wherever they are after [`Rows::take`].
    #[inline(always)]
    fn apart<'a>(take: Take, source: &'a [Vec<u8>; 4], yuv: &'a [Vec<u8>; 3]) -> [&'a [u8]; 3] {
        match take {
            Take::Packed(_) => [&yuv[0], &yuv[1], &yuv[2]],
            Take::Pairs { .. } => [&source[0], &yuv[1], &yuv[2]],
            Take::Planes { swapped: false } => [&source[0], &source[1], &source[2]],
            Take::Planes { swapped: true } => [&source[0], &source[2], &source[1]],
        }
    }

    /// Makes words of the samples; `half` where two pixels share chroma.
    #[inline(always)]
    pub(super) fn words(&mut self, take: Take, matrix: &Matrix, half: bool) {
        let rows = Rows::apart(take, &self.source, &self.yuv);
        match (take.is_wide(), half) {
            (false, true) => words::<1, 2, HALF>(rows, matrix, &mut self.halves, &mut self.words),
            (false, false) => words::<1, 1, BLOCK>(rows, matrix, &mut self.halves, &mut self.words),
            (true, true) => words::<2, 2, HALF>(rows, matrix, &mut self.halves, &mut self.words),
            (true, false) => words::<2, 1, BLOCK>(rows, matrix, &mut self.halves, &mut self.words),
        }
    }

    /// Writes the samples in another order; `place` is the row and whether chroma is new in it.
    #[inline(always)]
    pub(super) fn give(
        &mut self,
        take: Take,
        give: Take,
        (row, chroma): (u32, bool),
        (to, width): (Format, u32),
        write: &mut dyn FnMut(usize, u32, &[u8]),
    ) {
        let [y, u, v] = Rows::apart(take, &self.source, &self.yuv);
        let len = |plane| to.row_bytes(plane, width) as usize;
        if let Take::Packed(places) = give {
            together(y, u, v, places, &mut self.done);
            return write(0, row, &self.done[..len(0)]);
        }
        write(0, row, &y[..len(0)]);
        if !chroma {
            return;
        }
        let row = row / to.subsampling().1;
        let swapped = matches!(give, Take::Pairs { swapped: true, .. } | Take::Planes { swapped: true });
        let (first, second) = if swapped { (v, u) } else { (u, v) };
        if let Take::Pairs { .. } = give {
            for ((pair, first), second) in self.done.as_chunks_mut().0.iter_mut().zip(first).zip(second) {
                *pair = [*first, *second];
            }
            write(1, row, &self.done[..len(1)]);
        } else {
            write(1, row, &first[..len(1)]);
            write(2, row, &second[..len(2)]);
        }
    }
}

/// Takes packed samples apart. `LUMA_LAST`: a pair of bytes is chroma, luma; else luma, chroma.
#[inline(always)]
fn packed<const LUMA_LAST: bool>(row: &[u8], y: &mut [u8], [first, second]: [&mut Vec<u8>; 2]) {
    let luma = usize::from(LUMA_LAST);
    for (pair, y) in row.as_chunks::<2>().0.iter().zip(y) {
        *y = pair[luma];
    }
    for ((group, first), second) in row.as_chunks::<4>().0.iter().zip(first).zip(second) {
        *first = group[1 - luma];
        *second = group[3 - luma];
    }
}

/// Puts packed samples together.
#[inline(always)]
fn together(y: &[u8], u: &[u8], v: &[u8], places: [u8; 4], row: &mut [u8]) {
    let places = places.map(usize::from);
    let groups = row.as_chunks_mut::<4>().0.iter_mut().zip(y.as_chunks::<2>().0);
    for (((group, y), u), v) in groups.zip(u).zip(v) {
        for (&place, value) in places.iter().zip([y[0], y[1], *u, *v]) {
            group[place & 3] = value;
        }
    }
}

/// Takes samples that lie in turn apart.
#[inline(always)]
fn pairs<const SIZE: usize>(row: &[u8], [first, second]: [&mut Vec<u8>; 2]) {
    let apart = first.as_chunks_mut::<SIZE>().0.iter_mut().zip(second.as_chunks_mut::<SIZE>().0);
    for (pair, (first, second)) in row.as_chunks::<SIZE>().0.chunks_exact(2).zip(apart) {
        *first = pair[0];
        *second = pair[1];
    }
}

/// How samples become colours, in numbers of 16 bits.
///
/// A sample is taken as 16 bits with its value in the upper ones, chroma less its middle. The upper half of its product with a
/// factor is the channel's share in steps of 1/32, for factors of 2^13 times the share. What is cut off is less than 1/32 step for
/// each of at most three products, and half of that is in the bias, so the result is within 1/16 step of the exact one before it
/// is rounded.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Matrix {
    luma: u16,
    /// V before U: red is the first channel then.
    red_first: bool,
    /// Of the chroma that the first channel has, and of the other that the third has.
    outer: [i16; 2],
    /// Of both in green.
    green: [i16; 2],
    /// Black, rounding, and half of what is cut off: of an outer channel, and of green.
    bias: [i16; 2],
}

/// The fractional bits of a share.
const FRACTION: u32 = 5;

impl Matrix {
    /// For samples of 8 bits, or of 10 if `wide`.
    pub(super) fn new(colour: Colour, wide: bool, red_first: bool) -> Matrix {
        let (kr, kb) = colour.encoding.weights();
        let unit = if wide { 4.0 } else { 1.0 };
        let [black, luma, _, chroma] = colour.range.levels(if wide { 10 } else { 8 });
        // Channel steps for a step of the sample, times 2^13 and scaled for samples that lie in the upper bits.
        let factor = |share: f64, span: f64| (share * 255.0 / span * unit * 8192.0).round();
        let luma_factor = factor(1.0, luma);
        let (red, blue) = (2.0 * (1.0 - kr), 2.0 * (1.0 - kb));
        let of_green = |weight: f64, share: f64| -weight * share / (1.0 - kr - kb);
        let black = (black / unit * luma_factor / 256.0).round();
        let bias = |cut: f64| (16.0 + cut - black) as i16;
        let two = |v: f64, u: f64| {
            let (v, u) = (factor(v, chroma) as i16, factor(u, chroma) as i16);
            if red_first { [v, u] } else { [u, v] }
        };
        Matrix {
            luma: luma_factor as u16,
            red_first,
            outer: two(red, blue),
            green: two(of_green(kr, red), of_green(kb, blue)),
            bias: [bias(1.0), bias(1.5)],
        }
    }

    /// The shares of two samples of chroma: in the first channel, in green, in the third.
    #[inline(always)]
    fn chroma(&self, first: i16, third: i16) -> [i16; 3] {
        let green = upper(first, self.green[0]) + upper(third, self.green[1]);
        [upper(first, self.outer[0]) + self.bias[0], green + self.bias[1], upper(third, self.outer[1]) + self.bias[0]]
    }

    /// The two halves of a word: first channel and green; third channel and all ones.
    #[inline(always)]
    fn halves(&self, luma: u16, [first, green, third]: [i16; 3]) -> [u16; 2] {
        // Less than 2^14.
        let luma = ((u32::from(luma) * u32::from(self.luma)) >> 16) as i16;
        let channel = |share: i16| ((luma + share) >> FRACTION).clamp(0, 255).cast_unsigned();
        [channel(first) | channel(green) << 8, channel(third) | 0xff00]
    }
}

/// The upper half of a product.
#[inline(always)]
fn upper(a: i16, b: i16) -> i16 {
    ((i32::from(a) * i32::from(b)) >> 16) as i16
}

/// Sample `index`, in the upper bits.
#[inline(always)]
fn sample<const SIZE: usize>(row: &[u8], index: usize) -> u16 {
    if SIZE == 1 {
        u16::from(row[index]) << 8
    } else {
        u16::from_le_bytes([row[2 * index], row[2 * index + 1]]) & 0xffc0
    }
}

/// The Y of the pixels that share sample `index` of chroma, `EACH` of them, in the upper bits.
#[inline(always)]
fn lumas<const SIZE: usize, const EACH: usize>(row: &[u8], index: usize) -> [u16; EACH] {
    if SIZE == 1 && EACH == 2 {
        let pair = u16::from_le_bytes([row[2 * index], row[2 * index + 1]]);
        return std::array::from_fn(|pixel| if pixel == 0 { pair << 8 } else { pair & 0xff00 });
    }
    std::array::from_fn(|pixel| sample::<SIZE>(row, index * EACH + pixel))
}

/// Words of a row's Y, U and V. Samples of `SIZE` bytes, those of chroma shared by `EACH` pixels, `LANES` of them in a block.
///
/// In two steps, for the compiler to make vectors of both: the halves of words, with the pixels that share chroma apart, in lanes of
/// 16 bits; and the words, over the whole row.
#[inline(always)]
fn words<const SIZE: usize, const EACH: usize, const LANES: usize>(
    [y, u, v]: [&[u8]; 3],
    matrix: &Matrix,
    halves: &mut [Vec<u16>; 4],
    words: &mut [u8],
) {
    let (first, third) = if matrix.red_first { (v, u) } else { (u, v) };
    let chroma = first.chunks_exact(LANES * SIZE).zip(third.chunks_exact(LANES * SIZE));
    let blocks = y.chunks_exact(LANES * EACH * SIZE).zip(chroma);
    let centred = |row: &[u8], index| (sample::<SIZE>(row, index) ^ 0x8000).cast_signed();
    let [low, high, next_low, next_high] = halves.each_mut().map(|half| half.as_chunks_mut::<LANES>().0);
    let lanes = low.iter_mut().zip(high).zip(next_low.iter_mut().zip(next_high));
    for ((y, (first, third)), ((low, high), (next_low, next_high))) in blocks.zip(lanes) {
        for lane in 0..LANES {
            let shares = matrix.chroma(centred(first, lane), centred(third, lane));
            let lumas = lumas::<SIZE, EACH>(y, lane);
            [low[lane], high[lane]] = matrix.halves(lumas[0], shares);
            if EACH == 2 {
                [next_low[lane], next_high[lane]] = matrix.halves(lumas[1], shares);
            }
        }
    }
    let word = |low: u16, high: u16| (u32::from(low) | u32::from(high) << 16).to_le_bytes();
    let [low, high, next_low, next_high] = halves.each_ref().map(Vec::as_slice);
    let (words, _) = words.as_chunks_mut::<4>();
    if EACH == 2 {
        let lanes = low.iter().zip(high).zip(next_low.iter().zip(next_high));
        for (pair, ((low, high), (next_low, next_high))) in words.as_chunks_mut::<2>().0.iter_mut().zip(lanes) {
            *pair = [word(*low, *high), word(*next_low, *next_high)];
        }
    } else {
        for (one, (low, high)) in words.iter_mut().zip(low.iter().zip(high)) {
            *one = word(*low, *high);
        }
    }
}

/// Words of a row of grey, which is of full range.
#[inline(always)]
pub(super) fn grey(row: &[u8], words: &mut [u8]) {
    for (word, &y) in words.as_chunks_mut::<4>().0.iter_mut().zip(row) {
        *word = ((u32::from(y) * 0x01_01_01) | 0xff00_0000).to_le_bytes();
    }
}
