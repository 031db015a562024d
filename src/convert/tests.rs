use proptest::prelude::*;

use super::*;
use crate::format::{Colour, Encoding, Kind, Pixels, PlaneLayout, Range};
use crate::frame::Buffer;
use crate::memory::{Access, Allocator};

fn format(name: &str) -> Format {
    Format::parse(name).unwrap().0
}

fn colours() -> impl Strategy<Value = Colour> {
    let encoding = prop_oneof![Just(Encoding::Bt601), Just(Encoding::Bt709), Just(Encoding::Bt2020)];
    let range = prop_oneof![Just(Range::Limited), Just(Range::Full)];
    (encoding, range).prop_map(|(encoding, range)| Colour { encoding, range })
}

/// Every pair of formats that there is a way between.
fn pairs() -> Vec<(Format, Format)> {
    Format::all()
        .flat_map(|from| Converter::targets(from).map(move |to| (from, to)))
        .collect()
}

/// Memory of a layout, with arbitrary bytes in it.
fn buffer(layout: Layout, seed: u64) -> Buffer {
    let lens: Vec<_> = (0..layout.memory_planes() as u32)
        .map(|memory| layout.memory_len(memory))
        .collect();
    let memory = lens.iter().map(|&len| Allocator::Plain.allocate(len).unwrap()).collect();
    let buffer = Buffer::new(layout, memory, &lens).unwrap();
    let mut state = seed | 1;
    for (mut mapping, len) in buffer.map(Access::ReadWrite).unwrap().into_iter().zip(lens) {
        let bytes: Vec<u8> = std::iter::repeat_with(|| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 56) as u8
        })
        .take(len)
        .collect();
        mapping.write(0, &bytes);
    }
    buffer
}

fn memory(buffer: &Buffer) -> Vec<Vec<u8>> {
    let reader = buffer.read().unwrap();
    (0..buffer.layout().memory_planes() as u32)
        .map(|plane| {
            let span = reader.memory(plane).unwrap();
            let mut bytes = vec![0; span.len()];
            span.read(0, &mut bytes);
            bytes
        })
        .collect()
}

/// Compares each pixel of `to` with what the reference says of `from`; `alpha` too, where both have it.
fn compare(from: &Buffer, to: &Buffer, step: f64) -> Result<(), TestCaseError> {
    let (source, made) = (memory(from), memory(to));
    let (source, made) =
        (source.iter().map(|m| &m[..]).collect::<Vec<_>>(), made.iter().map(|m| &m[..]).collect::<Vec<_>>());
    let (width, height) = from.layout().size();
    let colour = from.layout().colour();
    let widths = match to.layout().format().kind() {
        Kind::Rgb { channels, .. } => channels.map(|bits| bits.width),
        _ => [8; 3],
    };
    for y in 0..height {
        let (source, made) = (Pixels::at(from.layout(), &source, y), Pixels::at(to.layout(), &made, y));
        for x in 0..width {
            let (expected, got) = (source.rgb(x, colour), made.rgb(x, colour));
            let apart = [expected.r.abs_diff(got.r), expected.g.abs_diff(got.g), expected.b.abs_diff(got.b)];
            // Within one step of 8 bits, or of what the destination has where that is coarser.
            let near = std::iter::zip(apart, widths).all(|(apart, width)| {
                f64::from(apart) <= step + 0.5 * (255.0 / f64::from((1u32 << width) - 1) - 1.0) + 0.5
            });
            prop_assert!(near, "({x}, {y}) of {} as {}: {expected:?} became {got:?}", from.layout(), to.layout());
        }
    }
    Ok(())
}

/// Every Y with many U and V, in every encoding and range. Without AVX2 too, where there is AVX2.
#[test]
fn every_colour_is_within_one_step() {
    let format = format("NV16");
    for (encoding, range) in [
        (Encoding::Bt601, Range::Limited),
        (Encoding::Bt601, Range::Full),
        (Encoding::Bt709, Range::Limited),
        (Encoding::Bt709, Range::Full),
        (Encoding::Bt2020, Range::Limited),
        (Encoding::Bt2020, Range::Full),
    ] {
        let colour = Colour { encoding, range };
        let layout = Layout::separate(format, (512, 1), &[512, 512]).unwrap().with_colour(colour);
        let made = Layout::packed(super::tests::format("XR24"), (512, 1), 1).unwrap();
        for fast in [true, false] {
            let mut converter = Converter::new(&layout, &made).unwrap();
            #[cfg(target_arch = "x86_64")]
            {
                converter.avx2 &= fast;
            }
            let mut exact = 0;
            for u in (0..=255u8).step_by(if fast { 3 } else { 15 }) {
                for v in (0..=255u8).step_by(if fast { 5 } else { 15 }) {
                    let luma: Vec<u8> = (0..512).map(|x| (x / 2) as u8).collect();
                    let chroma = [u, v].repeat(256);
                    let mut read =
                        |plane: usize, _, out: &mut [u8]| out.copy_from_slice(if plane == 0 { &luma } else { &chroma });
                    let mut write = |_, _, row: &[u8]| {
                        let expected = Pixels::new(format, &[&luma, &chroma]);
                        for x in (0..512).step_by(2) {
                            let expected = expected.rgb(x, colour);
                            let [b, g, r, ones] = *row[4 * x as usize..].first_chunk().unwrap();
                            let apart = [expected.r.abs_diff(r), expected.g.abs_diff(g), expected.b.abs_diff(b)];
                            assert!(
                                ones == 255 && apart.iter().all(|&apart| apart <= 1),
                                "{colour} {x} {u} {v}: {apart:?}"
                            );
                            exact += usize::from(apart == [0; 3]);
                        }
                    };
                    converter.convert_rows(&mut read, &mut write);
                }
            }
            let all = if fast { 256 * 86 * 52 } else { 256 * 18 * 18 };
            assert!(exact * 10 > all * 8, "{colour}: only {exact} of {all} are exact");
        }
    }
}

#[test]
fn the_same_format_is_first_and_every_target_can_be_made() {
    for from in Format::all() {
        let targets: Vec<_> = Converter::targets(from).collect();
        assert_eq!(targets[0], from);
        // Big-endian words, and those of less than two bytes; grey and YUV of unusual depths; HSV; Bayer: for pictures alone.
        assert!(targets.len() == 1 || targets.len() > 10, "{from}: {targets:?}");
        for to in targets {
            let [from, to] = [from, to].map(|format| Layout::packed(format, (7, 5), 1).unwrap());
            Converter::new(&from, &to).unwrap();
        }
    }
    for usual in ["XR24", "RG16", "XB12", "NV12", "YU12", "YUYV", "VYUY", "P010", "GREY"] {
        assert!(Converter::targets(format(usual)).count() > 10, "{usual}");
    }
    let names = |from| Converter::targets(format(from)).map(|to| to.to_string()).collect::<Vec<_>>();
    assert_eq!(names("YUYV")[..4], ["YUYV", "XR24", "AR24", "XB24"]);
    assert!(names("YUYV").contains(&"YU16".into()) && !names("YUYV").contains(&"NV12".into()));
    assert!(names("P010").contains(&"XR24".into()) && !names("P010").contains(&"NV12".into()));
}

#[test]
fn what_cannot_be_made_is_refused_with_the_reason() {
    let layout = |name, size| Layout::packed(format(name), size, 1).unwrap();
    let new = |from: &Layout, to: &Layout| Converter::new(from, to).unwrap_err();
    let (nv12, xr24) = (layout("NV12", (8, 8)), layout("XR24", (8, 8)));
    assert_eq!(new(&xr24, &nv12), Unconvertible::Format { from: format("XR24"), to: format("NV12") });
    assert_eq!(new(&nv12, &layout("XR24", (8, 9))), Unconvertible::Size { from: (8, 8), to: (8, 9) });
    let tiled = xr24.with_modifier(Modifier::from_drm(1));
    assert!(matches!(new(&nv12, &tiled), Unconvertible::Tiled { side: "destination", .. }));
    assert!(matches!(new(&tiled, &xr24), Unconvertible::Tiled { side: "source", .. }));
    let wide = layout("GREY", (MAX_WIDTH + 1, 1));
    assert_eq!(new(&wide, &wide), Unconvertible::Width { width: MAX_WIDTH + 1 });
    let places = |second| {
        let planes = [0, 16, second].map(|offset| PlaneLayout { memory: 0, offset, stride: 16 });
        Layout::new(format("YU12"), (8, 2), &planes).unwrap()
    };
    // U at the right of Y's first row, V at the right of its second: that is allowed.
    let side_by_side = [0, 8, 28].map(|offset| PlaneLayout { memory: 0, offset, stride: 16 });
    let side_by_side = Layout::new(format("YU12"), (8, 2), &side_by_side).unwrap();
    assert!(Converter::new(&side_by_side, &side_by_side).is_ok());
    assert_eq!(new(&places(40), &places(40)), Unconvertible::Overlap { plane: 1, other: 0 });
}

#[test]
fn alpha_is_kept_where_both_have_it_and_opaque_elsewhere() {
    let convert = |from: &str, to: &str, row: &[u8]| {
        let [from, to] = [from, to].map(|name| Layout::packed(format(name), (1, 1), 1).unwrap());
        let mut made = Vec::new();
        let read = &mut |_, _, out: &mut [u8]| out.copy_from_slice(row);
        Converter::new(&from, &to)
            .unwrap()
            .convert_rows(read, &mut |_, _, row| made.extend_from_slice(row));
        made
    };
    assert_eq!(convert("AR24", "BA24", &[1, 2, 3, 4]), [4, 3, 2, 1]);
    assert_eq!(convert("AR24", "RA24", &[1, 2, 3, 4]), [4, 1, 2, 3]);
    assert_eq!(convert("AR24", "AB24", &[1, 2, 3, 4]), [3, 2, 1, 4]);
    assert_eq!(convert("XB24", "AR24", &[1, 2, 3, 4]), [3, 2, 1, 255]);
    assert_eq!(convert("BG24", "RA24", &[1, 2, 3]), [255, 3, 2, 1]);
    assert_eq!(convert("AR24", "AR15", &[255, 0, 0, 0]), [0x1f, 0]);
    assert_eq!(convert("AR24", "AR15", &[0, 0, 255, 255]), [0, 0xfc]);
    assert_eq!(convert("AR15", "AR24", &[0x1f, 0]), [255, 0, 0, 0]);
    assert_eq!(convert("RG16", "XR24", &[0x1f, 0]), [255, 0, 0, 255]);
    assert_eq!(convert("XR24", "XR15", &[0; 4]), [0, 0x80]);
    assert_eq!(convert("GREY", "BG24", &[77]), [77; 3]);
}

fn pads() -> impl Strategy<Value = [u32; 4]> {
    any::<[u8; 4]>().prop_map(|pads| pads.map(|pad| u32::from(pad % 40)))
}

/// A layout with padding after the rows and, if `joined`, all planes in one memory plane with gaps between.
fn padded(format: Format, (width, height): (u32, u32), pads: [u32; 4], joined: bool) -> Layout {
    let mut planes = Vec::new();
    let mut offset = pads[3];
    for plane in 0..format.planes() {
        let stride = format.row_bytes(plane, width) + pads[plane];
        let memory = if joined { 0 } else { plane as u32 };
        planes.push(PlaneLayout { memory, offset, stride });
        offset = if joined { offset + stride * format.rows(plane, height) + pads[2] } else { pads[plane] };
    }
    Layout::new(format, (width, height), &planes).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Any pair of formats, odd sizes, any strides: each pixel is right, and nothing else is written.
    #[test]
    fn pictures_are_the_same_picture(
        pair in 0..pairs().len(),
        size in (1u32..90, 1u32..6),
        (from_pads, to_pads) in (pads(), pads()),
        joined in any::<[bool; 2]>(),
        colour in colours(),
        seed in any::<u64>(),
        raw in any::<bool>(),
    ) {
        let (from, to) = pairs()[pair];
        let source = buffer(padded(from, size, from_pads, joined[0]).with_colour(colour), seed);
        let made = buffer(padded(to, size, to_pads, joined[1]).with_colour(colour), !seed);
        let before = memory(&made);
        let mut converter = Converter::new(source.layout(), made.layout()).unwrap();
        let reader = source.read().unwrap();
        let spans: Vec<_> = (0..).map_while(|memory| reader.memory(memory)).collect();
        let mut writer = made.write().unwrap();
        let bytes = if raw {
            converter.copy(&spans, &mut writer)
        } else {
            converter.convert(&mut |plane, row, out| reader.row(plane, row, out), &mut writer)
        };
        writer.end().unwrap();
        prop_assert_eq!(bytes, made.layout().pixel_bytes());
        // From 16 bits and from 10 the reference rounds, and so does the conversion.
        compare(&source, &made, if from.is_yuv() { 1.0 } else { 0.0 })?;
        // Padding stays as it was, unless strides are equal and whole planes were copied.
        let whole = raw && from == to;
        let mut inside: Vec<Vec<bool>> = before.iter().map(|bytes| vec![whole; bytes.len()]).collect();
        for (plane, place) in made.layout().planes().iter().enumerate() {
            for row in 0..to.rows(plane, size.1) {
                let start = (place.offset + place.stride * row) as usize;
                inside[place.memory as usize][start..start + to.row_bytes(plane, size.0) as usize].fill(true);
            }
        }
        for ((before, after), inside) in before.iter().zip(memory(&made)).zip(inside) {
            for ((before, after), inside) in before.iter().zip(after).zip(inside) {
                prop_assert!(inside || *before == after, "a byte of the padding was written");
            }
        }
    }

    /// Hostile layouts: refused with the field named, or converted; memory that is too short reads as zero.
    #[test]
    fn no_layout_breaks_it(
        formats in (0..Format::all().len(), 0..Format::all().len()),
        size in prop_oneof![
            (1u32..200, 1u32..4), (any::<u32>(), any::<u32>()), (1u32..4, any::<u32>()), (any::<u32>(), 1u32..3)
        ],
        places in any::<[(u32, u32, u32); 8]>(),
        near in any::<bool>(),
    ) {
        let layout = |index, places: &[(u32, u32, u32)]| {
            let format = Format::all().nth(index).unwrap();
            let places: Vec<_> = places[..format.planes()].iter().enumerate().map(|(plane, &(memory, offset, stride))| {
                // Half of them near what is right, so that some pass.
                let row = format.row_bytes(plane, size.0);
                if near {
                    PlaneLayout { memory: memory % 5, offset: offset % 10_000, stride: row.saturating_add(stride % 64) }
                } else {
                    PlaneLayout { memory, offset, stride }
                }
            }).collect();
            Layout::new(format, size, &places)
        };
        let (Ok(from), Ok(to)) = (layout(formats.0, &places[..4]), layout(formats.1, &places[4..])) else { return Ok(()) };
        let Ok(mut converter) = Converter::new(&from, &to) else { return Ok(()) };
        if from.pixel_bytes() + to.pixel_bytes() > 1 << 22 || to.memory_planes() > MAX_PLANES {
            return Ok(());
        }
        let lens: Vec<_> = (0..to.memory_planes() as u32).map(|memory| to.memory_len(memory).max(1)).collect();
        if lens.iter().sum::<usize>() > 1 << 24 {
            return Ok(());
        }
        let memory = lens.iter().map(|&len| Allocator::Plain.allocate(len).unwrap()).collect();
        let made = Buffer::new(to, memory, &lens).unwrap();
        let mut writer = made.write().unwrap();
        let few = [7u8; 300];
        // SAFETY: the bytes outlive the span and nobody writes them.
        let span = unsafe { Span::new(std::ptr::NonNull::from(&few[..]).cast(), few.len()) };
        prop_assert_eq!(converter.copy(&[span], &mut writer), to.pixel_bytes());
        prop_assert_eq!(converter.copy(&[], &mut writer), to.pixel_bytes());
    }
}
