//! `dmaflow pipe`: frames from a source to a sink.

use std::os::fd::AsFd;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{anyhow, bail};
use dmaflow::endpoint::{Refusal, Sink, Source};
use dmaflow::error::Kind;
use dmaflow::frame::ViewPolicy;
use dmaflow::ladder::{Maker, NoWay, Path, Watch};
use dmaflow::memory::Allocator;
use dmaflow::pipe::{Limits, Pipe};
use dmaflow::sink::write_png;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signalfd::SignalFd;

use crate::args::{MakerChoice, PathChoice, PipeArgs, PolicyChoice, Shape};
use crate::ends::{AnySink, open_sink, open_source, takes_stdout, watch};
use crate::failure::{NotPutBack, Usage, WRONG_FRAME, ZeroCopyRefused};
use crate::keep::Keeper;
use crate::live::Live;
use crate::output;
use crate::report::{self, Report, SinkSays};
use crate::stop::catch_signals;

pub fn run(args: &PipeArgs) -> anyhow::Result<ExitCode> {
    let limits = limits(args.frames, args.seconds)?;
    output::check()?;
    // Before any device is opened: from here on an order to stop waits until it can be followed in order.
    let stop = catch_signals()?;
    let mut sink = open_sink(args, stop.as_fd())?;
    if args.snap.is_some() && !matches!(sink, AnySink::Display(_)) {
        bail!(Usage("--snap needs a display to look at".into()));
    }
    let formats = sink.as_dyn().formats();
    let shape = Shape { writable: sink.imports(), ..args.shape.clone() };
    let mut source = open_source(args.from.as_deref(), &shape, args.buffers, formats.as_deref())?;
    let mut report = Report::new(source.name(), sink.as_dyn().name(), source.layout());
    report.rated(source.rate());
    #[cfg(feature = "vulkan")]
    let messages = sink.messages();
    let mut said = Vec::new();
    if let AnySink::Share(server) = &mut sink {
        source.export_read_only()?;
        server.describe(source.name(), source.watchdog());
    }
    let flowed = flow(args, limits, source.as_mut(), &mut sink, &stop, &mut report, &mut said);
    if let AnySink::Share(server) = &mut sink {
        // The source stands: what consumers have now stays what it is.
        match &flowed {
            Ok(_) => server.end(),
            Err(error) => server.fail(&format!("{error:#}")),
        }
    }
    // Also after a failure, and before anything else is said: the screen first.
    let restored = sink.restore();
    let (status, restored) = match (flowed, restored) {
        (Ok(status), restored) => (status, restored),
        (Err(error), Err(also)) => return Err(NotPutBack::after(error, also)),
        (Err(error), Ok(())) => return Err(error),
    };
    tell(args, &if args.json { report.json()? } else { report.table() })?;
    restored?;
    #[cfg(feature = "vulkan")]
    if let Some(messages) = messages {
        // What is said at the GPU's end counts too.
        drop(sink);
        said.extend(messages.all());
    }
    match said.first() {
        Some(first) => bail!("the Vulkan validation layer said: {first}"),
        None => Ok(status),
    }
}

fn flow(
    args: &PipeArgs,
    limits: Limits,
    source: &mut dyn Source,
    sink: &mut AnySink,
    stop: &SignalFd,
    report: &mut Report,
    said: &mut Vec<String>,
) -> anyhow::Result<ExitCode> {
    let path = path(args);
    source.set_view_policy(match args.view_policy {
        PolicyChoice::Detach => ViewPolicy::Detach,
        PolicyChoice::Wait => ViewPolicy::Wait,
        PolicyChoice::Error => ViewPolicy::Error,
    });
    let mut keeper = args.keep_views.map(|most| Keeper::new(sink.as_dyn(), most));
    let target: &mut dyn Sink = match &mut keeper {
        Some(keeper) => keeper,
        None => sink.as_dyn(),
    };
    let mut pipe = match Pipe::join_watched(source, target, path, limits, watch()) {
        Ok(pipe) => pipe,
        // While a sink waited for its reader.
        Err(NoWay::Failed(error)) if error.kind() == Kind::Ended && is_told(stop) => return Ok(ExitCode::SUCCESS),
        Err(NoWay::Failed(error)) => bail!(error),
        Err(NoWay::Refused(refusals)) => return refused(args, refusals, report),
    };
    if let Some(place) = args.corrupt_frame {
        pipe.corrupt_frame(place);
    }
    let mut live = Live::new(limits.frames);
    let account = pipe.run(Some(stop.as_fd()), &mut |progress| live.update(progress));
    live.end();
    let account = match account {
        Ok(account) => account,
        Err(error) => {
            return match refusal_in(&error) {
                Some(refusal) if path.is_zero_copy() => refused(args, vec![refusal], report),
                _ => Err(error.into()),
            };
        }
    };
    said.extend(account.watch.iter().flat_map(Watch::said));
    if let Some(place) = args.corrupt_frame.filter(|&place| place >= account.captured) {
        bail!("frame {place} was not changed: {} came (--corrupt-frame counts from 0)", account.captured);
    }
    if let AnySink::Display(display) = &sink {
        report.joined(display.mode());
        if let Some(file) = &args.snap {
            if account.presented == 0 {
                bail!("cannot make {}: no frame was shown", file.display());
            }
            let picture = display.snapshot()?;
            write_png(file, picture.width, picture.height, &picture.rgb)?;
        }
    }
    #[cfg(feature = "vulkan")]
    if let AnySink::Vulkan(vulkan) = &sink {
        report.read_by(vulkan);
    }
    report.shaped(source.layout());
    report.rated(source.rate());
    let sink = sink.as_dyn();
    let says = SinkSays { imports: sink.imports(), ledger: sink.ledger(), verdict: sink.verdict() };
    let verdict = report::verdict(&account, &says);
    report.flowed(&account, &says, source.buffers().len());
    match verdict {
        Some(verdict) if verdict.wrong > 0 => {
            let (place, sequence) = verdict.first_wrong.unwrap_or_default();
            output::complain(&format!(
                "error: {} of {} frames were shown wrong, the first is frame {place} (sequence {sequence})",
                verdict.wrong, verdict.checked
            ));
            Ok(ExitCode::from(WRONG_FRAME))
        }
        _ => Ok(ExitCode::SUCCESS),
    }
}

/// The result goes to stdout, unless the frames do.
fn tell(args: &PipeArgs, result: &str) -> anyhow::Result<()> {
    if takes_stdout(args.to.as_deref()) {
        output::complain(result);
        return Ok(());
    }
    output::print(result)
}

/// No rung that is allowed holds.
fn refused(args: &PipeArgs, refusals: Vec<Refusal>, report: &mut Report) -> anyhow::Result<ExitCode> {
    for refusal in &refusals {
        report.refuse(refusal);
    }
    if args.json {
        tell(args, &report.json()?)?;
    }
    // The first says why the way that costs nothing is closed; the last, why the last resort is.
    let zero_copy = path(args).is_zero_copy();
    let told = if zero_copy { refusals.into_iter().next() } else { refusals.into_iter().next_back() };
    match (zero_copy, told) {
        (true, Some(refusal)) => Err(ZeroCopyRefused(refusal).into()),
        (_, Some(refusal)) => Err(anyhow!("cannot join source and sink: {refusal}")),
        (_, None) => Err(anyhow!("cannot join source and sink")),
    }
}

fn path(args: &PipeArgs) -> Path {
    match (args.memory, args.path) {
        (Some(MakerChoice::Sink), _) => Path::Reverse(Maker::Sink),
        #[cfg(feature = "gbm")]
        (Some(MakerChoice::Gbm), _) => Path::Reverse(Maker::Gbm),
        (Some(MakerChoice::Heap), _) => Path::Reverse(Maker::Allocator(Allocator::SystemHeap)),
        (Some(MakerChoice::Udmabuf), _) => Path::Reverse(Maker::Allocator(Allocator::Udmabuf)),
        (None, PathChoice::Auto) => Path::Auto,
        (None, PathChoice::ZeroCopy) => Path::ZeroCopy,
        (None, PathChoice::Convert) => Path::Convert,
        (None, PathChoice::Copy) => Path::Copy,
    }
}

/// Whether the order to stop has come; it stays there to be read.
fn is_told(stop: &SignalFd) -> bool {
    let mut fds = [PollFd::new(stop.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
}

/// The refusal that ended a flow, if one did.
fn refusal_in(error: &dmaflow::Error) -> Option<Refusal> {
    let mut cause = std::error::Error::source(error);
    while let Some(next) = cause {
        if let Some(refusal) = next.downcast_ref::<Refusal>() {
            return Some(refusal.clone());
        }
        cause = next.source();
    }
    None
}

/// When frames stop, as the command line says.
pub fn limits(frames: Option<u64>, seconds: Option<f64>) -> anyhow::Result<Limits> {
    if frames == Some(0) {
        bail!("cannot pipe 0 frames: --frames takes 1 or more");
    }
    let duration = seconds.map(|seconds| {
        let duration = Duration::try_from_secs_f64(seconds).ok().filter(|duration| !duration.is_zero());
        duration.ok_or_else(|| Usage(format!("--seconds takes a number greater than 0, not {seconds}")))
    });
    Ok(Limits { frames, duration: duration.transpose()? })
}
