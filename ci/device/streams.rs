//! Frames as they come from a camera: numbers, leases, the typestate of the queue, what happens when nothing comes.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use dmaflow::endpoint::{Ready, Source};
use dmaflow::error::Kind;
use dmaflow::frame::{Clock, Frame, FrameMeta, Stage};
use dmaflow::v4l2::{Camera, CameraRequest, Device, RateRequest};

use crate::camera::{open, request};
use crate::harness::{Outcome, PASSED, Test, note};
use crate::modules::control;
use crate::process::dma_bufs;

const NEEDS: &[&str] = &["vivid"];

pub const TESTS: &[Test] = &[
    Test { name: "streams::numbers_and_times", needs: NEEDS, seconds: 60, run: numbers_and_times },
    Test { name: "streams::gaps_are_counted", needs: NEEDS, seconds: 60, run: gaps_are_counted },
    Test { name: "streams::numbers_wrap", needs: NEEDS, seconds: 60, run: numbers_wrap },
    Test { name: "streams::damaged_frames_are_queued_again", needs: NEEDS, seconds: 60, run: damaged_frames },
    Test { name: "streams::a_leased_frame_stays_as_it_is", needs: NEEDS, seconds: 60, run: a_leased_frame },
    Test { name: "streams::all_frames_held", needs: NEEDS, seconds: 60, run: all_frames_held },
    Test { name: "streams::frames_outlive_the_camera", needs: NEEDS, seconds: 60, run: frames_outlive },
    Test { name: "streams::stop_and_start", needs: NEEDS, seconds: 60, run: stop_and_start },
    Test { name: "streams::a_failed_allocation", needs: NEEDS, seconds: 60, run: a_failed_allocation },
    Test { name: "streams::drops_at_the_end", needs: NEEDS, seconds: 60, run: drops_at_the_end },
    Test { name: "streams::a_failed_start", needs: NEEDS, seconds: 60, run: a_failed_start },
    Test { name: "streams::a_failed_queueing", needs: NEEDS, seconds: 60, run: a_failed_queueing },
    Test { name: "streams::disconnected", needs: NEEDS, seconds: 60, run: disconnected },
    Test { name: "streams::the_signal_changes", needs: NEEDS, seconds: 60, run: the_signal_changes },
    Test { name: "streams::nothing_blocks", needs: NEEDS, seconds: 60, run: nothing_blocks },
];

fn small() -> Result<Camera> {
    let request = CameraRequest { rate: RateRequest::Exactly(60.0), ..request("XR24", (320, 180)) };
    Ok(Camera::open(Device::find("vivid")?, &request)?)
}

fn now_us() -> u64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).expect("the clock");
    now.tv_sec() as u64 * 1_000_000 + now.tv_nsec() as u64 / 1000
}

fn numbers_and_times() -> anyhow::Result<Outcome> {
    let mut camera = small()?;
    let start = now_us();
    let (mut first, mut last): (Option<FrameMeta>, Option<Frame>) = (None, None);
    let mut repeated = 0;
    for _ in 0..20 {
        let frame = camera.next()?;
        let meta = *frame.meta();
        ensure!(meta.timestamp.clock == Clock::Monotonic, "{meta:?}");
        // vivid stamps the end of the frame that it plays, which may be up to a frame (16.7 ms) ahead.
        ensure!(
            (start..=now_us() + 17_000).contains(&meta.timestamp.us),
            "{meta:?} is not between {start} and {}",
            now_us()
        );
        ensure!(!meta.flags.error && !meta.flags.last, "{meta:?}");
        ensure!(meta.bytes_used[0] == 320 * 180 * 4 && meta.bytes_used[1] == 0, "{meta:?}");
        if let Some(last) = last {
            let last = last.meta();
            // The same number twice, where drawing took vivid longer than a jiffy and it then woke too early (vivid_thread_vid_cap).
            ensure!(meta.sequence >= last.sequence && meta.timestamp.us > last.timestamp.us, "{meta:?} after {last:?}");
            repeated += u64::from(meta.sequence == last.sequence);
        }
        first.get_or_insert(meta);
        last = Some(frame);
    }
    ensure!(repeated <= 4, "{repeated} of 20 numbers came twice");
    // All in all 16.7 ms a frame. Not each: after one that a busy machine delayed the next comes at once.
    let (first, last) = (first.context("no first frame")?, last.context("no last frame")?);
    let frames = u64::from(last.meta().sequence - first.sequence) + repeated;
    let period = (last.meta().timestamp.us - first.timestamp.us) / frames.max(1);
    ensure!((8_000..34_000).contains(&period), "{period} µs a frame, of {frames}");
    PASSED
}

fn gaps_are_counted() -> anyhow::Result<Outcome> {
    let mut camera = small()?;
    camera
        .device()
        .set_control(&camera.device().control("percentage_of_dropped_buffers")?, 50)?;
    let mut missing = 0;
    let mut last = camera.next()?.meta().sequence;
    let before = camera.counts().dropped;
    for _ in 0..40 {
        let sequence = camera.next()?.meta().sequence;
        // The same number twice is none missing; see above.
        missing += u64::from((sequence - last).saturating_sub(1));
        last = sequence;
    }
    let counted = camera.counts().dropped - before;
    ensure!(counted == missing && missing > 5, "{counted} counted, {missing} missing");
    PASSED
}

/// With this control vivid starts 128 frames before the 32 bits are full.
fn numbers_wrap() -> anyhow::Result<Outcome> {
    let request = CameraRequest { rate: RateRequest::Exactly(120.0), buffers: Some(8), ..request("RG16", (320, 180)) };
    let mut camera = Camera::open(Device::find("vivid")?, &request)?;
    camera
        .device()
        .set_control(&camera.device().control("wrap_sequence_number")?, 1)?;
    let first = camera.next()?.meta().sequence;
    ensure!(first > u32::MAX - 256, "it starts at {first}");
    let mut numbers = vec![first];
    while numbers.last().is_some_and(|&last| last >= first) {
        numbers.push(camera.next()?.meta().sequence);
        ensure!(numbers.len() < 400, "it does not wrap");
    }
    let lost: u64 = numbers
        .windows(2)
        .map(|pair| u64::from(pair[1].wrapping_sub(pair[0]).saturating_sub(1)))
        .sum();
    let dropped = camera.counts().dropped;
    ensure!(lost == dropped && lost < 400, "{lost} lost, {dropped} counted: {numbers:?}");
    PASSED
}

fn damaged_frames() -> anyhow::Result<Outcome> {
    let mut camera = small()?;
    let inject = camera.device().control("inject_v4l2_buf_flag_error")?;
    camera.next()?;
    for round in 1..=6_u64 {
        camera.device().set_control(&inject, 1)?;
        let start = Instant::now();
        while camera.counts().errored < round {
            ensure!(!camera.next()?.meta().flags.error, "a damaged frame was handed out");
            ensure!(start.elapsed() < Duration::from_secs(10), "the damaged frame of round {round} was not counted");
        }
    }
    // More were damaged than there are buffers: had one not been queued again, nothing would come by now.
    ensure!(camera.buffers().len() <= 6, "{} buffers", camera.buffers().len());
    for _ in 0..8 {
        camera.next()?;
    }
    ensure!(camera.counts().errored == 6, "{:?}", camera.counts());
    PASSED
}

/// What is leased is not filled again, however many frames pass.
fn a_leased_frame() -> anyhow::Result<Outcome> {
    let mut camera = small()?;
    let held = camera.next()?;
    let picture = |frame: &Frame| -> Result<Vec<u8>> {
        let reader = frame.buffer().read()?;
        let mut rows = vec![0; 320 * 4 * 180];
        rows.chunks_mut(320 * 4)
            .enumerate()
            .for_each(|(y, row)| reader.row(0, y as u32, row));
        Ok(rows)
    };
    let then = picture(&held)?;
    let clone = held.clone();
    drop(held);
    let mut other = false;
    for _ in 0..12 {
        let frame = camera.next()?;
        ensure!(frame.slot() != clone.slot(), "slot {} was filled although it is leased", clone.slot());
        other |= picture(&frame)? != then;
    }
    ensure!(other, "vivid shows the same picture all the time, so this proves nothing");
    ensure!(picture(&clone)? == then, "the leased picture changed");
    ensure!(clone.lease().stage() == Stage::Dequeued, "{:?}", clone.lease());
    let slot = clone.slot();
    drop(clone);
    let back = (0..24)
        .map(|_| camera.next())
        .any(|frame| frame.is_ok_and(|frame| frame.slot() == slot));
    ensure!(back, "slot {slot} did not come back");
    PASSED
}

/// The watchdog's error must say that it is the program's own doing.
fn all_frames_held() -> anyhow::Result<Outcome> {
    let mut camera = small()?;
    camera.set_watchdog(Duration::from_millis(400));
    let count = camera.buffers().len();
    let mut held = Vec::new();
    let start = Instant::now();
    let error = loop {
        match camera.next() {
            Ok(frame) => held.push(frame),
            Err(error) => break error,
        }
        ensure!(held.len() <= count, "{} frames of {count} buffers", held.len());
    };
    ensure!(start.elapsed() >= Duration::from_millis(400), "the watchdog did not wait");
    ensure!(error.kind() == Kind::Timeout, "{error:?}");
    let line = error.line();
    ensure!(line.contains("0.4 s") && line.contains("leased") && line.contains("drop frames"), "{line}");
    note(&line);
    // It is no end: one lease less, and frames come again.
    held.pop();
    camera.next()?;
    PASSED
}

/// A gap is only seen with the frame after it: at the end, what has come is looked at, and what nobody can know is said.
fn drops_at_the_end() -> anyhow::Result<Outcome> {
    let mut camera = small()?;
    let count = camera.buffers().len();
    // Nothing to fill for half a second, then one buffer again, whose frame nobody takes.
    let mut held: Vec<_> = (0..count).map(|_| camera.next()).collect::<Result<_, _>>()?;
    std::thread::sleep(Duration::from_millis(500));
    held.pop();
    held.pop();
    camera.recycle()?;
    std::thread::sleep(Duration::from_millis(100));
    let before = camera.counts();
    camera.stop()?;
    let after = camera.counts();
    ensure!(after.dropped > before.dropped + 10, "{before:?}, then {after:?}");
    ensure!(after.starved - before.starved == after.dropped - before.dropped, "{before:?}, then {after:?}");
    // And nothing to fill until the end.
    drop(held);
    camera.start()?;
    let held: Vec<_> = (0..count).map(|_| camera.next()).collect::<Result<_, _>>()?;
    std::thread::sleep(Duration::from_millis(200));
    camera.stop()?;
    ensure!(camera.counts().uncounted, "{:?}", camera.counts());
    drop((held, camera));
    // Where the driver had buffers all the time there is nothing to say.
    let mut camera = small()?;
    for _ in 0..10 {
        camera.next()?;
    }
    camera.stop()?;
    ensure!(!camera.counts().uncounted, "{:?}", camera.counts());
    PASSED
}

fn frames_outlive() -> anyhow::Result<Outcome> {
    let before = dma_bufs();
    let mut camera = open("XR24", (320, 180))?;
    let frames: Vec<_> = (0..2).map(|_| camera.next()).collect::<Result<_, _>>()?;
    drop(camera);
    ensure!(dma_bufs().difference(&before).count() == 2, "the held buffers alone live on: {:?}", dma_bufs());
    let mut row = [0; 320 * 4];
    frames[1].buffer().read()?.row(0, 90, &mut row);
    ensure!(row.iter().any(|&byte| byte != 0), "the memory of a frame went with its camera");
    // The device is free for the next.
    let mut next = open("XR24", (320, 180))?;
    let frame = next.next()?;
    ensure!(!frames.iter().any(|old| old.buffer().same_memory(frame.buffer())), "old memory in a new queue");
    drop((frames, frame, next));
    ensure!(dma_bufs() == before, "dma-bufs stayed");
    PASSED
}

fn stop_and_start() -> anyhow::Result<Outcome> {
    let mut camera = small()?;
    let before = dma_bufs();
    for round in 0..5 {
        let held = camera.next().with_context(|| format!("round {round}"))?;
        camera.stop()?;
        ensure!(camera.try_next(Ready::FRAME).is_err(), "a stopped camera gave a frame");
        camera.start()?;
        camera.start()?;
        ensure!(camera.next()?.slot() != held.slot(), "a leased slot was queued by the start");
    }
    ensure!(dma_bufs() == before, "starting anew made buffers");
    ensure!(camera.counts().dropped < 50, "{:?}: a number that starts again is no loss", camera.counts());
    PASSED
}

/// Typestate: after a failed step everything can be done as before it.
fn a_failed_allocation() -> anyhow::Result<Outcome> {
    let before = dma_bufs();
    control("inject_vidioc_reqbufs_error=1")?;
    let error = open("XR24", (320, 180)).err().context("it was allocated")?;
    ensure!(error.to_string().contains("allocate buffers"), "{error:?}");
    ensure!(dma_bufs() == before, "dma-bufs of a failed allocation stayed");
    open("XR24", (320, 180))?.next()?;
    PASSED
}

fn a_failed_start() -> anyhow::Result<Outcome> {
    let mut camera = small()?;
    let inodes = dma_bufs();
    for _ in 0..3 {
        camera
            .device()
            .set_control(&camera.device().control("inject_vidioc_streamon_error")?, 1)?;
        let error = camera.start().err().context("it was started")?;
        ensure!(error.step() == "start" && error.subject() == "/dev/video0", "{error:?}");
        ensure!(dma_bufs() == inodes, "the buffers are not the same");
    }
    // The same queue, with the same buffers, starts now.
    let count = camera.buffers().len();
    camera.start()?;
    let slots: std::collections::BTreeSet<_> = (0..3 * count)
        .map(|_| camera.next().map(|frame| frame.slot()))
        .collect::<Result<_, _>>()?;
    ensure!(slots.len() == count, "{} of {count} slots are in use", slots.len());
    PASSED
}

fn a_failed_queueing() -> anyhow::Result<Outcome> {
    let mut camera = small()?;
    let inject = camera.device().control("inject_vidioc_qbuf_error")?;
    camera.device().set_control(&inject, 1)?;
    let error = camera.start().err().context("it was started")?;
    ensure!(error.step() == "queue a buffer of", "{error:?}");
    camera.start()?;
    // In the flow: the error is told, the slot stays free and is queued the next time.
    let count = camera.buffers().len();
    camera.next()?;
    camera.device().set_control(&inject, 1)?;
    let failed = (0..3).any(|_| camera.next().is_err());
    ensure!(failed, "the injected failure of VIDIOC_QBUF was not told");
    let slots: std::collections::BTreeSet<_> = (0..4 * count)
        .map(|_| camera.next().map(|frame| frame.slot()))
        .collect::<Result<_, _>>()?;
    ensure!(slots.len() == count, "{} of {count} slots are in use: one was lost", slots.len());
    PASSED
}

fn disconnected() -> anyhow::Result<Outcome> {
    let before = dma_bufs();
    let mut camera = small()?;
    let held = camera.next()?;
    let disconnect = camera.device().control("disconnect")?;
    camera.device().set_control(&disconnect, 1)?;
    let start = Instant::now();
    let error = loop {
        match camera.next() {
            Ok(_) => ensure!(start.elapsed() < Duration::from_secs(5), "frames come from a camera that is gone"),
            Err(error) => break error,
        }
    };
    ensure!(error.kind() == Kind::Disconnected, "{error:?}");
    note(&error.line());
    // It stays gone, says so each time at once, and what is held can be read.
    let again = camera.next().err().context("a frame from a camera that is gone")?;
    ensure!(start.elapsed() < Duration::from_secs(3) && again.kind() == Kind::Disconnected, "{again:?}");
    held.buffer().read()?.row(0, 0, &mut [0; 64]);
    drop((held, camera));
    ensure!(dma_bufs() == before, "dma-bufs stayed");
    crate::modules::reload()?;
    small()?.next()?;
    PASSED
}

/// Another DV timing at the HDMI input: the driver tells by V4L2_EVENT_SOURCE_CHANGE.
fn the_signal_changes() -> anyhow::Result<Outcome> {
    let device = Device::find("vivid")?;
    device.set_input(3)?;
    let mode = device.control("dv_timings_signal_mode")?;
    let request = CameraRequest { format: Some(crate::camera::format("XR24")), ..CameraRequest::default() };
    let mut camera = Camera::open(device, &request)?;
    camera.next()?;
    // "No Signal", and back to "Current DV Timings".
    camera.device().set_control(&mode, 1)?;
    let start = Instant::now();
    let error = loop {
        match camera.next() {
            Ok(_) => ensure!(start.elapsed() < Duration::from_secs(5), "the loss of the signal was not told"),
            Err(error) => break error,
        }
    };
    camera.device().set_control(&mode, 0)?;
    ensure!(error.kind() == Kind::FormatChanged, "{error:?}");
    ensure!(error.line().contains("signal"), "{error:?}");
    drop(camera);
    PASSED
}

fn nothing_blocks() -> anyhow::Result<Outcome> {
    let request = CameraRequest { rate: RateRequest::Exactly(1.0), ..request("XR24", (320, 180)) };
    let mut camera = Camera::open(Device::find("vivid")?, &request)?;
    camera.start()?;
    camera.next()?;
    let start = Instant::now();
    let mut none = 0;
    for _ in 0..20 {
        none += u32::from(camera.try_next(Ready::FRAME)?.is_none());
    }
    ensure!(none >= 19 && start.elapsed() < Duration::from_millis(500), "{none} of 20 in {:?}", start.elapsed());
    PASSED
}
