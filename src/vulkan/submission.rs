//! Commands that were recorded once, given to the GPU and waited for.

use std::sync::{Mutex, MutexGuard, PoisonError};

use ash::vk;

use super::failure::failed;
use super::gpu::Gpu;
use crate::error::{Error, Result};

/// Longest wait for the GPU, in ns. Under emulation a software GPU takes seconds for a large picture.
const TIMEOUT_NS: u64 = 30_000_000_000;

/// A fence, and what was submitted with it: one thing at a time.
pub(super) struct Submission {
    gpu: Gpu,
    fence: vk::Fence,
    /// Whether the GPU may still have something. Locked while the fence is in use.
    busy: Mutex<bool>,
}

impl std::fmt::Debug for Submission {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Submission({:?})", self.gpu)
    }
}

impl Submission {
    /// # Errors
    /// What the driver says.
    pub(super) fn new(gpu: &Gpu) -> Result<Submission> {
        // SAFETY: the device lives.
        let fence = unsafe { gpu.device().create_fence(&vk::FenceCreateInfo::default(), None) };
        let fence = fence.map_err(|result| failed("vkCreateFence", "compute on", &gpu.info().name, result))?;
        Ok(Submission { gpu: gpu.clone(), fence, busy: Mutex::new(false) })
    }

    fn failed(&self, call: &'static str, result: vk::Result) -> Error {
        failed(call, "compute on", &self.gpu.info().name, result)
    }

    /// Runs commands and waits for their end. No allocation of ours. After an error the GPU may still be at them: nothing that they
    /// use may be destroyed before [`Submission::settle`].
    ///
    /// # Safety
    /// `commands` was recorded for the GPU's queue family, can be submitted again, and all that it uses lives.
    ///
    /// # Errors
    /// [`Kind::Disconnected`](crate::error::Kind::Disconnected) if the GPU is lost, [`Kind::Timeout`](crate::error::Kind::Timeout) if
    /// it does not end within 30 s, and what else the driver says.
    pub(super) unsafe fn run(&self, commands: vk::CommandBuffer) -> Result<()> {
        let device = self.gpu.device();
        let (buffers, fences) = ([commands], [self.fence]);
        let submits = [vk::SubmitInfo::default().command_buffers(&buffers)];
        let mut busy = self.busy();
        self.end(&mut busy);
        // SAFETY: by this function's contract; the queue is locked for the submission, the fence is ours and not in use: `busy` is
        // locked, and the end of every submission was waited for, here or just now.
        unsafe {
            device
                .reset_fences(&fences)
                .map_err(|result| self.failed("vkResetFences", result))?;
            let queue = self.gpu.queue().lock().unwrap_or_else(PoisonError::into_inner);
            device
                .queue_submit(*queue, &submits, self.fence)
                .map_err(|result| self.failed("vkQueueSubmit", result))?;
            drop(queue);
            *busy = true;
            device
                .wait_for_fences(&fences, true, TIMEOUT_NS)
                .map_err(|result| self.failed("vkWaitForFences", result))?;
        }
        *busy = false;
        Ok(())
    }

    /// Waits for the end of what a failure has left with the GPU, before anything that it uses is destroyed. A GPU that hangs is reset
    /// by its driver, which ends the wait.
    pub(super) fn settle(&self) {
        self.end(&mut self.busy());
    }

    fn busy(&self) -> MutexGuard<'_, bool> {
        self.busy.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self, busy: &mut bool) {
        if *busy {
            let queue = self.gpu.queue().lock().unwrap_or_else(PoisonError::into_inner);
            // SAFETY: the device lives, and the queue is locked. A lost device has ended everything as well.
            let _ = unsafe { self.gpu.device().queue_wait_idle(*queue) };
            *busy = false;
        }
    }
}

impl Drop for Submission {
    fn drop(&mut self) {
        self.settle();
        // SAFETY: the fence is ours, and no submission that uses it is left.
        unsafe { self.gpu.device().destroy_fence(self.fence, None) };
    }
}
