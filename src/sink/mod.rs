//! Sinks without a device: a picture in a file, frames as a stream of bytes, and nothing at all.

mod null;
mod output;
mod png;
mod raw;
mod stream;
#[cfg(test)]
mod tests;
mod y4m;

pub use null::Null;
pub use png::{Png, buffer_to_rgb, frame_to_rgb, write_png};
pub use raw::Raw;
pub use y4m::Y4m;
