//! GEM handles: a card's own numbers for memory.

use std::collections::HashMap;
use std::io;
use std::os::fd::AsFd;
use std::sync::{Mutex, PoisonError};

use super::Card;

/// GEM handles of one open card by number. The kernel gives one handle for one buffer however often it is imported, and counts
/// nothing (`DRM_IOCTL_PRIME_FD_TO_HANDLE`, drm_prime.c), so users are counted here.
#[derive(Debug, Default)]
pub(super) struct GemTable(Mutex<HashMap<u32, usize>>);

/// One use of a GEM handle; the last use closes it.
pub(super) struct GemHandle<'a> {
    card: &'a Card,
    handle: u32,
}

impl<'a> GemHandle<'a> {
    /// The card's handle for a dma-buf: one system call.
    ///
    /// # Errors
    /// What `DRM_IOCTL_PRIME_FD_TO_HANDLE` says.
    pub(super) fn import(card: &'a Card, buffer: impl AsFd) -> io::Result<GemHandle<'a>> {
        // Under the lock, so that nobody closes the same handle between import and count.
        let mut users = card.gem.0.lock().unwrap_or_else(PoisonError::into_inner);
        let handle = drm_ffi::gem::fd_to_handle(card.as_fd(), buffer.as_fd())?.handle;
        *users.entry(handle).or_default() += 1;
        Ok(GemHandle { card, handle })
    }

    /// A handle that the card has just made.
    pub(super) fn made(card: &'a Card, handle: u32) -> GemHandle<'a> {
        let mut users = card.gem.0.lock().unwrap_or_else(PoisonError::into_inner);
        *users.entry(handle).or_default() += 1;
        GemHandle { card, handle }
    }

    /// The number.
    pub(super) fn handle(&self) -> u32 {
        self.handle
    }
}

impl Drop for GemHandle<'_> {
    fn drop(&mut self) {
        let mut users = self.card.gem.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = users.get_mut(&self.handle) {
            *count -= 1;
            if *count == 0 {
                users.remove(&self.handle);
                // A failure means that the handle is closed already, which is the aim.
                let _ = drm_ffi::gem::close(self.card.as_fd(), self.handle);
            }
        }
    }
}
