//! Which formats a device's GBM imports, and which it makes: tried, because its own answers tell of neither. It has no list of what it
//! imports, and `gbm_device_is_format_supported` is about what Mesa renders to, without YUV (`gbm_dri_visuals_table`).

use super::Device;
use super::make::Usage;
use crate::format::{Format, Layout, Modifier};
use crate::frame::{Buffer, Room};
use crate::memory::Allocator;

/// The size of the pictures that are tried, in pixels, and what their strides are a multiple of, in bytes: no driver known wants more.
const SIZE: (u32, u32) = (64, 64);
const STRIDE: u32 = 256;
/// Room for such a picture in any format, in pixels of 4 bytes.
const ROOM: (u32, u32) = (64, 1024);

impl Device {
    /// Whether buffers can be made through this node: one is.
    pub fn makes_buffers(&self) -> bool {
        self.try_to_make(SIZE).is_some()
    }

    /// The formats in which it makes buffers for the CPU or a camera to fill, best first: a small one is made in each. Cost: some
    /// hundred system calls.
    pub fn formats_made(&self) -> Vec<Format> {
        if !self.makes_buffers() {
            return Vec::new();
        }
        let made = |format: &Format| {
            let layout = Layout::packed(*format, SIZE, 1);
            layout.is_ok_and(|layout| {
                let buffer = self.make_buffer(&layout, &Room::default(), Usage::RENDERING, &[Modifier::LINEAR]);
                buffer.is_ok()
            })
        };
        Format::all().filter(made).collect()
    }

    pub(super) fn try_formats(&self) -> Option<Vec<Format>> {
        // The device's own memory is what it takes most surely.
        let own = self.try_to_make(ROOM);
        let len = ROOM.0 as usize * ROOM.1 as usize * 4;
        let layout = Layout::packed(Format::all().next()?, ROOM, 1).ok()?;
        let of = |allocator: Allocator| Some(Buffer::new(layout, vec![allocator.allocate(len).ok()?], &[len]).ok());
        let others = Allocator::DMA_BUF.into_iter().filter_map(of).flatten();
        own.into_iter().chain(others).find_map(|memory| {
            let found: Vec<_> = Format::all().filter(|format| self.takes(&memory, *format)).collect();
            // None at all is the memory's fault.
            (!found.is_empty()).then_some(found)
        })
    }

    /// A buffer of the format that every device has.
    fn try_to_make(&self, size: (u32, u32)) -> Option<Buffer> {
        let layout = Layout::packed(Format::parse("XR24")?.0, size, 1).ok()?;
        let made = self.make_buffer(&layout, &Room::default(), Usage::RENDERING, &[Modifier::LINEAR]);
        made.ok()
    }

    fn takes(&self, memory: &Buffer, format: Format) -> bool {
        let layout = Layout::packed(format, SIZE, STRIDE).ok();
        let buffer = layout.and_then(|layout| memory.with_layout(layout).ok());
        buffer.is_some_and(|buffer| self.try_import(&buffer, Usage::default()).is_ok())
    }
}
