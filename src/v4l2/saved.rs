//! What a camera was set to, so that it can be put back.

use std::os::fd::AsFd;

use v4l::v4l_sys as sys;

use super::agree::current_format;
use super::signal::same;
use super::{Api, Device, raw};
use crate::causes::Call;
use crate::error::{Context, Result};

/// All that opening a camera may change: input, timings of digital video, format and rate.
#[derive(Debug)]
pub struct SavedSettings {
    /// `None` for a driver without inputs.
    input: Option<i32>,
    timings: Option<Timings>,
    format: SavedFormat,
}

struct Timings(sys::v4l2_dv_timings);

impl std::fmt::Debug for Timings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // SAFETY: the kernel wrote the structure, which was zeroed before, and the union has integers alone.
        let bt = unsafe { self.0.__bindgen_anon_1.bt };
        write!(f, "{}x{}", { bt.width }, { bt.height })
    }
}

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
    /// Input, timings, format and rate as they are now. Cost: four system calls.
    ///
    /// # Errors
    /// What `VIDIOC_G_FMT` says.
    pub fn save_settings(&self) -> Result<SavedSettings> {
        let mut input = 0;
        let input = raw::get_input(self.as_fd(), &mut input).is_ok().then_some(input);
        Ok(SavedSettings { input, timings: self.timings().map(Timings), format: self.save_format()? })
    }

    /// Sets input, timings, format and rate to what they were, in this order, since each may change those after it. Input and
    /// timings are only set if they are others now. Cost: four to six system calls.
    ///
    /// # Errors
    /// [`Kind::Busy`](crate::error::Kind::Busy) while somebody has buffers of it, otherwise what the call that failed says.
    pub fn restore_settings(&self, saved: &SavedSettings) -> Result<()> {
        if let Some(mut input) = saved.input {
            let mut now = 0;
            if raw::get_input(self.as_fd(), &mut now).is_err() || now != input {
                raw::set_input(self.as_fd(), &mut input).context("put back the input of", || self.name())?;
            }
        }
        if let Some(Timings(mut timings)) = saved.timings
            && self.timings().is_none_or(|now| !same(&now, &timings))
        {
            raw::set_dv_timings(self.as_fd(), &mut timings).context("put back the timings of", || self.name())?;
        }
        self.restore_format(&saved.format)
    }

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
