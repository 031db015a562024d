//! What the shader is told of a conversion: where samples and words lie, and what numbers mean. Nothing here touches a device.

use ash::vk;

use crate::format::{Format, Kind, Layout, Modifier, PlaneLayout};

/// A part of a picture, in pixels from its upper left corner.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Crop {
    /// First column.
    pub x: u32,
    /// First row.
    pub y: u32,
    /// Columns.
    pub width: u32,
    /// Rows.
    pub height: u32,
}

impl Crop {
    /// All of a picture.
    pub fn all((width, height): (u32, u32)) -> Crop {
        Crop { x: 0, y: 0, width, height }
    }

    fn is_within(self, (width, height): (u32, u32)) -> bool {
        let fits = |first: u32, count: u32, size| count > 0 && first.checked_add(count).is_some_and(|end| end <= size);
        fits(self.x, self.width, width) && fits(self.y, self.height, height)
    }
}

/// Why the GPU does not make this of that.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum NotByGpu {
    /// There is no way to take such samples.
    #[error("the GPU conversion takes YUV, grey and little-endian Bayer, and no {0}")]
    Source(Format),
    /// There is no way to write such pixels.
    #[error("the GPU conversion makes XRGB and ARGB of 8 bits, and no {0}")]
    Target(Format),
    /// Only rows of memory can be read and written.
    #[error("the {side} is tiled ({modifier}); the GPU conversion reads and writes rows")]
    Tiled {
        /// Source or destination.
        side: &'static str,
        /// How it is tiled.
        modifier: Modifier,
    },
    /// A sample that would lie across two words.
    #[error(
        "colour plane {plane} of the {side} has an offset or a stride ({value} bytes) that is no multiple of {align}"
    )]
    Unaligned {
        /// Source or destination.
        side: &'static str,
        /// The colour plane.
        plane: usize,
        /// Offset or stride, in bytes.
        value: u32,
        /// What it must be a multiple of.
        align: u32,
    },
    /// More memory planes than the shader has places for: three for a source, one for a destination.
    #[error(
        "colour plane {plane} of the {side} lies in memory plane {memory}, and the GPU conversion reaches {places}"
    )]
    Memory {
        /// Source or destination.
        side: &'static str,
        /// The colour plane.
        plane: usize,
        /// Its memory plane.
        memory: u32,
        /// How many there may be.
        places: u32,
    },
    /// What is to be shown is not there.
    #[error("the part {crop:?} is not in a picture of {size:?}")]
    Outside {
        /// The part.
        crop: Crop,
        /// The picture.
        size: (u32, u32),
    },
    /// More than the numbers of the shader tell apart.
    #[error("the {side} is {width}x{height} pixels, and the GPU conversion counts up to {limit}")]
    TooLong {
        /// Source or destination.
        side: &'static str,
        /// In pixels.
        width: u32,
        /// In pixels.
        height: u32,
        /// The most, in pixels.
        limit: u32,
    },
    /// More than a GPU must be able to reach.
    #[error("the {side} is larger than the GPU reaches: {bytes} bytes of {limit}")]
    TooLarge {
        /// Source or destination.
        side: &'static str,
        /// Bytes from the start of the memory plane to the end of what is read or written in it, in whole words.
        bytes: u64,
        /// What it reaches (`maxStorageBufferRange`).
        limit: u64,
    },
}

/// A conversion, in numbers.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) struct Job {
    /// The shader's `Job`: 32 words, the least that a device takes as constants (`maxPushConstantsSize`).
    words: [u32; 32],
    /// The source's memory planes in which Y, U and V lie, or thrice that of the only plane.
    memories: [u32; 3],
    /// For each binding of the shader how far it reads or writes from the start of the memory plane: in bytes, whole words.
    reach: [u64; 4],
}

/// The most pixels in a row or a column. The shader counts columns and rows in `f32`, whose halves are exact up to here.
const LONGEST: u32 = 1 << 23;

/// The shader loads and stores whole words.
const WORD: u64 = 4;

pub(super) const JOB_BYTES: u32 = 128;

const YUV: u32 = 0;
const GREY: u32 = 1;
const BAYER: u32 = 2;

/// Pixels of a workgroup.
const GROUP: (u32, u32) = (16, 4);

/// Where the samples of a source lie and what they mean.
struct Source {
    kind: u32,
    /// For Y, U and V: colour plane, byte of the first sample in it, bytes between samples.
    places: [(usize, u32, u32); 3],
    /// Bytes of a sample.
    bytes: u32,
    /// Bits of a sample that count, and how far they are shifted up in it.
    bits: (u32, u32),
}

impl Source {
    fn of(format: Format) -> Option<Source> {
        if format.is_big_endian() {
            return None;
        }
        let narrow = |places| Source { kind: YUV, places, bytes: 1, bits: (8, 0) };
        let single = |kind, bits: u8| {
            let bytes = u32::from(bits.div_ceil(8));
            Source { kind, places: [(0, 0, bytes); 3], bytes, bits: (bits.into(), 0) }
        };
        Some(match format.kind() {
            Kind::Packed422 { y: [even, odd], u, v } if odd == even + 2 => {
                narrow([(0, even.into(), 2), (0, u.into(), 4), (0, v.into(), 4)])
            }
            Kind::SemiPlanar { swapped, sample } => {
                let size = u32::from(sample);
                let (u, v) = if swapped { (size, 0) } else { (0, size) };
                let bits = if sample == 1 { (8, 0) } else { (10, 6) };
                Source { kind: YUV, places: [(0, 0, size), (1, u, 2 * size), (1, v, 2 * size)], bytes: size, bits }
            }
            Kind::Planar { swapped } => {
                let (u, v) = if swapped { (2, 1) } else { (1, 2) };
                narrow([(0, 0, 1), (u, 0, 1), (v, 0, 1)])
            }
            Kind::YuvWord { channels, .. } if channels.iter().all(|bits| bits.width == 8 && bits.shift % 8 == 0) => {
                let pixel = format.row_bytes(0, 1);
                narrow(channels.map(|bits| (0, u32::from(bits.shift / 8), pixel)))
            }
            Kind::Grey => single(GREY, 8),
            Kind::DeepGrey { bits } => single(GREY, bits),
            Kind::Bayer { bits, .. } => single(BAYER, bits),
            _ => return None,
        })
    }
}

/// Whether red lies in the lowest byte of a word; `None` for a format that is not written.
fn red_first(format: Format) -> Option<bool> {
    let Kind::Rgb { channels, .. } = format.kind() else { return None };
    let shifts = channels.map(|bits| (bits.width, bits.shift));
    let whole = format.row_bytes(0, 1) == 4 && !format.is_big_endian();
    match shifts {
        [(8, 16), (8, 8), (8, 0)] if whole => Some(false),
        [(8, 0), (8, 8), (8, 16)] if whole => Some(true),
        _ => None,
    }
}

impl Job {
    /// Whether such pictures can be taken.
    pub(super) fn takes(format: Format) -> bool {
        Source::of(format).is_some()
    }

    /// Whether such pictures can be made.
    pub(super) fn makes(format: Format) -> bool {
        red_first(format).is_some()
    }

    /// What the shader is told to make `to` of a part of `from`, on a GPU that reaches `limit` bytes of a buffer.
    ///
    /// # Errors
    /// What does not fit.
    pub(super) fn new(from: &Layout, to: &Layout, crop: Crop, limit: u64) -> Result<Job, NotByGpu> {
        let source = Source::of(from.format()).ok_or(NotByGpu::Source(from.format()))?;
        let red_first = red_first(to.format()).ok_or(NotByGpu::Target(to.format()))?;
        if !crop.is_within(from.size()) {
            return Err(NotByGpu::Outside { crop, size: from.size() });
        }
        check("source", from, 3, source.bytes)?;
        check("destination", to, 1, 4)?;
        let place = |(plane, first, step): (usize, u32, u32)| {
            let PlaneLayout { memory, offset, stride } = from.planes()[plane];
            // Below `limit`, which has 32 bits (`reached`).
            (offset.saturating_add(first), stride, step, memory)
        };
        let places = source.places.map(place);
        let target = to.planes()[0];
        let (horizontal, vertical) = from.format().subsampling();
        // The column and the row of the last sample, as the shader finds them.
        let luma = (from.width() - 1, from.height() - 1);
        let chroma = if source.kind == YUV { (luma.0 / horizontal, luma.1 / vertical) } else { luma };
        let [y, u, v] = places;
        let reach = [
            reached("source", (y.0, y.1, y.2), luma, source.bytes, limit)?,
            reached("source", (u.0, u.1, u.2), chroma, source.bytes, limit)?,
            reached("source", (v.0, v.1, v.2), chroma, source.bytes, limit)?,
            reached("destination", (target.offset, target.stride, 4), (to.width() - 1, to.height() - 1), 4, limit)?,
        ];
        let square = match from.format().kind() {
            Kind::Bayer { red: [column, row], .. } => [column.into(), row.into()],
            _ => [horizontal.ilog2(), vertical.ilog2()],
        };
        let shares = Shares::of(from, &source);
        let float = |value: u32| value as f32;
        // Said in so many words, because a division of equal numbers need not be 1: OpFDiv may be 2.5 units in the last place off
        // ("Precision of Core SPIR-V Instructions"), and compilers make a multiplication by the reciprocal of it.
        let unscaled = u32::from(crop.width == to.width()) | u32::from(crop.height == to.height()) << 1;
        let bits = source.bits.0 | source.bits.1 << 16;
        let words = [
            [places[0].0, places[1].0, places[2].0, source.kind],
            [places[0].1, places[1].1, places[2].1, unscaled],
            [places[0].2, places[1].2, places[2].2, bits],
            [from.width(), from.height(), square[0], square[1]],
            [crop.x, crop.y, crop.width, crop.height].map(|value| float(value).to_bits()),
            shares.chroma.map(f32::to_bits),
            [shares.black, shares.luma, shares.middle, float(red_first.into())].map(f32::to_bits),
            [target.offset / 4, target.stride / 4, to.width(), to.height()],
        ];
        let mut job = Job { words: [0; 32], memories: places.map(|place| place.3), reach };
        job.words
            .iter_mut()
            .zip(words.into_iter().flatten())
            .for_each(|(to, from)| *to = from);
        Ok(job)
    }

    /// As it is pushed.
    pub(super) fn bytes(&self) -> [u8; JOB_BYTES as usize] {
        let mut bytes = [0; JOB_BYTES as usize];
        let words = self.words.iter().flat_map(|word| word.to_ne_bytes());
        bytes.iter_mut().zip(words).for_each(|(to, from)| *to = from);
        bytes
    }

    /// The source's memory planes in the order of the shader's bindings.
    pub(super) fn memories(&self) -> [u32; 3] {
        self.memories
    }

    /// How far the shader reaches in the memory of each binding, in bytes from its start: whole words, so up to three bytes behind the
    /// last sample.
    pub(super) fn reach(&self) -> [u64; 4] {
        self.reach
    }

    /// The workgroups in x and y for a picture of this size.
    pub(super) fn groups((width, height): (u32, u32)) -> (u32, u32) {
        (width.div_ceil(GROUP.0), height.div_ceil(GROUP.1))
    }

    /// What its buffers are used as.
    pub(super) const USAGE: vk::BufferUsageFlags = vk::BufferUsageFlags::STORAGE_BUFFER;
}

/// Where a walk over all samples ends, in whole words: of the first one's byte, the bytes between rows and between columns, and the last
/// column and row.
fn reached(
    side: &'static str,
    (first, stride, step): (u32, u32, u32),
    (column, row): (u32, u32),
    bytes: u32,
    limit: u64,
) -> Result<u64, NotByGpu> {
    let [first, stride, step, column, row, bytes] = [first, stride, step, column, row, bytes].map(u64::from);
    // No sum of products of 32 bits, but for one near 2^64, passes 64 bits: and that is over any limit.
    let end = (stride * row).saturating_add(step * column).saturating_add(first + bytes);
    let bytes = end.checked_next_multiple_of(WORD).unwrap_or(u64::MAX);
    // In any case what 32 bits reach.
    let limit = limit.min(u32::MAX.into());
    if bytes > limit { Err(NotByGpu::TooLarge { side, bytes, limit }) } else { Ok(bytes) }
}

/// Rows alone, samples in one word each, no more of them than can be counted.
fn check(side: &'static str, layout: &Layout, places: u32, align: u32) -> Result<(), NotByGpu> {
    let (width, height) = layout.size();
    if width > LONGEST || height > LONGEST {
        return Err(NotByGpu::TooLong { side, width, height, limit: LONGEST });
    }
    if let Some(modifier) = layout.modifier().filter(|&modifier| modifier != Modifier::LINEAR) {
        return Err(NotByGpu::Tiled { side, modifier });
    }
    for (plane, place) in layout.planes().iter().enumerate() {
        if let Some(value) = [place.offset, place.stride]
            .into_iter()
            .find(|value| !value.is_multiple_of(align))
        {
            return Err(NotByGpu::Unaligned { side, plane, value, align });
        }
        if place.memory >= places {
            return Err(NotByGpu::Memory { side, plane, memory: place.memory, places });
        }
    }
    Ok(())
}

/// What the numbers of the samples mean, white being 1.
struct Shares {
    black: f32,
    luma: f32,
    middle: f32,
    chroma: [f32; 4],
}

impl Shares {
    fn of(layout: &Layout, source: &Source) -> Shares {
        if source.kind != YUV {
            // Full range, as V4L2's grey and Bayer formats are.
            let top = f64::from((1u32 << source.bits.0) - 1);
            return Shares { black: 0.0, luma: (1.0 / top) as f32, middle: 0.0, chroma: [0.0; 4] };
        }
        let colour = layout.colour();
        let (kr, kb) = colour.encoding.weights();
        // 8 or 10 (`Source::of`).
        let [black, luma, middle, chroma] = colour.range.levels(if source.bits.0 == 8 { 8 } else { 10 });
        let (red, blue, green) = (2.0 * (1.0 - kr) / chroma, 2.0 * (1.0 - kb) / chroma, 1.0 - kr - kb);
        let chroma = [red, -kr * red / green, -kb * blue / green, blue].map(|share| share as f32);
        Shares { black: black as f32, luma: (1.0 / luma) as f32, middle: middle as f32, chroma }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::hostile;
    use proptest::prelude::*;

    const LIMIT: u64 = 1 << 27;
    const UNSCALED: u32 = 3;

    fn layout(name: &str, size: (u32, u32)) -> Layout {
        Layout::packed(Format::parse(name).unwrap().0, size, 1).unwrap()
    }

    fn job(from: &str, to: &str) -> Result<Job, NotByGpu> {
        let (from, to) = (layout(from, (8, 4)), layout(to, (8, 4)));
        Job::new(&from, &to, Crop::all(from.size()), LIMIT)
    }

    #[test]
    fn places_of_samples() {
        let words = |name| job(name, "XR24").unwrap().words;
        assert_eq!(words("YUYV")[..12], [0, 1, 3, YUV, 16, 16, 16, UNSCALED, 2, 4, 4, 8]);
        assert_eq!(words("UYVY")[..12], [1, 0, 2, YUV, 16, 16, 16, UNSCALED, 2, 4, 4, 8]);
        assert_eq!(words("NV12")[..12], [0, 32, 33, YUV, 8, 8, 8, UNSCALED, 1, 2, 2, 8]);
        assert_eq!(words("NV21")[..4], [0, 33, 32, YUV]);
        assert_eq!(words("YU12")[..12], [0, 32, 40, YUV, 8, 4, 4, UNSCALED, 1, 1, 1, 8]);
        assert_eq!(words("YV12")[..4], [0, 40, 32, YUV]);
        assert_eq!(words("NV12")[12..16], [8, 4, 1, 1]);
        assert_eq!(words("GREY")[..4], [0, 0, 0, GREY]);
        assert_eq!(words("BG10")[11..16], [10, 8, 4, 1, 1]);
        assert_eq!(words("P010")[11], 10 | 6 << 16);
    }

    #[test]
    fn memory_planes() {
        let format = Format::parse("YU12").unwrap().0;
        let from = Layout::separate(format, (8, 4), &[8, 4, 4]).unwrap();
        let job = Job::new(&from, &layout("XR24", (8, 4)), Crop::all((8, 4)), LIMIT).unwrap();
        assert_eq!(job.words[..8], [0, 0, 0, YUV, 8, 4, 4, UNSCALED]);
        assert_eq!(job.memories(), [0, 1, 2]);
        assert_eq!(job.reach(), [32, 8, 8, 128]);
    }

    /// Each load is of a whole word, also where the last sample is in the first bytes of one.
    #[test]
    fn whole_words() {
        let reach = |name: &str, size| {
            let (from, to) = (layout(name, size), layout("XR24", size));
            Job::new(&from, &to, Crop::all(size), LIMIT).unwrap().reach()
        };
        // 2244 bytes of luma, 1122 of chroma.
        assert_eq!(reach("NV12", (66, 34)), [2244, 3368, 3368, 66 * 34 * 4]);
        assert_eq!(reach("GREY", (3, 3)), [12, 12, 12, 36]);
        assert_eq!(reach("BG10", (3, 1)), [8, 8, 8, 12]);
    }

    /// No division decides what is unscaled.
    #[test]
    fn unscaled_by_equality() {
        let unscaled = |from, to| {
            let (from, to) = (layout("GREY", from), layout("XR24", to));
            Job::new(&from, &to, Crop::all(from.size()), LIMIT).unwrap().words[7]
        };
        for size in [(854, 480), (2592, 1944), (1, 1)] {
            assert_eq!(unscaled(size, size), UNSCALED);
        }
        assert_eq!(unscaled((854, 480), (854, 481)), 1);
        assert_eq!(unscaled((854, 480), (853, 480)), 2);
        assert_eq!(unscaled((854, 480), (853, 481)), 0);
    }

    #[test]
    fn no_more_than_can_be_counted() {
        let long = |from: (u32, u32), to| {
            let (from, to) = (layout("GREY", from), layout("XR24", to));
            let crop = Crop { x: from.width() - 3, y: 0, width: 3, height: 1 };
            Job::new(&from, &to, crop, LIMIT).map(|job| job.words)
        };
        // 2^24 + 3 columns: the last three are not numbers that `f32` tells apart.
        let refused = long(((1 << 24) + 3, 1), (5, 1)).unwrap_err();
        assert!(matches!(refused, NotByGpu::TooLong { side: "source", width: 0x100_0003, .. }), "{refused}");
        let refused = long((3, 1), (1, LONGEST + 1)).unwrap_err();
        assert!(matches!(refused, NotByGpu::TooLong { side: "destination", .. }), "{refused}");
        let words = long((LONGEST, 1), (5, 1)).unwrap();
        assert_eq!(f32::from_bits(words[16]) as u32, LONGEST - 3);
    }

    #[test]
    fn refusals() {
        let of = |from, to| job(from, to).unwrap_err().to_string();
        assert!(of("RG16", "XR24").contains("no RG16"));
        assert!(of("YUYV", "RG16").contains("no RG16"));
        assert!(of("YUYV", "RG24").contains("no RG24"));
        let (from, to) = (layout("YUYV", (8, 4)), layout("XR24", (8, 4)));
        let crop = Crop { x: 1, y: 0, width: 8, height: 4 };
        assert!(matches!(Job::new(&from, &to, crop, LIMIT), Err(NotByGpu::Outside { .. })));
        let far = Crop { x: u32::MAX, y: 0, width: u32::MAX, height: 4 };
        assert!(matches!(Job::new(&from, &to, far, LIMIT), Err(NotByGpu::Outside { .. })));
        assert!(matches!(Job::new(&from, &to, Crop::all((8, 4)), 60), Err(NotByGpu::TooLarge { bytes: 64, .. })));
        // The end counts in whole words: 9 bytes are 12.
        let (nine, words) = (layout("GREY", (3, 3)), layout("XR24", (1, 1)));
        let one = Crop { x: 0, y: 0, width: 1, height: 1 };
        assert!(matches!(Job::new(&nine, &words, one, 11), Err(NotByGpu::TooLarge { bytes: 12, .. })));
        assert!(Job::new(&nine, &words, one, 12).is_ok());
        let tiled = to.with_modifier(Some(Modifier::from_drm(1).unwrap_or(Modifier::LINEAR)));
        assert!(matches!(Job::new(&from, &tiled, Crop::all((8, 4)), LIMIT), Err(NotByGpu::Tiled { .. })));
        let odd = Layout::new(to.format(), (8, 4), &[PlaneLayout { memory: 0, offset: 2, stride: 32 }]).unwrap();
        let unaligned = Job::new(&from, &odd, Crop::all((8, 4)), LIMIT);
        assert!(matches!(unaligned, Err(NotByGpu::Unaligned { plane: 0, value: 2, align: 4, .. })));
    }

    /// The least length that `Layout::check` lets pass: without the padding of the last row.
    fn shortest(layout: &Layout, memory: u32) -> u64 {
        let ends = layout.planes().iter().enumerate().filter(|(_, place)| place.memory == memory);
        let ends = ends.map(|(plane, place)| {
            let format = layout.format();
            let rows = u64::from(format.rows(plane, layout.height())) - 1;
            let bytes = u64::from(format.row_bytes(plane, layout.width()));
            u64::from(place.offset) + u64::from(place.stride) * rows + bytes
        });
        ends.max().unwrap_or(0)
    }

    proptest! {
        /// Every word that the shader can reach is bound, and every sample lies in the shortest memory that the layout can be in.
        #[test]
        fn nothing_outside(from in hostile::layout(), to in hostile::layout(), x: u32, y: u32, width: u32, height: u32) {
            let layout = |(format, size, planes): (Format, (u32, u32), Vec<PlaneLayout>)| Layout::new(format, size, &planes);
            let (Ok(from), Ok(to)) = (layout(from), layout(to)) else { return Ok(()) };
            for crop in [Crop::all(from.size()), Crop { x, y, width, height }] {
                let Ok(job) = Job::new(&from, &to, crop, LIMIT) else { continue };
                let words = job.words.map(u64::from);
                let bytes = words[11] & 0xffff;
                for plane in 0..if words[3] == u64::from(YUV) { 3 } else { 1 } {
                    let (right, down) = match words[3] == u64::from(YUV) && plane > 0 {
                        true => (words[14], words[15]),
                        false => (0, 0),
                    };
                    let (column, row) = ((words[12] - 1) >> right, (words[13] - 1) >> down);
                    let first = words[plane] + row * words[4 + plane] + column * words[8 + plane];
                    let len = shortest(&from, job.memories()[plane]);
                    let last = first + bytes.div_ceil(8);
                    prop_assert!(last <= len, "plane {} of {} ends at {} of {}", plane, from, last, len);
                    prop_assert_eq!((first & !3) + 4, job.reach()[plane]);
                    prop_assert!(job.reach()[plane] < len + 4 && job.reach()[plane] <= LIMIT);
                }
                let last = (words[28] + (words[31] - 1) * words[29] + words[30]) * 4;
                prop_assert_eq!(last, job.reach()[3]);
                prop_assert!(last <= shortest(&to, 0) && last <= LIMIT);
            }
        }
    }
}
