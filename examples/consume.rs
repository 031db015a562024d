//! Frames that another process shares (`dmaflow share`, or the example `share`): each is looked at in a view of its own, and scribbled on,
//! which nobody else sees. Ends with the server.
//!
//!     cargo run --release --example consume -- SOCKET

#![allow(clippy::print_stdout)]

use std::time::Duration;

use anyhow::{Context, bail};
use dmaflow::endpoint::Source;
use dmaflow::error::Kind;
use dmaflow::frame::Frame;
use dmaflow::share::Receiver;

fn main() -> anyhow::Result<()> {
    let place = std::env::args().nth(1).context("usage: consume SOCKET")?;
    let mut camera = Receiver::connect(&place, "consume")?;
    println!("{}: {}", camera.source(), camera.buffers()[0].layout());
    loop {
        let frame = match camera.next_within(Duration::from_secs(5)) {
            Ok(Some(frame)) => frame,
            Ok(None) => bail!("no frame came for 5 s"),
            Err(error) if error.kind() == Kind::Ended => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        match mark(&frame) {
            Ok(level) => println!("frame {}: level {level}", frame.meta().sequence),
            // It took longer than the lease, and the camera needed the buffer.
            Err(error) if error.kind() == Kind::Revoked => println!("frame {} is gone", frame.meta().sequence),
            Err(error) => return Err(error.into()),
        }
    }
}

/// The mean of the first row's bytes; a line is drawn below it, into this process's own copy of that page.
fn mark(frame: &Frame) -> dmaflow::Result<u32> {
    let layout = *frame.buffer().layout();
    let mut row = vec![0; layout.format().row_bytes(0, layout.width()) as usize];
    let mut view = frame.view("consume")?;
    view.row(0, 0, &mut row)?;
    view.write(0, 1, 0, &vec![255; row.len()])?;
    Ok(row.iter().map(|&byte| u32::from(byte)).sum::<u32>() / u32::try_from(row.len()).unwrap_or(1).max(1))
}
