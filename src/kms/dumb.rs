//! Dumb buffers: memory that a card makes for its own scanout, as dma-bufs that anybody can fill.

use std::os::fd::{AsFd, FromRawFd, OwnedFd};

use super::Card;
use super::gem::GemHandle;
use crate::causes::Call;
use crate::dmabuf::DmaBuf;
use crate::error::{Context, Error, Kind, Result};
use crate::format::{Format, Layout};
use crate::frame::{Buffer, Room};
use crate::memory::Memory;

impl Card {
    /// Makes a buffer for a picture of this format, size and colour. Rows are as long as the card's driver wants them; everything lies
    /// in one memory plane. `room` is what others want of the memory, `align` what strides must be a multiple of, in bytes.
    ///
    /// The card's own handle is closed: the memory lives as long as the buffer and what has imported it. Cost: four system calls.
    ///
    /// # Errors
    /// What `DRM_IOCTL_MODE_CREATE_DUMB` or the export says.
    pub fn make_buffer(&self, layout: &Layout, room: &Room, align: u32) -> Result<Buffer> {
        let (format, size) = (layout.format(), layout.size());
        let plain = Layout::packed(format, size, align).map_err(|cause| self.unfit(layout).because(cause))?;
        let len = room.len(&plain, 0)?;
        let pitch = plain.planes().first().map_or(0, |plane| plane.stride);
        // For one plane the driver is asked in pixels, of which it may want a multiple; else in bytes, as one grey picture with the rows
        // of all planes.
        let (width, bits) = match pixel_bits(format) {
            Some(bits) => (pitch.div_ceil(bits / 8), bits),
            None => (pitch, 8),
        };
        let rows = u32::try_from(len.div_ceil(pitch.max(1) as usize)).unwrap_or(u32::MAX);
        let dumb = drm_ffi::mode::dumbbuffer::create(self.as_fd(), width, rows, bits, 0);
        let dumb = dumb
            .context("make a buffer of", || self.name())
            .map_err(|error| Call::CreateDumb.explain(error))?;
        let gem = GemHandle::made(self, dumb.handle);
        let layout = Layout::contiguous(format, size, dumb.pitch)
            .map_err(|cause| self.unfit(layout).because(cause))?
            .with_colour(layout.colour());
        // DRM_CLOEXEC and DRM_RDWR are O_CLOEXEC and O_RDWR (drm.h).
        let flags = (nix::libc::O_CLOEXEC | nix::libc::O_RDWR).cast_unsigned();
        let exported = drm_ffi::gem::handle_to_fd(self.as_fd(), gem.handle(), flags);
        let exported = exported.context("export a buffer of", || self.name())?;
        // SAFETY: the call succeeded, so `fd` is a new descriptor that nobody else owns (drm_gem_prime_handle_to_dmabuf).
        let fd = unsafe { OwnedFd::from_raw_fd(exported.fd) };
        let dma_buf = DmaBuf::new(fd)?;
        let len = dma_buf.len();
        Buffer::new(layout, vec![Memory::DmaBuf(dma_buf)], &[len])
    }

    fn unfit(&self, layout: &Layout) -> Error {
        Error::new(Kind::Invalid, "make a buffer of", format!("{} for {layout}", self.name()))
    }
}

/// Bits of a pixel, for formats of one plane whose pixels are whole bytes.
fn pixel_bits(format: Format) -> Option<u32> {
    // The bytes of a row of 8 pixels are the bits of one.
    (format.planes() == 1)
        .then(|| format.row_bytes(0, 8))
        .filter(|bits| bits % 8 == 0)
}
