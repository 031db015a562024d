//! GBM (Generic Buffer Management): a GPU driver's own importer and allocator of buffers, as EGL, Vulkan and compositors use them.
//!
//! - [`Device`]: one DRM device's GBM, which imports [`Buffer`](crate::frame::Buffer)s and makes them.
//! - [`GbmImporter`]: the same as an [`Importer`](crate::endpoint::Importer); its images are [`BufferObject`]s.
//! - [`Gbm`]: a [`Sink`](crate::endpoint::Sink) that imports the buffer of each frame, once a buffer.
//!
//! # How libgbm is found
//! `libgbm.so.1` is opened when the first [`Device`] is, and never closed. It is not linked, as the crate `gbm` would have it, because a
//! program that is linked to a library which the machine lacks does not start at all, and says so in the dynamic linker's words; here the
//! lack is an error with its repair, and everything that needs no GBM works. Nor does a machine that builds need its headers. Of its
//! interface, which Mesa keeps stable, what is used is declared here; functions that came later than the first versions (buffers with both
//! modifiers and usage, a descriptor for each plane; Mesa 21.3 and 21.1) are asked for by name, and done without where they are not there.
//!
//! # What to know of GBM
//! - `gbm_create_device` also takes what is no DRM device, as `/dev/null`: a [`Device`] asks the kernel for the driver's name first.
//! - GBM does not keep its device's descriptor open. Here each [`BufferObject`] keeps its device, and that keeps the descriptor.
//! - GBM and the kernel count GEM handles by open file: whoever shares one with GBM has handles closed under them. So a [`Device`]'s
//!   file is its own, opened anew also where a [`Card`](crate::kms::Card) of the same node is open.
//! - `gbm_bo_map` of an imported buffer may fail (it does with Mesa's software renderer, which maps what `DRM_IOCTL_MODE_MAP_DUMB` lets
//!   it, and that refuses imported memory). It is not used: [`Buffer::read`](crate::frame::Buffer::read) maps the dma-buf itself, whoever
//!   made it.
//! - GBM says nothing of how it lays out what it imported that was not said to it, and some drivers say it wrong: the
//!   [`Layout`](crate::format::Layout) of the buffer stands.
//! - `DRM_FORMAT_MOD_INVALID` from GBM is "not stated", `None` in a layout, and never LINEAR; which is what software renderers, and
//!   drivers without modifiers, say of every buffer that they make.
//! - Mesa prints what it tries in vain on stderr, also where it goes on with success.

mod device;
mod formats;
mod import;
mod library;
mod make;
mod raw;
mod sink;

pub use device::{Device, DeviceInfo};
pub use import::{BufferObject, GbmImporter};
pub use make::Usage;
pub use sink::Gbm;
