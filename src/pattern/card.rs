//! The picture: SMPTE bars, a block that moves, and the frame's number.
//!
//! ```text
//!   grey  yellow  cyan  green  magenta  red  blue     bars of 75 %, two thirds of the height
//!   blue  black  magenta  black  cyan  black  grey    a twelfth
//!   ▒▒▒▒▒▒▒▒▒▒▒▒▒▒ white block on black ▒▒▒▒▒▒▒▒▒▒    the track, a twelfth
//!   -I   white  [ number, white on black ]  +Q  black a sixth
//! ```
//!
//! Everything that moves is black or white, and all edges lie at even columns and rows. Black and white have the same
//! chroma, so a new frame only touches colour plane 0, and in it only the block, its old place, and changed digits.

use std::ops::Range;

use crate::format::{Format, Layout, MAX_PLANES, PixelsMut, Rgb};
use crate::memory::Mapping;

use super::font;

/// The smallest picture that the number and the moving block fit in.
pub(super) const MIN_SIZE: (u32, u32) = (64, 48);

/// Digits of the frame's number that are drawn; those before them are cut.
pub(super) const DIGITS: usize = 8;

/// The bars from left to right.
pub(super) const BARS: [Rgb; 7] = [GREY, YELLOW, CYAN, GREEN, MAGENTA, RED, BLUE];

const GREY: Rgb = Rgb::new(191, 191, 191);
const YELLOW: Rgb = Rgb::new(191, 191, 0);
const CYAN: Rgb = Rgb::new(0, 191, 191);
const GREEN: Rgb = Rgb::new(0, 191, 0);
const MAGENTA: Rgb = Rgb::new(191, 0, 191);
const RED: Rgb = Rgb::new(191, 0, 0);
const BLUE: Rgb = Rgb::new(0, 0, 191);
const BLACK: Rgb = Rgb::new(0, 0, 0);
const WHITE: Rgb = Rgb::new(255, 255, 255);
const MINUS_I: Rgb = Rgb::new(0, 33, 76);
const PLUS_Q: Rgb = Rgb::new(50, 0, 106);

/// A test card for one layout: all that is computed once.
#[derive(Debug)]
pub(super) struct Card {
    layout: Layout,
    bands: [Band; 4],
    block: Block,
    number: Number,
}

/// Rows that all look the same.
#[derive(Debug)]
struct Band {
    rows: Range<u32>,
    /// The bytes of one row, for each colour plane.
    bytes: [Vec<u8>; MAX_PLANES],
}

/// What moves along the track.
#[derive(Debug)]
struct Block {
    rows: Range<u32>,
    /// Pixels from one position to the next, and how many positions there are.
    step: u32,
    positions: u32,
    /// The bytes of one of its rows, and of as much empty track.
    white: Vec<u8>,
    black: Vec<u8>,
}

/// Where the number is.
#[derive(Debug)]
struct Number {
    left: u32,
    top: u32,
    /// Pixels a dot.
    scale: u32,
    /// The bytes of one row of dots of one digit, [`font::ROWS`] for each digit.
    dots: Vec<Vec<u8>>,
}

/// A buffer's memory to draw in, and what is drawn there now.
#[derive(Debug)]
pub(super) struct Canvas {
    mapping: Mapping,
    block: u32,
    digits: [u8; DIGITS],
}

impl Card {
    /// Computes the card for a layout of at least [`MIN_SIZE`].
    pub(super) fn new(layout: Layout) -> Card {
        let (width, height) = layout.size();
        // From the left: each colour with the column where it ends.
        let seventh = |i: usize| even(u64::from(width) * (i as u64 + 1) / 7);
        let band = |rows, colours: &[(u32, Rgb)]| Band { rows, bytes: row(&layout, width, colours) };
        let bars = |colours: [Rgb; 7]| -> Vec<(u32, Rgb)> {
            colours
                .into_iter()
                .enumerate()
                .map(|(i, rgb)| (if i == 6 { width } else { seventh(i) }, rgb))
                .collect()
        };
        let twelfth = |i: u64| even(u64::from(height) * i / 12);
        let number = Number::new(&layout, twelfth(10)..height);
        // The black field is two dots wider on the left, and the last cell's gap on the right.
        let left = number.left - 2 * number.scale;
        let right = number.left + DIGITS as u32 * font::CELL * number.scale;
        let foot = [
            (even(u64::from(left) / 2), MINUS_I),
            (left, WHITE),
            (right, BLACK),
            (even(u64::from(right).midpoint(width.into())), PLUS_Q),
            (width, BLACK),
        ];
        Card {
            bands: [
                band(0..twelfth(8), &bars(BARS)),
                band(twelfth(8)..twelfth(9), &bars([BLUE, BLACK, MAGENTA, BLACK, CYAN, BLACK, GREY])),
                band(twelfth(9)..twelfth(10), &[(width, BLACK)]),
                band(twelfth(10)..height, &foot),
            ],
            block: Block::new(&layout, twelfth(9)..twelfth(10)),
            number,
            layout,
        }
    }

    /// Draws all of frame 0 into a buffer's memory.
    pub(super) fn begin(&self, mut mapping: Mapping) -> Canvas {
        let format = self.layout.format();
        for (plane, place) in self.layout.planes().iter().enumerate() {
            let vertical = if plane == 0 { 1 } else { format.subsampling().1 };
            for band in &self.bands {
                // A chroma row belongs to the first of the rows that share it. Bands start at even rows.
                for line in band.rows.start / vertical..band.rows.end.div_ceil(vertical) {
                    mapping.write(place.offset as usize + place.stride as usize * line as usize, &band.bytes[plane]);
                }
            }
        }
        let mut canvas = Canvas { mapping, block: self.block.left(0), digits: [0; DIGITS] };
        self.draw_block(&mut canvas.mapping, canvas.block, &self.block.white);
        for place in 0..DIGITS {
            self.draw_digit(&mut canvas.mapping, place, 0);
        }
        canvas
    }

    /// Makes frame `sequence` of whatever frame the canvas shows.
    pub(super) fn draw(&self, canvas: &mut Canvas, sequence: u32) {
        let left = self.block.left(sequence);
        if left != canvas.block {
            self.draw_block(&mut canvas.mapping, canvas.block, &self.block.black);
            self.draw_block(&mut canvas.mapping, left, &self.block.white);
            canvas.block = left;
        }
        let mut rest = sequence;
        for place in (0..DIGITS).rev() {
            // Less than 10.
            let digit = (rest % 10) as u8;
            rest /= 10;
            if canvas.digits[place] != digit {
                self.draw_digit(&mut canvas.mapping, place, digit);
                canvas.digits[place] = digit;
            }
        }
    }

    /// Left and top of the number, and pixels a dot.
    #[cfg(test)]
    pub(super) fn number(&self) -> (u32, u32, u32) {
        (self.number.left, self.number.top, self.number.scale)
    }

    fn draw_block(&self, mapping: &mut Mapping, left: u32, bytes: &[u8]) {
        for y in self.block.rows.clone() {
            mapping.write(self.at(left, y), bytes);
        }
    }

    fn draw_digit(&self, mapping: &mut Mapping, place: usize, digit: u8) {
        let Number { left, top, scale, dots } = &self.number;
        let x = left + place as u32 * font::CELL * scale;
        let rows = dots
            .iter()
            .skip(usize::from(digit) * font::ROWS as usize)
            .take(font::ROWS as usize);
        for (i, bytes) in (0u32..).zip(rows) {
            for y in 0..*scale {
                mapping.write(self.at(x, top + i * scale + y), bytes);
            }
        }
    }

    /// Where pixel `x`, an even column, of row `y` is in colour plane 0.
    fn at(&self, x: u32, y: u32) -> usize {
        let place = self.layout.planes().first().copied().unwrap_or_default();
        let row = place.offset as usize + place.stride as usize * y as usize;
        row + self.layout.format().row_bytes(0, x) as usize
    }
}

impl Block {
    fn new(layout: &Layout, rows: Range<u32>) -> Block {
        let width = layout.width();
        let size = even(u64::from(width) / 10).max(8);
        let step = even(u64::from(width) / 100).max(2);
        let [white, black] = [WHITE, BLACK].map(|rgb| luma(layout, size, &[(size, rgb)]));
        Block { rows, step, positions: (width - size) / step + 1, white, black }
    }

    /// The column where it starts in frame `sequence`: another one than in the frame before.
    fn left(&self, sequence: u32) -> u32 {
        sequence % self.positions * self.step
    }
}

impl Number {
    fn new(layout: &Layout, band: Range<u32>) -> Number {
        let height = band.end - band.start;
        // Half the width at most, and a dot's height of room above and below together.
        let scale = (height / (font::ROWS + 1))
            .min(layout.width() / 2 / (DIGITS as u32 * font::CELL))
            .max(1);
        let width = font::CELL * scale;
        let row_of_dots = |digit: u8, row: u32| {
            let mut ends: Vec<_> = (0..font::CELL)
                .map(|column| ((column + 1) * scale, if font::dot(digit, column, row) { WHITE } else { BLACK }))
                .collect();
            ends.dedup_by(|next, last| {
                next.1 == last.1 && {
                    last.0 = next.0;
                    true
                }
            });
            luma(layout, width, &ends)
        };
        Number {
            left: even(u64::from(layout.width() - DIGITS as u32 * width) / 2),
            top: band.start + (height - font::ROWS * scale) / 2,
            scale,
            dots: (0..10)
                .flat_map(|digit| (0..font::ROWS).map(move |row| (digit, row)))
                .map(|(d, r)| row_of_dots(d, r))
                .collect(),
        }
    }
}

/// The bytes of `width` pixels in each colour plane: each colour up to the column that is given with it.
fn row(layout: &Layout, width: u32, colours: &[(u32, Rgb)]) -> [Vec<u8>; MAX_PLANES] {
    let format: Format = layout.format();
    let mut bytes: [Vec<u8>; MAX_PLANES] = Default::default();
    for (plane, bytes) in bytes.iter_mut().enumerate().take(format.planes()) {
        bytes.resize(format.row_bytes(plane, width) as usize, 0);
    }
    let mut pixels = PixelsMut::new(format, bytes.iter_mut().map(Vec::as_mut_slice));
    let mut start = 0;
    for &(end, rgb) in colours {
        pixels.fill(start..end, rgb, layout.colour());
        start = end;
    }
    bytes
}

/// The same in colour plane 0 alone.
fn luma(layout: &Layout, width: u32, colours: &[(u32, Rgb)]) -> Vec<u8> {
    let [bytes, ..] = row(layout, width, colours);
    bytes
}

/// The next even number down. Only used for parts of a picture's size, which is a `u32`.
fn even(value: u64) -> u32 {
    u32::try_from(value & !1).unwrap_or(u32::MAX - 1)
}
