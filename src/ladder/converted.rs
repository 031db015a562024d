//! The rung `converted`: a GPU makes of each frame one that the sink takes.

use super::Copier;
use crate::endpoint::{Refusal, Rung, Sink, Source};
use crate::error::Result;

/// The GPU that converts.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ByGpu {
    /// What its driver calls it.
    pub name: String,
    /// Whether it is made of software, so that the CPU does its work.
    pub software: bool,
}

/// Has Vulkan's validation layer watch the GPUs that the ladder opens, and keeps what it says. Slow, for tests.
#[derive(Clone, Debug, Default)]
pub struct Watch {
    #[cfg(feature = "vulkan")]
    messages: Vec<crate::vulkan::Messages>,
}

impl Watch {
    /// What it has said so far, oldest GPU first; what it says at a GPU's end too, once that is there no more.
    pub fn said(&self) -> Vec<String> {
        #[cfg(feature = "vulkan")]
        return self.messages.iter().flat_map(crate::vulkan::Messages::all).collect();
        #[cfg(not(feature = "vulkan"))]
        Vec::new()
    }
}

/// A GPU as what joins source and sink, if it makes of the source's frames what the sink takes. `Ok(Err(…))` has the reason why not.
/// One made of software only with `software`: the CPU converts for less by itself.
///
/// A sink that is read by a GPU ([`Sink::gpu_name`]) has that one convert. Otherwise all are tried until one holds: first the one whose
/// display this is ([`Sink::card_node`]), then those with memory of their own, at last software. The refusal is that of the first.
///
/// Cost: where there is hardware, or `software`, Vulkan is loaded and a device opened, tens of milliseconds and more for each GPU that is
/// tried; else a look into sysfs.
///
/// # Errors
/// A failure of the sink.
pub fn converted(
    source: &dyn Source,
    sink: &mut dyn Sink,
    software: bool,
    watch: Option<&mut Watch>,
) -> Result<Result<Copier, Refusal>> {
    #[cfg(feature = "vulkan")]
    return by_vulkan::converted(source, sink, software, watch);
    #[cfg(not(feature = "vulkan"))]
    {
        let _ = (source, sink, software, watch);
        let why = "no GPU conversion is built into this dmaflow (feature \"vulkan\")";
        Ok(Err(refuse("GPU", why, "none is needed for a copy by the CPU; for none at all, a format that both have")))
    }
}

fn refuse(step: &'static str, why: impl Into<String>, repair: &str) -> Refusal {
    Refusal { rung: Rung::Converted, step, errno: None, why: why.into(), repair: repair.to_owned() }
}

#[cfg(feature = "vulkan")]
mod by_vulkan {
    use super::super::{Maker, copier};
    use super::{ByGpu, Watch, refuse};
    use crate::endpoint::{JoinError, Refusal, Rung, Sink, Source};
    use crate::error::{Error, Kind, Result};
    use crate::format::{Format, Layout, Modifier};
    use crate::frame::Room;
    use crate::ladder::Copier;
    use crate::vulkan::{Crop, Gpu, GpuConverter, GpuInfo, GpuRequest, has_hardware};

    impl ByGpu {
        pub(in crate::ladder) fn of(info: &GpuInfo) -> ByGpu {
            ByGpu { name: info.name.clone(), software: info.is_software() }
        }
    }

    pub(super) fn converted(
        source: &dyn Source,
        sink: &mut dyn Sink,
        software: bool,
        mut watch: Option<&mut Watch>,
    ) -> Result<Result<Copier, Refusal>> {
        let layout = source.buffers().first().map_or(*source.layout(), |buffer| *buffer.layout());
        let taken = sink.formats();
        let takes = |format: &Format| taken.as_ref().is_none_or(|taken| taken.contains(format));
        let targets: Vec<_> = GpuConverter::targets(layout.format()).filter(takes).collect();
        if targets.is_empty() {
            let why = format!("the GPU conversion makes of {1} nothing that {0} takes", sink.name(), layout.format());
            return Ok(Err(refuse("conversion", why, "choose YUV, grey or Bayer, and a sink that takes XRGB or ARGB")));
        }
        if !software && !has_hardware() {
            return Ok(Err(refuse("GPU", "there is no GPU but, at most, one made of software", COPY)));
        }
        let request = GpuRequest {
            name: sink.gpu_name().map(str::to_owned),
            near: sink.card_node().map(Into::into),
            validation: watch.is_some(),
        };
        first_that_holds(Gpu::open_each(&request), &mut |gpu| {
            if let (Some(watch), Some(messages)) = (&mut watch, gpu.messages()) {
                watch.messages.push(messages);
            }
            if gpu.info().is_software() && !software {
                return Ok(Err(refuse("GPU", format!("{} is made of software", gpu.info().name), COPY)));
            }
            by_gpu(gpu, (&layout, targets.as_slice()), source, sink)
        })
    }

    const COPY: &str = "a copy by the CPU costs less; --path convert asks for this all the same";

    /// The first of the candidates that holds; else the reason of the first that does not, which is the best of them. One that cannot be
    /// opened is like one that does not hold.
    ///
    /// # Errors
    /// That of an attempt: no other would do better.
    fn first_that_holds<G, T>(
        candidates: impl Iterator<Item = Result<G>>,
        attempt: &mut dyn FnMut(&G) -> Result<Result<T, Refusal>>,
    ) -> Result<Result<T, Refusal>> {
        let mut refused = None;
        for candidate in candidates {
            let tried = match candidate {
                Ok(candidate) => attempt(&candidate)?,
                Err(error) => Err(Refusal::from_error(Rung::Converted, &error)),
            };
            match tried {
                Ok(holds) => return Ok(Ok(holds)),
                Err(refusal) => {
                    refused.get_or_insert(refusal);
                }
            }
        }
        Ok(Err(refused.unwrap_or_else(|| refuse("GPU", "there is none", COPY))))
    }

    /// The first of the formats and the makers of buffers with which this GPU does; else the first reason.
    fn by_gpu(
        gpu: &Gpu,
        (from, targets): (&Layout, &[Format]),
        source: &dyn Source,
        sink: &mut dyn Sink,
    ) -> Result<Result<Copier, Refusal>> {
        let mut refused = None;
        for &target in targets {
            for maker in Maker::of_dma_bufs(sink) {
                match try_converted(gpu, from, source, sink, maker, target) {
                    Ok(copier) => return Ok(Ok(copier)),
                    Err(JoinError::Refused(refusal)) => {
                        refused.get_or_insert(Refusal { rung: Rung::Converted, ..refusal });
                    }
                    Err(JoinError::Failed(error)) if error.kind() == Kind::Disconnected => return Err(error),
                    Err(JoinError::Failed(error)) => {
                        refused.get_or_insert(Refusal::from_error(Rung::Converted, &error));
                    }
                }
            }
        }
        let none =
            || refuse("allocate", "there is nothing to convert into", "make a dma-heap or /dev/udmabuf available");
        Ok(Err(refused.unwrap_or_else(none)))
    }

    fn try_converted(
        gpu: &Gpu,
        from: &Layout,
        source: &dyn Source,
        sink: &mut dyn Sink,
        maker: Maker,
        target: Format,
    ) -> Result<Copier, JoinError> {
        let bad = |cause| Error::new(Kind::Invalid, "lay out", "a buffer").because(cause);
        let to = Layout::packed(target, from.size(), 4).map_err(bad)?.with_colour(from.colour());
        let buffers = maker.make(sink, &to, &Room::default(), copier::BUFFERS)?;
        let to = buffers.first().map_or(to, |buffer| *buffer.layout());
        // Whoever made them made rows: the CPU writes such in the rung `copied`.
        let to = to.with_modifier(to.modifier().or(Some(Modifier::LINEAR)));
        let mut converter = GpuConverter::new(gpu, from, &to, Crop::all(from.size()))?;
        converter.prepare(source.buffers(), &buffers)?;
        let copier = Copier::by_gpu(converter, buffers);
        sink.join(copier.layout(), source.rate(), copier.buffers())?;
        Ok(copier)
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn all_gpus_are_tried_before_the_rung_is_refused() {
            let no = |gpu: u32| refuse("GPU", format!("no {gpu}"), "another");
            let gpus = |all: &[Option<u32>]| {
                let lost = || Error::new(Kind::Unsupported, "import dma-bufs into", "an old GPU");
                all.iter().map(|gpu| gpu.ok_or_else(lost)).collect::<Vec<_>>().into_iter()
            };
            let mut tried = Vec::new();
            let mut holds = |wanted: u32, all: &[Option<u32>]| {
                tried.clear();
                let held = first_that_holds(gpus(all), &mut |&gpu| {
                    tried.push(gpu);
                    Ok(if gpu == wanted { Ok(gpu) } else { Err(no(gpu)) })
                });
                (held.unwrap(), tried.clone())
            };
            assert_eq!(holds(2, &[Some(1), Some(2), Some(3)]), (Ok(2), vec![1, 2]));
            assert_eq!(holds(9, &[Some(1), Some(2)]), (Err(no(1)), vec![1, 2]));
            // One that cannot be opened is no reason to stop.
            assert_eq!(holds(2, &[None, Some(2)]), (Ok(2), vec![2]));
            let (refused, tried) = holds(9, &[None, Some(2)]);
            assert!(refused.unwrap_err().why.contains("an old GPU") && tried == [2]);
            assert_eq!(holds(9, &[]).0.unwrap_err().why, "there is none");
            // The sink's failure is.
            let gone = || Error::new(Kind::Disconnected, "join", "a sink");
            let mut asked = 0;
            let failed = first_that_holds::<_, u32>(gpus(&[Some(1), Some(2)]), &mut |_| {
                asked += 1;
                Err(gone())
            });
            assert!(failed.is_err() && asked == 1);
        }
    }
}
