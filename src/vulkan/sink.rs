//! `vulkan`: a GPU reads every texel of every frame, and tells a checksum of each.

use std::collections::VecDeque;
use std::sync::Arc;

use ash::vk;

use super::checksum::predict;
use super::formats::GpuFormat;
use super::gpu::Gpu;
use super::messages::Messages;
use super::pass::Pass;
use super::sampled::{Sampled, Sampler};
use crate::clock::now_us;
use crate::endpoint::{ImportCache, JoinError, Predicted, Refusal, Rung, Shown, Sink, Verdict};
use crate::error::{Error, Kind, Result};
use crate::format::{Format, Layout, Modifier};
use crate::frame::{Buffer, Frame, FrameMeta, Room};

/// Rows such as any GPU known takes, in bytes.
const STRIDE: u32 = 256;

/// So many checksums are kept.
const KEPT: usize = 256;

/// The checksum of a frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Checksum {
    /// The frame's data.
    pub meta: FrameMeta,
    /// What the GPU has summed up over every texel of every colour plane.
    pub checksum: u32,
}

/// A [`Sink`] that imports each buffer once and has the GPU read every texel of every frame through the imported image, one colour plane
/// after the other. It waits for the GPU and lets the frame go then.
///
/// Each plane is read as it lies (views or images of single planes, no colour conversion), so that the checksum can be predicted exactly
/// from the captured bytes. A frame costs one submission and one wait; nothing is allocated or imported, and no descriptor is touched.
#[derive(Debug)]
pub struct Vulkan {
    gpu: Gpu,
    sampler: Sampler,
    cache: ImportCache<Sampled>,
    /// Imports of before the last join.
    imports_before: u64,
    formats: Vec<Format>,
    newest: VecDeque<Checksum>,
    verifier: Option<Verifier>,
    /// A submission that never ended still has the fence.
    failed: bool,
    /// Where the validation layer watches.
    messages: Option<Messages>,
}

/// What was predicted, and how it was met.
#[derive(Debug)]
struct Verifier {
    scratch: Vec<u8>,
    predicted: Predicted,
}

impl Vulkan {
    /// A sink on this GPU; with `verify` each checksum is compared with what the CPU predicts.
    ///
    /// # Errors
    /// What the driver says.
    pub fn new(gpu: Gpu, verify: bool) -> Result<Vulkan> {
        let formats = gpu
            .offers(vk::ImageUsageFlags::SAMPLED)
            .iter()
            .filter(|offer| offer.modifiers.iter().any(|known| known.modifier == Modifier::LINEAR))
            .map(|offer| offer.format)
            .collect();
        let sampler = Sampler::new(Pass::new(&gpu)?);
        let (messages, verifier) =
            (gpu.messages(), verify.then(|| Verifier { scratch: Vec::new(), predicted: Predicted::new() }));
        Ok(Vulkan {
            gpu,
            sampler,
            cache: ImportCache::new(),
            imports_before: 0,
            formats,
            newest: VecDeque::with_capacity(KEPT),
            verifier,
            failed: false,
            messages,
        })
    }

    /// The GPU.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// Why each colour plane of the frames is an image of its own, where the GPU takes no image of all of them.
    pub fn planes_apart(&self) -> Option<&Refusal> {
        self.sampler.apart()
    }

    /// The checksums of the newest frames, oldest first: 256 at most.
    pub fn checksums(&self) -> impl ExactSizeIterator<Item = &Checksum> {
        self.newest.iter()
    }

    /// Fails if the validation layer has said something.
    fn check_messages(&self) -> Result<()> {
        let all = self.messages.as_ref().map(Messages::all).unwrap_or_default();
        match all.first() {
            None => Ok(()),
            Some(first) => Err(Error::new(Kind::Invalid, "use", &self.gpu.info().name).because(first.clone())),
        }
    }
}

impl Sink for Vulkan {
    fn name(&self) -> &str {
        "vulkan"
    }

    fn formats(&self) -> Option<Vec<Format>> {
        Some(self.formats.clone())
    }

    fn gpu_name(&self) -> Option<&str> {
        let info = self.gpu.info();
        // Two GPUs may be of one name; the nodes tell them apart.
        let node = info.nodes.last().and_then(|node| node.to_str());
        Some(node.unwrap_or(&info.name))
    }

    fn join(&mut self, layout: &Layout, _: Option<f64>, buffers: &[Buffer]) -> Result<Rung, JoinError> {
        if self.failed {
            return Err(JoinError::Failed(gone(&self.gpu)));
        }
        for buffer in buffers {
            self.cache.get(&mut self.sampler, buffer)?;
        }
        if let Some(verifier) = &mut self.verifier {
            // The longest row is the first plane's; reserved now, for a flow without allocations.
            let format = layout.format();
            let longest = (0..format.planes()).map(|plane| format.row_bytes(plane, layout.width())).max();
            verifier.scratch.resize(longest.unwrap_or(0) as usize, 0);
        }
        // Some of these buffers may have been imported by a join before.
        self.imports_before = self.cache.imports().saturating_sub(buffers.len() as u64);
        self.check_messages()?;
        Ok(Rung::Exported)
    }

    /// Buffers of the GPU, linear, so that a camera or the CPU can fill them: images as its driver lays them out, and of formats of which
    /// it exports none plain rows.
    fn allocate(&mut self, layout: &Layout, room: &Room, count: u32) -> Result<Vec<Buffer>> {
        let make = |_| {
            let image = self
                .gpu
                .make_buffer(layout, room, vk::ImageUsageFlags::SAMPLED, &[Modifier::LINEAR]);
            image.or_else(|error| match error.kind() {
                Kind::Unsupported | Kind::Invalid => {
                    let bad = |cause| Error::new(Kind::Invalid, "lay out", "a buffer").because(cause);
                    let rows = layout.with_stride_align(STRIDE).map_err(bad)?;
                    self.gpu.make_bytes(&rows, room, vk::BufferUsageFlags::STORAGE_BUFFER)
                }
                _ => Err(error),
            })
        };
        (0..count).map(make).collect()
    }

    fn inspect(&mut self, frame: &Frame, place: u64) -> Result<()> {
        self.verifier.as_mut().map_or(Ok(()), |verifier| verifier.expect(frame, place))
    }

    fn present(&mut self, frame: Frame) -> Result<Option<Shown>> {
        if self.failed {
            return Err(gone(&self.gpu));
        }
        frame.check()?;
        // By the CPU: the checksum is waited for here in any case, and a fence that never signals is not to take the GPU with it.
        frame.wait_acquired(self.fence_timeout())?;
        let sampled = self.cache.get(&mut self.sampler, frame.buffer()).map_err(|refusal| {
            Error::new(Kind::Unsupported, "import", frame.buffer().layout().to_string())
                .said_by(refusal.step)
                .because(refusal)
        })?;
        let checksum = match sampled.checksum() {
            Ok(checksum) => checksum,
            Err(error) => {
                self.failed = true;
                return Err(error);
            }
        };
        // What was read of it may be of two pictures, if it was taken back meanwhile.
        frame.check()?;
        let at_us = now_us();
        if self.newest.len() == KEPT {
            self.newest.pop_front();
        }
        self.newest.push_back(Checksum { meta: *frame.meta(), checksum });
        if let Some(verifier) = &mut self.verifier {
            verifier.predicted.compare(&frame, checksum)?;
        }
        self.check_messages()?;
        Ok(Some(Shown { meta: *frame.meta(), at_us }))
    }

    fn imports(&self) -> u64 {
        self.cache.imports() - self.imports_before
    }

    fn verdict(&self) -> Option<Verdict> {
        self.verifier.as_ref().map(|verifier| verifier.predicted.verdict())
    }
}

fn gone(gpu: &Gpu) -> Error {
    let error = Error::new(Kind::Disconnected, "use", &gpu.info().name).because("an earlier frame was never finished");
    error.repair("open the GPU again")
}

impl Verifier {
    fn expect(&mut self, frame: &Frame, place: u64) -> Result<()> {
        let layout = frame.buffer().layout();
        let no =
            |why: String| Error::new(Kind::Invalid, "verify", format!("frame {}", frame.meta().sequence)).because(why);
        let format = GpuFormat::of(layout.format()).ok_or_else(|| no(format!("Vulkan has no {}", layout.format())))?;
        let reader = frame.read()?;
        let sum = predict(&format, layout, &mut self.scratch, &mut |plane, row, out| reader.row(plane, row, out));
        self.predicted.expect(frame, place, sum)
    }
}

// Whatever thread has them: Vulkan's handles are used by whoever holds the value, and the queue is behind a lock.
const _: () = {
    const fn is_send<T: Send>() {}
    is_send::<Vulkan>();
    is_send::<Arc<Pass>>();
};
