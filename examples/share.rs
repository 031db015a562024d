//! A camera for many processes, as `dmaflow share` does it: ten seconds of it. What consumers do with it: the example `consume`.
//!
//!     cargo run --release --example share -- SOCKET [CAMERA]

#![allow(clippy::print_stdout)]

use std::time::Duration;

use anyhow::Context;
use dmaflow::endpoint::Source;
use dmaflow::ladder::{NoWay, Path};
use dmaflow::pattern::{Pattern, PatternRequest};
use dmaflow::pipe::{Limits, Pipe};
use dmaflow::share::{Server, ServerRequest};
use dmaflow::v4l2::{Camera, CameraRequest, Device};

fn main() -> anyhow::Result<()> {
    let mut names = std::env::args().skip(1);
    let place = names.next().context("usage: share SOCKET [CAMERA]")?;
    let mut source: Box<dyn Source> = match names.next() {
        Some(name) => {
            Box::new(Camera::open(Device::find(&name)?, &CameraRequest { buffers: Some(8), ..Default::default() })?)
        }
        None => Box::new(Pattern::new(&PatternRequest { buffers: 8, ..PatternRequest::default() })?),
    };
    // Two frames for each consumer, each for three frame times; this user's processes alone; for reading.
    let mut server = Server::bind(&place, ServerRequest::default())?;
    source.export_read_only()?;
    server.describe(source.name(), source.watchdog());
    let limits = Limits { frames: None, duration: Some(Duration::from_secs(10)) };
    let pipe = match Pipe::join(source.as_mut(), &mut server, Path::ZeroCopy, limits) {
        Ok(pipe) => pipe,
        Err(NoWay::Failed(error)) => return Err(error.into()),
        Err(NoWay::Refused(refusals)) => anyhow::bail!("{}", refusals[0]),
    };
    let account = pipe.run(None, &mut |_| {})?;
    // Consumers get the frames that are on their way, and then the end.
    server.end();
    println!("{} frames, {} bytes copied", account.captured, account.copies.bytes());
    for consumer in server.consumers() {
        println!(
            "{} (process {}): {} frames, {} skipped",
            consumer.name, consumer.pid, consumer.frames, consumer.skipped
        );
    }
    Ok(())
}
