//! From names on the command line to sources and sinks.

use std::os::fd::{AsFd, BorrowedFd};

use anyhow::{Context, bail};
use dmaflow::endpoint::{Sink, Source};
use dmaflow::format::{Format, Fourcc};
#[cfg(feature = "gbm")]
use dmaflow::gbm;
use dmaflow::kms::{Card, Display, DisplayRequest, Present};
use dmaflow::ladder::Watch;
use dmaflow::pattern::{Pattern, PatternRequest};
use dmaflow::share::{Receiver, Server, ServerRequest};
use dmaflow::sink::{Null, Png, Raw, Y4m};
use dmaflow::v4l2::{Camera, CameraRequest, Control, ControlKind, Device, RateRequest};
#[cfg(feature = "vulkan")]
use dmaflow::vulkan::{Gpu, GpuRequest, Vulkan};

use crate::args::{NO_STDOUT, PathChoice, PipeArgs, PresentChoice, Shape};
use crate::failure::Usage;
use crate::output::note;
use crate::share;

/// The rate above which nobody asks without saying so: most displays show no more.
const USUAL_RATE: f64 = 60.0;

/// A sink of any sort. Displays are kept apart: what they show can be looked at.
pub enum AnySink {
    Display(Box<Display>),
    #[cfg(feature = "gbm")]
    Gbm(gbm::Gbm),
    Png(Png),
    Y4m(Y4m),
    Raw(Raw),
    Share(Box<Server>),
    Null(Null),
    #[cfg(feature = "vulkan")]
    Vulkan(Box<Vulkan>),
}

pub const NO_GPU_NAMED: &str = "vulkan: needs a GPU's node or a part of its name, as in vulkan:llvmpipe";

/// The validation layer is to watch every call of Vulkan's; what it says is an error.
#[cfg(feature = "vulkan")]
const VALIDATION: &str = "DMAFLOW_VULKAN_VALIDATION";

impl AnySink {
    pub fn as_dyn(&mut self) -> &mut dyn Sink {
        match self {
            AnySink::Display(display) => display.as_mut(),
            #[cfg(feature = "gbm")]
            AnySink::Gbm(gbm) => gbm,
            AnySink::Png(png) => png,
            AnySink::Y4m(y4m) => y4m,
            AnySink::Raw(raw) => raw,
            AnySink::Share(server) => server.as_mut(),
            AnySink::Null(null) => null,
            #[cfg(feature = "vulkan")]
            AnySink::Vulkan(vulkan) => vulkan.as_mut(),
        }
    }

    /// Whether a device imports what it gets, or may be fed by one that does: some drivers map that for writing.
    pub fn imports(&self) -> bool {
        match self {
            AnySink::Display(_) => true,
            #[cfg(feature = "gbm")]
            AnySink::Gbm(_) => true,
            #[cfg(feature = "vulkan")]
            AnySink::Vulkan(_) => true,
            AnySink::Png(_) | AnySink::Y4m(_) | AnySink::Raw(_) | AnySink::Share(_) | AnySink::Null(_) => false,
        }
    }

    /// What Vulkan's validation layer says, where it watches.
    #[cfg(feature = "vulkan")]
    pub fn messages(&self) -> Option<dmaflow::vulkan::Messages> {
        match self {
            AnySink::Vulkan(vulkan) => vulkan.gpu().messages(),
            _ => None,
        }
    }

    /// Whether it can tell that it got a frame as it was captured.
    fn verifies(&self) -> bool {
        match self {
            AnySink::Display(_) => true,
            #[cfg(feature = "vulkan")]
            AnySink::Vulkan(_) => true,
            _ => false,
        }
    }

    /// Puts back what a display showed before.
    pub fn restore(&mut self) -> dmaflow::error::Result<()> {
        match self {
            AnySink::Display(display) => display.restore(),
            _ => Ok(()),
        }
    }
}

/// Whether a sink of this name writes frames to stdout, so that nothing else may go there.
pub fn takes_stdout(name: Option<&str>) -> bool {
    matches!(name, Some("y4m:-" | "raw:-"))
}

/// Opens the sink that the arguments name, else the first display. When `stop` becomes readable, a sink that waits for its reader gives
/// up.
pub fn open_sink(args: &PipeArgs, stop: BorrowedFd<'_>) -> anyhow::Result<AnySink> {
    let (name, verify) = (args.to.as_deref(), args.verify);
    let present = match args.present {
        PresentChoice::Fifo => Present::Fifo,
        PresentChoice::Mailbox => Present::Mailbox,
    };
    let display = |card: Card| -> anyhow::Result<AnySink> {
        let display = Display::open(
            card,
            DisplayRequest { present, verify, stride_align: args.stride_align, ..DisplayRequest::default() },
        )?;
        Ok(AnySink::Display(Box::new(display)))
    };
    let Some(name) = name else {
        let card = Card::first()?;
        note(&format!("to {} ({})", card.info().path.display(), card.info().driver));
        return display(card);
    };
    let stop = || stop.as_fd().try_clone_to_owned().context("cannot pass the order to stop on");
    let copy = args.path == PathChoice::Copy;
    let sink = match name.split_once(':') {
        Some(("png", "")) => bail!(Usage("png: needs a file, as in png:picture.png".into())),
        Some(("png", "-")) => bail!(Usage(format!("png:-: {NO_STDOUT}"))),
        Some(("png", file)) => AnySink::Png(Png::new(file)),
        Some((kind @ ("y4m" | "raw"), "")) => bail!(Usage(format!("{kind}: needs a file, or - for stdout"))),
        Some(("y4m", place)) => {
            let y4m = Y4m::new(place).stop_at(stop()?);
            AnySink::Y4m(if copy { y4m.by_copy() } else { y4m })
        }
        Some(("raw", place)) => {
            let raw = Raw::new(place).stop_at(stop()?);
            AnySink::Raw(if copy { raw.by_copy() } else { raw })
        }
        Some(("gbm", "")) => bail!(Usage("gbm: needs a device, as in gbm:/dev/dri/renderD128".into())),
        Some(("gbm", device)) => open_gbm(Some(device))?,
        Some(("unix", place)) => AnySink::Share(Box::new(share::open(place, ServerRequest::default())?)),
        Some(("vulkan", "")) => bail!(Usage(NO_GPU_NAMED.into())),
        Some(("vulkan", gpu)) => open_gpu(Some(gpu), verify)?,
        Some(_) => bail!(Usage(format!("there is no sink called \"{name}\""))),
        None if name == "null" => AnySink::Null(Null::new()),
        None if name == "gbm" => open_gbm(None)?,
        None if name == "vulkan" => open_gpu(None, verify)?,
        None => display(Card::find(name)?)?,
    };
    if verify && !sink.verifies() {
        bail!(Usage(format!("--verify compares what a display shows or a GPU reads; {name} is neither")));
    }
    Ok(sink)
}

/// The GBM of a device as a sink, else of the first that has it.
#[cfg(feature = "gbm")]
pub fn open_gbm(device: Option<&str>) -> anyhow::Result<AnySink> {
    let device = match device {
        Some(name) => gbm::Device::find(name)?,
        None => {
            let device = gbm::Device::first()?;
            note(&format!("to gbm:{} ({})", device.name(), device.info().driver));
            device
        }
    };
    Ok(AnySink::Gbm(gbm::Gbm::new(device)))
}

#[cfg(not(feature = "gbm"))]
pub fn open_gbm(_: Option<&str>) -> anyhow::Result<AnySink> {
    bail!(Usage(NO_GBM.into()))
}

#[cfg(not(feature = "gbm"))]
pub const NO_GBM: &str = "this dmaflow was built without GBM (cargo feature gbm)";

/// A GPU by its node or a part of its name, else the best.
///
/// # Errors
/// As [`Gpu::open`].
#[cfg(feature = "vulkan")]
pub fn find_gpu(name: Option<&str>) -> dmaflow::Result<Gpu> {
    Gpu::open(&GpuRequest { name: name.map(str::to_owned), validation: validates(), ..GpuRequest::default() })
}

#[cfg(feature = "vulkan")]
fn validates() -> bool {
    std::env::var_os(VALIDATION).is_some_and(|value| value != "0")
}

/// What watches the GPUs that the ladder opens, if the validation layer is to.
pub fn watch() -> Option<Watch> {
    #[cfg(feature = "vulkan")]
    return validates().then(Watch::default);
    #[cfg(not(feature = "vulkan"))]
    None
}

#[cfg(feature = "vulkan")]
fn open_gpu(name: Option<&str>, verify: bool) -> anyhow::Result<AnySink> {
    let gpu = find_gpu(name)?;
    if name.is_none() {
        note(&format!("to {} ({})", gpu.info().name, gpu.info().driver));
    }
    Ok(AnySink::Vulkan(Box::new(Vulkan::new(gpu, verify)?)))
}

#[cfg(not(feature = "vulkan"))]
fn open_gpu(_: Option<&str>, _: bool) -> anyhow::Result<AnySink> {
    bail!(Usage(NO_VULKAN.into()))
}

#[cfg(not(feature = "vulkan"))]
pub const NO_VULKAN: &str = "this dmaflow was built without Vulkan (cargo feature vulkan)";

/// Opens the source called `name`, else the first camera. `formats` are those that the sink takes.
pub fn open_source(
    name: Option<&str>,
    shape: &Shape,
    buffers: Option<u32>,
    formats: Option<&[Format]>,
) -> anyhow::Result<Box<dyn Source>> {
    if shape.fps.is_some_and(|fps| !(fps.is_finite() && fps > 0.0)) {
        bail!(Usage("--fps takes a number greater than 0".into()));
    }
    if shape.reconnect && !name.is_some_and(|name| name.starts_with("unix:")) {
        bail!(Usage("--reconnect is for what is shared (--from unix:SOCKET)".into()));
    }
    let wanted = shape.format.as_deref().map(parse_format).transpose()?;
    match name {
        Some(name) if name.starts_with("unix:") => Ok(Box::new(open_share(name, shape, wanted, buffers)?)),
        Some("pattern") => Ok(Box::new(open_pattern(shape, wanted.map(|(format, _)| format), buffers, formats)?)),
        Some(name) => open_camera(Device::find(name)?, shape, wanted, buffers, formats),
        None => {
            let device = Device::first()?;
            note(&format!("from {} ({})", device.info().path.display(), device.info().card));
            open_camera(device, shape, wanted, buffers, formats)
        }
    }
}

/// What another process shares, which has one format for all.
fn open_share(
    name: &str,
    shape: &Shape,
    wanted: Option<(Format, Option<Fourcc>)>,
    buffers: Option<u32>,
) -> anyhow::Result<Receiver> {
    let place = name.strip_prefix("unix:").unwrap_or(name);
    if place.is_empty() || place == "@" {
        bail!(Usage("unix: needs the path of a socket, or @NAME".into()));
    }
    for (given, option) in [
        (shape.fps.is_some(), "--fps"),
        (shape.stride.is_some(), "--stride"),
        (shape.input.is_some(), "--input"),
        (!shape.controls.is_empty(), "--control"),
        (buffers.is_some(), "--buffers"),
    ] {
        if given {
            bail!(Usage(format!("{option} is for who shares the source; {name} is as it is shared")));
        }
    }
    let mut receiver = match shape.writable {
        true => Receiver::connect_writable_if_allowed(place, "dmaflow")?,
        false => Receiver::connect(place, "dmaflow")?,
    };
    if shape.reconnect {
        receiver.come_back_to_it()?;
    }
    let layout = *receiver.layout();
    let other = wanted.is_some_and(|(format, _)| format != layout.format());
    if other || shape.size.is_some_and(|size| size != layout.size()) {
        bail!(
            "cannot get another format or size from {name}: it is shared as {layout}, one for all; choose it where it is shared"
        );
    }
    Ok(receiver)
}

fn parse_format(text: &str) -> anyhow::Result<(Format, Option<Fourcc>)> {
    Format::parse(text).with_context(|| {
        let names: Vec<_> = Format::all().map(|format| format.to_string()).collect();
        Usage(format!("there is no format called \"{text}\"; known are {}", names.join(" ")))
    })
}

fn open_pattern(
    shape: &Shape,
    format: Option<Format>,
    buffers: Option<u32>,
    formats: Option<&[Format]>,
) -> anyhow::Result<Pattern> {
    for (given, option) in [
        (shape.input.is_some(), "--input"),
        (shape.stride.is_some(), "--stride"),
        (!shape.controls.is_empty(), "--control"),
    ] {
        if given {
            bail!(Usage(format!("{option} is for cameras; pattern is none")));
        }
    }
    let default = PatternRequest::default();
    let first = formats.and_then(|formats| formats.first().copied());
    Ok(Pattern::new(&PatternRequest {
        format: format.or(first).or(default.format),
        size: shape.size.unwrap_or(default.size),
        rate: shape.fps.unwrap_or(default.rate),
        buffers: buffers.unwrap_or(default.buffers),
        ..default
    })?)
}

fn open_camera(
    device: Device,
    shape: &Shape,
    wanted: Option<(Format, Option<Fourcc>)>,
    buffers: Option<u32>,
    formats: Option<&[Format]>,
) -> anyhow::Result<Box<dyn Source>> {
    let (path, before) = (device.info().path.clone(), device.save_settings()?);
    let mut controls = Vec::new();
    let opened = set_camera(device, shape, wanted, buffers, formats, &mut controls);
    opened.inspect_err(|_| {
        // The camera took the device with it. If this fails too, the first failure is the one to report.
        let Ok(device) = Device::open(&path) else { return };
        // Controls may belong to an input, so they go first.
        for (control, value) in controls.iter().rev() {
            let _ = device.set_control(control, *value);
        }
        let _ = device.restore_settings(&before);
    })
}

/// `before` takes the values that controls had.
fn set_camera(
    device: Device,
    shape: &Shape,
    wanted: Option<(Format, Option<Fourcc>)>,
    buffers: Option<u32>,
    formats: Option<&[Format]>,
    before: &mut Vec<(Control, i64)>,
) -> anyhow::Result<Box<dyn Source>> {
    if let Some(input) = shape.input {
        device.set_input(input)?;
    }
    for (name, value) in &shape.controls {
        let control = device.control(name)?;
        // A button, or one that can only be written, has no value to put back.
        let had = device
            .get_control(&control)
            .ok()
            .filter(|_| control.kind != ControlKind::Button);
        device.set_control(&control, *value)?;
        before.extend(had.map(|had| (control, had)));
    }
    let (format, code) = match wanted {
        Some((format, code)) => (Some(format), code),
        None => (agree(&device, formats)?, None),
    };
    let rate = shape.fps.map_or(RateRequest::FastestUpTo(USUAL_RATE), RateRequest::Exactly);
    let request = CameraRequest { format, code, size: shape.size, stride: shape.stride, rate, input: None, buffers };
    Ok(Box::new(Camera::open(device, &request)?))
}

/// The format to use when none was asked for: what the camera has now if the sink takes it, else the first that both have, else
/// the camera's, which the sink will refuse with its reason.
fn agree(device: &Device, formats: Option<&[Format]>) -> anyhow::Result<Option<Format>> {
    let offered: Vec<_> = device.formats()?.into_iter().filter_map(|offer| Some(offer.known?.0)).collect();
    let current = device.current_layout().ok().map(|layout| layout.format());
    let takes = |format: &Format| formats.is_none_or(|formats| formats.contains(format));
    let shared = || Format::all().find(|format| offered.contains(format) && takes(format));
    Ok(current.filter(takes).or_else(shared).or(current))
}
