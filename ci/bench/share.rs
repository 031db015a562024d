//! What it costs that a frame changes hands: server and consumer in one process, on one thread, so that all of it is in one count.
//!
//! `bench-share HOW N`: so many frames are handed over. Nothing is printed: who counts instructions and system calls does so from outside
//! (`ci/handover` on the host, `ci/bench/run --only handover` in the virtual machine), and takes the difference of two runs.
//!
//! - `ring`: what the ring does, with its own code: a frame's data written into an entry, published, taken, read, released, and the
//!   server's lease dropped.
//! - `awake`: the same through [`Server`] and [`Receiver`], with all that they keep of a frame; the consumer finds one each time.
//! - `asleep`: as `awake`, and the consumer has said that it sleeps each time before a frame comes.
//! - `message`: a packet of a socket for each frame and one back, as those do who have no ring.
//! - `memcpy`: a picture of 1280x720 in XR24 copied, as those do who have no descriptors.

use std::hint::black_box;
use std::os::fd::AsRawFd;
use std::rc::Rc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use dmaflow::endpoint::{Ready, Sink, Source};
use dmaflow::frame::Frame as Lease;
use dmaflow::memory::Allocator;
use dmaflow::pattern::{Pattern, PatternRequest};
use dmaflow::share::{Receiver, Server, ServerRequest};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};

#[allow(dead_code)]
#[path = "../../src/share/entry.rs"]
mod entry;
#[allow(dead_code)]
#[path = "../../src/share/ring.rs"]
mod ring;

/// Where the two files above look for them.
mod format {
    pub use dmaflow::format::*;
}
mod frame {
    pub use dmaflow::frame::*;
}

fn main() -> Result<()> {
    let args: Vec<_> = std::env::args().skip(1).collect();
    let [how, count] = args.as_slice() else { bail!("usage: bench-share ring|awake|asleep|message|memcpy N") };
    let count: u32 = count.parse()?;
    let mut source = Pattern::new(&PatternRequest {
        size: (64, 48),
        rate: 1000.0,
        buffers: 8,
        allocator: Some(Allocator::Plain),
        ..PatternRequest::default()
    })?;
    source.start()?;
    let end = Instant::now() + Duration::from_secs(10);
    // The same each time: how it came to be is not measured.
    let frame = loop {
        if let Some(frame) = source.try_next(Ready::FRAME)? {
            break frame;
        }
        ensure!(Instant::now() < end, "no frame came");
        thread::sleep(Duration::from_millis(1));
    };
    match how.as_str() {
        "ring" => by_ring(&frame, count),
        "awake" => by_share(&source, &frame, count, false),
        "asleep" => by_share(&source, &frame, count, true),
        "message" => by_message(count),
        "memcpy" => {
            by_memcpy(count);
            Ok(())
        }
        _ => bail!("usage: bench-share ring|awake|asleep|message|memcpy N"),
    }
}

fn by_ring(frame: &Lease, count: u32) -> Result<()> {
    let area = Rc::new(ring::Area::new());
    let mut server = ring::Server::new(Rc::clone(&area), 2);
    let mut consumer = ring::Consumer::new(Rc::clone(&area));
    let mut entry = entry::Entry {
        generation: 1,
        buffer: frame.slot(),
        meta: *frame.meta(),
        skipped: 0,
        published_us: 0,
        fenced: false,
    };
    let mut right = true;
    for number in 0..u64::from(count) {
        entry.published_us = number;
        let published = server.publish(|_| entry.encode(), number)?;
        let taken = consumer.take().context("nothing was taken")?;
        let came = entry::Entry::decode(taken.words)?;
        consumer.tell_delay(number);
        let waits = area.release(taken.position)?;
        let told = server.delays().frames == 1;
        // Both sides do with it what they like, in place of this.
        right &= published.given & !published.wake & !waits & told & (black_box(came.published_us) == number);
    }
    ensure!(right, "a frame was lost, or another came");
    Ok(())
}

fn by_share(source: &Pattern, frame: &Lease, count: u32, asleep: bool) -> Result<()> {
    let place = format!("@dmaflow-bench-share-{}", std::process::id());
    let mut server = Server::bind(&place, ServerRequest { budget: 15, ..ServerRequest::default() })?;
    server.join(source.layout(), source.rate(), source.buffers())?;
    let connecting = thread::spawn(move || Receiver::connect(&place, "bench"));
    while !connecting.is_finished() {
        server.dispatch()?;
        thread::sleep(Duration::from_millis(1));
    }
    let mut receiver = connecting.join().ok().context("it did not connect")??;
    // The first takes what the first takes.
    server.present(frame.clone())?;
    while receiver.try_next(Ready::FRAME)?.is_some() {}
    if asleep {
        return while_asleep(server, receiver, frame, count);
    }
    // Awake: from here on a frame is there whenever it looks.
    for number in 0..count {
        server.present(frame.clone())?;
        ensure!(receiver.try_next(Ready::FRAME)?.is_some(), "frame {number} was lost");
    }
    ensure!(receiver.skipped() == 0 && receiver.revoked() == 0, "frames were lost");
    Ok(())
}

/// A frame comes when the consumer sleeps: it has had the time, but on a busy machine, where it finds several and sleeps less often.
fn while_asleep(mut server: Server, mut receiver: Receiver, frame: &Lease, count: u32) -> Result<()> {
    let taking = thread::spawn(move || -> Result<u32> {
        let mut taken = 0;
        while taken < count && receiver.next_within(Duration::from_secs(2))?.is_some() {
            taken += 1;
        }
        Ok(taken)
    });
    for _ in 0..count {
        thread::sleep(Duration::from_millis(1));
        server.present(frame.clone())?;
    }
    let taken = taking.join().ok().context("the consumer panicked")??;
    ensure!(taken == count, "{taken} of {count} frames came");
    Ok(())
}

fn by_message(count: u32) -> Result<()> {
    let (one, other) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
    let mut bytes = [0; 64];
    for _ in 0..count {
        for (from, to) in [(&one, &other), (&other, &one)] {
            send(from.as_raw_fd(), &bytes, MsgFlags::empty())?;
            ensure!(recv(to.as_raw_fd(), &mut bytes, MsgFlags::empty())? == bytes.len(), "a packet was cut");
        }
    }
    Ok(())
}

fn by_memcpy(count: u32) {
    let (from, mut to) = (vec![7_u8; 1280 * 720 * 4], vec![0; 1280 * 720 * 4]);
    for _ in 0..count {
        to.copy_from_slice(black_box(&from));
        black_box(&mut to);
    }
}
