//! A camera on a display without a copy: ten seconds of it, or until an error. This is the snippet of the README.
//!
//!     cargo run --release --example camera_to_display -- [CAMERA [DISPLAY]]

use std::time::{Duration, Instant};

use dmaflow::endpoint::{Sink, Source};
use dmaflow::kms::{Display, DisplayRequest};
use dmaflow::v4l2::{Camera, CameraRequest, Device};

fn main() -> anyhow::Result<()> {
    let mut names = std::env::args().skip(1);
    let camera = names.next().unwrap_or("vivid".into());
    let display = names.next().unwrap_or("vkms".into());

    let request = CameraRequest { format: dmaflow::format::Format::all().next(), ..CameraRequest::default() };
    let mut camera = Camera::open(Device::find(&camera)?, &request)?;
    let mut display = Display::find(&display, DisplayRequest::default())?;
    // Imports each of the camera's buffers, or says why that cannot be.
    display.join(camera.layout(), camera.rate(), camera.buffers())?;

    let end = Instant::now() + Duration::from_secs(10);
    while Instant::now() < end {
        // The display holds the frame until the next one has replaced it; then the camera may fill its buffer again.
        display.present(camera.next()?)?;
    }
    Ok(())
}
