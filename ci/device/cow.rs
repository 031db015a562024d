//! Copy-on-write views: what they copy, what they leave alone, and what the queue does with them.

use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use dmaflow::endpoint::{Sink, Source};
use dmaflow::error::Kind;
use dmaflow::frame::{CowView, Frame, ViewPages, ViewPolicy};
use dmaflow::kms::{Display, DisplayRequest};
use dmaflow::memory::{Allocator, page_size};
use dmaflow::v4l2::{Camera, CameraRequest, Device, RateRequest};

use crate::camera::request;
use crate::capture::{buffers, picture};
use crate::driver::with_the_driver;
use crate::harness::{Outcome, PASSED, Test, note};
use crate::modules::vivid;
use crate::process::{dma_bufs, dmaflow, finish, number};

const NEEDS: &[&str] = &["vivid", "udmabuf"];
const SCREEN: &[&str] = &["vivid", "vkms", "udmabuf"];

pub const TESTS: &[Test] = &[
    Test { name: "cow::vmalloc", needs: NEEDS, seconds: 120, run: || pages_of(Pool::Vmalloc) },
    Test { name: "cow::dma_contig", needs: NEEDS, seconds: 120, run: || pages_of(Pool::Contiguous) },
    Test { name: "cow::udmabuf", needs: NEEDS, seconds: 120, run: || pages_of(Pool::Udmabuf) },
    Test { name: "cow::dma_heap_is_a_snapshot", needs: NEEDS, seconds: 60, run: snapshot },
    Test { name: "cow::two_memory_planes", needs: NEEDS, seconds: 60, run: two_memory_planes },
    Test { name: "cow::detached_bytes_stay", needs: NEEDS, seconds: 120, run: detached_bytes_stay },
    Test { name: "cow::hoarder_is_detached", needs: NEEDS, seconds: 120, run: hoarder_is_detached },
    Test { name: "cow::hoarder_is_waited_for", needs: NEEDS, seconds: 60, run: hoarder_is_waited_for },
    Test { name: "cow::hoarder_is_an_error", needs: NEEDS, seconds: 60, run: hoarder_is_an_error },
    Test { name: "cow::holder_beside_the_queue", needs: NEEDS, seconds: 120, run: holder_beside_the_queue },
    Test { name: "cow::the_screen_shows_vmalloc", needs: SCREEN, seconds: 120, run: || on_screen(Pool::Vmalloc) },
    Test { name: "cow::the_screen_shows_dma_contig", needs: SCREEN, seconds: 120, run: || on_screen(Pool::Contiguous) },
    Test { name: "cow::the_screen_shows_udmabuf", needs: SCREEN, seconds: 120, run: || on_screen(Pool::Udmabuf) },
    Test { name: "cow::a_hoarder_in_the_command", needs: NEEDS, seconds: 120, run: in_the_command },
    Test { name: "cow::views_of_one_frame", needs: NEEDS, seconds: 60, run: views_of_one_frame },
];

#[derive(Clone, Copy, PartialEq, Debug)]
enum Pool {
    Vmalloc,
    Contiguous,
    Udmabuf,
}

const SIZE: (u32, u32) = (640, 360);
const ROW: usize = 640 * 4;

fn camera(pool: Pool) -> Result<Camera> {
    camera_at(pool, 30.0)
}

fn camera_at(pool: Pool, rate: f64) -> Result<Camera> {
    if pool == Pool::Contiguous {
        vivid(&["allocators=1"])?;
    }
    let request = CameraRequest { rate: RateRequest::Exactly(rate), buffers: Some(4), ..request("XR24", SIZE) };
    let mut camera = Camera::open(Device::find("vivid")?, &request)?;
    if pool == Pool::Udmabuf {
        let pool = buffers(&camera, Allocator::Udmabuf, 4)?;
        camera.use_buffers(pool)?;
    }
    Ok(camera)
}

/// All rows, read through the view.
fn seen(view: &CowView) -> Vec<u8> {
    let mut all = vec![0; ROW * SIZE.1 as usize];
    // The camera is this process's own: nobody takes its frames back, and empty is no picture.
    let read = all
        .chunks_mut(ROW)
        .enumerate()
        .try_for_each(|(y, row)| view.row(0, y as u32, row));
    read.map_or_else(|_| Vec::new(), |()| all)
}

/// Writes one byte into each of these pages of memory plane 0.
fn scribble(view: &mut CowView, pages: impl IntoIterator<Item = usize>) -> Result<()> {
    for page in pages {
        let at = page * page_size() + 100;
        let written = view.write(0, (at / ROW) as u32, (at % ROW) as u32, &[0xa5])?;
        ensure!(written == 1, "nothing was written into page {page}");
    }
    Ok(())
}

fn copied(camera: &Camera, cause: &str) -> (u64, u64) {
    let copies = camera.view_copies();
    let entry = copies.iter().find(|entry| entry.cause.contains(cause));
    entry.map_or((0, 0), |entry| (entry.count, entry.bytes))
}

/// Nothing is copied by reading, k pages by writing to k, and the frame that others see stays as it is.
fn pages_of(pool: Pool) -> anyhow::Result<Outcome> {
    let before = dma_bufs();
    let mut camera = camera(pool)?;
    let all = ROW * SIZE.1 as usize / page_size();
    let mut total = 0;
    for round in 0..8 {
        let frame = camera.next()?;
        let original = picture(&frame)?;
        for pages in [0, 1, 7, all] {
            let mut view = frame.view("test")?;
            ensure!(view.pages() == ViewPages::Device, "{view:?}");
            ensure!(camera.views().len() == 1 && camera.views()[0].holder == "test", "{:?}", camera.views());
            ensure!(seen(&view) == original, "round {round}: the view shows another picture");
            ensure!(view.copied_pages()? == 0, "{} pages copied by reading", view.copied_pages()?);
            scribble(&mut view, (0..pages).map(|page| page * (all / pages.max(1))))?;
            ensure!(view.copied_pages()? == pages as u64, "{} of {pages}", view.copied_pages()?);
            total += pages as u64;
            let now = seen(&view);
            let differ = now.iter().zip(&original).filter(|(a, b)| a != b).count();
            ensure!(differ <= pages && (pages == 0 || differ > 0), "{differ} bytes differ after {pages} were written");
            ensure!(picture(&frame)? == original, "the frame that others see has changed");
            drop(view);
            ensure!(camera.views().is_empty(), "{:?}", camera.views());
        }
    }
    let (count, bytes) = copied(&camera, "written");
    ensure!((count, bytes) == (total, total * page_size() as u64), "{count} pages, {bytes} bytes, not {total}");
    ensure!(copied(&camera, "snapshot").0 == 0 && copied(&camera, "detached").0 == 0, "{:?}", camera.view_copies());
    note(&format!("{:?}", camera.view_copies()));
    drop(camera);
    ensure!(dma_bufs() == before, "dma-bufs stayed");
    PASSED
}

/// The dma-heap maps shared alone: one copy, in the account, and the lease is free at once.
fn snapshot() -> anyhow::Result<Outcome> {
    let mut camera = camera(Pool::Vmalloc)?;
    let pool = buffers(&camera, Allocator::SystemHeap, 4)?;
    camera.use_buffers(pool)?;
    let frame = camera.next()?;
    let original = picture(&frame)?;
    let mut view = frame.view("test")?;
    ensure!(view.pages() == ViewPages::Snapshot && camera.views().is_empty(), "{view:?}");
    let slot = frame.slot();
    drop(frame);
    let came_back = (0..12).any(|_| camera.next().is_ok_and(|frame| frame.slot() == slot));
    ensure!(came_back, "a snapshot keeps the lease");
    ensure!(seen(&view) == original, "the snapshot changed");
    ensure!(view.write(0, 1, 4, &[1, 2, 3])? == 3, "it cannot be written");
    view.detach()?;
    ensure!(view.pages() == ViewPages::Snapshot, "{view:?}");
    let (count, bytes) = copied(&camera, "snapshot");
    ensure!(count == 1 && bytes >= original.len() as u64 && view.copies().len() == 1, "{:?}", camera.view_copies());
    PASSED
}

fn two_memory_planes() -> anyhow::Result<Outcome> {
    vivid(&["multiplanar=2"])?;
    let code = dmaflow::format::Fourcc::new(b"NM12");
    let asked = CameraRequest { code: Some(code), size: Some(SIZE), ..CameraRequest::default() };
    let mut camera = Camera::open(Device::find("vivid")?, &asked)?;
    let frame = camera.next()?;
    let original = picture(&frame)?;
    let mut view = frame.view("test")?;
    ensure!(view.as_ptr(1).is_some() && view.as_ptr(2).is_none(), "its memory planes");
    ensure!(view.write(0, 3, 10, &[1])? == 1 && view.write(1, 3, 10, &[2])? == 1, "nothing was written");
    ensure!(view.copied_pages()? == 2, "{}", view.copied_pages()?);
    let addresses = (view.as_ptr(0), view.as_ptr(1));
    view.detach()?;
    ensure!(addresses == (view.as_ptr(0), view.as_ptr(1)), "its addresses changed");
    let mut row = [0; 640];
    view.row(1, 3, &mut row)?;
    ensure!(row[10] == 2 && picture(&frame)? == original, "chroma");
    ensure!(row[..10] == original[640 * 360 + 3 * 640..][..10], "chroma");
    PASSED
}

/// The same address holds the same bytes, with the holder's own, while the camera fills the buffer again and again.
fn detached_bytes_stay() -> anyhow::Result<Outcome> {
    for pool in [Pool::Vmalloc, Pool::Udmabuf, Pool::Contiguous] {
        let mut camera = camera_at(pool, 60.0)?;
        let frame = camera.next()?;
        let slot = frame.slot();
        let mut view = frame.view("test")?;
        drop(frame);
        scribble(&mut view, [3, 100])?;
        let (address, bytes) = (view.as_ptr(0), seen(&view));
        view.detach()?;
        ensure!(view.pages() == ViewPages::Detached && camera.views().is_empty(), "{view:?}");
        let mut overwritten = 0;
        while overwritten < 100 {
            let frame = camera.next()?;
            overwritten += u32::from(frame.slot() == slot);
            if overwritten % 10 == 0 && frame.slot() == slot {
                ensure!(picture(&frame)? != bytes, "the camera shows the same picture, so this proves nothing");
                ensure!(view.as_ptr(0) == address && seen(&view) == bytes, "{pool:?}: bytes changed");
            }
        }
        scribble(&mut view, [5])?;
        ensure!(copied(&camera, "detached").0 == 1 && copied(&camera, "written").0 == 2, "{:?}", camera.view_copies());
        // The memory is used again.
        drop(view);
        for _ in 0..6 {
            camera.next()?.view("again")?.detach()?;
        }
    }
    PASSED
}

/// Frames a second of the hoarder's camera.
const RATE: f64 = 30.0;
/// Buffers that a queue of four leaves to vivid's driver, which needs one: that one and the next.
const LEFT_TO_THE_DRIVER: usize = 2;

/// Takes 300 frames and keeps views of the last 20: the queue detaches the oldest, so that the driver never has fewer buffers than it needs.
/// That is asked of the driver, not of the clock: how many frames a camera loses besides is the host's affair (vivid keeps time by the
/// clock, and on a host that is busy skips some in any loop).
fn hoarder_is_detached() -> anyhow::Result<Outcome> {
    let mut camera = camera_at(Pool::Vmalloc, RATE)?;
    let mut views: Vec<(CowView, Vec<u8>)> = Vec::new();
    // Who keeps none has none detached.
    for number in 0..60 {
        let view = camera.next()?.view("no hoarder")?;
        let bytes = seen(&view);
        ensure!(seen(&view) == bytes, "frame {number} changed");
    }
    ensure!(copied(&camera, "detached").0 == 0, "{:?}", camera.view_copies());
    for number in 0..300_usize {
        let frame = camera.next()?;
        let left = with_the_driver(&camera)?;
        ensure!(left >= LEFT_TO_THE_DRIVER, "with frame {number} taken the driver has {left} buffers");
        let view = frame.view(&format!("hoarder {number}"))?;
        drop(frame);
        let bytes = seen(&view);
        // The last 20 are kept; what the oldest shows is what it showed at first.
        if views.len() == 20 {
            let (oldest, then) = views.remove(0);
            ensure!(seen(&oldest) == then, "frame {}: the bytes of a detached view changed", number - 20);
            ensure!(oldest.pages() == ViewPages::Detached, "{oldest:?}");
        }
        views.push((view, bytes));
    }
    let (count, _) = copied(&camera, "detached");
    ensure!((290..300).contains(&count), "{count} views were detached");
    let lost = camera.counts().dropped;
    note(&format!("300 frames, {lost} lost; {:?}; {} attached", camera.view_copies(), camera.views().len()));
    PASSED
}

/// A camera with a view on every buffer.
fn hoarded(policy: ViewPolicy) -> Result<(Camera, Vec<CowView>)> {
    let mut camera = camera(Pool::Vmalloc)?;
    camera.set_view_policy(policy);
    let views = (0..camera.buffers().len())
        .map(|_| Ok(camera.next()?.view("hoarder")?))
        .collect::<Result<Vec<_>>>()?;
    // From here on no frame can come.
    camera.set_watchdog(Duration::from_millis(500));
    Ok((camera, views))
}

/// Says who holds what, and for how long.
fn names_the_hoarder(line: &str) -> Result<()> {
    note(line);
    for slot in 0..4 {
        let thread = format!("slot {slot} by hoarder (process {0}, thread {0})", std::process::id());
        ensure!(line.contains(&thread), "it does not say \"{thread}\": {line}");
    }
    ensure!(line.contains(" s, "), "it does not say since when: {line}");
    Ok(())
}

fn hoarder_is_waited_for() -> anyhow::Result<Outcome> {
    let (mut camera, mut views) = hoarded(ViewPolicy::Wait)?;
    let start = Instant::now();
    let error = camera.next().err().context("a frame without a buffer")?;
    ensure!(error.kind() == Kind::Timeout && start.elapsed() >= Duration::from_millis(500), "{error:?}");
    names_the_hoarder(&error.line())?;
    ensure!(views.iter().all(|view| view.pages() == ViewPages::Device), "a view was detached");
    views.pop();
    camera.next()?;
    PASSED
}

fn hoarder_is_an_error() -> anyhow::Result<Outcome> {
    let (mut camera, mut views) = hoarded(ViewPolicy::Error)?;
    let error = camera.next().err().context("a frame without a buffer")?;
    ensure!(error.kind() == Kind::Busy, "{error:?}");
    names_the_hoarder(&error.line())?;
    views.remove(0);
    camera.next()?;
    // Another policy helps at once.
    drop(camera.next());
    camera.set_view_policy(ViewPolicy::Detach);
    camera.next()?;
    PASSED
}

/// A thread that uses its views all the time loses no write to the queue that detaches them, and sees no byte of a later frame.
fn holder_beside_the_queue() -> anyhow::Result<Outcome> {
    let mut camera = camera(Pool::Udmabuf)?;
    let (send, receive) = mpsc::sync_channel::<CowView>(64);
    let holder = std::thread::spawn(move || -> Result<(u64, u64)> {
        let (mut round, mut detached) = (0_u64, 0);
        let mut writing: Vec<(CowView, u64)> = Vec::new();
        let mut reading: Vec<(CowView, Vec<u8>)> = Vec::new();
        loop {
            round += 1;
            match receive.try_recv() {
                Ok(view) if view.meta().sequence % 2 == 0 => writing.push((view, 0)),
                Ok(view) => {
                    let bytes = seen(&view);
                    reading.push((view, bytes));
                }
                Err(mpsc::TryRecvError::Disconnected) if round > 50 => break,
                Err(_) => {}
            }
            if writing.len() > 3 {
                detached += u64::from(writing.remove(0).0.pages() == ViewPages::Detached);
            }
            if reading.len() > 3 {
                detached += u64::from(reading.remove(0).0.pages() == ViewPages::Detached);
            }
            for (view, bytes) in &reading {
                ensure!(seen(view) == *bytes, "bytes of a view changed");
            }
            for (view, last) in &mut writing {
                scribble_and_check(view, last, round)?;
            }
        }
        Ok((round, detached))
    });
    for _ in 0..120 {
        let view = camera.next()?.view("holder")?;
        if send.send(view).is_err() {
            break;
        }
    }
    drop(send);
    let Ok(result) = holder.join() else { bail!("the holder panicked") };
    let (rounds, detached) = result?;
    ensure!(detached > 50, "{detached} of its views were detached");
    note(&format!("{rounds} rounds, {detached} views detached; {:?}", camera.view_copies()));
    PASSED
}

/// Looks for what the last round has written, and writes this round's number: three times by call, once by pointer.
fn scribble_and_check(view: &mut CowView, last: &mut u64, round: u64) -> Result<()> {
    let mut row = [0; 8];
    for y in [0, 100, 200, 359] {
        view.row(0, y, &mut row)?;
        ensure!(*last == 0 || row == last.to_ne_bytes(), "row {y}: write {last} was lost");
    }
    *last = round;
    for y in [0, 100, 200] {
        ensure!(view.write(0, y, 0, &round.to_ne_bytes())? == 8, "not written");
    }
    let raw = view.raw();
    let (start, len) = raw.as_mut_ptr(0).context("no memory")?;
    ensure!(len >= 360 * ROW, "{len} bytes");
    // SAFETY: the offset is inside the view's memory, which is valid for writing while `raw` is held.
    unsafe { start.add(359 * ROW).cast::<[u8; 8]>().write(round.to_ne_bytes()) };
    Ok(())
}

fn views_of_one_frame() -> anyhow::Result<Outcome> {
    let mut camera = camera(Pool::Vmalloc)?;
    let frame = camera.next()?;
    let original = picture(&frame)?;
    let mut views = (0..dmaflow::frame::MAX_VIEWS)
        .map(|number| frame.view(&number.to_string()))
        .collect::<Result<Vec<_>, _>>()?;
    let error = frame.view("one more").err().context("more views than there is room for")?;
    ensure!(error.kind() == Kind::Busy, "{error:?}");
    for (number, view) in views.iter_mut().enumerate() {
        scribble(view, [number])?;
    }
    for (number, view) in views.iter().enumerate() {
        ensure!(view.copied_pages()? == 1, "view {number}");
        let first = seen(view).iter().zip(&original).position(|(a, b)| a != b);
        let expected = number * page_size() + 100;
        ensure!(first.is_none_or(|first| first == expected), "view {number} sees another's byte at {first:?}");
    }
    // The frame is held as well, so there is nothing to be had by detaching: its views stay.
    let slot = frame.slot();
    for _ in 0..12 {
        ensure!(camera.next()?.slot() != slot, "a leased slot was filled");
    }
    ensure!(views.iter().all(|view| view.pages() == ViewPages::Device), "a view was detached for nothing");
    ensure!(picture(&frame)? == original, "the frame changed");
    let same: Frame = frame.clone();
    drop((frame, views));
    ensure!(camera.views().is_empty() && seen(&same.view("last")?) == original, "{:?}", camera.views());
    PASSED
}

/// A program scribbles on each frame while a display shows it: what is shown is the frame, by the display's own account (its CRC).
fn on_screen(pool: Pool) -> anyhow::Result<Outcome> {
    let mut camera = camera(pool)?;
    let request = DisplayRequest { verify: true, ..DisplayRequest::default() };
    let mut display = Display::find("vkms", request)?;
    crate::display::join(&mut display, &camera)?;
    let mut before: Option<CowView> = None;
    for number in 0..12_u8 {
        let frame = camera.next()?;
        display.inspect(&frame, number.into())?;
        let mut view = frame.view("scribbler")?;
        ensure!(view.pages() == ViewPages::Device, "{view:?}");
        for row in 0..SIZE.1 {
            ensure!(view.write(0, row, 0, &[number; ROW])? == ROW, "row {row} was not written");
        }
        let pages = (ROW * SIZE.1 as usize).div_ceil(page_size()) as u64;
        ensure!(view.copied_pages()? == pages, "{} pages copied instead of {pages}", view.copied_pages()?);
        display.present(frame)?;
        // Scribbling goes on while it is on screen, on the frame before too.
        if let Some(before) = &mut before {
            before.write(0, 7, 0, &[!number; ROW])?;
        }
        before = Some(view);
    }
    while display.finish()?.is_some() {}
    let verdict = display.verdict().context("a verdict")?;
    ensure!((verdict.checked, verdict.wrong) == (12, 0), "{verdict:?}");
    PASSED
}

/// A camera whose driver keeps time by the clock loses frames on a host that stalls: one run without a loss shows that the queue does not
/// starve.
const TRIES: u32 = 3;

/// `--keep-views`: by policy the camera loses nothing, waits and says for whom, or stops at once and says so.
fn in_the_command() -> anyhow::Result<Outcome> {
    let pipe = |policy: &str| {
        let options = format!(
            "pipe --from vivid --to null --format XR24 --size 640x360 --fps 5 --buffers 4 --keep-views 4 --view-policy {policy} \
             --frames 40 --json"
        );
        finish(&mut dmaflow(&options))
    };
    let mut result = pipe("detach")?.json(0)?;
    for _ in 1..TRIES {
        if number(&result, "frames/dropped_by_camera")? == 0 {
            break;
        }
        result = pipe("detach")?.json(0)?;
    }
    let counts = (number(&result, "frames/captured")?, number(&result, "frames/dropped_by_camera")?);
    ensure!(counts == (40, 0), "{result}");
    // Each frame's view was detached, but for those still open at the end: one copy each, in the ledger.
    let detached = number(&result["copies"][0], "count")?;
    ensure!((30..=40).contains(&detached) && number(&result, "bytes_copied")? > 0, "{result}");
    for policy in ["wait", "error"] {
        pipe(policy)?.one_line(1, &["slot", "by dmaflow --keep-views", "process"])?;
    }
    // The policy holds for a source that is no camera, too.
    let line = "pipe --from pattern --to null --format XR24 --keep-views 8 --view-policy error --frames 60 --json";
    finish(&mut dmaflow(line))?.one_line(1, &["slot", "by dmaflow --keep-views"])?;
    // It waits for as long as its watchdog does, and then says for whom.
    let begin = Instant::now();
    finish(&mut dmaflow(&line.replace("error", "wait")))?.one_line(1, &["slot", "by dmaflow --keep-views"])?;
    ensure!(begin.elapsed() >= Duration::from_secs(2), "it waited for {:?} only", begin.elapsed());
    // A display that shows one picture has no more than one on screen, however many views there are of those before.
    for policy in ["error", "wait"] {
        let line = format!(
            "pipe --from vivid --to vkms --format XR24 --size 640x360 --fps 15 --keep-views 64 --view-policy {policy} --json"
        );
        let run = finish(&mut dmaflow(&line))?;
        ensure!(run.stderr.contains("0 queued") && run.stderr.contains("1 on screen"), "{}", run.stderr);
    }
    // Where frames are copied views are of the copies, and do not keep them from going on either.
    let line = "pipe --from vivid --to vkms --format YUYV --size 320x180 --keep-views 4 --frames 30 --json";
    let result = finish(&mut dmaflow(line))?.json(0)?;
    ensure!(number(&result, "frames/presented")? == 30, "{result}");
    PASSED
}
