//! Moves frames between Linux cameras, displays and processes without copying them, and says exactly what it did.
//!
//! A camera ([`v4l2::Camera`]) exports each of its buffers as a dma-buf; a display ([`kms::Display`]) imports each once and
//! scans it out. A [`frame::Frame`] is a buffer filled once; while anyone holds it, the camera does not fill it again.
//!
//! ```no_run
//! use dmaflow::endpoint::Sink;
//! use dmaflow::kms::{Display, DisplayRequest};
//! use dmaflow::v4l2::{Camera, CameraRequest, Device};
//! # use dmaflow::endpoint::Source;
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let mut camera = Camera::open(Device::find("vivid")?, &CameraRequest::default())?;
//! let mut display = Display::find("vkms", DisplayRequest::default())?;
//! display.join(camera.layout(), camera.rate(), camera.buffers())?;
//! for _ in 0..60 {
//!     display.present(camera.next()?)?;
//! }
//! # Ok(())
//! # }
//! ```
//!
//! - [`mod@format`]: pixel formats, layouts, colours. [`dmabuf`], [`memory`]: shared memory and the CPU's way to it.
//! - [`frame`]: buffers, frames, leases. [`endpoint`]: the traits of sources, sinks and importers, and refusals.
//! - [`fence`]: what says that a device is done with memory, and travels with frames.
//! - [`convert`]: a picture in another format, made by the CPU.
//! - `gbm` (cargo feature `gbm`): a GPU driver's importer and allocator, and a sink that imports each frame.
//! - [`v4l2`], [`pattern`]: sources. [`kms`], [`sink`]: sinks. [`pipe`]: the loop between them. [`ledger`]: what was copied.
//! - `vulkan` (cargo feature of that name): GPUs, as importers and as a sink.
//! - [`probe`]: the [`ladder`]'s rungs, each tried for real in every format of a source.
//! - [`share`]: one camera for many processes, and what another process shares as a source.
//! - [`bufs`]: every dma-buf of the machine, who holds it, and what only grows.
//! - Everything pollable is `AsFd`; the library has no threads and no event loop of its own.

#![warn(unreachable_pub)]

pub mod bufs;
mod causes;
mod clock;
pub mod convert;
pub mod dmabuf;
pub mod endpoint;
pub mod error;
pub mod fence;
pub mod format;
pub mod frame;
#[cfg(feature = "gbm")]
pub mod gbm;
pub mod kms;
pub mod ladder;
pub mod ledger;
pub mod memory;
mod node;
pub mod pattern;
pub mod pipe;
pub mod probe;
pub mod share;
pub mod sink;
mod timer;
mod uapi;
pub mod v4l2;
#[cfg(feature = "vulkan")]
pub mod vulkan;

pub use error::{Error, Result};
