//! RGB pixels to and from words of blue, green, red and alpha, the first in the lowest byte.

use crate::format::{Bits, Format, Kind};

/// How pixels of a format become words.
#[derive(Clone, Debug)]
pub(super) struct Decode {
    shape: Shape,
    /// Red and blue change places.
    swap: bool,
    /// There is no alpha: the word gets all ones.
    opaque: bool,
}

/// How words become pixels of a format.
#[derive(Clone, Debug)]
pub(super) struct Encode {
    shape: Shape,
    red_first: bool,
}

#[derive(Clone, Debug)]
enum Shape {
    /// Alpha, or nothing, in the highest byte.
    High,
    /// Alpha, or nothing, in the lowest byte.
    Low,
    /// Three bytes.
    Three,
    /// Words of two bytes: blue, green, red and, where there is one, alpha.
    Two([Bits; 3], Option<Bits>),
}

fn shape(format: Format) -> Option<(Shape, bool, bool)> {
    let Kind::Rgb { channels: [red, green, blue], alpha } = format.kind() else { return None };
    if format.is_big_endian() {
        return None;
    }
    let opaque = alpha.is_none();
    let byte = |bits: Bits| (bits.width == 8 && bits.shift.is_multiple_of(8)).then_some(bits.shift / 8);
    let places = || Some([byte(red)?, byte(green)?, byte(blue)?]);
    match (format.row_bytes(0, 1), places()) {
        (4, Some([2, 1, 0])) => Some((Shape::High, false, opaque)),
        (4, Some([0, 1, 2])) => Some((Shape::High, true, opaque)),
        (4, Some([3, 2, 1])) => Some((Shape::Low, false, opaque)),
        (4, Some([1, 2, 3])) => Some((Shape::Low, true, opaque)),
        (3, Some([2, 1, 0])) => Some((Shape::Three, false, true)),
        (3, Some([0, 1, 2])) => Some((Shape::Three, true, true)),
        (2, _) => Some((Shape::Two([blue, green, red], alpha), false, opaque)),
        _ => None,
    }
}

impl Decode {
    /// For words that have red in the lowest byte if `red_first`.
    pub(super) fn of(format: Format, red_first: bool) -> Option<Decode> {
        let (shape, has_red_first, opaque) = shape(format)?;
        Some(Decode { shape, swap: has_red_first != red_first, opaque })
    }

    /// Makes words of a row.
    #[inline(always)]
    pub(super) fn row(&self, row: &[u8], words: &mut [u8]) {
        let alpha = if self.opaque { 0xff00_0000 } else { 0 };
        let words = words.as_chunks_mut::<4>().0;
        match &self.shape {
            Shape::High => {
                for (word, pixel) in words.iter_mut().zip(row.as_chunks::<4>().0) {
                    *word = (u32::from_le_bytes(*pixel) | alpha).to_le_bytes();
                }
            }
            Shape::Low => {
                for (word, pixel) in words.iter_mut().zip(row.as_chunks::<4>().0) {
                    *word = (u32::from_le_bytes(*pixel).rotate_right(8) | alpha).to_le_bytes();
                }
            }
            Shape::Three => {
                for (word, [first, green, third]) in words.iter_mut().zip(row.as_chunks::<3>().0) {
                    *word = [*first, *green, *third, 0xff];
                }
            }
            Shape::Two(channels, has_alpha) => {
                let channels = channels.map(Widen::new);
                let has_alpha = has_alpha.map_or(Widen::ONES, Widen::new);
                for (word, pixel) in words.iter_mut().zip(row.as_chunks::<2>().0) {
                    let pixel = u32::from(u16::from_le_bytes(*pixel));
                    let [blue, green, red] = channels.map(|channel| channel.of(pixel));
                    *word = (blue | green << 8 | red << 16 | has_alpha.of(pixel) << 24).to_le_bytes();
                }
            }
        }
        if self.swap {
            swap(words);
        }
    }
}

impl Encode {
    pub(super) fn of(format: Format) -> Option<Encode> {
        let (shape, red_first, _) = shape(format)?;
        Some(Encode { shape, red_first })
    }

    /// Whether the words are best made with red in the lowest byte.
    pub(super) fn red_first(&self) -> bool {
        self.red_first
    }

    /// Makes pixels of a row of words, which have red first if the format does.
    #[inline(always)]
    pub(super) fn row<'a>(&self, words: &'a mut [u8], done: &'a mut [u8]) -> &'a [u8] {
        match &self.shape {
            Shape::High => return words,
            Shape::Low => {
                for (pixel, word) in done.as_chunks_mut::<4>().0.iter_mut().zip(words.as_chunks::<4>().0) {
                    *pixel = u32::from_le_bytes(*word).rotate_left(8).to_le_bytes();
                }
            }
            Shape::Three => {
                for (pixel, [first, green, third, _]) in
                    done.as_chunks_mut::<3>().0.iter_mut().zip(words.as_chunks::<4>().0)
                {
                    *pixel = [*first, *green, *third];
                }
            }
            Shape::Two(channels, alpha) => {
                let [blue, green, red] = *channels;
                let alpha = alpha.unwrap_or(Bits { shift: 0, width: 0 });
                let used = [blue, green, red, alpha].map(|bits| ((1 << bits.width) - 1) << bits.shift);
                let unused = !used.iter().fold(0, |all, bits| all | bits);
                let narrow =
                    |value: u8, bits: Bits| ((u32::from(value) * ((1 << bits.width) - 1) + 127) / 255) << bits.shift;
                for (pixel, word) in done.as_chunks_mut::<2>().0.iter_mut().zip(words.as_chunks::<4>().0) {
                    let colour = narrow(word[0], blue) | narrow(word[1], green) | narrow(word[2], red);
                    // The upper half is `unused` alone.
                    *pixel = ((colour | narrow(word[3], alpha) | unused) as u16).to_le_bytes();
                }
            }
        }
        done
    }
}

/// Exchanges red and blue.
#[inline(always)]
pub(super) fn swap(words: &mut [[u8; 4]]) {
    for word in words {
        let value = u32::from_le_bytes(*word);
        *word = (value & 0xff00_ff00 | (value & 0xff) << 16 | (value >> 16) & 0xff).to_le_bytes();
    }
}

/// From so many bits to 8, rounded to the nearest.
#[derive(Clone, Copy)]
struct Widen {
    shift: u32,
    top: u32,
    factor: u32,
    plus: u32,
}

impl Widen {
    /// All ones, of no bits.
    const ONES: Widen = Widen { shift: 0, top: 0, factor: 0, plus: 255 << Widen::FRACTION };

    /// Enough that the error of the factor, times 255, is less than what any value is away from the middle of two results.
    const FRACTION: u32 = 20;

    fn new(bits: Bits) -> Widen {
        let top = (1 << bits.width) - 1;
        let factor = ((255 << Widen::FRACTION) + top / 2) / top;
        Widen { shift: u32::from(bits.shift), top, factor, plus: 1 << (Widen::FRACTION - 1) }
    }

    #[inline(always)]
    fn of(self, pixel: u32) -> u32 {
        ((pixel >> self.shift & self.top) * self.factor + self.plus) >> Widen::FRACTION
    }
}
