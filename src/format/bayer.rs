//! From one sample a pixel to three.

use super::{Format, Kind, Pixels, Rgb};

/// The colour of pixel `x` in row `y` of a Bayer picture of `width` pixels, each channel the mean of its samples among the nine around the
/// pixel, or the pixel's own; `None` for other formats. `rows` are the row above, the row itself and the row below; at the picture's edge
/// the one of them that is there takes the other's place.
pub fn demosaic(format: Format, rows: &[Pixels<'_>; 3], (x, y): (u32, u32), width: u32) -> Option<Rgb> {
    let Kind::Bayer { red: [column, row], bits } = format.kind() else { return None };
    let (right, below) = ((x ^ u32::from(column)) & 1, (y ^ u32::from(row)) & 1);
    // Mirrored at the edge, where the colours are as they would be outside. A picture of one column has no other.
    let left = if x == 0 { 1 } else { x - 1 };
    let next = if x + 1 < width { x + 1 } else { x.saturating_sub(1) };
    let columns = [left.min(width.saturating_sub(1)), x, next];
    let [mut sums, mut counts] = [[0u32; 3]; 2];
    for (line, pixels) in rows.iter().enumerate() {
        for (place, &column) in columns.iter().enumerate() {
            // Red where both are even as seen from red, blue where both are odd.
            let (odd_column, odd_row) = ((right as usize + place + 1) & 1, (below as usize + line + 1) & 1);
            let channel = odd_column + odd_row;
            let own = (line, place) == (1, 1);
            let weight = if own { 1 << 16 } else { 1 };
            sums[channel] = sums[channel].saturating_add(u32::from(pixels.level(column, bits)) * weight);
            counts[channel] += weight;
        }
    }
    let channel =
        |index: usize| u8::try_from((sums[index] + counts[index] / 2) / counts[index].max(1)).unwrap_or(u8::MAX);
    Some(Rgb::new(channel(0), channel(1), channel(2)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One colour all over comes back as that colour everywhere, edges and corners included, from each order and depth.
    #[test]
    fn one_colour_stays() {
        let colour = [200u8, 90, 30];
        for format in Format::all() {
            let Kind::Bayer { red, bits } = format.kind() else { continue };
            for (width, height) in [(6u32, 6u32), (5, 3), (2, 2)] {
                let row = |y: u32| {
                    let sample = |x: u32| {
                        let channel = ((x ^ u32::from(red[0])) & 1) + ((y ^ u32::from(red[1])) & 1);
                        let value = u16::from(colour[channel as usize]);
                        match bits {
                            8 => vec![value as u8],
                            _ => (value << (bits - 8)).to_le_bytes().to_vec(),
                        }
                    };
                    (0..width).flat_map(sample).collect::<Vec<u8>>()
                };
                for y in 0..height {
                    let above = row(if y == 0 { 1 } else { y - 1 });
                    let below = row(if y + 1 < height { y + 1 } else { y - 1 });
                    let (above, own, below) = (&above[..], &row(y)[..], &below[..]);
                    let rows = [above, own, below].map(|row| Pixels::new(format, &[row]));
                    for x in 0..width {
                        let got = demosaic(format, &rows, (x, y), width).unwrap();
                        assert_eq!([got.r, got.g, got.b], colour, "{format} ({x}, {y}) of {width}x{height}");
                    }
                }
            }
        }
        let grey = Format::parse("GREY").unwrap().0;
        assert_eq!(demosaic(grey, &[Pixels::new(grey, &[]); 3], (0, 0), 1), None);
    }
}
