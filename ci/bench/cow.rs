//! `bench-cow`: what copy-on-write views cost beside a shared mapping and beside a copy; see README.md beside this file.
//!
//! Wants a guest whose clock counts instructions (`tools/vm/run --icount`), vivid, udmabuf and root. Prints a table for each pool and size,
//! and exits with 1 if a budget is missed.

#![expect(clippy::print_stdout, reason = "the tables are this program's output")]

use std::hint::black_box;
use std::os::fd::AsFd;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use dmaflow::endpoint::Source;
use dmaflow::format::Format;
use dmaflow::frame::{Buffer, CowView, Frame, Room};
use dmaflow::memory::{Access, Allocator, CpuAccess, Mapping, page_size};
use dmaflow::v4l2::{Camera, CameraRequest, Device};
use nix::time::{ClockId, clock_gettime};

/// Of each measurement; the median counts.
const RUNS: usize = 9;
const SIZES: [(u32, u32); 3] = [(640, 360), (1280, 720), (1920, 1080)];

/// What something costs, in nanoseconds of the thread's CPU time: instructions, where the clock counts those.
fn timed(what: impl FnOnce() -> Result<()>) -> Result<f64> {
    let now = || clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID);
    let before = now()?;
    what()?;
    let after = now()?;
    let nanos = |time: nix::sys::time::TimeSpec| time.tv_sec() as f64 * 1e9 + time.tv_nsec() as f64;
    Ok(nanos(after) - nanos(before))
}

/// The median of some runs.
fn median(run: impl FnMut(usize) -> Result<f64>) -> Result<f64> {
    let mut all = (0..RUNS).map(run).collect::<Result<Vec<_>>>()?;
    all.sort_by(f64::total_cmp);
    Ok(all[RUNS / 2])
}

/// Copies as the kernel copies a page on x86: `rep movsb`, which the clock counts as an instruction for each byte. The C library takes
/// 32 bytes at a time for long copies.
fn copy_bytewise(from: &[u8], to: &mut [u8]) {
    let len = from.len().min(to.len());
    #[cfg(target_arch = "x86_64")]
    // SAFETY: both slices have `len` bytes and cannot overlap; the registers are those that the instruction uses.
    unsafe {
        std::arch::asm!(
            "rep movsb",
            inout("rcx") len => _,
            inout("rsi") from.as_ptr() => _,
            inout("rdi") to.as_mut_ptr() => _,
            options(nostack, preserves_flags)
        );
    }
    #[cfg(not(target_arch = "x86_64"))]
    to[..len].copy_from_slice(&from[..len]);
}

/// The rows of a picture, read one after the other.
struct Rows {
    bytes: usize,
    count: u32,
    out: Vec<u8>,
}

impl Rows {
    fn new((width, height): (u32, u32)) -> Rows {
        let bytes = width as usize * 4;
        Rows { bytes, count: height, out: vec![0; bytes] }
    }

    fn read(&mut self, mut row: impl FnMut(u32, &mut [u8])) {
        for y in 0..self.count {
            row(y, &mut self.out);
            black_box(&mut self.out);
        }
    }

    /// Writes one byte into every hundredth page.
    fn scribble(&self, view: &mut CowView, pages: usize) {
        for page in 0..pages {
            let at = page * 100 * page_size() + 64;
            // The frame is this process's own.
            let _ = view.write(0, (at / self.bytes) as u32, (at % self.bytes) as u32, &[1]);
        }
    }
}

struct Table {
    lines: Vec<(&'static str, f64)>,
}

impl Table {
    /// Measures and notes one thing.
    fn add(&mut self, what: &'static str, run: impl FnMut(usize) -> Result<f64>) -> Result<f64> {
        let cost = median(run).context(what)?;
        self.lines.push((what, cost));
        Ok(cost)
    }
}

/// Measures everything on one frame, and prints it. Whether the budgets are met.
fn measure(name: &str, size: (u32, u32), frames: &[Frame]) -> Result<bool> {
    let (frame, fresh) = frames.split_first().context("no frames")?;
    let buffer = frame.buffer();
    let len = size.0 as usize * size.1 as usize * 4;
    let dma_buf = buffer.dma_buf(0).context("no dma-buf")?;
    let mut rows = Rows::new(size);
    let (from, mut to) = (vec![1_u8; len], vec![2_u8; len]);
    let mut table = Table { lines: Vec::new() };

    let shared = Mapping::new(dma_buf.as_fd(), len, Access::Read)?;
    let memcpy = table.add("memcpy of the frame", |_| {
        timed(|| {
            shared.read(0, black_box(&mut to));
            Ok(())
        })
    })?;
    let bytewise = table.add("the same by `rep movsb`, as the kernel copies pages", |_| {
        timed(|| {
            copy_bytewise(black_box(&from), black_box(&mut to));
            Ok(())
        })
    })?;

    drop(buffer.read()?);
    let shared_read = table.add("shared mapping (kept) read in full, row by row", |_| {
        timed(|| {
            let reader = buffer.read()?;
            rows.read(|y, out| reader.row(0, y, out));
            Ok(())
        })
    })?;
    drop(frame.view("bench")?);
    let view_read = table.add("view opened, read in full row by row, dropped", |_| {
        timed(|| {
            let view = frame.view("bench")?;
            rows.read(|y, out| view.row(0, y, out).unwrap_or_default());
            Ok(view.check()?)
        })
    })?;
    let shared_whole = table.add("shared mapping (kept) read in full, at once", |_| {
        timed(|| {
            let access = CpuAccess::begin(dma_buf, Access::Read)?;
            shared.read(0, black_box(&mut to));
            Ok(access.end()?)
        })
    })?;
    let view_whole = table.add("view opened, read in full at once, dropped", |_| {
        timed(|| Ok(frame.view("bench")?.read(0, 0, black_box(&mut to))?))
    })?;
    let bytes = rows.bytes;
    let shared_new = table.add("shared mapping made, read in full, dropped", |_| {
        timed(|| {
            let mapping = Mapping::new(dma_buf.as_fd(), len, Access::Read)?;
            rows.read(|y, out| mapping.read(y as usize * bytes, out));
            Ok(())
        })
    })?;
    let first_read = table.add("the first view of a buffer: mapped, read in full, dropped", |run| {
        let fresh = fresh.get(run).context("too few fresh frames")?;
        timed(|| {
            let view = fresh.view("bench")?;
            rows.read(|y, out| view.row(0, y, out).unwrap_or_default());
            Ok(view.check()?)
        })
    })?;
    table.add("view opened and dropped", |_| {
        timed(|| {
            drop(frame.view("bench")?);
            Ok(())
        })
    })?;

    let pages = (len / page_size()).div_ceil(100);
    let write = table.add("1 % of the pages written", |_| {
        let mut view = frame.view("bench")?;
        let cost = timed(|| {
            rows.scribble(&mut view, pages);
            Ok(())
        })?;
        ensure!(view.copied_pages()? == pages as u64, "{} pages", view.copied_pages()?);
        Ok(cost)
    })?;
    table.add("view opened, 1 % of the pages written, dropped", |_| {
        timed(|| {
            rows.scribble(&mut frame.view("bench")?, pages);
            Ok(())
        })
    })?;
    let mut detach = |what, addressed: bool| {
        table.add(what, |_| {
            let view = frame.view("bench")?;
            if addressed {
                view.as_ptr(0).context("no memory")?;
            }
            timed(|| Ok(view.detach()?))
        })
    };
    let detach_rows = detach("view detached", false)?;
    let detach_address = detach("view detached whose address is known", true)?;

    println!("{name}, XR24 {}x{}, {} pages; instructions", size.0, size.1, len / page_size());
    for (what, cost) in &table.lines {
        println!("  {what:<64} {cost:>12.0}");
    }
    let budgets = [
        ("view opened, read at once, dropped / shared mapping read", view_whole / shared_whole, 1.05),
        ("the same, row by row", view_read / shared_read, 1.05),
        ("view made, read, dropped / shared mapping made, read, dropped", first_read / shared_new, 1.05),
        ("1 % of the pages written / a copy by `rep movsb`", write / bytewise, 0.05),
        ("view detached / memcpy", detach_rows / memcpy, 1.2),
    ];
    let mut met = true;
    for (what, ratio, limit) in budgets {
        println!("  {what:<64} {ratio:>12.3}  budget {limit}: {}", if ratio <= limit { "met" } else { "missed" });
        met &= ratio <= limit;
    }
    println!("  beside that, without a budget:");
    println!("  {:<64} {:>12.3}", "1 % of the pages written / memcpy", write / memcpy);
    println!("  {:<64} {:>12.3}", "view detached whose address is known / memcpy", detach_address / memcpy);
    println!("  {:<64} {:>12.3}", "the same / a copy by `rep movsb`", detach_address / bytewise);
    Ok(met)
}

/// Frames of a camera that has been stopped: nothing else runs while something is measured.
fn frames(camera: &mut Camera) -> Result<Vec<Frame>> {
    let frames = (0..=RUNS).map(|_| camera.next()).collect::<Result<_, _>>()?;
    camera.stop()?;
    Ok(frames)
}

fn main() -> Result<ExitCode> {
    let format = Format::parse("XR24").context("XR24")?.0;
    let mut met = true;
    for size in SIZES {
        let buffers = Some(RUNS as u32 + 3);
        let request = CameraRequest { format: Some(format), size: Some(size), buffers, ..CameraRequest::default() };
        let mut camera = Camera::open(Device::find("vivid")?, &request)?;
        met &= measure("the camera's own buffers (vb2-vmalloc)", size, &frames(&mut camera)?)?;
        let room = Room::for_lens(&camera.memory_lens()?);
        camera.use_buffers(Buffer::allocate_all(Allocator::Udmabuf, camera.layout(), &room, RUNS as u32 + 3)?)?;
        met &= measure("udmabuf", size, &frames(&mut camera)?)?;
    }
    Ok(if met { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
