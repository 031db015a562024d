//! Capturing into memory that the camera did not make (`V4L2_MEMORY_DMABUF`).

use std::path::Path;

use anyhow::{Context, Result, ensure};
use dmaflow::endpoint::Source;
use dmaflow::error::Kind;
use dmaflow::format::{Fourcc, Layout};
use dmaflow::frame::{Buffer, Frame, Room};
use dmaflow::memory::Allocator;
use dmaflow::v4l2::{Camera, CameraRequest, Device};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, munmap};

use crate::camera::{format, open, request};
use crate::harness::{Outcome, PASSED, Test, note};
use crate::modules::vivid;
use crate::process::dma_bufs;

const NEEDS: &[&str] = &["vivid", "udmabuf"];

pub const TESTS: &[Test] = &[
    Test { name: "capture::into_udmabuf", needs: NEEDS, seconds: 60, run: || into(Allocator::Udmabuf) },
    Test { name: "capture::into_the_dma_heap", needs: NEEDS, seconds: 60, run: || into(Allocator::SystemHeap) },
    Test { name: "capture::multi_planar", needs: NEEDS, seconds: 60, run: multi_planar },
    Test { name: "capture::buffers_that_do_not_fit", needs: NEEDS, seconds: 60, run: unfit },
    Test { name: "capture::contiguous_memory_needed", needs: NEEDS, seconds: 60, run: contiguous },
];

/// Buffers for a camera as it is.
pub fn buffers(camera: &Camera, allocator: Allocator, count: u32) -> Result<Vec<Buffer>> {
    let room = Room { rows: 16, ..Room::for_lens(&camera.memory_lens()?) };
    Ok(Buffer::allocate_all(allocator, camera.layout(), &room, count)?)
}

/// All rows of all colour planes.
pub fn picture(frame: &Frame) -> Result<Vec<u8>> {
    let reader = frame.buffer().read()?;
    let layout = *frame.buffer().layout();
    let mut all = Vec::new();
    for plane in 0..layout.planes().len() {
        let mut row = vec![0; layout.format().row_bytes(plane, layout.width()) as usize];
        for y in 0..layout.format().rows(plane, layout.height()) {
            reader.row(plane, y, &mut row);
            all.extend_from_slice(&row);
        }
    }
    Ok(all)
}

/// Frames come in these buffers, each in its slot's, and they show something that moves.
fn flows(camera: &mut Camera, given: &[Buffer], frames: usize) -> Result<()> {
    let mut last = Vec::new();
    let mut moved = 0;
    let mut used = std::collections::BTreeSet::new();
    for _ in 0..frames {
        let frame = camera.next()?;
        let own = given.get(frame.slot() as usize).context("a slot without a buffer")?;
        ensure!(frame.buffer().same_handle(own), "slot {} came with another slot's buffer", frame.slot());
        used.insert(frame.slot());
        let now = picture(&frame)?;
        ensure!(now.iter().any(|&byte| byte != now[0]), "a picture of nothing");
        moved += u32::from(now != last);
        last = now;
    }
    ensure!(used.len() == given.len(), "{} of {} buffers were used", used.len(), given.len());
    ensure!(moved > 2, "the picture stands still");
    Ok(())
}

fn into(allocator: Allocator) -> anyhow::Result<Outcome> {
    let before = dma_bufs();
    for name in ["XR24", "NV12", "YUYV"] {
        let mut camera = open(name, (320, 180))?;
        let given = buffers(&camera, allocator, 4)?;
        camera.use_buffers(given.clone())?;
        ensure!(camera.buffers().len() == 4 && dma_bufs().difference(&before).count() == 4, "{:?}", dma_bufs());
        flows(&mut camera, &given, 20).context(name)?;
        let error = camera
            .use_own_buffers()
            .err()
            .context("buffers were changed while it streams")?;
        ensure!(error.kind() == Kind::Busy, "{error:?}");
        camera.stop()?;
        camera.start()?;
        flows(&mut camera, &given, 8).context("started again")?;
        // And back.
        camera.stop()?;
        camera.use_own_buffers()?;
        let own = camera.buffers().to_vec();
        flows(&mut camera, &own, 8).context("its own again")?;
        ensure!(own.iter().all(|own| given.iter().all(|given| !own.same_memory(given))), "the same memory");
    }
    ensure!(dma_bufs() == before, "dma-bufs stayed");
    PASSED
}

fn multi_planar() -> anyhow::Result<Outcome> {
    vivid(&["multiplanar=2"])?;
    for code in [b"NM12", b"NM16", b"YM12"] {
        let asked = CameraRequest { code: Some(Fourcc::new(code)), size: Some((320, 180)), ..CameraRequest::default() };
        let mut camera = Camera::open(Device::open(Path::new("/dev/video0"))?, &asked)?;
        let layout = *camera.layout();
        ensure!(layout.memory_planes() > 1, "{layout}");
        for allocator in Allocator::DMA_BUF {
            let given = buffers(&camera, allocator, 3)?;
            camera.use_buffers(given)?;
            ensure!(*camera.layout() == layout, "{} instead of {layout}", camera.layout());
            let given = camera.buffers().to_vec();
            flows(&mut camera, &given, 12).with_context(|| format!("{allocator}, {layout}"))?;
            camera.stop()?;
        }
    }
    PASSED
}

/// Refused before the driver is asked, by the field's name; and the camera goes on with buffers of its own.
fn unfit() -> anyhow::Result<Outcome> {
    let mut camera = open("XR24", (320, 180))?;
    let layout = *camera.layout();
    let made = |layout: Layout, least: usize| Buffer::allocate(Allocator::Udmabuf, &layout, &Room::for_lens(&[least]));
    let plain = Buffer::allocate(Allocator::Plain, &layout, &Room::default())?;
    let cases = [
        ("stride in plane 0", made(layout.with_stride_align(1024)?, 0)?),
        ("size", made(Layout::packed(format("XR24"), (640, 360), 1)?, 0)?),
        ("format", made(Layout::packed(format("RG16"), (320, 180), 1280)?, 1 << 20)?),
        ("no dma-buf", plain),
    ];
    for (what, buffer) in cases {
        let error = camera
            .use_buffers(vec![buffer])
            .err()
            .with_context(|| format!("{what} was taken"))?;
        ensure!(error.kind() == Kind::Invalid && error.line().contains(what), "{what}: {error:?}");
    }
    let error = camera.use_buffers(Vec::new()).err().context("no buffers were taken")?;
    ensure!(error.kind() == Kind::Invalid, "{error:?}");
    camera.next()?;
    drop(camera);
    // What the driver wants is at least what the rows need.
    let mut camera = Camera::open(Device::find("vivid")?, &request("NV12", (320, 180)))?;
    let wanted = camera.memory_lens()?;
    ensure!(wanted[0] >= camera.layout().memory_len(0), "{wanted:?}");
    camera.use_buffers(buffers(&camera, Allocator::Udmabuf, 3)?)?;
    camera.next()?;
    PASSED
}

/// Memory with a hole at every other page. While it is held, the kernel gives out these holes first when somebody wants single pages: what
/// it gives is not contiguous, as it may be by chance on a machine that has just started.
pub struct Shattered(std::ptr::NonNull<std::ffi::c_void>);

impl Shattered {
    const LEN: usize = 256 << 20;

    pub fn new() -> Result<Shattered> {
        let len = std::num::NonZeroUsize::new(Shattered::LEN).context("a length")?;
        let (access, flags) = (ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_PRIVATE);
        // SAFETY: new memory at an address of the kernel's choice.
        let start = unsafe { mmap_anonymous(None, len, access, flags) }?;
        let memory = Shattered(start);
        // SAFETY: the advices are for the memory just mapped, of which nobody knows.
        unsafe {
            madvise(start, Shattered::LEN, MmapAdvise::MADV_NOHUGEPAGE)?;
            madvise(start, Shattered::LEN, MmapAdvise::MADV_POPULATE_WRITE)?;
            for page in (0..Shattered::LEN).step_by(2 * dmaflow::memory::page_size()) {
                madvise(start.byte_add(page), dmaflow::memory::page_size(), MmapAdvise::MADV_DONTNEED)?;
            }
        }
        Ok(memory)
    }
}

impl Drop for Shattered {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this length.
        let _ = unsafe { munmap(self.0, Shattered::LEN) };
    }
}

/// vivid with `allocators=1` needs contiguous memory: the refusal says so, and the camera's own buffers are there at once.
fn contiguous() -> anyhow::Result<Outcome> {
    vivid(&["allocators=1"])?;
    let mut camera = open("XR24", (640, 360))?;
    let _shattered = Shattered::new()?;
    for allocator in Allocator::DMA_BUF {
        let given = buffers(&camera, allocator, 3)?;
        let error = match camera.use_buffers(given) {
            Ok(()) => camera.start().err().with_context(|| format!("it captures into {allocator}"))?,
            Err(error) => error,
        };
        note(&format!("{allocator}: {} (errno {:?})", error.line(), error.errno()));
        ensure!(error.line().contains("contiguous") && error.errno().is_some(), "{error:?}");
        camera.use_own_buffers()?;
        let own = camera.buffers().to_vec();
        flows(&mut camera, &own, 8)?;
        camera.stop()?;
    }
    PASSED
}
