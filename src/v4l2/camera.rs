//! A camera as a source of frames: device and queue together.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use v4l::v4l_sys as sys;

use super::queue::{Allocated, Dequeued, Event, Idle, Queue, Streaming};
use super::{Api, Device, FormatOffer, Rate, raw};
use crate::endpoint::{Ready, Source, SourceCounts};
use crate::error::{Context, Error, Kind, Result};
use crate::format::{Colour, Format, Fourcc, Layout};
use crate::frame::{Buffer, Frame};

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
    /// Bytes from one row to the next; the driver may not honour it.
    pub stride: Option<u32>,
    /// Frames a second.
    pub fps: Option<f64>,
    /// The number of the input.
    pub input: Option<u32>,
    /// Buffers in the queue; else the driver's minimum and three (on screen, pending, one lease).
    pub buffers: Option<u32>,
}

/// A camera with its format agreed and its buffers made.
#[derive(Debug)]
pub struct Camera {
    device: Arc<Device>,
    name: String,
    layout: Layout,
    rate: Option<Rate>,
    queue: State,
    watchdog: Duration,
    last_sequence: Option<u32>,
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
    /// Agrees with the camera on what is asked, makes the buffers and exports them.
    ///
    /// # Errors
    /// [`Kind::Unsupported`] for a format, size or rate that the camera lacks, naming the nearest that it offers;
    /// [`Kind::Busy`] if another program streams from it; otherwise the refusal of the call that failed.
    pub fn open(device: Device, request: &CameraRequest) -> Result<Camera> {
        let device = Arc::new(device);
        if let Some(input) = request.input {
            device.set_input(input)?;
        }
        let layout = agree_format(&device, request)?;
        let rate = agree_rate(&device, request.fps, &layout)?;
        let queue = State::Idle(Queue::new(Arc::clone(&device), layout));
        let name = device.name();
        let counts = SourceCounts::default();
        let mut camera = Camera { device, name, layout, rate, queue, watchdog: WATCHDOG, last_sequence: None, counts };
        let buffers = request.buffers.unwrap_or_else(|| camera.device.minimum_buffers() + 3);
        camera.allocate(buffers)?;
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

    /// Waits for the next frame: for programs without an event loop. Starts the flow if need be.
    ///
    /// # Errors
    /// [`Kind::Timeout`] when none came before the watchdog's time was up; otherwise as [`Source::try_next`].
    #[expect(clippy::should_implement_trait, reason = "an iterator could not report failures and go on")]
    pub fn next(&mut self) -> Result<Frame> {
        if !matches!(self.queue, State::Streaming(_)) {
            self.start()?;
        }
        loop {
            self.recycle()?;
            let mut fds = [PollFd::new(self.as_fd(), PollFlags::POLLIN | PollFlags::POLLPRI)];
            let timeout = PollTimeout::try_from(self.watchdog).unwrap_or(PollTimeout::MAX);
            let ready = match poll(&mut fds, timeout) {
                Err(nix::errno::Errno::EINTR) => continue,
                other => other.context("wait for", || self.name.clone())?,
            };
            if ready == 0 {
                return Err(self.stalled());
            }
            let events = fds[0].revents().unwrap_or(PollFlags::empty());
            if let Some(frame) = self.try_next(Ready::from(events))? {
                return Ok(frame);
            }
        }
    }

    fn allocate(&mut self, count: u32) -> Result<()> {
        let (state, result) = match std::mem::replace(&mut self.queue, State::Turning) {
            State::Idle(queue) => match queue.allocate(count) {
                Ok(queue) => (State::Allocated(queue), Ok(())),
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
        match self.streaming()?.event()? {
            Some(Event::SourceChange) => {
                let error = Error::new(Kind::FormatChanged, "read frames from", name);
                Err(error.because("the signal at its input changed").repair("start again to use the new format"))
            }
            Some(Event::EndOfStream) => Err(Error::new(Kind::Ended, "read frames from", name)),
            None => Ok(()),
        }
    }

    /// Counts the frames missing between the last sequence number and this one. Numbers wrap at 2^32; a step backwards
    /// (a driver that starts again) is no loss.
    fn count_gap(&mut self, sequence: u32) {
        let step = self.last_sequence.map_or(1, |last| sequence.wrapping_sub(last));
        if (2..=u32::MAX / 2).contains(&step) {
            self.counts.dropped += u64::from(step - 1);
        }
        self.last_sequence = Some(sequence);
    }
}

impl From<PollFlags> for Ready {
    fn from(events: PollFlags) -> Ready {
        Ready {
            frame: events.contains(PollFlags::POLLIN),
            event: events.contains(PollFlags::POLLPRI),
            failed: events.intersects(PollFlags::POLLERR | PollFlags::POLLHUP | PollFlags::POLLNVAL),
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
        let (state, result) = match std::mem::replace(&mut self.queue, State::Turning) {
            State::Allocated(queue) => match queue.start() {
                Ok(queue) => {
                    queue.subscribe();
                    (State::Streaming(queue), Ok(()))
                }
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

    fn try_next(&mut self, ready: Ready) -> Result<Option<Frame>> {
        if ready.event {
            self.handle_event()?;
        }
        let queue = self.streaming()?;
        queue.recycle()?;
        match queue.dequeue()? {
            Dequeued::Frame(frame) => {
                self.count_gap(frame.meta().sequence);
                Ok(Some(frame))
            }
            Dequeued::Damaged(meta) => {
                self.count_gap(meta.sequence);
                self.counts.errored += 1;
                Ok(None)
            }
            // Without a frame to fetch, a failed queue would make every poll return at once for ever.
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

    fn stop(&mut self) -> Result<()> {
        let (state, result) = match std::mem::replace(&mut self.queue, State::Turning) {
            State::Streaming(queue) => match queue.stop() {
                Ok(queue) => (State::Allocated(queue), Ok(())),
                Err(failed) => (State::Streaming(failed.queue), Err(failed.error)),
            },
            other => (other, Ok(())),
        };
        self.queue = state;
        self.last_sequence = None;
        result
    }

    fn watchdog(&self) -> Option<Duration> {
        Some(self.watchdog)
    }

    fn stalled(&self) -> Error {
        let error = Error::new(Kind::Timeout, "get a frame from", self.name.clone());
        let cause = format!("none came for {} s", self.watchdog.as_secs_f64());
        match &self.queue {
            State::Streaming(queue) if queue.counts().queued == 0 => {
                let cause = format!("{cause}; the camera has no buffer to fill: {}", queue.counts());
                error.because(cause).repair("drop frames sooner, or ask for more buffers")
            }
            _ => error.because(cause).repair("the camera sends nothing: check its input and its cable"),
        }
    }

    fn counts(&self) -> SourceCounts {
        self.counts
    }
}

impl Device {
    /// Agrees on nothing new: the layout that the camera would deliver now, if its format is a known one.
    ///
    /// # Errors
    /// What `VIDIOC_G_FMT` says; [`Kind::Unsupported`] for a format that is not in [`Format`]'s table.
    pub fn current_layout(&self) -> Result<Layout> {
        read_layout(self, &current_format(self)?)
    }
}

fn current_format(device: &Device) -> Result<sys::v4l2_format> {
    let mut current: sys::v4l2_format = raw::zeroed();
    current.type_ = device.info().api.buffer_type();
    raw::get_format(device.as_fd(), &mut current).context("ask the format of", || device.name())?;
    Ok(current)
}

/// Sets the format, if anything is asked, and reads the driver's reply.
fn agree_format(device: &Device, request: &CameraRequest) -> Result<Layout> {
    let mut format = current_format(device)?;
    let code = match (request.code, request.format) {
        (None, None) => None,
        wanted => Some(choose_code(device, wanted)?),
    };
    if code.is_none() && request.size.is_none() && request.stride.is_none() {
        return read_layout(device, &format);
    }
    // Both APIs have these five fields, at different places of the union.
    macro_rules! ask {
        ($pix:expr) => {{
            let pix = $pix;
            pix.pixelformat = code.map_or(pix.pixelformat, |code| code.0);
            (pix.width, pix.height) = request.size.unwrap_or((pix.width, pix.height));
            pix.field = sys::v4l2_field_V4L2_FIELD_ANY;
            pix
        }};
    }
    match device.info().api {
        Api::SinglePlanar => {
            // SAFETY: `type_` is the single-planar type, for which the kernel wrote `pix`; all its fields are integers.
            let pix = ask!(unsafe { &mut format.fmt.pix });
            pix.bytesperline = request.stride.unwrap_or(0);
            pix.sizeimage = 0;
        }
        Api::MultiPlanar => {
            // SAFETY: `type_` is the multi-planar type, for which the kernel wrote `pix_mp`; all its fields are integers. Its
            // fields are at odd addresses (it is packed), so they are only read and written whole.
            let pix = ask!(unsafe { &mut format.fmt.pix_mp });
            let mut planes = pix.plane_fmt;
            for plane in &mut planes {
                plane.bytesperline = request.stride.unwrap_or(0);
                plane.sizeimage = 0;
            }
            pix.plane_fmt = planes;
        }
    }
    raw::set_format(device.as_fd(), &mut format).context("set the format of", || device.name()).map_err(|error| {
        match error.kind() {
            Kind::Busy => error.repair("another program streams from this camera; close it"),
            _ => error,
        }
    })?;
    let layout = read_layout(device, &format)?;
    match request.size {
        Some(wanted) if wanted != layout.size() => Err(lacks_size(device, &format, wanted, layout.size())),
        _ => Ok(layout),
    }
}

fn lacks_size(device: &Device, format: &sys::v4l2_format, wanted: (u32, u32), given: (u32, u32)) -> Error {
    let code = format_code(device.info().api, format);
    let distance = |(width, height): (u32, u32)| width.abs_diff(wanted.0) + height.abs_diff(wanted.1);
    let offered = device.sizes(code).unwrap_or_default();
    let nearest = offered.iter().map(|sizes| sizes.nearest(wanted)).min_by_key(|&size| distance(size)).unwrap_or(given);
    let error = Error::new(Kind::Unsupported, "set the size of", device.name());
    error
        .because(format!("{} has no {}x{} in {code}", device.info().card, wanted.0, wanted.1))
        .repair(format!("the nearest that it offers is {}x{}", nearest.0, nearest.1))
}

/// The V4L2 code to ask for: the one named, else the format's code with the fewest memory planes that the camera offers.
fn choose_code(device: &Device, (code, format): (Option<Fourcc>, Option<Format>)) -> Result<Fourcc> {
    let offers = device.formats()?;
    let fits = |offer: &&FormatOffer| match (code, format) {
        (Some(code), _) => offer.code == code,
        (None, format) => offer.known.map(|(known, _)| known) == format,
    };
    let best = offers.iter().filter(fits).min_by_key(|offer| offer.known.map(|(_, planes)| planes));
    best.map(|offer| offer.code).ok_or_else(|| {
        let wanted = code.or(format.map(Format::name)).map(|code| code.to_string()).unwrap_or_default();
        let mut names: Vec<_> = offers.iter().map(|offer| match offer.known {
            Some((format, _)) if format.v4l2().next().map(|(code, _)| code) == Some(offer.code) => format.name(),
            _ => offer.code,
        }).map(|name| name.to_string()).collect();
        names.dedup();
        let error = Error::new(Kind::Unsupported, "set the format of", device.name());
        error.because(format!("{} has no {wanted}", device.info().card)).repair(format!("it offers {}", names.join(" ")))
    })
}

fn format_code(api: Api, format: &sys::v4l2_format) -> Fourcc {
    // SAFETY: the kernel wrote the member that belongs to the buffer type of `api`; both hold integers alone.
    Fourcc(unsafe {
        match api {
            Api::SinglePlanar => format.fmt.pix.pixelformat,
            Api::MultiPlanar => format.fmt.pix_mp.pixelformat,
        }
    })
}

/// The layout that the driver's reply describes: strides are its own, never computed.
fn read_layout(device: &Device, reply: &sys::v4l2_format) -> Result<Layout> {
    let bad = || Error::new(Kind::Unsupported, "use the format of", device.name());
    let code = format_code(device.info().api, reply);
    let unknown = || {
        bad()
            .because(format!("{code} is not a format that dmaflow knows"))
            .repair("ask for another one (`dmaflow list` shows what it offers)")
    };
    let (format, memory_planes) = Format::from_v4l2(code).ok_or_else(unknown)?;
    let (size, strides, colour) = match device.info().api {
        Api::SinglePlanar => {
            // SAFETY: the reply is of the single-planar type, for which the kernel wrote `pix`; all fields are integers.
            let pix = unsafe { reply.fmt.pix };
            // SAFETY: both members of the inner union are the same integer.
            let encoding = unsafe { pix.__bindgen_anon_1.ycbcr_enc };
            let colour = Colour::from_v4l2(pix.colorspace, encoding, pix.quantization);
            ((pix.width, pix.height), vec![pix.bytesperline], colour)
        }
        Api::MultiPlanar => {
            // SAFETY: the reply is of the multi-planar type, for which the kernel wrote `pix_mp`; all fields are integers.
            let pix = unsafe { reply.fmt.pix_mp };
            // SAFETY: both members of the inner union are the same integer.
            let encoding = unsafe { pix.__bindgen_anon_1.ycbcr_enc };
            let colour = Colour::from_v4l2(pix.colorspace, u32::from(encoding), u32::from(pix.quantization));
            let planes = pix.plane_fmt;
            let strides = planes.iter().take(usize::from(pix.num_planes)).map(|plane| plane.bytesperline).collect();
            ((pix.width, pix.height), strides, colour)
        }
    };
    let layout = match strides.as_slice() {
        &[stride] if memory_planes == 1 => Layout::contiguous(format, size, stride),
        strides => Layout::separate(format, size, strides),
    };
    let layout = layout.map_err(|cause| bad().because(cause))?;
    Ok(layout.with_colour(colour))
}

/// Sets the rate, if one is asked for, and reads the driver's reply.
fn agree_rate(device: &Device, fps: Option<f64>, layout: &Layout) -> Result<Option<Rate>> {
    let mut parameters: sys::v4l2_streamparm = raw::zeroed();
    parameters.type_ = device.info().api.buffer_type();
    let known = raw::get_parameters(device.as_fd(), &mut parameters).is_ok();
    let Some(fps) = fps else {
        return Ok(known.then(|| read_rate(&parameters)));
    };
    let subject = || format!("the rate of {}", device.name());
    if !known {
        return Err(Error::new(Kind::Unsupported, "set", subject()).because("the driver has no rates"));
    }
    let wanted = Rate::from_fps(fps);
    // SAFETY: the type is a capture type, for which `capture` is the member; all its fields are integers.
    let capture = unsafe { &mut parameters.parm.capture };
    capture.timeperframe = sys::v4l2_fract { numerator: wanted.numerator, denominator: wanted.denominator };
    raw::set_parameters(device.as_fd(), &mut parameters).context("set", subject)?;
    let given = read_rate(&parameters);
    // Drivers round (59.94 for 60000/1001); half a per cent is the same rate to a person.
    if given.fps().is_some_and(|given| (given - fps).abs() <= fps * 0.005) {
        return Ok(Some(given));
    }
    let code = format_code(device.info().api, &current_format(device)?);
    let offered = device.rates(code, layout.size()).unwrap_or_default();
    let nearest = offered.iter().filter_map(|rates| rates.nearest(fps)).min_by(|a, b| (a - fps).abs().total_cmp(&(b - fps).abs()));
    let nearest = nearest.or(given.fps()).unwrap_or(0.0);
    let (width, height) = layout.size();
    let error = Error::new(Kind::Unsupported, "set", subject());
    Err(error
        .because(format!("{} has no {fps} frames a second at {width}x{height}", device.info().card))
        .repair(format!("the nearest that it offers is {}", (nearest * 1000.0).round() / 1000.0)))
}

fn read_rate(parameters: &sys::v4l2_streamparm) -> Rate {
    // SAFETY: the type is a capture type, for which `capture` is the member; all its fields are integers.
    let per_frame = unsafe { parameters.parm.capture.timeperframe };
    Rate { numerator: per_frame.numerator, denominator: per_frame.denominator }
}
