//! Fences with faults that no driver here has, and that strace makes: a driver that refuses `IN_FENCE_FD`, and work that fails.

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use dmaflow::endpoint::{Shown, Sink};
use dmaflow::error::Kind;
use dmaflow::fence::{CpuWait, FenceUse};
use dmaflow::kms::{Display, DisplayRequest, Present};
use dmaflow::ladder::Path;
use dmaflow::pipe::{Limits, Pipe};
use nix::libc;

use crate::fences_flow::{Fate, Fenced};
use crate::fences_recovery::told;
use crate::fences_shown::{NOT_YET, camera, fifo_request, lit, signalled, soon_after};
use crate::harness::{Outcome, PASSED, Test, note};
use crate::process::finish;
use crate::vgem::Vgem;

const NEEDS: &[&str] = &["vivid", "vkms", "vgem", "udmabuf", "strace"];
const REFUSED: &str = "fences_faults::refused_by_the_driver";
const FAILED_IN_FIFO: &str = "fences_faults::failed_in_fifo";
const FAILED_IN_MAILBOX: &str = "fences_faults::failed_in_mailbox";
const ONE_IN_FIFO: &str = "fences_faults::one_fails_in_a_flow_in_fifo";
const ONE_IN_MAILBOX: &str = "fences_faults::one_fails_in_a_flow_in_mailbox";
const ALL_IN_FIFO: &str = "fences_faults::all_fail_in_a_flow_in_fifo";
const ALL_IN_MAILBOX: &str = "fences_faults::all_fail_in_a_flow_in_mailbox";

pub const TESTS: &[Test] = &[
    Test { name: REFUSED, needs: NEEDS, seconds: 240, run: refused_by_the_driver },
    Test { name: FAILED_IN_FIFO, needs: NEEDS, seconds: 240, run: || failed(FAILED_IN_FIFO, Present::Fifo) },
    Test { name: FAILED_IN_MAILBOX, needs: NEEDS, seconds: 240, run: || failed(FAILED_IN_MAILBOX, Present::Mailbox) },
    Test { name: ONE_IN_FIFO, needs: NEEDS, seconds: 240, run: || flow(ONE_IN_FIFO, Present::Fifo, false) },
    Test { name: ONE_IN_MAILBOX, needs: NEEDS, seconds: 240, run: || flow(ONE_IN_MAILBOX, Present::Mailbox, false) },
    Test { name: ALL_IN_FIFO, needs: NEEDS, seconds: 240, run: || flow(ALL_IN_FIFO, Present::Fifo, true) },
    Test { name: ALL_IN_MAILBOX, needs: NEEDS, seconds: 240, run: || flow(ALL_IN_MAILBOX, Present::Mailbox, true) },
];

/// Set for the process that strace runs, to `fault` or `none`.
const UNDER_STRACE: &str = "DMAFLOW_TEST_FENCE";

/// Whether this process is the one that strace runs, and whether it meets the fault there.
fn under_strace() -> Option<bool> {
    std::env::var(UNDER_STRACE).ok().map(|how| how == "fault")
}

/// A fence's state as its driver tells it where the work has failed: in `struct sync_file_info` it comes after 32 bytes of a name, here
/// -EIO.
fn has_failed() -> String {
    format!("poke_exit=@arg3={}fbffffff", "00".repeat(32))
}

/// Runs this test under strace twice: once to find, among its ioctls, the one to tamper with, and once with the fault there.
fn with_fault(test: &str, find: fn(&[String]) -> Option<usize>, fault: &str) -> anyhow::Result<Outcome> {
    let log = format!("/tmp/strace-fence.{}", std::process::id());
    let run = |how: &str, inject: &[String]| -> Result<String> {
        let mut command = Command::new("strace");
        command.args(["-e", "trace=ioctl", "-o", &log]).args(inject);
        command
            .arg(std::env::current_exe()?)
            .args(["--run-one", test])
            .env(UNDER_STRACE, how);
        finish(&mut command)?.has_status(0)?;
        Ok(fs::read_to_string(&log)?)
    };
    let ioctls = |log: &str| -> Vec<String> {
        let calls = log.lines().filter(|line| line.starts_with("ioctl("));
        calls.map(str::to_owned).collect()
    };
    let plain = ioctls(&run("none", &[])?);
    let place = find(&plain).context("strace saw no such call")?;
    let fault = format!("inject=ioctl:{fault}:when={}", place + 1);
    let tampered = ioctls(&run("fault", &["-e".to_owned(), fault])?);
    fs::remove_file(&log)?;
    let tampered = tampered.get(place).context("the other run made fewer calls")?;
    // The same call by its name, which comes after the descriptor.
    let name = |line: &str| line.split([',', '(']).nth(2).map(str::to_owned);
    ensure!(name(tampered) == name(&plain[place]), "another call met the fault: {tampered}");
    note(tampered);
    PASSED
}

/// A driver that refuses `IN_FENCE_FD`, as nvidia-drm did.
fn refused_by_the_driver() -> anyhow::Result<Outcome> {
    let Some(refused) = under_strace() else {
        // The test commit, the first picture, and the one with the fence.
        let third = |calls: &[String]| {
            let mut commits = (0..).zip(calls).filter(|(_, line)| line.contains("MODE_ATOMIC"));
            commits.nth(2).map(|(place, _)| place)
        };
        return with_fault(REFUSED, third, "error=EPERM");
    };
    let (mut camera, vgem) = (camera()?, Vgem::open()?);
    let mut display = lit(&mut camera, fifo_request())?;
    let mut signallers = Vec::new();
    let mut told = Vec::new();
    for _ in 0..2 {
        let (fence, signal) = vgem.fence()?;
        let frame = camera.next()?.with_acquire_fence(fence);
        signallers.push((frame.meta().sequence, signal.after(NOT_YET)));
        told.extend(display.present(frame)?);
    }
    while let Some(shown) = display.finish()? {
        told.push(shown);
    }
    for (sequence, signaller) in signallers {
        let shown = told
            .iter()
            .find(|shown| shown.meta.sequence == sequence)
            .context("it was not shown")?;
        soon_after(shown, signalled(signaller)?)?;
    }
    // Once refused, the next is not tried.
    let expected = match refused {
        true => FenceUse { by_device: 0, by_cpu: 2, why: Some(CpuWait::Refused(libc::EPERM)), ..FenceUse::default() },
        false => FenceUse { by_device: 2, by_cpu: 0, why: None, ..FenceUse::default() },
    };
    ensure!(display.fence_use() == expected, "{:?}", display.fence_use());
    display.restore()?;
    PASSED
}

/// The work of a frame's fence has failed: that is told once, with the fence's name, and the display goes on.
fn failed(test: &str, present: Present) -> anyhow::Result<Outcome> {
    let Some(fails) = under_strace() else {
        // The last question for a fence's state is for that one.
        let last = |calls: &[String]| {
            let state = |line: &String| line.contains("SYNC_IOC_FILE_INFO") || line.contains("0x3e, 0x4");
            calls.iter().rposition(state)
        };
        return with_fault(test, last, &has_failed());
    };
    let (mut camera, vgem) = (camera()?, Vgem::open()?);
    let mut display = lit(&mut camera, DisplayRequest { present, ..DisplayRequest::default() })?;
    let (fence, signal) = vgem.fence()?;
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
    signal.now()?;
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
        ensure!(error.kind() == Kind::System && error.errno() == Some(libc::EIO), "{line}");
        // Newer kernels do not tell whose a fence was that has signalled.
        let named = ["vgem (timeline unbound)", "a driver that has let go of it"];
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

/// From this question on, of those for the state of a fence: that of one frame or another, by then some are shown.
const QUESTION: u32 = 9;

/// Work that fails while frames flow. One frame's: that is counted and told, and the flow goes on. Each from one on: the flow ends, in time.
fn flow(test: &str, present: Present, all: bool) -> anyhow::Result<Outcome> {
    const FRAMES: u64 = 30;
    const TIMEOUT: Duration = Duration::from_millis(500);
    if under_strace().is_none() {
        let log = format!("/tmp/strace-fence.{}", std::process::id());
        let mut command = Command::new("strace");
        // Of sync files alone, whose only ioctl here is the question for their state.
        command.args(["-e", "trace=ioctl", "-P", "anon_inode:sync_file", "-o", &log]);
        let which = format!("when={QUESTION}{}", if all { "+" } else { "" });
        command.args(["-e", &format!("inject=ioctl:{}:{which}", has_failed())]);
        command
            .arg(std::env::current_exe()?)
            .args(["--run-one", test])
            .env(UNDER_STRACE, "fault");
        finish(&mut command)?.has_status(0)?;
        let calls = fs::read_to_string(&log)?;
        fs::remove_file(&log)?;
        let met: Vec<_> = calls.lines().filter(|line| line.contains("(INJECTED")).collect();
        note(met.first().context("strace changed nothing")?);
        ensure!(all || met.len() == 1, "{met:?}");
        return PASSED;
    }
    let mut source = Fenced::new(|_| Fate::After(Duration::from_millis(5)))?;
    let request = DisplayRequest { present, fence_timeout: Some(TIMEOUT), ..DisplayRequest::default() };
    let mut display = Display::find("vkms", request)?;
    let limits = Limits { frames: Some(if all { 1000 } else { FRAMES }), duration: None };
    let start = Instant::now();
    let ran = Pipe::join(&mut source, &mut display, Path::ZeroCopy, limits)?.run(None, &mut |_| {});
    let took = start.elapsed();
    display.restore()?;
    if all {
        let error = ran.err().context("work that always fails is no failure")?;
        ensure!(error.is_of_fence() && error.errno() == Some(libc::EIO), "{}", error.line());
        ensure!(took >= 2 * TIMEOUT && took < 2 * TIMEOUT + Duration::from_secs(5), "after {took:?}");
        return PASSED;
    }
    let account = ran?;
    ensure!(account.captured == FRAMES && account.fences.failed == 1 && account.fences.late == 0, "{account:?}");
    ensure!(account.presented + account.dropped_by_sink == FRAMES, "{account:?}");
    match present {
        // The kernel shows it all the same.
        Present::Fifo => ensure!(account.presented == FRAMES, "{account:?}"),
        Present::Mailbox => ensure!(account.dropped_by_sink > 0 && account.presented > 5, "{account:?}"),
    }
    let told = told(&account);
    ensure!(told.len() == 1 && told[0].contains("1 so far") && told[0].contains("has failed"), "{told:?}");
    PASSED
}
