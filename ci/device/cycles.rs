//! A thousand starts and stops leave nothing.

use std::fs;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use dmaflow::endpoint::{Sink, Source};
use dmaflow::kms::{Display, DisplayRequest, Present};
use dmaflow::v4l2::{Camera, CameraRequest, Device, RateRequest};

use crate::camera::{open, request};
use crate::display::join;
use crate::harness::{Outcome, PASSED, Test, note};
use crate::modules::screen;
use crate::process::{State, dma_bufs, finish, pipe};

const NEEDS: &[&str] = &["vivid", "vkms"];

pub const TESTS: &[Test] = &[
    Test { name: "cycles::a_thousand", needs: NEEDS, seconds: 900, run: a_thousand },
    Test { name: "cycles::many_sources_on_one_display", needs: NEEDS, seconds: 120, run: many_sources },
    Test { name: "cycles::of_the_command", needs: NEEDS, seconds: 120, run: of_the_command },
];

const CYCLES: u32 = 1000;

/// From the tenth cycle on everything must be as it was, and memory too but for what the allocator keeps for fragmentation.
const FIRST: u32 = 10;
const MORE_KIB: u64 = 256;

#[derive(Debug, PartialEq, Eq)]
struct Held {
    fds: usize,
    dma_bufs: usize,
    framebuffers: usize,
    mappings: usize,
}

fn held() -> Result<Held> {
    Ok(Held {
        fds: fs::read_dir("/proc/self/fd")?.count(),
        dma_bufs: dma_bufs().len(),
        framebuffers: screen().matches("framebuffer[").count(),
        mappings: fs::read_to_string("/proc/self/maps")?
            .lines()
            .filter(|line| line.contains("dmabuf"))
            .count(),
    })
}

fn resident_kib() -> Result<u64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .context("no VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").trim().parse()?)
}

/// Each opens the camera and the display, imports the buffers, shows two frames and puts the screen back.
fn cycle(number: u32) -> Result<()> {
    // As fast as vivid goes: what is measured is not its pace.
    let request = CameraRequest { rate: RateRequest::Exactly(120.0), ..request("RG16", (320, 180)) };
    let mut camera = Camera::open(Device::find("vivid")?, &request)?;
    let present = if number.is_multiple_of(4) { Present::Mailbox } else { Present::Fifo };
    let mut display = Display::find("vkms", DisplayRequest { present, ..DisplayRequest::default() })?;
    join(&mut display, &camera)?;
    for _ in 0..2 {
        let frame = camera.next()?;
        // Reading maps the memory: what is mapped must be unmapped.
        frame.buffer().read()?.row(0, 0, &mut [0; 640]);
        display.present(frame)?;
    }
    // Sometimes stopped in order, sometimes just dropped.
    if number.is_multiple_of(3) {
        camera.stop()?;
        display.restore()?;
    }
    Ok(())
}

fn a_thousand() -> anyhow::Result<Outcome> {
    let start = Instant::now();
    let mut tenth = None;
    for number in 1..=CYCLES {
        cycle(number).with_context(|| format!("cycle {number}"))?;
        if number == FIRST {
            tenth = Some((held()?, resident_kib()?));
        }
    }
    let (tenth, tenth_kib) = tenth.context("no tenth cycle")?;
    let (last, kib) = (held()?, resident_kib()?);
    note(&format!(
        "{CYCLES} cycles in {:.0} s, {tenth_kib} KiB after {FIRST}, {kib} KiB at the end",
        start.elapsed().as_secs_f64()
    ));
    ensure!(tenth.fds > 0 && tenth.framebuffers > 0, "{tenth:?}: nothing can be told from this");
    ensure!(last == tenth, "after {FIRST}: {tenth:?}, at the end: {last:?}");
    ensure!(kib <= tenth_kib + MORE_KIB, "{tenth_kib} KiB after {FIRST}, {kib} KiB at the end");
    PASSED
}

/// A leak that only the closing of the card would hide.
fn many_sources() -> anyhow::Result<Outcome> {
    let mut display = Display::find("vkms", DisplayRequest::default())?;
    let mut early = None;
    for number in 0..60 {
        let mut camera = open("XR24", (320, 180))?;
        join(&mut display, &camera)?;
        display.present(camera.next()?)?;
        display.restore()?;
        drop(camera);
        if number == 5 {
            early = Some(held()?);
        }
    }
    let (early, last) = (early.context("no early state")?, held()?);
    ensure!(last == early, "after 6 sources: {early:?}, after 60: {last:?}");
    PASSED
}

fn of_the_command() -> anyhow::Result<Outcome> {
    let before = State::read();
    for number in 0..20 {
        let present = if number % 2 == 0 { "fifo" } else { "mailbox" };
        finish(&mut pipe(&format!("--format XR24 --size 320x180 --frames 2 --present {present}")))?.json(0)?;
        before.is_back().with_context(|| format!("run {number}"))?;
    }
    PASSED
}
