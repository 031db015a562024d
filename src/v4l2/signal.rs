//! The signal at an input that takes digital video: HDMI, DisplayPort.

use std::os::fd::AsFd;

use nix::libc;
use v4l::v4l_sys as sys;

use super::{Device, raw};
use crate::error::{Context, Error, Kind, Result};

impl Device {
    /// Sets the timings that the signal has, and tells whether they were others before. Nothing to do at inputs without any (a sensor,
    /// a webcam, an analogue tuner).
    ///
    /// The driver refuses while the queue has buffers. Cost: up to three system calls.
    ///
    /// # Errors
    /// [`Kind::Timeout`] if there is no signal now, or none that can be locked to (`VIDIOC_QUERY_DV_TIMINGS`: `ENOLINK`, `ENOLCK`,
    /// `ERANGE`).
    pub fn lock_to_signal(&self) -> Result<bool> {
        let mut timings: sys::v4l2_dv_timings = raw::zeroed();
        if let Err(cause) = raw::query_dv_timings(self.as_fd(), &mut timings) {
            let why = match cause.raw_os_error() {
                // The input, or the driver, has no such timings.
                Some(libc::ENOTTY | libc::ENODATA | libc::EINVAL) => return Ok(false),
                Some(libc::ENOLINK) => "nothing is connected to its input, or it is switched off",
                Some(libc::ENOLCK) => "the signal at its input is not stable",
                Some(libc::ERANGE) => "the signal at its input is beyond what it can take",
                _ => return Err(Error::from_io("ask the timings of", self.name(), cause)),
            };
            return Err(Error::new(Kind::Timeout, "lock to the signal of", self.name()).because(why));
        }
        let mut current: sys::v4l2_dv_timings = raw::zeroed();
        if raw::get_dv_timings(self.as_fd(), &mut current).is_ok() && same(&current, &timings) {
            return Ok(false);
        }
        raw::set_dv_timings(self.as_fd(), &mut timings).context("set the timings of", || self.name())?;
        Ok(true)
    }
}

/// Whether two timings are one to the eye of a receiver: size, scan, clock and blanking. Standards and flags say where they come from.
fn same(one: &sys::v4l2_dv_timings, other: &sys::v4l2_dv_timings) -> bool {
    let of = |timings: &sys::v4l2_dv_timings| {
        // SAFETY: both structures were zeroed and then written by the kernel, and the union has integers alone.
        let bt = unsafe { timings.__bindgen_anon_1.bt };
        let sync = [bt.hfrontporch, bt.hsync, bt.hbackporch, bt.vfrontporch, bt.vsync, bt.vbackporch];
        ({ timings.type_ }, bt.width, bt.height, bt.interlaced, bt.pixelclock, sync)
    };
    of(one) == of(other)
}
