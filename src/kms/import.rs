//! PRIME import and AddFB2: a buffer becomes a framebuffer of a card.

use std::io;
use std::mem;
use std::os::fd::AsFd;
use std::sync::Arc;

use super::Card;
use super::gem::GemHandle;
use crate::causes::{Call, Cause};
use crate::endpoint::{Importer, Refusal, Rung};
use crate::format::MAX_PLANES;
use crate::frame::Buffer;
use crate::uapi::close_framebuffer;

/// A framebuffer over an imported buffer. Removed on drop.
#[derive(Debug)]
pub struct Framebuffer {
    card: Arc<Card>,
    id: u32,
}

impl Framebuffer {
    /// DRM's number of it.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Gives it up without taking it off the screen, where it stays until another is shown: for one that the kernel cannot take off now.
    /// Its card stays open. Before Linux 6.8, which has no call for this, so does the framebuffer.
    pub(super) fn close(self) {
        // Another failure means that the card is gone, and its framebuffers with it.
        let _ = close_framebuffer(self.card.as_fd(), self.id);
        // Where the kernel has let go of it there is nothing to remove, and where it could not, removing it would wait.
        mem::forget(self);
    }
}

impl Drop for Framebuffer {
    fn drop(&mut self) {
        // A failure means that the card is gone, and its framebuffers with it.
        let _ = drm_ffi::mode::rm_fb(self.card.as_fd(), self.id);
    }
}

/// Imports buffers into one card.
#[derive(Debug)]
pub struct KmsImporter {
    card: Arc<Card>,
    name: String,
}

impl KmsImporter {
    /// An importer into `card`.
    pub fn new(card: Arc<Card>) -> KmsImporter {
        let name = card.name();
        KmsImporter { card, name }
    }
}

impl Importer for KmsImporter {
    type Image = Framebuffer;

    fn name(&self) -> &str {
        &self.name
    }

    /// One PRIME import for each distinct memory plane and one AddFB2. The GEM handles are closed right after: the
    /// framebuffer keeps its own reference to the memory.
    fn import(&mut self, buffer: &Buffer) -> Result<Framebuffer, Refusal> {
        let layout = buffer.layout();
        let Some(code) = layout.format().drm() else {
            let why = format!("DRM has no code for {}", layout.format());
            return Err(refuse(Call::AddFramebuffer.name(), None, why, "choose a format that the display scans out"));
        };
        let mut handles: Vec<GemHandle<'_>> = Vec::with_capacity(MAX_PLANES);
        for memory in 0..buffer.memory().len() {
            let Some(dma_buf) = u32::try_from(memory).ok().and_then(|memory| buffer.dma_buf(memory)) else {
                let why = "the frames are in plain memory, which no device can import".to_owned();
                return Err(refuse(
                    Call::PrimeImport.name(),
                    None,
                    why,
                    "make /dev/udmabuf or a dma-heap available to this user",
                ));
            };
            let handle =
                GemHandle::import(&self.card, dma_buf).map_err(|cause| refused(Call::PrimeImport, &cause, ""))?;
            handles.push(handle);
        }
        let mut gems = [0; MAX_PLANES];
        let mut pitches = [0; MAX_PLANES];
        let mut offsets = [0; MAX_PLANES];
        let mut modifiers = [0; MAX_PLANES];
        for (index, plane) in layout.planes().iter().enumerate() {
            gems[index] = handles.get(plane.memory as usize).map_or(0, |gem| gem.handle());
            pitches[index] = plane.stride;
            offsets[index] = plane.offset;
            modifiers[index] = layout.modifier().map_or(0, |modifier| modifier.to_drm());
        }
        // The flag goes with a stated modifier alone: without it the driver assumes its own default (drm_mode.h).
        let flags = if layout.modifier().is_some() { drm_ffi::DRM_MODE_FB_MODIFIERS } else { 0 };
        let (width, height) = layout.size();
        let added = drm_ffi::mode::add_fb2(
            self.card.as_fd(),
            width,
            height,
            code.0,
            &gems,
            &pitches,
            &offsets,
            &modifiers,
            flags,
        );
        let framebuffer = added.map_err(|cause| refused(Call::AddFramebuffer, &cause, &format!(" ({layout})")))?;
        Ok(Framebuffer { card: Arc::clone(&self.card), id: framebuffer.fb_id })
    }
}

fn refuse(step: &'static str, errno: Option<i32>, why: String, repair: &str) -> Refusal {
    Refusal { rung: Rung::Exported, step, errno, why, repair: repair.to_owned() }
}

fn refused(call: Call, cause: &io::Error, about: &str) -> Refusal {
    let errno = cause.raw_os_error();
    let Cause { why, repair } = call.cause(errno.unwrap_or(0));
    refuse(call.name(), errno, format!("{why}{about}"), repair)
}
