//! In the steady state a pipe allocates nothing.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Result, ensure};
use dmaflow::endpoint::{Sink, Source};
use dmaflow::kms::{Display, DisplayRequest, Present};
use dmaflow::ladder::Path;
use dmaflow::pipe::{Limits, Pipe};
use dmaflow::v4l2::{Camera, CameraRequest, Device, RateRequest};
use dmaflow::vulkan::{Gpu, GpuRequest, Vulkan};

use crate::camera::request;
use crate::harness::{Outcome, PASSED, Test, note};

const NEEDS: &[&str] = &["vivid", "vkms"];

pub const TESTS: &[Test] = &[
    Test { name: "alloc::fifo", needs: NEEDS, seconds: 60, run: || nothing(Present::Fifo) },
    Test { name: "alloc::mailbox", needs: NEEDS, seconds: 60, run: || nothing(Present::Mailbox) },
    Test { name: "alloc::frames_by_hand", needs: NEEDS, seconds: 60, run: by_hand },
    Test { name: "alloc::vulkan", needs: &["vivid", "udmabuf", "vulkaninfo"], seconds: 300, run: vulkan },
    Test { name: "alloc::converted", needs: &["vivid", "vkms", "udmabuf", "vulkaninfo"], seconds: 300, run: converted },
];

/// Counts every call; each test is a process of its own, with one thread that allocates.
struct Counting;

static CALLS: AtomicU64 = AtomicU64::new(0);
/// Bytes allocated and not freed.
static HELD: AtomicU64 = AtomicU64::new(0);

fn count(more: usize, less: usize) {
    CALLS.fetch_add(1, Ordering::Relaxed);
    HELD.fetch_add(more as u64, Ordering::Relaxed);
    HELD.fetch_sub(less as u64, Ordering::Relaxed);
}

/// What this process holds of Rust's heap now, in bytes.
pub fn held() -> u64 {
    HELD.load(Ordering::Relaxed)
}

// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size(), 0);
        // SAFETY: the caller's promise is the one that `System` asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size(), 0);
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size, layout.size());
        // SAFETY: as above.
        unsafe { System.realloc(at, layout, size) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        count(0, layout.size());
        // SAFETY: as above.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn calls() -> u64 {
    CALLS.load(Ordering::Relaxed)
}

/// A counter that counts nothing would pass every test.
fn the_counter_counts() -> Result<()> {
    let before = calls();
    drop(std::hint::black_box(Box::new(before)));
    ensure!(calls() == before + 2, "the allocator is not the counting one");
    Ok(())
}

fn camera(format: &str, size: (u32, u32)) -> Result<Camera> {
    let request = CameraRequest { rate: RateRequest::Exactly(60.0), ..request(format, size) };
    Ok(Camera::open(Device::find("vivid")?, &request)?)
}

const SIZE: (u32, u32) = (640, 360);
const FRAMES: u64 = 200;
const WARM: u64 = 20;

fn nothing(present: Present) -> anyhow::Result<Outcome> {
    let mut display = Display::find("vkms", DisplayRequest { present, ..DisplayRequest::default() })?;
    flow(&mut display, camera("XR24", SIZE)?, Path::ZeroCopy)
}

/// Neither does the sink that has a GPU read each frame: what a driver allocates in C is its own.
fn vulkan() -> anyhow::Result<Outcome> {
    let mut sink = Vulkan::new(Gpu::open(&GpuRequest::default())?, true)?;
    flow(&mut sink, camera("XR24", (320, 180))?, Path::ZeroCopy)
}

/// Nor the conversion by a GPU, between its buffers and the display's.
fn converted() -> anyhow::Result<Outcome> {
    // Its HDMI input is scaled to any size: an emulated processor that emulates a GPU is to have little to do.
    let request = CameraRequest { rate: RateRequest::FastestUpTo(60.0), input: Some(3), ..request("YUYV", (144, 72)) };
    let camera = Camera::open(Device::find("vivid")?, &request)?;
    flow(&mut Display::find("vkms", DisplayRequest::default())?, camera, Path::Convert)
}

fn flow(sink: &mut dyn Sink, mut camera: Camera, path: Path) -> anyhow::Result<Outcome> {
    the_counter_counts()?;
    let limits = Limits { frames: Some(FRAMES), duration: None };
    let pipe = Pipe::join(&mut camera, sink, path, limits)?;
    let (mut first, mut last, mut frames) = (0, 0, 0);
    let account = pipe.run(None, &mut |progress| {
        if progress.captured <= WARM {
            first = calls();
        } else if progress.captured < FRAMES {
            last = calls();
            frames += 1;
        }
    })?;
    ensure!(account.captured == FRAMES && frames > 100, "{account:?}, {frames} frames looked at");
    ensure!(first > 0 && last == first, "{} calls of the allocator in {frames} frames", last - first);
    note(&format!("{frames} frames without an allocation"));
    PASSED
}

/// The same for a program with its own loop.
fn by_hand() -> anyhow::Result<Outcome> {
    let mut camera = camera("XR24", SIZE)?;
    let mut display = Display::find("vkms", DisplayRequest::default())?;
    display.join(camera.layout(), camera.rate(), camera.buffers())?;
    for _ in 0..WARM {
        display.present(camera.next()?)?;
    }
    let before = calls();
    for _ in 0..100 {
        let frame = camera.next()?;
        let clone = frame.clone();
        display.present(frame)?;
        drop(clone);
    }
    let made = calls() - before;
    ensure!(made == 0, "{made} calls of the allocator in 100 frames");
    PASSED
}
