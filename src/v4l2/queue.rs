//! The driver's buffers as a typestate: each state has only the calls that are right in it, and a call that fails gives the
//! queue back as it was.
//!
//! ```text
//!             allocate, import
//! Queue<Idle> ────────────────▶ Queue<Allocated> ── start ──▶ Queue<Streaming>
//!      ▲                          │          ▲                     │
//!      └───────── release ────────┘          └──────── stop ───────┘
//! ```

mod import;
mod read_only;
mod shortage;

use std::fmt;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;

use nix::libc;
use v4l::v4l_sys as sys;

pub(crate) use self::import::StillRead;
pub(super) use self::shortage::held_by;
use super::raw::{self, BufferCall, MAX_V4L2_PLANES};
use super::{Api, Device};
use crate::causes::Call;
use crate::dmabuf::DmaBuf;
use crate::error::{Context, Error, Kind, Result};
use crate::format::{Layout, MAX_PLANES};
use crate::frame::{
    Buffer, Clock, Frame, FrameFlags, FrameMeta, MAX_SLOTS, SlotCounts, Slots, SlotsArc, Timestamp, ViewInfo,
    ViewPolicy,
};
use crate::memory::{Access, Memory};

/// No buffers.
#[derive(Debug)]
pub struct Idle(());

/// Buffers, and no flow.
#[derive(Debug)]
pub struct Allocated(Pool);

/// Buffers, and the driver fills those that are queued.
#[derive(Debug)]
pub struct Streaming(Pool);

/// A capture queue in one of its states: [`Idle`], [`Allocated`], [`Streaming`].
///
/// Closing the device stops and frees the queue (`vb2_fop_release`), so dropping needs no call; frames and buffers that
/// somebody holds stay valid.
#[derive(Debug)]
pub struct Queue<S> {
    device: Arc<Device>,
    layout: Layout,
    view_policy: ViewPolicy,
    state: S,
}

/// A step that failed, with the queue as it was before.
pub struct Failed<Q> {
    /// Why.
    pub error: Error,
    /// The queue, in its old state.
    pub queue: Q,
}

impl<Q> fmt::Debug for Failed<Q> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Failed({:?})", self.error)
    }
}

struct Pool {
    slots: SlotsArc,
    /// By slot, for the queue's whole life: the driver caches an import by the slot that it came in.
    buffers: Vec<Buffer>,
    made_by: MadeBy,
    /// The driver starves with fewer buffers than this.
    least_queued: u32,
}

/// Who made a queue's buffers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum MadeBy {
    /// The driver (`V4L2_MEMORY_MMAP`).
    Driver,
    /// Somebody else; the driver imports them (`V4L2_MEMORY_DMABUF`).
    Others,
}

impl MadeBy {
    fn memory(self) -> u32 {
        match self {
            MadeBy::Driver => sys::v4l2_memory_V4L2_MEMORY_MMAP,
            MadeBy::Others => sys::v4l2_memory_V4L2_MEMORY_DMABUF,
        }
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pool({} buffers: {})", self.buffers.len(), self.slots.counts())
    }
}

/// What a driver gave back.
#[derive(Debug)]
pub enum Dequeued {
    /// A frame.
    Frame(Frame),
    /// A frame marked as damaged (`V4L2_BUF_FLAG_ERROR`), which will be queued again.
    Damaged(FrameMeta),
    /// Nothing yet.
    Nothing,
}

impl<S> Queue<S> {
    fn name(&self) -> String {
        self.device.name()
    }

    fn api(&self) -> Api {
        self.device.info().api
    }

    fn with<T>(self, state: T) -> Queue<T> {
        Queue { device: self.device, layout: self.layout, view_policy: self.view_policy, state }
    }

    fn request(&self, made_by: MadeBy, count: u32) -> Result<u32> {
        let mut request: sys::v4l2_requestbuffers = raw::zeroed();
        request.count = count;
        request.type_ = self.api().buffer_type();
        request.memory = made_by.memory();
        let step = match (count, made_by) {
            (0, _) => "free the buffers of",
            (_, MadeBy::Driver) => "allocate buffers of",
            (_, MadeBy::Others) => "import buffers into",
        };
        raw::request_buffers(self.device.as_fd(), &mut request)
            .context(step, || self.name())
            .map_err(|error| match made_by {
                MadeBy::Driver => Call::RequestOwn.explain(error),
                MadeBy::Others => Call::RequestImport.explain(error),
            })?;
        Ok(request.count)
    }

    /// One call with a `v4l2_buffer` of this queue. For the single-planar API the one plane's numbers are taken from and put
    /// into `planes[0]`, so that callers see one shape.
    fn call(
        &self,
        made_by: MadeBy,
        which: BufferCall,
        index: u32,
        planes: &mut [sys::v4l2_plane; MAX_V4L2_PLANES],
    ) -> std::io::Result<sys::v4l2_buffer> {
        let mut buffer: sys::v4l2_buffer = raw::zeroed();
        buffer.index = index;
        buffer.type_ = self.api().buffer_type();
        buffer.memory = made_by.memory();
        match self.api() {
            Api::SinglePlanar => {
                if made_by == MadeBy::Others {
                    buffer.length = planes[0].length;
                    // SAFETY: for this kind of memory the member is `fd`, an integer; `planes` was zeroed before callers wrote it.
                    buffer.m.fd = unsafe { planes[0].m.fd };
                }
                raw::buffer(self.device.as_fd(), which, &mut buffer, None)?;
                planes[0].length = buffer.length;
                planes[0].bytesused = buffer.bytesused;
            }
            Api::MultiPlanar => raw::buffer(self.device.as_fd(), which, &mut buffer, Some(planes))?,
        }
        Ok(buffer)
    }
}

impl Queue<Idle> {
    /// The driver has agreed to another layout.
    pub(super) fn set_layout(&mut self, layout: Layout) {
        self.layout = layout;
    }

    /// A queue without buffers, whose frames will have the layout that the driver has agreed to.
    pub(super) fn new(device: Arc<Device>, layout: Layout) -> Queue<Idle> {
        Queue { device, layout, view_policy: ViewPolicy::default(), state: Idle(()) }
    }

    /// Makes `count` buffers and exports each memory plane once. The driver may give more or fewer.
    ///
    /// # Errors
    /// What `VIDIOC_REQBUFS`, `VIDIOC_QUERYBUF` or `VIDIOC_EXPBUF` says, with the queue as it was.
    pub fn allocate(self, count: u32) -> Result<Queue<Allocated>, Box<Failed<Queue<Idle>>>> {
        match self.pool(count) {
            Ok(pool) => Ok(self.with(Allocated(pool))),
            Err(error) => {
                // What was made is freed; if that fails too, the first failure is the one to report.
                let _ = self.request(MadeBy::Driver, 0);
                Err(Box::new(Failed { error, queue: self }))
            }
        }
    }

    fn pool(&self, count: u32) -> Result<Pool> {
        let given = self.request(MadeBy::Driver, count)?.min(MAX_SLOTS);
        if given == 0 {
            return Err(Error::new(Kind::System, "allocate buffers of", self.name()).because("the driver gave none"));
        }
        let layout = self.actual_layout()?;
        let buffers = (0..given).map(|index| self.export(layout, index)).collect::<Result<_>>()?;
        Ok(self.pool_of(buffers, MadeBy::Driver))
    }

    fn pool_of(&self, buffers: Vec<Buffer>, made_by: MadeBy) -> Pool {
        // MAX_SLOTS at most.
        let count = buffers.len() as u32;
        // One to fill while the next is on its way, and never more than half of them.
        let least_queued = (self.device.minimum_buffers() + 1).min(count / 2).max(1);
        Pool { slots: Slots::new(count), buffers, made_by, least_queued }
    }

    /// The layout with the offsets at which the driver starts its data (`v4l2_plane.data_offset`), which it only tells for
    /// a buffer that has been prepared. Only the multi-planar API has such offsets.
    fn actual_layout(&self) -> Result<Layout> {
        let mut planes = no_planes();
        if self.api() == Api::SinglePlanar || self.call(MadeBy::Driver, BufferCall::Prepare, 0, &mut planes).is_err() {
            return Ok(self.layout);
        }
        self.prepared_layout(MadeBy::Driver)
    }

    /// The layout of buffer 0, which has been prepared.
    fn prepared_layout(&self, made_by: MadeBy) -> Result<Layout> {
        let mut planes = no_planes();
        self.call(made_by, BufferCall::Query, 0, &mut planes)
            .context("ask about a buffer of", || self.name())?;
        let mut places = self.layout.planes().to_vec();
        for place in &mut places {
            place.offset += planes.get(place.memory as usize).map_or(0, |plane| plane.data_offset);
        }
        let layout = Layout::new(self.layout.format(), self.layout.size(), &places);
        let layout =
            layout.map_err(|cause| Error::new(Kind::Unsupported, "use the buffers of", self.name()).because(cause))?;
        Ok(layout.with_colour(self.layout.colour()).with_modifier(self.layout.modifier()))
    }

    fn export(&self, layout: Layout, index: u32) -> Result<Buffer> {
        let mut planes = no_planes();
        self.call(MadeBy::Driver, BufferCall::Query, index, &mut planes)
            .context("ask about a buffer of", || self.name())?;
        let count = layout.memory_planes();
        let buffer_type = self.api().buffer_type();
        let mut lens = Vec::with_capacity(count);
        let mut memory = Vec::with_capacity(count);
        for (plane, info) in (0u32..).zip(planes).take(count) {
            let fd = raw::export(self.device.as_fd(), buffer_type, index, plane, Access::ReadWrite);
            let fd = fd.context("export", || format!("buffer {index} of {} as a dma-buf", self.name()));
            let fd = fd.map_err(|error| Call::ExportBuffer.explain(error))?;
            let dma_buf = DmaBuf::new(fd)?;
            lens.push((info.length as usize).min(dma_buf.len()));
            memory.push(Memory::DmaBuf(dma_buf));
        }
        Buffer::new(layout, memory, &lens)
    }
}

impl Queue<Allocated> {
    /// The buffers that frames will come in.
    pub fn buffers(&self) -> &[Buffer] {
        &self.state.0.buffers
    }

    /// Queues every free buffer and starts the flow.
    ///
    /// # Errors
    /// What `VIDIOC_QBUF` or `VIDIOC_STREAMON` says, with the queue as it was.
    pub fn start(self) -> Result<Queue<Streaming>, Box<Failed<Queue<Allocated>>>> {
        let mut streaming = self.turn(Streaming);
        let started = streaming.recycle().and_then(|()| streaming.switch(true));
        match started {
            Ok(()) => Ok(streaming),
            Err(error) => {
                // STREAMOFF takes queued buffers back also before STREAMON (vb2_core_streamoff).
                let _ = streaming.switch(false);
                streaming.state.0.slots.cancelled();
                Err(Box::new(Failed { error, queue: streaming.turn(Allocated) }))
            }
        }
    }

    /// Frees the driver's buffers. Memory that somebody still holds lives on.
    ///
    /// # Errors
    /// What `VIDIOC_REQBUFS` says, with the queue as it was.
    pub fn release(self) -> Result<Queue<Idle>, Box<Failed<Queue<Allocated>>>> {
        match self.request(self.state.0.made_by, 0) {
            Ok(_) => Ok(self.with(Idle(()))),
            Err(error) => Err(Box::new(Failed { error, queue: self })),
        }
    }

    fn turn<T>(self, state: fn(Pool) -> T) -> Queue<T> {
        let Queue { device, layout, view_policy, state: state_now } = self;
        Queue { device, layout, view_policy, state: state(state_now.0) }
    }
}

impl Queue<Streaming> {
    /// The buffers that frames come in.
    pub fn buffers(&self) -> &[Buffer] {
        &self.state.0.buffers
    }

    /// Where each slot is in its life.
    pub fn counts(&self) -> SlotCounts {
        self.state.0.slots.counts()
    }

    /// Queues every slot whose last lease was dropped and whose release fences have signalled: one system call for each, and one for each
    /// fence. If views keep so many buffers that the driver would starve, does what the [`ViewPolicy`] says; see
    /// [`set_view_policy`](Queue::set_view_policy).
    ///
    /// # Errors
    /// What `VIDIOC_QBUF` says; the slot stays free and is tried again the next time. [`Kind::Busy`] with
    /// [`ViewPolicy::Error`], saying who has views.
    pub fn recycle(&mut self) -> Result<()> {
        self.queue_free()?;
        if self.state.0.slots.views().is_empty() { Ok(()) } else { self.relieve() }
    }

    fn queue_free(&self) -> Result<()> {
        for slot in self.state.0.slots.take_free() {
            let mut planes = self.state.0.planes(slot.index());
            let queued = self.call(self.state.0.made_by, BufferCall::Queue, slot.index(), &mut planes);
            queued.map_err(|error| self.unqueued(error))?;
            slot.queued();
        }
        Ok(())
    }

    /// Takes the oldest filled buffer, without waiting: one system call.
    ///
    /// # Errors
    /// [`Kind::Ended`] after the last buffer of a stream, [`Kind::Disconnected`] when the device is gone, otherwise what
    /// `VIDIOC_DQBUF` says (`EIO`: the driver has given up).
    pub fn dequeue(&mut self) -> Result<Dequeued> {
        let next = self.take()?;
        if !matches!(next, Dequeued::Nothing) {
            self.relieve_at_once();
        }
        Ok(next)
    }

    /// What is known of the oldest filled buffer, which nobody will have: for the end of a flow. `None` if there is none.
    pub(super) fn discard(&mut self) -> Option<FrameMeta> {
        match self.take() {
            Ok(Dequeued::Frame(frame)) => Some(*frame.meta()),
            Ok(Dequeued::Damaged(meta)) => Some(meta),
            // A queue that has failed has told so before.
            Ok(Dequeued::Nothing) | Err(_) => None,
        }
    }

    fn take(&mut self) -> Result<Dequeued> {
        let mut planes = no_planes();
        let buffer = match self.call(self.state.0.made_by, BufferCall::Dequeue, 0, &mut planes) {
            Ok(buffer) => buffer,
            Err(error) => {
                return match error.raw_os_error() {
                    Some(libc::EAGAIN) => Ok(Dequeued::Nothing),
                    Some(libc::EPIPE) => Err(Error::new(Kind::Ended, "read frames from", self.name())),
                    _ => Err(self.broken("read frames from", error)),
                };
            }
        };
        let unknown = || {
            let error = Error::new(Kind::System, "read frames from", self.name());
            error.because(format!("the driver returned buffer {}, which it did not have", buffer.index))
        };
        let lease = Slots::dequeued(&self.state.0.slots, buffer.index).ok_or_else(unknown)?;
        let memory = self.state.0.buffers.get(buffer.index as usize).ok_or_else(unknown)?;
        let meta = meta(&buffer, &planes);
        if meta.flags.error {
            // The lease drops here, and the slot is queued again by the next `recycle`.
            return Ok(Dequeued::Damaged(meta));
        }
        Ok(Dequeued::Frame(Frame::new(memory.clone(), meta, lease)))
    }

    /// Stops the flow. Slots that the driver had are free; frames that are leased stay valid.
    ///
    /// # Errors
    /// What `VIDIOC_STREAMOFF` says, with the queue as it was.
    pub fn stop(self) -> Result<Queue<Allocated>, Box<Failed<Queue<Streaming>>>> {
        match self.switch(false) {
            Ok(()) => {
                self.state.0.slots.cancelled();
                Ok(self.turn(Allocated))
            }
            Err(error) => Err(Box::new(Failed { error, queue: self })),
        }
    }

    fn turn<T>(self, state: fn(Pool) -> T) -> Queue<T> {
        let Queue { device, layout, view_policy, state: state_now } = self;
        Queue { device, layout, view_policy, state: state(state_now.0) }
    }

    fn switch(&self, on: bool) -> Result<()> {
        let mut buffer_type = self.api().buffer_type().cast_signed();
        let switched = match on {
            true => raw::stream_on(self.device.as_fd(), &mut buffer_type),
            false => raw::stream_off(self.device.as_fd(), &mut buffer_type),
        };
        switched.map_err(|error| match on {
            true => Call::StreamOn.explain(Error::from_io("start", self.name(), error)),
            false => self.broken("stop", error),
        })
    }

    /// What a refusal of `VIDIOC_QBUF` means: for somebody else's memory, that it cannot be imported.
    fn unqueued(&self, error: std::io::Error) -> Error {
        match self.state.0.made_by {
            MadeBy::Driver => self.broken("queue a buffer of", error),
            MadeBy::Others => import::refused("queue an imported buffer of", self.name(), error),
        }
    }

    /// What an errno of a queue with buffers means; the numbers are those that videobuf2 and the calls' documentation give.
    fn broken(&self, step: &'static str, error: std::io::Error) -> Error {
        let error = Error::from_io(step, self.name(), error);
        match error.errno() {
            Some(libc::ENODEV) => error.repair("the camera was disconnected"),
            Some(libc::EIO) => {
                error.repair("the driver has stopped the stream for a fatal error; the kernel log may say which")
            }
            Some(libc::ENOSPC) => error.repair("the bus has no bandwidth left: ask for a smaller size or rate"),
            Some(libc::EINVAL) => error.repair("the driver refused; the kernel log may say why"),
            _ => error,
        }
    }
}

fn no_planes() -> [sys::v4l2_plane; MAX_V4L2_PLANES] {
    [raw::zeroed(); MAX_V4L2_PLANES]
}

fn meta(buffer: &sys::v4l2_buffer, planes: &[sys::v4l2_plane; MAX_V4L2_PLANES]) -> FrameMeta {
    let flag = |bit| buffer.flags & bit != 0;
    let clock = match buffer.flags & sys::V4L2_BUF_FLAG_TIMESTAMP_MASK {
        sys::V4L2_BUF_FLAG_TIMESTAMP_MONOTONIC => Clock::Monotonic,
        sys::V4L2_BUF_FLAG_TIMESTAMP_COPY => Clock::Copied,
        _ => Clock::Unknown,
    };
    let seconds = u64::try_from(buffer.timestamp.tv_sec).unwrap_or(0);
    let micros = u64::try_from(buffer.timestamp.tv_usec).unwrap_or(0);
    let mut bytes_used = [0; MAX_PLANES];
    for (used, plane) in bytes_used.iter_mut().zip(planes) {
        *used = plane.bytesused;
    }
    FrameMeta {
        sequence: buffer.sequence,
        timestamp: Timestamp { us: seconds * 1_000_000 + micros, clock },
        bytes_used,
        flags: FrameFlags {
            error: flag(sys::V4L2_BUF_FLAG_ERROR),
            last: flag(sys::V4L2_BUF_FLAG_LAST),
            start_of_exposure: flag(sys::V4L2_BUF_FLAG_TSTAMP_SRC_SOE),
        },
    }
}
