//! Sinks without a device: a picture in a file, and nothing at all.

mod null;
mod png;

pub use null::Null;
pub use png::{Png, buffer_to_rgb, frame_to_rgb, write_png};
