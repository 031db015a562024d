//! Work that fails: what its fence stands for ends with an error, as when a GPU is reset. Here sw_sync's timelines are closed before they
//! have come to the fence.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use dmaflow::endpoint::{Shown, Sink};
use dmaflow::error::Kind;
use dmaflow::kms::{Display, DisplayRequest, Present};
use dmaflow::ladder::Path;
use dmaflow::pipe::{Limits, Pipe};
use nix::libc;

use crate::fences_flow::{Fate, Fenced};
use crate::fences_recovery::told;
use crate::fences_shown::{NOT_YET, camera, fifo_request, lit, signalled, soon_after, wait_shown};
use crate::harness::{Outcome, PASSED, Test, note};
use crate::sw_sync::Timeline;

const NEEDS: &[&str] = &["vivid", "vkms", "sw_sync", "udmabuf", "vgem"];

pub const TESTS: &[Test] = &[
    Test { name: "fences_failed::in_fifo", needs: NEEDS, seconds: 120, run: || by_hand(Present::Fifo) },
    Test { name: "fences_failed::in_mailbox", needs: NEEDS, seconds: 120, run: || by_hand(Present::Mailbox) },
    Test { name: "fences_failed::at_first", needs: NEEDS, seconds: 120, run: at_first },
    Test { name: "fences_failed::released", needs: NEEDS, seconds: 120, run: released },
    Test { name: "fences_failed::one_in_fifo", needs: NEEDS, seconds: 120, run: || one(Present::Fifo) },
    Test { name: "fences_failed::one_in_mailbox", needs: NEEDS, seconds: 120, run: || one(Present::Mailbox) },
    Test { name: "fences_failed::half_in_fifo", needs: NEEDS, seconds: 120, run: || half(Present::Fifo) },
    Test { name: "fences_failed::half_in_mailbox", needs: NEEDS, seconds: 120, run: || half(Present::Mailbox) },
    Test { name: "fences_failed::all_in_fifo", needs: NEEDS, seconds: 120, run: || all(Present::Fifo) },
    Test { name: "fences_failed::all_in_mailbox", needs: NEEDS, seconds: 120, run: || all(Present::Mailbox) },
];

/// How long work takes here, whether it fails or not.
const WORK: Duration = Duration::from_millis(5);

fn by_hand(present: Present) -> anyhow::Result<Outcome> {
    failed(present, false)?;
    failed(present, true)
}

/// The work of a frame's fence has failed: that is told once, with the fence's name, and the display goes on.
fn failed(present: Present, fails: bool) -> anyhow::Result<Outcome> {
    let (mut camera, timeline) = (camera()?, Timeline::open()?);
    let mut display = lit(&mut camera, DisplayRequest { present, ..DisplayRequest::default() })?;
    let fence = timeline.fence(1)?;
    let [first, second, third] = [camera.next()?.with_acquire_fence(fence), camera.next()?, camera.next()?];
    let sequences = [&first, &second, &third].map(|frame| frame.meta().sequence);
    let (mut told, mut failures) = (Vec::new(), Vec::new());
    let mut hear = |answer: dmaflow::Result<Option<Shown>>| match answer {
        Ok(shown) => {
            told.extend(shown.map(|shown| shown.meta.sequence));
            shown.is_some()
        }
        Err(error) => {
            failures.push(error);
            true
        }
    };
    display.present(first)?;
    match fails {
        true => timeline.fail(),
        false => timeline.advance(1)?,
    }
    // Told with the next frame, or with what has been shown, and none of those is lost.
    match present {
        Present::Fifo => hear(display.present(second)),
        Present::Mailbox => hear(display.dispatch()),
    };
    if present == Present::Mailbox {
        // What was submitted comes first, so that the next is not put in its place.
        hear(display.finish());
    }
    hear(display.present(third));
    while hear(display.finish()) {}
    ensure!(failures.len() == usize::from(fails), "{failures:?}");
    for error in failures {
        let line = error.line();
        note(&line);
        ensure!(error.kind() == Kind::System && error.errno() == Some(libc::ENOENT), "{line}");
        // Newer kernels do not tell whose a fence was that has signalled.
        let named = ["sw_sync (timeline ", "a driver that has let go of it"];
        ensure!(named.iter().any(|name| line.contains(name)) && line.contains("has failed"), "{line}");
    }
    let [first, second, third] = sequences;
    let expected = match (present, fails) {
        // The kernel shows it all the same.
        (Present::Fifo, _) => vec![first, second, third],
        (Present::Mailbox, false) => vec![first, third],
        (Present::Mailbox, true) => vec![third],
    };
    ensure!(told == expected, "{told:?} instead of {expected:?}");
    ensure!(display.dropped() == u64::from(fails && present == Present::Mailbox), "{} dropped", display.dropped());
    display.restore()?;
    PASSED
}

/// The first picture is not shown if there is none; the next is the first then.
fn at_first() -> anyhow::Result<Outcome> {
    let (mut camera, timeline) = (camera()?, Timeline::open()?);
    let mut display = Display::find("vkms", fifo_request())?;
    crate::display::join(&mut display, &camera)?;
    let frame = camera.next()?.with_acquire_fence(timeline.fence(1)?);
    let failing = timeline.fail_after(NOT_YET);
    let start = Instant::now();
    let error = display.present(frame).err().context("a picture that is not there was shown")?;
    ensure!(start.elapsed() >= NOT_YET && error.is_of_fence() && error.errno() == Some(libc::ENOENT), "{error:?}");
    signalled(failing)?;
    ensure!(display.dropped() == 1 && display.fence_use().failed == 1, "{:?}", display.fence_use());
    let frame = camera.next()?;
    let sequence = frame.meta().sequence;
    let shown = display.present(frame)?.context("the first frame is on screen when presented")?;
    ensure!(shown.meta.sequence == sequence, "{shown:?}");
    display.restore()?;
    PASSED
}

/// A device whose work has failed does not read the frame any more: the slot is filled again. And a frame that waits in the kernel for such
/// work is shown.
fn released() -> anyhow::Result<Outcome> {
    let (mut camera, timeline) = (camera()?, Timeline::open()?);
    let frame = camera.next()?;
    let slot = frame.slot();
    frame.release_after(timeline.fence(1)?);
    drop(frame);
    let comes =
        |camera: &mut dmaflow::v4l2::Camera| (0..24).any(|_| camera.next().is_ok_and(|frame| frame.slot() == slot));
    ensure!(!comes(&mut camera), "slot {slot} was filled while it is read");
    timeline.fail();
    ensure!(comes(&mut camera), "slot {slot} was lost");
    let timeline = Timeline::open()?;
    let mut display = lit(&mut camera, fifo_request())?;
    let frame = camera.next()?.with_acquire_fence(timeline.fence(1)?);
    let sequence = frame.meta().sequence;
    display.present(frame)?;
    let failing = timeline.fail_after(NOT_YET);
    let shown = wait_shown(&mut display)?;
    ensure!(shown.meta.sequence == sequence, "{shown:?}");
    soon_after(&shown, signalled(failing)?)?;
    display.restore()?;
    PASSED
}

/// One frame's work fails: that is counted and told, and the flow goes on.
fn one(present: Present) -> anyhow::Result<Outcome> {
    const FRAMES: u64 = 30;
    let mut source = Fenced::new(|place| if place == 9 { Fate::Fails(WORK) } else { Fate::After(WORK) })?;
    let mut display = Display::find("vkms", DisplayRequest { present, ..DisplayRequest::default() })?;
    let limits = Limits { frames: Some(FRAMES), duration: None };
    let account = Pipe::join(&mut source, &mut display, Path::ZeroCopy, limits)?.run(None, &mut |_| {})?;
    ensure!(account.captured == FRAMES && account.fences.late == 0, "{account:?}");
    ensure!(account.presented + account.dropped_by_sink == FRAMES, "{account:?}");
    match present {
        // The kernel shows it all the same.
        Present::Fifo => ensure!(account.presented == FRAMES && account.fences.failed == 1, "{account:?}"),
        // Unless a newer one came before.
        Present::Mailbox => ensure!(account.dropped_by_sink > 0 && account.fences.failed <= 1, "{account:?}"),
    }
    let told = told(&account);
    ensure!(told.len() as u64 == account.fences.failed, "{told:?}");
    for told in told {
        note(told);
        ensure!(told.contains("1 so far") && told.contains("has failed"), "{told}");
    }
    display.restore()?;
    PASSED
}

/// Every other frame's work fails, for longer than a flow goes on without one that does not.
fn half(present: Present) -> anyhow::Result<Outcome> {
    const FRAMES: u64 = 90;
    const TIMEOUT: Duration = Duration::from_millis(300);
    let mut source = Fenced::new(|place| if place % 2 == 1 { Fate::Fails(WORK) } else { Fate::After(WORK) })?;
    let request = DisplayRequest { present, fence_timeout: Some(TIMEOUT), ..DisplayRequest::default() };
    let mut display = Display::find("vkms", request)?;
    let limits = Limits { frames: Some(FRAMES), duration: None };
    let account = Pipe::join(&mut source, &mut display, Path::ZeroCopy, limits)?.run(None, &mut |_| {})?;
    ensure!(account.captured == FRAMES && account.duration > 3 * TIMEOUT, "{account:?}");
    ensure!(account.presented + account.dropped_by_sink == FRAMES, "{account:?}");
    match present {
        Present::Fifo => ensure!(account.fences.failed == FRAMES / 2 && account.presented == FRAMES, "{account:?}"),
        Present::Mailbox => {
            ensure!(account.fences.failed > FRAMES / 4 && account.presented > FRAMES / 4, "{account:?}")
        }
    }
    // Not each of them.
    let told = told(&account);
    note(&format!("{} failed, told {} times", account.fences.failed, told.len()));
    ensure!((2..10).contains(&told.len()), "{told:?}");
    display.restore()?;
    PASSED
}

/// From one frame on all work fails: the flow ends, in time, with an error that says so.
fn all(present: Present) -> anyhow::Result<Outcome> {
    const TIMEOUT: Duration = Duration::from_millis(500);
    let mut source = Fenced::new(|place| if place < 9 { Fate::After(WORK) } else { Fate::Fails(WORK) })?;
    let request = DisplayRequest { present, fence_timeout: Some(TIMEOUT), ..DisplayRequest::default() };
    let mut display = Display::find("vkms", request)?;
    let limits = Limits { frames: Some(1000), duration: None };
    let start = Instant::now();
    let ran = Pipe::join(&mut source, &mut display, Path::ZeroCopy, limits)?.run(None, &mut |_| {});
    let (error, took) = (ran.err().context("work that always fails is no failure")?, start.elapsed());
    note(&format!("after {took:?}: {}", error.line()));
    ensure!(error.is_of_fence() && error.errno() == Some(libc::ENOENT), "{}", error.line());
    ensure!(took >= 2 * TIMEOUT && took < 2 * TIMEOUT + Duration::from_secs(4), "after {took:?}");
    display.restore()?;
    PASSED
}
