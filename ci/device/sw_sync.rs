//! Timelines of fences that a test drives, and whose open fences fail when it closes them: sw_sync (drivers/dma-buf/sw_sync.c).

use std::fs;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};
use dmaflow::fence::SyncFile;

use crate::modules::SW_SYNC;
use crate::vgem::now_us;

/// `struct sw_sync_create_fence_data`
#[repr(C)]
struct CreateFence {
    value: u32,
    name: [u8; 32],
    fence: i32,
}
nix::ioctl_readwrite!(create_fence, b'W', 0, CreateFence);
nix::ioctl_write_ptr!(inc, b'W', 1, u32);

/// A timeline, at 0 when it is opened.
pub struct Timeline(fs::File);

impl Timeline {
    pub fn open() -> Result<Timeline> {
        let file = fs::File::options().read(true).write(true).open(SW_SYNC);
        Ok(Timeline(file.context("open a timeline of sw_sync")?))
    }

    /// A fence that signals when the timeline has come to this value.
    pub fn fence(&self, value: u32) -> Result<SyncFile> {
        let mut data = CreateFence { value, name: [0; 32], fence: -1 };
        data.name[..4].copy_from_slice(b"test");
        // SAFETY: the structure is the kernel's and lives across the call; it makes a new descriptor.
        let fd = unsafe {
            create_fence(self.0.as_raw_fd(), &mut data)?;
            OwnedFd::from_raw_fd(data.fence)
        };
        Ok(SyncFile::from(fd))
    }

    /// The timeline goes on, and signals what it passes.
    pub fn advance(&self, by: u32) -> Result<()> {
        // SAFETY: the kernel reads the number alone.
        unsafe { inc(self.0.as_raw_fd(), &by) }?;
        Ok(())
    }

    /// What is open fails, with -ENOENT (`sw_sync_debugfs_release`).
    pub fn fail(self) {
        drop(self);
    }

    /// The same after a time, from another thread, which gives the time of `CLOCK_MONOTONIC` just before it did, in µs.
    pub fn fail_after(self, time: Duration) -> JoinHandle<Result<u64>> {
        std::thread::spawn(move || {
            std::thread::sleep(time);
            let at_us = now_us()?;
            self.fail();
            Ok(at_us)
        })
    }
}
