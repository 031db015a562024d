//! What a cycle must not leave behind: descriptors, mappings, memory.

use std::fs;

use anyhow::{Context, Result, ensure};

use crate::alloc::held;
use crate::harness::note;
use crate::process::dma_bufs;

/// Resident memory in KiB: anonymous (heaps and stacks), and of files (libraries' pages, which the kernel maps and drops as it likes).
fn resident_kib() -> Result<[u64; 2]> {
    let status = fs::read_to_string("/proc/self/status")?;
    let of = |key: &str| -> Result<u64> {
        let line = status.lines().find_map(|line| line.strip_prefix(key)).context(key.to_owned())?;
        Ok(line.trim().trim_end_matches(" kB").trim().parse()?)
    };
    Ok([of("RssAnon:")?, of("RssFile:")?])
}

/// What a cycle must not leave behind: descriptors, dma-bufs, mappings of them, and bytes of Rust's heap.
fn left() -> Result<[u64; 4]> {
    let mappings = fs::read_to_string("/proc/self/maps")?
        .lines()
        .filter(|line| line.contains("dmabuf"))
        .count();
    let (fds, buffers) = (fs::read_dir("/proc/self/fd")?.count(), dma_bufs().len());
    // Last: nothing of the above is on the heap any more.
    Ok([fds as u64, buffers as u64, mappings as u64, held()])
}

/// From the tenth cycle on everything is as it was after it, but for KiB that the driver keeps by itself, which are given back.
pub fn cycles(what: &str, count: u32, once: &mut dyn FnMut() -> Result<()>) -> Result<u64> {
    (0..10).try_for_each(|_| once())?;
    let (before, resident) = (left()?, resident_kib()?);
    (10..count).try_for_each(|_| once())?;
    let after = left()?;
    let [grown, files] =
        std::array::from_fn(|which| resident_kib().map(|now| now[which].saturating_sub(resident[which])));
    let (grown, files) = (grown?, files?);
    note(&format!("{what}: {grown} KiB more after {count} cycles than after 10, and {files} KiB of files"));
    ensure!(
        before == after,
        "{what}: descriptors, dma-bufs, mappings, heap: {before:?} after 10, {after:?} after {count}"
    );
    Ok(grown)
}

/// KiB by which a thousand cycles may grow after the thousand before them.
///
/// Without the kernel's transparent huge pages, that is: khugepaged puts one in the place of a few small pages of a heap whenever it comes by
/// (Debian has them `always` on), which shows as a jump. Seen on lavapipe (Mesa 25.0.7, Linux 6.12): 1.4 to 12 MiB of anonymous memory
/// after 1,000 cycles in one loop and 0 in the next, in this library's loops and likewise in loops of bare Vulkan calls (`vkCreateImage`,
/// an import, `vkFreeMemory`; or `vkAllocateMemory` of memory to be exported); 0 in every loop of three runs without huge pages.
pub const KEPT: u64 = 1024;

/// A thousand cycles, and as many more in which nothing grows.
pub fn comes_to_a_level(what: &str, once: &mut dyn FnMut() -> Result<()>) -> Result<()> {
    const CYCLES: u32 = 1000;
    // See `KEPT`. SAFETY: this option takes numbers alone.
    let disabled = unsafe { nix::libc::prctl(nix::libc::PR_SET_THP_DISABLE, 1, 0, 0, 0) };
    ensure!(disabled == 0, "huge pages cannot be done without: {}", std::io::Error::last_os_error());
    cycles(what, CYCLES, once)?;
    let grown = cycles(&format!("{what}, once more"), CYCLES, once)?;
    ensure!(grown <= KEPT, "{what}: {grown} KiB more in the second {CYCLES} cycles");
    Ok(())
}
