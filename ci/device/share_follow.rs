//! A shared camera whose signal changes: its consumers follow.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use dmaflow::endpoint::Source;
use dmaflow::error::Kind;
use dmaflow::frame::Frame;
use dmaflow::share::Receiver;
use dmaflow::sink::frame_to_rgb;
use nix::sys::signal::Signal;
use nix::unistd::Pid;

use crate::harness::{Outcome, PASSED, Test, note};
use crate::modules::control;
use crate::moves::{as_it_was, digital_video};
use crate::process::{dmaflow, number, start};
use crate::share::{connect, next};
use crate::shared::sum;
use crate::sinks::has_bars;

pub const TESTS: &[Test] =
    &[Test { name: "share::the_camera_changes", needs: &["vivid"], seconds: 240, run: the_camera_changes }];

/// By the control's number: what [`digital_video`] can show.
const TIMINGS: [(u32, (u32, u32)); 3] = [(4, (720, 576)), (0, (640, 480)), (7, (1280, 720))];
/// Of each format so many are looked at.
const FRAMES: u32 = 5;
const PATIENCE: Duration = Duration::from_secs(60);

/// Each change comes to every consumer, with new buffers; nothing is copied, and what was held before stays as it was.
fn the_camera_changes() -> Result<Outcome> {
    let at = "/tmp/dmaflow-share-changes.sock";
    digital_video(7)?;
    // A lease within which nothing that is held is taken back, and a budget of which frames of before are a part.
    let options = "--from vivid --format XR24 --lease 60000 --budget 5";
    let server = start(&mut dmaflow(&format!("share {options} --at {at} --json")))?;
    let mut receiver = connect(at)?;
    let mut pipe = start(&mut dmaflow(&format!("pipe --from unix:{at} --to null --path zero-copy --json")))?;
    let mut kept: Vec<(Frame, u32)> = Vec::new();
    look(&mut receiver, (1280, 720))?;
    let first = inodes(&receiver);
    pipe.wait_until("to use the first buffers", |pid| first.iter().all(|inode| open_inodes(pid).contains(inode)))?;
    for (timings, size) in TIMINGS {
        let frame = next(&mut receiver)?;
        let shown = sum(&frame)?;
        kept.push((frame, shown));
        let before = inodes(&receiver);
        control(&format!("dv_timings={timings}"))?;
        follow(&mut receiver, size).with_context(|| format!("timings {timings}"))?;
        let after = inodes(&receiver);
        ensure!(after.len() == 8 && after.iter().all(|inode| !before.contains(inode)), "{before:?}, then {after:?}");
        look(&mut receiver, size)?;
        for (number, (frame, shown)) in kept.iter().enumerate() {
            ensure!(receiver.holds(frame) && sum(frame)? == *shown, "frame {number} of before is another now");
        }
        // The other one has followed when it has the new buffers, and has let go of the old ones.
        pipe.wait_until("to use the new buffers", |pid| {
            let held = open_inodes(pid);
            after.iter().all(|inode| held.contains(inode)) && !before.iter().any(|inode| held.contains(inode))
        })?;
    }
    // Of the last ones as well it gets frames.
    look(&mut receiver, (1280, 720))?;
    pipe.signal(Signal::SIGINT)?;
    let result = pipe.end()?.json(0)?;
    let moves = result["moves"].as_array().context("moves")?;
    ensure!(moves.len() == TIMINGS.len() && moves.iter().all(|step| step["to"] == "exported"), "{result}");
    ensure!((number(&result, "width")?, number(&result, "height")?) == (1280, 720), "{result}");
    let captured = number(&result, "frames/captured")?;
    // One of each format at least.
    ensure!(captured > TIMINGS.len() as u64 && number(&result, "bytes_copied")? == 0, "{result}");
    let copied: u64 = receiver.copies().iter().map(|copies| copies.bytes).sum();
    ensure!(copied == 0, "{copied} bytes copied");
    server.signal(Signal::SIGINT)?;
    let result = server.end()?.json(0)?;
    ensure!(number(&result, "bytes_copied")? == 0 && result["path"] == "exported", "{result}");
    // Camera and server are gone; the memory is there for who has it.
    for (number, (frame, shown)) in kept.iter().enumerate() {
        ensure!(sum(frame)? == *shown, "frame {number} is another after the end");
    }
    note(&format!("{} changes followed by two; {captured} frames came to the other", TIMINGS.len()));
    as_it_was()?;
    PASSED
}

fn inodes(receiver: &Receiver) -> Vec<u64> {
    let buffers = receiver.buffers().iter();
    buffers
        .filter_map(|buffer| Some(buffer.dma_buf(0)?.identity().inode()))
        .collect()
}

/// Of all that a process has open.
fn open_inodes(pid: Pid) -> BTreeSet<u64> {
    let fds = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    fds.filter_map(|fd| Some(fs::metadata(fd.path()).ok()?.ino())).collect()
}

/// Takes frames of before until the change comes.
fn follow(receiver: &mut Receiver, size: (u32, u32)) -> Result<()> {
    let end = Instant::now() + PATIENCE;
    while Instant::now() < end {
        match receiver.next_within(Duration::from_secs(1)) {
            Ok(_) => {}
            Err(error) if error.kind() == Kind::FormatChanged => {
                receiver.follow()?;
                ensure!(receiver.layout().size() == size, "{}", receiver.layout());
                return Ok(());
            }
            Err(error) => return Err(error.into()),
        }
    }
    bail!("no change came")
}

/// The next frames have the size and show the camera's picture.
fn look(receiver: &mut Receiver, size: (u32, u32)) -> Result<()> {
    for number in 0..FRAMES {
        let frame = next(receiver)?;
        ensure!(frame.buffer().layout().size() == size, "frame {number} is {}", frame.buffer().layout());
        ensure!(has_bars(&(size, frame_to_rgb(&frame)?)), "frame {number} of {size:?} is another picture");
    }
    Ok(())
}
