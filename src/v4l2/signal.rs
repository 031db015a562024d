//! The signal at an input that takes digital video: HDMI, DisplayPort.

use std::os::fd::AsFd;

use nix::libc;
use v4l::v4l_sys as sys;

use super::{Device, raw};
use crate::error::{Context, Error, Kind, Result};

impl Device {
    /// Sets the timings that the signal has. Nothing to do at inputs without any (a sensor, a webcam, an analogue tuner).
    ///
    /// The driver refuses while the queue has buffers. Cost: two system calls.
    ///
    /// # Errors
    /// [`Kind::Timeout`] if there is no signal now, or none that can be locked to (`VIDIOC_QUERY_DV_TIMINGS`: `ENOLINK`, `ENOLCK`,
    /// `ERANGE`).
    pub fn lock_to_signal(&self) -> Result<()> {
        let mut timings: sys::v4l2_dv_timings = raw::zeroed();
        if let Err(cause) = raw::query_dv_timings(self.as_fd(), &mut timings) {
            let why = match cause.raw_os_error() {
                // The input, or the driver, has no such timings.
                Some(libc::ENOTTY | libc::ENODATA | libc::EINVAL) => return Ok(()),
                Some(libc::ENOLINK) => "nothing is connected to its input, or it is switched off",
                Some(libc::ENOLCK) => "the signal at its input is not stable",
                Some(libc::ERANGE) => "the signal at its input is beyond what it can take",
                _ => return Err(Error::from_io("ask the timings of", self.name(), cause)),
            };
            return Err(Error::new(Kind::Timeout, "lock to the signal of", self.name()).because(why));
        }
        raw::set_dv_timings(self.as_fd(), &mut timings).context("set the timings of", || self.name())
    }
}
