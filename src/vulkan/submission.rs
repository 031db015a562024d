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
    /// What the GPU may still have. Locked while the fence is in use.
    given: Mutex<Given>,
}

/// What was given to the GPU last.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Given {
    /// Nothing, or it has ended.
    Nothing,
    /// It has not been waited for yet.
    Started,
    /// It has, and did not end in time.
    Late,
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
        Ok(Submission { gpu: gpu.clone(), fence, given: Mutex::new(Given::Nothing) })
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
        let mut given = self.given();
        // SAFETY: by this function's contract.
        unsafe { self.submit(&mut given, commands, None, None) }?;
        // SAFETY: the device lives; the fence is ours and was submitted.
        let ended = unsafe { self.gpu.device().wait_for_fences(&[self.fence], true, TIMEOUT_NS) };
        *given = if ended.is_ok() { Given::Nothing } else { Given::Late };
        if ended.is_err() {
            // Once more, and then nothing else is given to this GPU.
            self.end(&mut given);
        }
        ended.map_err(|result| self.failed("vkWaitForFences", result))
    }

    /// Waits for the end of what was given before: nothing uses it any more when this has succeeded.
    ///
    /// # Errors
    /// [`Kind::Timeout`](crate::error::Kind::Timeout) if that does not end.
    pub(super) fn ended(&self) -> Result<()> {
        self.must_end(&mut self.given())
    }

    /// Has the GPU run commands when `wait` has signalled, and signal `signal` then. What was given before is waited for. Nothing that they
    /// use may be destroyed before [`Submission::settle`] says so.
    ///
    /// # Safety
    /// As [`Submission::run`]; both semaphores are of the GPU, and nothing else uses them. `wait` has an import.
    ///
    /// # Errors
    /// As [`Submission::run`], without its wait.
    pub(super) unsafe fn start(
        &self,
        commands: vk::CommandBuffer,
        wait: Option<vk::Semaphore>,
        signal: Option<vk::Semaphore>,
    ) -> Result<()> {
        // SAFETY: by this function's contract.
        unsafe { self.submit(&mut self.given(), commands, wait, signal) }
    }

    /// # Safety
    /// As [`Submission::start`].
    unsafe fn submit(
        &self,
        given: &mut Given,
        commands: vk::CommandBuffer,
        wait: Option<vk::Semaphore>,
        signal: Option<vk::Semaphore>,
    ) -> Result<()> {
        let device = self.gpu.device();
        let (buffers, fences) = ([commands], [self.fence]);
        // Where the commands take memory over from others: their first barrier is from this stage on.
        let stages = [vk::PipelineStageFlags::COMPUTE_SHADER];
        let mut info = vk::SubmitInfo::default().command_buffers(&buffers);
        if let Some(wait) = &wait {
            info = info.wait_semaphores(std::slice::from_ref(wait)).wait_dst_stage_mask(&stages);
        }
        if let Some(signal) = &signal {
            info = info.signal_semaphores(std::slice::from_ref(signal));
        }
        let submits = [info];
        self.must_end(given)?;
        // SAFETY: by this function's contract; the queue is locked for the submission, the fence is ours and not in use: `given` is
        // locked, and the end of every submission was waited for, here or just now.
        unsafe {
            device
                .reset_fences(&fences)
                .map_err(|result| self.failed("vkResetFences", result))?;
            let queue = self.gpu.queue().lock().unwrap_or_else(PoisonError::into_inner);
            device
                .queue_submit(*queue, &submits, self.fence)
                .map_err(|result| self.failed("vkQueueSubmit", result))?;
        }
        *given = Given::Started;
        Ok(())
    }

    /// Waits for the end of what a failure has left with the GPU, and tells whether it has ended: if not, nothing that it uses may be
    /// destroyed. Most drivers reset a GPU that hangs, which ends the wait; with one that does not, the wait ends (after 30 s, or two more where
    /// those are over), once, and the GPU's objects stay behind ([`Gpu::is_stuck`]).
    pub(super) fn settle(&self) -> bool {
        self.end(&mut self.given()) && !self.gpu.is_stuck()
    }

    fn given(&self) -> MutexGuard<'_, Given> {
        self.given.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn must_end(&self, given: &mut Given) -> Result<()> {
        if self.end(given) && !self.gpu.is_stuck() {
            return Ok(());
        }
        let error = self.failed("vkWaitForFences", vk::Result::TIMEOUT);
        Err(error
            .meaning("what it was given before never ended")
            .repair("open the GPU again"))
    }

    /// Whether nothing is left with the GPU. By the own fence, not by the queue: on that there may be work of others, and no limit.
    fn end(&self, given: &mut Given) -> bool {
        if *given != Given::Nothing {
            let patience = match *given {
                _ if self.gpu.is_stuck() => 0,
                Given::Started => TIMEOUT_NS,
                _ => GRACE_NS,
            };
            // SAFETY: the device lives, and the fence is ours and was submitted.
            match unsafe { self.gpu.device().wait_for_fences(&[self.fence], true, patience) } {
                // A lost device has ended everything as well ("Lost Device").
                Ok(()) | Err(vk::Result::ERROR_DEVICE_LOST) => *given = Given::Nothing,
                Err(_) => self.gpu.give_up(),
            }
        }
        *given == Given::Nothing
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
