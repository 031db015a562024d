//! `dmaflow probe`: every rung in every format of every source, for real.

use std::io::IsTerminal;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::bail;
use dmaflow::error::Result;
#[cfg(feature = "gbm")]
use dmaflow::gbm;
use dmaflow::kms::{Card, Display, DisplayRequest};
use dmaflow::probe::{CameraFormats, Candidate, End, PatternFormats, Probe, probe};
use dmaflow::sink::Null;
use dmaflow::v4l2::Device;
#[cfg(feature = "vulkan")]
use dmaflow::vulkan::{self, Gpu, Vulkan};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use nix::sys::signalfd::SignalFd;

use crate::args::ProbeArgs;
#[cfg(feature = "vulkan")]
use crate::ends::find_gpu;
use crate::ends::{AnySink, NO_GPU_NAMED};
use crate::failure::{FAILED, Usage};
use crate::output;
use crate::probe_report::{PairReport, Report};
use crate::stop::catch_signals;

/// A source, and what a person should read of it.
enum Source {
    Camera(PathBuf, String),
    Pattern,
}

enum Target {
    Display(PathBuf, String),
    #[cfg(feature = "gbm")]
    Gbm(gbm::Device),
    #[cfg(feature = "vulkan")]
    Gpu(Gpu),
    Null,
}

/// Two ends while they are probed; both are as they were when it is gone.
struct Pair {
    candidate: AnyCandidate,
    sink: AnySink,
}

enum AnyCandidate {
    Camera(Box<CameraFormats>),
    Pattern(PatternFormats),
}

pub fn run(args: &ProbeArgs) -> anyhow::Result<ExitCode> {
    output::check()?;
    // Before any device is opened: from here on an order to stop waits until it can be followed in order.
    let stop = catch_signals()?;
    let mut report = Report::default();
    let sources = sources(args.from.as_deref(), &mut report.failed)?;
    let targets = targets(args.to.as_deref(), &mut report.failed)?;
    #[cfg(feature = "vulkan")]
    let messages: Vec<_> = targets.iter().filter_map(Target::messages).collect();
    let live = Live::new();
    'all: for source in &sources {
        for target in &targets {
            let mut pair = PairReport::new(source.names(), target.names());
            report.stopped = try_pair(args, source, target, &stop, &live, &mut pair);
            report.probes.push(pair);
            if report.stopped {
                break 'all;
            }
        }
    }
    live.end();
    // What the validation layer says at the GPU's end counts too.
    drop(targets);
    #[cfg(feature = "vulkan")]
    for messages in messages {
        let said = messages.all().into_iter().take(1);
        report
            .failed
            .extend(said.map(|text| format!("the Vulkan validation layer said: {text}")));
    }
    output::print(&if args.json { report.json()? } else { report.table() })?;
    if report.stopped {
        output::note("stopped before everything was tried");
    }
    let failures = report.failures();
    failures.iter().for_each(|line| output::complain(&format!("error: {line}")));
    Ok(if failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(FAILED) })
}

/// Probes a source and a sink, and puts both back. Whether it was told to stop.
fn try_pair(
    args: &ProbeArgs,
    source: &Source,
    target: &Target,
    stop: &SignalFd,
    live: &Live,
    report: &mut PairReport,
) -> bool {
    let mut pair = match Pair::open(args, source, target) {
        Ok(pair) => pair,
        Err(error) => {
            report.fail(error.line());
            return false;
        }
    };
    let (names, sink) = (report.names(), pair.sink.as_dyn());
    let found: Probe = probe(pair.candidate.as_dyn(), sink, Some(stop.as_fd()), &mut |offer, rung| {
        live.say(&format!("{names}: {} {rung}", offer.name()));
    });
    // The screen first.
    let restored = [pair.sink.restore(), pair.candidate.restore()];
    found.formats.iter().for_each(|tried| report.tried(tried));
    if !found.formats.is_empty() && found.formats.iter().all(|tried| tried.source.is_err()) {
        report.fail("none of its formats can be had; the reasons are in the result".to_owned());
    }
    let stopped = match found.end {
        End::Complete => false,
        End::Stopped => true,
        End::Failed(error) => {
            report.fail(error.line());
            false
        }
    };
    restored
        .into_iter()
        .filter_map(Result::err)
        .for_each(|error| report.fail(error.line()));
    stopped
}

/// The cameras that were asked for. Those that cannot be opened go to `failed`.
fn sources(name: Option<&str>, failed: &mut Vec<String>) -> anyhow::Result<Vec<Source>> {
    let camera = |device: &Device| Source::Camera(device.info().path.clone(), device.info().driver.clone());
    Ok(match name {
        Some("pattern") => vec![Source::Pattern],
        Some(name) if name.starts_with("unix:") => {
            bail!(Usage("what is shared has one format and one owner: probe its source where it is shared".into()))
        }
        Some(name) => vec![camera(&Device::find(name)?)],
        None => {
            let first = Device::first()?;
            let mut sources = Vec::new();
            for info in Device::list() {
                match info {
                    Ok(info) => sources.push(Source::Camera(info.path, info.driver)),
                    Err(error) => failed.push(error.line()),
                }
            }
            if sources.is_empty() { vec![camera(&first)] } else { sources }
        }
    })
}

/// The sinks that were asked for, else the displays, GBM, and the best GPU of hardware: one of software takes so long for its frames that
/// it is for who asks for it. Displays that cannot be opened go to `failed`.
fn targets(name: Option<&str>, failed: &mut Vec<String>) -> anyhow::Result<Vec<Target>> {
    let display = |card: &Card| Target::Display(card.info().path.clone(), card.info().driver.clone());
    Ok(match name {
        Some("null") => vec![Target::Null],
        Some("vulkan:") => bail!(Usage(NO_GPU_NAMED.into())),
        Some(name) if name == "vulkan" || name.starts_with("vulkan:") => {
            vec![gpu_target(name.strip_prefix("vulkan:"))?]
        }
        Some("gbm:") => bail!(Usage("gbm: needs a device, as in gbm:/dev/dri/renderD128".into())),
        Some(name) if name == "gbm" || name.starts_with("gbm:") => vec![gbm_target(name.strip_prefix("gbm:"))?],
        Some(name) if name.contains(':') => {
            bail!(Usage(format!("probe tries displays, gbm, vulkan and null; {name} takes every frame by the CPU")))
        }
        Some(name) => vec![display(&Card::find(name)?)],
        None => {
            let first = Card::first()?;
            let mut targets = Vec::new();
            for info in Card::list() {
                match info {
                    Ok(info) => targets.push(Target::Display(info.path, info.driver)),
                    Err(error) => failed.push(error.line()),
                }
            }
            if targets.is_empty() {
                targets.push(display(&first));
            }
            // A machine without GBM is nothing that failed.
            #[cfg(feature = "gbm")]
            targets.extend(gbm::Device::first().ok().map(Target::Gbm));
            // Nor is one without Vulkan.
            #[cfg(feature = "vulkan")]
            if vulkan::has_hardware()
                && let Ok(gpu) = find_gpu(None)
                && !gpu.info().is_software()
            {
                targets.push(Target::Gpu(gpu));
            }
            targets
        }
    })
}

#[cfg(feature = "gbm")]
fn gbm_target(device: Option<&str>) -> anyhow::Result<Target> {
    let device = match device {
        Some(name) => gbm::Device::find(name)?,
        None => gbm::Device::first()?,
    };
    Ok(Target::Gbm(device))
}

#[cfg(not(feature = "gbm"))]
fn gbm_target(_: Option<&str>) -> anyhow::Result<Target> {
    bail!(Usage(crate::ends::NO_GBM.into()))
}

#[cfg(feature = "vulkan")]
fn gpu_target(name: Option<&str>) -> anyhow::Result<Target> {
    Ok(Target::Gpu(find_gpu(name)?))
}

#[cfg(not(feature = "vulkan"))]
fn gpu_target(_: Option<&str>) -> anyhow::Result<Target> {
    bail!(Usage(crate::ends::NO_VULKAN.into()))
}

impl Source {
    /// The node, and the driver.
    fn names(&self) -> (String, Option<String>) {
        match self {
            Source::Camera(path, driver) => (path.display().to_string(), Some(driver.clone())),
            Source::Pattern => ("pattern".to_owned(), None),
        }
    }
}

impl Target {
    /// The node, and the driver.
    fn names(&self) -> (String, Option<String>) {
        match self {
            Target::Display(path, driver) => (path.display().to_string(), Some(driver.clone())),
            #[cfg(feature = "gbm")]
            Target::Gbm(device) => (format!("gbm:{}", device.name()), Some(device.info().driver.clone())),
            #[cfg(feature = "vulkan")]
            Target::Gpu(gpu) => (format!("vulkan:{}", gpu.info().name), Some(gpu.info().driver.clone())),
            Target::Null => ("null".to_owned(), None),
        }
    }
}

#[cfg(feature = "vulkan")]
impl Target {
    /// What Vulkan's validation layer says, where it watches.
    fn messages(&self) -> Option<vulkan::Messages> {
        match self {
            Target::Gpu(gpu) => gpu.messages(),
            _ => None,
        }
    }
}

impl Pair {
    fn open(args: &ProbeArgs, source: &Source, target: &Target) -> Result<Pair> {
        let sink = match target {
            Target::Display(path, _) => {
                AnySink::Display(Box::new(Display::open(Card::open(path)?, DisplayRequest::default())?))
            }
            #[cfg(feature = "gbm")]
            Target::Gbm(device) => AnySink::Gbm(gbm::Gbm::new(device.clone())),
            #[cfg(feature = "vulkan")]
            Target::Gpu(gpu) => AnySink::Vulkan(Box::new(Vulkan::new(gpu.clone(), false)?)),
            Target::Null => AnySink::Null(Null::new()),
        };
        let candidate = match source {
            Source::Camera(path, _) => {
                AnyCandidate::Camera(Box::new(CameraFormats::new(Device::open(path)?, args.size)?))
            }
            Source::Pattern => AnyCandidate::Pattern(PatternFormats { size: args.size }),
        };
        Ok(Pair { candidate, sink })
    }
}

impl AnyCandidate {
    fn as_dyn(&mut self) -> &mut dyn Candidate {
        match self {
            AnyCandidate::Camera(camera) => camera.as_mut(),
            AnyCandidate::Pattern(pattern) => pattern,
        }
    }

    fn restore(&mut self) -> Result<()> {
        match self {
            AnyCandidate::Camera(camera) => camera.restore(),
            AnyCandidate::Pattern(_) => Ok(()),
        }
    }
}

/// What is being tried, on a terminal.
struct Live(Option<ProgressBar>);

impl Live {
    fn new() -> Live {
        Live(std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
            bar.set_style(ProgressStyle::with_template("{msg}").unwrap_or_else(|_| ProgressStyle::default_spinner()));
            bar
        }))
    }

    fn say(&self, line: &str) {
        if let Some(bar) = &self.0 {
            bar.set_message(line.to_owned());
            bar.tick();
        }
    }

    fn end(self) {
        if let Some(bar) = self.0 {
            bar.finish_and_clear();
        }
    }
}
