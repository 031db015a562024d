//! `CowView`: a process's own sight of a frame, to read and to scribble on, which copies the pages that are written and no others.
//!
//! A view is mapped on the device's own pages (`MAP_PRIVATE`). The kernel copies a page when it is first written, and tells how many it
//! copied; the frame that others see never changes. A view holds its frame's lease, so the camera does not fill the buffer again. When
//! the camera would starve, the queue detaches the oldest view: one copy into memory that is there already, put at the same address, and
//! the lease is given back.
//!
//! ```text
//! open ──▶ Device ── detach (the holder, or the queue) ──▶ Detached
//!   └────▶ Snapshot, where the exporter only maps shared
//! ```
//!
//! Mappings are kept with their buffer while the buffer lives, so that opening a view of it the next time costs no page fault; memory of
//! detached views is kept with the queue.

mod shared;
mod table;
#[cfg(test)]
#[cfg(not(loom))]
mod tests;
mod views;
mod written;

use std::cell::Cell;
use std::fmt;
use std::ptr::NonNull;
use std::sync::{Arc, RwLockReadGuard};

use super::{Frame, FrameMeta, Revoked, SlotsArc};
use crate::clock::now_us;
use crate::error::{Error, Kind, Result};
use crate::fence::PATIENCE;
use crate::format::{Layout, MAX_PLANES};
use crate::ledger::Copies;
use crate::memory::{Region, Span};
use shared::{Entered, Shared, State};
use table::Holder;

pub use shared::ViewPages;
pub use table::{MAX_VIEWS, ViewInfo};
pub use views::ViewPolicy;
pub(crate) use views::Views;

impl Frame {
    /// Opens a view of the frame. `holder` is what the caller calls itself, for reports of who holds what (its first 32 bytes).
    ///
    /// Cost: two system calls for each memory plane at either end (`DMA_BUF_IOCTL_SYNC`), and the first time for each buffer one that maps
    /// it, with all its pages. Where the exporter does not map privately, one copy of the buffer. Waits for the frame's acquire fence, 5 s
    /// at most.
    ///
    /// # Errors
    /// [`Kind::Busy`] if the frames of this queue have [`MAX_VIEWS`] views already; what the fence, mapping or CPU access says.
    pub fn view(&self, holder: &str) -> Result<CowView> {
        CowView::open(self, holder)
    }
}

/// A process's own sight of a frame, to read and to scribble on, which copies the pages that are written and no others; opened by
/// [`Frame::view`].
///
/// It is mapped on the device's own pages (`MAP_PRIVATE`): the kernel copies a page when it is first written, and tells how many it
/// copied; the frame that others see never changes. When the camera would starve, the queue detaches the oldest view
/// ([`ViewPolicy`]): one copy, and the lease is given back.
///
/// It is **not** a snapshot of memory that somebody else fills: until it is detached, pages that were not written are the device's. Its
/// lease keeps the camera away from them.
///
/// An address that was asked for stays the same for the view's whole life, detached or not. Dropping it unmaps nothing that can be used again: after
/// that its addresses show other frames.
pub struct CowView {
    shared: Arc<Shared>,
    layout: Layout,
    /// Rows of each colour plane.
    rows: [u32; MAX_PLANES],
    meta: FrameMeta,
    slot: u32,
}

impl CowView {
    fn open(frame: &Frame, holder: &str) -> Result<CowView> {
        frame.wait_acquired(PATIENCE)?;
        let (buffer, slots) = (frame.buffer(), frame.lease().slots_arc());
        let (process, thread) = who();
        let entry = Holder { name: holder, process, thread, since_us: now_us() };
        let place = slots.views().table.enter(frame.slot(), entry).ok_or_else(|| {
            let error = Error::new(Kind::Busy, "open a view of", format!("frame {}", frame.meta().sequence));
            error
                .because(format!("the frames of its source have {MAX_VIEWS} views"))
                .repair("drop views sooner")
        })?;
        // From here on the place is given back, whatever happens.
        let entered = Entered::new(SlotsArc::clone(slots), place);
        let shared = match buffer.take_private()? {
            Some(planes) => {
                let shared = Arc::new(Shared::attached(buffer, frame.lease().clone(), planes, entered)?);
                slots.views().table.reach(place, Arc::downgrade(&shared));
                shared
            }
            None => Arc::new(Shared::snapshot(buffer, SlotsArc::clone(slots), frame.slot())?),
        };
        let layout = *buffer.layout();
        let mut rows = [0; MAX_PLANES];
        for (plane, rows) in rows.iter_mut().enumerate().take(layout.planes().len()) {
            *rows = layout.format().rows(plane, layout.height());
        }
        Ok(CowView { shared, layout, rows, meta: *frame.meta(), slot: frame.slot() })
    }

    /// Format, size and where the colour planes lie in the memory planes.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Sequence number, time stamp, bytes used, flags of the frame.
    pub fn meta(&self) -> &FrameMeta {
        &self.meta
    }

    /// The slot of the frame in its queue.
    pub fn slot(&self) -> u32 {
        self.slot
    }

    /// Whose pages it shows now.
    pub fn pages(&self) -> ViewPages {
        self.shared.pages()
    }

    /// Copies the start of row `row` of colour plane `plane` into `out`: as many bytes as `out` has, a row's pixels being
    /// [`Format::row_bytes`](crate::format::Format::row_bytes). What is outside the picture's memory reads as zero.
    ///
    /// # Errors
    /// [`Revoked`]: another process shares the frame and has taken it back, and the bytes may be of another picture. A view that was detached
    /// in time is never revoked, and one of a device that this process has open neither.
    #[inline]
    pub fn row(&self, plane: usize, row: u32, out: &mut [u8]) -> Result<(), Revoked> {
        match self.place(plane, row) {
            Some((memory, offset, _)) => self.shared.read(memory, offset, out),
            None => {
                out.fill(0);
                Ok(())
            }
        }
    }

    /// Copies bytes of memory plane `memory` out, from byte `offset` on; what is not there reads as zero. The way to take all of it.
    ///
    /// # Errors
    /// [`Revoked`], as [`CowView::row`].
    pub fn read(&self, memory: usize, offset: usize, out: &mut [u8]) -> Result<(), Revoked> {
        self.shared.read(memory, offset, out)
    }

    /// Whether all that was read of it until now, by whatever way, was the frame.
    ///
    /// # Errors
    /// [`Revoked`], as [`CowView::row`].
    pub fn check(&self) -> Result<(), Revoked> {
        self.shared.check()
    }

    /// Writes bytes into row `row` of colour plane `plane` from byte `offset` of the row on, and tells how many fitted into the row's
    /// stride. Others do not see them. The kernel copies each page at its first byte written: about 4 KiB of copying and a page fault.
    ///
    /// # Errors
    /// [`Revoked`], as [`CowView::row`].
    pub fn write(&mut self, plane: usize, row: u32, offset: u32, bytes: &[u8]) -> Result<usize, Revoked> {
        let Some((memory, start, stride)) = self.place(plane, row) else { return Ok(0) };
        let fits = stride.saturating_sub(offset as usize).min(bytes.len());
        // SAFETY: the view is borrowed exclusively, so its holder does nothing else with it.
        unsafe { self.shared.write(memory, start.saturating_add(offset as usize), &bytes[..fits]) }
    }

    /// The bytes of memory plane `memory`, to read by copying them out; `None` if there is no such plane. Of a frame that another process
    /// shares, [`check`](CowView::check) tells afterwards whether they were the frame's.
    pub fn memory(&self, memory: u32) -> Option<Span<'_>> {
        self.shared.address(memory as usize).map(Region::span)
    }

    /// The first byte of memory plane `memory`, for reading, and its length in bytes, whole pages; `None` if there is no such plane.
    ///
    /// The address and the bytes stay, also when the queue detaches the view, until the view is dropped. Make no `&[u8]` of it: a device that
    /// disregards the lease, or a program that fills the buffer by other ways, would change bytes under the reference. Write through
    /// [`CowView::raw`] alone.
    pub fn as_ptr(&self, memory: usize) -> Option<(*const u8, usize)> {
        let region = self.shared.address(memory)?;
        Some((region.start().as_ptr().cast_const(), region.len()))
    }

    /// The view's memory for writing by raw pointer. While it is held the queue does not detach this view: hold it while you write and no
    /// longer.
    pub fn raw(&mut self) -> RawView<'_> {
        let gate = self.shared.gate_for_raw();
        RawView { shared: &self.shared, _gate: gate }
    }

    /// How many of its pages are its own and no longer the device's, as the kernel says (`PAGEMAP_SCAN`; before Linux 6.7 bit 61 in
    /// `/proc/self/pagemap`; `move_pages` where the exporter maps bare frame numbers, as vb2-dma-contig does): those that were written, or
    /// all of a view that was detached or is a snapshot.
    ///
    /// Cost: three system calls that look at each page of the mapping.
    ///
    /// # Errors
    /// What the kernel says, as in a sandbox without `/proc`.
    pub fn copied_pages(&self) -> Result<u64> {
        self.shared.copied()
    }

    /// What was copied for this view so far, and why. Pages written are entered when it is detached or dropped (then in the source's
    /// account alone).
    pub fn copies(&self) -> Vec<Copies> {
        self.shared.account().copies()
    }

    /// Gives the frame's lease back and keeps the bytes: one copy into memory that is in place already, which is put at the same address.
    /// Pointers stay valid and show the same bytes, those written by the holder too.
    ///
    /// Cost: one copy of the buffer's memory and the end of CPU access; if an address was asked for ([`CowView::as_ptr`],
    /// [`CowView::raw`]), one `mremap` for each memory plane, and the next view of the buffer maps it anew.
    ///
    /// # Errors
    /// For want of memory, and [`Kind::Revoked`] if it is too late; the view is as it was then.
    pub fn detach(&self) -> Result<()> {
        self.shared.detach()
    }

    /// Memory plane, offset in it and stride of a row that the picture has.
    #[inline]
    fn place(&self, plane: usize, row: u32) -> Option<(usize, usize, usize)> {
        let place = self.layout.planes().get(plane)?;
        if self.rows.get(plane).is_none_or(|&rows| row >= rows) {
            return None;
        }
        let offset = (place.stride as usize)
            .saturating_mul(row as usize)
            .saturating_add(place.offset as usize);
        Some((place.memory as usize, offset, place.stride as usize))
    }
}

impl fmt::Debug for CowView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CowView(frame {} in slot {}, {}, {:?})", self.meta.sequence, self.slot, self.layout, self.pages())
    }
}

/// A view's memory, writable by raw pointer; see [`CowView::raw`].
pub struct RawView<'a> {
    shared: &'a Shared,
    _gate: RwLockReadGuard<'a, State>,
}

impl RawView<'_> {
    /// The first byte of memory plane `memory` and its length in bytes, whole pages; `None` if there is no such plane.
    ///
    /// Valid for reads and writes by this process until the `RawView` is dropped; nobody else writes it. As with
    /// [`CowView::as_ptr`], the pages that were not written yet are the device's.
    pub fn as_mut_ptr(&self, memory: usize) -> Option<(NonNull<u8>, usize)> {
        let region = self.shared.region(memory)?;
        Some((region.start(), region.len()))
    }
}

impl fmt::Debug for RawView<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RawView")
    }
}

/// Process and thread, as the kernel numbers them; asked for once a thread.
fn who() -> (u32, u32) {
    thread_local!(static WHO: Cell<Option<(u32, u32)>> = const { Cell::new(None) });
    let known = WHO.get();
    known.unwrap_or_else(|| {
        let asked = (std::process::id(), nix::unistd::gettid().as_raw().cast_unsigned());
        WHO.set(Some(asked));
        asked
    })
}
