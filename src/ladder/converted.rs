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

/// A GPU as what joins source and sink, if it makes of the source's frames what the sink takes. `Ok(Err(…))` has the reason why not.
/// One made of software only with `software`: the CPU converts for less by itself.
///
/// Cost: where there is hardware, or `software`, Vulkan is loaded and a device opened, tens of milliseconds and more; else a look into
/// sysfs.
///
/// # Errors
/// A failure of the sink.
pub fn converted(source: &dyn Source, sink: &mut dyn Sink, software: bool) -> Result<Result<Copier, Refusal>> {
    #[cfg(feature = "vulkan")]
    return by_vulkan::converted(source, sink, software);
    #[cfg(not(feature = "vulkan"))]
    {
        let _ = (source, sink, software);
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
    use super::{ByGpu, refuse};
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
    ) -> Result<Result<Copier, Refusal>> {
        let layout = source.buffers().first().map_or(*source.layout(), |buffer| *buffer.layout());
        let taken = sink.formats();
        let takes = |format: &Format| taken.as_ref().is_none_or(|taken| taken.contains(format));
        let targets: Vec<_> = GpuConverter::targets(layout.format()).filter(takes).collect();
        if targets.is_empty() {
            let why = format!("the GPU conversion makes nothing that {} takes of {}", sink.name(), layout.format());
            return Ok(Err(refuse("conversion", why, "choose YUV, grey or Bayer, and a sink that takes XRGB or ARGB")));
        }
        let gpu = match open(software) {
            Ok(gpu) => gpu,
            Err(refusal) => return Ok(Err(refusal)),
        };
        let mut refused = None;
        for target in targets {
            for maker in Maker::of_dma_bufs(sink) {
                match try_converted(&gpu, &layout, source, sink, maker, target) {
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

    const COPY: &str = "a copy by the CPU costs less; --path convert asks for this all the same";

    fn open(software: bool) -> Result<Gpu, Refusal> {
        if !software && !has_hardware() {
            return Err(refuse("GPU", "there is no GPU but, at most, one made of software", COPY));
        }
        let gpu = Gpu::open(&GpuRequest::default()).map_err(|error| Refusal::from_error(Rung::Converted, &error))?;
        match gpu.info().is_software() && !software {
            true => Err(refuse("GPU", format!("{} is made of software", gpu.info().name), COPY)),
            false => Ok(gpu),
        }
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
}
