//! Fences between the kernel and Vulkan: vgem's, which signal when the test says so, waited for by a GPU's queue, and a GPU's, given out.

use std::fs;
use std::os::fd::OwnedFd;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use dmaflow::endpoint::{JoinError, Sink, Source};
use dmaflow::error::Kind;
use dmaflow::fence::{FenceState, SyncFile};
use dmaflow::format::Layout;
use dmaflow::vulkan::ash::vk;
use dmaflow::vulkan::{Crop, Gpu, GpuConverter, GpuFence, Semaphore, Vulkan};

use crate::camera::{format, open};
use crate::gpu::{silent, watched};
use crate::harness::{Outcome, PASSED, Test, note};
use crate::picture::{Picture, fill, made, noise};
use crate::vgem::Vgem;

const NEEDS: &[&str] = &["vivid", "vgem", "udmabuf", "vulkaninfo"];

pub const TESTS: &[Test] = &[
    Test { name: "gpu_sync::a_queue_waits", needs: NEEDS, seconds: 120, run: a_queue_waits },
    Test { name: "gpu_sync::a_fence_in_and_out", needs: NEEDS, seconds: 120, run: a_fence_in_and_out },
    Test { name: "gpu_sync::what_is_no_fence", needs: NEEDS, seconds: 120, run: what_is_no_fence },
    Test { name: "gpu_sync::a_conversion_waits", needs: NEEDS, seconds: 120, run: a_conversion_waits },
    Test { name: "gpu_sync::a_sink_waits", needs: NEEDS, seconds: 120, run: a_sink_waits },
    Test { name: "gpu_sync::nothing_leaks", needs: NEEDS, seconds: 240, run: nothing_leaks },
];

/// As long as nothing must happen.
const NOT_YET: Duration = Duration::from_millis(200);
/// By then it must have, also on an emulated processor.
const SOON: Duration = Duration::from_secs(8);

/// Submits work without commands. What it signals is exported right after that: of one whose work has been waited for first, the validation
/// layer (1.4.309) forgets that the export has taken the signal out, and finds fault with the next signal.
fn submit(gpu: &Gpu, wait: &[vk::Semaphore], signal: &[vk::Semaphore], fence: vk::Fence) -> Result<()> {
    let stages = vec![vk::PipelineStageFlags::ALL_COMMANDS; wait.len()];
    let info = vk::SubmitInfo::default()
        .wait_semaphores(wait)
        .wait_dst_stage_mask(&stages)
        .signal_semaphores(signal);
    let queue = gpu.queue().lock().unwrap_or_else(PoisonError::into_inner);
    // SAFETY: the queue is locked; the callers use each handle once at a time, and wait for the end before they drop one.
    unsafe { gpu.device().queue_submit(*queue, &[info], fence) }?;
    Ok(())
}

fn has_ended(gpu: &Gpu, fence: vk::Fence, wait: Duration) -> Result<bool> {
    // SAFETY: the fence is of this device, and was submitted or imported into.
    match unsafe { gpu.device().wait_for_fences(&[fence], true, u64::try_from(wait.as_nanos())?) } {
        Ok(()) => Ok(true),
        Err(vk::Result::TIMEOUT) => Ok(false),
        Err(other) => Err(other.into()),
    }
}

/// A fence of the kernel's is imported into a semaphore: what waits for that begins with the signal, and what comes out of it signals after.
fn a_queue_waits() -> anyhow::Result<Outcome> {
    let (gpu, vgem) = (watched()?, Vgem::open()?);
    let offer = gpu.sync();
    ensure!(offer.import_semaphore && offer.export_semaphore && offer.import_fence && offer.export_fence, "{offer:?}");
    let (mut before, mut after) = (Semaphore::new(&gpu)?, Semaphore::new(&gpu)?);
    let done = GpuFence::new(&gpu)?;
    // Twice: an import is for one wait, an export takes the signal out.
    for _ in 0..2 {
        let (file, signal) = vgem.fence()?;
        before.import(Some(file))?;
        submit(&gpu, &[before.raw()], &[after.raw()], done.raw())?;
        ensure!(!has_ended(&gpu, done.raw(), NOT_YET)?, "it did not wait");
        let signaller = signal.after(NOT_YET);
        // SAFETY: what signals it was submitted.
        let out = unsafe { after.export() }?;
        ensure!(has_ended(&gpu, done.raw(), SOON)?, "it still waits");
        signaller.join().expect("no panic")?;
        if let Some(out) = out {
            out.wait(SOON)?;
            ensure!(out.state()? == FenceState::Signalled, "{out}: {:?}", out.state()?);
        }
        // SAFETY: it has signalled, and nothing is submitted with it.
        unsafe { gpu.device().reset_fences(&[done.raw()]) }?;
    }
    // One that has signalled already may be none.
    before.import(None)?;
    submit(&gpu, &[before.raw()], &[], done.raw())?;
    ensure!(has_ended(&gpu, done.raw(), SOON)?, "it waits for nothing");
    // Given away it is destroyed by whoever has it.
    let raw = after.into_raw();
    // SAFETY: ours now, and unused.
    unsafe { gpu.device().destroy_semaphore(raw, None) };
    drop((before, done));
    silent(gpu)?;
    PASSED
}

fn a_fence_in_and_out() -> anyhow::Result<Outcome> {
    let (gpu, vgem) = (watched()?, Vgem::open()?);
    let mut fence = GpuFence::new(&gpu)?;
    let (file, signal) = vgem.fence()?;
    fence.import(Some(file))?;
    ensure!(!has_ended(&gpu, fence.raw(), NOT_YET)?, "it did not wait");
    let signaller = signal.after(NOT_YET);
    ensure!(has_ended(&gpu, fence.raw(), SOON)?, "it still waits");
    signaller.join().expect("no panic")?;
    // A reset ends the import: it is itself again, and stands for what is submitted with it.
    // SAFETY: it has signalled, and nothing is submitted with it.
    unsafe { gpu.device().reset_fences(&[fence.raw()]) }?;
    submit(&gpu, &[], &[], fence.raw())?;
    // SAFETY: work was submitted with it.
    if let Some(out) = unsafe { fence.export() }? {
        out.wait(SOON)?;
    }
    // The export has reset it.
    submit(&gpu, &[], &[], fence.raw())?;
    ensure!(has_ended(&gpu, fence.raw(), SOON)?, "it does not end");
    drop(fence);
    silent(gpu)?;
    PASSED
}

/// A descriptor that is no sync file gets no further than the import, and is closed.
fn what_is_no_fence() -> anyhow::Result<Outcome> {
    let gpu = watched()?;
    let (mut semaphore, mut fence) = (Semaphore::new(&gpu)?, GpuFence::new(&gpu)?);
    let fds = fs::read_dir("/proc/self/fd")?.count();
    let null = || -> Result<_> { Ok(Some(SyncFile::from(OwnedFd::from(fs::File::open("/dev/null")?)))) };
    for imported in [semaphore.import(null()?), fence.import(null()?)] {
        let error = imported.err().context("it was taken")?;
        ensure!(error.kind() == Kind::Unsupported, "{}", error.line());
        note(&error.line());
    }
    drop((semaphore, fence));
    ensure!(fs::read_dir("/proc/self/fd")?.count() == fds, "descriptors are left");
    silent(gpu)?;
    PASSED
}

/// A frame that is still being written is converted when it has been, and what comes out can be waited for.
fn a_conversion_waits() -> anyhow::Result<Outcome> {
    let size = (66, 34);
    let (gpu, vgem) = (watched()?, Vgem::open()?);
    let (from, to) = (Layout::packed(format("YUYV"), size, 1)?, Layout::packed(format("XR24"), size, 1)?);
    let mut converter = GpuConverter::new(&gpu, &from, &to, Crop::all(size))?;
    let (source, target) = (made(&from)?, made(&to)?);
    for seed in 1..=3 {
        let wanted = noise(&from, seed)?;
        // Nothing was written yet when the conversion is asked for: it is just before the signal.
        let (file, signal) = vgem.fence()?;
        let (written, start) = (source.clone(), Instant::now());
        let writer = std::thread::spawn(move || -> Result<()> {
            std::thread::sleep(NOT_YET);
            fill(&written, seed)?;
            signal.now()
        });
        let done = converter.start(&source, Some(file), &target)?;
        if let Some(fence) = done {
            fence.wait(SOON)?;
        }
        ensure!(start.elapsed() >= NOT_YET, "it did not wait: {:?}", start.elapsed());
        writer.join().expect("no panic")?;
        let (steps, place) = Picture::of(&wanted)?.furthest(&target)?;
        ensure!(steps <= 1.001, "picture {seed}: {steps:.2} steps at {place}");
        // The same buffers without a fence, and with a wait.
        let wanted = noise(&from, seed + 100)?;
        fill(&source, seed + 100)?;
        converter.convert(&source, &target)?;
        let (steps, place) = Picture::of(&wanted)?.furthest(&target)?;
        ensure!(steps <= 1.001, "picture {}: {steps:.2} steps at {place}", seed + 100);
    }
    ensure!(converter.imports() == 2, "{} imports", converter.imports());
    // One that does not signal is not waited for without limit, also by a driver that would.
    let (file, signal) = vgem.fence()?;
    match converter.start(&source, Some(file), &target) {
        Err(JoinError::Failed(error)) if error.kind() == Kind::Timeout => {
            ensure!(error.line().contains("vgem (timeline unbound)"), "{}", error.line());
        }
        other => anyhow::bail!("{other:?}"),
    }
    signal.now()?;
    converter.convert(&source, &target)?;
    drop((converter, source, target));
    silent(gpu)?;
    PASSED
}

/// The sink reads no frame before its acquire fence has signalled; one that does not is an error with its name.
fn a_sink_waits() -> anyhow::Result<Outcome> {
    let (gpu, vgem) = (watched()?, Vgem::open()?);
    let mut camera = open("XR24", (320, 180))?;
    let mut sink = Vulkan::new(gpu.clone(), true)?;
    sink.join(camera.layout(), camera.rate(), camera.buffers())?;
    let (file, signal) = vgem.fence()?;
    let signaller = signal.after(NOT_YET);
    let frame = camera.next()?.with_acquire_fence(file);
    let start = Instant::now();
    sink.inspect(&frame, 0)?;
    sink.present(frame)?.context("not read")?;
    ensure!(start.elapsed() >= NOT_YET / 2, "it did not wait: {:?}", start.elapsed());
    signaller.join().expect("no panic")?;
    let verdict = sink.verdict().context("no verdict")?;
    ensure!((verdict.checked, verdict.wrong) == (1, 0), "{verdict:?}");
    let (file, signal) = vgem.fence()?;
    let frame = camera.next()?.with_acquire_fence(file);
    let error = sink.present(frame).err().context("it was read")?;
    ensure!(error.kind() == Kind::Timeout && error.line().contains("vgem (timeline unbound)"), "{}", error.line());
    note(&error.line());
    signal.now()?;
    // And it goes on.
    let frame = camera.next()?;
    sink.inspect(&frame, 2)?;
    sink.present(frame)?.context("not read")?;
    drop((sink, camera));
    silent(gpu)?;
    PASSED
}

fn nothing_leaks() -> anyhow::Result<Outcome> {
    let (gpu, vgem) = (watched()?, Vgem::open()?);
    let (mut before, mut after) = (Semaphore::new(&gpu)?, Semaphore::new(&gpu)?);
    let done = GpuFence::new(&gpu)?;
    let fds = fs::read_dir("/proc/self/fd")?.count();
    for _ in 0..300 {
        let (file, signal) = vgem.fence()?;
        before.import(Some(file))?;
        signal.now()?;
        submit(&gpu, &[before.raw()], &[after.raw()], done.raw())?;
        // SAFETY: what signals it was submitted.
        drop(unsafe { after.export() }?);
        ensure!(has_ended(&gpu, done.raw(), SOON)?, "it still waits");
        // SAFETY: the fence has signalled, and nothing is submitted with it.
        unsafe { gpu.device().reset_fences(&[done.raw()]) }?;
    }
    // The driver may keep the last import until the next.
    let now = fs::read_dir("/proc/self/fd")?.count();
    ensure!(now <= fds + 1, "{now} descriptors, {fds} before");
    drop((before, after, done));
    silent(gpu)?;
    PASSED
}
