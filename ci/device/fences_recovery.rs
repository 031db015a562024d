//! Flows that go on: frames are lost to fences that are late, devices take their time, and an order to stop is heard before the first frame.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use dmaflow::endpoint::{Sink, Source};
use dmaflow::kms::{Display, DisplayRequest, Present};
use dmaflow::ladder::Path;
use dmaflow::pipe::{Account, Limits, Pipe};
use dmaflow::sink::Null;
use dmaflow::v4l2::Camera;

use crate::camera::open;
use crate::crc::{changed_from, crc};
use crate::fences_flow::{Fate, Fenced, Reader, order_to_stop};
use crate::fences_shown::{NOT_YET, camera, camera_with, fifo_request, lit, signalled, soon_after};
use crate::harness::{Outcome, PASSED, Test, note};
use crate::process::State;
use crate::vgem::{Signal, Vgem};

const NEEDS: &[&str] = &["vivid", "vkms", "vgem", "udmabuf"];
const CAMERA: &[&str] = &["vivid", "vgem", "udmabuf"];

pub const TESTS: &[Test] = &[
    Test { name: "fences_recovery::late_in_fifo", needs: NEEDS, seconds: 120, run: || late(Present::Fifo) },
    Test { name: "fences_recovery::late_in_mailbox", needs: NEEDS, seconds: 120, run: || late(Present::Mailbox) },
    Test { name: "fences_recovery::late_at_the_end", needs: NEEDS, seconds: 120, run: late_at_the_end },
    Test { name: "fences_recovery::late_before_a_change", needs: NEEDS, seconds: 120, run: late_before_a_change },
    Test { name: "fences_recovery::held_picture", needs: NEEDS, seconds: 120, run: held_picture },
    Test { name: "fences_recovery::nothing_shown", needs: NEEDS, seconds: 120, run: nothing_shown },
    Test { name: "fences_recovery::one_is_stuck", needs: NEEDS, seconds: 120, run: one_is_stuck },
    Test { name: "fences_recovery::a_slow_reader", needs: CAMERA, seconds: 120, run: a_slow_reader },
    Test { name: "fences_recovery::before_the_start", needs: CAMERA, seconds: 120, run: before_the_start },
];

/// What an account says of frames that were lost to their fences.
pub fn told(account: &Account) -> Vec<&str> {
    let lost = account.moves.iter().map(|step| step.why.as_str());
    lost.filter(|why| why.starts_with("frames whose fences failed or took too long: "))
        .collect()
}

/// A device that is stuck for longer than a fence may take, and then goes on: the frames that were late are lost, counted and told of, and
/// the others are shown.
fn late(present: Present) -> anyhow::Result<Outcome> {
    const TIMEOUT: Duration = Duration::from_secs(1);
    const STUCK: Duration = Duration::from_millis(1600);
    const FROM: u64 = 20;
    const FRAMES: u64 = 60;
    let state = State::read();
    let mut free_at = None;
    let mut source = Fenced::new(move |place| {
        if place < FROM {
            return Fate::Ready;
        }
        let free_at: &mut Instant = free_at.get_or_insert_with(|| Instant::now() + STUCK);
        Fate::After(free_at.saturating_duration_since(Instant::now()).max(Duration::from_millis(10)))
    })?;
    let request = DisplayRequest { present, fence_timeout: Some(TIMEOUT), ..DisplayRequest::default() };
    let mut display = Display::find("vkms", request)?;
    let limits = Limits { frames: Some(FRAMES), duration: None };
    let account = Pipe::join(&mut source, &mut display, Path::ZeroCopy, limits)?.run(None, &mut |_| {})?;
    ensure!(account.captured == FRAMES, "{account:?}");
    ensure!(account.presented + account.dropped_by_sink == FRAMES, "{account:?}");
    ensure!(account.fences.late > 0 && account.fences.failed == 0, "{account:?}");
    match present {
        // The frame that is with the kernel is shown when its fence has signalled; those after it have no place.
        Present::Fifo => {
            ensure!(account.fences.late <= 2 && account.dropped_by_sink == account.fences.late, "{account:?}")
        }
        Present::Mailbox => ensure!(account.dropped_by_sink >= account.fences.late, "{account:?}"),
    }
    let told = told(&account);
    let first = told.first().context("nothing was told")?;
    note(&format!("{} late: {first}", account.fences.late));
    ensure!(first.contains("so far; cannot wait for the fence of vgem (timeline unbound)"), "{told:?}");
    display.restore()?;
    drop((display, source));
    state.is_back()?;
    PASSED
}

/// The last of a number of frames is late: the flow has come to its end, and that frame is told of.
fn late_at_the_end() -> anyhow::Result<Outcome> {
    const TIMEOUT: Duration = Duration::from_millis(500);
    const READY: u64 = 10;
    for present in [Present::Fifo, Present::Mailbox] {
        let mut source = Fenced::stuck_after(READY)?;
        let request = DisplayRequest { present, fence_timeout: Some(TIMEOUT), ..DisplayRequest::default() };
        let mut display = Display::find("vkms", request)?;
        let limits = Limits { frames: Some(READY + 1), duration: None };
        let start = Instant::now();
        let account = Pipe::join(&mut source, &mut display, Path::ZeroCopy, limits)?.run(None, &mut |_| {})?;
        let took = start.elapsed();
        ensure!(took >= TIMEOUT && took < TIMEOUT + Duration::from_secs(3), "after {took:?}");
        ensure!(account.presented + account.dropped_by_sink == account.captured, "{account:?}");
        ensure!(account.fences.late == 1 && told(&account).len() == 1, "{account:?}");
        ensure!(present == Present::Mailbox || account.presented == READY, "{account:?}");
        source.signal_all()?;
        display.restore()?;
    }
    PASSED
}

/// Where the source changes while a fence is late, that frame is waited for, longer than for others: the step cannot be taken before. It is
/// shown, and nothing is lost; or else the flow ends, with an error that names the fence.
fn late_before_a_change() -> anyhow::Result<Outcome> {
    const TIMEOUT: Duration = Duration::from_millis(600);
    const LAST: u64 = 9;
    const FRAMES: u64 = 20;
    for signals in [true, false] {
        let state = State::read();
        let mut source = Fenced::new(move |place| match place {
            LAST if signals => Fate::After(TIMEOUT * 8 / 5),
            LAST => Fate::Never,
            _ => Fate::Ready,
        })?;
        source.changes_at = Some(LAST + 1);
        let mut display =
            Display::find("vkms", DisplayRequest { fence_timeout: Some(TIMEOUT), ..DisplayRequest::default() })?;
        let limits = Limits { frames: Some(FRAMES), duration: None };
        let start = Instant::now();
        let ran = Pipe::join(&mut source, &mut display, Path::ZeroCopy, limits)?.run(None, &mut |_| {});
        let took = start.elapsed();
        if signals {
            let account = ran?;
            ensure!(account.captured == FRAMES && account.presented == FRAMES, "{account:?}");
            ensure!(account.fences.late == 0 && account.fences.by_device == 1, "{account:?}");
            let changed = account.moves.iter().filter(|step| step.why.starts_with("the source changed"));
            ensure!(changed.count() == 1 && told(&account).is_empty(), "{:?}", account.moves);
        } else {
            let error = ran.err().context("the change was followed before its fence had signalled")?;
            ensure!(error.is_of_fence() && error.line().contains("vgem (timeline unbound)"), "{}", error.line());
            ensure!(took >= 3 * TIMEOUT && took < 3 * TIMEOUT + Duration::from_secs(3), "after {took:?}");
        }
        source.signal_all()?;
        display.restore()?;
        drop((display, source));
        state.is_back()?;
    }
    PASSED
}

/// The picture is kept when the frame that is on its way has come, for whose fence that waits: in time.
fn held_picture() -> anyhow::Result<Outcome> {
    const TIMEOUT: Duration = Duration::from_millis(800);
    let (mut camera, vgem) = (camera()?, Vgem::open()?);
    let mut display = lit(&mut camera, DisplayRequest { fence_timeout: Some(TIMEOUT), ..fifo_request() })?;
    let (fence, signal) = vgem.fence()?;
    let frame = camera.next()?.with_acquire_fence(fence);
    let sequence = frame.meta().sequence;
    let before = crc()?;
    display.present(frame)?;
    let start = Instant::now();
    let error = display
        .hold()
        .err()
        .context("the picture was kept before the frame on its way had come")?;
    let waited = start.elapsed();
    ensure!(error.is_of_fence() && error.line().contains("vgem (timeline unbound)"), "{}", error.line());
    ensure!(waited >= TIMEOUT && waited < TIMEOUT + Duration::from_secs(3), "after {waited:?}");
    ensure!(crc()? == before, "it was shown before its fence had signalled");
    let signaller = signal.after(NOT_YET);
    let shown = display.finish()?.context("it was given up")?;
    ensure!(shown.meta.sequence == sequence && display.finish()?.is_none(), "{shown:?}");
    soon_after(&shown, signalled(signaller)?)?;
    let picture = changed_from(before)?;
    display.hold()?;
    ensure!(crc()? == picture, "another picture was kept");
    // The source's memory is not on screen any more: every slot is filled again.
    let slots: BTreeSet<_> = (0..3 * camera.buffers().len())
        .map(|_| camera.next().map(|frame| frame.slot()))
        .collect::<Result<_, _>>()?;
    ensure!(slots.len() == camera.buffers().len(), "only {slots:?} came back");
    display.restore()?;
    PASSED
}

/// A flow that has shown nothing, because no fence has signalled, has failed however few frames were asked for.
fn nothing_shown() -> anyhow::Result<Outcome> {
    const TIMEOUT: Duration = Duration::from_millis(500);
    let mut source = Fenced::stuck_after(0)?;
    let mut display =
        Display::find("vkms", DisplayRequest { fence_timeout: Some(TIMEOUT), ..DisplayRequest::default() })?;
    let limits = Limits { frames: Some(1), duration: None };
    let start = Instant::now();
    let ran = Pipe::join(&mut source, &mut display, Path::ZeroCopy, limits)?.run(None, &mut |_| {});
    let error = ran.err().context("nothing was shown, and that is no failure")?;
    ensure!(error.is_of_fence() && error.line().contains("vgem (timeline unbound)"), "{}", error.line());
    ensure!(start.elapsed() < TIMEOUT + Duration::from_secs(3), "after {:?}", start.elapsed());
    source.signal_all()?;
    PASSED
}

/// With as many buffers as a camera has by default, one of them kept by a fence that does not signal, a mailbox goes on showing what is
/// newer: also where each of those takes as long as the camera for a frame, or longer.
fn one_is_stuck() -> anyhow::Result<Outcome> {
    const FRAMES: u64 = 40;
    const STUCK: u64 = 3;
    for time in [0, 15, 25, 60].map(Duration::from_millis) {
        let camera = open("XR24", (640, 360))?;
        let buffers = camera.buffers().len();
        let mut source = Fenced::of(camera, move |place| match place {
            STUCK => Fate::Never,
            _ if time.is_zero() => Fate::Ready,
            _ => Fate::After(time),
        })?;
        let request = DisplayRequest { present: Present::Mailbox, ..DisplayRequest::default() };
        let mut display = Display::find("vkms", request)?;
        let limits = Limits { frames: Some(FRAMES), duration: None };
        // When each frame was shown, by its time stamp.
        let mut shown = BTreeMap::new();
        let account = Pipe::join(&mut source, &mut display, Path::ZeroCopy, limits)?.run(None, &mut |told| {
            shown.extend(told.latency_us.map(|latency| (told.at_us - latency, told.at_us)));
        })?;
        ensure!(account.captured == FRAMES, "{time:?}: {account:?}");
        ensure!(account.presented + account.dropped_by_sink == FRAMES, "{time:?}: {account:?}");
        ensure!(account.fences.late == 0 && account.presented >= FRAMES / 3, "{time:?}: {account:?}");
        let times: Vec<_> = shown.values().copied().collect();
        let longest = times.windows(2).map(|pair| pair[1].saturating_sub(pair[0])).max();
        let longest = Duration::from_micros(longest.context("one frame")?);
        note(&format!(
            "{buffers} buffers, fences of {time:?}: {} shown, {} dropped by the camera, {longest:?} between two at most",
            account.presented, account.lost.dropped
        ));
        ensure!(times.is_sorted() && longest < Duration::from_secs(2), "{time:?}: {longest:?} between two");
        source.signal_all()?;
        display.restore()?;
    }
    PASSED
}

/// A device that reads every frame for longer than the camera's watchdog waits, and not for longer than a fence may take: no stall.
fn a_slow_reader() -> anyhow::Result<Outcome> {
    const FRAMES: u64 = 12;
    let mut camera = camera_with(4)?;
    camera.set_watchdog(Duration::from_millis(300));
    let mut reader = Reader::new(Some(Duration::from_millis(900)))?;
    let limits = Limits { frames: Some(FRAMES), duration: None };
    let account = Pipe::join(&mut camera, &mut reader, Path::ZeroCopy, limits)?.run(None, &mut |_| {})?;
    ensure!(account.captured == FRAMES && account.presented == FRAMES, "{account:?}");
    reader.has_not_been_overwritten()?;
    PASSED
}

/// A camera of which devices still read every buffer, and which has not started: the signals to come.
fn all_read(vgem: &std::sync::Arc<Vgem>) -> Result<(Camera, Vec<Signal>)> {
    let mut camera = camera_with(2)?;
    let mut signals = Vec::new();
    let frames = (0..camera.buffers().len())
        .map(|_| camera.next())
        .collect::<dmaflow::Result<Vec<_>>>()?;
    for frame in frames {
        let (fence, signal) = vgem.fence()?;
        frame.release_after(fence);
        signals.push(signal);
    }
    camera.stop()?;
    ensure!(camera.starves() && camera.release_fences().len() == signals.len(), "{:?}", camera.release_fences());
    Ok((camera, signals))
}

/// While a source waits for its first buffer an order to stop is heard, and the end of the time; a signal starts it.
fn before_the_start() -> anyhow::Result<Outcome> {
    const AFTER: Duration = Duration::from_millis(600);
    let vgem = Vgem::open()?;
    for duration in [None, Some(AFTER)] {
        let (mut camera, signals) = all_read(&vgem)?;
        let (order, orderer) = order_to_stop(duration.is_none().then_some(AFTER))?;
        let start = Instant::now();
        let limits = Limits { frames: None, duration };
        let mut sink = Null::new();
        let pipe = Pipe::join(&mut camera, &mut sink, Path::Auto, limits)?;
        let account = pipe.run(Some(order.as_fd()), &mut |_| {})?;
        let took = start.elapsed();
        ensure!(took >= AFTER && took < AFTER + Duration::from_secs(3), "{duration:?}: after {took:?}");
        ensure!(account.captured == 0, "{account:?}");
        drop(orderer.join().expect("no panic"));
        for signal in signals {
            signal.now()?;
        }
        camera.next()?;
    }
    let (mut camera, mut signals) = all_read(&vgem)?;
    let signaller = signals.pop().context("no signal")?.after(AFTER);
    let mut sink = Null::new();
    let limits = Limits { frames: Some(3), duration: None };
    let start = Instant::now();
    let account = Pipe::join(&mut camera, &mut sink, Path::Auto, limits)?.run(None, &mut |_| {})?;
    ensure!(start.elapsed() >= AFTER && account.presented == 3, "after {:?}: {account:?}", start.elapsed());
    signalled(signaller)?;
    PASSED
}
