//! Fences on their own, and release fences in a camera's queue: on real fences of vgem (and of sw_sync, where the kernel has it), which
//! signal when the test says so.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use dmaflow::endpoint::{Ready, Source};
use dmaflow::error::Kind;
use dmaflow::fence::{FenceState, SyncFile, Syncobj};
use dmaflow::frame::{Buffer, Room};
use dmaflow::memory::{Access, Allocator};
use dmaflow::v4l2::{Camera, CameraRequest, Device};
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::camera::{open, request};
use crate::harness::{Outcome, PASSED, Test, note};
use crate::modules::VirtioGpu;
use crate::sw_sync::Timeline;
use crate::vgem::{RenderNode, Vgem, now_us, render_node};

const NEEDS: &[&str] = &["vivid", "vgem", "udmabuf"];
const SYNCOBJS: &[&str] = &["vgem", "udmabuf", "virtio-gpu"];

pub const TESTS: &[Test] = &[
    Test { name: "fences::of_a_dma_buf", needs: NEEDS, seconds: 120, run: of_a_dma_buf },
    Test { name: "fences::put_into_a_dma_buf", needs: NEEDS, seconds: 120, run: put_into_a_dma_buf },
    Test { name: "fences::merged", needs: NEEDS, seconds: 120, run: merged },
    Test { name: "fences::sw_sync", needs: &["sw_sync"], seconds: 120, run: sw_sync },
    Test { name: "fences::syncobj", needs: SYNCOBJS, seconds: 120, run: syncobj },
    Test { name: "fences::release_holds_the_slot_back", needs: NEEDS, seconds: 120, run: release_holds },
    Test { name: "fences::release_survives_other_buffers", needs: NEEDS, seconds: 120, run: release_survives },
    Test { name: "fences::release_of_all_slots", needs: NEEDS, seconds: 120, run: release_of_all },
    Test { name: "fences::a_start_waits_for_a_slot", needs: NEEDS, seconds: 120, run: start_waits },
    Test { name: "fences::acquire_holds_the_slot_back", needs: NEEDS, seconds: 120, run: acquire_holds },
    Test { name: "fences::the_cpu_waits_before_it_reads", needs: NEEDS, seconds: 120, run: the_cpu_waits },
    Test { name: "fences::nothing_leaks", needs: NEEDS, seconds: 120, run: nothing_leaks },
];

/// As long as nothing must happen.
const NOT_YET: Duration = Duration::from_millis(200);

fn readable(file: &SyncFile) -> Result<bool> {
    Ok(poll(&mut [PollFd::new(file.as_fd(), PollFlags::POLLIN)], PollTimeout::ZERO)? == 1)
}

/// Everything that can be asked of a fence before and after its signal.
fn of_a_dma_buf() -> anyhow::Result<Outcome> {
    let (camera, vgem) = (open("XR24", (320, 180))?, Vgem::open()?);
    let dma_buf = camera.buffers()[0].dma_buf(0).context("a dma-buf")?;
    for access in [Access::Read, Access::ReadWrite] {
        let none = SyncFile::export(dma_buf, access)?;
        ensure!(none.is_signalled() && none.state()? == FenceState::Signalled, "nobody uses it: {none}");
        none.wait(Duration::ZERO)?;
    }
    // Of a writer: whoever wants to read has to wait.
    let signal = vgem.attach(dma_buf, true)?;
    let (read, write) = (SyncFile::export(dma_buf, Access::Read)?, SyncFile::export(dma_buf, Access::ReadWrite)?);
    for file in [&read, &write] {
        ensure!(!file.is_signalled() && !file.check()? && !readable(file)?, "{file} has signalled");
        ensure!(file.state()? == FenceState::Active, "{:?}", file.state()?);
        let fences = file.fences()?;
        ensure!(fences.len() == 1 && fences[0].driver == "vgem" && fences[0].timeline == "unbound", "{fences:?}");
        ensure!(fences[0].state == FenceState::Active && fences[0].signalled_at_ns.is_none(), "{fences:?}");
    }
    let start = Instant::now();
    let error = read.wait(NOT_YET).err().context("it did not wait")?;
    ensure!(start.elapsed() >= NOT_YET && error.kind() == Kind::Timeout, "{error:?} after {:?}", start.elapsed());
    let line = error.line();
    ensure!(line.contains("vgem (timeline unbound)") && line.contains("0.2 s"), "{line}");
    note(&line);
    let signaller = signal.after(NOT_YET);
    read.wait(Duration::from_secs(5))?;
    let at_us = signaller.join().expect("no panic")?;
    ensure!(read.check()? && readable(&write)? && write.state()? == FenceState::Signalled, "{write}");
    let told_us = read.fences()?[0].signalled_at_ns.context("no time")? / 1000;
    ensure!((at_us..=now_us()?).contains(&told_us), "signalled at {told_us}, and not at {at_us}");
    // Of a reader: who wants to read as well need not wait, who wants to write must.
    let signal = vgem.attach(dma_buf, false)?;
    let (read, write) = (SyncFile::export(dma_buf, Access::Read)?, SyncFile::export(dma_buf, Access::ReadWrite)?);
    ensure!(read.is_signalled() && !write.is_signalled(), "{read}; {write}");
    signal.now()?;
    ensure!(write.is_signalled(), "{write}");
    PASSED
}

fn put_into_a_dma_buf() -> anyhow::Result<Outcome> {
    let (camera, vgem) = (open("XR24", (320, 180))?, Vgem::open()?);
    let dma_buf = camera.buffers()[0].dma_buf(0).context("a dma-buf")?;
    let (fence, signal) = vgem.fence()?;
    fence.import_into(dma_buf, Access::Read)?;
    ensure!(SyncFile::export(dma_buf, Access::Read)?.is_signalled(), "a reader keeps readers waiting");
    ensure!(!SyncFile::export(dma_buf, Access::ReadWrite)?.is_signalled(), "a reader does not keep writers waiting");
    fence.import_into(dma_buf, Access::ReadWrite)?;
    ensure!(!SyncFile::export(dma_buf, Access::Read)?.is_signalled(), "a writer does not keep readers waiting");
    signal.now()?;
    ensure!(SyncFile::export(dma_buf, Access::ReadWrite)?.is_signalled(), "it was not that fence");
    // What is no sync file is refused, and by its name.
    let other = SyncFile::from(OwnedFd::from(fs::File::open("/dev/null")?));
    let error = other
        .import_into(dma_buf, Access::Read)
        .err()
        .context("/dev/null is no fence")?;
    ensure!(error.errno() == Some(libc::EINVAL) && error.call() == Some("DMA_BUF_IOCTL_IMPORT_SYNC_FILE"), "{error:?}");
    PASSED
}

fn merged() -> anyhow::Result<Outcome> {
    let vgem = Vgem::open()?;
    for first in [0, 1] {
        let [(a, a_signal), (b, b_signal)] = [vgem.fence()?, vgem.fence()?];
        let both = a.merge(&b)?;
        let fences = both.fences()?;
        ensure!(fences.len() == 2 && fences.iter().all(|fence| fence.driver == "vgem"), "{fences:?}");
        let mut signals = [a_signal, b_signal];
        if first == 1 {
            signals.reverse();
        }
        let [one, other] = signals;
        one.now()?;
        ensure!(a.is_signalled() == (first == 0) && b.is_signalled() == (first == 1), "the other one signalled");
        ensure!(!both.is_signalled() && !readable(&both)?, "it signalled with the first of two");
        let error = both.wait(Duration::from_millis(50)).err().context("it did not wait")?;
        ensure!(error.line().matches("vgem").count() == 1, "one of two is open: {}", error.line());
        other.now()?;
        ensure!(both.check()? && readable(&both)?, "both have signalled, and {both} has not");
        // One that has signalled can be merged as any other.
        ensure!(both.merge(&a)?.is_signalled(), "{both}");
    }
    PASSED
}

/// A timeline that this process drives. Closing it has its open fences fail.
fn sw_sync() -> anyhow::Result<Outcome> {
    let timeline = Timeline::open()?;
    let (first, second) = (timeline.fence(1)?, timeline.fence(2)?);
    ensure!(!first.is_signalled() && first.fences()?[0].driver == "sw_sync", "{:?}", first.fences()?);
    let late = first.wait(Duration::from_millis(50)).err().context("it has not signalled")?;
    ensure!(late.is_of_fence() && late.kind() == Kind::Timeout && late.line().contains("sw_sync"), "{}", late.line());
    timeline.advance(1)?;
    ensure!(first.check()? && !second.check()?, "{first}; {second}");
    let both = first.merge(&second)?;
    timeline.fail();
    ensure!(second.is_signalled() && second.state()? == FenceState::Failed(libc::ENOENT), "{:?}", second.state()?);
    for failed in [&second, &both] {
        let error = failed.wait(Duration::ZERO).err().context("failed work is no success")?;
        ensure!(error.kind() == Kind::System && error.errno() == Some(libc::ENOENT), "{error:?}");
        ensure!(error.is_of_fence() && error.line().contains("has failed"), "{}", error.line());
        note(&error.line());
    }
    // What had failed before is forgotten, as the kernel has it.
    let after = first.merge(&second)?;
    ensure!(after.state()? == FenceState::Signalled, "{:?}", after.state()?);
    PASSED
}

/// Into a syncobj and out of it again, on a device whose driver has them.
fn syncobj() -> anyhow::Result<Outcome> {
    let vgem = Vgem::open()?;
    let refused = Syncobj::new(&*vgem).err().context("vgem has syncobjs now: use it here")?;
    ensure!(refused.kind() == Kind::Unsupported && refused.line().contains("no syncobjs"), "{refused:?}");
    let driver = VirtioGpu::load()?;
    let device = render_node("virtio_gpu")?;
    let before = descriptors()?;
    let (fence, signal) = vgem.fence()?;
    let syncobj = Syncobj::new(&device)?;
    let error = syncobj.export().err().context("it holds no fence yet")?;
    ensure!(error.kind() == Kind::Invalid && error.line().contains("it holds no fence"), "{error:?}");
    syncobj.import(&fence)?;
    let out = syncobj.export()?;
    ensure!(!out.is_signalled() && out.fences()?[0].driver == "vgem", "{:?}", out.fences()?);
    let other = SyncFile::from(OwnedFd::from(fs::File::open("/dev/null")?));
    let error = syncobj.import(&other).err().context("/dev/null is no fence")?;
    ensure!(error.kind() == Kind::Invalid && error.line().contains("no sync file"), "{error:?}");
    // Whom the fence was handed to keeps it.
    drop((syncobj, fence));
    ensure!(!out.is_signalled(), "it has gone with the syncobj");
    signal.now()?;
    ensure!(out.check()?, "{out}");
    // A new fence takes the place of the one of before, in both directions.
    let again = Syncobj::from_sync_file(&device, &out)?;
    ensure!(again.handle() != 0 && again.export()?.is_signalled(), "{again:?}");
    let (fence, signal) = vgem.fence()?;
    again.import(&fence)?;
    let open = again.export()?;
    ensure!(!open.is_signalled() && out.is_signalled(), "{open}; {out}");
    signal.now()?;
    open.wait(Duration::from_secs(5))?;
    shared(&device, &vgem)?;
    timeline(&device, &vgem)?;
    drop((again, out, open, fence, other));
    ensure!(descriptors()? == before, "{} descriptors instead of {before}", descriptors()?);
    drop(device);
    driver.unload()?;
    PASSED
}

/// Passed on by a descriptor, as to another process: two handles to one syncobj.
fn shared(device: &RenderNode, vgem: &Arc<Vgem>) -> Result<()> {
    let one = Syncobj::new(device)?;
    let other = Syncobj::open(device, one.share()?)?;
    let (fence, signal) = vgem.fence()?;
    one.import(&fence)?;
    drop(one);
    let out = other.export()?;
    ensure!(!out.is_signalled() && out.fences()?[0].driver == "vgem", "{:?}", out.fences()?);
    signal.now()?;
    ensure!(out.check()?, "{out}");
    let refused = Syncobj::open(device, &fence).err().context("a sync file is no syncobj")?;
    ensure!(refused.kind() == Kind::Invalid && refused.line().contains("no syncobj"), "{refused:?}");
    Ok(())
}

/// Points of a timeline: each comes after those before it.
fn timeline(device: &RenderNode, vgem: &Arc<Vgem>) -> Result<()> {
    let timeline = Syncobj::new(device)?;
    let [(first, first_signal), (second, second_signal)] = [vgem.fence()?, vgem.fence()?];
    timeline.import_at(1, &first)?;
    timeline.import_at(2, &second)?;
    let [one, two] = [timeline.export_at(1)?, timeline.export_at(2)?];
    ensure!(!one.is_signalled() && !two.is_signalled(), "{one}; {two}");
    let missing = timeline.export_at(3).err().context("nobody has added point 3")?;
    ensure!(missing.kind() == Kind::Invalid && missing.line().contains("nobody has added"), "{missing:?}");
    second_signal.now()?;
    ensure!(second.is_signalled() && !two.is_signalled(), "point 2 came before point 1");
    first_signal.now()?;
    ensure!(one.check()? && two.check()?, "{one}; {two}");
    // A point that has come can still be asked for.
    ensure!(timeline.export_at(1)?.check()?, "point 1 is forgotten");
    Ok(())
}

fn camera(buffers: u32) -> Result<Camera> {
    let request = CameraRequest { buffers: Some(buffers), ..request("XR24", (320, 180)) };
    Ok(Camera::open(Device::find("vivid")?, &request)?)
}

/// Whether a slot comes among the next frames, each of which is dropped at once.
fn comes_again(camera: &mut Camera, slot: u32) -> Result<bool> {
    for _ in 0..3 * camera.buffers().len() {
        if camera.next()?.slot() == slot {
            return Ok(true);
        }
    }
    Ok(false)
}

fn release_holds() -> anyhow::Result<Outcome> {
    let (mut camera, vgem) = (camera(4)?, Vgem::open()?);
    let frame = camera.next()?;
    let slot = frame.slot();
    let [(first, first_signal), (second, second_signal)] = [vgem.fence()?, vgem.fence()?];
    frame.release_after(first);
    let clone = frame.clone();
    clone.release_after(second);
    drop((frame, clone));
    ensure!(!comes_again(&mut camera, slot)?, "slot {slot} was filled while it is read");
    ensure!(camera.release_fences().len() == 2, "{} fences", camera.release_fences().len());
    first_signal.now()?;
    ensure!(!comes_again(&mut camera, slot)?, "slot {slot} was filled while it is read by the other");
    second_signal.now()?;
    ensure!(comes_again(&mut camera, slot)?, "slot {slot} was lost");
    ensure!(camera.release_fences().is_empty(), "{:?}", camera.release_fences());
    // What a reader has put into the memory itself, taken along.
    let frame = camera.next()?;
    let slot = frame.slot();
    let signal = vgem.attach(frame.buffer().dma_buf(0).context("a dma-buf")?, false)?;
    frame.release_after_implicit_fences()?;
    drop(frame);
    ensure!(!comes_again(&mut camera, slot)?, "slot {slot} was filled while it is read");
    signal.now()?;
    ensure!(comes_again(&mut camera, slot)?, "slot {slot} was lost");
    PASSED
}

/// Memory that the camera gives up while a device reads it, and that it is given again: not filled before the device is done.
fn release_survives() -> anyhow::Result<Outcome> {
    let (mut camera, vgem) = (camera(4)?, Vgem::open()?);
    let room = Room::for_lens(&camera.memory_lens()?);
    let layout = *camera.layout();
    let buffers = Buffer::allocate_all(Allocator::Udmabuf, &layout, &room, 4)?;
    camera.use_buffers(buffers.clone())?;
    let frame = camera.next()?;
    let read = frame.buffer().clone();
    let (fence, signal) = vgem.fence()?;
    frame.release_after(fence);
    drop(frame);
    // Other memory, the same again, the same in another order.
    for (own, turned) in [(true, 0), (false, 0), (false, 1)] {
        camera.stop()?;
        if own {
            camera.use_own_buffers()?;
            camera.next()?;
            camera.stop()?;
        }
        let mut again = buffers.clone();
        again.rotate_left(turned);
        camera.use_buffers(again)?;
        let slot = (0u32..).zip(camera.buffers()).find(|(_, buffer)| buffer.same_memory(&read));
        let (slot, _) = slot.context("the memory is not there")?;
        ensure!(
            !comes_again(&mut camera, slot)?,
            "own {own}, turned {turned}: slot {slot} was filled while it is read"
        );
        ensure!(camera.release_fences().len() == 1, "{:?}", camera.release_fences());
    }
    signal.now()?;
    let slot = (0u32..).zip(camera.buffers()).find(|(_, buffer)| buffer.same_memory(&read));
    let (slot, _) = slot.context("the memory is not there")?;
    ensure!(comes_again(&mut camera, slot)?, "slot {slot} was lost");
    PASSED
}

/// Without a slot to fill, the signal itself is what frames come by; without one the stall names the fences.
fn release_of_all() -> anyhow::Result<Outcome> {
    let (mut camera, vgem) = (camera(4)?, Vgem::open()?);
    let mut signals = Vec::new();
    for _ in 0..camera.buffers().len() {
        let (fence, signal) = vgem.fence()?;
        camera.next()?.release_after(fence);
        signals.push(signal);
    }
    camera.set_watchdog(Duration::from_millis(400));
    let error = camera.next().err().context("a frame came from nowhere")?;
    let line = error.line();
    ensure!(error.kind() == Kind::Timeout && line.contains("behind a fence"), "{line}");
    ensure!(line.matches("waits for the fence of vgem (timeline unbound)").count() == signals.len(), "{line}");
    note(&line);
    camera.set_watchdog(Duration::from_secs(8));
    let signaller = signals.pop().context("no signal")?.after(NOT_YET);
    let start = Instant::now();
    camera.next()?;
    let waited = start.elapsed();
    signaller.join().expect("no panic")?;
    ensure!(waited >= NOT_YET && waited < Duration::from_secs(4), "a frame came after {waited:?}");
    // Closing vgem signals the others.
    drop((signals, vgem));
    let slots: std::collections::BTreeSet<_> = (0..16)
        .map(|_| camera.next().map(|frame| frame.slot()))
        .collect::<Result<_, _>>()?;
    ensure!(slots.len() == camera.buffers().len(), "only {slots:?} came back");
    PASSED
}

/// A flow that begins while devices still read every frame of the one before begins when one has done so.
fn start_waits() -> anyhow::Result<Outcome> {
    let (mut camera, vgem) = (camera(2)?, Vgem::open()?);
    let mut signals = Vec::new();
    let frames = (0..camera.buffers().len())
        .map(|_| camera.next())
        .collect::<Result<Vec<_>, _>>()?;
    for frame in frames {
        let (fence, signal) = vgem.fence()?;
        frame.release_after(fence);
        signals.push(signal);
    }
    camera.stop()?;
    camera.set_watchdog(Duration::from_millis(400));
    let start = Instant::now();
    let error = camera.start().err().context("it started without a buffer")?;
    ensure!(error.kind() == Kind::Timeout && error.line().contains("waits for the fence of vgem"), "{}", error.line());
    ensure!(start.elapsed() >= Duration::from_millis(400), "after {:?}", start.elapsed());
    camera.set_watchdog(Duration::from_secs(8));
    let signaller = signals.pop().context("no signal")?.after(NOT_YET);
    let start = Instant::now();
    camera.start()?;
    ensure!(start.elapsed() >= NOT_YET, "it started after {:?}", start.elapsed());
    let signalled = Instant::now();
    camera.next()?;
    note(&format!("a frame came {:?} after the start", signalled.elapsed()));
    signaller.join().expect("no panic")?;
    for signal in signals {
        signal.now()?;
    }
    camera.next()?;
    PASSED
}

/// A frame that is dropped before its acquire fence has signalled: a device still writes there.
fn acquire_holds() -> anyhow::Result<Outcome> {
    let (mut camera, vgem) = (camera(4)?, Vgem::open()?);
    let (fence, signal) = vgem.fence()?;
    let frame = camera.next()?.with_acquire_fence(fence);
    let slot = frame.slot();
    drop(frame);
    ensure!(!comes_again(&mut camera, slot)?, "slot {slot} was filled while another device writes there");
    signal.now()?;
    ensure!(comes_again(&mut camera, slot)?, "slot {slot} was lost");
    // What is in the memory itself, taken along.
    let frame = camera.next()?;
    let signal = vgem.attach(frame.buffer().dma_buf(0).context("a dma-buf")?, true)?;
    let frame = frame.with_implicit_fences()?;
    let fence = frame.acquire_fence().context("it has none")?;
    ensure!(!fence.is_signalled() && frame.wait_acquired(Duration::ZERO).is_err(), "{fence}");
    signal.now()?;
    frame.wait_acquired(Duration::ZERO)?;
    PASSED
}

fn the_cpu_waits() -> anyhow::Result<Outcome> {
    let (mut camera, vgem) = (camera(4)?, Vgem::open()?);
    type Read = fn(&dmaflow::frame::Frame) -> Result<()>;
    let ways: [(&str, Read); 3] = [
        ("read", |frame| frame.read().map(drop).map_err(Into::into)),
        ("view", |frame| frame.view("test").map(drop).map_err(Into::into)),
        ("png", |frame| dmaflow::sink::frame_to_rgb(frame).map(drop).map_err(Into::into)),
    ];
    for (name, read) in ways {
        let (fence, signal) = vgem.fence()?;
        let frame = camera.next()?.with_acquire_fence(fence);
        let signaller = signal.after(NOT_YET);
        let start = Instant::now();
        read(&frame).with_context(|| name.to_owned())?;
        ensure!(start.elapsed() >= NOT_YET, "{name} did not wait");
        signaller.join().expect("no panic")?;
    }
    PASSED
}

fn descriptors() -> Result<usize> {
    Ok(fs::read_dir("/proc/self/fd")?.count())
}

fn nothing_leaks() -> anyhow::Result<Outcome> {
    let (mut camera, vgem) = (camera(4)?, Vgem::open()?);
    camera.next()?;
    let before = descriptors()?;
    for round in 0..200 {
        let [(a, a_signal), (b, b_signal)] = [vgem.fence()?, vgem.fence()?];
        let both = a.merge(&b)?;
        ensure!(both.wait(Duration::ZERO).is_err(), "round {round}");
        let frame = camera.next()?.with_acquire_fence(a.try_clone()?);
        frame.release_after(both);
        frame.release_after(b);
        drop(frame);
        a_signal.now()?;
        b_signal.now()?;
        camera.recycle()?;
        let ready = Ready::default();
        drop(camera.try_next(ready)?);
    }
    camera.recycle()?;
    ensure!(descriptors()? == before, "{} descriptors of before {before}", descriptors()?);
    drop(camera);
    // Also of a queue that goes while fences are open.
    let before = descriptors()?;
    let mut camera = self::camera(4)?;
    let (fence, signal) = vgem.fence()?;
    camera.next()?.release_after(fence);
    drop(camera);
    ensure!(descriptors()? == before, "{} descriptors of before {before}", descriptors()?);
    signal.now()?;
    PASSED
}
