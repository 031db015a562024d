//! The input of a camera: its signal at the start, what is kept when it changes, and what is put back when opening fails.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use dmaflow::endpoint::Source;
use dmaflow::error::Kind;
use dmaflow::format::Fourcc;
use dmaflow::v4l2::{Camera, CameraRequest, Device};

use crate::camera::request;
use crate::harness::{Outcome, PASSED, Test};
use crate::modules::{control, vivid};
use crate::moves::{as_it_was, digital_video};
use crate::process::{dmaflow, finish, sh, start};

const NEEDS: &[&str] = &["vivid"];

pub const TESTS: &[Test] = &[
    Test { name: "inputs::locked_to_the_signal_at_the_start", needs: NEEDS, seconds: 60, run: locked },
    Test { name: "inputs::no_signal_at_the_start", needs: NEEDS, seconds: 120, run: no_signal },
    Test { name: "inputs::what_was_asked_for_is_kept", needs: NEEDS, seconds: 120, run: kept },
    Test { name: "inputs::put_back_when_opening_fails", needs: NEEDS, seconds: 120, run: put_back },
];

fn any() -> CameraRequest {
    CameraRequest { format: request("XR24", (1, 1)).format, ..CameraRequest::default() }
}

/// The device is set to 640x480 while 1280x720 comes.
fn locked() -> anyhow::Result<Outcome> {
    digital_video(0)?;
    control("dv_timings=7")?;
    let mut camera = Camera::open(Device::find("vivid")?, &any())?;
    ensure!(camera.layout().size() == (1280, 720), "{} and not what comes", camera.layout());
    ensure!(camera.next()?.buffer().layout().size() == (1280, 720), "frames of another size");
    drop(camera);
    as_it_was()?;
    PASSED
}

fn no_signal() -> anyhow::Result<Outcome> {
    digital_video(0)?;
    for (mode, why) in [(1, "nothing is connected"), (2, "not stable"), (3, "beyond what it can take")] {
        control(&format!("dv_timings_signal_mode={mode}"))?;
        let error = Camera::open(Device::find("vivid")?, &any());
        let error = error.err().with_context(|| format!("opened with mode {mode}"))?;
        ensure!(error.kind() == Kind::Timeout, "{error:?}");
        let line = error.line();
        ensure!(line.contains("signal") && line.contains(why) && line.contains("0 (Webcam"), "{line}");
    }
    control("dv_timings_signal_mode=1")?;
    let picture = format!("/tmp/no-signal-{}.png", std::process::id());
    for command in [format!("snap vivid {picture}"), "pipe --from vivid --to null --frames 3".to_owned()] {
        finish(&mut dmaflow(&command))?.one_line(1, &["signal of /dev/video0", "nothing is connected", "(Webcam"])?;
    }
    ensure!(std::fs::metadata(&picture).is_err(), "a picture of nothing");
    as_it_was()?;
    // The same of an analogue input, which has its status alone to tell by.
    sh("v4l2-ctl -d /dev/video0 -i 2")?;
    control("standard_signal_mode=1")?;
    finish(&mut dmaflow("pipe --from vivid --to null --frames 3"))?
        .one_line(1, &["there is no signal at its input"])?;
    control("standard_signal_mode=0")?;
    sh("v4l2-ctl -d /dev/video0 -i 0")?;
    PASSED
}

/// Waits for the change to be told, and follows it.
fn follow(camera: &mut Camera) -> Result<()> {
    for _ in 0..200 {
        match camera.next() {
            Err(error) if error.kind() == Kind::FormatChanged => {
                camera.follow()?;
                camera.start()?;
                return Ok(());
            }
            other => drop(other?),
        }
    }
    anyhow::bail!("the change was not told")
}

fn kept() -> anyhow::Result<Outcome> {
    vivid(&["multiplanar=2"])?;
    // 640x480, then 1280x720 (rows too long for that stride), then 720x576.
    digital_video(0)?;
    let request = CameraRequest { code: Some(Fourcc::new(b"NM12")), stride: Some(1024), ..CameraRequest::default() };
    let mut camera = Camera::open(Device::find("vivid")?, &request)?;
    for (timings, width, stride) in [(4, 720, 1024), (7, 1280, 1280), (0, 640, 1024)] {
        control(&format!("dv_timings={timings}"))?;
        follow(&mut camera)?;
        let layout = *camera.next()?.buffer().layout();
        ensure!(
            layout.width() == width && layout.memory_planes() == 2,
            "{layout} in {} memory planes",
            layout.memory_planes()
        );
        ensure!(layout.planes()[0].stride == stride, "{layout}: rows of {} bytes", layout.planes()[0].stride);
        let lost: &[&str] = if stride == 1024 { &[] } else { &["the stride of 1024 bytes"] };
        ensure!(camera.not_kept() == lost, "{width}: {:?}", camera.not_kept());
    }
    drop(camera);
    // And the reason of the move says it.
    let running = start(&mut dmaflow("pipe --from vivid --to null --format XR24 --stride 2816 --json"))?;
    std::thread::sleep(Duration::from_millis(1500));
    control("dv_timings=4")?;
    std::thread::sleep(Duration::from_millis(1500));
    running.signal(nix::sys::signal::Signal::SIGINT)?;
    let result = running.end()?.json(0)?;
    let why = result["moves"][0]["why"].as_str().context("no move")?;
    ensure!(why.contains("720x576") && why.contains("could not be kept: the stride of 2816 bytes"), "{why}");
    as_it_was()?;
    PASSED
}

fn put_back() -> anyhow::Result<Outcome> {
    let state =
        || sh("v4l2-ctl -d /dev/video0 -I -V -P -C brightness; v4l2-ctl -d /dev/video0 --get-dv-timings 2>&1 || true");
    let fails = |options: &str, word: &str| -> Result<()> {
        let before = state()?;
        finish(&mut dmaflow(&format!("pipe --from vivid --to null --frames 1 {options}")))?.one_line(1, &[word])?;
        let after = state()?;
        ensure!(before == after, "after {options}:\n{after}instead of\n{before}");
        Ok(())
    };
    for (options, word) in [
        ("--format XR24 --fps 1000", "rate"),
        ("--format XR24 --fps 29.97", "the nearest that it offers is 30"),
        ("--input 3 --format XR24 --fps 77777", "rate"),
        ("--input 2 --format XR24 --stride 1", "stride"),
        ("--input 1 --format P010", "P010"),
        ("--format XR24 --size 320x180 --stride 4294967295", "stride"),
        ("--control brightness=7 --size 7x7", "7x7"),
        ("--control brightness=7 --control brightness=99999", "it takes 0 to 255"),
        ("--control brightness=-1", "it takes 0 to 255"),
    ] {
        fails(options, word)?;
    }
    // The timings as well: others come than it is set to.
    digital_video(0)?;
    control("dv_timings=7")?;
    fails("--format XR24 --fps 77777", "rate")?;
    as_it_was()?;
    PASSED
}
