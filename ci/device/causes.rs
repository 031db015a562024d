//! What an errno means by who said it: those refusals that a display made of software can be brought to. Those of cameras are in the tests
//! of faults, formats and captures.

use std::fs;
use std::os::fd::{BorrowedFd, RawFd};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use dmaflow::endpoint::{Importer, Sink, Source};
use dmaflow::error::Kind;
use dmaflow::format::Layout;
use dmaflow::frame::{Buffer, Room};
use dmaflow::kms::{Card, Display, DisplayRequest, KmsImporter};
use dmaflow::memory::Allocator;

use crate::camera::{format, open};
use crate::harness::{Outcome, PASSED, Test, note};
use crate::modules::{Witness, card};
use crate::process::State;

const NEEDS: &[&str] = &["vivid", "vkms", "udmabuf"];

pub const TESTS: &[Test] = &[
    Test { name: "causes::a_picture_that_no_framebuffer_holds", needs: NEEDS, seconds: 60, run: no_framebuffer },
    Test { name: "causes::memory_that_no_card_makes", needs: NEEDS, seconds: 60, run: no_memory },
    Test { name: "causes::no_master_any_more", needs: NEEDS, seconds: 60, run: no_master },
];

/// vkms takes pictures of 8192 x 8192 pixels at most.
const TOO_WIDE: (u32, u32) = (8200, 16);

fn no_framebuffer() -> anyhow::Result<Outcome> {
    let before = State::read();
    let mut importer = KmsImporter::new(Arc::new(Card::open(&card()?)?));
    let layout = Layout::packed(format("XR24"), TOO_WIDE, 1)?;
    let refusal = importer
        .import(&Buffer::allocate(Allocator::Udmabuf, &layout, &Room::default())?)
        .err()
        .context("it was taken")?;
    note(&refusal.to_string());
    ensure!(refusal.step == "AddFB2" && refusal.errno == Some(nix::libc::EINVAL), "{refusal}");
    ensure!(refusal.why.contains("likely the format or the stride") && refusal.why.contains("8200x16"), "{refusal}");
    // The handle of the import that went well is not left behind.
    let small = Layout::packed(format("XR24"), (640, 16), 1)?;
    drop(importer.import(&Buffer::allocate(Allocator::Udmabuf, &small, &Room::default())?)?);
    drop(importer);
    before.is_back()?;
    PASSED
}

fn no_memory() -> anyhow::Result<Outcome> {
    let before = State::read();
    let card = Card::open(&card()?)?;
    let layout = Layout::packed(format("XR24"), (640, 360), 1)?;
    // More bytes than a dumb buffer can have, which are counted with 32 bits a row and a height of 32 bits.
    let room = Room { rows: u32::MAX / 8, ..Room::default() };
    let error = card.make_buffer(&layout, &room, 1).err().context("it was made")?;
    note(&error.line());
    ensure!(error.call() == Some("CREATE_DUMB"), "{error:?}");
    ensure!(matches!(error.errno(), Some(nix::libc::EINVAL | nix::libc::ENOMEM)), "{error:?}");
    ensure!(error.line().contains("smaller"), "no repair in {}", error.line());
    drop(card);
    before.is_back()?;
    PASSED
}

/// As when somebody switches to another terminal: whoever was master is it no more.
fn no_master() -> anyhow::Result<Outcome> {
    let witness = Witness::new()?;
    let before = State::read();
    let mut camera = open("XR24", (640, 360))?;
    let mut display = Display::find("vkms", DisplayRequest::default())?;
    display.join(camera.layout(), camera.rate(), camera.buffers())?;
    camera.start()?;
    for _ in 0..3 {
        display.present(camera.next()?)?;
    }
    let master = first_card(drm_ffi::auth::release_master)?;
    let mut refused = None;
    for _ in 0..3 {
        let frame = camera.next()?;
        refused = refused.or(display.present(frame).err());
    }
    let error = refused.context("it presents without being master")?;
    note(&error.line());
    ensure!(error.kind() == Kind::Permission && error.errno() == Some(nix::libc::EACCES), "{error:?}");
    ensure!(error.line().contains("not the card's DRM master"), "{}", error.line());
    // Nor can it put back what was there; that is said, and once it may, it is done.
    let error = display.restore().err().context("restored without being master")?;
    ensure!(error.kind() == Kind::Permission, "{error:?}");
    drm_ffi::auth::acquire_master(borrowed(master))?;
    display.restore()?;
    drop((camera, display));
    before.is_back()?;
    drop(witness);
    PASSED
}

/// The card that this process has open as its master: `act` is done with each that is open until it is done with one.
fn first_card(act: impl Fn(BorrowedFd<'_>) -> std::io::Result<()>) -> Result<RawFd> {
    let card = card()?;
    let mut numbers = fs::read_dir("/proc/self/fd")?
        .flatten()
        .filter(|entry| fs::read_link(entry.path()).is_ok_and(|target| target == card))
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    numbers
        .find(|&number| act(borrowed(number)).is_ok())
        .context("no open card is the master's")
}

fn borrowed<'fd>(number: RawFd) -> BorrowedFd<'fd> {
    // SAFETY: the number was that of an open descriptor just now, its owner lives in the test, and this process has no other thread that
    // closes any.
    unsafe { BorrowedFd::borrow_raw(number) }
}
