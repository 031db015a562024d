//! `bench-cow`: what copy-on-write views cost beside a shared mapping and beside a copy; see README.md beside this file.
//!
//! Wants a guest whose clock counts instructions (`tools/vm/run --icount`), vivid, udmabuf and root. Prints a table, and exits with 1 if a
//! budget is missed.

use std::hint::black_box;
use std::process::ExitCode;

use anyhow::{Context, Result};
use dmaflow::endpoint::Source;
use dmaflow::format::Format;
use dmaflow::frame::{Buffer, Frame, Room};
use dmaflow::memory::{Access, Allocator, Mapping, page_size};
use dmaflow::v4l2::{Camera, CameraRequest, Device};
use nix::time::{ClockId, clock_gettime};
use std::os::fd::AsFd;

/// Of each measurement; the median counts.
const RUNS: usize = 9;
const SIZE: (u32, u32) = (1920, 1080);

/// Instructions of one run, the median of some, in nanoseconds of the thread's CPU time.
fn cost(mut run: impl FnMut() -> Result<f64>) -> Result<f64> {
    let mut all = (0..RUNS).map(|_| run()).collect::<Result<Vec<_>>>()?;
    all.sort_by(f64::total_cmp);
    Ok(all[RUNS / 2])
}

fn timed<T>(what: impl FnOnce() -> Result<T>) -> Result<(f64, T)> {
    let now = || clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID);
    let before = now()?;
    let result = what()?;
    let after = now()?;
    let nanos = |time: nix::sys::time::TimeSpec| time.tv_sec() as f64 * 1e9 + time.tv_nsec() as f64;
    Ok((nanos(after) - nanos(before), result))
}

/// Sums the words of `len` bytes: the cheapest way to read all of them.
///
/// # Safety
/// `len` bytes at `start` are mapped readable.
unsafe fn sum(start: *const u8, len: usize) -> u64 {
    let words = start.cast::<u64>();
    let mut sum = 0_u64;
    for index in 0..len / 8 {
        // SAFETY: inside the range that the caller vouches for; mappings start at pages, so words are aligned.
        sum = sum.wrapping_add(unsafe { words.add(index).read_volatile() });
    }
    sum
}

/// Copies row after row out of whatever `row` reads.
fn rows(mut row: impl FnMut(u32, &mut [u8])) {
    let mut out = vec![0; SIZE.0 as usize * 4];
    for y in 0..SIZE.1 {
        row(y, &mut out);
        black_box(&mut out);
    }
}

struct Costs {
    copy: f64,
    shared_rows: f64,
    view_rows: f64,
    shared_new: f64,
    view_first: f64,
    view_new: f64,
    shared_words: f64,
    view_words: f64,
    open_and_drop: f64,
    write: f64,
    write_cycle: f64,
    detach: f64,
}

fn measure(frame: &Frame, others: &[Frame]) -> Result<Costs> {
    let buffer = frame.buffer();
    let len = buffer.memory_lens()[0];
    let dma_buf = buffer.dma_buf(0).context("no dma-buf")?;
    let shared = Mapping::new(dma_buf.as_fd(), len, Access::Read)?;
    let mut target = vec![1_u8; len];
    let copy = cost(|| Ok(timed(|| Ok(shared.read(0, black_box(&mut target))))?.0))?;

    buffer.read()?;
    let shared_rows = cost(|| {
        Ok(timed(|| {
            buffer
                .read()
                .map(|reader| rows(|y, out| reader.row(0, y, out)))
                .map_err(Into::into)
        })?
        .0)
    })?;
    drop(frame.view("bench")?);
    let view_rows = cost(|| {
        Ok(timed(|| {
            frame
                .view("bench")
                .map(|view| rows(|y, out| view.row(0, y, out)))
                .map_err(Into::into)
        })?
        .0)
    })?;

    let shared_new = cost(|| {
        let opened = timed(|| {
            let mapping = Mapping::new(dma_buf.as_fd(), len, Access::Read)?;
            rows(|y, out| mapping.read(y as usize * SIZE.0 as usize * 4, out));
            Ok(())
        });
        Ok(opened?.0)
    })?;
    // The first view of each buffer maps it.
    let mut firsts = others
        .iter()
        .map(|frame| {
            Ok(timed(|| {
                frame
                    .view("bench")
                    .map(|view| rows(|y, out| view.row(0, y, out)))
                    .map_err(Into::into)
            })?
            .0)
        })
        .collect::<Result<Vec<_>>>()?;
    firsts.sort_by(f64::total_cmp);
    let view_first = firsts[firsts.len() / 2];

    let view = frame.view("bench")?;
    let (view_at, _) = view.as_ptr(0).context("no memory")?;
    // SAFETY: the view's memory, while it lives.
    let view_words = cost(|| Ok(timed(|| Ok(black_box(unsafe { sum(view_at, len) })))?.0))?;
    drop(view);
    let reader = buffer.read()?;
    let (start, length) = (std::ptr::null_mut(), len);
    // SAFETY: a new mapping at an address that the kernel chooses.
    let plain = unsafe {
        nix::libc::mmap(
            start,
            length,
            nix::libc::PROT_READ,
            nix::libc::MAP_SHARED,
            std::os::fd::AsRawFd::as_raw_fd(&dma_buf.as_fd()),
            0,
        )
    };
    anyhow::ensure!(plain != nix::libc::MAP_FAILED, "the buffer cannot be mapped");
    // SAFETY: the mapping just made, once before it is timed so that its pages are there.
    unsafe { sum(plain.cast(), len) };
    // SAFETY: as above.
    let shared_words = cost(|| Ok(timed(|| Ok(black_box(unsafe { sum(plain.cast(), len) })))?.0))?;
    // SAFETY: the whole mapping made above, of which nothing is left in use.
    unsafe { nix::libc::munmap(plain, len) };
    drop(reader);

    let open_and_drop = cost(|| Ok(timed(|| Ok(drop(frame.view("bench")?)))?.0))?;
    let pages = len / page_size();
    let hundredth = pages.div_ceil(100);
    let row_bytes = SIZE.0 as usize * 4;
    let scribble = |view: &mut dmaflow::frame::CowView| {
        for number in 0..hundredth {
            let at = number * 100 * page_size() + 64;
            view.write(0, (at / row_bytes) as u32, (at % row_bytes) as u32, &[1]);
        }
    };
    let write = cost(|| {
        let mut view = frame.view("bench")?;
        let spent = timed(|| Ok(scribble(&mut view)))?.0;
        anyhow::ensure!(view.copied_pages()? == hundredth as u64, "{} pages", view.copied_pages()?);
        Ok(spent)
    })?;
    // With all that comes of it: counting for the account, and the mapping that the next view needs.
    let write_cycle = cost(|| {
        let spent = timed(|| {
            let mut view = frame.view("bench")?;
            scribble(&mut view);
            Ok(())
        });
        Ok(spent?.0)
    })?;
    let view_new = cost(|| {
        let mut view = frame.view("bench")?;
        view.write(0, 0, 0, &[1]);
        drop(view);
        Ok(timed(|| Ok(frame.view("bench")?))?.0)
    })?;
    frame.view("bench")?.detach()?;
    let detach = cost(|| {
        let view = frame.view("bench")?;
        Ok(timed(|| view.detach().map_err(Into::into))?.0)
    })?;
    Ok(Costs {
        copy,
        shared_rows,
        view_rows,
        shared_new,
        view_first,
        view_new,
        shared_words,
        view_words,
        open_and_drop,
        write,
        write_cycle,
        detach,
    })
}

#[expect(clippy::print_stdout, reason = "the table is this program's output")]
fn report(name: &str, costs: &Costs) -> bool {
    println!("{name}, XR24 {}x{}; instructions", SIZE.0, SIZE.1);
    let line = |what: &str, cost: f64| println!("  {what:<64} {cost:>12.0}");
    line("memcpy of the frame", costs.copy);
    line("shared mapping (kept), read in full, row by row", costs.shared_rows);
    line("view opened, read in full, row by row, dropped", costs.view_rows);
    line("shared mapping made, read in full, dropped", costs.shared_new);
    line("first view of a buffer: mapped, read in full, dropped", costs.view_first);
    line("shared mapping (kept), its words summed in place", costs.shared_words);
    line("view (open), its words summed in place", costs.view_words);
    line("view opened and dropped", costs.open_and_drop);
    line("view opened after one that was written", costs.view_new);
    line("1 % of the pages written", costs.write);
    line("view opened, 1 % of the pages written, dropped", costs.write_cycle);
    line("view detached", costs.detach);
    let budgets = [
        ("view read in full / shared mapping read in full", costs.view_rows / costs.shared_rows, 1.05),
        ("1 % of the pages written / memcpy of the frame", costs.write / costs.copy, 0.05),
        ("the whole view with it / memcpy of the frame", costs.write_cycle / costs.copy, 0.05),
        ("view detached / memcpy of the frame", costs.detach / costs.copy, 1.2),
    ];
    let mut met = true;
    for (what, ratio, limit) in budgets {
        println!("  {what:<64} {ratio:>12.3}  budget {limit}: {}", if ratio <= limit { "met" } else { "missed" });
        met &= ratio <= limit;
    }
    met
}

fn frames(camera: &mut Camera) -> Result<Vec<Frame>> {
    let frames = (0..3).map(|_| camera.next()).collect::<Result<_, _>>()?;
    // Nothing else runs while something is measured.
    camera.stop()?;
    Ok(frames)
}

fn main() -> Result<ExitCode> {
    let format = Format::parse("XR24").context("XR24")?.0;
    let request =
        CameraRequest { format: Some(format), size: Some(SIZE), buffers: Some(4), ..CameraRequest::default() };
    let mut camera = Camera::open(Device::find("vivid")?, &request)?;
    let own = frames(&mut camera)?;
    let mut met = report("the camera's own buffers", &measure(&own[0], &own[1..])?);
    drop(own);
    let room = Room::for_lens(&camera.memory_lens()?);
    camera.use_buffers(Buffer::allocate_all(Allocator::Udmabuf, camera.layout(), &room, 4)?)?;
    let given = frames(&mut camera)?;
    met &= report("udmabuf", &measure(&given[0], &given[1..])?);
    Ok(if met { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
