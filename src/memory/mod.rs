//! Memory that the CPU and devices share: mappings, and allocators of dma-bufs.
//!
//! A device may write while the CPU reads, so nothing here hands out `&[u8]`: bytes are copied in and out.

mod alloc;
mod mapping;
mod private;
mod region;
mod send;
mod span;

pub use crate::uapi::Access;
pub use alloc::{Allocator, Memory};
pub(crate) use mapping::OwnedAccess;
pub use mapping::{CpuAccess, Mapping};
pub(crate) use private::Private;
pub(crate) use region::Region;
pub(crate) use send::{SPANS, unread, vmsplice, write_spans};
pub use span::Span;

/// Bytes of a page of this machine's memory. Cost: none that matters (the C library has it from its start).
pub fn page_size() -> usize {
    // SAFETY: the call reads a number that the C library holds.
    let size = unsafe { nix::libc::sysconf(nix::libc::_SC_PAGESIZE) };
    usize::try_from(size).ok().filter(|size| size.is_power_of_two()).unwrap_or(4096)
}
