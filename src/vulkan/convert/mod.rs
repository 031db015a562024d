//! Conversion by the GPU: a picture of YUV, grey or Bayer samples becomes one of XRGB or ARGB, cropped and scaled on the way.
//!
//! Source and destination are dma-bufs, imported once each as bytes (`VkBuffer`), so every layout of rows is taken as it lies: packed,
//! semi-planar and planar YUV in one or several memory planes, with any stride. No byte is copied by the CPU, unless the GPU is one made of
//! software, which says so ([`GpuKind::Software`](super::GpuKind::Software)).
//!
//! A tiling that nobody stated is not taken as rows, unless the memory's makers know nothing else, as with cameras: see
//! [`GpuConverter::new`].
//!
//! - YUV by the layout's encoding and range, within one step of 8 bits in each channel of [`Pixels::rgb`](crate::format::Pixels::rgb);
//!   subsampled chroma is that of the sample which pixels share.
//! - Bayer by gradient-corrected linear interpolation over five by five samples (Malvar, He, Cutler, ICASSP 2004).
//! - Scaling by bilinear interpolation between the four nearest pixels, which is right for enlarging and for reducing to a half at most.

mod job;
mod pipeline;
mod recorded;

use std::sync::Arc;

use crate::endpoint::{ImportCache, JoinError, Refusal, Rung};
use crate::error::{Error, Kind, Result};
use crate::fence::{PATIENCE, SyncFile};
use crate::format::{Format, Layout};
use crate::frame::{Buffer, WeakBuffer};

use super::gpu::Gpu;
use super::linear::stated_modifier;
use job::Job;
pub use job::{Crop, NotByGpu};
use pipeline::Pipeline;
pub(super) use pipeline::Shared;
use recorded::{Bytes, Recorded, of_conversion};

/// Makes pictures of one layout out of pictures of another, on a GPU.
///
/// For each pair of buffers the commands are recorded once ([`GpuConverter::prepare`]); after that a picture costs one submission and one
/// wait ([`convert`](GpuConverter::convert)), or a fence in place of the wait ([`start`](GpuConverter::start)), without an allocation or an
/// import here.
pub struct GpuConverter {
    gpu: Gpu,
    from: Layout,
    to: Layout,
    job: Job,
    /// Before `imports` and `pipeline`, which each keeps as long as it needs them.
    pairs: Vec<Pair>,
    imports: ImportCache<Arc<Vec<super::GpuBuffer>>>,
    importer: Bytes,
    pipeline: Arc<Pipeline>,
}

struct Pair {
    source: WeakBuffer,
    target: WeakBuffer,
    recorded: Recorded,
}

impl std::fmt::Debug for GpuConverter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "GpuConverter({} to {} on {})", self.from, self.to, self.gpu.info().name)
    }
}

impl GpuConverter {
    /// The formats that can be made of `from`, best first.
    pub fn targets(from: Format) -> impl Iterator<Item = Format> {
        Format::all().filter(move |&to| to != from && Job::takes(from) && Job::makes(to))
    }

    /// A converter on this GPU of a part of pictures laid out as `from` into pictures laid out as `to`, which may be of another size.
    /// A layout whose modifier is [`LINEAR`](crate::format::Modifier::LINEAR) states so for buffers that are laid out like it and state
    /// none: those of a display, for one, which who has made them knows to be rows.
    ///
    /// The first on a GPU compiles the shader, tens of milliseconds; others share it.
    ///
    /// # Errors
    /// [`Kind::Unsupported`] with what does not fit ([`NotByGpu`]), or if the GPU's queue does not compute; what the driver says.
    pub fn new(gpu: &Gpu, from: &Layout, to: &Layout, crop: Crop) -> Result<GpuConverter> {
        let limits = gpu.limits();
        let bad = || Error::new(Kind::Unsupported, "convert", from.to_string());
        let job =
            Job::new(from, to, crop, limits.max_storage_buffer_range.into()).map_err(|cause| bad().because(cause))?;
        let (across, down) = Job::groups(to.size());
        let [most_across, most_down, _] = limits.max_compute_work_group_count;
        if across > most_across || down > most_down {
            return Err(bad().because(format!("{to} is larger than {} computes at once", gpu.info().name)));
        }
        // In this order: one that does not compute is not to compile anything.
        gpu.can_compute()?;
        let pipeline = Pipeline::of(gpu)?;
        let (imports, importer) = (ImportCache::new(), Bytes(gpu.clone()));
        let (gpu, pairs) = (gpu.clone(), Vec::new());
        Ok(GpuConverter { gpu, from: *from, to: *to, job, pairs, imports, importer, pipeline })
    }

    /// What it reads.
    pub fn from(&self) -> &Layout {
        &self.from
    }

    /// What it writes.
    pub fn to(&self) -> &Layout {
        &self.to
    }

    /// The GPU.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// How many buffers were imported.
    pub fn imports(&self) -> u64 {
        self.imports.imports()
    }

    /// Imports the buffers and records the commands for each pair of a source and a target. Those of buffers that are gone are
    /// forgotten.
    ///
    /// # Errors
    /// The refusal, on the rung [`Rung::Converted`]: a buffer that is laid out otherwise, or that the GPU does not import.
    pub fn prepare(&mut self, sources: &[Buffer], targets: &[Buffer]) -> Result<(), Refusal> {
        self.forget_gone();
        for source in sources {
            for target in targets {
                self.pair(source, target)?;
            }
        }
        Ok(())
    }

    /// Converts a picture and waits for the GPU. The source is read and the target written by the time this returns; for both the
    /// usual rules hold: the source's lease is the caller's, and nobody shows the target meanwhile.
    ///
    /// # Errors
    /// As [`GpuConverter::prepare`] for buffers that were not prepared; [`Kind::Disconnected`] if the GPU is lost,
    /// [`Kind::Timeout`] if it does not end within 30 s. After that nothing more is made on this `Gpu`, and what the GPU may still be at
    /// (memory, its dma-bufs, the device) is kept until the process ends: it cannot be taken back.
    pub fn convert(&mut self, source: &Buffer, target: &Buffer) -> Result<(), JoinError> {
        let index = self.pair(source, target)?;
        Ok(self.pairs[index].recorded.run()?)
    }

    /// Has the GPU convert a picture as soon as `after` has signalled (the source's acquire fence, if it has one), and returns what signals
    /// when it has: until then the source is not filled again ([`Frame::release_after`](crate::frame::Frame::release_after)), and the target
    /// neither shown nor read without waiting for it ([`with_acquire_fence`](crate::frame::Frame::with_acquire_fence)). `None` if it has
    /// already.
    ///
    /// Neither buffer may be given to another conversion before that either, unless with the result as its `after`.
    ///
    /// Where the driver takes or gives no fences ([`Gpu::sync`]) and with a GPU of software, the CPU waits here, for `after` 5 s at most; one
    /// of software ends its work, too, before it gives a fence. A conversion of the same pair of buffers that has not ended is waited for, and
    /// so it is when the converter is dropped: 30 s at most, after which the GPU counts as stuck, as in [`GpuConverter::convert`]. So `after`
    /// must signal in time. Cost: a submission, a descriptor for the result and, with `after`, a system call to look at it; no allocation here.
    ///
    /// # Errors
    /// As [`GpuConverter::convert`]; that of `after`, if its work has failed by now or it is waited for here. What fails later, the GPU does
    /// not tell: who must know keeps a clone of `after` and [checks](SyncFile::check) it when the result has signalled.
    pub fn start(
        &mut self,
        source: &Buffer,
        after: Option<SyncFile>,
        target: &Buffer,
    ) -> Result<Option<SyncFile>, JoinError> {
        let index = self.pair(source, target)?;
        let sync = self.gpu.sync();
        let by_gpu = sync.import_semaphore && sync.export_semaphore;
        if let Some(fence) = &after {
            // A driver of software would wait without limit.
            let patience = if by_gpu && !self.gpu.info().is_software() { None } else { Some(PATIENCE) };
            patience.map_or_else(|| fence.check().map(drop), |patience| fence.wait(patience))?;
        }
        let after = after.filter(|_| by_gpu);
        let recorded = &mut self.pairs[index].recorded;
        match sync.export_semaphore {
            true => Ok(recorded.start(after)?),
            false => Ok(recorded.run().map(|()| None)?),
        }
    }

    fn forget_gone(&mut self) {
        self.pairs.retain(|pair| !pair.source.is_gone() && !pair.target.is_gone());
    }

    /// The place of a pair, recorded now if it is new.
    fn pair(&mut self, source: &Buffer, target: &Buffer) -> Result<usize, Refusal> {
        let known = self
            .pairs
            .iter()
            .position(|pair| pair.source.follows(source) && pair.target.follows(target));
        if let Some(index) = known {
            return Ok(index);
        }
        // What was recorded for buffers that are gone keeps their memory.
        self.forget_gone();
        for (buffer, expected) in [(source, &self.from), (target, &self.to)] {
            let layout = *buffer.layout();
            let stated = layout.with_modifier(layout.modifier().or(expected.modifier()));
            if stated != *expected {
                return Err(Refusal {
                    rung: Rung::Converted,
                    step: "layout",
                    errno: None,
                    why: format!("the buffer is {}, and the conversion was made for {expected}", buffer.layout()),
                    repair: "make a conversion for these buffers".to_owned(),
                });
            }
        }
        for (buffer, stated) in [(source, &self.from), (target, &self.to)] {
            let memory = (0u32..).zip(buffer.memory()).filter_map(|(plane, _)| buffer.dma_buf(plane));
            stated_modifier(stated, memory).map_err(of_conversion)?;
        }
        let from = Arc::clone(self.imports.get(&mut self.importer, source)?);
        let to = Arc::clone(self.imports.get(&mut self.importer, target)?);
        let recorded = Recorded::new(&self.pipeline, &self.job, self.to.size(), &from, &to)?;
        self.pairs
            .push(Pair { source: source.downgrade(), target: target.downgrade(), recorded });
        Ok(self.pairs.len() - 1)
    }
}
