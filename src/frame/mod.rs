//! Buffers, frames, and the lease that keeps a frame's memory from being filled again.

mod buffer;
mod cow;
mod lease;
mod meta;
mod revoked;
mod room;

pub use buffer::{Buffer, BufferReader, BufferWriter, WeakBuffer};
pub(crate) use cow::Views;
pub use cow::{CowView, MAX_VIEWS, RawView, ViewInfo, ViewPages, ViewPolicy};
pub(crate) use lease::{FreeSlot, Slots, SlotsArc};
pub use lease::{Lease, MAX_SLOTS, SlotCounts, Stage};
pub use meta::{Clock, FrameFlags, FrameMeta, Timestamp};
pub(crate) use revoked::Holding;
pub use revoked::Revoked;
pub use room::Room;

/// A buffer filled once: the buffer, what is known of this filling, and the lease that keeps it so.
///
/// Clones are cheap and share the lease. When the last clone is dropped the slot goes back to its queue, which fills it
/// again; the drop itself makes no system call, cannot fail and cannot panic.
#[derive(Clone, Debug)]
pub struct Frame {
    buffer: Buffer,
    meta: FrameMeta,
    lease: Lease,
}

impl Frame {
    pub(crate) fn new(buffer: Buffer, meta: FrameMeta, lease: Lease) -> Frame {
        Frame { buffer, meta, lease }
    }

    /// The memory and its layout. A clone of the buffer keeps the memory alive but not the frame: without the lease the
    /// camera may fill it again.
    pub fn buffer(&self) -> &Buffer {
        &self.buffer
    }

    /// Sequence number, time stamp, bytes used, flags.
    pub fn meta(&self) -> &FrameMeta {
        &self.meta
    }

    /// The right to keep the slot out of its queue.
    pub fn lease(&self) -> &Lease {
        &self.lease
    }

    /// The slot's index in its queue.
    pub fn slot(&self) -> u32 {
        self.lease.index()
    }

    /// Whether it was not taken back: what was read of it before an `Ok` was the frame. Only frames that another process shares
    /// ([`Receiver`](crate::share::Receiver)) are ever taken back. Cost: two loads.
    ///
    /// # Errors
    /// [`Revoked`].
    pub fn check(&self) -> Result<(), Revoked> {
        self.lease.check()
    }
}
