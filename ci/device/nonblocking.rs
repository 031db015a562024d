//! What a display really shows while frames are sent to it without waiting: a plain fifo, of which `--verify`, which waits for each
//! picture, says nothing. vkms's own CRCs tell, read beside it: each must be that of a whole frame, and frames come in order.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::OpenOptionsExt;

use anyhow::{Context, Result, ensure};
use dmaflow::endpoint::{JoinError, Rung, Shown, Sink, Source};
use dmaflow::error::Kind;
use dmaflow::format::{Format, Layout};
use dmaflow::frame::{Buffer, Frame};
use dmaflow::kms::{Display, DisplayRequest, Present};
use dmaflow::ladder::Path;
use dmaflow::memory::Allocator;
use dmaflow::pattern::{Pattern, PatternRequest};
use dmaflow::pipe::{Limits, Pipe};
use nix::libc;

use crate::camera::{format, open};
use crate::harness::{Outcome, PASSED, Test, note};
use crate::modules::{Witness, debugfs};
use crate::moves::crcs;
use crate::process::State;

pub const TESTS: &[Test] = &[
    Test { name: "nonblocking::the_test_card", needs: &["vkms", "udmabuf"], seconds: 300, run: the_test_card },
    Test { name: "nonblocking::the_camera", needs: &["vivid", "vkms"], seconds: 300, run: the_camera },
    Test { name: "nonblocking::few_buffers", needs: &["vkms", "udmabuf"], seconds: 300, run: few_buffers },
];

const FRAMES: u64 = 150;

/// A display, and beside it the pictures that went there and the CRCs that came back.
struct Watched {
    display: Display,
    /// The pixels of each frame, before the display has seen it.
    sent: Vec<Vec<u8>>,
    data: Option<fs::File>,
    seen: Vec<u32>,
}

impl Watched {
    /// Reads what CRCs there are; the kernel keeps 127 of them.
    fn look(&mut self) {
        if let Some(data) = &mut self.data {
            self.seen.extend(crcs(data));
        }
    }

    /// The stream of CRCs begins, with a picture of ours on screen.
    fn watch(&mut self) -> Result<()> {
        let folder = debugfs().context("vkms is not in debugfs")?.join("crtc-0/crc");
        fs::write(folder.join("control"), "auto")?;
        let data = fs::File::options()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(folder.join("data"))?;
        self.data = Some(data);
        Ok(())
    }
}

impl Sink for Watched {
    fn name(&self) -> &str {
        self.display.name()
    }

    fn formats(&self) -> Option<Vec<Format>> {
        self.display.formats()
    }

    fn join(&mut self, layout: &Layout, rate: Option<f64>, buffers: &[Buffer]) -> Result<Rung, JoinError> {
        self.display.join(layout, rate, buffers)
    }

    fn inspect(&mut self, frame: &Frame, _: u64) -> dmaflow::Result<()> {
        let (width, height) = frame.buffer().layout().size();
        let row = width as usize * 4;
        let mut pixels = vec![0; row * height as usize];
        let reader = frame.buffer().read()?;
        for (y, out) in (0..).zip(pixels.chunks_exact_mut(row)) {
            reader.row(0, y, out);
        }
        self.sent.push(pixels);
        Ok(())
    }

    fn present(&mut self, frame: Frame) -> dmaflow::Result<Option<Shown>> {
        let shown = self.display.present(frame)?;
        if self.data.is_none()
            && let Err(cause) = self.watch()
        {
            let error = dmaflow::Error::new(Kind::System, "read the CRCs of", self.display.name());
            return Err(error.because(cause.to_string()));
        }
        self.look();
        Ok(shown)
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        self.display.event_fd()
    }

    fn dispatch(&mut self) -> dmaflow::Result<Option<Shown>> {
        self.display.dispatch()
    }

    fn finish(&mut self) -> dmaflow::Result<Option<Shown>> {
        let shown = self.display.finish();
        self.look();
        shown
    }
}

/// What vkms reports for an XR24 picture in the middle of a mode: rows of 16 bits for each of alpha, red, green and blue, black around.
fn predicted(pixels: &[u8], size: (u32, u32), mode: (u32, u32)) -> u32 {
    let black = [0xff, 0xff, 0, 0, 0, 0, 0, 0];
    let (left, top) = ((mode.0 - size.0) / 2, (mode.1 - size.1) / 2);
    let side = |width: u32| black.repeat(width as usize);
    let (before, after) = (side(left), side(mode.0 - size.0 - left));
    // The kernel's crc32_le begins with 0 and inverts nothing.
    let mut hasher = crc32fast::Hasher::new_with_initial(u32::MAX);
    (0..top).for_each(|_| hasher.update(&side(mode.0)));
    let mut row = Vec::with_capacity(size.0 as usize * 8);
    for line in pixels.chunks_exact(size.0 as usize * 4) {
        row.clear();
        for pixel in line.chunks_exact(4) {
            row.extend([0xff, 0xff, pixel[2], pixel[2], pixel[1], pixel[1], pixel[0], pixel[0]]);
        }
        [&before, &row, &after].into_iter().for_each(|part| hasher.update(part));
    }
    (0..mode.1 - size.1 - top).for_each(|_| hasher.update(&side(mode.0)));
    !hasher.finalize()
}

/// Lets frames flow to a display that does not verify, and compares what vkms says of each picture with the frames sent.
fn all_whole_and_in_order(source: &mut dyn Source, frames: u64) -> Result<()> {
    let witness = Witness::new()?;
    let before = State::read();
    let display = Display::find("vkms", DisplayRequest { present: Present::Fifo, ..DisplayRequest::default() })?;
    let mut watched = Watched { display, sent: Vec::new(), data: None, seen: Vec::new() };
    let limits = Limits { frames: Some(frames), duration: None };
    let account = Pipe::join(source, &mut watched, Path::ZeroCopy, limits)?.run(None, &mut |_| {})?;
    ensure!(account.captured == frames && account.presented == frames, "{account:?}");
    let mode = watched.display.mode().context("no mode")?;
    let size = |text: &str| -> Option<(u32, u32)> {
        let (width, height) = text.rsplit(' ').next()?.split_once('x')?;
        Some((width.parse().ok()?, height.parse().ok()?))
    };
    let mode = size(&mode).with_context(|| format!("the mode is {mode}"))?;
    let shape = source.layout().size();
    watched.display.restore()?;
    let Watched { sent, seen, data, display } = watched;
    drop((data, display));
    // The places of the frames with each CRC: a picture may come twice.
    let mut places: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
    for (place, pixels) in sent.iter().enumerate() {
        places.entry(predicted(pixels, shape, mode)).or_default().push(place);
    }
    let (mut last, mut torn, mut back) = (0, Vec::new(), Vec::new());
    for (at, crc) in seen.iter().enumerate() {
        match places.get(crc).map(|of| of.iter().find(|place| **place >= last)) {
            Some(Some(place)) => last = *place,
            Some(None) => back.push(at),
            None => torn.push((at, last)),
        }
    }
    let different = seen.iter().collect::<std::collections::BTreeSet<_>>().len();
    note(&format!("{} CRCs, {different} different, of {} pictures", seen.len(), places.len()));
    ensure!(torn.is_empty(), "{} of {} CRCs are of no frame (CRC, frame before): {torn:?}", torn.len(), seen.len());
    ensure!(back.is_empty(), "these CRCs are of frames before the one shown last: {back:?}");
    // vkms skips some while it composes; what it looked at must be most of the run all the same.
    ensure!(different as u64 * 4 > frames, "only {different} different pictures were seen of {frames} frames");
    ensure!(last + 8 > sent.len(), "the last picture seen is frame {last} of {}", sent.len());
    before.is_back()?;
    drop(witness);
    Ok(())
}

fn card(buffers: u32) -> Result<Pattern> {
    let request = PatternRequest {
        format: Some(format("XR24")),
        size: (640, 480),
        rate: 60.0,
        buffers,
        allocator: Some(Allocator::Udmabuf),
        ..PatternRequest::default()
    };
    Ok(Pattern::new(&request)?)
}

fn the_test_card() -> anyhow::Result<Outcome> {
    all_whole_and_in_order(&mut card(4)?, FRAMES)?;
    PASSED
}

fn the_camera() -> anyhow::Result<Outcome> {
    all_whole_and_in_order(&mut open("XR24", (640, 360))?, FRAMES)?;
    PASSED
}

/// With no buffer to spare.
fn few_buffers() -> anyhow::Result<Outcome> {
    all_whole_and_in_order(&mut card(3)?, FRAMES)?;
    PASSED
}
