//! `kms::Display` as a sink: how it is found, what it takes, how it shows, what it drops.

use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use dmaflow::endpoint::{JoinError, Ready, Rung, Sink, Source};
use dmaflow::error::Kind;
use dmaflow::frame::Stage;
use dmaflow::kms::{Card, Display, DisplayRequest, Present};
use dmaflow::pattern::{Pattern, PatternRequest};
use dmaflow::v4l2::{Camera, CameraRequest, Device, RateRequest};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::camera::{format, open, request};
use crate::harness::{Outcome, PASSED, Test, note};
use crate::modules::{self, Witness, debugfs, kernel, screen};
use crate::process::State;

const NEEDS: &[&str] = &["vivid", "vkms"];

pub const TESTS: &[Test] = &[
    Test { name: "display::found_by_path_and_driver", needs: NEEDS, seconds: 60, run: found },
    Test { name: "display::offers", needs: NEEDS, seconds: 60, run: offers },
    Test { name: "display::join_changes_nothing", needs: NEEDS, seconds: 60, run: join_changes_nothing },
    Test { name: "display::mode_and_place", needs: NEEDS, seconds: 120, run: mode_and_place },
    Test { name: "display::one_import_a_buffer", needs: NEEDS, seconds: 60, run: one_import_a_buffer },
    Test {
        name: "display::every_frame_is_told_of_in_fifo",
        needs: NEEDS,
        seconds: 60,
        run: every_frame_is_told_of_in_fifo,
    },
    Test { name: "display::leases_in_fifo", needs: NEEDS, seconds: 60, run: leases_in_fifo },
    Test { name: "display::leases_in_mailbox", needs: NEEDS, seconds: 60, run: leases_in_mailbox },
    Test { name: "display::mailbox_drops_the_older", needs: NEEDS, seconds: 60, run: mailbox_drops },
    Test { name: "display::refuses_what_would_be_wrong", needs: NEEDS, seconds: 60, run: refuses },
    Test { name: "display::overlay_where_the_primary_lacks_the_format", needs: NEEDS, seconds: 60, run: overlay },
    Test { name: "display::joined_anew_for_another_shape", needs: NEEDS, seconds: 60, run: joined_anew },
];

pub fn display(present: Present) -> Result<Display> {
    Ok(Display::find("vkms", DisplayRequest { present, ..DisplayRequest::default() })?)
}

pub fn join(display: &mut Display, source: &dyn Source) -> Result<()> {
    let rung = display
        .join(source.layout(), source.rate(), source.buffers())
        .map_err(anyhow::Error::from)?;
    ensure!(rung == Rung::Exported, "{rung}");
    Ok(())
}

fn found() -> anyhow::Result<Outcome> {
    let path = modules::card()?;
    let info = Card::open(&path)?.info().clone();
    ensure!(info.driver == "vkms" && info.path == path && !info.description.is_empty(), "{info:?}");
    let node = path.file_name().context("a name")?.to_string_lossy().into_owned();
    for name in ["vkms", &node, &path.display().to_string()] {
        ensure!(Card::find(name)?.info() == &info, "{name} finds another");
    }
    let list = Card::list();
    ensure!(
        list.len() == 1 && list[0].as_ref().is_ok_and(|listed| *listed == info),
        "only vkms is a display: {list:?}"
    );
    let error = Card::find("nosuch").err().context("nosuch was found")?;
    ensure!(error.kind() == Kind::NotFound && error.line().contains("(vkms)"), "{error:?}");
    // vgem renders and displays nothing; /dev/null is neither.
    let error = Card::find("vgem").err().context("vgem is no display")?;
    note(&error.line());
    for (path, kind) in [("/dev/dri/card77", Kind::NotFound), ("/dev/null", Kind::Unsupported)] {
        let error = Card::open(Path::new(path))
            .err()
            .with_context(|| format!("{path} was opened"))?;
        ensure!(error.kind() == kind && error.line().contains(path), "{error:?}");
    }
    PASSED
}

fn offers() -> anyhow::Result<Outcome> {
    let card = Card::find("vkms")?;
    let formats = card.formats()?;
    ensure!(formats.first() == Some(&format("XR24")), "the best comes first: {formats:?}");
    ensure!(formats.contains(&format("AR24")) && formats.contains(&format("RG16")), "{formats:?}");
    ensure!(formats.contains(&format("NV12")) == (kernel() >= (7, 0)), "NV12 is new in 7.x: {formats:?}");
    let connectors = card.connectors()?;
    let virtual_1 = connectors
        .iter()
        .find(|connector| connector.name == "Virtual-1")
        .context("no Virtual-1")?;
    ensure!(virtual_1.connected && virtual_1.modes.iter().any(|mode| mode.size == (1920, 1080)), "{virtual_1:?}");
    ensure!(virtual_1.modes.iter().all(|mode| (24.0..200.0).contains(&mode.refresh)), "{virtual_1:?}");
    PASSED
}

fn join_changes_nothing() -> anyhow::Result<Outcome> {
    let witness = Witness::new()?;
    let before = State::read();
    let planes = || screen().split("framebuffer[").next().unwrap_or_default().to_owned();
    let shown = planes();
    let request = CameraRequest { rate: RateRequest::Exactly(30.0), ..request("XR24", (640, 360)) };
    let camera = Camera::open(Device::find("vivid")?, &request)?;
    let mut display = display(Present::Fifo)?;
    join(&mut display, &camera)?;
    ensure!(planes() == shown, "joining changed the screen:\n{}", planes());
    ensure!(display.mode() == Some("Virtual-1 640x480".to_owned()), "{:?}", display.mode());
    drop((display, camera));
    before.is_back()?;
    drop(witness);
    PASSED
}

/// What the state in debugfs says of the plane that shows our framebuffer: its position line.
fn place() -> Result<String> {
    let screen = screen();
    let plane = screen
        .split("plane[")
        .find(|plane| !plane.contains("fb=0\n") && plane.contains("crtc-pos="))
        .context("no plane is on")?;
    let line = plane
        .lines()
        .find_map(|line| line.trim().strip_prefix("crtc-pos="))
        .context("no position")?;
    Ok(line.to_owned())
}

fn mode_and_place() -> anyhow::Result<Outcome> {
    let witness = Witness::new()?;
    let before = State::read();
    for (size, rate, mode, at) in [
        ((640, 480), 60.0, "Virtual-1 640x480", "640x480+0+0"),
        // 640x480 has 59.94 Hz: too slow for 60 frames a second, and fast enough for 59.
        ((640, 360), 60.0, "Virtual-1 848x480", "640x360+104+60"),
        ((640, 360), 59.0, "Virtual-1 640x480", "640x360+0+60"),
        ((320, 180), 30.0, "Virtual-1 640x480", "320x180+160+150"),
        ((1920, 1080), 60.0, "Virtual-1 1920x1080", "1920x1080+0+0"),
        ((1000, 700), 60.0, "Virtual-1 1024x768", "1000x700+12+34"),
        ((640, 360), 1000.0, "Virtual-1 640x480", "640x360+0+60"),
    ] {
        let request = PatternRequest { format: Some(format("XR24")), size, rate, ..PatternRequest::default() };
        let mut pattern = Pattern::new(&request)?;
        let mut display = display(Present::Fifo)?;
        join(&mut display, &pattern)?;
        ensure!(display.mode().as_deref() == Some(mode), "{size:?} on {:?}", display.mode());
        pattern.start()?;
        let frame = wait_for(&mut pattern)?;
        display.present(frame)?;
        ensure!(place()? == at, "{size:?} lies at {} and not at {at}", place()?);
        drop((display, pattern));
        before.is_back()?;
    }
    drop(witness);
    PASSED
}

pub fn wait_for(source: &mut dyn Source) -> Result<dmaflow::frame::Frame> {
    loop {
        if let Some(frame) = source.try_next(Ready::FRAME)? {
            return Ok(frame);
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn framebuffers() -> usize {
    let text = debugfs()
        .and_then(|folder| std::fs::read_to_string(folder.join("framebuffer")).ok())
        .unwrap_or_default();
    text.lines().filter(|line| line.starts_with("framebuffer[")).count()
}

fn one_import_a_buffer() -> anyhow::Result<Outcome> {
    let before = framebuffers();
    let request = CameraRequest { buffers: Some(6), ..crate::camera::request("XR24", (640, 360)) };
    let mut camera = Camera::open(Device::find("vivid")?, &request)?;
    let mut display = display(Present::Fifo)?;
    ensure!(display.imports() == 0, "{} imports before the join", display.imports());
    join(&mut display, &camera)?;
    ensure!(
        display.imports() == 6 && framebuffers() == before + 6,
        "{} imports, {} framebuffers",
        display.imports(),
        framebuffers()
    );
    for _ in 0..20 {
        display.present(camera.next()?)?;
    }
    ensure!(display.imports() == 6, "{} imports of 6 buffers", display.imports());
    ensure!(display.ledger().bytes() == 0 && display.verdict().is_none(), "{:?}", display.ledger());
    drop(display);
    ensure!(framebuffers() == before, "{} framebuffers stayed", framebuffers() - before);
    PASSED
}

/// Every frame is told of once, in order, with the time of its own vertical blank, however many at a time.
fn every_frame_is_told_of_in_fifo() -> anyhow::Result<Outcome> {
    let mut camera = open("XR24", (640, 360))?;
    let mut display = display(Present::Fifo)?;
    join(&mut display, &camera)?;
    let (mut sent, mut told) = (Vec::new(), Vec::new());
    for _ in 0..100 {
        let frame = camera.next()?;
        sent.push(frame.meta().sequence);
        told.extend(display.present(frame)?);
    }
    ensure!(told.len() > 50, "only {} of 100 frames were told of before the end", told.len());
    while let Some(shown) = display.finish()? {
        told.push(shown);
    }
    let sequences: Vec<_> = told.iter().map(|shown| shown.meta.sequence).collect();
    ensure!(sequences == sent, "{sequences:?} instead of {sent:?}");
    // The first is told with the time of its modeset's end. No two later ones share a vertical blank of the display's 60 a second.
    let too_close = told[1..].windows(2).find(|pair| pair[1].at_us < pair[0].at_us + 15_000);
    ensure!(too_close.is_none(), "{too_close:?}");
    PASSED
}

/// The display holds the frame on screen and the one on its way; what was replaced is given back.
fn leases_in_fifo() -> anyhow::Result<Outcome> {
    let mut camera = open("XR24", (640, 360))?;
    let mut display = display(Present::Fifo)?;
    join(&mut display, &camera)?;
    let first = camera.next()?;
    let slot = first.slot();
    let lease = first.lease().clone();
    display.present(first)?;
    ensure!(lease.stage() == Stage::OnScreen, "{lease:?}");
    drop(lease);
    // It stays on screen until the next is presented, so nothing may be captured into it.
    for _ in 0..12 {
        ensure!(camera.next()?.slot() != slot, "slot {slot} was filled while on screen");
    }
    display.present(camera.next()?)?;
    // Accepted only when the one before is on screen, so that the first has left it; vkms may read it until one more is accepted.
    for _ in 0..2 {
        display.present(camera.next()?)?;
    }
    let back = (0..24)
        .map(|_| camera.next())
        .any(|frame| frame.is_ok_and(|frame| frame.slot() == slot));
    ensure!(back, "slot {slot} was not given back after it had left the screen");
    display.restore()?;
    PASSED
}

fn wait_flip(display: &mut Display) -> Result<()> {
    loop {
        let fd = display.event_fd().context("a mailbox has something to poll")?;
        let ready = poll(&mut [PollFd::new(fd.as_fd(), PollFlags::POLLIN)], PollTimeout::from(5000_u16))?;
        ensure!(ready == 1, "no flip event for 5 s");
        if display.dispatch()?.is_some() {
            return Ok(());
        }
    }
}

fn leases_in_mailbox() -> anyhow::Result<Outcome> {
    let mut camera = open("XR24", (640, 360))?;
    let mut display = display(Present::Mailbox)?;
    join(&mut display, &camera)?;
    ensure!(display.present(camera.next()?)?.is_some(), "the first frame is on screen when presented");
    let second = camera.next()?;
    let lease = second.lease().clone();
    ensure!(display.present(second)?.is_none(), "in mailbox presenting does not wait");
    ensure!(matches!(lease.stage(), Stage::Pending | Stage::OnScreen), "{lease:?}");
    wait_flip(&mut display)?;
    ensure!(lease.stage() == Stage::OnScreen, "{lease:?}");
    display.restore()?;
    PASSED
}

/// Three frames at once: the first is on its way, the third replaces the second.
fn mailbox_drops() -> anyhow::Result<Outcome> {
    let request = CameraRequest { buffers: Some(8), ..crate::camera::request("XR24", (640, 360)) };
    let mut camera = Camera::open(Device::find("vivid")?, &request)?;
    let mut display = display(Present::Mailbox)?;
    join(&mut display, &camera)?;
    display.present(camera.next()?)?;
    let frames: Vec<_> = (0..4).map(|_| camera.next()).collect::<Result<_, _>>()?;
    let newest = frames[3].meta().sequence;
    let leases: Vec<_> = frames.iter().map(|frame| frame.lease().clone()).collect();
    for frame in frames {
        display.present(frame)?;
    }
    ensure!(display.dropped() == 2, "{} dropped", display.dropped());
    ensure!(leases[1].stage() == Stage::Dequeued && leases[2].stage() == Stage::Dequeued, "{leases:?}");
    drop(leases);
    let mut shown = Vec::new();
    while let Some(frame) = display.finish()? {
        shown.push(frame.meta.sequence);
    }
    ensure!(shown.len() == 2 && shown[1] == newest, "{shown:?} with {newest} the newest");
    PASSED
}

fn refuses() -> anyhow::Result<Outcome> {
    let mut display = display(Present::Fifo)?;
    let refused = |display: &mut Display, source: &dyn Source| -> Result<dmaflow::endpoint::Refusal> {
        match display.join(source.layout(), source.rate(), source.buffers()) {
            Err(JoinError::Refused(refusal)) => Ok(refusal),
            other => anyhow::bail!("{} gives {other:?}", source.layout()),
        }
    };
    let refusal = refused(&mut display, &open("YUYV", (640, 360))?)?;
    ensure!(refusal.why.contains("YUYV") && refusal.repair.contains("XR24"), "{refusal}");
    let large = PatternRequest { format: Some(format("XR24")), size: (5000, 100), ..PatternRequest::default() };
    let refusal = refused(&mut display, &Pattern::new(&large)?)?;
    ensure!(refusal.step == "mode choice" && refusal.repair.contains("4096x2160"), "{refusal}");
    let plain = PatternRequest {
        format: Some(format("XR24")),
        allocator: Some(dmaflow::memory::Allocator::Plain),
        ..PatternRequest::default()
    };
    let refusal = refused(&mut display, &Pattern::new(&plain)?)?;
    ensure!(refusal.step == "PRIME import" && !refusal.repair.is_empty(), "{refusal}");
    // A refusal is not the end: the same display takes what it can.
    let camera = open("XR24", (640, 360))?;
    join(&mut display, &camera)?;
    PASSED
}

/// vkms's planes all take the same formats, so the case cannot be had on it; this notices the day it can.
fn overlay() -> anyhow::Result<Outcome> {
    let formats_of = crate::sinks::plane_formats(&modules::card()?)?;
    let (primary, overlays): (Vec<_>, Vec<_>) = formats_of.iter().partition(|(kind, _)| kind == "primary");
    ensure!(primary.len() == 1 && !overlays.is_empty(), "{formats_of:?}");
    let known: Vec<_> = Card::find("vkms")?.formats()?;
    let only = overlays.iter().flat_map(|(_, formats)| formats).find(|code| {
        !primary[0].1.contains(code) && known.iter().any(|format| format.drm().is_some_and(|drm| drm.0 == **code))
    });
    let Some(code) = only else {
        return Ok(Outcome::Skipped("every format of vkms's overlays is one of its primary plane as well".to_owned()));
    };
    anyhow::bail!("vkms's overlays take {code:#x} and its primary does not: write the test");
}

fn joined_anew() -> anyhow::Result<Outcome> {
    let witness = Witness::new()?;
    let before = State::read();
    let mut display = display(Present::Fifo)?;
    for (name, size) in [("XR24", (640, 360)), ("RG16", (1280, 720)), ("AR24", (320, 180))] {
        let mut camera = open(name, size)?;
        // What the source before has sent is shown first, and stays until the first frame of this one.
        if display.mode().is_some() {
            while display.finish()?.is_some() {}
            let shown = place()?;
            join(&mut display, &camera)?;
            ensure!(place()? == shown, "joining alone has changed the screen");
        } else {
            join(&mut display, &camera)?;
        }
        for _ in 0..3 {
            display.present(camera.next()?)?;
        }
        ensure!(place()?.starts_with(&format!("{}x{}+", size.0, size.1)), "{}", place()?);
    }
    drop(display);
    before.is_back()?;
    drop(witness);
    PASSED
}
