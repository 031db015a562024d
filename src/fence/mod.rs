//! Fences: what says that a device is done with memory.
//!
//! A [`SyncFile`] is a file over one or several of the kernel's fences: something to wait for, to poll, and to pass on. It comes from a
//! dma-buf whose users synchronise implicitly ([`SyncFile::export`]), from a GPU (`VK_KHR_external_semaphore_fd`, by way of an
//! [`OwnedFd`](std::os::fd::OwnedFd)), from a [`Syncobj`], or from a display
//! ([`Display::take_out_fence`](crate::kms::Display::take_out_fence)).
//!
//! Two sorts travel with a [`Frame`](crate::frame::Frame):
//! - its **acquire fence** ([`Frame::acquire_fence`](crate::frame::Frame::acquire_fence)): before it has signalled the memory does not
//!   hold the picture, because a device is still writing it. Who shows or reads the frame waits for it, or has a device wait.
//! - **release fences** ([`Frame::release_after`](crate::frame::Frame::release_after)): before they have signalled a device still reads
//!   the memory, though the program has dropped the frame. The slot is not filled again until then.
//!
//! A frame without fences, which every camera's is, costs nothing: no system call, no allocation, no lock.
//!
//! # What the kernel does itself
//! - A commit waits for the *implicit* fences of writers in the dma-bufs that it shows, unless an explicit one is given, which then
//!   replaces them (`drm_gem_plane_helper_prepare_fb`, drm_gem_atomic_helper.c): an acquire fence must cover every writer.
//! - It waits without limit, and a commit that waits cannot be taken back (`drm_atomic_helper_wait_for_fences`). That is why frames
//!   whose fence has not signalled are held back here, or given a time; see [`Display`](crate::kms::Display).
//! - `DMA_BUF_IOCTL_SYNC` waits for implicit fences alone (`dma_buf_begin_cpu_access`, dma-buf.c).
//! - V4L2 neither waits for fences nor adds any (videobuf2).
//! - Every fence signals in the end: a driver whose device is stuck resets it, and signals with an error ("Indefinite DMA Fences" in
//!   the kernel's Documentation/driver-api/dma-buf.rst). That may take longer than a person waits: AMD's and Intel's drivers give a job
//!   several seconds. While one has not, a framebuffer of its commit cannot be removed either, nor the card closed that its console would
//!   come back on; [`Display::restore`](crate::kms::Display::restore) tells what becomes of those.

mod sync_file;
mod syncobj;
mod usage;

pub use sync_file::{FenceInfo, FenceState, SyncFile};
pub use syncobj::Syncobj;
pub use usage::{CpuWait, FenceUse};

use std::time::Duration;

/// How long a fence is waited for where nothing else was asked: 5 s.
pub const PATIENCE: Duration = Duration::from_secs(5);
