//! One camera for many processes: a [`Server`] gives the frames of a source to any number of [`Receiver`]s, without a copy.
//!
//! Over a Unix socket each consumer gets the source's buffers once. From then on a frame changes hands by a ring in memory that both map: a
//! few loads and stores, and a system call only to wake who sleeps. A consumer may have a few frames at a time (the budget), each for three
//! frame times (the lease); it is skipped while it is late, and when the source would run short, frames whose lease has run out are taken
//! back from who has them. Who is stopped or gone, or writes nonsense, takes no frame from anybody else.
//!
//! ```no_run
//! use dmaflow::endpoint::{Ready, Source};
//! use dmaflow::share::Receiver;
//! # fn main() -> dmaflow::Result<()> {
//! let mut camera = Receiver::connect("cam.sock", "viewer")?;
//! camera.start()?;
//! if let Some(frame) = camera.try_next(Ready::FRAME)? {
//!     let mut row = vec![0; 64];
//!     frame.buffer().read()?.row(0, 0, &mut row);
//!     assert!(camera.holds(&frame), "it was read in time");
//! }
//! # Ok(())
//! # }
//! ```
//!
//! The protocol is documented in `wire.rs` (the messages), `ring.rs` (the shared memory) and `entry.rs` (what its entries say).

// loom's atomic words are no words that two processes could share: of all this it sees the ring.
#[cfg(not(loom))]
mod area;
#[cfg(not(loom))]
mod bell;
#[cfg(not(loom))]
mod consumer;
#[cfg(not(loom))]
mod entry;
#[cfg(not(loom))]
mod fences;
#[cfg(test)]
#[cfg(not(loom))]
mod fuzz;
#[cfg(not(loom))]
mod give;
#[cfg(not(loom))]
mod held;
#[cfg(not(loom))]
mod incoming;
#[cfg(not(loom))]
mod join;
#[cfg(not(loom))]
mod latency;
#[cfg(not(loom))]
mod listener;
#[cfg(not(loom))]
mod lock;
#[cfg(not(loom))]
mod peer;
#[cfg(not(loom))]
mod receiver;
#[cfg_attr(loom, allow(dead_code))]
mod ring;
#[cfg(not(loom))]
mod server;
#[cfg(not(loom))]
mod socket;
#[cfg(test)]
#[cfg(not(loom))]
mod tests;
#[cfg(not(loom))]
mod wire;

#[cfg(not(loom))]
pub use {
    consumer::{ConsumerInfo, Departure},
    latency::LatencyInfo,
    receiver::Receiver,
    server::{MAX_CONSUMERS, Server, ServerRequest},
};
