//! Buffers from an allocator: how much memory the two sides of a path want for one layout.

use super::Buffer;
use crate::error::{Error, Kind, Result};
use crate::format::{Layout, MAX_PLANES};
use crate::memory::Allocator;

/// How much more memory than its rows a layout needs, for importers and drivers that ask for it. Nothing more by default.
///
/// Strides are the layout's own ([`Layout::with_stride_align`] makes one with longer rows, for a camera to agree to): here is what a
/// device may touch behind the last row.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Room {
    /// Rows of a memory plane's last colour plane are a multiple of this; 0 and 1 ask for nothing. radeonsi wants such padding.
    pub rows: u32,
    /// The least bytes of each memory plane, as a camera's `sizeimage` says them ([`Camera::memory_lens`]).
    ///
    /// [`Camera::memory_lens`]: crate::v4l2::Camera::memory_lens
    pub least: [usize; MAX_PLANES],
}

impl Room {
    /// Room for what a driver says it needs of each memory plane, in bytes.
    pub fn for_lens(lens: &[usize]) -> Room {
        let mut least = [0; MAX_PLANES];
        for (least, len) in least.iter_mut().zip(lens) {
            *least = *len;
        }
        Room { rows: 0, least }
    }

    /// Bytes to allocate for memory plane `memory` of a layout, before rounding up to pages.
    ///
    /// # Errors
    /// [`Kind::Invalid`], naming `rows`, if the padded rows end past what can be addressed.
    pub fn len(&self, layout: &Layout, memory: u32) -> Result<usize> {
        let rows = self.rows.max(1);
        let mut len = layout.memory_len(memory) as u64;
        for (plane, place) in layout.planes().iter().enumerate().filter(|(_, place)| place.memory == memory) {
            let padded = u64::from(layout.format().rows(plane, layout.height())).next_multiple_of(u64::from(rows));
            // Offset, stride and both counts are below 2^32: neither the product nor the sum can pass 2^64.
            len = len.max(u64::from(place.offset).saturating_add(u64::from(place.stride).saturating_mul(padded)));
        }
        let len = usize::try_from(len).ok().filter(|&len| isize::try_from(len).is_ok());
        let len = len.ok_or_else(|| {
            let error = Error::new(Kind::Invalid, "make room for", layout.to_string());
            error.because(format!("rows in multiples of {rows} need more memory than can be addressed"))
        })?;
        Ok(len.max(self.least.get(memory as usize).copied().unwrap_or(0)))
    }
}

impl Buffer {
    /// Makes one buffer with this layout, every memory plane from `allocator`.
    ///
    /// # Errors
    /// [`Kind::Invalid`] where `room` asks for more than can be addressed; what [`Allocator::allocate`] says.
    pub fn allocate(allocator: Allocator, layout: &Layout, room: &Room) -> Result<Buffer> {
        // Memory planes may be at most as many as colour planes; a layout that names a later one is refused by `Buffer::new`.
        let count = layout.memory_planes().min(MAX_PLANES);
        let mut memory = Vec::with_capacity(count);
        let mut lens = Vec::with_capacity(count);
        for plane in (0u32..).take(count) {
            let len = room.len(layout, plane)?.max(1);
            memory.push(allocator.allocate(len)?);
            lens.push(len.next_multiple_of(crate::memory::page_size()));
        }
        Buffer::new(*layout, memory, &lens)
    }

    /// Makes `count` buffers as [`Buffer::allocate`] does.
    ///
    /// # Errors
    /// As [`Buffer::allocate`]; none are made then.
    pub fn allocate_all(allocator: Allocator, layout: &Layout, room: &Room, count: u32) -> Result<Vec<Buffer>> {
        (0..count).map(|_| Buffer::allocate(allocator, layout, room)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{Format, hostile};
    use proptest::prelude::*;

    fn nv12() -> Layout {
        Layout::packed(Format::parse("NV12").unwrap().0, (64, 50), 32).unwrap()
    }

    #[test]
    fn rows_are_padded_behind_the_last_plane() {
        let layout = nv12();
        assert_eq!(Room::default().len(&layout, 0).unwrap(), 64 * 75);
        let padded = Room { rows: 32, ..Room::default() };
        // Chroma starts after 50 rows, and its 25 rows become 32; luma's 64 end before that.
        assert_eq!(padded.len(&layout, 0).unwrap(), 64 * (50 + 32));
        let least = Room::for_lens(&[9000]);
        assert_eq!(least.len(&layout, 0).unwrap(), 9000);
        let buffer = Buffer::allocate(Allocator::Plain, &layout, &least).unwrap();
        assert_eq!(buffer.memory_lens(), [12288]);
    }

    #[test]
    fn hostile_room_is_refused() {
        let layout = nv12();
        for least in [usize::MAX, usize::MAX - 4096, i64::MAX as usize] {
            let refused = Buffer::allocate(Allocator::Plain, &layout, &Room::for_lens(&[least]));
            assert_eq!(refused.unwrap_err().kind(), Kind::Invalid, "{least}");
        }
    }

    /// Whatever the layout and the room: an answer or a refusal that names the field, never a panic, and never less than the rows need.
    #[test]
    fn room_is_enough_or_refused() {
        let least = prop_oneof![9 => 0..1_usize << 32, 1 => any::<usize>()];
        hostile::both_ways((hostile::layout(), hostile::number(), least), |((format, size, places), rows, least)| {
            let layout = match Layout::new(format, size, &places) {
                Ok(layout) => layout,
                Err(error) => {
                    hostile::rightly_refused(&error, format, size, &places)?;
                    return Ok(false);
                }
            };
            let room = Room { rows, least: [least; MAX_PLANES] };
            for memory in 0..layout.memory_planes() as u32 {
                match room.len(&layout, memory) {
                    Ok(len) => {
                        prop_assert!(len >= layout.memory_len(memory));
                        prop_assert!(len >= room.least.get(memory as usize).copied().unwrap_or(0));
                    }
                    Err(error) => {
                        prop_assert_eq!(error.kind(), Kind::Invalid);
                        prop_assert!(
                            error.line().contains(&format!("rows in multiples of {rows}")),
                            "{}",
                            error.line()
                        );
                        return Ok(false);
                    }
                }
            }
            Ok(true)
        });
    }

    proptest! {
        /// Small enough to be made: every row can be read, and none lies outside.
        #[test]
        fn what_is_allocated_holds_every_row(
            index in 0..Format::all().len(),
            size in (1u32..200, 1u32..100),
            align in 0u32..9,
            rows in 0u32..70,
        ) {
            let format = Format::all().nth(index).unwrap();
            let layout = Layout::packed(format, size, 1 << align).unwrap();
            let buffer = Buffer::allocate(Allocator::Plain, &layout, &Room { rows, ..Room::default() }).unwrap();
            prop_assert!(layout.check(buffer.memory_lens()).is_ok());
        }
    }
}
