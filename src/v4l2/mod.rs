//! Cameras: V4L2 capture devices whose buffers are exported as dma-bufs.
//!
//! - [`Device`]: one capture node, and what it offers: formats, sizes, rates, inputs, controls.
//! - [`Queue`]: the driver's buffers as a typestate: `Idle`, `Allocated`, `Streaming`.
//! - [`Camera`]: the two together as a [`Source`](crate::endpoint::Source).

mod agree;
mod camera;
mod controls;
mod device;
mod events;
mod offers;
mod queue;
mod raw;
mod saved;
mod signal;

pub use camera::{Camera, CameraRequest, RateRequest};
pub use controls::{Control, ControlKind};
pub use device::{Api, Device, DeviceInfo};
pub use events::Event;
pub use offers::{FormatOffer, Input, Rate, Rates, Sizes};
pub use queue::{Allocated, Dequeued, Failed, Idle, Queue, Streaming};
pub use saved::{SavedFormat, SavedSettings};
