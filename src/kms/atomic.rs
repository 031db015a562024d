//! Atomic requests: lists of object, property and value, committed together.

use std::io;

use super::Card;
use crate::causes::Call;
use crate::error::{Context, Error, Kind, Result};
use drm_ffi::{
    DRM_MODE_ATOMIC_ALLOW_MODESET, DRM_MODE_ATOMIC_NONBLOCK, DRM_MODE_ATOMIC_TEST_ONLY, DRM_MODE_PAGE_FLIP_EVENT,
};
use nix::libc;
use std::os::fd::AsFd;

/// How a request is committed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct CommitFlags {
    /// Change nothing; say whether the driver would.
    pub test_only: bool,
    /// The screen may go dark for a moment.
    pub allow_modeset: bool,
    /// Return before it is done.
    pub nonblock: bool,
    /// Send an event when it is done.
    pub event: bool,
}

impl CommitFlags {
    fn bits(self) -> u32 {
        let bit = |on, bit| if on { bit } else { 0 };
        bit(self.test_only, DRM_MODE_ATOMIC_TEST_ONLY)
            | bit(self.allow_modeset, DRM_MODE_ATOMIC_ALLOW_MODESET)
            | bit(self.nonblock, DRM_MODE_ATOMIC_NONBLOCK)
            | bit(self.event, DRM_MODE_PAGE_FLIP_EVENT)
    }
}

/// Values for properties of objects. Kept and committed again, a request allocates nothing.
#[derive(Clone, Debug, Default)]
pub(super) struct Request {
    objects: Vec<u32>,
    counts: Vec<u32>,
    properties: Vec<u32>,
    values: Vec<u64>,
}

impl Request {
    /// Starts the values of another object.
    pub(super) fn object(&mut self, object: u32) -> &mut Request {
        self.objects.push(object);
        self.counts.push(0);
        self
    }

    /// Adds a value for the object started last.
    pub(super) fn set(&mut self, property: u32, value: u64) -> &mut Request {
        if let Some(count) = self.counts.last_mut() {
            *count += 1;
            self.properties.push(property);
            self.values.push(value);
        }
        self
    }

    /// Whether there are values for an object.
    pub(super) fn has(&self, object: u32) -> bool {
        self.objects.contains(&object)
    }

    /// How many values there are.
    pub(super) fn len(&self) -> usize {
        self.values.len()
    }

    /// Changes the value at a place, counted from 0 as values were added.
    pub(super) fn set_at(&mut self, place: usize, value: u64) {
        if let Some(there) = self.values.get_mut(place) {
            *there = value;
        }
    }

    /// Changes the value that was added last.
    pub(super) fn set_last(&mut self, value: u64) {
        if let Some(last) = self.values.last_mut() {
            *last = value;
        }
    }

    /// Commits: one system call. An interrupted one is made again.
    ///
    /// # Errors
    /// The kernel's errno.
    pub(super) fn try_commit(&mut self, card: &Card, flags: CommitFlags) -> io::Result<()> {
        loop {
            let committed = drm_ffi::mode::atomic_commit(
                card.as_fd(),
                flags.bits(),
                &mut self.objects,
                &mut self.counts,
                &mut self.properties,
                &mut self.values,
            );
            match committed {
                Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN)) => {}
                other => return other,
            }
        }
    }

    /// [`Request::try_commit`] with the errno explained.
    ///
    /// # Errors
    /// As [`explained`].
    pub(super) fn commit(&mut self, card: &Card, flags: CommitFlags, step: &'static str) -> Result<()> {
        explained(self.try_commit(card, flags), card, step)
    }
}

/// What the kernel says to a commit for a device that has been taken away is rarely `ENODEV`: the controller was turned off and the
/// connector unregistered, and either makes it `EINVAL` (`drm_atomic_crtc_check`, `update_connector_routing`), as a wrong value would.
#[derive(Debug, thiserror::Error)]
#[error("the display's device is gone")]
struct Gone(#[source] io::Error);

/// What a commit said, with its errno explained.
///
/// # Errors
/// [`Kind::Disconnected`] when the device is gone; [`Kind::Permission`] when this process is not the card's DRM master any more.
pub(super) fn explained(committed: io::Result<()>, card: &Card, step: &'static str) -> Result<()> {
    let committed = match committed {
        // The look costs system calls, after a failure alone.
        Err(cause) if card.is_gone() => {
            let error = Error::new(Kind::Disconnected, step, card.name()).because(Gone(cause));
            return Err(error.said_by(Call::Commit.name()).repair("plug it in again"));
        }
        other => other,
    };
    let explain = |error: Error| match error.errno() {
        Some(libc::EACCES | libc::EPERM) => Call::Commit.explain(error).kind_is(Kind::Permission),
        _ => Call::Commit.explain(error),
    };
    committed.context(step, || card.name()).map_err(explain)
}
