//! Fences that signal when a test says so: vgem attaches them to any dma-buf that is imported into it (`DRM_IOCTL_VGEM_FENCE_ATTACH`,
//! `…_SIGNAL`; drivers/gpu/drm/vgem/vgem_fence.c). After 10 s they signal by themselves.

use std::fs;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use dmaflow::dmabuf::DmaBuf;
use dmaflow::fence::SyncFile;
use dmaflow::memory::{Access, Allocator, Memory};
use drm::Device as _;

/// `drm/vgem_drm.h`
mod uapi {
    /// `struct drm_vgem_fence_attach`
    #[repr(C)]
    #[derive(Default)]
    pub struct Attach {
        pub handle: u32,
        pub flags: u32,
        pub out_fence: u32,
        pub pad: u32,
    }
    /// `struct drm_vgem_fence_signal`
    #[repr(C)]
    #[derive(Default)]
    pub struct Signal {
        pub fence: u32,
        pub flags: u32,
    }
    /// `VGEM_FENCE_WRITE`
    pub const WRITE: u32 = 1;
    // DRM_COMMAND_BASE is 0x40.
    nix::ioctl_readwrite!(attach, b'd', 0x41, Attach);
    nix::ioctl_write_ptr!(signal, b'd', 0x42, Signal);
}

/// An open render node. Closing vgem's signals what has not been.
#[derive(Debug)]
pub struct RenderNode(fs::File);

/// Where the fences come from.
pub type Vgem = RenderNode;

impl AsFd for RenderNode {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl drm::Device for RenderNode {}

/// A fence's signal to come.
pub struct Signal {
    vgem: Arc<Vgem>,
    fence: u32,
}

/// The open render node of a DRM driver.
pub fn render_node(driver: &str) -> Result<RenderNode> {
    let nodes = fs::read_dir("/dev/dri")?.flatten().map(|entry| entry.path());
    let named = |path: &PathBuf| {
        path.file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with("renderD"))
    };
    for path in nodes.filter(named) {
        let node = RenderNode(fs::File::options().read(true).write(true).open(&path)?);
        if node.get_driver().is_ok_and(|its| its.name().to_string_lossy() == driver) {
            return Ok(node);
        }
    }
    bail!("{driver} has no render node")
}

impl Vgem {
    pub fn open() -> Result<Arc<Vgem>> {
        Ok(Arc::new(render_node("vgem")?))
    }

    /// Attaches a fence to a dma-buf: of a writer, or else of a reader.
    pub fn attach(self: &Arc<Vgem>, dma_buf: &DmaBuf, write: bool) -> Result<Signal> {
        let handle = drm_ffi::gem::fd_to_handle(self.as_fd(), dma_buf.as_fd())
            .context("vgem imports it")?
            .handle;
        let flags = if write { uapi::WRITE } else { 0 };
        let mut attach = uapi::Attach { handle, flags, ..uapi::Attach::default() };
        // SAFETY: the structure is the header's and lives across the call.
        let attached = unsafe { uapi::attach(self.as_fd().as_raw_fd(), &mut attach) };
        drm_ffi::gem::close(self.as_fd(), handle)?;
        attached.context("vgem attaches a fence")?;
        Ok(Signal { vgem: Arc::clone(self), fence: attach.out_fence })
    }

    /// A fence of its own memory, as a sync file.
    pub fn fence(self: &Arc<Vgem>) -> Result<(SyncFile, Signal)> {
        let Memory::DmaBuf(dma_buf) = Allocator::best().allocate(4096)? else { bail!("no dma-buf can be made") };
        let signal = self.attach(&dma_buf, true)?;
        Ok((SyncFile::export(&dma_buf, Access::Read)?, signal))
    }
}

impl Signal {
    pub fn now(self) -> Result<()> {
        let signal = uapi::Signal { fence: self.fence, flags: 0 };
        // SAFETY: the structure is the header's, lives across the call, and is only read.
        unsafe { uapi::signal(self.vgem.as_fd().as_raw_fd(), &signal) }.context("vgem signals a fence")?;
        Ok(())
    }

    /// After a time, from another thread, which gives the time of `CLOCK_MONOTONIC` just before it did, in µs.
    pub fn after(self, time: Duration) -> std::thread::JoinHandle<Result<u64>> {
        std::thread::spawn(move || {
            std::thread::sleep(time);
            let at_us = now_us()?;
            self.now().map(|()| at_us)
        })
    }
}

/// µs of `CLOCK_MONOTONIC`.
pub fn now_us() -> Result<u64> {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)?;
    Ok(u64::try_from(now.tv_sec())? * 1_000_000 + u64::try_from(now.tv_nsec())? / 1000)
}
