//! What a camera tells of its own accord: that its signal changed, that it has ended.

use std::os::fd::AsFd;

use nix::libc;
use v4l::v4l_sys as sys;

use super::{Device, raw};
use crate::error::{Error, Result};

/// Something that happened at the source.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Event {
    /// The incoming signal changed (`V4L2_EVENT_SOURCE_CHANGE`): the format must be asked for again.
    SourceChange,
    /// The source has ended (`V4L2_EVENT_EOS`).
    EndOfStream,
}

impl Device {
    /// Asks to be told of changes at the input in use and of the source's end. Drivers without such events say so, and it does not
    /// matter. Cost: three system calls.
    pub fn subscribe(&self) {
        // A source change is told for one input, by its number ("V4L2_EVENT_SOURCE_CHANGE" in the documentation of VIDIOC_DQEVENT).
        let mut input = 0;
        let input = raw::get_input(self.as_fd(), &mut input).map_or(0, |()| input.cast_unsigned());
        for (event, id) in [(sys::V4L2_EVENT_SOURCE_CHANGE, input), (sys::V4L2_EVENT_EOS, 0)] {
            let mut subscription: sys::v4l2_event_subscription = raw::zeroed();
            subscription.type_ = event;
            subscription.id = id;
            let _ = raw::subscribe_event(self.as_fd(), &mut subscription);
        }
    }

    /// The next event, if there is one of those [subscribed to](Device::subscribe): one system call.
    ///
    /// # Errors
    /// [`Kind::Disconnected`](crate::error::Kind::Disconnected) when the device is gone, otherwise what `VIDIOC_DQEVENT` says.
    pub fn event(&self) -> Result<Option<Event>> {
        loop {
            let mut event: sys::v4l2_event = raw::zeroed();
            return match raw::dequeue_event(self.as_fd(), &mut event) {
                Ok(()) if event.type_ == sys::V4L2_EVENT_EOS => Ok(Some(Event::EndOfStream)),
                Ok(()) if event.type_ == sys::V4L2_EVENT_SOURCE_CHANGE => Ok(Some(Event::SourceChange)),
                // Another that the program has subscribed to on this device.
                Ok(()) => continue,
                // No event pending (v4l2_event_dequeue), or a driver without events.
                Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTTY | libc::EAGAIN)) => {
                    Ok(None)
                }
                Err(error) => {
                    let error = Error::from_io("read the events of", self.name(), error);
                    Err(match error.errno() {
                        Some(libc::ENODEV) => error.repair("the camera was disconnected"),
                        _ => error,
                    })
                }
            };
        }
    }
}
