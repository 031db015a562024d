//! Frames with fences through the pipe's own loop.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use dmaflow::endpoint::{JoinError, Ready, Rung, Shown, Sink, Source, SourceCounts};
use dmaflow::error::{Error, Kind};
use dmaflow::fence::{CpuWait, PATIENCE, SyncFile};
use dmaflow::format::{Format, Layout};
use dmaflow::frame::{Buffer, Frame};
use dmaflow::kms::{Display, DisplayRequest, Present};
use dmaflow::ladder::Path;
use dmaflow::pipe::{Limits, Pipe};
use dmaflow::v4l2::Camera;

use crate::fences_shown::{NOT_YET, REFRESH_US, camera, camera_with, signalled};
use crate::harness::{Outcome, PASSED, Test, note};
use crate::process::State;
use crate::sw_sync::Timeline;
use crate::vgem::{Signal, Vgem, now_us};

const NEEDS: &[&str] = &["vivid", "vkms", "vgem", "udmabuf"];
/// What "at once" may be for most frames, in µs: some refreshes of an emulated display.
const AT_ONCE_US: u64 = 100_000;

const READER: &[&str] = &["vivid", "vgem", "udmabuf"];

pub const TESTS: &[Test] = &[
    Test { name: "fences_flow::in_fifo", needs: NEEDS, seconds: 180, run: || pipe(Present::Fifo, false) },
    Test { name: "fences_flow::in_mailbox", needs: NEEDS, seconds: 180, run: || pipe(Present::Mailbox, false) },
    Test { name: "fences_flow::verified_in_fifo", needs: NEEDS, seconds: 300, run: || pipe(Present::Fifo, true) },
    Test { name: "fences_flow::verified_in_mailbox", needs: NEEDS, seconds: 300, run: || pipe(Present::Mailbox, true) },
    Test { name: "fences_flow::stopped_in_fifo", needs: NEEDS, seconds: 120, run: || stopped(Present::Fifo) },
    Test { name: "fences_flow::stopped_in_mailbox", needs: NEEDS, seconds: 120, run: || stopped(Present::Mailbox) },
    Test { name: "fences_flow::never_in_fifo", needs: NEEDS, seconds: 120, run: || never(Present::Fifo) },
    Test { name: "fences_flow::never_in_mailbox", needs: NEEDS, seconds: 120, run: || never(Present::Mailbox) },
    Test { name: "fences_flow::released_by_the_sink", needs: READER, seconds: 120, run: released },
    Test { name: "fences_flow::released_copies", needs: READER, seconds: 120, run: released_copies },
    Test { name: "fences_flow::never_released", needs: READER, seconds: 120, run: never_released },
];

/// What becomes of a frame after the camera has filled it.
#[derive(Clone, Copy)]
pub enum Fate {
    /// It has no fence.
    Ready,
    /// Another device writes it for so long.
    After(Duration),
    /// The same, and then its work fails.
    Fails(Duration),
    /// Another device does not come to an end, unless it is told to.
    Never,
}

/// A camera whose frames are written for some time after they come, by another device.
pub struct Fenced {
    pub camera: Camera,
    vgem: Arc<Vgem>,
    /// With the time stamps of their frames.
    signallers: Vec<(u64, JoinHandle<Result<u64>>)>,
    /// Of the frame that has this place.
    fate: Box<dyn FnMut(u64) -> Fate>,
    place: u64,
    /// Before the frame with this place the source changes, and has new buffers then.
    pub changes_at: Option<u64>,
    open: Vec<Signal>,
}

impl Fenced {
    pub fn new(fate: impl FnMut(u64) -> Fate + 'static) -> Result<Fenced> {
        Fenced::of(camera()?, fate)
    }

    pub fn of(camera: Camera, fate: impl FnMut(u64) -> Fate + 'static) -> Result<Fenced> {
        let (signallers, open) = (Vec::new(), Vec::new());
        let (vgem, fate) = (Vgem::open()?, Box::new(fate));
        Ok(Fenced { camera, vgem, signallers, fate, place: 0, changes_at: None, open })
    }

    /// From this frame on, counted from 0, nothing that the other device writes comes to an end.
    pub fn stuck_after(ready: u64) -> Result<Fenced> {
        Fenced::new(move |place| if place < ready { Fate::Ready } else { Fate::Never })
    }

    /// The other device comes to an end after all.
    pub fn signal_all(&mut self) -> Result<()> {
        self.open.drain(..).try_for_each(Signal::now)
    }
}

fn about_fence(cause: anyhow::Error) -> Error {
    Error::new(Kind::System, "make a fence for", "a frame").because(format!("{cause:#}"))
}

impl AsFd for Fenced {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.camera.as_fd()
    }
}

impl Source for Fenced {
    fn name(&self) -> &str {
        self.camera.name()
    }

    fn layout(&self) -> &Layout {
        self.camera.layout()
    }

    fn rate(&self) -> Option<f64> {
        self.camera.rate()
    }

    fn buffers(&self) -> &[Buffer] {
        self.camera.buffers()
    }

    fn start(&mut self) -> dmaflow::Result<()> {
        self.camera.start()
    }

    fn try_next(&mut self, ready: Ready) -> dmaflow::Result<Option<Frame>> {
        if self.changes_at.take_if(|at| *at <= self.place).is_some() {
            return Err(Error::new(Kind::FormatChanged, "read frames from", self.name()));
        }
        let Some(frame) = self.camera.try_next(ready)? else { return Ok(None) };
        let fate = (self.fate)(self.place);
        self.place += 1;
        if matches!(fate, Fate::Ready) {
            return Ok(Some(frame));
        }
        let stamp = frame.meta().timestamp.us;
        if let Fate::Fails(time) = fate {
            let made = Timeline::open().and_then(|timeline| Ok((timeline.fence(1)?, timeline)));
            let (fence, timeline) = made.map_err(about_fence)?;
            self.signallers.push((stamp, timeline.fail_after(time)));
            return Ok(Some(frame.with_acquire_fence(fence)));
        }
        let made = self.vgem.fence();
        let (fence, signal): (SyncFile, Signal) = made.map_err(about_fence)?;
        match fate {
            Fate::After(time) => self.signallers.push((stamp, signal.after(time))),
            Fate::Ready | Fate::Fails(_) | Fate::Never => self.open.push(signal),
        }
        Ok(Some(frame.with_acquire_fence(fence)))
    }

    fn recycle(&mut self) -> dmaflow::Result<()> {
        self.camera.recycle()
    }

    fn follow(&mut self) -> dmaflow::Result<()> {
        self.camera.stop()?;
        self.camera.use_own_buffers()
    }

    fn release_fences(&self) -> Vec<Arc<SyncFile>> {
        self.camera.release_fences()
    }

    fn starves(&self) -> bool {
        self.camera.starves()
    }

    fn stop(&mut self) -> dmaflow::Result<()> {
        self.camera.stop()
    }

    fn watchdog(&self) -> Option<Duration> {
        self.camera.watchdog()
    }

    fn stalled(&self) -> Error {
        self.camera.stalled()
    }

    fn counts(&self) -> SourceCounts {
        self.camera.counts()
    }
}

/// The pipe's own loop, each frame with a fence that signals a while later: none is shown before, but at once then, and, where that is
/// verified, with what was captured.
fn pipe(present: Present, verify: bool) -> anyhow::Result<Outcome> {
    const FRAMES: u64 = 60;
    let descriptors = || fs::read_dir("/proc/self/fd").map(Iterator::count);
    let before = descriptors()?;
    let mut source = Fenced::new(|_| Fate::After(Duration::from_millis(25)))?;
    let mut display = Display::find("vkms", DisplayRequest { present, verify, ..DisplayRequest::default() })?;
    let limits = Limits { frames: Some(FRAMES), duration: None };
    // When each frame was shown, by its time stamp.
    let mut shown = BTreeMap::new();
    let account = Pipe::join(&mut source, &mut display, Path::ZeroCopy, limits)?.run(None, &mut |told| {
        shown.extend(told.latency_us.map(|latency| (told.at_us - latency, told.at_us)));
    })?;
    ensure!(account.captured == FRAMES, "{account:?}");
    ensure!(account.presented + account.dropped_by_sink == FRAMES, "{account:?}");
    ensure!(account.fences.by_device + account.fences.by_cpu == account.presented, "{account:?}");
    match (present, verify) {
        (Present::Fifo, false) => {
            ensure!(account.presented == FRAMES && account.fences.by_device == FRAMES - 1, "{account:?}");
        }
        (Present::Fifo, true) => ensure!(account.presented == FRAMES, "{account:?}"),
        // Fences take longer than a frame, and some frames are shown all the same.
        (Present::Mailbox, _) => ensure!(account.presented > 5 && account.fences.by_cpu > 5, "{account:?}"),
    }
    if verify {
        let verdict = display.verdict().context("no verdict")?;
        ensure!(verdict.checked == account.presented && verdict.wrong == 0, "{verdict:?}");
        ensure!(account.fences.why == Some(CpuWait::Verified), "{account:?}");
    }
    ensure!(shown.len() as u64 == account.presented, "{} of {account:?}", shown.len());
    note(&format!("{} of {FRAMES} shown, {:?}", account.presented, account.fences));
    display.restore()?;
    let mut after = Vec::new();
    for (stamp, signaller) in std::mem::take(&mut source.signallers) {
        let signalled_us = signalled(signaller)?;
        if let Some(&at_us) = shown.get(&stamp) {
            // Of the vertical blank just before the signal was seen, at the earliest.
            ensure!(at_us + REFRESH_US >= signalled_us, "shown at {at_us}, and its fence signalled at {signalled_us}");
            after.push(at_us.saturating_sub(signalled_us));
        }
    }
    ensure!(after.len() as u64 == account.presented, "{} of {account:?}", after.len());
    after.sort_unstable();
    let median = after[after.len() / 2];
    note(&format!("shown {median} µs after the signal, by the median"));
    // Verifying takes its own time.
    ensure!(verify || median < AT_ONCE_US, "shown {median} µs after the signal");
    drop((display, source));
    ensure!(descriptors()? == before, "{} descriptors instead of {before}", descriptors()?);
    PASSED
}

/// Where no fence signals any more the flow ends, in time, with an error that names one; camera and display are as before. In a mailbox
/// the camera, whose buffers all wait for fences, is not said to have stalled.
fn never(present: Present) -> anyhow::Result<Outcome> {
    const TIMEOUT: Duration = Duration::from_millis(700);
    let state = State::read();
    let mut source = Fenced::stuck_after(10)?;
    let request = DisplayRequest { present, fence_timeout: Some(TIMEOUT), ..DisplayRequest::default() };
    let mut display = Display::find("vkms", request)?;
    let limits = Limits { frames: Some(1000), duration: None };
    let start = Instant::now();
    let ran = Pipe::join(&mut source, &mut display, Path::ZeroCopy, limits)?.run(None, &mut |_| {});
    let (error, took) = (ran.err().context("frames were shown before their fences")?, start.elapsed());
    let line = error.line();
    note(&format!("after {took:?}: {line}"));
    ensure!(error.kind() == Kind::Timeout && line.contains("wait for the fence of vgem (timeline unbound)"), "{line}");
    // One that is late, and twice as long for others.
    ensure!(took >= 3 * TIMEOUT && took < 3 * TIMEOUT + Duration::from_secs(3), "after {took:?}");
    let stopped = source.camera.recycle().err().context("the camera goes on")?;
    ensure!(stopped.kind() == Kind::Invalid, "{}", stopped.line());
    // What is with the kernel cannot be taken back before its fence has signalled.
    let signallers: Vec<_> = source.open.drain(..).map(|signal| signal.after(NOT_YET)).collect();
    let start = Instant::now();
    display.restore()?;
    ensure!(start.elapsed() < Duration::from_secs(5), "put back after {:?}", start.elapsed());
    for signaller in signallers {
        signalled(signaller)?;
    }
    drop(display);
    // All buffers come back.
    for _ in 0..2 * source.camera.buffers().len() {
        source.camera.next()?;
    }
    drop(source);
    state.is_back()?;
    PASSED
}

/// What an order to stop comes by, after so long or never, and the thread that gives it, which keeps the other end open.
pub fn order_to_stop(after: Option<Duration>) -> Result<(OwnedFd, JoinHandle<OwnedFd>)> {
    let (order, end) = nix::unistd::pipe()?;
    let orderer = std::thread::spawn(move || {
        if let Some(after) = after {
            std::thread::sleep(after);
            nix::unistd::write(&end, b"x").expect("the pipe takes a byte");
        }
        end
    });
    Ok((order, orderer))
}

/// An order to stop, and the end of the time, are heard while fences are waited for that do not signal: while frames come, and at the end
/// of a number of them. The account comes at once; what was not shown is in it.
fn stopped(present: Present) -> anyhow::Result<Outcome> {
    // Frames without a fence at first. At the end one is on its way, or two are held, each with a fence.
    const READY: u64 = 4;
    const AFTER: Duration = Duration::from_millis(2500);
    let last = Some(READY + if present == Present::Fifo { 1 } else { 2 });
    for (frames, duration) in [(None, None), (None, Some(AFTER)), (last, None), (last, Some(AFTER))] {
        let state = State::read();
        let mut source = Fenced::stuck_after(READY)?;
        let mut display = Display::find("vkms", DisplayRequest { present, ..DisplayRequest::default() })?;
        let (order, orderer) = order_to_stop(duration.is_none().then_some(AFTER))?;
        let start = Instant::now();
        let limits = Limits { frames, duration };
        let ran = Pipe::join(&mut source, &mut display, Path::ZeroCopy, limits)?.run(Some(order.as_fd()), &mut |_| {});
        let took = start.elapsed();
        let account = ran.map_err(|error| anyhow::anyhow!("after {took:?}: {}", error.line()))?;
        note(&format!(
            "{frames:?}, {duration:?}: {took:?}, {} captured, {} shown",
            account.captured, account.presented
        ));
        // Long before a fence has taken too long.
        ensure!(took >= AFTER && took < PATIENCE, "stopped after {took:?}");
        ensure!(account.captured > READY && frames.is_none_or(|frames| account.captured == frames), "{account:?}");
        ensure!(account.presented + account.dropped_by_sink == account.captured, "{account:?}");
        ensure!(present == Present::Mailbox || account.presented == READY, "{account:?}");
        drop(orderer.join().expect("no panic"));
        source.signal_all()?;
        display.restore()?;
        drop((display, source));
        state.is_back()?;
    }
    PASSED
}

/// A sink whose device goes on reading each frame for a time after it has taken it, and has dropped it.
pub struct Reader {
    vgem: Arc<Vgem>,
    /// How long; `None` for ever.
    reads: Option<Duration>,
    /// The last fence of each slot.
    fences: BTreeMap<u32, Arc<SyncFile>>,
    signallers: Vec<JoinHandle<Result<u64>>>,
    open: Vec<Signal>,
    /// Frames that came in a slot that was being read.
    overwritten: Vec<u32>,
    timeout: Duration,
}

impl Reader {
    pub fn has_not_been_overwritten(&self) -> Result<()> {
        ensure!(self.overwritten.is_empty(), "filled while they were read: frames {:?}", self.overwritten);
        Ok(())
    }

    pub fn new(reads: Option<Duration>) -> Result<Reader> {
        let (signallers, open, overwritten) = (Vec::new(), Vec::new(), Vec::new());
        let (vgem, fences) = (Vgem::open()?, BTreeMap::new());
        Ok(Reader { vgem, reads, fences, signallers, open, overwritten, timeout: PATIENCE })
    }
}

impl Sink for Reader {
    fn name(&self) -> &str {
        "reader"
    }

    fn formats(&self) -> Option<Vec<Format>> {
        None
    }

    fn join(&mut self, _: &Layout, _: Option<f64>, _: &[Buffer]) -> Result<Rung, JoinError> {
        Ok(Rung::Exported)
    }

    fn fence_timeout(&self) -> Duration {
        self.timeout
    }

    fn present(&mut self, frame: Frame) -> dmaflow::Result<Option<Shown>> {
        let made = || -> Result<(SyncFile, Signal, u64)> {
            let (fence, signal) = self.vgem.fence()?;
            Ok((fence, signal, now_us()?))
        };
        let (fence, signal, at_us) = made().map_err(about_fence)?;
        let fence = Arc::new(fence);
        if self
            .fences
            .insert(frame.slot(), Arc::clone(&fence))
            .is_some_and(|before| !before.is_signalled())
        {
            self.overwritten.push(frame.meta().sequence);
        }
        frame.release_after(fence);
        match self.reads {
            Some(time) => self.signallers.push(signal.after(time)),
            None => self.open.push(signal),
        }
        Ok(Some(Shown { meta: *frame.meta(), at_us }))
    }
}

/// No slot is filled while the sink's device reads it, which is longer than the camera takes for all of them; the signals are what the flow
/// goes on by.
fn released() -> anyhow::Result<Outcome> {
    const FRAMES: u64 = 40;
    let descriptors = || fs::read_dir("/proc/self/fd").map(Iterator::count);
    let before = descriptors()?;
    let mut camera = camera_with(4)?;
    let (buffers, period) = (camera.buffers().len(), Duration::from_millis(17));
    let reads = period * 3 * u32::try_from(buffers)?;
    let mut reader = Reader::new(Some(reads))?;
    let limits = Limits { frames: Some(FRAMES), duration: None };
    let start = Instant::now();
    let account = Pipe::join(&mut camera, &mut reader, Path::ZeroCopy, limits)?.run(None, &mut |_| {})?;
    let took = start.elapsed();
    reader.has_not_been_overwritten()?;
    ensure!(account.captured == FRAMES && account.presented == FRAMES, "{account:?}");
    // Each slot is read in full before it comes again.
    let rounds = u32::try_from((FRAMES - 1) / buffers as u64)?;
    ensure!(took >= reads * rounds, "{FRAMES} frames in {buffers} buffers took {took:?}, each read for {reads:?}");
    note(&format!("{FRAMES} frames in {buffers} buffers, each read for {reads:?}, took {took:?}"));
    for signaller in std::mem::take(&mut reader.signallers) {
        signalled(signaller)?;
    }
    // The queue closes what has signalled when it looks at its slots.
    camera.next()?;
    ensure!(camera.release_fences().is_empty(), "{:?}", camera.release_fences());
    drop((reader, camera));
    ensure!(descriptors()? == before, "{} descriptors instead of {before}", descriptors()?);
    PASSED
}

/// The same where the frames are copies, which are written into buffers of which the sink's device reads every one: the flow waits, and
/// drops none.
fn released_copies() -> anyhow::Result<Outcome> {
    const FRAMES: u64 = 24;
    let mut camera = camera_with(4)?;
    let reads = Duration::from_millis(150);
    let mut reader = Reader::new(Some(reads))?;
    let limits = Limits { frames: Some(FRAMES), duration: None };
    let start = Instant::now();
    let account = Pipe::join(&mut camera, &mut reader, Path::Copy, limits)?.run(None, &mut |_| {})?;
    let took = start.elapsed();
    ensure!(account.rung == Rung::Copied && reader.overwritten.is_empty(), "{:?}, {account:?}", reader.overwritten);
    ensure!(account.presented == FRAMES && account.dropped_by_sink == 0, "{account:?}");
    let buffers = u32::try_from(reader.fences.len())?;
    let rounds = (u32::try_from(FRAMES)? - 1) / buffers;
    ensure!(took >= reads * rounds, "{FRAMES} copies in {buffers} buffers took {took:?}, each read for {reads:?}");
    for signaller in std::mem::take(&mut reader.signallers) {
        signalled(signaller)?;
    }
    PASSED
}

/// A device that never comes to an end stops the flow in time, with an error that names its fences.
fn never_released() -> anyhow::Result<Outcome> {
    const TIMEOUT: Duration = Duration::from_millis(300);
    let mut camera = camera_with(4)?;
    camera.set_watchdog(TIMEOUT);
    let buffers = camera.buffers().len();
    let mut reader = Reader { timeout: TIMEOUT, ..Reader::new(None)? };
    let limits = Limits { frames: Some(1000), duration: None };
    let start = Instant::now();
    let ran = Pipe::join(&mut camera, &mut reader, Path::ZeroCopy, limits)?.run(None, &mut |_| {});
    let (error, took) = (ran.err().context("its slots were filled while they were read")?, start.elapsed());
    let line = error.line();
    note(&format!("after {took:?}: {line}"));
    ensure!(error.kind() == Kind::Timeout && reader.overwritten.is_empty(), "{line}; {:?}", reader.overwritten);
    ensure!(line.matches("waits for the fence of vgem (timeline unbound)").count() == buffers, "{line}");
    // As long as for fences of frames that wait for a device.
    ensure!(took >= 3 * TIMEOUT && took < 3 * TIMEOUT + Duration::from_secs(3), "after {took:?}");
    for signal in reader.open.drain(..) {
        signal.now()?;
    }
    camera.next()?;
    PASSED
}
