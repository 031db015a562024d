//! Camera and display in a program's own event loop: nothing here waits but `poll`, and the newest frame is shown.
//!
//!     cargo run --release --example event_loop -- [CAMERA [DISPLAY]]

use std::os::fd::{AsFd, BorrowedFd};

use dmaflow::endpoint::{Ready, Sink, Source};
use dmaflow::kms::{Display, DisplayRequest, Present};
use dmaflow::v4l2::{Camera, CameraRequest, Device};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

fn main() -> anyhow::Result<()> {
    let mut names = std::env::args().skip(1);
    let camera = names.next().unwrap_or("vivid".into());
    let display = names.next().unwrap_or("vkms".into());

    let request = CameraRequest { format: dmaflow::format::Format::all().next(), ..CameraRequest::default() };
    let mut camera = Camera::open(Device::find(&camera)?, &request)?;
    let request = DisplayRequest { present: Present::Mailbox, ..DisplayRequest::default() };
    let mut display = Display::find(&display, request)?;
    display.join(camera.layout(), camera.rate(), camera.buffers())?;

    camera.start()?;
    let mut shown = 0;
    while shown < 300 {
        camera.recycle()?;
        let Some((frame, flip)) = wait(camera.as_fd(), display.event_fd())? else {
            return Err(camera.stalled().into());
        };
        if flip {
            shown += u32::from(display.dispatch()?.is_some());
        }
        if let Some(frame) = camera.try_next(frame)? {
            shown += u32::from(display.present(frame)?.is_some());
        }
    }
    camera.stop()?;
    Ok(())
}

/// What is ready: the camera, and whether the display has something to say; `None` after 5 s of silence. A program has its own loop
/// in this place.
fn wait(camera: BorrowedFd<'_>, display: Option<BorrowedFd<'_>>) -> anyhow::Result<Option<(Ready, bool)>> {
    let mut fds = [
        PollFd::new(camera, PollFlags::POLLIN | PollFlags::POLLPRI),
        PollFd::new(display.unwrap_or(camera), PollFlags::POLLIN),
    ];
    if poll(&mut fds, PollTimeout::from(5000u16))? == 0 {
        return Ok(None);
    }
    let [camera, display] = fds.map(|fd| fd.revents().unwrap_or(PollFlags::empty()));
    Ok(Some((Ready::from(camera), display.contains(PollFlags::POLLIN))))
}
