//! A camera that the test itself shares: it knows each frame before anybody else has it, and looks at the camera's queue at each.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use dmaflow::endpoint::{Ready, Sink, Source, SourceCounts};
use dmaflow::frame::Frame;
use dmaflow::share::{ConsumerInfo, Departure, Server, ServerRequest};
use dmaflow::v4l2::{Camera, CameraRequest, Device};
use nix::poll::{PollFd, PollFlags, poll};

use crate::capture::picture;
use crate::driver::with_the_driver;

/// A moment that no consumer needs to start, be it emulated beside another machine.
const PATIENCE: Duration = Duration::from_secs(100);

/// The camera and its server, in this process.
pub struct Shared {
    camera: Camera,
    server: Server,
}

/// Of a hundred frames so many may be lost by vivid itself, which had a buffer for each. Its thread makes frames by the clock and leaves
/// out those that were due while the host did not run it (`vivid_thread_vid_cap` in vivid-kthread-cap.c: `dropped_bufs`). That is the
/// host's doing and not the sharing's, whose own losses are for want of a buffer, and of which there may be none. In five seconds, which
/// the shortest of these flows takes, a host that stalls once for a quarter of a second costs as many. With more the machine does not
/// hold the rate, and what was tried at that rate was not tried.
const LATE: u64 = 5;

/// Whether vivid itself lost no more than it may of so many that were due.
pub fn is_in_time(late: u64, frames: u64) -> bool {
    late * 100 <= (frames + late) * LATE
}

/// What the camera gave.
#[derive(Default)]
pub struct Flow {
    pub frames: u64,
    /// Frames that the camera lost (gaps in the sequence numbers) while its driver had a buffer to fill: it came too late itself.
    pub late: u64,
    /// Frames that it lost for want of a buffer ([`SourceCounts::starved`]): before which frame, counted from 0, and how many.
    pub starved: Vec<(u64, u64)>,
    /// At which frames its driver had no buffer, after what consumers had released was given back to it; whether or not one was lost.
    pub dry: Vec<u64>,
}

impl Flow {
    /// Frames that were lost for want of a buffer, and moments without one, after this frame.
    pub fn short_after(&self, frame: u64) -> u64 {
        let lost = self.starved.iter().filter(|&&(at, _)| at > frame).map(|&(_, lost)| lost);
        lost.sum::<u64>() + self.dry.iter().filter(|&&at| at > frame).count() as u64
    }

    /// Whether the camera had a buffer to fill all the time.
    pub fn had_buffers(&self) -> bool {
        self.starved.is_empty() && self.dry.is_empty()
    }
}

impl std::fmt::Display for Flow {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let starved: u64 = self.starved.iter().map(|(_, lost)| lost).sum();
        write!(f, "{} frames; {} lost by vivid itself, {starved} for want of a buffer", self.frames, self.late)?;
        if self.had_buffers() {
            return Ok(());
        }
        write!(f, " {:?}, without one at {:?}", self.starved, self.dry)
    }
}

/// The checksum of a picture.
pub fn sum(frame: &Frame) -> Result<u32> {
    Ok(crc32fast::hash(&picture(frame)?))
}

impl Shared {
    /// Vivid as asked, shared at `at`. No frame flows yet.
    pub fn new(at: &str, request: ServerRequest, camera: &CameraRequest) -> Result<Shared> {
        let mut camera = Camera::open(Device::find("vivid")?, camera)?;
        if !request.writable {
            camera.export_read_only()?;
        }
        let mut server = Server::bind(at, request)?;
        // Until all consumers are there no frame comes, and those that wait for one are not to give up.
        server.describe(camera.name(), Some(PATIENCE));
        let (layout, rate, buffers) = (*camera.layout(), camera.rate(), camera.buffers().to_vec());
        let joined = server.join(&layout, rate, &buffers);
        joined.map_err(|error| anyhow!("{error:?}"))?;
        Ok(Shared { camera, server })
    }

    /// Serves until so many consumers are there.
    pub fn wait_for(&mut self, count: usize) -> Result<()> {
        let end = Instant::now() + PATIENCE;
        while self.server.consumers().len() < count {
            ensure!(Instant::now() < end, "of {count} consumers came {:?}", self.server.consumers());
            self.dispatch(1000)?;
        }
        Ok(())
    }

    /// Lets so many frames flow, or fewer: until `each`, which sees each before the consumers do, says no.
    pub fn flow(&mut self, frames: u64, mut each: impl FnMut(&Frame) -> Result<bool>) -> Result<Flow> {
        let (mut flow, mut goes_on, mut starved) = (Flow::default(), true, 0);
        self.start()?;
        while goes_on && flow.frames < frames {
            // At each frame, which wakes this, and whenever a consumer has something to say.
            if self.starves()? && flow.dry.last() != Some(&flow.frames) {
                flow.dry.push(flow.frames);
            }
            let Some(frame) = self.turn(20_000)?.context("no frame came for 20 s")? else { continue };
            starved = self.look_for_losses(&mut flow, starved);
            goes_on = each(&frame)?;
            self.present(frame)?;
            flow.frames += 1;
        }
        // As before each frame: what consumers have released is the driver's when it ends, and it has something to fill until then.
        if self.starves()? {
            flow.dry.push(flow.frames);
        }
        self.camera.stop()?;
        // Those that were seen at the end alone as well.
        let starved = self.look_for_losses(&mut flow, starved);
        let counts = self.camera.counts();
        ensure!(!counts.uncounted, "the camera had no buffer at the end: {counts:?}");
        flow.late = counts.dropped - starved;
        Ok(flow)
    }

    /// Frames flow from now on, to who calls [`turn`](Shared::turn).
    pub fn start(&mut self) -> Result<()> {
        Ok(self.camera.start()?)
    }

    /// Whether the camera's driver has no buffer, after what consumers have released is given back to it.
    pub fn starves(&mut self) -> Result<bool> {
        self.camera.recycle()?;
        Ok(self.camera.starves())
    }

    /// Waits for so many ms at most until there is a frame or a consumer says something, which is heard. Outer `None` if nothing happened,
    /// inner if there is no frame.
    pub fn turn(&mut self, millis: u16) -> Result<Option<Option<Frame>>> {
        let server = self.server.event_fd().context("nothing to wait for")?;
        let mut fds = [PollFd::new(self.camera.as_fd(), PollFlags::POLLIN), PollFd::new(server, PollFlags::POLLIN)];
        if poll(&mut fds, millis)? == 0 {
            return Ok(None);
        }
        let [frame, said] = fds.map(|fd| fd.any().unwrap_or(false));
        if said {
            self.server.dispatch()?;
        }
        Ok(Some(if frame { self.camera.try_next(Ready::FRAME)? } else { None }))
    }

    /// Waits for so many ms at most until a consumer says something, and hears it. Frames stay in the queue.
    pub fn dispatch(&mut self, millis: u16) -> Result<()> {
        let server = self.server.event_fd().context("nothing to wait for")?;
        if poll(&mut [PollFd::new(server, PollFlags::POLLIN)], millis)? > 0 {
            self.server.dispatch()?;
        }
        Ok(())
    }

    /// Gives a frame to the consumers.
    pub fn present(&mut self, frame: Frame) -> Result<()> {
        self.server.present(frame)?;
        Ok(())
    }

    /// See [`with_the_driver`].
    pub fn queued(&self) -> Result<usize> {
        with_the_driver(&self.camera)
    }

    pub fn counts(&self) -> SourceCounts {
        self.camera.counts()
    }

    /// Why the consumers have gone that are no more.
    pub fn gone(&self) -> Vec<&Departure> {
        self.server.departures().collect()
    }

    /// Notes what was lost for want of a buffer since there were `before`, and says how many there are now.
    fn look_for_losses(&self, flow: &mut Flow, before: u64) -> u64 {
        let starved = self.camera.counts().starved;
        if starved > before {
            flow.starved.push((flow.frames, starved - before));
        }
        starved
    }

    /// Frames a second.
    pub fn rate(&self) -> Option<f64> {
        self.camera.rate()
    }

    /// The bytes of all its buffers.
    pub fn bytes(&self) -> usize {
        self.camera.buffers().iter().flat_map(|buffer| buffer.memory_lens()).sum()
    }

    /// Tells the consumers that no more comes. None may have gone before, and what each has had is told in the order in which they came.
    pub fn end(mut self) -> Result<Vec<ConsumerInfo>> {
        self.server.end();
        let gone: Vec<_> = self.server.departures().collect();
        ensure!(gone.is_empty(), "consumers that went before the end: {gone:?}");
        Ok(self.server.consumers())
    }
}
