//! Pixel formats and where their samples lie: tables and arithmetic, nothing that touches a device.
//!
//! - [`Fourcc`] and [`Modifier`]: the codes of V4L2 and DRM.
//! - [`Format`]: one pixel format with its names in both worlds.
//! - [`Layout`]: a format at a size, with each colour plane's memory plane, offset and stride.
//! - [`Colour`]: what YUV numbers mean.
//! - [`Pixels`]: reads and writes single pixels of any format, for test cards, pictures and checks; never for speed.

mod bayer;
mod colour;
mod fourcc;
#[cfg(test)]
pub(crate) mod hostile;
mod known;
mod layout;
mod pixels;
mod table;

pub use bayer::demosaic;
pub use colour::{Colour, Encoding, Range};
pub use fourcc::{Fourcc, Modifier, ParseFourccError};
pub use layout::{Layout, LayoutError, MAX_PLANES, PlaneLayout};
pub use pixels::{Pixels, PixelsMut, Raw, Rgb};
pub use table::{Bits, Format, Kind};
