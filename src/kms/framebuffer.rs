//! The memory of a framebuffer, whoever made it, for the CPU to read.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use drm::control::Device as _;
use drm_ffi::{DRM_CLOEXEC, DRM_RDWR, drm_mode_fb_cmd2};
use nix::libc;

use super::Card;
use crate::dmabuf::DmaBuf;
use crate::error::{Context, Error, Kind, Result};
use crate::format::{Colour, Format, Fourcc, Layout, MAX_PLANES, Modifier, PlaneLayout};
use crate::frame::Buffer;
use crate::memory::{Access, Allocator, Mapping, Memory};

/// GEM handles that `DRM_IOCTL_MODE_GETFB2` made. It makes new ones each time, one for each distinct buffer
/// (`drm_mode_getfb2_ioctl`), so closing them takes nothing away from other users of the card.
struct Handles<'a> {
    card: &'a Card,
    distinct: Vec<u32>,
}

impl<'a> Handles<'a> {
    fn of(card: &'a Card, info: &drm_mode_fb_cmd2) -> Handles<'a> {
        let mut distinct = info.handles.to_vec();
        distinct.retain(|&handle| handle != 0);
        distinct.sort_unstable();
        distinct.dedup();
        Handles { card, distinct }
    }
}

impl Drop for Handles<'_> {
    fn drop(&mut self) {
        for &handle in &self.distinct {
            // A failure means that it is closed already, which is the aim.
            let _ = drm_ffi::gem::close(self.card.as_fd(), handle);
        }
    }
}

/// The memory of a framebuffer, whoever made it.
pub(super) fn open(card: &Card, framebuffer: u32, colour: Colour) -> Result<Buffer> {
    let about = || format!("framebuffer {framebuffer} of {}", card.name());
    let info = drm_ffi::mode::get_framebuffer2(card.as_fd(), framebuffer).context("look at", about)?;
    let handles = Handles::of(card, &info);
    let unsupported = |why: String| Error::new(Kind::Unsupported, "read", about()).because(why);
    if handles.distinct.is_empty() {
        let error = Error::new(Kind::Permission, "read", about());
        let error = error.because("the kernel gives it to root and to the process that drives the display alone");
        return Err(error.repair("run it as root"));
    }
    let code = Fourcc(info.pixel_format);
    let format = Format::from_drm(code).ok_or_else(|| unsupported(format!("dmaflow knows no format {code}")))?;
    let stated = info.flags & drm_ffi::DRM_MODE_FB_MODIFIERS != 0;
    let modifier = if stated { Modifier::from_drm(info.modifier[0]) } else { None };
    if let Some(tiling) = modifier.filter(|&modifier| modifier != Modifier::LINEAR) {
        let error = unsupported(format!("its memory is tiled (modifier {tiling}), and the CPU can read rows alone"));
        return Err(error.repair("stop who drives the display and use the writeback, if the hardware has one"));
    }
    let mut places = [PlaneLayout::default(); MAX_PLANES];
    for (plane, place) in places.iter_mut().enumerate().take(format.planes()) {
        let memory = handles.distinct.iter().position(|&handle| handle == info.handles[plane]);
        let memory = memory.and_then(|memory| u32::try_from(memory).ok());
        let memory = memory.ok_or_else(|| unsupported(format!("colour plane {plane} has no memory")))?;
        *place = PlaneLayout { memory, offset: info.offsets[plane], stride: info.pitches[plane] };
    }
    let layout = Layout::new(format, (info.width, info.height), &places[..format.planes()]);
    let layout = layout.map_err(|cause| Error::new(Kind::Unsupported, "read", about()).because(cause))?;
    let layout = layout.with_modifier(modifier).with_colour(colour);
    let mut memory = Vec::with_capacity(handles.distinct.len());
    for (plane, &handle) in (0..).zip(&handles.distinct) {
        memory.push(match read(card, handle, layout.memory_len(plane)) {
            Ok(copy) => copy,
            Err(_) => Memory::DmaBuf(DmaBuf::new(export(card, handle).context("export", about)?)?),
        });
    }
    let lens = memory.iter().map(Memory::bytes).collect::<Result<Vec<_>>>()?;
    Buffer::new(layout, memory, &lens)
}

/// What a GEM object holds, copied from a mapping of the card's own.
///
/// The way for memory that no dma-buf has been made of: making one would leave it behind, because a GEM object keeps its dma-buf until its last
/// handle is closed (`drm_gem_object_handle_put_unlocked`), the console's is closed never, and the driver's module stays in use until then.
///
/// # Errors
/// `DRM_IOCTL_MODE_MAP_DUMB` refuses imported memory (`EINVAL`, drm_gem_dumb_map_offset), and some drivers all that they did not make as
/// a dumb buffer.
fn read(card: &Card, handle: u32, len: usize) -> Result<Memory> {
    let about = || format!("a buffer of {}", card.name());
    let place = drm_ffi::mode::dumbbuffer::map(card.as_fd(), handle, 0, 0).context("map", about)?;
    let mapping = Mapping::at(card.as_fd(), place.offset, len, Access::Read)?;
    let copy = Allocator::Plain.allocate(len)?;
    Mapping::new(copy.as_fd(), len, Access::ReadWrite)?.copy_from(0, mapping.span());
    Ok(copy)
}

/// A dma-buf of a GEM object, for reading.
///
/// Writable where that is allowed: a GEM object has one dma-buf for all who export it, which stays as the first asked
/// for (`drm_gem_prime_handle_to_dmabuf`), and its owner may want to write.
pub(super) fn export(card: &Card, handle: u32) -> io::Result<OwnedFd> {
    let handle = drm::control::from_u32(handle).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOENT))?;
    let writable = card.buffer_to_prime_fd(handle, DRM_CLOEXEC | DRM_RDWR);
    writable.or_else(|_| card.buffer_to_prime_fd(handle, DRM_CLOEXEC))
}
