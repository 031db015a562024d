//! GPUs by Vulkan: a camera's buffers as images, without a copy.
//!
//! A [`Gpu`] is a device of its own or a program's ([`Gpu::from_raw`]); [`GpuImporter`] makes a [`Buffer`](crate::frame::Buffer) an
//! [`Image`] (`VkImage`) with explicit modifier and plane layouts, [`GpuBuffer`] makes one of its memory planes a `VkBuffer`. [`Vulkan`]
//! is a sink that reads every texel of every frame and tells a checksum. The other way round, [`Gpu::make_buffer`] and
//! [`Gpu::make_bytes`] make buffers of the GPU's memory for others to fill and show.
//!
//! libvulkan.so.1 is loaded at run time: where it is missing, or a driver, or an extension, the answer is an error that says so.
//!
//! Nothing here waits for the fences of a dma-buf: a frame that a camera has delivered has none. A buffer that a GPU is still writing
//! needs a wait of its own.

mod buffer;
mod checksum;
mod convert;
mod export;
mod failure;
mod formats;
mod gpu;
mod hardware;
mod image;
mod instance;
mod linear;
mod memory;
mod messages;
mod offers;
mod pass;
mod physical;
mod sampled;
mod sink;
mod submission;
mod usage;

pub use ash;
pub use buffer::GpuBuffer;
pub use convert::{Crop, GpuConverter, NotByGpu};
pub use gpu::{Gpu, GpuListing, GpuRequest, RawGpu};
pub use hardware::has_hardware;
pub use image::{GpuImporter, Image, RawImage};
pub use messages::Messages;
pub use offers::{GpuOffer, HandleOffer, ModifierOffer};
pub use physical::{GpuInfo, GpuKind};
pub use sink::{Checksum, Vulkan};
