//! Buffers for those who shall not write: each exported a second time.

use super::*;

impl Queue<Allocated> {
    /// Gives each of the driver's buffers a descriptor for reading alone besides ([`DmaBuf::read_only`]). Those that others made are left
    /// as they are: only their maker could.
    ///
    /// Cost: one system call for each memory plane of each buffer.
    ///
    /// # Errors
    /// What `VIDIOC_EXPBUF` says; the queue is as it was.
    pub fn export_read_only(&self) -> Result<()> {
        if self.state.0.made_by == MadeBy::Others {
            return Ok(());
        }
        for (index, buffer) in (0u32..).zip(&self.state.0.buffers) {
            for (plane, memory) in (0u32..).zip(buffer.memory()) {
                let Memory::DmaBuf(dma_buf) = memory else { continue };
                if dma_buf.read_only().is_some() {
                    continue;
                }
                let fd = raw::export(self.device.as_fd(), self.api().buffer_type(), index, plane, Access::Read);
                let fd = fd.context("export", || format!("buffer {index} of {} for reading", self.name()));
                dma_buf.add_read_only(fd.map_err(|error| Call::ExportBuffer.explain(error))?);
            }
        }
        Ok(())
    }
}
