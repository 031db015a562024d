//! What is known of each frame: sequence number, time, the dma-buf's identity, and one byte of the picture, read in place.
//!
//!     cargo run --release --example frame_facts -- [CAMERA]

#![expect(clippy::print_stdout, reason = "what it prints is what it is for")]

use dmaflow::endpoint::Source;
use dmaflow::v4l2::{Camera, CameraRequest, Device};

fn main() -> anyhow::Result<()> {
    let name = std::env::args().nth(1).unwrap_or("vivid".into());
    let request = CameraRequest { format: dmaflow::format::Format::all().next(), ..CameraRequest::default() };
    let mut camera = Camera::open(Device::find(&name)?, &request)?;
    println!("{} in {} buffers", camera.layout(), camera.buffers().len());
    for _ in 0..10 {
        let frame = camera.next()?;
        let inode = frame.buffer().dma_buf(0).map(|dma_buf| dma_buf.identity().inode());
        let mut first = [0];
        frame.buffer().read()?.row(0, 0, &mut first);
        let meta = frame.meta();
        println!(
            "frame {} at {} µs in slot {}, dma-buf {inode:?}, first byte {}",
            meta.sequence,
            meta.timestamp.us,
            frame.slot(),
            first[0]
        );
    }
    Ok(())
}
