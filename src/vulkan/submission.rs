//! Commands that were recorded once, given to the GPU and waited for.

use std::sync::{Mutex, MutexGuard, PoisonError};

use ash::vk;

use super::failure::failed;
use super::gpu::Gpu;
use crate::error::{Error, Result};

/// Longest wait for the GPU, in ns. Under emulation a software GPU takes seconds for a large picture.
const TIMEOUT_NS: u64 = 30_000_000_000;

/// The wait once more for what did not end by then, in ns, before anything that it uses would be destroyed.
const GRACE_NS: u64 = 2_000_000_000;

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
    /// [`Kind::Unsupported`](crate::error::Kind::Unsupported) if the queue does not compute; what the driver says.
    pub(super) fn new(gpu: &Gpu) -> Result<Submission> {
        gpu.can_compute()?;
        // SAFETY: the device lives.
        let fence = unsafe { gpu.device().create_fence(&vk::FenceCreateInfo::default(), None) };
        let fence = fence.map_err(|result| failed("vkCreateFence", "compute on", &gpu.info().name, result))?;
        Ok(Submission { gpu: gpu.clone(), fence, busy: Mutex::new(false) })
    }

    fn failed(&self, call: &'static str, result: vk::Result) -> Error {
        failed(call, "compute on", &self.gpu.info().name, result)
    }

    /// Runs commands and waits for their end. No allocation of ours. After an error the GPU may still be at them: nothing that they
    /// use may be destroyed before [`Submission::settle`] says so.
    ///
    /// # Safety
    /// `commands` was recorded for the GPU's queue family, can be submitted again, and all that it uses lives.
    ///
    /// # Errors
    /// [`Kind::Disconnected`](crate::error::Kind::Disconnected) if the GPU is lost, [`Kind::Timeout`](crate::error::Kind::Timeout) if
    /// it does not end within 30 s, or, at once, if something before did not end; and what else the driver says.
    pub(super) unsafe fn run(&self, commands: vk::CommandBuffer) -> Result<()> {
        let device = self.gpu.device();
        let (buffers, fences) = ([commands], [self.fence]);
        let submits = [vk::SubmitInfo::default().command_buffers(&buffers)];
        let mut busy = self.busy();
        if !self.end(&mut busy) || self.gpu.is_stuck() {
            let error = self.failed("vkWaitForFences", vk::Result::TIMEOUT);
            return Err(error
                .meaning("what it was given before never ended")
                .repair("open the GPU again"));
        }
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

    /// Waits for the end of what a failure has left with the GPU, and tells whether it has ended: if not, nothing that it uses may be
    /// destroyed. Most drivers reset a GPU that hangs, which ends the wait; with one that does not, the wait is two seconds, once, and the
    /// GPU's objects stay behind ([`Gpu::is_stuck`]).
    pub(super) fn settle(&self) -> bool {
        self.end(&mut self.busy()) && !self.gpu.is_stuck()
    }

    fn busy(&self) -> MutexGuard<'_, bool> {
        self.busy.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether nothing is left with the GPU. By the own fence, not by the queue: on that there may be work of others, and no limit.
    fn end(&self, busy: &mut bool) -> bool {
        if *busy {
            let patience = if self.gpu.is_stuck() { 0 } else { GRACE_NS };
            // SAFETY: the device lives, and the fence is ours and was submitted.
            match unsafe { self.gpu.device().wait_for_fences(&[self.fence], true, patience) } {
                // A lost device has ended everything as well ("Lost Device").
                Ok(()) | Err(vk::Result::ERROR_DEVICE_LOST) => *busy = false,
                Err(_) => self.gpu.give_up(),
            }
        }
        !*busy
    }
}

impl Drop for Submission {
    fn drop(&mut self) {
        if self.settle() {
            // SAFETY: the fence is ours, and no submission that uses it is left.
            unsafe { self.gpu.device().destroy_fence(self.fence, None) };
        }
    }
}
