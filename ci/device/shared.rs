//! A camera that the test itself shares: it knows each frame before anybody else has it, and looks at the camera's queue at each.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use dmaflow::endpoint::{Ready, Sink, Source};
use dmaflow::frame::Frame;
use dmaflow::share::{ConsumerInfo, Server, ServerRequest};
use dmaflow::v4l2::{Camera, CameraRequest, Device};
use nix::poll::{PollFd, PollFlags, poll};

use crate::capture::picture;

/// A moment that no consumer needs to start, be it emulated beside another machine.
const PATIENCE: Duration = Duration::from_secs(100);

/// The camera and its server, in this process.
pub struct Shared {
    camera: Camera,
    server: Server,
}

/// What the camera gave.
#[derive(Default)]
pub struct Flow {
    pub frames: u64,
    /// Frames that the camera lost: gaps in the sequence numbers.
    pub lost: u64,
    /// At which frames, counted from 0, its driver had no buffer, after what consumers had released was given back to it.
    pub starved: Vec<u64>,
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
            let fd = self.server.event_fd().context("nothing to wait for")?;
            poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], 1000u16)?;
            self.server.dispatch()?;
        }
        Ok(())
    }

    /// Lets so many frames flow, or fewer: until `each`, which sees each before the consumers do, says no.
    pub fn flow(&mut self, frames: u64, mut each: impl FnMut(&Frame) -> Result<bool>) -> Result<Flow> {
        let (mut flow, mut goes_on) = (Flow::default(), true);
        self.camera.start()?;
        while goes_on && flow.frames < frames {
            self.camera.recycle()?;
            // At each frame, which wakes this, and whenever a consumer has something to say.
            if self.camera.starves() && flow.starved.last() != Some(&flow.frames) {
                flow.starved.push(flow.frames);
            }
            let server = self.server.event_fd().context("nothing to wait for")?;
            let mut fds = [PollFd::new(self.camera.as_fd(), PollFlags::POLLIN), PollFd::new(server, PollFlags::POLLIN)];
            ensure!(poll(&mut fds, 20_000u16)? > 0, "no frame came for 20 s");
            let [frame, said] = fds.map(|fd| fd.any().unwrap_or(false));
            if said {
                self.server.dispatch()?;
            }
            if let Some(frame) = if frame { self.camera.try_next(Ready::FRAME)? } else { None } {
                goes_on = each(&frame)?;
                self.server.present(frame)?;
                flow.frames += 1;
            }
        }
        self.camera.stop()?;
        flow.lost = self.camera.counts().dropped;
        Ok(flow)
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
