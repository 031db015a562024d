//! Frames with acquire fences on a display: none is shown before its fence has signalled, and then it is at once.

use std::os::fd::AsFd;
use std::thread::{JoinHandle, sleep};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use dmaflow::endpoint::{Shown, Sink, Source};
use dmaflow::fence::{CpuWait, FenceState};
use dmaflow::frame::Frame;
use dmaflow::kms::{Display, DisplayRequest, Present};
use dmaflow::memory::Access;
use dmaflow::v4l2::{Camera, CameraRequest, Device};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::camera::request;
use crate::crc::{changed_from, crc};
use crate::display::join;
use crate::harness::{Outcome, PASSED, Test, note};
use crate::vgem::{Vgem, now_us};

const NEEDS: &[&str] = &["vivid", "vkms", "vgem", "udmabuf"];

pub const TESTS: &[Test] = &[
    Test { name: "fences_shown::fifo", needs: NEEDS, seconds: 120, run: || fifo(None) },
    Test { name: "fences_shown::fifo_by_the_cpu", needs: NEEDS, seconds: 120, run: || fifo(Some(CpuWait::Asked)) },
    Test {
        name: "fences_shown::fifo_with_few_buffers",
        needs: NEEDS,
        seconds: 120,
        run: || fifo(Some(CpuWait::Buffers)),
    },
    Test { name: "fences_shown::fifo_several", needs: NEEDS, seconds: 120, run: fifo_several },
    Test { name: "fences_shown::first_frame", needs: NEEDS, seconds: 120, run: first_frame },
    Test { name: "fences_shown::mailbox", needs: NEEDS, seconds: 120, run: mailbox },
    Test { name: "fences_shown::mailbox_is_not_blocked", needs: NEEDS, seconds: 120, run: mailbox_is_not_blocked },
    Test { name: "fences_shown::mailbox_at_the_end", needs: NEEDS, seconds: 120, run: mailbox_at_the_end },
    Test { name: "fences_shown::implicit", needs: NEEDS, seconds: 120, run: implicit },
    Test { name: "fences_shown::out_fences", needs: NEEDS, seconds: 120, run: out_fences },
];

/// As long as nothing must happen: many refreshes of the display.
pub const NOT_YET: Duration = Duration::from_millis(300);

/// What a call that waits for no fence may take where a processor is emulated on a busy machine: less than any fence is waited for.
pub const WAITS_NOT: Duration = Duration::from_secs(3);

/// What "at once" may be where a processor is emulated on a busy machine, in µs.
const AT_ONCE_US: u64 = 1_500_000;

/// A picture's time may be that of the vertical blank just before the signal was seen, in µs.
pub const REFRESH_US: u64 = 20_000;

pub fn camera() -> Result<Camera> {
    camera_with(8)
}

pub fn camera_with(buffers: u32) -> Result<Camera> {
    let request = CameraRequest { buffers: Some(buffers), ..request("XR24", (640, 360)) };
    Ok(Camera::open(Device::find("vivid")?, &request)?)
}

/// A frame of a camera that has just started, with another picture than each that comes after it: vivid gives its first twice now and then,
/// the same to the bit.
pub fn settled(camera: &mut Camera) -> Result<Frame> {
    let first = camera.next()?.meta().sequence;
    loop {
        let frame = camera.next()?;
        if frame.meta().sequence != first {
            return Ok(frame);
        }
    }
}

/// A display that shows a frame of the camera, and has shown none before.
pub fn lit(camera: &mut Camera, request: DisplayRequest) -> Result<Display> {
    let mut display = Display::find("vkms", request)?;
    join(&mut display, camera)?;
    ensure!(display.present(settled(camera)?)?.is_some(), "the first frame is on screen when presented");
    Ok(display)
}

pub fn fifo_request() -> DisplayRequest {
    DisplayRequest { present: Present::Fifo, ..DisplayRequest::default() }
}

pub fn mailbox_request() -> DisplayRequest {
    DisplayRequest { present: Present::Mailbox, ..DisplayRequest::default() }
}

/// Waits for the next frame on screen as a program's own loop does: for the display's descriptor and the fences that it holds.
pub fn wait_shown(display: &mut Display) -> Result<Shown> {
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(8) {
        let fences = display.acquire_fences();
        let fds = std::iter::once(display.as_fd()).chain(fences);
        let mut fds: Vec<_> = fds.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
        let left = display.acquire_time_left().unwrap_or(Duration::from_secs(2));
        poll(&mut fds, PollTimeout::try_from(left)?)?;
        drop(fds);
        if let Some(shown) = display.dispatch()? {
            return Ok(shown);
        }
    }
    anyhow::bail!("no frame came on screen for {:?}", start.elapsed())
}

pub fn soon_after(shown: &Shown, signalled_us: u64) -> Result<()> {
    let range = signalled_us.saturating_sub(REFRESH_US)..signalled_us + AT_ONCE_US;
    ensure!(range.contains(&shown.at_us), "shown at {}, signalled at {signalled_us}", shown.at_us);
    note(&format!("shown {} µs after the signal", shown.at_us.cast_signed() - signalled_us.cast_signed()));
    Ok(())
}

/// How many fences the device has waited for, how many the CPU, and why.
pub fn waits(display: &Display) -> (u64, u64, Option<CpuWait>) {
    let fences = display.fence_use();
    (fences.by_device, fences.by_cpu, fences.why)
}

/// A signal that comes while something else waits for it.
pub fn signalled(signaller: JoinHandle<Result<u64>>) -> Result<u64> {
    signaller.join().expect("no panic")
}

/// The device waits for the fence, or the CPU does: because it was asked to, or because each commit itself waits, on a display that reads
/// late and has too few buffers to hold one frame more.
fn fifo(by_cpu: Option<CpuWait>) -> anyhow::Result<Outcome> {
    let buffers = if by_cpu == Some(CpuWait::Buffers) { 3 } else { 8 };
    let (mut camera, vgem) = (camera_with(buffers)?, Vgem::open()?);
    ensure!(camera.buffers().len() == buffers as usize, "{} buffers", camera.buffers().len());
    let mut display =
        lit(&mut camera, DisplayRequest { wait_by_cpu: by_cpu == Some(CpuWait::Asked), ..fifo_request() })?;
    let before = crc()?;
    let (fence, signal) = vgem.fence()?;
    let frame = camera.next()?.with_acquire_fence(fence);
    let sequence = frame.meta().sequence;
    let start = Instant::now();
    // A commit that waits may be told of at once.
    let mut told = None;
    let signalled_us = if by_cpu.is_some() {
        let signaller = signal.after(NOT_YET);
        told = display.present(frame)?;
        ensure!(start.elapsed() >= NOT_YET, "presented after {:?}", start.elapsed());
        signalled(signaller)?
    } else {
        display.present(frame)?;
        ensure!(start.elapsed() < WAITS_NOT, "presenting waited for {:?}", start.elapsed());
        sleep(NOT_YET);
        ensure!(crc()? == before && display.dispatch()?.is_none(), "it was shown before its fence had signalled");
        let at_us = now_us()?;
        signal.now()?;
        at_us
    };
    let shown = match told {
        Some(shown) => shown,
        None => wait_shown(&mut display)?,
    };
    ensure!(shown.meta.sequence == sequence, "frame {} and not {sequence}", shown.meta.sequence);
    soon_after(&shown, signalled_us)?;
    changed_from(before)?;
    let expected = match by_cpu {
        Some(_) => (0, 1, by_cpu),
        None => (1, 0, None),
    };
    ensure!(waits(&display) == expected, "{:?}", display.fence_use());
    display.restore()?;
    PASSED
}

/// Frame after frame, with a fence and without: each in its turn, none before its fence.
fn fifo_several() -> anyhow::Result<Outcome> {
    let (mut camera, vgem) = (camera()?, Vgem::open()?);
    let mut display = lit(&mut camera, fifo_request())?;
    let (mut sent, mut told, mut times) = (Vec::new(), Vec::new(), Vec::new());
    for index in 0..12 {
        let mut frame = camera.next()?;
        if index % 3 != 2 {
            let (fence, signal) = vgem.fence()?;
            frame = frame.with_acquire_fence(fence);
            times.push((frame.meta().sequence, signal.after(Duration::from_millis(60))));
        }
        sent.push(frame.meta().sequence);
        told.extend(display.present(frame)?);
    }
    while let Some(shown) = display.finish()? {
        told.push(shown);
    }
    let sequences: Vec<_> = told.iter().map(|shown| shown.meta.sequence).collect();
    ensure!(sequences == sent, "{sequences:?} instead of {sent:?}");
    for (sequence, signaller) in times {
        let at_us = signalled(signaller)?;
        let shown = told
            .iter()
            .find(|shown| shown.meta.sequence == sequence)
            .context("it was told of")?;
        soon_after(shown, at_us)?;
    }
    ensure!(waits(&display) == (8, 0, None), "{:?}", display.fence_use());
    display.restore()?;
    PASSED
}

fn first_frame() -> anyhow::Result<Outcome> {
    let (mut camera, vgem) = (camera()?, Vgem::open()?);
    let mut display = Display::find("vkms", fifo_request())?;
    join(&mut display, &camera)?;
    // One fence that it carries, and one that is in its memory.
    let [(fence, carried), (other, implied)] = [vgem.fence()?, vgem.fence()?];
    let frame = camera.next()?.with_acquire_fence(fence);
    let dma_buf = frame.buffer().dma_buf(0).context("a dma-buf")?;
    other.import_into(dma_buf, Access::ReadWrite)?;
    let (first, last) = (carried.after(NOT_YET), implied.after(2 * NOT_YET));
    let shown = display.present(frame)?.context("the first frame is on screen when presented")?;
    signalled(first)?;
    soon_after(&shown, signalled(last)?)?;
    ensure!(display.fence_use().why == Some(CpuWait::First), "{:?}", display.fence_use());
    display.restore()?;
    PASSED
}

fn mailbox() -> anyhow::Result<Outcome> {
    let (mut camera, vgem) = (camera()?, Vgem::open()?);
    let mut display = lit(&mut camera, mailbox_request())?;
    let before = crc()?;
    let (fence, signal) = vgem.fence()?;
    let frame = camera.next()?.with_acquire_fence(fence);
    let sequence = frame.meta().sequence;
    let start = Instant::now();
    ensure!(display.present(frame)?.is_none() && start.elapsed() < WAITS_NOT, "presenting waited");
    ensure!(display.acquire_fences().len() == 1 && !display.wants_event(), "{:?}", display.acquire_fences());
    sleep(NOT_YET);
    ensure!(display.dispatch()?.is_none() && crc()? == before, "it was shown before its fence had signalled");
    let signaller = signal.after(NOT_YET);
    let shown = wait_shown(&mut display)?;
    ensure!(shown.meta.sequence == sequence, "frame {} and not {sequence}", shown.meta.sequence);
    soon_after(&shown, signalled(signaller)?)?;
    changed_from(before)?;
    ensure!(display.acquire_fences().is_empty(), "{:?}", display.acquire_fences());
    ensure!(waits(&display) == (0, 1, Some(CpuWait::Mailbox)), "one fence");
    // At the end what is held is waited for.
    let (fence, signal) = vgem.fence()?;
    let frame = camera.next()?.with_acquire_fence(fence);
    let sequence = frame.meta().sequence;
    display.present(frame)?;
    let signaller = signal.after(NOT_YET);
    let shown = display.finish()?.context("it was given up")?;
    ensure!(shown.meta.sequence == sequence && display.finish()?.is_none(), "{shown:?}");
    soon_after(&shown, signalled(signaller)?)?;
    ensure!(display.dropped() == 0, "{} dropped", display.dropped());
    display.restore()?;
    PASSED
}

/// A frame that is ready goes before an older one that is not; the older one's slot is kept until its writer is done.
fn mailbox_is_not_blocked() -> anyhow::Result<Outcome> {
    let (mut camera, vgem) = (camera()?, Vgem::open()?);
    let mut display = lit(&mut camera, mailbox_request())?;
    let (fence, signal) = vgem.fence()?;
    let held = camera.next()?.with_acquire_fence(fence);
    let slot = held.slot();
    display.present(held)?;
    let newer = camera.next()?;
    let sequence = newer.meta().sequence;
    display.present(newer)?;
    let shown = wait_shown(&mut display)?;
    ensure!(shown.meta.sequence == sequence && display.dropped() == 1, "{shown:?}, {} dropped", display.dropped());
    ensure!(display.acquire_fences().is_empty(), "the dropped one is held on");
    let again = (0..24).any(|_| camera.next().is_ok_and(|frame| frame.slot() == slot));
    ensure!(!again, "slot {slot} was filled while another device writes there");
    signal.now()?;
    let again = (0..24).any(|_| camera.next().is_ok_and(|frame| frame.slot() == slot));
    ensure!(again, "slot {slot} was lost");
    // Of many that are not ready each is shown when it is, unless a newer one was before.
    let mut signals = Vec::new();
    for _ in 0..4 {
        let (fence, signal) = vgem.fence()?;
        let frame = camera.next()?.with_acquire_fence(fence);
        signals.push((frame.meta().sequence, signal));
        display.present(frame)?;
    }
    ensure!(display.acquire_fences().len() == 4 && display.dropped() == 1, "{} dropped", display.dropped());
    let (newest, last) = signals.pop().context("the newest")?;
    let mut rest = signals.into_iter();
    let (first, signal) = rest.next().context("the oldest")?;
    signal.now()?;
    let shown = wait_shown(&mut display)?;
    ensure!(shown.meta.sequence == first, "frame {} and not {first}", shown.meta.sequence);
    ensure!(display.acquire_fences().len() == 3 && display.dropped() == 1, "{} dropped", display.dropped());
    last.now()?;
    let shown = wait_shown(&mut display)?;
    ensure!(shown.meta.sequence == newest, "frame {} and not {newest}", shown.meta.sequence);
    ensure!(display.acquire_fences().is_empty() && display.dropped() == 3, "{} dropped", display.dropped());
    display.restore()?;
    PASSED
}

/// At the end what is held is waited for, whichever is ready first: one that is stuck is not in the way of a newer one.
fn mailbox_at_the_end() -> anyhow::Result<Outcome> {
    let (mut camera, vgem) = (camera()?, Vgem::open()?);
    let mut display = lit(&mut camera, mailbox_request())?;
    let [(stuck, _signal), (fence, signal)] = [vgem.fence()?, vgem.fence()?];
    display.present(camera.next()?.with_acquire_fence(stuck))?;
    let newer = camera.next()?.with_acquire_fence(fence);
    let sequence = newer.meta().sequence;
    display.present(newer)?;
    let signaller = signal.after(NOT_YET);
    let start = Instant::now();
    let shown = display.finish()?.context("the newer was given up")?;
    ensure!(shown.meta.sequence == sequence && start.elapsed() < WAITS_NOT, "{shown:?} after {:?}", start.elapsed());
    soon_after(&shown, signalled(signaller)?)?;
    ensure!(display.finish()?.is_none() && display.dropped() == 1, "{} dropped", display.dropped());
    display.restore()?;
    PASSED
}

/// Fences that are in the memory alone are the kernel's affair, which waits for them by itself.
fn implicit() -> anyhow::Result<Outcome> {
    let (mut camera, vgem) = (camera()?, Vgem::open()?);
    let mut display = lit(&mut camera, fifo_request())?;
    for explicit in [false, true] {
        let mut frame = camera.next()?;
        let sequence = frame.meta().sequence;
        let signal = vgem.attach(frame.buffer().dma_buf(0).context("a dma-buf")?, true)?;
        if explicit {
            frame = frame.with_implicit_fences()?;
        }
        let now = crc()?;
        display.present(frame)?;
        sleep(NOT_YET);
        ensure!(crc()? == now && display.dispatch()?.is_none(), "it was shown while its memory was written");
        let at_us = now_us()?;
        signal.now()?;
        let shown = wait_shown(&mut display)?;
        soon_after(&shown, at_us)?;
        ensure!(shown.meta.sequence == sequence, "frame {} and not {sequence}", shown.meta.sequence);
        changed_from(now).with_context(|| format!("explicit {explicit}, frame {sequence}"))?;
        ensure!(display.fence_use().by_device == u64::from(explicit), "{:?}", display.fence_use());
    }
    display.restore()?;
    PASSED
}

fn out_fences() -> anyhow::Result<Outcome> {
    let (mut camera, vgem) = (camera()?, Vgem::open()?);
    for present in [Present::Fifo, Present::Mailbox] {
        let mut display = lit(&mut camera, DisplayRequest { present, out_fences: true, ..DisplayRequest::default() })?;
        ensure!(display.take_out_fence().is_none(), "the first frame has none");
        for round in 0..4 {
            let frame = camera.next()?;
            let sequence = frame.meta().sequence;
            display.present(frame)?;
            let (of, done) = display.take_out_fence().context("no fence")?;
            ensure!(of.sequence == sequence, "of frame {} and not {sequence}", of.sequence);
            ensure!(display.take_out_fence().is_none(), "taken twice");
            done.wait(Duration::from_secs(5))?;
            let shown = wait_shown(&mut display)?;
            let at_us = done.fences()?[0].signalled_at_ns.context("no time")? / 1000;
            // The signal is made from the vertical blank, whose time the event carries (drm_send_event_timestamp_locked).
            ensure!(at_us.abs_diff(shown.at_us) < AT_ONCE_US, "round {round}: fence {at_us}, event {}", shown.at_us);
        }
        if present == Present::Fifo {
            // With an open acquire fence it stays open.
            let (fence, signal) = vgem.fence()?;
            display.present(camera.next()?.with_acquire_fence(fence))?;
            let (_, done) = display.take_out_fence().context("no fence")?;
            ensure!(done.wait(NOT_YET).is_err() && done.state()? == FenceState::Active, "{done}");
            signal.now()?;
            done.wait(Duration::from_secs(5))?;
        } else {
            // It is of the frame submitted, which is not the one presented if that is held back.
            let frame = camera.next()?;
            let submitted = frame.meta().sequence;
            display.present(frame)?;
            let (fence, _signal) = vgem.fence()?;
            display.present(camera.next()?.with_acquire_fence(fence))?;
            let (of, _) = display.take_out_fence().context("no fence")?;
            ensure!(of.sequence == submitted, "of frame {} and not {submitted}", of.sequence);
            ensure!(display.take_out_fence().is_none(), "of a frame that is held back");
            display.give_up();
            while display.finish()?.is_some() {}
        }
        // One that nobody has taken is not that of a first frame.
        display.present(camera.next()?)?;
        while display.finish()?.is_some() {}
        join(&mut display, &camera)?;
        display.present(camera.next()?)?;
        ensure!(display.take_out_fence().is_none(), "{present:?}: that of a frame long gone");
        display.restore()?;
    }
    let mut display = lit(&mut camera, fifo_request())?;
    display.present(camera.next()?)?;
    ensure!(display.take_out_fence().is_none(), "nobody asked for one");
    display.restore()?;
    PASSED
}
