//! The predictor against a slow twin that follows the description pixel by pixel, and vkms's own test colours.

use proptest::prelude::*;

use super::*;
use crate::format::{Pixels, Raw};

/// One bit after the other, as CRC-32 is defined, reflected, from 0 and not inverted.
fn slow_crc(bytes: impl IntoIterator<Item = u8>) -> u32 {
    bytes.into_iter().fold(0, |crc, byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 })
    })
}

/// 32.32 times 32.32, with the bits that the kernel's `s64` loses.
fn slow_mul(a: i64, b: i64) -> i64 {
    let bits = |value: i64| (1..63).rev().find(|&i| (value >> i) & 1 != (value >> 63) & 1).unwrap_or(0);
    let lost = (bits(a) + bits(b) - 61).max(0);
    let cut = |value: i64, bits: i32| i128::from(value).div_euclid(1 << bits);
    let product = cut(a, lost - lost / 2) * cut(b, lost / 2) * (1 << lost);
    i64::try_from(product.div_euclid(1 << 32)).unwrap()
}

fn slow_round(value: i64) -> u16 {
    u16::try_from((i128::from(value) + (1 << 31)).div_euclid(1 << 32).clamp(0, 0xffff)).unwrap()
}

/// Rows are factors of Y, U and V; the last number is black.
fn slow_yuv(yuv: [u16; 3], colour: Colour) -> [u16; 3] {
    let m = Matrix::of(colour);
    let rows = [[m.y, 0, m.v_r], [m.y, m.u_g, m.v_g], [m.y, m.u_b, 0]];
    let offsets = [m.black * 257, 128 * 257, 128 * 257];
    rows.map(|factors| {
        let terms = (0..3).map(|i| slow_mul(factors[i], (i64::from(yuv[i]) - offsets[i]) << 32));
        slow_round(terms.sum())
    })
}

/// Alpha, red, green and blue of a pixel in 16 bits.
fn slow_pixel(layout: &Layout, memory: &[u8], x: u32, y: u32) -> (u16, [u16; 3]) {
    if layout.format().name().to_string() == "P010" {
        let sample = |plane: usize, row: u32, index: u32| {
            let place = layout.planes()[plane];
            let at = (place.offset + place.stride * row + 2 * index) as usize;
            u16::from_le_bytes([memory[at], memory[at + 1]])
        };
        let (row, first) = (y / 2, x / 2 * 2);
        let yuv = [sample(0, y, x), sample(1, row, first), sample(1, row, first + 1)];
        return (0xffff, slow_yuv(yuv, layout.colour()));
    }
    match Pixels::at(layout, &[memory], y).raw(x) {
        Raw::Rgb { values, widths: [8, 8, 8], alpha } => {
            (alpha.map_or(0xffff, |(alpha, _)| alpha * 257), values.map(|value| value * 257))
        }
        Raw::Rgb { values, widths, .. } => {
            let scaled = |i: usize| {
                let ratio = (65535i64 << 32) / ((1 << widths[i]) - 1);
                slow_round(slow_mul(i64::from(values[i]) << 32, ratio))
            };
            (0xffff, [scaled(0), scaled(1), scaled(2)])
        }
        Raw::Yuv { y, u, v, .. } => (0xffff, slow_yuv([y, u, v].map(|value| value * 257), layout.colour())),
        Raw::Hsv { .. } | Raw::Bayer { .. } => unreachable!("no display shows them"),
    }
}

fn slow(mode: (u32, u32), layout: &Layout, at: (i32, i32), memory: &[u8]) -> u32 {
    let mut bytes = Vec::new();
    for (y, x) in (0..mode.1).flat_map(|y| (0..mode.0).map(move |x| (y, x))) {
        let place = |position: u32, at: i32, len: u32| {
            u32::try_from(i64::from(position) - i64::from(at))
                .ok()
                .filter(|&place| place < len)
        };
        let mut out = [0u16; 3];
        if let (Some(x), Some(y)) = (place(x, at.0, layout.width()), place(y, at.1, layout.height())) {
            let (alpha, colour) = slow_pixel(layout, memory, x, y);
            let blend = |(source, under): (u16, u16)| {
                let sum = u32::from(source) * 0xffff + u32::from(under) * u32::from(0xffff - alpha);
                u16::try_from((sum + 0x7fff) / 0xffff).unwrap()
            };
            out = [(colour[0], out[0]), (colour[1], out[1]), (colour[2], out[2])].map(blend);
        }
        bytes.extend([0xffff, out[0], out[1], out[2]].map(u16::to_le_bytes).concat());
    }
    slow_crc(bytes)
}

fn fast(predictor: &mut Predictor, layout: &Layout, memory: &[u8]) -> u32 {
    predictor.crc(&mut |plane, row, out| {
        let place = layout.planes()[plane];
        let start = (place.offset + place.stride * row) as usize;
        out.copy_from_slice(&memory[start..start + out.len()]);
    })
}

fn format(name: &str) -> Format {
    Format::parse(name).unwrap().0
}

fn colours() -> impl Strategy<Value = Colour> {
    let encoding = prop_oneof![Just(Encoding::Bt601), Just(Encoding::Bt709), Just(Encoding::Bt2020)];
    let range = prop_oneof![Just(Range::Limited), Just(Range::Full)];
    (encoding, range).prop_map(|(encoding, range)| Colour { encoding, range })
}

#[test]
fn the_crc_is_the_kernels() {
    // Linux's `crc32_le(0, …)` has no inversions: CRC-32/JAMCRC started at 0.
    let mut sum = Hasher::new_with_initial(u32::MAX);
    sum.update(b"123456789");
    assert_eq!(!sum.finalize(), slow_crc(*b"123456789"));
    assert_eq!(slow_crc(*b"123456789"), 0x2dfd_2d88);
}

#[test]
fn releases() {
    assert_eq!(Flavour::from_release("6.12.107+deb13-amd64"), Some(Flavour::V6_12));
    assert_eq!(Flavour::from_release("6.12-rc3"), Some(Flavour::V6_12));
    assert_eq!(Flavour::from_release("6.16.0"), Some(Flavour::V7_2));
    assert_eq!(Flavour::from_release("7.2.12+deb13-amd64"), Some(Flavour::V7_2));
    for unread in ["7.3.0", "8.0.1", "6.1.192", "5.10.0-9-amd64", "six", ""] {
        assert_eq!(Flavour::from_release(unread), None, "{unread}");
    }
}

#[test]
fn what_vkms_does_not_show_is_refused() {
    let new = |flavour, name, mode| {
        let layout = Layout::packed(format(name), (4, 4), 16).unwrap();
        Predictor::new(flavour, mode, &layout, (0, 0)).map(|_| ())
    };
    for name in ["XR24", "AR24", "RG16"] {
        assert_eq!(new(Flavour::V6_12, name, (8, 8)), Ok(()));
    }
    for name in ["NV12", "RG24", "XB24"] {
        let refused = Unpredictable::Format { format: format(name), flavour: Flavour::V6_12 };
        assert_eq!(new(Flavour::V6_12, name, (8, 8)), Err(refused));
        assert_eq!(new(Flavour::V7_2, name, (8, 8)), Ok(()));
    }
    for name in ["YUYV", "GREY", "XR15", "RX24"] {
        assert!(matches!(new(Flavour::V7_2, name, (8, 8)), Err(Unpredictable::Format { .. })));
    }
    assert_eq!(new(Flavour::V7_2, "XR24", (0, 8)), Err(Unpredictable::Mode(0, 8)));
    let tiled = Modifier::from_drm(1);
    let layout = Layout::packed(format("XR24"), (4, 4), 16).unwrap().with_modifier(tiled);
    let refused = Predictor::new(Flavour::V7_2, (8, 8), &layout, (0, 0)).err();
    assert_eq!(refused, tiled.map(Unpredictable::Modifier));
}

#[test]
fn a_picture_beside_the_mode_leaves_it_black() {
    let layout = Layout::packed(format("NV12"), (4, 4), 16).unwrap();
    let black = slow_crc(BLACK.repeat(6 * 5));
    for at in [(6, 0), (-4, 0), (0, 5), (0, -4), (i32::MIN, i32::MAX), (i32::MAX, i32::MIN)] {
        let mut predictor = Predictor::new(Flavour::V7_2, (6, 5), &layout, at).unwrap();
        assert_eq!(predictor.crc(&mut |_, _, _| unreachable!()), black, "{at:?}");
    }
}

/// The colours of `vkms_format_test.c`, with its tolerance: the numbers there were made by another tool.
#[test]
fn colours_of_vkms_own_tests() {
    use Encoding::{Bt601, Bt709, Bt2020};
    use Range::{Full, Limited};
    const RGB: [[u16; 3]; 6] = [[0xffff; 3], [0x8080; 3], [0; 3], [0xffff, 0, 0], [0, 0xffff, 0], [0, 0, 0xffff]];
    let greys = |range| match range {
        Full => [[0xffff, 0x8000, 0x8000], [0x8080, 0x8000, 0x8000], [0x0000, 0x8000, 0x8000]],
        Limited => [[0xeb00, 0x8000, 0x8000], [0x7dee, 0x8000, 0x8000], [0x1000, 0x8000, 0x8000]],
    };
    let cases = [
        (Bt601, Full, [[0x4c8b, 0x54ce, 0xffff], [0x9645, 0x2b33, 0x14d1], [0x1d2f, 0xffff, 0x6b2f]]),
        (Bt601, Limited, [[0x517b, 0x5a34, 0xf000], [0x908e, 0x35cc, 0x2237], [0x28f7, 0xf000, 0x6dc9]]),
        (Bt709, Full, [[0x366d, 0x62ac, 0xffff], [0xb717, 0x1d55, 0x0bbd], [0x127c, 0xffff, 0x7443]]),
        (Bt709, Limited, [[0x3e8f, 0x6656, 0xf000], [0xaca1, 0x29aa, 0x1a45], [0x1fd0, 0xf000, 0x75bb]]),
        (Bt2020, Full, [[0x4340, 0x5c41, 0xffff], [0xad91, 0x23bf, 0x0a4c], [0x0f2e, 0xffff, 0x75b5]]),
        (Bt2020, Limited, [[0x4988, 0x60b9, 0xf000], [0xa47b, 0x2f47, 0x1902], [0x1cfd, 0xf000, 0x76fe]]),
    ];
    for (encoding, range, primaries) in cases {
        let colour = Colour { encoding, range };
        let mut yuv = Yuv::new(format("P010"), 1, colour);
        for (sample, expected) in greys(range).into_iter().chain(primaries).zip(RGB) {
            let bytes = |values: &[u16]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>();
            let mut out = [0; PIXEL];
            yuv.chroma(&[bytes(&sample[1..]), Vec::new()]);
            yuv.convert(&bytes(&sample[..1]), &mut out);
            let got = [2, 4, 6].map(|i| u16::from_le_bytes([out[i], out[i + 1]]));
            assert!(
                got.iter().zip(expected).all(|(got, expected)| got.abs_diff(expected) <= 0x1ff),
                "{colour}: {got:x?}"
            );
        }
    }
}

proptest! {
    #[test]
    fn products_lose_the_same_bits(a in any::<i64>(), b in any::<i64>(), down in 0u32..63, far in 32u32..63) {
        // 93 bits are what the kernel's arithmetic can bring back into 64.
        let (a, b) = (a >> down, b >> far);
        prop_assert_eq!(mul(a, b), slow_mul(a, b));
        prop_assert_eq!(mul(b, a), slow_mul(b, a));
    }

    #[test]
    fn fast_and_slow_agree(
        index in 0..Format::all().len(),
        (mode, size) in ((1u32..24, 1u32..12), (1u32..24, 1u32..12)),
        at in (-25i32..25, -13i32..13),
        colour in colours(),
        seed in any::<u32>(),
    ) {
        let format = Format::all().nth(index).unwrap();
        let layout = Layout::packed(format, size, 16).unwrap().with_colour(colour);
        let Ok(mut predictor) = Predictor::new(Flavour::V7_2, mode, &layout, at) else { return Ok(()) };
        let mut state = seed | 1;
        for _ in 0..2 {
            let mut memory = vec![0; layout.memory_len(0)];
            memory.fill_with(|| {
                (state, _) = state.overflowing_mul(747_796_405);
                state.to_be_bytes()[0]
            });
            prop_assert_eq!(fast(&mut predictor, &layout, &memory), slow(mode, &layout, at, &memory), "{}", layout);
        }
    }
}
