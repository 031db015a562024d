//! `dmaflow share`: one source for many processes.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use dmaflow::endpoint::{JoinError, Rung, Shown, Sink};
use dmaflow::error::Result;
use dmaflow::fence::{FenceUse, SyncFile};
use dmaflow::format::{Format, Layout};
use dmaflow::frame::{Buffer, Frame};
use dmaflow::ladder::{NoWay, Path};
use dmaflow::pipe::{Account, Pipe, Progress};
use dmaflow::share::{ConsumerInfo, Departure, LatencyInfo, Server, ServerRequest};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use nix::unistd::Group;
use serde::Serialize;

use crate::args::ShareArgs;
use crate::ends::open_source;
use crate::failure::Usage;
use crate::list_shares::make_folder_for;
use crate::output::{self, note, note_unless_full};
use crate::pipe::limits;
use crate::report::{LatencyReport, want_of_buffers};
use crate::stop::catch_signals;
use crate::table;

/// Buffers of the source: what a display keeps (four), what others look at meanwhile, and two for the camera.
const BUFFERS: u32 = 8;

/// The table on a terminal is written this often at most, in µs.
const PERIOD_US: u64 = 250_000;
/// Lines of who was disconnected are so far apart at least.
const TOLD: Duration = Duration::from_secs(1);

pub fn run(args: &ShareArgs) -> anyhow::Result<ExitCode> {
    let limits = limits(args.frames, args.seconds)?;
    let request = request(args)?;
    // The server refuses the buffers (`Buffer::is_lent`); before it is there, and the source opened, is sooner.
    if let Some(from) = args.from.as_deref().filter(|name| name.starts_with("unix:")) {
        bail!(Usage(format!(
            "what is shared cannot be shared on: the server of {from} may take frames back, and consumers here could not be told; let \
             them connect to {from} itself"
        )));
    }
    output::check()?;
    // Before any device is opened: from here on an order to stop waits until it can be followed in order.
    let stop = catch_signals()?;
    let server = match (&args.at, inherited()?) {
        (Some(at), _) => open(at, request)?,
        (None, Some(_)) if args.mode.is_some() || args.group.is_some() => {
            bail!(Usage(
                "--mode and --group are for sockets that this makes; say it in the unit (SocketMode=, SocketGroup=)"
                    .into()
            ))
        }
        (None, Some(socket)) => Server::bind_inherited(socket, request)?,
        (None, None) => bail!(Usage("share needs --at SOCKET, unless systemd passes a socket".into())),
    };
    let buffers = args.buffers.unwrap_or(BUFFERS);
    let mut source = open_source(args.from.as_deref(), &args.shape, Some(buffers), None)?;
    // Also where some may write: the others do not.
    source.export_read_only()?;
    let at = server.name().to_owned();
    let mut shared = Shared::new(server);
    shared.server.describe(source.name(), source.watchdog());
    let account = match Pipe::join(source.as_mut(), &mut shared, Path::ZeroCopy, limits) {
        Ok(pipe) => {
            note(&format!("sharing at {at}"));
            pipe.run(Some(stop.as_fd()), &mut |_: &Progress<'_>| {})
        }
        Err(NoWay::Failed(error)) => Err(error),
        Err(NoWay::Refused(refusals)) => match refusals.into_iter().next() {
            Some(refusal) => bail!("cannot share the source: {refusal}"),
            None => bail!("cannot share the source"),
        },
    };
    shared.live.take().inspect(ProgressBar::finish_and_clear);
    // The source stands: what consumers have now stays what it is.
    match &account {
        Ok(_) => shared.server.end(),
        Err(error) => shared.server.fail(&error.line()),
    }
    let report = Report::new(source.name(), source.layout(), &shared.server, &account?);
    output::print(&if args.json { serde_json::to_string(&report)? } else { report.table() })?;
    Ok(ExitCode::SUCCESS)
}

/// A server at a place given on the command line.
pub fn open(at: &str, request: ServerRequest) -> anyhow::Result<Server> {
    if at.is_empty() || at == "@" {
        bail!(Usage("a share needs the path of a socket, or @NAME".into()));
    }
    make_folder_for(at).with_context(|| format!("cannot make the folder of {at}"))?;
    Ok(Server::bind(at, request)?)
}

/// The socket that a service manager has passed on, if one has: descriptor 3, said to be for this process by two variables
/// (sd_listen_fds(3)).
fn inherited() -> anyhow::Result<Option<OwnedFd>> {
    const FIRST: RawFd = 3;
    let variable = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u32>().ok());
    if variable("LISTEN_PID") != Some(std::process::id()) {
        return Ok(None);
    }
    match variable("LISTEN_FDS") {
        // By another number: what is open at 3 stays with whoever put it there.
        // SAFETY: whoever started this process says that the descriptor is open, and nothing in here closes it.
        Some(1) => Ok(Some(
            unsafe { BorrowedFd::borrow_raw(FIRST) }
                .try_clone_to_owned()
                .context("cannot use the socket passed")?,
        )),
        count => bail!(Usage(format!("one socket is shared at, and {} were passed", count.unwrap_or(0)))),
    }
}

fn request(args: &ShareArgs) -> anyhow::Result<ServerRequest> {
    let group = args.group.as_deref().map(|name| match name.parse() {
        Ok(number) => Ok(number),
        Err(_) => match Group::from_name(name).context("cannot look the group up")? {
            Some(group) => Ok(group.gid.as_raw()),
            None => Err(anyhow::Error::new(Usage(format!("there is no group called \"{name}\"")))),
        },
    });
    Ok(ServerRequest {
        budget: args.budget,
        lease: args.lease,
        mode: args.mode,
        group: group.transpose()?,
        allow_uids: args.allow_uid.clone(),
        allow_gids: args.allow_gid.clone(),
        writable: args.writable,
    })
}

/// The server, and a table of its consumers on a terminal.
struct Shared {
    server: Server,
    live: Option<ProgressBar>,
    /// When the table was written last, in µs.
    last_us: u64,
    /// Whether it was told that consumers may starve the source.
    warned: bool,
    /// How many departures were told of.
    told: u64,
    told_at: Option<Instant>,
}

impl Shared {
    fn new(server: Server) -> Shared {
        use std::io::IsTerminal;
        let live = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
            bar.set_style(ProgressStyle::with_template("{msg}").unwrap_or_else(|_| ProgressStyle::default_spinner()));
            bar
        });
        Shared { server, live, last_us: 0, warned: false, told: 0, told_at: None }
    }

    /// Says once that consumers which do nothing wrong can starve the source: its losses would seem to be its own.
    fn warn(&mut self) {
        if self.warned || !self.server.may_starve() {
            return;
        }
        self.warned = true;
        let line = format!(
            "{} may keep frames for {} ms each, which can leave the source no buffer to fill for as long: a shorter --lease, a smaller \
             --budget or more --buffers would do",
            table::count(self.server.consumers().len() as u64, "consumer"),
            self.server.lease().as_millis()
        );
        match &self.live {
            Some(live) => live.suspend(|| note(&line)),
            None => note(&line),
        }
    }

    /// A line for each consumer that went otherwise than by hanging up, when it does; no more than one a second, for those that connect may do
    /// so as fast as they like.
    fn tell(&mut self) {
        let departed = self.server.departed();
        if departed == self.told || self.told_at.is_some_and(|at| at.elapsed() < TOLD) {
            return;
        }
        // More than are kept are gone unseen only if so many went since the last look.
        let new = usize::try_from(departed - self.told).unwrap_or(usize::MAX);
        self.told = departed;
        let all: Vec<_> = self.server.departures().collect();
        let mut others = all.iter().skip(all.len().saturating_sub(new)).filter(|gone| !gone.left);
        let Some(first) = others.next() else { return };
        self.told_at = Some(Instant::now());
        let more = match others.count() {
            0 => String::new(),
            more => format!("; and {more} others"),
        };
        let line = format!("{}{more}", departure(first));
        match &self.live {
            Some(live) => live.suspend(|| note_unless_full(&line)),
            None => note_unless_full(&line),
        }
    }
}

/// What is said of a consumer that went otherwise than by itself.
fn departure(gone: &Departure) -> String {
    let Departure { consumer, why, at_fault, .. } = gone;
    let who = match consumer.name.as_str() {
        "" => "a connection".to_owned(),
        name => format!("consumer {}", table::plain(name)),
    };
    let what = if *at_fault { "disconnected" } else { "lost" };
    format!("{what}: {who} (process {}, user {}): {why}", consumer.pid, consumer.uid)
}

/// A table of consumers; the heading is a row of it.
fn consumers(reports: &[ConsumerReport]) -> Vec<Vec<String>> {
    let heading = ["PID", "NAME", "UID", "FRAMES", "SKIPPED", "LEASES", "LATENCY", "STOLEN"];
    let row = |report: &ConsumerReport| {
        let pid = if report.pid == 0 { table::UNKNOWN.to_owned() } else { report.pid.to_string() };
        let latency = report.latency_us.as_ref();
        let latency = latency.map_or(table::UNKNOWN.to_owned(), |latency| format!("{} µs", latency.p50));
        let [frames, skipped, stolen] = [report.frames, report.skipped, report.stolen].map(|count| count.to_string());
        let (name, uid, leases) = (table::plain(&report.name), report.uid.to_string(), report.leases.to_string());
        vec![pid, name, uid, frames, skipped, leases, latency, stolen]
    };
    let rows = reports.iter().map(row);
    let heading = heading.map(str::to_owned).to_vec();
    if reports.is_empty() { Vec::new() } else { std::iter::once(heading).chain(rows).collect() }
}

impl Sink for Shared {
    fn name(&self) -> &str {
        self.server.name()
    }

    fn formats(&self) -> Option<Vec<Format>> {
        self.server.formats()
    }

    fn join(&mut self, layout: &Layout, rate: Option<f64>, buffers: &[Buffer]) -> Result<Rung, JoinError> {
        self.server.join(layout, rate, buffers)
    }

    fn present(&mut self, frame: Frame) -> Result<Option<Shown>> {
        let shown = self.server.present(frame)?;
        self.warn();
        self.tell();
        if let (Some(live), Some(shown)) = (&self.live, &shown)
            && shown.at_us.saturating_sub(self.last_us) >= PERIOD_US
        {
            self.last_us = shown.at_us;
            let (mut lines, infos) = (Vec::new(), self.server.consumers());
            let reports: Vec<_> = infos.iter().map(ConsumerReport::from).collect();
            table::section(&mut lines, "consumers", consumers(&reports));
            live.set_message(lines.join("\n"));
        }
        Ok(shown)
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        self.server.event_fd()
    }

    fn wants_event(&self) -> bool {
        self.server.wants_event()
    }

    fn dispatch(&mut self) -> Result<Option<Shown>> {
        let shown = self.server.dispatch()?;
        self.tell();
        Ok(shown)
    }

    fn waits_for<'a>(&'a self, next: Option<&'a Frame>) -> Vec<&'a SyncFile> {
        self.server.waits_for(next)
    }

    fn fence_use(&self) -> FenceUse {
        self.server.fence_use()
    }
}

/// What `share` prints at its end.
#[derive(Serialize)]
struct Report {
    source: String,
    at: String,
    format: String,
    width: u32,
    height: u32,
    path: String,
    frames: Frames,
    seconds: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    fps: Option<f64>,
    bytes_copied: u64,
    consumers: Vec<ConsumerReport>,
    /// Consumers that are no more, the last 64.
    gone: Vec<ConsumerReport>,
}

#[derive(Serialize)]
struct Frames {
    captured: u64,
    dropped_by_camera: u64,
    starved: u64,
    errored: u64,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    more_dropped_by_camera: bool,
}

#[derive(Serialize)]
struct ConsumerReport {
    pid: u32,
    name: String,
    uid: u32,
    frames: u64,
    skipped: u64,
    leases: u32,
    /// From when a frame was published until it was taken.
    #[serde(skip_serializing_if = "Option::is_none")]
    latency_us: Option<LatencyReport>,
    stolen: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    why: Option<String>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    disconnected: bool,
}

impl From<&ConsumerInfo> for ConsumerReport {
    fn from(info: &ConsumerInfo) -> ConsumerReport {
        let ConsumerInfo { pid, uid, gid: _, name, frames, skipped, leases, latency, stolen } = info.clone();
        let latency_us = latency.map(|latency| {
            let LatencyInfo { median_us, p99_us, max_us, measured } = latency;
            LatencyReport { p50: median_us, p99: p99_us, max: max_us, measured }
        });
        ConsumerReport { pid, name, uid, frames, skipped, leases, latency_us, stolen, why: None, disconnected: false }
    }
}

impl From<&Departure> for ConsumerReport {
    fn from(gone: &Departure) -> ConsumerReport {
        let why = Some(gone.why.clone());
        ConsumerReport { why, disconnected: gone.at_fault, ..ConsumerReport::from(&gone.consumer) }
    }
}

impl Report {
    fn new(source: &str, layout: &Layout, server: &Server, account: &Account) -> Report {
        Report {
            source: source.to_owned(),
            at: server.name().to_owned(),
            format: layout.format().to_string(),
            width: layout.width(),
            height: layout.height(),
            path: account.rung.to_string(),
            frames: Frames {
                captured: account.captured,
                dropped_by_camera: account.lost.dropped,
                starved: account.lost.starved,
                errored: account.lost.errored,
                more_dropped_by_camera: account.lost.uncounted,
            },
            seconds: account.duration.as_secs_f64(),
            fps: account.fps,
            bytes_copied: account.copies.bytes(),
            consumers: server.consumers().iter().map(ConsumerReport::from).collect(),
            gone: server.departures().map(ConsumerReport::from).collect(),
        }
    }

    fn table(&self) -> String {
        let Report { source, at, format, width, height, path, frames, seconds, .. } = self;
        let more = want_of_buffers(frames.starved, frames.more_dropped_by_camera);
        let mut lines = vec![
            format!("{source} at {at}: {format} {width}x{height}, {path}, {} bytes copied", self.bytes_copied),
            format!(
                "{} in {seconds:.1} s, {} dropped by the camera{more}, {} errored",
                table::count(frames.captured, "frame"),
                frames.dropped_by_camera,
                frames.errored
            ),
        ];
        table::section(&mut lines, "consumers", consumers(&self.consumers));
        for gone in &self.gone {
            let why = gone.why.as_deref().unwrap_or(table::UNKNOWN);
            lines.push(format!(
                "gone: {} (process {}) after {}, {} skipped, {} stolen: {why}",
                table::plain(&gone.name),
                gone.pid,
                table::count(gone.frames, "frame"),
                gone.skipped,
                gone.stolen
            ));
        }
        lines.join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_consumer_is_a_row_of_the_table_and_an_object_of_the_json() {
        let latency = Some(LatencyInfo { median_us: 85, p99_us: 300, max_us: 4000, measured: 128 });
        let info = |pid, latency| ConsumerInfo {
            pid,
            uid: 1000,
            gid: 100,
            name: "view er".into(),
            frames: 600,
            skipped: 2,
            leases: 1,
            latency,
            stolen: 3,
        };
        let reports = [info(42, latency), info(0, None)].map(|info| ConsumerReport::from(&info));
        let mut lines = Vec::new();
        table::section(&mut lines, "consumers", consumers(&reports));
        assert_eq!(
            lines,
            [
                "consumers",
                "  PID  NAME     UID   FRAMES  SKIPPED  LEASES  LATENCY  STOLEN",
                "  42   view er  1000  600     2        1       85 µs    3",
                "  ?    view er  1000  600     2        1       ?        3",
            ]
        );
        let json = |report| serde_json::to_value(report).unwrap();
        let [told, untold] = reports.each_ref().map(json);
        assert_eq!(told["latency_us"], serde_json::json!({ "p50": 85, "p99": 300, "max": 4000, "measured": 128 }));
        assert!(untold.get("latency_us").is_none() && untold["leases"] == 1, "{untold}");
        assert_eq!(consumers(&[]), Vec::<Vec<String>>::new());
    }
}
