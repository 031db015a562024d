//! Frames that can be taken back: those that another process shares.

use crate::error::{Error, Kind};

/// The frame was kept for longer than its lease, and who shares it has taken it back: its memory may hold another picture by now.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the frame was taken back by its server: its lease had run out")]
pub struct Revoked;

impl From<Revoked> for Error {
    fn from(revoked: Revoked) -> Error {
        let error = Error::new(Kind::Revoked, "read", "a frame").because(revoked);
        error.repair("drop frames and views sooner, or detach views; or share with a longer --lease or more --buffers")
    }
}

/// Knows whether the frame in a slot is still its holder's.
pub(crate) trait Holding: Send + Sync {
    /// Whether it was not taken back. What was read of the frame before a `true` was the frame.
    fn holds(&self, slot: u32) -> bool;
}
