//! The importer: a buffer becomes a `gbm_bo`, or the reason why not.

use std::ffi::{c_int, c_void};
use std::io;
use std::os::fd::{AsFd, AsRawFd};

use super::Device;
use super::library::{INVALID, ImportFd, ImportFdModifier};
use super::make::Usage;
use super::raw::RawBo;
use crate::causes::{Call, Cause};
use crate::endpoint::{Importer, Refusal, Rung};
use crate::format::{Layout, MAX_PLANES};
use crate::frame::Buffer;

/// A device's image of a buffer: a `gbm_bo`. It keeps the device and the memory, whatever becomes of the handles that they came from;
/// dropping it gives both back.
#[derive(Debug)]
pub struct BufferObject(RawBo);

impl BufferObject {
    /// The object as GBM's C interface has it (`struct gbm_bo *`), for `eglCreateImage` and the like. Valid while this is; see
    /// [`Device::as_ptr`] about threads.
    pub fn as_ptr(&self) -> *mut c_void {
        self.0.as_ptr()
    }
}

/// Imports buffers into one device.
#[derive(Clone, Debug)]
pub struct GbmImporter {
    device: Device,
    name: String,
    usage: Usage,
}

impl GbmImporter {
    /// An importer into `device`, for images that are only read.
    pub fn new(device: Device) -> GbmImporter {
        GbmImporter { name: device.name(), device, usage: Usage::default() }
    }

    /// The same for images that are used so.
    #[must_use]
    pub fn with_usage(self, usage: Usage) -> GbmImporter {
        GbmImporter { usage, ..self }
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.device
    }
}

impl Importer for GbmImporter {
    type Image = BufferObject;

    fn name(&self) -> &str {
        &self.name
    }

    /// One `gbm_bo_import`, which makes a PRIME import of each distinct memory plane. A refusal costs more: the reason is looked for.
    fn import(&mut self, buffer: &Buffer) -> Result<BufferObject, Refusal> {
        self.device.import(buffer, self.usage)
    }
}

/// Why no import came about.
pub(super) enum NoImport {
    /// DRM has no code for the format.
    NoCode,
    /// It was not tried.
    Refused(Refusal),
    /// GBM said no, and left this in errno.
    Failed(io::Error),
}

impl Device {
    /// Imports a buffer for this usage: by `GBM_BO_IMPORT_FD` where one colour plane starts its memory and no modifier is stated, else by
    /// `GBM_BO_IMPORT_FD_MODIFIER`, with a descriptor for each colour plane.
    ///
    /// # Errors
    /// The refusal: of the memory, of the format, or of the layout.
    pub fn import(&self, buffer: &Buffer, usage: Usage) -> Result<BufferObject, Refusal> {
        self.try_import(buffer, usage).map_err(|no| match no {
            NoImport::NoCode => {
                let why = format!("DRM has no code for {}", buffer.layout().format());
                refuse(Call::GbmImport.name(), None, why, &self.which_formats())
            }
            NoImport::Refused(refusal) => refusal,
            NoImport::Failed(cause) => self.reason(buffer, &cause),
        })
    }

    /// The same without the reason, for which [`Device::formats`] may have to be asked: it is made of such tries.
    pub(super) fn try_import(&self, buffer: &Buffer, usage: Usage) -> Result<BufferObject, NoImport> {
        let layout = buffer.layout();
        let code = layout.format().drm().ok_or(NoImport::NoCode)?;
        let mut data = ImportFdModifier {
            width: layout.width(),
            height: layout.height(),
            format: code.0,
            num_fds: u32::try_from(layout.planes().len()).unwrap_or(0),
            fds: [-1; MAX_PLANES],
            strides: [0; MAX_PLANES],
            offsets: [0; MAX_PLANES],
            // A modifier that is not stated is none: the driver assumes its own default, as with GBM_BO_IMPORT_FD.
            modifier: layout.modifier().map_or(INVALID, |modifier| modifier.to_drm()),
        };
        for (index, plane) in layout.planes().iter().enumerate() {
            let Some(dma_buf) = buffer.dma_buf(plane.memory) else { return Err(NoImport::Refused(plain_memory())) };
            data.fds[index] = dma_buf.as_fd().as_raw_fd();
            data.strides[index] = signed(plane.stride, layout)?;
            data.offsets[index] = signed(plane.offset, layout)?;
        }
        let raw = self.raw();
        let imported = match layout.planes() {
            [plane] if plane.offset == 0 && layout.modifier().is_none() => {
                let ImportFdModifier { width, height, format, fds: [fd, ..], .. } = data;
                raw.import_fd(ImportFd { fd, width, height, stride: plane.stride, format }, usage.bits())
            }
            _ => raw.import_fds(data, usage.bits()),
        };
        imported.map(BufferObject).map_err(NoImport::Failed)
    }

    /// GBM gives one errno for everything. What else is known tells more: whether the device can use the memory at all, and whether it has
    /// the format.
    fn reason(&self, buffer: &Buffer, cause: &io::Error) -> Refusal {
        if let Some(refusal) = self.unreachable_memory(buffer) {
            return refusal;
        }
        let layout = buffer.layout();
        let errno = cause.raw_os_error().filter(|&errno| errno != 0);
        let (name, driver) = (self.name(), &self.info().driver);
        if self.formats().is_some_and(|formats| !formats.contains(&layout.format())) {
            let why = format!("GBM of {name} ({driver}) does not import {}", layout.format());
            return refuse(Call::GbmImport.name(), errno, why, &self.which_formats());
        }
        let Cause { why, repair } = Call::GbmImport.cause(errno.unwrap_or(0));
        refuse(Call::GbmImport.name(), errno, format!("{why} ({layout}, {driver})"), repair)
    }

    /// The refusal of memory that the device cannot use. It is asked through a file of its own: a handle that GBM has must not be closed
    /// here.
    fn unreachable_memory(&self, buffer: &Buffer) -> Option<Refusal> {
        let node = self.reopen().ok()?;
        for plane in 0..buffer.memory().len() {
            let dma_buf = u32::try_from(plane).ok().and_then(|plane| buffer.dma_buf(plane))?;
            if let Err(cause) = drm_ffi::gem::fd_to_handle(node.as_fd(), dma_buf.as_fd()) {
                let errno = cause.raw_os_error();
                let Cause { why, repair } = Call::GbmPrime.cause(errno.unwrap_or(0));
                return Some(refuse(Call::GbmPrime.name(), errno, why.to_owned(), repair));
            }
        }
        None
    }

    fn which_formats(&self) -> String {
        let Some(formats) = self.formats() else { return "choose a format that the device has".to_owned() };
        let names: Vec<_> = formats.iter().map(ToString::to_string).collect();
        format!("choose a format that it imports: {}", names.join(" "))
    }
}

fn signed(bytes: u32, layout: &Layout) -> Result<c_int, NoImport> {
    c_int::try_from(bytes).map_err(|_| {
        let why = format!("GBM addresses 2 GiB, and the rows of {layout} lie beyond");
        NoImport::Refused(refuse(Call::GbmImport.name(), None, why, "choose a smaller size or stride"))
    })
}

fn plain_memory() -> Refusal {
    let why = "the frames are in plain memory, which no device can import".to_owned();
    refuse(Call::GbmPrime.name(), None, why, "make /dev/udmabuf or a dma-heap available to this user")
}

fn refuse(step: &'static str, errno: Option<i32>, why: String, repair: &str) -> Refusal {
    Refusal { rung: Rung::Exported, step, errno, why, repair: repair.to_owned() }
}
