//! GPUs by Vulkan: a camera's buffers as images, without a copy.
//!
//! A [`Gpu`] is a device of its own or a program's ([`Gpu::from_raw`]); [`GpuImporter`] makes a [`Buffer`](crate::frame::Buffer) an
//! [`Image`] (`VkImage`) with explicit modifier and plane layouts, [`GpuBuffer`] makes one of its memory planes a `VkBuffer`. [`Vulkan`]
//! is a sink that reads every texel of every frame and tells a checksum. The other way round, [`Gpu::make_buffer`] and
//! [`Gpu::make_bytes`] make buffers of the GPU's memory for others to fill and show.
//!
//! libvulkan.so.1 is loaded at run time: where it is missing, or a driver, or an extension, the answer is an error that says so.
//!
//! # Fences
//! [`Semaphore`] and [`GpuFence`] go to and from a [`SyncFile`](crate::fence::SyncFile): a program has its queue wait for a frame's acquire
//! fence, and leaves one with the frame that its queue reads. The sink [`Vulkan`] has read a frame when it returns, and waits for the frame's
//! acquire fence first; [`GpuConverter`] waits for its own work or, where the driver gives one, hands a fence on.
//!
//! Vulkan takes no notice of the fences that are *in* a dma-buf ("External Memory", and unlike OpenGL), and neither does anything here: a
//! frame that a camera has delivered has none, and whoever takes frames from another GPU takes those along
//! ([`Frame::with_implicit_fences`](crate::frame::Frame::with_implicit_fences)).

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
mod sync;
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
pub use sync::{GpuFence, Semaphore, SyncOffer};
