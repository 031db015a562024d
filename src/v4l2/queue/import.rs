//! A queue over memory that others made (`V4L2_MEMORY_DMABUF`).

use super::*;
use crate::dmabuf::Identity;
use crate::fence::SyncFile;

impl Queue<Idle> {
    /// Takes `buffers` instead of making some: the driver fills these dma-bufs. Slot and buffer stay together for the queue's life,
    /// so that the driver imports each once. Every buffer is tried now (`VIDIOC_PREPARE_BUF`) where the driver can; it may use fewer
    /// than there are.
    ///
    /// A buffer must have the format, size, strides and memory planes that the camera has agreed to; where its planes start and its
    /// colour become the camera's.
    ///
    /// Cost: two system calls, and one or two for each buffer.
    ///
    /// # Errors
    /// [`Kind::Invalid`] for a buffer that does not fit, naming what does not; otherwise what `VIDIOC_REQBUFS` or
    /// `VIDIOC_PREPARE_BUF` says, with the queue as it was. A driver that cannot prepare refuses only in
    /// [`start`](Queue::start).
    pub fn import(self, buffers: Vec<Buffer>) -> Result<Queue<Allocated>, Box<Failed<Queue<Idle>>>> {
        match self.imported(buffers) {
            Ok(pool) => Ok(self.with(Allocated(pool))),
            Err(error) => {
                // The first failure is the one to report.
                let _ = self.request(MadeBy::Others, 0);
                Err(Box::new(Failed { error, queue: self }))
            }
        }
    }

    fn imported(&self, mut buffers: Vec<Buffer>) -> Result<Pool> {
        buffers.iter().try_for_each(|buffer| self.fits(buffer))?;
        let count = u32::try_from(buffers.len()).unwrap_or(MAX_SLOTS).min(MAX_SLOTS);
        if count == 0 {
            return Err(self.unfit().because("there is none"));
        }
        let given = self.request(MadeBy::Others, count)?.min(count);
        buffers.truncate(given as usize);
        let mut layout = self.layout;
        for (index, buffer) in (0u32..).zip(&buffers) {
            let mut planes = planes_of(buffer);
            match self.call(MadeBy::Others, BufferCall::Prepare, index, &mut planes) {
                // Where the driver's data starts is known of a prepared buffer alone; see `actual_layout`.
                Ok(_) if index == 0 && self.api() == Api::MultiPlanar => {
                    layout = self.prepared_layout(MadeBy::Others)?;
                }
                Ok(_) => {}
                Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => {
                    self.try_by_queueing(&buffers)?;
                    break;
                }
                Err(error) => {
                    let error = refused("import a buffer into", self.name(), error);
                    return Err(error.said_by("VIDIOC_PREPARE_BUF"));
                }
            }
        }
        let of = |buffer: Buffer| buffer.with_layout(layout.with_modifier(buffer.layout().modifier()));
        let buffers: Vec<_> = buffers.into_iter().map(of).collect::<Result<_>>()?;
        Ok(self.pool_of(buffers, MadeBy::Others))
    }

    /// A driver that cannot prepare buffers is given all of them, and gives them back: it takes queued buffers back also before the flow
    /// has started (vb2_core_streamoff).
    fn try_by_queueing(&self, buffers: &[Buffer]) -> Result<()> {
        let queue = |(index, buffer): (u32, &Buffer)| {
            let mut planes = planes_of(buffer);
            self.call(MadeBy::Others, BufferCall::Queue, index, &mut planes)
        };
        let tried = (0u32..).zip(buffers).try_for_each(|pair| queue(pair).map(drop));
        let mut buffer_type = self.api().buffer_type().cast_signed();
        let _ = raw::stream_off(self.device.as_fd(), &mut buffer_type);
        tried.map_err(|error| refused("import a buffer into", self.name(), error))
    }

    /// Format, size, strides and memory planes are those agreed to, in dma-bufs.
    fn fits(&self, buffer: &Buffer) -> Result<()> {
        let (own, given) = (self.layout, buffer.layout());
        let differs = |what: &str, own: &dyn fmt::Display, given: &dyn fmt::Display| {
            Err(self.unfit().because(format!("its {what} is {given}, and the camera's {own}")))
        };
        if own.format() != given.format() {
            return differs("format", &own.format(), &given.format());
        }
        if own.size() != given.size() {
            let size = |(width, height): (u32, u32)| format!("{width}x{height}");
            return differs("size", &size(own.size()), &size(given.size()));
        }
        for (plane, (own, given)) in own.planes().iter().zip(given.planes()).enumerate() {
            if own.stride != given.stride {
                return differs(&format!("stride in plane {plane}"), &own.stride, &given.stride);
            }
            if own.memory != given.memory {
                return differs(&format!("memory plane of plane {plane}"), &own.memory, &given.memory);
            }
        }
        if buffer.memory().len() != own.memory_planes() {
            return differs("number of memory planes", &own.memory_planes(), &buffer.memory().len());
        }
        if !buffer.is_dma_buf() {
            return Err(self.unfit().because("its memory is no dma-buf"));
        }
        Ok(())
    }

    fn unfit(&self) -> Error {
        Error::new(Kind::Invalid, "import a buffer into", self.name())
    }
}

/// Memory, and the fence of a device that reads it.
pub(crate) type StillRead = (Identity, Arc<SyncFile>);

impl Queue<Allocated> {
    /// What devices still read, by the release fences of its slots: memory that others made, and that may come back. The driver's own
    /// memory does not.
    pub(crate) fn still_read(&self) -> Vec<StillRead> {
        let Allocated(pool) = &self.state;
        if pool.made_by == MadeBy::Driver {
            return Vec::new();
        }
        let mut all = Vec::new();
        for (index, fence) in pool.slots.open_fences() {
            let buffer = pool.buffers.get(index as usize);
            all.extend(
                buffer
                    .into_iter()
                    .flat_map(dma_bufs)
                    .map(|of| (of.identity(), Arc::clone(&fence))),
            );
        }
        all
    }

    /// Its memory that is still read is not filled before the fences have signalled: they are the slots' from now on.
    pub(crate) fn hold_back(&self, still_read: &mut Vec<StillRead>) {
        let Allocated(pool) = &self.state;
        still_read.retain(|(identity, fence)| {
            let mut known = false;
            for (index, buffer) in (0u32..).zip(&pool.buffers) {
                if dma_bufs(buffer).any(|of| of.identity() == *identity) {
                    pool.slots.hold_back(index, Arc::clone(fence));
                    known = true;
                }
            }
            !known
        });
    }
}

fn dma_bufs(buffer: &Buffer) -> impl Iterator<Item = &DmaBuf> {
    (0u32..).map_while(|memory| buffer.dma_buf(memory))
}

impl Pool {
    /// What `VIDIOC_QBUF` must be told of a slot's memory: nothing for the driver's own.
    pub(super) fn planes(&self, index: u32) -> [sys::v4l2_plane; MAX_V4L2_PLANES] {
        match (self.made_by, self.buffers.get(index as usize)) {
            (MadeBy::Others, Some(buffer)) => planes_of(buffer),
            _ => no_planes(),
        }
    }
}

fn planes_of(buffer: &Buffer) -> [sys::v4l2_plane; MAX_V4L2_PLANES] {
    let mut planes = no_planes();
    for ((plane, memory), len) in planes.iter_mut().zip(buffer.memory()).zip(buffer.memory_lens()) {
        plane.m.fd = memory.as_fd().as_raw_fd();
        // The kernel's field has 32 bits; it refuses what is shorter than the format needs (`__prepare_dmabuf`).
        plane.length = u32::try_from(*len).unwrap_or(u32::MAX);
    }
    planes
}

/// A driver's refusal of somebody else's memory.
pub(super) fn refused(step: &'static str, name: String, error: std::io::Error) -> Error {
    Call::ImportBuffer.explain(Error::from_io(step, name, error))
}
