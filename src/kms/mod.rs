//! Displays: DRM devices that scan frames out by atomic modesetting.
//!
//! - [`Card`]: one DRM device with modesetting, and who drives it.
//! - [`Display`]: one connector as a [`Sink`](crate::endpoint::Sink): imports, shows, verifies, and puts back what was there.
//! - [`Snapshot`]: what a display shows now, whoever drives it.

mod atomic;
mod card;
mod crc;
mod display;
mod dumb;
mod fenced;
mod fifo;
mod flip;
mod framebuffer;
mod gem;
mod import;
mod keep;
mod mailbox;
mod master;
mod offers;
mod plug;
mod predict;
mod present;
mod quirks;
mod route;
mod saved;
mod setup;
mod snapshot;
mod stuck;
mod verify;
mod writeback;

pub use card::{Card, CardInfo};
pub use display::{Display, DisplayRequest, Present};
pub use import::{Framebuffer, KmsImporter};
pub use offers::{ConnectorOffer, ModeOffer};
pub use snapshot::{Method, Snapshot};
