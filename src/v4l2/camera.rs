//! A camera as a source of frames: device and queue together.

mod follow;
mod losses;
mod wait;

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use super::agree::{agree_format, agree_rate, agree_strides, memory_lens};
use super::queue::{Allocated, Dequeued, Idle, Queue, StillRead, Streaming, held_by};
use super::{Device, Event, Rate};
use crate::clock::now_us;
use crate::endpoint::{Ready, Source, SourceCounts};
use crate::error::{Context, Error, Kind, Result};
use crate::fence::SyncFile;
use crate::format::{Format, Fourcc, Layout};
use crate::frame::{Buffer, Clock, Frame, FrameMeta, Room, Slots, ViewInfo, ViewPolicy};
use crate::ledger::Copies;

/// A frame that has not come after this long is a failure.
const WATCHDOG: Duration = Duration::from_secs(5);

/// What is asked of a camera; what is not asked stays as the driver has it.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct CameraRequest {
    /// The pixel format.
    pub format: Option<Format>,
    /// The V4L2 code, where one of several of the format is meant (`NM12`: NV12 in two memory planes).
    pub code: Option<Fourcc>,
    /// Width and height in pixels.
    pub size: Option<(u32, u32)>,
    /// Bytes from one row to the next, in the first memory plane.
    pub stride: Option<u32>,
    /// Frames a second.
    pub rate: RateRequest,
    /// The number of the input.
    pub input: Option<u32>,
    /// Buffers in the queue; else the driver's minimum and three (on screen, pending, one lease). Where other devices write or read frames
    /// after the camera has filled them, by [fences](crate::fence), each such frame keeps its buffer until its fence has signalled: as many
    /// more as those devices have in hand at a time leave the camera as many to fill. With fewer it drops frames while it has none, and
    /// goes on with the next signal.
    pub buffers: Option<u32>,
}

/// The frame rate asked of a camera, in frames a second.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub enum RateRequest {
    /// What the driver has.
    #[default]
    AsItIs,
    /// This one, or a failure that names the nearest.
    Exactly(f64),
    /// The fastest that the camera offers at its size and that is not above this; what the driver has if it offers none.
    FastestUpTo(f64),
}

/// A camera with its format agreed and its buffers made.
#[derive(Debug)]
pub struct Camera {
    device: Arc<Device>,
    name: String,
    layout: Layout,
    rate: Option<Rate>,
    queue: State,
    /// What it was asked for, to be kept when its source changes.
    request: CameraRequest,
    /// What of that could not be kept at the last change.
    not_kept: Vec<String>,
    /// Memory of others that it has given up, and that devices still read.
    still_read: Vec<StillRead>,
    /// How many buffers of its own it was asked for.
    own_buffers: u32,
    /// Its own buffers are exported for reading alone besides.
    read_only: bool,
    watchdog: Duration,
    last: Option<FrameMeta>,
    /// Whether the driver had no other buffer when that was taken.
    dry: bool,
    ended: bool,
    counts: SourceCounts,
}

#[derive(Debug)]
enum State {
    Idle(Queue<Idle>),
    Allocated(Queue<Allocated>),
    Streaming(Queue<Streaming>),
    /// Only while a state turns into the next.
    Turning,
}

impl Camera {
    /// Locks to the signal at an input for digital video, agrees with the camera on what is asked, makes the buffers and exports
    /// them. After a failure the input, the timings, the format and the rate are what they were.
    ///
    /// # Errors
    /// [`Kind::Unsupported`] for a format, size, stride or rate that the camera lacks, naming the nearest that it offers;
    /// [`Kind::Timeout`] if there is no signal at its input, as [`Device::lock_to_signal`]; [`Kind::Busy`] if another program
    /// streams from it; otherwise the refusal of the call that failed.
    pub fn open(device: Device, request: &CameraRequest) -> Result<Camera> {
        let device = Arc::new(device);
        let before = device.save_settings();
        Camera::agreed(Arc::clone(&device), request).inspect_err(|_| {
            // If that fails too, the first failure is the one to report.
            let _ = before.and_then(|before| device.restore_settings(&before));
        })
    }

    fn agreed(device: Arc<Device>, request: &CameraRequest) -> Result<Camera> {
        if let Some(input) = request.input {
            device.set_input(input)?;
        }
        // A receiver captures by the timings that it is set to, whatever comes: `VIDIOC_QUERY_DV_TIMINGS` only looks (its documentation).
        // A size that is asked for is agreed on below, by scaling where the driver has that.
        follow::lock(&device)?;
        let layout = agree_format(&device, request)?;
        let rate = agree_rate(&device, request.rate, &layout)?;
        let queue = State::Idle(Queue::new(Arc::clone(&device), layout));
        let name = device.name();
        let own_buffers = request.buffers.unwrap_or_else(|| device.minimum_buffers() + 3);
        let mut camera = Camera {
            device,
            name,
            layout,
            rate,
            queue,
            request: request.clone(),
            not_kept: Vec::new(),
            still_read: Vec::new(),
            own_buffers,
            read_only: false,
            watchdog: WATCHDOG,
            last: None,
            ended: false,
            dry: false,
            counts: SourceCounts::default(),
        };
        camera.allocate()?;
        Ok(camera)
    }

    /// The device, for its controls and offers.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Sets the time without a frame after which the stream has failed; 5 s at first.
    pub fn set_watchdog(&mut self, watchdog: Duration) {
        self.watchdog = watchdog;
    }

    /// The bytes that its driver wants of each memory plane, for [`Room::for_lens`](crate::frame::Room::for_lens). They may be
    /// more than the rows need. Cost: one system call.
    ///
    /// # Errors
    /// What `VIDIOC_G_FMT` says.
    pub fn memory_lens(&self) -> Result<Vec<usize>> {
        memory_lens(&self.device)
    }

    /// From now on captures into `buffers` (`V4L2_MEMORY_DMABUF`) and no longer into its own, whose slots are freed: memory that
    /// somebody holds of them lives on. They need the camera's format, size, strides and memory planes
    /// ([`Source::layout`]), and room for [`memory_lens`](Camera::memory_lens). The driver may use fewer than there are;
    /// [`Source::buffers`] tells which.
    ///
    /// A device that needs contiguous memory, or memory within its reach, refuses here, or in [`start`](Source::start) if its driver
    /// cannot try a buffer beforehand. [`use_own_buffers`](Camera::use_own_buffers) is the way back then.
    ///
    /// Memory that devices still read, by the [release fences](crate::frame::Frame::release_after) of frames that this camera has filled
    /// before, is not filled before those have signalled, also if the camera had other buffers in between. What is read for another camera,
    /// and frames of before that somebody holds, are the caller's affair.
    ///
    /// Cost: about four system calls and two for each buffer.
    ///
    /// # Errors
    /// [`Kind::Busy`] while it streams, [`Kind::Invalid`] for a buffer that does not fit, otherwise the call that refused and why;
    /// the camera then has buffers of its own again, new ones.
    pub fn use_buffers(&mut self, buffers: Vec<Buffer>) -> Result<()> {
        self.free()?;
        let (state, result) = match std::mem::replace(&mut self.queue, State::Turning) {
            State::Idle(queue) => match queue.import(buffers) {
                Ok(queue) => {
                    queue.hold_back(&mut self.still_read);
                    (State::Allocated(queue), Ok(()))
                }
                Err(failed) => (State::Idle(failed.queue), Err(failed.error)),
            },
            other => (other, Ok(())),
        };
        self.queue = state;
        if result.is_err() {
            // If that fails too, the next start says so; the first refusal is the one to report.
            let _ = self.allocate();
        }
        result
    }

    /// From now on captures into buffers that its driver makes, new ones and as many as at first.
    ///
    /// # Errors
    /// [`Kind::Busy`] while it streams, otherwise what making them says.
    pub fn use_own_buffers(&mut self) -> Result<()> {
        self.free()?;
        self.allocate()
    }

    /// Sets what happens when views of its frames ([`Frame::view`]) keep so many buffers that it would starve;
    /// [`ViewPolicy::Detach`] at first.
    pub fn set_view_policy(&mut self, policy: ViewPolicy) {
        match &mut self.queue {
            State::Idle(queue) => queue.set_view_policy(policy),
            State::Allocated(queue) => queue.set_view_policy(policy),
            State::Streaming(queue) => queue.set_view_policy(policy),
            State::Turning => {}
        }
    }

    /// Who has views of its frames now, the oldest first. No system call, no lock.
    pub fn views(&self) -> Vec<ViewInfo> {
        self.slots().map(|slots| slots.views().infos()).unwrap_or_default()
    }

    /// What was copied for views of its frames since its buffers were made: pages written, views detached, snapshots.
    pub fn view_copies(&self) -> Vec<Copies> {
        self.slots().map(|slots| slots.views().copies()).unwrap_or_default()
    }

    fn slots(&self) -> Option<&Slots> {
        match &self.queue {
            State::Allocated(queue) => Some(queue.slots()),
            State::Streaming(queue) => Some(queue.slots()),
            State::Idle(_) | State::Turning => None,
        }
    }

    /// Gives up the buffers. What devices still read of others' memory is remembered, for when that comes back.
    fn free(&mut self) -> Result<()> {
        self.still_read.retain(|(_, fence)| !fence.is_signalled());
        let (state, result) = match std::mem::replace(&mut self.queue, State::Turning) {
            State::Allocated(queue) => {
                let still_read = queue.still_read();
                match queue.release() {
                    Ok(queue) => {
                        self.still_read.extend(still_read);
                        (State::Idle(queue), Ok(()))
                    }
                    Err(failed) => (State::Allocated(failed.queue), Err(failed.error)),
                }
            }
            State::Streaming(queue) => {
                let error = Error::new(Kind::Busy, "change the buffers of", self.name.clone());
                (State::Streaming(queue), Err(error.because("it streams").repair("stop it first")))
            }
            other => (other, Ok(())),
        };
        self.queue = state;
        result
    }

    fn allocate(&mut self) -> Result<()> {
        let (state, result) = match std::mem::replace(&mut self.queue, State::Turning) {
            State::Idle(queue) => match queue.allocate(self.own_buffers) {
                Ok(queue) => {
                    let exported = if self.read_only { queue.export_read_only() } else { Ok(()) };
                    (State::Allocated(queue), exported)
                }
                Err(failed) => (State::Idle(failed.queue), Err(failed.error)),
            },
            other => (other, Ok(())),
        };
        self.queue = state;
        result
    }

    fn streaming(&mut self) -> Result<&mut Queue<Streaming>> {
        match &mut self.queue {
            State::Streaming(queue) => Ok(queue),
            _ => Err(Error::new(Kind::Invalid, "read frames from", self.name.clone()).because("it is not started")),
        }
    }

    fn handle_event(&mut self) -> Result<()> {
        let name = self.name.clone();
        match self.device.event()? {
            Some(Event::SourceChange) => {
                let error = Error::new(Kind::FormatChanged, "read frames from", name);
                Err(error
                    .because("the signal at its input changed")
                    .repair("start again to use the new format"))
            }
            // What is filled already comes first.
            Some(Event::EndOfStream) => {
                self.ended = true;
                Ok(())
            }
            None => Ok(()),
        }
    }
}

impl AsFd for Camera {
    fn as_fd(&self) -> BorrowedFd<'_> {
        (*self.device).as_fd()
    }
}

impl Source for Camera {
    fn name(&self) -> &str {
        &self.name
    }

    fn layout(&self) -> &Layout {
        self.buffers().first().map_or(&self.layout, Buffer::layout)
    }

    fn rate(&self) -> Option<f64> {
        self.rate.and_then(Rate::fps)
    }

    fn buffers(&self) -> &[Buffer] {
        match &self.queue {
            State::Allocated(queue) => queue.buffers(),
            State::Streaming(queue) => queue.buffers(),
            State::Idle(_) | State::Turning => &[],
        }
    }

    fn start(&mut self) -> Result<()> {
        if matches!(self.queue, State::Allocated(_)) {
            self.wait_for_a_slot()?;
        }
        // Before the flow: what changes from here on is told.
        self.device.subscribe();
        let (state, result) = match std::mem::replace(&mut self.queue, State::Turning) {
            State::Allocated(queue) => match queue.start() {
                Ok(queue) => (State::Streaming(queue), Ok(())),
                Err(failed) => (State::Allocated(failed.queue), Err(failed.error)),
            },
            State::Streaming(queue) => (State::Streaming(queue), Ok(())),
            other => {
                let error = Error::new(Kind::Invalid, "start", self.name.clone()).because("it has no buffers");
                (other, Err(error))
            }
        };
        self.queue = state;
        result
    }

    fn agree(&mut self, wished: &Layout) -> Result<(Layout, Room)> {
        self.free()?;
        let layout = agree_strides(&self.device, wished)?.with_colour(self.layout.colour());
        self.layout = layout;
        if let State::Idle(queue) = &mut self.queue {
            queue.set_layout(layout);
        }
        Ok((layout, Room::for_lens(&self.memory_lens()?)))
    }

    fn export_read_only(&mut self) -> Result<()> {
        self.read_only = true;
        match &self.queue {
            State::Allocated(queue) => queue.export_read_only(),
            State::Streaming(_) => {
                let error = Error::new(Kind::Busy, "export the buffers of", self.name.clone());
                Err(error.because("it streams").repair("stop it first"))
            }
            State::Idle(_) | State::Turning => Ok(()),
        }
    }

    fn follow(&mut self) -> Result<()> {
        self.stop()?;
        self.free()?;
        follow::lock(&self.device)?;
        let (layout, rate) = self.agree_again()?;
        (self.layout, self.rate) = (layout, rate);
        if let State::Idle(queue) = &mut self.queue {
            queue.set_layout(layout);
        }
        self.allocate()
    }

    fn not_kept(&self) -> &[String] {
        &self.not_kept
    }

    fn use_buffers(&mut self, buffers: Vec<Buffer>) -> Result<()> {
        Camera::use_buffers(self, buffers)
    }

    fn use_own_buffers(&mut self) -> Result<()> {
        Camera::use_own_buffers(self)
    }

    fn try_next(&mut self, ready: Ready) -> Result<Option<Frame>> {
        if ready.event {
            self.handle_event()?;
        }
        let queue = self.streaming()?;
        queue.recycle()?;
        let next = queue.dequeue()?;
        let dry = queue.slots().queued() == 0;
        let idle = ready.failed && dry;
        match next {
            Dequeued::Frame(frame) => {
                self.count_gap(*frame.meta());
                self.dry = dry;
                Ok(Some(frame))
            }
            Dequeued::Damaged(meta) => {
                self.count_gap(meta);
                self.dry = dry;
                self.counts.errored += 1;
                Ok(None)
            }
            // Without a frame to fetch, a failed queue would make every poll return at once for ever.
            Dequeued::Nothing if self.ended => Err(Error::new(Kind::Ended, "read frames from", self.name.clone())),
            // Nothing was queued when the flow started, because every frame of the last flow is still held.
            Dequeued::Nothing if idle => Err(self.stalled()),
            Dequeued::Nothing if ready.failed => {
                let error = Error::new(Kind::System, "read frames from", self.name.clone());
                Err(error.because("the driver reports that its queue has failed"))
            }
            Dequeued::Nothing => Ok(None),
        }
    }

    fn recycle(&mut self) -> Result<()> {
        self.streaming()?.recycle()
    }

    fn release_fences(&self) -> Vec<Arc<SyncFile>> {
        let fences = self.slots().map(Slots::release_fences).unwrap_or_default();
        // Asked for with each frame, and seldom with any.
        if fences.is_empty() { Vec::new() } else { fences.into_iter().map(|(_, fence)| fence).collect() }
    }

    fn starves(&self) -> bool {
        self.slots().is_some_and(Slots::starve)
    }

    fn stop(&mut self) -> Result<()> {
        self.count_the_end();
        let (state, result) = match std::mem::replace(&mut self.queue, State::Turning) {
            State::Streaming(queue) => match queue.stop() {
                Ok(queue) => (State::Allocated(queue), Ok(())),
                Err(failed) => (State::Streaming(failed.queue), Err(failed.error)),
            },
            other => (other, Ok(())),
        };
        self.queue = state;
        self.last = None;
        self.ended = false;
        result
    }

    fn watchdog(&self) -> Option<Duration> {
        Some(self.watchdog)
    }

    fn stalled(&self) -> Error {
        let error = Error::new(Kind::Timeout, "get a frame from", self.name.clone());
        let cause = format!("none came for {} s", self.watchdog.as_secs_f64());
        match self.slots() {
            Some(slots) if slots.queued() == 0 => {
                let (views, fences) = (self.views(), slots.waits_for());
                let held = held_by(&views);
                let cause = format!("{cause}; the camera has no buffer to fill: {}{held}{fences}", slots.counts());
                error.because(cause).repair(match (views.is_empty(), fences.is_empty()) {
                    (true, true) => "drop frames sooner, or ask for more buffers",
                    (false, true) => {
                        "drop frames and views sooner, let the queue detach views, or ask for more buffers"
                    }
                    (_, false) => "a device that reads the frames does not come to an end; or ask for more buffers",
                })
            }
            _ if self.counts.errored > 0 => error
                .because(format!("{cause} undamaged; {} buffers came damaged in all", self.counts.errored))
                .repair("the camera's signal is bad: check its input and its cable"),
            _ => error
                .because(cause)
                .repair("the camera sends nothing: check its input and its cable"),
        }
    }

    fn counts(&self) -> SourceCounts {
        self.counts
    }

    fn copies(&self) -> Vec<Copies> {
        self.view_copies()
    }

    fn set_view_policy(&mut self, policy: ViewPolicy) {
        Camera::set_view_policy(self, policy);
    }
}
