//! Buffers, frames, and the lease that keeps a frame's memory from being filled again.

mod buffer;
mod cow;
mod lease;
mod meta;
mod release;
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

use std::sync::Arc;
use std::time::Duration;

use crate::error::Result;
use crate::fence::{PATIENCE, SyncFile};
use crate::memory::Access;

/// A buffer filled once: the buffer, what is known of this filling, and the lease that keeps it so.
///
/// Clones are cheap and share the lease. When the last clone is dropped the slot goes back to its queue, which fills it
/// again; the drop itself makes no system call, cannot fail and cannot panic.
#[derive(Clone, Debug)]
pub struct Frame {
    buffer: Buffer,
    meta: FrameMeta,
    /// Before it has signalled the memory does not hold the picture.
    acquire: Option<Arc<SyncFile>>,
    lease: Lease,
}

impl Frame {
    pub(crate) fn new(buffer: Buffer, meta: FrameMeta, lease: Lease) -> Frame {
        Frame { buffer, meta, acquire: None, lease }
    }

    /// The same frame, whose memory holds the picture only when this fence has signalled: a device is still writing it. In place of the
    /// one that it had. The slot is not filled again before that either, however early the frame is dropped.
    ///
    /// Of this clone and of those made from it: clones made before do not know of the fence, and whoever reads those does not wait.
    ///
    /// The fence must cover every writer: who shows the frame waits for this one in place of those that are in the dma-buf
    /// (`drm_gem_plane_helper_prepare_fb`).
    #[must_use]
    pub fn with_acquire_fence(mut self, fence: impl Into<Arc<SyncFile>>) -> Frame {
        let fence = fence.into();
        self.lease.release_after(Arc::clone(&fence));
        self.acquire = Some(fence);
        self
    }

    /// The same frame with the fences of writers that are in its dma-bufs now as its acquire fence, for a producer that synchronises
    /// implicitly: waiting for them then ends in time, and does not hold up a display. Cost: one system call for each memory plane, and
    /// one more for each after the first.
    ///
    /// # Errors
    /// As [`SyncFile::export`] and [`SyncFile::merge`].
    pub fn with_implicit_fences(self) -> Result<Frame> {
        let mut all: Option<SyncFile> = None;
        for dma_buf in (0u32..).map_while(|memory| self.buffer.dma_buf(memory)) {
            let fence = SyncFile::export(dma_buf, Access::Read)?;
            all = Some(match all {
                Some(before) => before.merge(&fence)?,
                None => fence,
            });
        }
        Ok(match all {
            Some(fence) => self.with_acquire_fence(fence),
            None => self,
        })
    }

    /// The fence before whose signal the memory does not hold the picture; `None` if it does.
    pub fn acquire_fence(&self) -> Option<&SyncFile> {
        self.acquire.as_deref()
    }

    pub(crate) fn shared_acquire_fence(&self) -> Option<Arc<SyncFile>> {
        self.acquire.clone()
    }

    /// Waits until the memory holds the picture, `timeout` at most. Without an acquire fence no system call.
    ///
    /// # Errors
    /// As [`SyncFile::wait`], naming the fence.
    pub fn wait_acquired(&self, timeout: Duration) -> Result<()> {
        self.acquire.as_ref().map_or(Ok(()), |fence| fence.wait(timeout))
    }

    /// The acquire fence has signalled, and what became of its work has been told: it is not asked again.
    pub(crate) fn acquired(&mut self) {
        self.acquire = None;
    }

    /// Opens the memory for reading by the CPU ([`Buffer::read`]) when it holds the picture, for which it waits 5 s at most.
    ///
    /// # Errors
    /// As [`Frame::wait_acquired`] and [`Buffer::read`].
    pub fn read(&self) -> Result<BufferReader<'_>> {
        self.wait_acquired(PATIENCE)?;
        self.buffer.read()
    }

    /// A device reads the memory until this fence has signalled: the slot is not filled again before, however early the frame is dropped.
    /// Several add up. See [`Lease::release_after`].
    pub fn release_after(&self, fence: impl Into<Arc<SyncFile>>) {
        self.lease.release_after(fence);
    }

    /// As [`release_after`](Frame::release_after) with the fences of readers and writers that are in its dma-bufs now, for a consumer that
    /// synchronises implicitly, as OpenGL does: V4L2 does not look for them before it fills the memory again. To be called when the work
    /// that reads the frame has been submitted. Cost: one system call for each memory plane.
    ///
    /// # Errors
    /// As [`SyncFile::export`].
    pub fn release_after_implicit_fences(&self) -> Result<()> {
        for dma_buf in (0u32..).map_while(|memory| self.buffer.dma_buf(memory)) {
            self.release_after(SyncFile::export(dma_buf, Access::ReadWrite)?);
        }
        Ok(())
    }

    /// The memory and its layout. A clone of the buffer keeps the memory alive but not the frame: without the lease the
    /// camera may fill it again. The buffer knows nothing of the [acquire fence](Frame::acquire_fence).
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
