//! What a camera was set to, so that it can be put back.

use std::os::fd::AsFd;

use v4l::v4l_sys as sys;

use super::agree::current_format;
use super::{Api, Device, raw};
use crate::causes::Call;
use crate::error::{Context, Result};

/// The format and the rate of a camera, as its driver gave them: also those that [`Format`](crate::format::Format) does not know.
pub struct SavedFormat {
    format: sys::v4l2_format,
    /// `None` for a driver without rates.
    parameters: Option<sys::v4l2_streamparm>,
    size: (u32, u32),
}

impl SavedFormat {
    /// Width and height in pixels.
    pub fn size(&self) -> (u32, u32) {
        self.size
    }
}

impl std::fmt::Debug for SavedFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SavedFormat({}x{})", self.size.0, self.size.1)
    }
}

impl Device {
    /// What the camera is set to now. Cost: two system calls.
    ///
    /// # Errors
    /// What `VIDIOC_G_FMT` says.
    pub fn save_format(&self) -> Result<SavedFormat> {
        let format = current_format(self)?;
        let size = match self.info().api {
            Api::SinglePlanar => {
                // SAFETY: the reply is of the single-planar type, for which the kernel wrote `pix`; all fields are integers.
                let pix = unsafe { format.fmt.pix };
                (pix.width, pix.height)
            }
            Api::MultiPlanar => {
                // SAFETY: the reply is of the multi-planar type, for which the kernel wrote `pix_mp`; all fields are integers.
                let pix = unsafe { format.fmt.pix_mp };
                (pix.width, pix.height)
            }
        };
        let mut parameters: sys::v4l2_streamparm = raw::zeroed();
        parameters.type_ = self.info().api.buffer_type();
        let known = raw::get_parameters(self.as_fd(), &mut parameters).is_ok();
        Ok(SavedFormat { format, parameters: known.then_some(parameters), size })
    }

    /// Sets the camera to what it was. Cost: two system calls.
    ///
    /// # Errors
    /// [`Kind::Busy`](crate::error::Kind::Busy) while somebody has buffers of it; what `VIDIOC_S_FMT` or `VIDIOC_S_PARM` says.
    pub fn restore_format(&self, saved: &SavedFormat) -> Result<()> {
        let mut format = saved.format;
        raw::set_format(self.as_fd(), &mut format)
            .context("put back the format of", || self.name())
            .map_err(|error| Call::SetFormat.explain(error))?;
        let Some(mut parameters) = saved.parameters else { return Ok(()) };
        raw::set_parameters(self.as_fd(), &mut parameters).context("put back the rate of", || self.name())
    }
}
