//! A camera's buffers as wgpu textures, without a copy: each is imported once, every frame is sampled by a fragment shader, turned and
//! smaller, and the last picture goes into a PNG file. No window.
//!
//!     cargo run --release -- [CAMERA [FILE.png]]
//!
//! CAMERA is a camera's node or name, or `pattern`.
//!
//! wgpu makes the device, with the extensions that the imports need ([`gpu`]); dmaflow makes the images on it, wgpu has them as textures,
//! and before and after each use they change owners ([`texture`]).

mod draw;
mod gpu;
mod texture;

use std::os::fd::AsFd;
use std::path::Path;

use anyhow::bail;
use dmaflow::endpoint::{ImportCache, Ready, Source};
use dmaflow::format::Format;
use dmaflow::frame::Frame;
use dmaflow::pattern::{Pattern, PatternRequest};
use dmaflow::sink::write_png;
use dmaflow::v4l2::{Camera, CameraRequest, Device};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use draw::{CANVAS, Canvas};
use texture::Textures;

/// More than there are buffers, so that each texture is used again.
const FRAMES: u32 = 10;

fn main() -> anyhow::Result<()> {
    let mut names = std::env::args().skip(1);
    let camera = names.next().unwrap_or("vivid".into());
    let file = names.next().unwrap_or("texture.png".into());
    render(&camera, Path::new(&file))
}

fn render(camera: &str, file: &Path) -> anyhow::Result<()> {
    let (device, queue) = gpu::open()?;
    let mut importer = Textures::new(&device)?;
    let mut textures = ImportCache::new();
    let canvas = Canvas::new(&device);

    let mut source = open(camera)?;
    source.start()?;
    for _ in 0..FRAMES {
        let frame = next(source.as_mut())?;
        let texture = textures.get(&mut importer, frame.buffer())?;
        let acquire = texture.acquire();
        let draw = canvas.draw(texture.view());
        let release = texture.release();
        queue.submit([acquire, draw, release]);
        // The camera may fill the buffer again when the GPU has done with it. A program with a window keeps frame and submission, and
        // waits for them when it has submitted the next.
        device.poll(wgpu::PollType::wait_indefinitely())?;
        drop(frame);
    }
    source.stop()?;

    let rgb = canvas.read(&queue)?;
    write_png(file, CANVAS[0], CANVAS[1], &rgb)?;
    eprintln!("{FRAMES} frames, {} imports", textures.imports());
    Ok(())
}

/// In a format whose texels a shader reads as they are.
fn open(name: &str) -> anyhow::Result<Box<dyn Source>> {
    let format = Format::parse("XR24").map(|(format, _)| format);
    Ok(if name == "pattern" {
        Box::new(Pattern::new(&PatternRequest { format, ..PatternRequest::default() })?)
    } else {
        Box::new(Camera::open(Device::find(name)?, &CameraRequest { format, ..CameraRequest::default() })?)
    })
}

/// Waits for a frame. A program has its event loop in this place.
fn next(source: &mut dyn Source) -> anyhow::Result<Frame> {
    let patience = match source.watchdog() {
        Some(time) => PollTimeout::try_from(time)?,
        None => PollTimeout::NONE,
    };
    loop {
        source.recycle()?;
        let mut fds = [PollFd::new(source.as_fd(), PollFlags::POLLIN | PollFlags::POLLPRI)];
        if poll(&mut fds, patience)? == 0 {
            bail!(source.stalled());
        }
        let ready = Ready::from(fds[0].revents().unwrap_or(PollFlags::empty()));
        if let Some(frame) = source.try_next(ready)? {
            return Ok(frame);
        }
    }
}
