//! Memory that the CPU and devices share: mappings, and allocators of dma-bufs.
//!
//! A device may write while the CPU reads, so nothing here hands out `&[u8]`: bytes are copied in and out.

mod alloc;
mod mapping;
mod span;

pub use crate::uapi::Access;
pub use alloc::{Allocator, Memory};
pub use mapping::{CpuAccess, Mapping};
pub use span::Span;
