//! What was on screen before comes back: after a drop, an error, a panic, a kill.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use dmaflow::endpoint::Sink;
use dmaflow::kms::{Display, Present};
use dmaflow::v4l2::Camera;
use drm::Device as _;
use drm::buffer::DrmFourcc;
use drm::control::{Device as _, connector};
use nix::sys::signal::Signal;

use crate::camera::open;
use crate::display::{display, join};
use crate::harness::{Outcome, PASSED, Test};
use crate::modules::{self, Witness, screen};
use crate::process::{State, dmaflow, finish, number, pipe, start};

const NEEDS: &[&str] = &["vivid", "vkms"];

pub const TESTS: &[Test] = &[
    Test { name: "screen::back_after_drop_and_restore", needs: NEEDS, seconds: 60, run: drop_and_restore },
    Test { name: "screen::back_after_a_panic", needs: NEEDS, seconds: 60, run: a_panic },
    Test { name: "screen::back_after_an_error", needs: NEEDS, seconds: 60, run: an_error },
    Test { name: "screen::back_after_a_kill", needs: NEEDS, seconds: 60, run: a_kill },
    Test {
        name: "screen::another_programs_picture_comes_back",
        needs: NEEDS,
        seconds: 60,
        run: another_programs_picture,
    },
    Test { name: "screen::master_is_given_up", needs: NEEDS, seconds: 60, run: master_is_given_up },
    Test { name: "screen::a_gone_picture_leaves_it_dark", needs: NEEDS, seconds: 60, run: a_gone_picture },
];

fn shown(present: Present) -> Result<(Camera, Display)> {
    let mut camera = open("XR24", (640, 360))?;
    let mut display = display(present)?;
    join(&mut display, &camera)?;
    for _ in 0..3 {
        display.present(camera.next()?)?;
    }
    Ok((camera, display))
}

/// Runs `end` on a display that shows frames of ours; everything must be as before then.
fn back_after(present: Present, end: impl FnOnce(Camera, Display) -> Result<()>) -> Result<()> {
    let witness = Witness::new()?;
    let before = State::read();
    let (camera, display) = shown(present)?;
    ensure!(before.changes().len() == 2, "nothing of ours is on screen: {:?}", before.changes());
    end(camera, display)?;
    before.is_back()?;
    drop(witness);
    Ok(())
}

fn drop_and_restore() -> anyhow::Result<Outcome> {
    for present in [Present::Fifo, Present::Mailbox] {
        back_after(present, |camera, display| {
            drop(display);
            drop(camera);
            Ok(())
        })?;
        // The camera first: its memory must live until the display has let go of it.
        back_after(present, |camera, display| {
            drop(camera);
            drop(display);
            Ok(())
        })?;
        back_after(present, |camera, mut display| {
            display.restore()?;
            display.restore()?;
            ensure!(
                !screen()
                    .split("framebuffer[")
                    .next()
                    .unwrap_or_default()
                    .contains("allocated by = dmaflow"),
                "{}",
                screen()
            );
            drop((camera, display));
            Ok(())
        })?;
    }
    PASSED
}

fn a_panic() -> anyhow::Result<Outcome> {
    for present in [Present::Fifo, Present::Mailbox] {
        back_after(present, |camera, display| {
            let caught = catch_unwind(AssertUnwindSafe(move || {
                let _both = (camera, display);
                // Not `panic!`: no message of it on stderr.
                std::panic::resume_unwind(Box::new("a mistake of the caller"));
            }));
            ensure!(caught.is_err(), "nothing panicked");
            Ok(())
        })?;
    }
    PASSED
}

fn an_error() -> anyhow::Result<Outcome> {
    back_after(Present::Fifo, |mut camera, mut display| {
        camera.device().set_control(&camera.device().control("disconnect")?, 1)?;
        let failed = (|| -> dmaflow::Result<()> {
            loop {
                display.present(camera.next()?)?;
            }
        })();
        ensure!(failed.is_err(), "a camera that is gone goes on");
        Ok(())
    })?;
    modules::reload()?;
    PASSED
}

fn a_kill() -> anyhow::Result<Outcome> {
    for present in ["fifo", "mailbox"] {
        // Nobody else has the card open: the kernel puts its console back.
        let before = State::read();
        let mut running = start(&mut pipe(&format!("--format XR24 --size 640x360 --present {present}")))?;
        running.wait_until_it_shows()?;
        running.signal(Signal::SIGKILL)?;
        let run = running.end()?;
        ensure!(run.status.code().is_none(), "it survived: {}", run.status);
        before.is_back()?;
        // Somebody has: the picture is gone all the same, and so is the memory.
        let witness = Witness::new()?;
        let mut running = start(&mut pipe(&format!("--format XR24 --size 640x360 --present {present}")))?;
        running.wait_until_it_shows()?;
        running.signal(Signal::SIGKILL)?;
        running.end()?;
        ensure!(!ours_is_there(), "{}", screen());
        // The memory goes a moment later.
        let killed = Instant::now();
        while !before.new_dma_bufs().is_empty() {
            ensure!(killed.elapsed() < Duration::from_secs(2), "dma-bufs stayed: {:?}", before.changes());
            std::thread::sleep(Duration::from_millis(10));
        }
        drop(witness);
        before.is_back()?;
    }
    // And what was killed does no harm to the next.
    ensure!(number(&finish(&mut pipe("--format XR24 --frames 2"))?.json(0)?, "frames/presented")? == 2, "no frames");
    PASSED
}

/// A program that drives the display by the old interface, without dmaflow.
struct Other(File);

impl AsFd for Other {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl drm::Device for Other {}
impl drm::control::Device for Other {}

impl Other {
    /// Shows a picture of its own at 800x600, and steps back from being master.
    fn new() -> Result<(Other, drm::control::framebuffer::Handle)> {
        let card = Other(File::options().read(true).write(true).open(modules::card()?)?);
        let resources = card.resource_handles()?;
        let connectors: Vec<_> = resources
            .connectors()
            .iter()
            .map(|&handle| card.get_connector(handle, false))
            .collect::<Result<_, _>>()?;
        let connected = connectors
            .iter()
            .find(|info| info.state() == connector::State::Connected)
            .context("nothing is connected")?;
        let mode = *connected
            .modes()
            .iter()
            .find(|mode| mode.size() == (800, 600))
            .context("no mode of 800x600")?;
        let buffer = card.create_dumb_buffer((800, 600), DrmFourcc::Xrgb8888, 32)?;
        let framebuffer = card.add_framebuffer(&buffer, 24, 32)?;
        let crtc = *resources.crtcs().first().context("no CRTC")?;
        card.set_crtc(crtc, Some(framebuffer), (0, 0), &[connected.handle()], Some(mode))?;
        // Its colours are not what others expect of a display.
        let inverted: Vec<u16> = (0..=255).rev().map(|level: u16| level * 257).collect();
        card.set_gamma(crtc, &inverted, &inverted, &inverted)?;
        card.release_master_lock()?;
        Ok((card, framebuffer))
    }

    /// The display has no colours of anybody's any more. The kernel's console does not see to that, and the tests that come next are not
    /// to find them.
    fn plain_colours() -> Result<()> {
        let card = Other(File::options().read(true).write(true).open(modules::card()?)?);
        let (crtc, property, _) = card.gamma_property()?;
        card.set_property(crtc, property, 0)?;
        ensure!(card.gamma()?.is_empty(), "the colours stay");
        Ok(())
    }

    /// What changes the colours of the whole picture now; empty for nothing.
    fn gamma(&self) -> Result<Vec<u8>> {
        let (_, _, value) = self.gamma_property()?;
        Ok(if value == 0 { Vec::new() } else { self.get_property_blob(value)? })
    }

    fn gamma_property(&self) -> Result<(drm::control::crtc::Handle, drm::control::property::Handle, u64)> {
        let crtc = *self.resource_handles()?.crtcs().first().context("no CRTC")?;
        for (&property, &value) in &self.get_properties(crtc)? {
            if self.get_property(property)?.name().to_bytes() == b"GAMMA_LUT" {
                return Ok((crtc, property, value));
            }
        }
        anyhow::bail!("vkms has no GAMMA_LUT")
    }
}

/// Whether one of dmaflow's framebuffers is on screen or at least there.
fn ours_is_there() -> bool {
    screen().contains("allocated by = dmaflow")
}

fn another_programs_picture() -> anyhow::Result<Outcome> {
    let (other, _) = Other::new()?;
    let before = State::read();
    ensure!(screen().contains("\"800x600\""), "{}", screen());
    let gamma = other.gamma()?;
    ensure!(!gamma.is_empty() && gamma[0] == 0xff, "no gamma to begin with: {gamma:?}");
    for options in [
        "--from vivid --size 640x360",
        "--from vivid --size 640x360 --present mailbox",
        "--from pattern --size 800x600",
    ] {
        let run = finish(&mut dmaflow(&format!("pipe {options} --to vkms --format XR24 --frames 3 --verify --json")));
        ensure!(number(&run?.json(0)?, "verify/wrong")? == 0, "{options}");
        before.is_back().with_context(|| options.to_owned())?;
        ensure!(other.gamma()? == gamma, "{options}: its colours are not back");
    }
    drop(other);
    Other::plain_colours()?;
    PASSED
}

fn master_is_given_up() -> anyhow::Result<Outcome> {
    let witness = Witness::new()?;
    let first = display(Present::Fifo)?;
    let error = display(Present::Fifo).err().context("two masters")?;
    ensure!(error.to_string().contains("master"), "{error:#}");
    ensure!(witness.acquire_master_lock().is_err(), "the display is driven without being its master");
    drop(first);
    witness.acquire_master_lock().context("it was not given up")?;
    witness.release_master_lock()?;
    // Looking at a card, or waiting with it open, is in nobody's way.
    let looking = dmaflow::kms::Card::find("vkms")?;
    witness.acquire_master_lock().context("a card that is only open is master")?;
    witness.release_master_lock()?;
    drop(looking);
    PASSED
}

/// Its owner went away meanwhile, and its framebuffer with it: nothing to put back, and no failure.
fn a_gone_picture() -> anyhow::Result<Outcome> {
    let first = State::read();
    let (other, framebuffer) = Other::new()?;
    let (camera, mut display) = shown(Present::Fifo)?;
    other.destroy_framebuffer(framebuffer)?;
    drop(other);
    display.restore().context("a picture that is gone is no failure")?;
    ensure!(
        !screen()
            .split("framebuffer[")
            .next()
            .unwrap_or_default()
            .contains("allocated by = dmaflow"),
        "{}",
        screen()
    );
    // And the display can be joined anew.
    join(&mut display, &camera)?;
    drop((display, camera));
    // The last one to close the card: the kernel's console is back.
    first.is_back()?;
    Other::plain_colours()?;
    PASSED
}
