//! A driver that refuses `IN_FENCE_FD`, which none here does: strace makes that.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use dmaflow::endpoint::Sink;
use dmaflow::fence::CpuWait;
use nix::libc;

use crate::fences_shown::{NOT_YET, camera, fifo_request, lit, signalled, soon_after, waits};
use crate::harness::{Outcome, PASSED, Test, note};
use crate::process::finish;
use crate::vgem::Vgem;

const NEEDS: &[&str] = &["vivid", "vkms", "vgem", "udmabuf", "strace"];
const REFUSED: &str = "fences_faults::refused_by_the_driver";

pub const TESTS: &[Test] = &[Test { name: REFUSED, needs: NEEDS, seconds: 240, run: refused_by_the_driver }];

/// Set for the process that strace runs, to `fault` or `none`.
const UNDER_STRACE: &str = "DMAFLOW_TEST_FENCE";

/// Whether this process is the one that strace runs, and whether it meets the fault there.
fn under_strace() -> Option<bool> {
    std::env::var(UNDER_STRACE).ok().map(|how| how == "fault")
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
        true => (0, 2, Some(CpuWait::Refused(libc::EPERM))),
        false => (2, 0, None),
    };
    ensure!(waits(&display) == expected, "{:?}", display.fence_use());
    display.restore()?;
    PASSED
}
