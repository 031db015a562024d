//! Writeback: the display's hardware writes what it shows to memory.
//!
//! A writeback connector is attached to the running display beside its own connector for one commit, and detached. All
//! else of the state is left as it is, so the display shows the same before and after.

use std::mem;
use std::os::fd::AsFd;
use std::time::Duration;

use drm::control::{Device as _, connector};
use drm::{ClientCapability, Device as _};
use nix::libc;

use super::Card;
use super::atomic::{CommitFlags, Request};
use super::fenced::out_fence_of;
use super::framebuffer::export;
use super::snapshot::{Output, picture};
use crate::dmabuf::DmaBuf;
use crate::error::{Context, Error, Kind, Result};
use crate::format::{Format, Fourcc, Layout, PlaneLayout};
use crate::frame::Buffer;
use crate::memory::Memory;

/// How long the display may take for a picture. Hardware needs one refresh; vkms composes in software, and in an emulated machine whose host
/// is busy that takes seconds.
const PATIENCE: Duration = Duration::from_secs(5);

/// What the memory is filled with before each attempt. A picture of nothing but this was not written; one that happens to look like the first
/// does not look like the second.
///
/// vkms can lose a job: its composer reads which job there is without the lock that it then takes to see whether there is one
/// (`vkms_composer_worker`), and says that it has written what it has not.
const MARKS: [u8; 2] = [0x5a, 0xa5];

/// What `output` shows, as the hardware wrote it: 3 bytes a pixel, row after row.
///
/// # Errors
/// [`Kind::Unsupported`] without a writeback connector for this display; [`Kind::Busy`] if another process drives it;
/// what the kernel says where the driver writes back no display that is on; [`Kind::Timeout`];
/// [`Kind::System`] if nothing was written.
pub(super) fn read(card: &Card, output: &Output) -> Result<Vec<u8>> {
    // Dropped in the reverse order, also after an error.
    let _listed = Listed::new(card)?;
    let writer = Writer::find(card, output)?;
    let _master = Master::of(card)?;
    let mut failed = None;
    for mark in MARKS {
        let target = Target::new(card, output, writer.format)?;
        let buffer = target.buffer()?;
        fill(&buffer, mark)?;
        match writer.write(card, output, &target) {
            Ok(()) if !is_all(&buffer, mark)? => return picture(buffer),
            Ok(()) => {
                let error = Error::new(Kind::System, "write back what is shown on", card.name());
                failed = Some(error.because("the driver said that it was done, and had written nothing"));
            }
            Err(error) if error.kind() == Kind::Timeout => failed = Some(error),
            Err(error) => return Err(error),
        }
    }
    Err(failed.unwrap_or_else(|| Error::new(Kind::System, "write back what is shown on", card.name())))
}

/// Fills all rows with one byte.
fn fill(buffer: &Buffer, byte: u8) -> Result<()> {
    let row = vec![byte; row_bytes(buffer)];
    let mut writer = buffer.write()?;
    (0..buffer.layout().height()).for_each(|y| writer.row(0, y, &row));
    writer.end()
}

/// Whether all rows are nothing but this byte.
fn is_all(buffer: &Buffer, byte: u8) -> Result<bool> {
    let mut row = vec![0; row_bytes(buffer)];
    let reader = buffer.read()?;
    Ok((0..buffer.layout().height()).all(|y| {
        reader.row(0, y, &mut row);
        row.iter().all(|&there| there == byte)
    }))
}

/// Of the only colour plane.
fn row_bytes(buffer: &Buffer) -> usize {
    let layout = buffer.layout();
    layout.format().row_bytes(0, layout.width()) as usize
}

/// Writeback connectors are listed for clients alone that ask for them. This one does so no longer than it needs to,
/// lest they are taken for displays.
struct Listed<'a>(&'a Card);

impl Listed<'_> {
    fn new(card: &Card) -> Result<Listed<'_>> {
        let set = card.set_client_capability(ClientCapability::WritebackConnectors, true);
        set.map(|()| Listed(card))
            .context("list the writeback connectors of", || card.name())
    }
}

impl Drop for Listed<'_> {
    fn drop(&mut self) {
        // What could be set before can be taken back (drm_setclientcap).
        let _ = self.0.set_client_capability(ClientCapability::WritebackConnectors, false);
    }
}

/// DRM master for a while, or for longer if this process was it before.
struct Master<'a> {
    card: &'a Card,
    before: bool,
}

impl Master<'_> {
    fn of(card: &Card) -> Result<Master<'_>> {
        // Only a master may authenticate others (`DRM_IOCTL_AUTH_MAGIC`); nobody has the number 0. libdrm's
        // drmIsMaster.
        let asked = drm_ffi::auth::auth_magic_token(card.as_fd(), 0);
        let before = !asked.is_err_and(|error| error.raw_os_error() == Some(libc::EACCES));
        card.become_master()?;
        Ok(Master { card, before })
    }
}

impl Drop for Master<'_> {
    fn drop(&mut self) {
        if !self.before {
            self.card.give_up_master();
        }
    }
}

/// A writeback connector with the numbers of its properties.
struct Writer {
    connector: connector::Handle,
    crtc_id: u32,
    framebuffer: u32,
    fence: u32,
    /// The CRTC that it was attached to before, usually none (0).
    before: u64,
    format: Format,
}

impl Writer {
    /// The first that can serve the display.
    fn find(card: &Card, output: &Output) -> Result<Writer> {
        let about = || card.name();
        let resources = card.resource_handles().context("list the connectors of", about)?;
        for &connector in resources.connectors() {
            let info = card.get_connector(connector, false).context("ask a connector of", about)?;
            let serves = |&encoder: &_| {
                let encoder = card.get_encoder(encoder);
                encoder.is_ok_and(|encoder| resources.filter_crtcs(encoder.possible_crtcs()).contains(&output.crtc))
            };
            if info.interface() == connector::Interface::Writeback && info.encoders().iter().any(serves) {
                return Writer::new(card, connector, output);
            }
        }
        let error = Error::new(Kind::Unsupported, "write back what is shown on", card.name());
        Err(error.because(format!("the driver {} has no writeback for this display", card.info().driver)))
    }

    fn new(card: &Card, connector: connector::Handle, output: &Output) -> Result<Writer> {
        let properties = card.properties(connector.into(), drm_ffi::DRM_MODE_OBJECT_CONNECTOR)?;
        let property = |name: &str| {
            properties.get(name).copied().ok_or_else(|| {
                let error = Error::new(Kind::Unsupported, "write back what is shown on", card.name());
                error.because(format!("the writeback connector has no property {name}"))
            })
        };
        let (crtc_id, before) = property("CRTC_ID")?;
        if before != 0 && before != u64::from(u32::from(output.crtc)) {
            let error = Error::new(Kind::Busy, "write back what is shown on", card.name());
            return Err(error.because("the writeback connector is in use for another display"));
        }
        let (_, formats) = property("WRITEBACK_PIXEL_FORMATS")?;
        let mut blob = Vec::new();
        // Object numbers have 32 bits.
        drm_ffi::mode::get_property_blob(card.as_fd(), formats as u32, Some(&mut blob))
            .context("read the writeback formats of", || card.name())?;
        Ok(Writer {
            connector,
            crtc_id,
            framebuffer: property("WRITEBACK_FB_ID")?.0,
            fence: property("WRITEBACK_OUT_FENCE_PTR")?.0,
            before,
            format: best_format(&blob).ok_or_else(|| {
                let error = Error::new(Kind::Unsupported, "write back what is shown on", card.name());
                error.because("the hardware writes no format that is known here")
            })?,
        })
    }

    /// Has the display written to `target`, and leaves it as it was.
    fn write(&self, card: &Card, output: &Output, target: &Target<'_>) -> Result<()> {
        let crtc = u64::from(u32::from(output.crtc));
        let mut request = Request::default();
        request.object(self.connector.into()).set(self.crtc_id, crtc);
        request.set(self.framebuffer, u64::from(target.framebuffer));
        // Attaching and detaching a connector is a modeset in the kernel's eyes, and to some hardware.
        let flags = CommitFlags { allow_modeset: true, ..CommitFlags::default() };
        let test = CommitFlags { test_only: true, ..flags };
        request
            .commit(card, test, "write back what is shown on")
            .map_err(|error| match error.errno() {
                Some(libc::EINVAL) => error
                    .kind_is(Kind::Unsupported)
                    .repair("this driver does not write back beside a connected display"),
                _ => error,
            })?;
        let attached = Attached { card, writer: self };
        let done = out_fence_of(&mut |place| {
            request.set(self.fence, place);
            request.commit(card, flags, "write back what is shown on")
        })?;
        // The address in it was of a variable that is gone.
        drop(request);
        let written = match done {
            Some(done) => done.wait(PATIENCE).map_err(|cause| {
                let error = Error::new(cause.kind(), "wait for the writeback of", card.name());
                error.because(cause)
            }),
            None => {
                let error = Error::new(Kind::Unsupported, "wait for the writeback of", card.name());
                Err(error.because("the driver gave no fence"))
            }
        };
        // The display is more important than the picture: first this, then what became of the picture.
        attached.detach()?;
        written
    }
}

/// The best of the formats in a `WRITEBACK_PIXEL_FORMATS` blob: RGB, which one memory plane holds.
fn best_format(blob: &[u8]) -> Option<Format> {
    let codes = blob
        .chunks_exact(4)
        .filter_map(|code| Some(Fourcc(u32::from_ne_bytes(code.try_into().ok()?))));
    let formats: Vec<_> = codes.filter_map(Format::from_drm).collect();
    // `Format::all` has XR24 first, then the others by preference.
    Format::all().find(|format| formats.contains(format) && !format.is_yuv())
}

/// A writeback connector that may be attached; put back on drop.
struct Attached<'a> {
    card: &'a Card,
    writer: &'a Writer,
}

impl Attached<'_> {
    fn put_back(&self) -> Result<()> {
        let mut request = Request::default();
        request
            .object(self.writer.connector.into())
            .set(self.writer.crtc_id, self.writer.before);
        let flags = CommitFlags { allow_modeset: true, ..CommitFlags::default() };
        request.commit(self.card, flags, "detach the writeback from")
    }

    /// The same as drop, with the failure reported.
    fn detach(self) -> Result<()> {
        let result = self.put_back();
        mem::forget(self);
        result
    }
}

impl Drop for Attached<'_> {
    fn drop(&mut self) {
        // Only after another error, which says more.
        let _ = self.put_back();
    }
}

/// A dumb buffer as a framebuffer to write to. Both are gone on drop.
struct Target<'a> {
    card: &'a Card,
    handle: u32,
    framebuffer: u32,
    layout: Layout,
}

impl Target<'_> {
    fn new<'a>(card: &'a Card, output: &Output, format: Format) -> Result<Target<'a>> {
        let about = || format!("a {format} buffer for the writeback of {}", card.name());
        let (width, height) = output.size;
        let bits = 8 * format.row_bytes(0, 1);
        let dumb = drm_ffi::mode::dumbbuffer::create(card.as_fd(), width, height, bits, 0);
        let dumb = dumb.context("allocate", about)?;
        let place = PlaneLayout { memory: 0, offset: 0, stride: dumb.pitch };
        let layout = Layout::new(format, output.size, &[place]);
        // From here on the drop cleans up; framebuffer 0 is none.
        let invalid = |cause| Error::new(Kind::System, "allocate", about()).because(cause);
        let layout = layout.inspect_err(|_| destroy(card, dumb.handle)).map_err(invalid)?;
        let mut target = Target { card, handle: dumb.handle, framebuffer: 0, layout };
        let code = format.drm().unwrap_or(format.name()).0;
        let (handles, pitches) = ([dumb.handle, 0, 0, 0], [dumb.pitch, 0, 0, 0]);
        let added = drm_ffi::mode::add_fb2(card.as_fd(), width, height, code, &handles, &pitches, &[0; 4], &[0; 4], 0);
        target.framebuffer = added.context("make a framebuffer of", about)?.fb_id;
        Ok(target)
    }

    /// The memory, to read.
    fn buffer(&self) -> Result<Buffer> {
        let dma_buf = export(self.card, self.handle).context("export the writeback of", || self.card.name())?;
        let dma_buf = DmaBuf::new(dma_buf)?;
        let len = dma_buf.len();
        Buffer::new(self.layout, vec![Memory::DmaBuf(dma_buf)], &[len])
    }
}

impl Drop for Target<'_> {
    fn drop(&mut self) {
        if self.framebuffer != 0 {
            // A failure means that the card is gone, and its framebuffers with it.
            let _ = drm_ffi::mode::rm_fb(self.card.as_fd(), self.framebuffer);
        }
        destroy(self.card, self.handle);
    }
}

fn destroy(card: &Card, dumb: u32) {
    // As above.
    let _ = drm_ffi::mode::dumbbuffer::destroy(card.as_fd(), dumb);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_are_chosen_by_preference() {
        let blob = |names: &[&str]| {
            let codes = names.iter().map(|name| name.parse::<Fourcc>().unwrap().0);
            best_format(&codes.flat_map(u32::to_ne_bytes).collect::<Vec<_>>()).map(|format| format.to_string())
        };
        assert_eq!(blob(&["AR24", "XR24", "RG16"]).as_deref(), Some("XR24"));
        assert_eq!(blob(&["NV12", "AR48", "RG16"]).as_deref(), Some("RG16"));
        assert_eq!(blob(&["NV12"]), None);
        assert_eq!(best_format(&[1, 2, 3]), None);
    }
}
