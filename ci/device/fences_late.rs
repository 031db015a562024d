//! Fences that signal too late, or never, while a display waits for them: errors in time, nothing lost beside them, and a screen that is
//! as it was, or the kernel's.

use std::collections::BTreeSet;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use dmaflow::endpoint::Sink;
use dmaflow::error::{Error, Kind};
use dmaflow::kms::{Display, DisplayRequest};
use dmaflow::memory::Access;

use crate::crc::{changed_from, crc};
use crate::display::join;
use crate::fences_shown::{
    NOT_YET, WAITS_NOT, camera, fifo_request, lit, mailbox_request, settled, signalled, wait_shown,
};
use crate::harness::{Outcome, PASSED, Test, note};
use crate::modules::Witness;
use crate::process::State;
use crate::vgem::Vgem;

const NEEDS: &[&str] = &["vivid", "vkms", "vgem", "udmabuf"];

pub const TESTS: &[Test] = &[
    Test { name: "fences_late::told_beside_a_failure", needs: NEEDS, seconds: 120, run: told_beside_a_failure },
    Test { name: "fences_late::too_late_in_fifo", needs: NEEDS, seconds: 120, run: too_late_in_fifo },
    Test { name: "fences_late::never_in_fifo", needs: NEEDS, seconds: 120, run: || never(false) },
    Test { name: "fences_late::never_in_the_memory", needs: NEEDS, seconds: 120, run: || never(true) },
    Test { name: "fences_late::too_late_in_mailbox", needs: NEEDS, seconds: 120, run: too_late_in_mailbox },
    Test { name: "fences_late::too_late_at_first", needs: NEEDS, seconds: 120, run: too_late_at_first },
];

const SHORT: Duration = Duration::from_millis(400);

/// An error that names the fence, in time.
fn is_late(error: Option<Error>, start: Instant) -> Result<()> {
    let (error, waited) = (error.context("it was shown")?, start.elapsed());
    let line = error.line();
    ensure!(error.kind() == Kind::Timeout && line.contains("vgem (timeline unbound)"), "{line}");
    // Where a processor is emulated on a busy machine a look may come late.
    let told = line
        .split("has not signalled for ")
        .nth(1)
        .and_then(|rest| rest.split(' ').next());
    let seconds: f64 = told.context(line.clone())?.parse()?;
    ensure!((SHORT.as_secs_f64()..3.4).contains(&seconds), "{line}");
    ensure!(waited < Duration::from_secs_f64(seconds + 3.0), "after {waited:?}: {line}");
    note(&line);
    Ok(())
}

/// The frame is with the kernel, which waits for its fence: the picture of before is back as soon as that has come to an end.
fn too_late_in_fifo() -> anyhow::Result<Outcome> {
    let witness = Witness::new()?;
    let state = State::read();
    for by_cpu in [false, true] {
        let (mut camera, vgem) = (camera()?, Vgem::open()?);
        let request = DisplayRequest { fence_timeout: Some(SHORT), wait_by_cpu: by_cpu, ..fifo_request() };
        let mut display = lit(&mut camera, request)?;
        // The display has sent its last frame, so that nothing is told of but what follows.
        let (fence, signal) = vgem.fence()?;
        let first = camera.next()?.with_acquire_fence(fence);
        let start = Instant::now();
        let error = match by_cpu {
            true => display.present(first).err(),
            false => {
                display.present(first)?;
                display.present(camera.next()?).err()
            }
        };
        is_late(error, start)?;
        let signaller = signal.after(SHORT);
        let start = Instant::now();
        drop(display);
        let restored = start.elapsed();
        note(&format!("the picture was put back in {restored:?}"));
        ensure!(restored < Duration::from_secs(5), "after {restored:?}");
        signalled(signaller)?;
        camera.next()?;
        drop(camera);
        state.is_back()?;
    }
    drop(witness);
    PASSED
}

/// A fence that does not signal while its frame is with the kernel: the display is dropped in time, and what the kernel still reads is
/// left to it.
fn never(implied: bool) -> anyhow::Result<Outcome> {
    let (mut camera, vgem) = (camera()?, Vgem::open()?);
    let request = DisplayRequest { fence_timeout: Some(SHORT), ..fifo_request() };
    let mut display = Display::find("vkms", request)?;
    join(&mut display, &camera)?;
    let frame = settled(&mut camera)?;
    let on_screen = frame.slot();
    display.present(frame)?;
    let before = crc()?;
    let frame = camera.next()?;
    let (slot, dma_buf) = (frame.slot(), frame.buffer().dma_buf(0).context("a dma-buf")?.clone());
    let (fence, signal) = vgem.fence()?;
    if implied {
        fence.import_into(&dma_buf, Access::ReadWrite)?;
        display.present(frame)?;
    } else {
        display.present(frame.with_acquire_fence(fence))?;
    }
    let start = Instant::now();
    let error = display
        .restore()
        .err()
        .context("the picture was put back before its fence had signalled")?;
    ensure!(error.kind() == Kind::Timeout && error.line().contains("vgem (timeline unbound)"), "{}", error.line());
    let patience = start.elapsed();
    ensure!(patience >= 3 * SHORT && patience < 3 * SHORT + WAITS_NOT, "restored after {patience:?}");
    // It has been waited for: not twice.
    let start = Instant::now();
    drop(display);
    let dropped = start.elapsed();
    note(&format!("restored after {patience:?}, dropped after {dropped:?}: {}", error.line()));
    ensure!(dropped < Duration::from_secs(2), "dropped after {dropped:?}");
    let slots = (0..24).map(|_| camera.next().map(|frame| frame.slot()));
    let filled: BTreeSet<_> = slots.collect::<Result<_, _>>()?;
    ensure!(
        !filled.contains(&slot) && !filled.contains(&on_screen),
        "{filled:?} were filled, {on_screen} {slot} are shown"
    );
    ensure!(crc()? == before, "it was shown before its fence had signalled");
    signal.now()?;
    let left = changed_from(before)?;
    // The card is nobody's, and goes on. What is left of the display before is gone from the screen with its next picture; that goes with
    // this process.
    let display = lit(&mut camera, fifo_request())?;
    changed_from(left)?;
    std::mem::forget(display);
    PASSED
}

fn too_late_in_mailbox() -> anyhow::Result<Outcome> {
    let witness = Witness::new()?;
    let state = State::read();
    let (mut camera, vgem) = (camera()?, Vgem::open()?);
    let mut display = lit(&mut camera, DisplayRequest { fence_timeout: Some(SHORT), ..mailbox_request() })?;
    let (fence, _signal) = vgem.fence()?;
    let frame = camera.next()?.with_acquire_fence(fence);
    let start = Instant::now();
    display.present(frame)?;
    let error = loop {
        match display.dispatch() {
            Ok(shown) => ensure!(shown.is_none(), "it was shown"),
            Err(error) => break error,
        }
        ensure!(start.elapsed() < Duration::from_secs(8), "nothing was said for {:?}", start.elapsed());
        sleep(Duration::from_millis(20));
    };
    ensure!(start.elapsed() >= SHORT, "it was given up after {:?}", start.elapsed());
    is_late(Some(error), start)?;
    // It is given up, and the display goes on.
    let frame = camera.next()?;
    let sequence = frame.meta().sequence;
    display.present(frame)?;
    ensure!(wait_shown(&mut display)?.meta.sequence == sequence, "another frame");
    // At the end as well.
    let (fence, _signal) = vgem.fence()?;
    display.present(camera.next()?.with_acquire_fence(fence))?;
    let start = Instant::now();
    is_late(display.finish().err(), start)?;
    ensure!(display.finish()?.is_none(), "it is given up");
    let start = Instant::now();
    drop(display);
    ensure!(start.elapsed() < Duration::from_secs(3), "put back after {:?}", start.elapsed());
    camera.next()?;
    drop(camera);
    state.is_back()?;
    drop(witness);
    PASSED
}

/// Nothing of the screen has changed yet, and nothing does.
fn too_late_at_first() -> anyhow::Result<Outcome> {
    let witness = Witness::new()?;
    let state = State::read();
    for implied in [false, true] {
        let (mut camera, vgem) = (camera()?, Vgem::open()?);
        let mut display = Display::find("vkms", DisplayRequest { fence_timeout: Some(SHORT), ..fifo_request() })?;
        join(&mut display, &camera)?;
        let mut frame = camera.next()?;
        let (fence, _signal) = vgem.fence()?;
        match implied {
            true => fence.import_into(frame.buffer().dma_buf(0).context("a dma-buf")?, Access::ReadWrite)?,
            false => frame = frame.with_acquire_fence(fence),
        }
        let start = Instant::now();
        is_late(display.present(frame).err(), start)?;
        let start = Instant::now();
        drop((display, camera));
        ensure!(start.elapsed() < Duration::from_secs(3), "put back after {:?}", start.elapsed());
        state.is_back()?;
    }
    drop(witness);
    PASSED
}

/// A frame that is given up and one that is shown at the same time are both told of.
fn told_beside_a_failure() -> anyhow::Result<Outcome> {
    let (mut camera, vgem) = (camera()?, Vgem::open()?);
    let mut display = lit(&mut camera, DisplayRequest { fence_timeout: Some(SHORT), ..mailbox_request() })?;
    let frame = camera.next()?;
    let sequence = frame.meta().sequence;
    display.present(frame)?;
    let (fence, _signal) = vgem.fence()?;
    let held = camera.next()?.with_acquire_fence(fence);
    let start = Instant::now();
    let told = display.present(held)?;
    sleep(SHORT + NOT_YET);
    let told = match told {
        Some(told) => told,
        // Both have happened by now.
        None => display.dispatch()?.context("it was not shown")?,
    };
    ensure!(told.meta.sequence == sequence, "frame {} and not {sequence}", told.meta.sequence);
    ensure!(display.acquire_time_left() == Some(Duration::ZERO), "{:?}", display.acquire_time_left());
    is_late(display.dispatch().err(), start)?;
    ensure!(display.dropped() == 1 && display.acquire_time_left().is_none(), "{} dropped", display.dropped());
    // And what comes after is shown.
    let frame = camera.next()?;
    let sequence = frame.meta().sequence;
    display.present(frame)?;
    ensure!(wait_shown(&mut display)?.meta.sequence == sequence, "another frame");
    display.restore()?;
    PASSED
}
