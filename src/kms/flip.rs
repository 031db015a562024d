//! Page-flip events: when a picture came on screen.

use std::io;
use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::Card;
use crate::error::{Context, Error, Kind, Result};

/// A picture came on screen.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Flip {
    /// The number of the vertical blank at which it did.
    pub vblank: u32,
    /// When, in µs of `CLOCK_MONOTONIC`.
    pub at_us: u64,
}

/// Length of `struct drm_event_vblank` (drm.h).
const EVENT: usize = 32;

/// The most events that one read gives.
pub(super) const MAX_FLIPS: usize = 32;

impl Card {
    /// The next page-flip event, if there is one: one system call.
    ///
    /// # Errors
    /// What `read` says, `EAGAIN` apart.
    pub(super) fn read_flip(&self) -> Result<Option<Flip>> {
        // The kernel gives whole events only (drm_read); with room for one it never gives two.
        let mut bytes = [0; EVENT];
        let len = self.read_events(&mut bytes)?;
        Ok(parse(&bytes[..len]))
    }

    /// The page-flip events that are there, [`MAX_FLIPS`] at most, oldest first: one system call. Returns how many events of any
    /// sort there were.
    ///
    /// # Errors
    /// What `read` says, `EAGAIN` apart.
    pub(super) fn read_flips(&self, each: &mut dyn FnMut(Flip)) -> Result<usize> {
        let mut bytes = [0; EVENT * MAX_FLIPS];
        let len = self.read_events(&mut bytes)?;
        // Each event of the kinds that this crate asks for has this length.
        let events = bytes[..len].chunks_exact(EVENT);
        let count = events.len();
        events.filter_map(parse).for_each(each);
        Ok(count)
    }

    fn read_events(&self, bytes: &mut [u8]) -> Result<usize> {
        match nix::unistd::read(self.as_fd(), bytes) {
            Ok(len) => Ok(len),
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(0),
            Err(errno) => Err(Error::from_io("read the events of", self.name(), io::Error::from(errno))),
        }
    }

    /// Waits for the next page-flip event, `timeout_ms` at most.
    ///
    /// # Errors
    /// [`Kind::Timeout`] if none came.
    pub(super) fn wait_flip(&self, timeout_ms: u16) -> Result<Flip> {
        loop {
            if let Some(flip) = self.read_flip()? {
                return Ok(flip);
            }
            wait_readable(self, timeout_ms, "get a page flip from", &self.name())?;
        }
    }
}

/// Waits until a descriptor is readable.
///
/// # Errors
/// [`Kind::Timeout`] if it is not in time.
pub(super) fn wait_readable(fd: &impl AsFd, timeout_ms: u16, step: &'static str, subject: &str) -> Result<()> {
    let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
    match poll(&mut fds, PollTimeout::from(timeout_ms)) {
        Ok(0) => {
            let error = Error::new(Kind::Timeout, step, subject);
            Err(error.because(format!("nothing came for {} s", f64::from(timeout_ms) / 1000.0)))
        }
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(errno) => Err::<(), _>(errno).context(step, || subject),
    }
}

/// `DRM_EVENT_FLIP_COMPLETE`: type, length, user data (8 bytes), seconds, microseconds, sequence, CRTC; each but one 32 bits.
fn parse(bytes: &[u8]) -> Option<Flip> {
    let word = |index: usize| {
        let at = index * 4;
        bytes.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes)
    };
    (word(0)? == drm_ffi::DRM_EVENT_FLIP_COMPLETE).then_some(())?;
    let at_us = u64::from(word(4)?) * 1_000_000 + u64::from(word(5)?);
    Some(Flip { vblank: word(6)?, at_us })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_parsed() {
        let words = [2u32, 32, 0, 0, 7, 9, 42, 61];
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        assert_eq!(parse(&bytes), Some(Flip { vblank: 42, at_us: 7_000_009 }));
        assert_eq!(parse(&bytes[..28]), Some(Flip { vblank: 42, at_us: 7_000_009 }));
        assert_eq!(parse(&bytes[..20]), None);
        assert_eq!(parse(&[1, 0, 0, 0]), None, "another type of event");
        assert_eq!(parse(&[]), None);
    }
}
