//! The signal at a camera's input: whether there is one, and for digital video (HDMI, DisplayPort) its timings.

use std::os::fd::AsFd;

use nix::libc;
use v4l::v4l_sys as sys;

use super::{Device, raw};
use crate::error::{Context, Error, Kind, Result};

impl Device {
    /// Sets the timings that the signal has, and tells whether they were others before. Nothing is set at inputs without any (a
    /// sensor, a webcam, an analogue tuner); there it only looks whether the driver says that nothing comes.
    ///
    /// The driver refuses other timings while the queue has buffers. Cost: two or three system calls.
    ///
    /// # Errors
    /// [`Kind::Timeout`] if there is no signal now, or none that can be locked to (`VIDIOC_QUERY_DV_TIMINGS`: `ENOLINK`, `ENOLCK`,
    /// `ERANGE`; `V4L2_IN_ST_NO_SIGNAL` and `V4L2_IN_ST_NO_POWER` of `VIDIOC_ENUMINPUT`). [`Kind::Busy`] if the timings must change
    /// while another program has buffers.
    pub fn lock_to_signal(&self) -> Result<bool> {
        let mut timings: sys::v4l2_dv_timings = raw::zeroed();
        if let Err(cause) = raw::query_dv_timings(self.as_fd(), &mut timings) {
            return Err(match cause.raw_os_error() {
                // The input, or the driver, has no such timings.
                Some(libc::ENOTTY | libc::ENODATA | libc::EINVAL) => return self.must_have_signal().map(|()| false),
                Some(libc::ENOLINK) => self.no_signal("nothing is connected to its input, or it is switched off"),
                Some(libc::ENOLCK) => self.no_signal("the signal at its input is not stable"),
                Some(libc::ERANGE) => self.no_signal("the signal at its input is beyond what it can take"),
                _ => Error::from_io("ask the timings of", self.name(), cause),
            });
        }
        if self.timings().is_some_and(|current| same(&current, &timings)) {
            return Ok(false);
        }
        raw::set_dv_timings(self.as_fd(), &mut timings).context("set the timings of", || self.name())?;
        Ok(true)
    }

    /// An input without digital timings has its status alone to tell by. Drivers without inputs say nothing, which is no failure.
    fn must_have_signal(&self) -> Result<()> {
        let mut index = 0;
        let mut input: sys::v4l2_input = raw::zeroed();
        if raw::get_input(self.as_fd(), &mut index).is_err() {
            return Ok(());
        }
        input.index = index.cast_unsigned();
        match raw::enum_input(self.as_fd(), &mut input) {
            Ok(()) if input.status & sys::V4L2_IN_ST_NO_POWER != 0 => {
                Err(self.no_signal("what is connected to its input is switched off"))
            }
            Ok(()) if input.status & sys::V4L2_IN_ST_NO_SIGNAL != 0 => {
                Err(self.no_signal("there is no signal at its input"))
            }
            _ => Ok(()),
        }
    }

    fn no_signal(&self, why: &'static str) -> Error {
        let error = Error::new(Kind::Timeout, "lock to the signal of", self.name()).because(why);
        let inputs = self.input_names();
        error.repair(match inputs.is_empty() {
            true => "connect what it should show and switch that on".to_owned(),
            false => {
                format!("connect what it should show and switch that on, or choose another of its inputs: {inputs}")
            }
        })
    }

    /// The timings that are set, at an input for digital video.
    pub(super) fn timings(&self) -> Option<sys::v4l2_dv_timings> {
        let mut timings: sys::v4l2_dv_timings = raw::zeroed();
        raw::get_dv_timings(self.as_fd(), &mut timings).ok().map(|()| timings)
    }
}

/// Whether two timings are one to the eye of a receiver: size, scan, clock and blanking. Standards and flags say where they come from.
pub(super) fn same(one: &sys::v4l2_dv_timings, other: &sys::v4l2_dv_timings) -> bool {
    let of = |timings: &sys::v4l2_dv_timings| {
        // SAFETY: both structures were zeroed and then written by the kernel, and the union has integers alone.
        let bt = unsafe { timings.__bindgen_anon_1.bt };
        let sync = [bt.hfrontporch, bt.hsync, bt.hbackporch, bt.vfrontporch, bt.vsync, bt.vbackporch];
        ({ timings.type_ }, bt.width, bt.height, bt.interlaced, bt.pixelclock, sync)
    };
    of(one) == of(other)
}
