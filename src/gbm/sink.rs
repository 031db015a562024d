//! A device's GBM as a sink: imports the buffer of each frame, once a buffer, and lets the frame go.

use super::{BufferObject, Device, GbmImporter, Usage};
use crate::clock::now_us;
use crate::endpoint::{ImportCache, JoinError, Refusal, Rung, Shown, Sink};
use crate::error::{Error, Kind, Result};
use crate::fence::SyncFile;
use crate::format::{Format, Layout, Modifier};
use crate::frame::{Buffer, Frame, Room};

/// A [`Sink`] that a frame has reached when the device has its buffer as an image of its own: what a program does before it draws it. It
/// looks at no pixel, and lets each frame go at once.
#[derive(Debug)]
pub struct Gbm {
    importer: GbmImporter,
    name: String,
    images: ImportCache<BufferObject>,
    /// Imports made before the join that holds.
    imports_before: u64,
}

impl Gbm {
    /// A sink of this device, called as the command has it: `gbm:/dev/dri/renderD128`.
    pub fn new(device: Device) -> Gbm {
        let name = format!("gbm:{}", device.name());
        Gbm { importer: GbmImporter::new(device), name, images: ImportCache::new(), imports_before: 0 }
    }

    /// The device.
    pub fn device(&self) -> &Device {
        self.importer.device()
    }
}

impl Sink for Gbm {
    fn name(&self) -> &str {
        &self.name
    }

    /// Tried the first time, as [`Device::formats`].
    fn formats(&self) -> Option<Vec<Format>> {
        self.device().formats().map(<[Format]>::to_vec)
    }

    fn join(&mut self, _: &Layout, _: Option<f64>, buffers: &[Buffer]) -> Result<Rung, JoinError> {
        if buffers.is_empty() {
            return Err(Error::new(Kind::Invalid, "join no buffers to", &self.name).into());
        }
        for buffer in buffers {
            self.images.get(&mut self.importer, buffer)?;
        }
        // Those of this join: some of its buffers may have been imported by one before.
        self.imports_before = self.images.imports().saturating_sub(buffers.len() as u64);
        Ok(Rung::Exported)
    }

    /// Buffers of the device, linear, so that a camera or the CPU can fill them.
    fn allocate(&mut self, layout: &Layout, room: &Room, count: u32) -> Result<Vec<Buffer>> {
        let make = |_| self.device().make_buffer(layout, room, Usage::RENDERING, &[Modifier::LINEAR]);
        (0..count).map(make).collect()
    }

    fn present(&mut self, frame: Frame) -> Result<Option<Shown>> {
        let error = |refusal: Refusal| {
            let error = Error::new(Kind::Unsupported, "import a frame into", &self.name).said_by(refusal.step);
            error.because(refusal)
        };
        self.images.get(&mut self.importer, frame.buffer()).map_err(error)?;
        Ok(Some(Shown { meta: *frame.meta(), at_us: now_us() }))
    }

    /// It looks at no pixel, so it does not matter whether they are there yet.
    fn waits_for<'a>(&'a self, _: Option<&'a Frame>) -> Vec<&'a SyncFile> {
        Vec::new()
    }

    fn imports(&self) -> u64 {
        self.images.imports() - self.imports_before
    }
}
