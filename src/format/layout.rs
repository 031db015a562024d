//! A format at a size: where each colour plane lies.

use std::fmt;

use super::{Colour, Format, Modifier};

/// The most colour planes (and memory planes) a buffer has, as in DRM's AddFB2.
pub const MAX_PLANES: usize = 4;

/// Where one colour plane lies. Offsets and strides are in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct PlaneLayout {
    /// Index of the memory plane that holds it.
    pub memory: u32,
    /// Bytes from the start of the memory plane.
    pub offset: u32,
    /// Bytes from one row to the next.
    pub stride: u32,
}

/// A picture's shape in memory: format, size in pixels, and each colour plane's place.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Layout {
    format: Format,
    width: u32,
    height: u32,
    modifier: Option<Modifier>,
    colour: Colour,
    planes: [PlaneLayout; MAX_PLANES],
}

/// A layout that cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// A size of nothing.
    #[error("a picture of {0}x{1} pixels is empty")]
    Empty(u32, u32),
    /// Not as many planes as the format has.
    #[error("{format} has {expected} colour planes, not {given}")]
    PlaneCount {
        /// The format.
        format: Format,
        /// How many it has.
        expected: usize,
        /// How many were given.
        given: usize,
    },
    /// Rows that overlap.
    #[error("a stride of {stride} bytes is less than the {row} bytes of a row in plane {plane}")]
    Stride {
        /// The colour plane.
        plane: usize,
        /// The stride given, in bytes.
        stride: u32,
        /// The bytes of one row.
        row: u32,
    },
    /// A plane that ends past 4 GiB.
    #[error("plane {plane} ends past 4 GiB")]
    Overflow {
        /// The colour plane.
        plane: usize,
    },
    /// A plane that ends past its memory.
    #[error("plane {plane} needs {needed} bytes of memory plane {memory}, which has {len}")]
    OutOfBounds {
        /// The colour plane.
        plane: usize,
        /// The memory plane.
        memory: u32,
        /// Bytes needed, from the start of the memory plane.
        needed: usize,
        /// Bytes that are there.
        len: usize,
    },
    /// A memory plane that is not there.
    #[error("plane {plane} lies in memory plane {memory}, and there are {count}")]
    NoMemory {
        /// The colour plane.
        plane: usize,
        /// The memory plane.
        memory: u32,
        /// How many there are.
        count: usize,
    },
}

impl Layout {
    /// A layout with each colour plane's place given. Pixels lie in rows; the modifier is not stated.
    ///
    /// # Errors
    /// [`LayoutError`] for an empty picture, a wrong number of planes, a stride shorter than a row, or a plane that
    /// ends past 4 GiB.
    pub fn new(format: Format, (width, height): (u32, u32), planes: &[PlaneLayout]) -> Result<Layout, LayoutError> {
        if width == 0 || height == 0 {
            return Err(LayoutError::Empty(width, height));
        }
        if planes.len() != format.planes() {
            return Err(LayoutError::PlaneCount { format, expected: format.planes(), given: planes.len() });
        }
        let mut layout = Layout {
            format,
            width,
            height,
            modifier: None,
            colour: Colour::default(),
            planes: [PlaneLayout::default(); MAX_PLANES],
        };
        for (plane, place) in planes.iter().enumerate() {
            let row = format.row_bytes(plane, width);
            if place.stride < row {
                return Err(LayoutError::Stride { plane, stride: place.stride, row });
            }
            let end = u64::from(place.offset) + u64::from(place.stride) * u64::from(format.rows(plane, height));
            if end > u64::from(u32::MAX) {
                return Err(LayoutError::Overflow { plane });
            }
            layout.planes[plane] = *place;
        }
        Ok(layout)
    }

    /// All colour planes one after the other in one memory plane, the first with rows of `stride` bytes, the others with
    /// what V4L2 documents for that ([`Format::shared_stride`]).
    ///
    /// # Errors
    /// As [`Layout::new`].
    pub fn contiguous(format: Format, size: (u32, u32), stride: u32) -> Result<Layout, LayoutError> {
        let mut planes = [PlaneLayout::default(); MAX_PLANES];
        let mut offset = 0u64;
        for (plane, place) in planes.iter_mut().enumerate().take(format.planes()) {
            let start = u32::try_from(offset).map_err(|_| LayoutError::Overflow { plane })?;
            *place = PlaneLayout { memory: 0, offset: start, stride: format.shared_stride(plane, stride) };
            offset += u64::from(place.stride) * u64::from(format.rows(plane, size.1));
        }
        Layout::new(format, size, &planes[..format.planes()])
    }

    /// As [`Layout::contiguous`] with the least stride that is a multiple of `align` bytes in every plane.
    ///
    /// # Errors
    /// As [`Layout::new`].
    pub fn packed(format: Format, size: (u32, u32), align: u32) -> Result<Layout, LayoutError> {
        let align = align.max(1);
        let (horizontal, _) = format.subsampling();
        let unit = align.saturating_mul(horizontal);
        // With an odd width a chroma row can be longer than half a luma row.
        let needed = (0..format.planes()).map(|plane| format.first_stride(plane, format.row_bytes(plane, size.0)));
        let stride = needed.max().unwrap_or(0).checked_next_multiple_of(unit);
        Layout::contiguous(format, size, stride.ok_or(LayoutError::Overflow { plane: 0 })?)
    }

    /// The same picture in the same memory planes with every stride rounded up to a multiple of `align` bytes (0 and 1 change
    /// nothing), each plane at the start of its memory or behind the one before. Modifier and colour stay.
    ///
    /// # Errors
    /// As [`Layout::new`].
    pub fn with_stride_align(&self, align: u32) -> Result<Layout, LayoutError> {
        let align = align.max(1);
        let up = |plane: usize, stride: u32, unit: u32| {
            stride.checked_next_multiple_of(unit).ok_or(LayoutError::Overflow { plane })
        };
        let layout = if self.memory_planes() == 1 {
            // Chroma rows follow from the first plane's, as V4L2 has it; this unit suits all of them, as in `packed`.
            let (horizontal, _) = self.format.subsampling();
            let firsts = self.planes().iter().enumerate();
            let needed = firsts.map(|(plane, place)| self.format.first_stride(plane, place.stride)).max();
            let unit = if align == 1 { 1 } else { align.saturating_mul(horizontal) };
            Layout::contiguous(self.format, self.size(), up(0, needed.unwrap_or(0), unit)?)?
        } else {
            let mut planes: Vec<PlaneLayout> = Vec::with_capacity(self.planes().len());
            for (plane, place) in self.planes().iter().enumerate() {
                let before = planes.iter().enumerate().filter(|(_, before)| before.memory == place.memory);
                let end = before.map(|(plane, before)| {
                    u64::from(before.offset) + u64::from(before.stride) * self.rows(plane) as u64
                });
                let offset = end.max().unwrap_or(0).max(u64::from(place.offset));
                let offset = u32::try_from(offset).map_err(|_| LayoutError::Overflow { plane })?;
                planes.push(PlaneLayout { memory: place.memory, offset, stride: up(plane, place.stride, align)? });
            }
            Layout::new(self.format, self.size(), &planes)?
        };
        Ok(layout.with_modifier(self.modifier).with_colour(self.colour))
    }

    /// Each colour plane in a memory plane of its own, with the strides given.
    ///
    /// # Errors
    /// As [`Layout::new`].
    pub fn separate(format: Format, size: (u32, u32), strides: &[u32]) -> Result<Layout, LayoutError> {
        let planes: Vec<_> = (0u32..)
            .zip(strides)
            .map(|(memory, &stride)| PlaneLayout { memory, offset: 0, stride })
            .collect();
        Layout::new(format, size, &planes)
    }

    /// The same with the tiling stated.
    #[must_use]
    pub fn with_modifier(self, modifier: Option<Modifier>) -> Layout {
        Layout { modifier, ..self }
    }

    /// The same with the meaning of its YUV values stated.
    #[must_use]
    pub fn with_colour(self, colour: Colour) -> Layout {
        Layout { colour, ..self }
    }

    /// The pixel format.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Width and height in pixels.
    pub fn size(&self) -> (u32, u32) {
        (self.width, self.height)
    }

    /// Width in pixels.
    pub fn width(&self) -> u32 {
        self.width
    }

    /// Height in pixels.
    pub fn height(&self) -> u32 {
        self.height
    }

    /// The tiling; `None` where the exporter did not state it.
    pub fn modifier(&self) -> Option<Modifier> {
        self.modifier
    }

    /// What YUV values mean.
    pub fn colour(&self) -> Colour {
        self.colour
    }

    /// Each colour plane's place.
    pub fn planes(&self) -> &[PlaneLayout] {
        &self.planes[..self.format.planes()]
    }

    /// Number of memory planes that the colour planes lie in.
    pub fn memory_planes(&self) -> usize {
        self.planes().iter().map(|plane| plane.memory as usize + 1).max().unwrap_or(0)
    }

    /// Bytes of memory plane `memory` up to the end of its last row, padding of that row included.
    pub fn memory_len(&self, memory: u32) -> usize {
        let ends = self.planes().iter().enumerate().filter(|(_, place)| place.memory == memory);
        ends.map(|(plane, place)| place.offset as usize + place.stride as usize * self.rows(plane))
            .max()
            .unwrap_or(0)
    }

    /// Bytes of pixels in all planes, without padding.
    pub fn pixel_bytes(&self) -> u64 {
        (0..self.format.planes())
            .map(|plane| u64::from(self.format.row_bytes(plane, self.width)) * self.rows(plane) as u64)
            .sum()
    }

    /// Checks that every row lies inside memory planes of these lengths in bytes. The padding after the last row may be
    /// missing, as it is with drivers that report tight sizes.
    ///
    /// # Errors
    /// [`LayoutError::NoMemory`] or [`LayoutError::OutOfBounds`] for the first plane that does not fit.
    pub fn check(&self, lens: &[usize]) -> Result<(), LayoutError> {
        for (plane, place) in self.planes().iter().enumerate() {
            let memory = place.memory;
            let &len = lens
                .get(memory as usize)
                .ok_or(LayoutError::NoMemory { plane, memory, count: lens.len() })?;
            let row = self.format.row_bytes(plane, self.width) as usize;
            let before = place.stride as usize * (self.rows(plane) - 1);
            let needed = place.offset as usize + before + row;
            if needed > len {
                return Err(LayoutError::OutOfBounds { plane, memory, needed, len });
            }
        }
        Ok(())
    }

    fn rows(&self, plane: usize) -> usize {
        self.format.rows(plane, self.height) as usize
    }
}

impl fmt::Display for Layout {
    /// Format, size and strides: `XR24 640x360, stride 2560`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}x{}, stride ", self.format, self.width, self.height)?;
        for (index, plane) in self.planes().iter().enumerate() {
            write!(f, "{}{}", if index == 0 { "" } else { "+" }, plane.stride)?;
        }
        match self.modifier {
            Some(modifier) => write!(f, ", {modifier}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::hostile::{self, both_ways};
    use proptest::prelude::*;

    fn format(name: &str) -> Format {
        Format::parse(name).unwrap().0
    }

    #[test]
    fn nv12_in_one_memory_plane() {
        let layout = Layout::contiguous(format("NV12"), (640, 360), 704).unwrap();
        assert_eq!(layout.planes()[1], PlaneLayout { memory: 0, offset: 704 * 360, stride: 704 });
        assert_eq!((layout.memory_len(0), layout.memory_planes()), (704 * 540, 1));
        assert_eq!(layout.pixel_bytes(), 640 * 540);
    }

    #[test]
    fn bad_shapes_are_refused() {
        let nv12 = format("NV12");
        assert_eq!(Layout::packed(nv12, (0, 4), 1), Err(LayoutError::Empty(0, 4)));
        assert!(matches!(Layout::contiguous(nv12, (640, 4), 639), Err(LayoutError::Stride { plane: 0, .. })));
        assert!(matches!(Layout::separate(nv12, (64, 4), &[64]), Err(LayoutError::PlaneCount { .. })));
        assert!(matches!(Layout::packed(nv12, (65535, 65535), 1), Err(LayoutError::Overflow { .. })));
        let layout = Layout::packed(nv12, (64, 4), 1).unwrap();
        assert!(layout.check(&[64 * 6]).is_ok());
        assert!(matches!(layout.check(&[64 * 6 - 1]), Err(LayoutError::OutOfBounds { plane: 1, .. })));
        assert!(matches!(layout.check(&[]), Err(LayoutError::NoMemory { .. })));
    }

    #[test]
    fn longer_strides_keep_the_rest() {
        let layout = Layout::packed(format("YU12"), (100, 10), 1)
            .unwrap()
            .with_modifier(Some(Modifier::LINEAR));
        let longer = layout.with_stride_align(64).unwrap();
        assert_eq!(longer.planes().iter().map(|place| place.stride).collect::<Vec<_>>(), [128, 64, 64]);
        assert_eq!((longer.modifier(), longer.with_stride_align(1).unwrap()), (layout.modifier(), longer));
        let apart = Layout::separate(format("NV12"), (100, 10), &[100, 100]).unwrap();
        let longer = apart.with_stride_align(64).unwrap();
        assert_eq!(longer.planes()[1], PlaneLayout { memory: 1, offset: 0, stride: 128 });
        assert!(layout.with_stride_align(u32::MAX).is_err());
    }

    /// Any places, any alignment: a layout with such strides, or a refusal that names the plane, and rightly.
    #[test]
    fn any_stride_alignment() {
        both_ways((hostile::layout(), hostile::number()), |((format, size, places), align)| {
            let layout = match Layout::new(format, size, &places) {
                Ok(layout) => layout,
                Err(error) => {
                    hostile::rightly_refused(&error, format, size, &places)?;
                    return Ok(false);
                }
            };
            match layout.with_stride_align(align) {
                Ok(longer) => {
                    for (plane, (place, before)) in longer.planes().iter().zip(layout.planes()).enumerate() {
                        prop_assert_eq!(place.stride % align.max(1), 0);
                        prop_assert!(place.stride >= before.stride || layout.memory_planes() == 1);
                        prop_assert!(place.stride >= format.row_bytes(plane, size.0));
                    }
                    Ok(true)
                }
                Err(error) => {
                    let named = (0..format.planes()).any(|plane| error.to_string().contains(&format!("plane {plane}")));
                    prop_assert!(named, "it names no plane: {}", error);
                    // Generously: how long a row can become where planes share what is asked of the first.
                    let longest = places.iter().map(|place| u64::from(place.stride)).max().unwrap_or(0);
                    let row = 16 * (longest + u64::from(align));
                    let offset = places.iter().map(|place| u64::from(place.offset)).max().unwrap_or(0);
                    let most = row.saturating_mul(u64::from(size.1)).saturating_mul(format.planes() as u64);
                    prop_assert!(most.saturating_add(offset) > u64::from(u32::MAX), "refused for nothing: {}", error);
                    Ok(false)
                }
            }
        });
    }

    proptest! {
        #[test]
        fn planes_never_overlap(index in 0..Format::all().len(), width in 1u32..3000, height in 1u32..2000, pad in 0u32..9) {
            let format = Format::all().nth(index).unwrap();
            let layout = Layout::packed(format, (width, height), 1 << pad).unwrap();
            let mut end = 0usize;
            for (plane, place) in layout.planes().iter().enumerate() {
                prop_assert!(place.offset as usize >= end);
                prop_assert!(place.stride >= format.row_bytes(plane, width));
                end = place.offset as usize + place.stride as usize * format.rows(plane, height) as usize;
            }
            prop_assert_eq!(end, layout.memory_len(0));
            prop_assert!(layout.check(&[end]).is_ok());
        }
    }
}
