use super::*;
use crate::format::Encoding;
use proptest::prelude::*;

const FULL_601: Colour = Colour { encoding: Encoding::Bt601, range: Range::Full };
const LIMITED_601: Colour = Colour { encoding: Encoding::Bt601, range: Range::Limited };
const LIMITED_709: Colour = Colour { encoding: Encoding::Bt709, range: Range::Limited };

fn format(name: &str) -> Format {
    Format::parse(name).unwrap().0
}

fn colours() -> impl Strategy<Value = Colour> {
    let encoding = prop_oneof![Just(Encoding::Bt601), Just(Encoding::Bt709), Just(Encoding::Bt2020)];
    let range = prop_oneof![Just(Range::Limited), Just(Range::Full)];
    (encoding, range).prop_map(|(encoding, range)| Colour { encoding, range })
}

#[test]
fn known_colours_have_known_numbers() {
    let (white, red) = (Rgb::new(255, 255, 255), Rgb::new(255, 0, 0));
    assert_eq!(to_yuv(white, 8, LIMITED_601), [235, 128, 128]);
    assert_eq!(to_yuv(white, 8, FULL_601), [255, 128, 128]);
    assert_eq!(to_yuv(white, 10, LIMITED_709), [940, 512, 512]);
    assert_eq!(to_yuv(red, 8, LIMITED_601), [81, 90, 240]);
    assert_eq!(to_yuv(red, 8, FULL_601), [76, 85, 255]);
    assert_eq!(to_yuv(red, 8, LIMITED_709), [63, 102, 240]);
    assert_eq!(from_yuv([81, 90, 240], 8, LIMITED_601), Rgb::new(254, 0, 0));
    assert_eq!(from_yuv([63, 102, 240], 8, LIMITED_709), Rgb::new(255, 1, 0));
    assert_eq!(from_yuv([235, 128, 128], 8, LIMITED_709), white);
    assert_eq!(from_yuv([16, 128, 128], 8, LIMITED_709), Rgb::default());
}

#[test]
fn bytes_lie_where_the_formats_say() {
    let orange = Rgb::new(255, 128, 8);
    let word = |name| {
        let mut bytes = [0; 4];
        PixelsMut::new(format(name), [&mut bytes[..]]).set(0, orange, FULL_601);
        bytes
    };
    assert_eq!(word("XR24"), [8, 128, 255, 255]);
    assert_eq!(word("BA24"), [255, 255, 128, 8]);
    assert_eq!(word("BG24"), [255, 128, 8, 0]);
    assert_eq!(word("RG16"), [0x01, 0xfc, 0, 0]);
    let [y, u, v] = to_yuv(orange, 8, FULL_601).map(|value| value as u8);
    assert_eq!(word("UYVY"), [u, y, v, 0]);
    let (mut luma, mut chroma) = ([0; 2], [0; 2]);
    PixelsMut::new(format("NV21"), [&mut luma[..], &mut chroma[..]]).fill(0..2, orange, FULL_601);
    assert_eq!((luma, chroma), ([y, y], [v, u]));
    let (mut luma, mut chroma) = ([0; 4], [0; 4]);
    PixelsMut::new(format("P010"), [&mut luma[..], &mut chroma[..]]).fill(0..2, Rgb::new(255, 255, 255), LIMITED_709);
    assert_eq!((luma, chroma), ([0x00, 0xeb, 0x00, 0xeb], [0x00, 0x80, 0x00, 0x80]));
}

#[test]
fn raw_keeps_alpha_and_widths() {
    let row = [0x11, 0x22, 0x33, 0x44];
    let raw = Pixels::new(format("AR24"), &[&row]).raw(0);
    assert_eq!(raw, Raw::Rgb { values: [0x33, 0x22, 0x11], widths: [8; 3], alpha: Some((0x44, 8)) });
    let raw = Pixels::new(format("YVYU"), &[&row]).raw(1);
    assert_eq!(raw, Raw::Yuv { y: 0x33, u: 0x44, v: 0x22, bits: 8 });
}

#[test]
fn short_rows_are_black_and_never_a_panic() {
    for format in Format::all() {
        let mut rows = PixelsMut::new(format, []);
        rows.fill(0..5, Rgb::new(1, 2, 3), Colour::default());
        let _ = Pixels::new(format, &[&[1]]).rgb(7, Colour::default());
    }
    assert_eq!(Pixels::new(format("XR24"), &[]).rgb(u32::MAX, FULL_601), Rgb::default());
}

#[test]
fn shared_chroma_is_written_by_the_even_row() {
    let layout = Layout::packed(format("NV12"), (4, 4), 8).unwrap();
    let mut memory = vec![0; layout.memory_len(0)];
    for y in 0..4u8 {
        let mut planes = [&mut memory[..]];
        let mut row = PixelsMut::at(&layout, &mut planes, u32::from(y));
        row.fill(0..4, Rgb::new(60 * y, 0, 60 * y), FULL_601);
    }
    let [start, stride] = [layout.planes()[1].offset, layout.planes()[1].stride].map(|bytes| bytes as usize);
    assert_eq!(memory[start..start + 4], [128; 4]);
    let expected = to_yuv(Rgb::new(120, 0, 120), 8, FULL_601);
    assert_eq!(memory[start + stride..start + stride + 2], [expected[1] as u8, expected[2] as u8]);
    assert_eq!(memory[4..stride], [0; 12]);
    let row = Pixels::at(&layout, &[&memory], 2);
    assert_eq!(row.raw(3), Raw::Yuv { y: expected[0], u: expected[1], v: expected[2], bits: 8 });
}

proptest! {
    /// Of few different bytes, so that neighbours are often the same; in any order.
    #[test]
    fn one_after_the_other_they_are_the_same_colours(
        index in 0..Format::all().len(),
        bytes in prop::collection::vec(prop_oneof![Just(0u8), Just(77), Just(255)], 3 * 64),
        order in prop::collection::vec(0u32..8, 1..32),
        colour in colours(),
    ) {
        let rows: Vec<&[u8]> = bytes.chunks(64).collect();
        let pixels = Pixels::new(Format::all().nth(index).unwrap(), &rows);
        let mut next = pixels.colours(colour);
        for x in order {
            prop_assert_eq!(next(x), pixels.rgb(x, colour));
        }
    }

    /// A whole picture, through `at`, in every format: the error is no more than the format's step, and YUV's
    /// rounding of three numbers, allow.
    #[test]
    fn what_is_written_is_read(
        index in 0..Format::all().len(),
        (width, height) in (1u32..20, 1u32..8),
        channels in any::<[u8; 3]>(),
        colour in colours(),
        separate in any::<bool>(),
    ) {
        let format = Format::all().nth(index).unwrap();
        let [r, g, b] = channels;
        let grey = matches!(format.kind(), Kind::Grey | Kind::DeepGrey { .. } | Kind::Bayer { .. });
        let rgb = if grey { Rgb::new(r, r, r) } else { Rgb::new(r, g, b) };
        let strides: Vec<_> = (0..format.planes()).map(|plane| format.row_bytes(plane, width) + 3).collect();
        let layout = if separate {
            Layout::separate(format, (width, height), &strides).unwrap()
        } else {
            Layout::packed(format, (width, height), 16).unwrap()
        };
        let mut memory: Vec<Vec<u8>> =
            (0..layout.memory_planes() as u32).map(|plane| vec![0x55; layout.memory_len(plane)]).collect();
        for y in 0..height {
            let mut planes: Vec<&mut [u8]> = memory.iter_mut().map(|plane| &mut plane[..]).collect();
            PixelsMut::at(&layout, &mut planes, y).fill(0..width, rgb, colour);
        }
        let planes: Vec<&[u8]> = memory.iter().map(|plane| &plane[..]).collect();
        let limit = match format.kind() {
            Kind::Rgb { channels, .. } => channels.map(|bits| (255 / ((1u16 << bits.width) - 1) / 2) as u8),
            Kind::Grey | Kind::DeepGrey { .. } => [0; 3],
            // The lowest bits are cut off.
            Kind::Bayer { .. } => [1; 3],
            // Half a step of two degrees is up to 4 in the channel between the others; half a step of saturation.
            Kind::Hsv { .. } => [5; 3],
            // Half a step, of chroma times up to 2.1.
            Kind::YuvWord { channels, .. } => {
                let half = channels.map(|bits| (256 >> bits.width) / 2).into_iter().max().unwrap_or(0);
                [(f64::from(half) * 4.5) as u8 + 2; 3]
            }
            // Half a step of luma and half a step of chroma, the latter times up to 1.9.
            _ => [2; 3],
        };
        for (x, y) in [(0, 0), (width - 1, 0), (0, height - 1), (width - 1, height - 1), (width / 2, height / 2)] {
            let got = Pixels::at(&layout, &planes, y).rgb(x, colour);
            let apart = [got.r.abs_diff(rgb.r), got.g.abs_diff(rgb.g), got.b.abs_diff(rgb.b)];
            let near = apart.iter().zip(limit).all(|(&apart, limit)| apart <= limit);
            prop_assert!(near, "{format}: {rgb:?} {got:?}");
        }
    }
}
