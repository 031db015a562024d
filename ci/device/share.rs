//! One camera for many processes: the camera's own buffers at several ends at once.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use dmaflow::endpoint::{Ready, Source};
use dmaflow::error::Kind;
use dmaflow::format::Modifier;
use dmaflow::frame::{Frame, Revoked, ViewPages, ViewPolicy};
use dmaflow::memory::{Access, Mapping};
use dmaflow::share::{Receiver, ServerRequest};
use dmaflow::v4l2::CameraRequest;
use nix::libc;
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::signal::Signal;
use std::os::fd::{AsFd, AsRawFd};

use crate::camera::request;
use crate::chaos::Chaos;
use crate::harness::{Outcome, PASSED, Test, long, note};
use crate::process::{dma_bufs, dmaflow, finish, number, start};
use crate::shared::{Shared, is_in_time};
use crate::sinks::{has_bars, read_png};

pub const TESTS: &[Test] = &[
    Test { name: "share::vivid_to_many", needs: &["vivid", "vkms"], seconds: 240, run: vivid_to_many },
    Test { name: "share::for_reading", needs: &["vivid"], seconds: 120, run: for_reading },
    Test { name: "share::hoarder", needs: &["vivid"], seconds: 300, run: hoarder },
    Test { name: "share::chaos", needs: &["vivid"], seconds: 300, run: chaos_of_consumers },
    Test { name: "share::servers_in_chaos", needs: &["vivid"], seconds: 300, run: chaos_of_servers },
];

pub fn connect(at: &str) -> Result<Receiver> {
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        match Receiver::connect(at, "test") {
            Err(_) if Instant::now() < end => std::thread::sleep(Duration::from_millis(50)),
            other => return Ok(other?),
        }
    }
}

/// A display, a file, a counter and this process, of one camera, which has its buffers only once.
fn vivid_to_many() -> Result<Outcome> {
    let (at, file) = ("/tmp/dmaflow-share-test.sock", "/tmp/dmaflow-share-test.png");
    // So slow that one emulated processor has time for what the display's driver does with each frame: at the camera's own 60 a second it
    // leaves vivid half of them, for which there are buffers.
    let options = "--from vivid --format XR24 --fps 10 --budget 4";
    let server = start(&mut dmaflow(&format!("share {options} --at {at} --json")))?;
    let mut receiver = connect(at)?;
    ensure!(receiver.source().starts_with("/dev/video"), "{}", receiver.source());
    let inodes: Vec<_> = receiver
        .buffers()
        .iter()
        .filter_map(|buffer| Some(buffer.dma_buf(0)?.identity().inode()))
        .collect();
    // They are the server's, whatever they are used as: not to be shared on.
    let linear = receiver.layout().with_modifier(Some(Modifier::LINEAR));
    let relaid = receiver.buffers()[0].with_layout(linear)?;
    ensure!(relaid.is_lent() && !relaid.same_handle(&receiver.buffers()[0]), "{relaid:?}");
    let all = dma_bufs();
    ensure!(inodes.len() == 8 && inodes.iter().all(|inode| all.contains(inode)), "{inodes:?} of {all:?}");
    let consumers = [
        format!("pipe --from unix:{at} --to vkms --path zero-copy --frames 60 --verify --json"),
        format!("pipe --from unix:{at} --to null --frames 60 --json"),
    ];
    let running = consumers
        .iter()
        .map(|line| start(&mut dmaflow(line)))
        .collect::<Result<Vec<_>>>()?;
    let png = finish(&mut dmaflow(&format!("snap unix:{at} {file}")))?;
    png.has_status(0)?;
    ensure!(has_bars(&read_png(file.as_ref())?), "the picture is another");
    fs::remove_file(file)?;
    let (mut frames, end) = (0, Instant::now() + Duration::from_secs(60));
    while frames < 30 && Instant::now() < end {
        match receiver.try_next(Ready::FRAME)? {
            Some(frame) => {
                ensure!(inodes.contains(&frame.buffer().dma_buf(0).context("a dma-buf")?.identity().inode()));
                frames += 1;
            }
            None => {
                poll(&mut [PollFd::new(receiver.as_fd(), PollFlags::POLLIN)], 10_000u16)?;
            }
        }
    }
    ensure!(frames == 30, "{frames} frames came");
    for (running, line) in running.into_iter().zip(&consumers) {
        let result = running.end().and_then(|run| run.json(0)).with_context(|| line.clone())?;
        ensure!(result["path"] == "exported" && number(&result, "bytes_copied")? == 0, "{result}");
        ensure!(number(&result, "frames/captured")? == 60, "{result}");
        ensure!(line.contains("null") || number(&result, "verify/wrong")? == 0, "{result}");
    }
    // Every frame in turn, of which a display keeps several.
    let shown = finish(&mut dmaflow(&format!("pipe --from unix:{at} --to vkms --path zero-copy --frames 60 --json")))?;
    let shown = shown.json(0)?;
    ensure!(number(&shown, "frames/presented")? == 60 && number(&shown, "bytes_copied")? == 0, "{shown}");
    server.signal(Signal::SIGINT)?;
    let result = server.end()?.json(0)?;
    ensure!(result["path"] == "exported" && number(&result, "bytes_copied")? == 0, "{result}");
    let count = |what: &str| number(&result, &format!("frames/{what}"));
    let (captured, dropped, starved) = (count("captured")?, count("dropped_by_camera")?, count("starved")?);
    note(&format!("{captured} frames, {dropped} lost by the camera, {starved} of them for want of a buffer"));
    ensure!(captured >= 60 && starved == 0 && is_in_time(dropped, captured), "{result}");
    PASSED
}

/// Who has a camera's frames by a share can read them, and write to private pages; not to what others see, by whatever way.
fn for_reading() -> Result<Outcome> {
    let at = "/tmp/dmaflow-share-reading.sock";
    let with =
        |options: &str| start(&mut dmaflow(&format!("share --from vivid --format XR24 --at {at} --json{options}")));
    let server = with("")?;
    let mut receiver = connect(at)?;
    let frame = next(&mut receiver)?;
    let dma_buf = frame.buffer().dma_buf(0).context("a dma-buf")?;
    let refused = Mapping::new(dma_buf.as_fd(), dma_buf.len(), Access::ReadWrite).err();
    let errno = refused.and_then(|error| error.errno());
    ensure!(errno == Some(libc::EACCES), "a mapping for writing: {errno:?}");
    let path = format!("/proc/self/fd/{}", dma_buf.as_fd().as_raw_fd());
    let opened = fs::File::options().read(true).write(true).open(path);
    ensure!(opened.as_ref().err().and_then(|error| error.raw_os_error()) == Some(libc::ENXIO), "{opened:?}");
    let error = frame.buffer().write().err().context("it can be written")?;
    ensure!(error.line().contains("--writable"), "{error:?}");
    let error = Receiver::connect_writable(at, "writer")
        .err()
        .context("it got them for writing")?;
    ensure!(error.kind() == Kind::Permission && error.line().contains("--writable"), "{error:?}");
    let shown = row(&frame)?;
    let mut view = frame.view("test")?;
    ensure!(view.write(0, 0, 0, &[!shown[0]; 4])? == 4 && view.copied_pages()? == 1, "the view cannot be written");
    ensure!(row(&frame)? == shown, "others see what was written into a view");
    drop((view, frame, receiver));
    server.signal(Signal::SIGINT)?;
    server.end()?.json(0)?;
    let server = with(" --writable")?;
    // Who does not ask for it cannot write there either.
    let mut reader = connect(at)?;
    let frame = next(&mut reader)?;
    let dma_buf = frame.buffer().dma_buf(0).context("a dma-buf")?;
    let refused = Mapping::new(dma_buf.as_fd(), dma_buf.len(), Access::ReadWrite).err();
    let errno = refused.and_then(|error| error.errno());
    ensure!(errno == Some(libc::EACCES), "a mapping for writing where others may write: {errno:?}");
    drop((frame, reader));
    let mut receiver = Receiver::connect_writable(at, "writer")?;
    let frame = next(&mut receiver)?;
    let dma_buf = frame.buffer().dma_buf(0).context("a dma-buf")?;
    drop(Mapping::new(dma_buf.as_fd(), dma_buf.len(), Access::ReadWrite)?);
    server.signal(Signal::SIGINT)?;
    server.end()?.json(0)?;
    PASSED
}

fn row(frame: &Frame) -> Result<Vec<u8>> {
    let mut row = vec![0; frame.buffer().layout().width() as usize * 4];
    frame.buffer().read()?.row(0, 0, &mut row);
    Ok(row)
}

pub fn next(receiver: &mut Receiver) -> Result<Frame> {
    let end = Instant::now() + Duration::from_secs(60);
    while Instant::now() < end {
        if let Some(frame) = receiver.try_next(Ready::FRAME)? {
            return Ok(frame);
        }
        poll(&mut [PollFd::new(receiver.as_fd(), PollFlags::POLLIN)], 10_000u16)?;
    }
    bail!("no frame came")
}

/// One that keeps all that it gets for ever: the camera and the others go on, and it is told. With views that are detached in time one
/// keeps its pictures.
fn hoarder() -> Result<Outcome> {
    // What is tried at a rate is tried when the machine holds it: a host that does not run it for a moment has another go, and what is not a
    // matter of time is demanded of each.
    for _ in 0..3 {
        if hoarding()? {
            return PASSED;
        }
    }
    bail!("vivid does not hold the rate on this machine")
}

/// Whether vivid held its rate.
fn hoarding() -> Result<bool> {
    let at = "/tmp/dmaflow-share-hoarder.sock";
    // Few buffers: what is kept is what the camera lacks. A lease that is not over when the host stalls for a moment.
    let server = ServerRequest { lease: Some(LEASE), ..ServerRequest::default() };
    // A picture so small that an emulated processor has time for sixty a second: vivid's HDMI input, scaled down.
    let camera = CameraRequest { input: Some(3), buffers: Some(4), ..request("XR24", (144, 72)) };
    let mut shared = Shared::new(at, server, &camera)?;
    let consumers = std::thread::spawn(move || hoard(at));
    shared.wait_for(3)?;
    // What the driver says: the one that is asked for is the pace that the others must be given.
    let rate = shared.rate().context("a rate")?;
    ensure!(rate == 60.0, "the camera gives {rate} frames a second");
    let frames = if long() { 3600 } else { 300 };
    let flow = shared.flow(frames, |_| Ok(true))?;
    let stolen: Vec<_> = shared.end()?.iter().map(|consumer| consumer.stolen).collect();
    let seen = consumers.join().map_err(|_| anyhow!("a consumer panicked"))??;
    note(&format!("at {rate} fps {flow}; {} came to the other; stolen {stolen:?}; {} pauses", seen.came, seen.pauses));
    // While the first lease lasts nothing may be taken from the one that keeps two. The newest and one that another looks at are the other
    // two buffers: the camera may have to wait then, and lose what is due meanwhile. From then on never.
    let lease = (LEASE.as_secs_f64() * rate).ceil() as u64;
    ensure!(flow.short_after(lease + 4) == 0, "the camera had no buffer after the first lease: {flow}");
    ensure!(seen.came >= frames - frames / 10, "{flow}; {} came", seen.came);
    ensure!(stolen[0] == seen.revoked && seen.revoked > 0, "{} are gone, {stolen:?} were taken", seen.revoked);
    // Each of the other two has one at a time, and keeps to its lease unless this process was not run for so long.
    ensure!(stolen[1] + stolen[2] <= 2 * seen.pauses, "{stolen:?} were taken in {} pauses", seen.pauses);
    Ok(is_in_time(flow.late, frames))
}

const LEASE: Duration = Duration::from_millis(250);

/// What consumers beside one that keeps all have seen.
#[derive(Default)]
struct Seen {
    /// Views of the one that keeps all that are of something else now.
    revoked: u64,
    /// Frames of one that looks and lets go.
    came: u64,
    /// How often the three were not run for half a lease.
    pauses: u64,
}

/// One that keeps all, one that detaches what it keeps, and one that lets go, until the end.
fn hoard(at: &str) -> Result<Seen> {
    let (mut keeper, mut detacher, mut other) = (connect(at)?, connect(at)?, connect(at)?);
    // Nobody saves its pictures.
    keeper.set_view_policy(ViewPolicy::Wait);
    let (mut kept, mut views, mut seen) = (Vec::new(), Vec::new(), Seen::default());
    loop {
        let began = Instant::now();
        if kept.len() < 2 {
            kept.extend(more(&mut keeper)?.flatten().map(|frame| frame.view("keeper")).transpose()?);
        }
        // It reads when it has a frame, and keeps the picture by a view that it detaches.
        if let Some(Some(frame)) = more(&mut detacher)?
            && views.len() < 8
        {
            let (shown, view) = (row(&frame)?, frame.view("detacher")?);
            match view.detach() {
                Ok(()) => views.push((shown, view)),
                Err(error) if error.kind() == Kind::Revoked && began.elapsed() >= LEASE / 2 => {}
                Err(error) => return Err(error.into()),
            }
        }
        detacher.recycle()?;
        let Some(frame) = more(&mut other)? else { break };
        seen.came += u64::from(frame.is_some());
        drop(frame);
        other.recycle()?;
        seen.pauses += u64::from(began.elapsed() >= LEASE / 2);
        poll(&mut [PollFd::new(other.as_fd(), PollFlags::POLLIN)], 100u16)?;
    }
    ensure!(kept.len() == 2 && views.len() == 8, "{} kept, {} detached", kept.len(), views.len());
    // As much is taken from it as the camera needs, and no more.
    let mut pixels = vec![0; 64];
    for view in &kept {
        if view.row(0, 0, &mut pixels) == Err(Revoked) {
            seen.revoked += 1;
            ensure!(view.detach().err().map(|error| error.kind()) == Some(Kind::Revoked), "it was detached too late");
        }
    }
    for (shown, view) in &views {
        let mut now = vec![0; shown.len()];
        view.row(0, 0, &mut now)?;
        ensure!(now == *shown && view.pages() == ViewPages::Detached, "a detached view has changed: {view:?}");
    }
    Ok(seen)
}

/// The next frame if there is one; none at all after the end.
fn more(receiver: &mut Receiver) -> Result<Option<Option<Frame>>> {
    match receiver.try_next(Ready::FRAME) {
        Ok(frame) => Ok(Some(frame)),
        Err(error) if error.kind() == Kind::Ended => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn chaos(at: &str, rounds: u32) -> Result<Chaos> {
    let program = std::path::PathBuf::from(dmaflow("").get_program());
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
    // So slow that an emulated processor has time for six processes.
    let source = "--from vivid --format XR24 --size 320x180 --fps 15".to_owned();
    let rounds = if long() { 200 } else { rounds };
    // Of a hundred frames vivid, which keeps time by the clock, may come too late for one itself, where a host stalls now and then.
    Ok(Chaos { program, source, at: format!("/tmp/{at}.sock"), rounds, late: 1, seed: now.as_nanos() as u64 | 1 })
}

/// Consumers that are killed, stopped, or write nonsense hurt nobody else.
fn chaos_of_consumers() -> Result<Outcome> {
    note(&chaos("dmaflow-share-chaos", 30)?.of_consumers()?);
    PASSED
}

/// Servers that are killed and started again have their consumers back.
fn chaos_of_servers() -> Result<Outcome> {
    note(&chaos("dmaflow-share-servers", 8)?.of_servers()?);
    PASSED
}
