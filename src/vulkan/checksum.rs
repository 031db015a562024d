//! The checksum of a picture, by the CPU: the same arithmetic as in `shaders/checksum.wgsl`.

use super::formats::{GpuFormat, Texel};
use crate::format::Layout;

/// Tells the planes of a picture apart, so that exchanged ones show.
pub(super) fn salt(place: usize) -> u32 {
    u32::try_from(place).unwrap_or(0).wrapping_mul(0x9e37_79b9)
}

/// A bijection on 32 bits in which every bit of the input moves about half of those of the output.
fn mix(mut hash: u32) -> u32 {
    hash = (hash ^ (hash >> 16)).wrapping_mul(0x7feb_352d);
    hash = (hash ^ (hash >> 15)).wrapping_mul(0x846c_a68b);
    hash ^ (hash >> 16)
}

/// The part of one texel at `place`. Another value in the lower two channels alone, or in the upper two alone, gives another part.
fn part(place: u32, channels: [u32; 4]) -> u32 {
    let [red, green, blue, alpha] = channels;
    mix(mix(mix(place) ^ (red | (green << 16))) ^ (blue | (alpha << 16)))
}

/// What the GPU must report for a picture, whose rows `row` copies out: colour plane, row, and where to.
pub(super) fn predict(
    format: &GpuFormat,
    layout: &Layout,
    scratch: &mut Vec<u8>,
    row: &mut dyn FnMut(usize, u32, &mut [u8]),
) -> u32 {
    let mut sum = 0u32;
    for (index, plane) in format.planes().enumerate() {
        let bytes = layout.format().row_bytes(plane.plane, layout.width());
        scratch.resize(bytes as usize, 0);
        let width = bytes / plane.texel.bytes;
        for y in 0..layout.format().rows(plane.plane, layout.height()) {
            row(plane.plane, y, scratch);
            let first = y.wrapping_mul(width).wrapping_add(salt(index));
            sum = sum.wrapping_add(of_row(plane.texel, first, scratch));
        }
    }
    sum
}

fn of_row(texel: Texel, first: u32, row: &[u8]) -> u32 {
    let words = row.chunks_exact(texel.bytes as usize);
    let mut sum = 0u32;
    for (x, bytes) in (0u32..).zip(words) {
        let word = bytes.iter().rev().fold(0u32, |word, &byte| (word << 8) | u32::from(byte));
        let channels = texel
            .channels
            .map(|channel| channel.map_or(0, |(shift, width)| (word >> shift) & ((1 << width) - 1)));
        sum = sum.wrapping_add(part(first.wrapping_add(x), channels));
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::Format;
    use proptest::prelude::*;

    fn checksum(name: &str, size: (u32, u32), picture: &[Vec<u8>]) -> u32 {
        let format = Format::parse(name).unwrap().0;
        let layout = Layout::packed(format, size, 1).unwrap();
        let gpu = GpuFormat::of(format).unwrap();
        predict(&gpu, &layout, &mut Vec::new(), &mut |plane, row, out| {
            let start = out.len() * row as usize;
            out.copy_from_slice(&picture[plane][start..start + out.len()]);
        })
    }

    fn random(name: &str, (width, height): (u32, u32), seed: u32) -> Vec<Vec<u8>> {
        let format = Format::parse(name).unwrap().0;
        let bytes = |plane| format.row_bytes(plane, width) * format.rows(plane, height);
        let byte = |plane, at| mix(seed ^ salt(plane) ^ at).to_le_bytes()[0];
        (0..format.planes())
            .map(|plane| (0..bytes(plane)).map(|at| byte(plane, at)).collect())
            .collect()
    }

    proptest! {
        /// In every byte that counts: that of padding between the channels does not.
        #[test]
        fn a_changed_byte_shows(seed: u32, plane in 0usize..3, at in 0usize..24, flip in 1u8..) {
            for name in ["AR24", "NV12", "YU12", "RG24", "RG16", "GREY"] {
                let mut picture = random(name, (6, 4), seed);
                let before = checksum(name, (6, 4), &picture);
                let plane = plane % picture.len();
                let at = at % picture[plane].len();
                picture[plane][at] ^= flip;
                prop_assert_ne!(checksum(name, (6, 4), &picture), before, "{} plane {} byte {}", name, plane, at);
            }
        }
    }

    #[test]
    fn what_means_nothing_does_not_count() {
        let mut picture = random("XR24", (4, 4), 1);
        let before = checksum("XR24", (4, 4), &picture);
        picture[0][3] ^= 0xff;
        assert_eq!(checksum("XR24", (4, 4), &picture), before);
        assert_ne!(checksum("AR24", (4, 4), &picture), before);
    }

    #[test]
    fn exchanged_pixels_rows_and_planes_show() {
        let picture = random("YU12", (4, 4), 7);
        let before = checksum("YU12", (4, 4), &picture);
        let mut other = picture.clone();
        other.swap(1, 2);
        assert_ne!(checksum("YU12", (4, 4), &other), before);
        // Vulkan has the chroma planes of YV12 the other way round.
        assert_eq!(checksum("YV12", (4, 4), &other), before);
        let mut other = picture.clone();
        other[0].swap(0, 1);
        assert_ne!(checksum("YU12", (4, 4), &other), before);
        let mut other = picture;
        other[0].rotate_left(4);
        assert_ne!(checksum("YU12", (4, 4), &other), before);
    }
}
