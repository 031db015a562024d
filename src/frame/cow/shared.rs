//! The part of a view that its holder and the queue share.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::{OnceLock, PoisonError, RwLock, RwLockReadGuard, TryLockError};

use super::views::{Account, Cause};
use super::written::Written;
use crate::error::{Context, Result};
use crate::format::MAX_PLANES;
use crate::frame::{Buffer, Lease, Revoked, SlotsArc, WeakBuffer};
use crate::memory::{OwnedAccess, Private, Region, page_size};

/// Whose pages a view shows.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum ViewPages {
    /// The device's own, mapped privately, but for those that were written.
    Device,
    /// The view's own: one copy was made when it was opened, because the exporter does not map privately.
    Snapshot,
    /// The view's own: it was detached.
    Detached,
}

/// See the [module](self).
///
/// The gate is held for reading by whoever writes to the view, and for writing by whoever detaches it: no write can come between the
/// copy and the exchange of the pages and be lost. Reading needs no gate: see [`Plane::read`].
pub(super) struct Shared {
    /// By memory plane.
    planes: Vec<Plane>,
    gate: RwLock<State>,
    /// Whether the holder has been told an address: then pages are exchanged under it, else a detached view just goes on elsewhere.
    addressed: AtomicBool,
    account: Account,
    slots: SlotsArc,
    /// Of the frame, whose lease is held while the view shows the device's pages.
    slot: u32,
    /// Where mappings go at the end, if somebody still has it.
    buffer: WeakBuffer,
}

/// What a plane shows: `copy`, once that is there.
struct Plane {
    device: Option<Private>,
    copy: OnceLock<Region>,
    /// Whether the pages of `device` were exchanged for the view's own.
    exchanged: AtomicBool,
    written: Written,
}

/// What holds the gate, and what it guards.
pub(super) enum State {
    Attached { _held: Held },
    Own(ViewPages),
}

/// What a view keeps while it shows the device's pages. The fields go in this order: the memory is given back before the table says so.
pub(super) struct Held {
    _access: [Option<OwnedAccess>; MAX_PLANES],
    _buffer: Buffer,
    _lease: Lease,
    _entered: Entered,
}

/// A place in the table, given back on drop.
pub(super) struct Entered {
    slots: SlotsArc,
    place: usize,
}

impl Entered {
    pub(super) fn new(slots: SlotsArc, place: usize) -> Entered {
        Entered { slots, place }
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        self.slots.views().table.remove(self.place);
    }
}

impl Plane {
    fn new(device: Option<Private>, copy: Option<Region>) -> Plane {
        let pages = device.as_ref().map_or(0, |device| device.region().len() / page_size());
        let copy = copy.map_or_else(OnceLock::new, OnceLock::from);
        Plane { device, copy, exchanged: AtomicBool::new(false), written: Written::new(pages) }
    }

    /// The addresses that the holder uses now.
    #[inline]
    fn region(&self) -> Option<&Region> {
        self.copy.get().or(self.device.as_ref().map(Private::region))
    }

    /// Copies bytes out. A view without an address that is detached meanwhile goes on with its copy, and the device may write to the old
    /// pages; they stay mapped, and the bytes are read again. (The queue stores `copy` before it gives the lease back.)
    #[inline]
    fn read(&self, offset: usize, out: &mut [u8]) {
        let Some(mut region) = self.region() else { return out.fill(0) };
        loop {
            region.read(offset, out);
            fence(Ordering::Acquire);
            match self.copy.get() {
                Some(copy) if !std::ptr::eq(copy, region) => region = copy,
                _ => return,
            }
        }
    }

    fn is_own(&self) -> bool {
        self.exchanged.load(Ordering::Acquire) || self.copy.get().is_some()
    }

    fn copied(&self) -> Result<u64> {
        match &self.device {
            Some(device) if !self.is_own() => device.copied(),
            _ => Ok(self.region().map_or(0, |region| region.len() / page_size()) as u64),
        }
    }

    /// Puts `spare`, which has the bytes as the holder sees them, in the place of the device's pages. What is left of it on failure comes
    /// back.
    fn show(&self, spare: Region, addressed: bool) -> Result<(), (Region, io::Error)> {
        let Some(region) = self.region() else { return Ok(()) };
        if addressed {
            spare.replace(region)?;
            self.exchanged.store(true, Ordering::Release);
            return Ok(());
        }
        let again = |spare| (spare, io::Error::from_raw_os_error(nix::libc::EALREADY));
        self.copy.set(spare).map_err(again)
    }
}

impl Shared {
    /// A view on the device's pages.
    ///
    /// # Errors
    /// If the exporter refuses CPU access.
    pub(super) fn attached(buffer: &Buffer, lease: Lease, planes: Vec<Private>, entered: Entered) -> Result<Shared> {
        let mut access = [const { None }; MAX_PLANES];
        for (access, plane) in access.iter_mut().zip(0u32..) {
            *access = buffer.dma_buf(plane).map(OwnedAccess::begin).transpose()?;
        }
        let (slots, slot) = (SlotsArc::clone(lease.slots_arc()), lease.index());
        let held = Held { _access: access, _buffer: buffer.clone(), _lease: lease, _entered: entered };
        let planes = planes.into_iter().map(|private| Plane::new(Some(private), None)).collect();
        Ok(Shared::new(buffer, planes, State::Attached { _held: held }, slots, slot))
    }

    /// A copy of a buffer, which the view has for itself.
    ///
    /// # Errors
    /// If the exporter refuses a mapping or CPU access; for want of memory; [`Revoked`].
    pub(super) fn snapshot(buffer: &Buffer, slots: SlotsArc, slot: u32) -> Result<Shared> {
        let reader = buffer.read()?;
        let mut planes = Vec::with_capacity(MAX_PLANES);
        for (memory, &len) in buffer.memory_lens().iter().enumerate() {
            let spare = slots.views().spare(len.next_multiple_of(page_size()));
            let mut spare = spare.context("copy", || format!("{len} bytes of a frame"))?;
            match u32::try_from(memory).ok().and_then(|memory| reader.memory(memory)) {
                Some(span) => span.read(0, spare.bytes_mut()),
                None => spare.bytes_mut().fill(0),
            }
            planes.push(Plane::new(None, Some(spare)));
        }
        drop(reader);
        slots.check(slot)?;
        let shared = Shared::new(buffer, planes, State::Own(ViewPages::Snapshot), slots, slot);
        for &len in buffer.memory_lens() {
            shared.enter(Cause::Snapshot, 1, len as u64);
        }
        Ok(shared)
    }

    fn new(buffer: &Buffer, planes: Vec<Plane>, state: State, slots: SlotsArc, slot: u32) -> Shared {
        let (gate, addressed) = (RwLock::new(state), AtomicBool::new(false));
        Shared { planes, gate, addressed, account: Account::default(), slots, slot, buffer: buffer.downgrade() }
    }

    pub(super) fn account(&self) -> &Account {
        &self.account
    }

    /// Copies bytes of a memory plane out; what is not there reads as zero.
    ///
    /// # Errors
    /// [`Revoked`]: the bytes may be another picture's.
    #[inline]
    pub(super) fn read(&self, memory: usize, offset: usize, out: &mut [u8]) -> Result<(), Revoked> {
        let Some(plane) = self.planes.get(memory) else {
            out.fill(0);
            return Ok(());
        };
        plane.read(offset, out);
        self.check_plane(plane)
    }

    /// Whether what a plane showed until now was the frame. The view's own pages are; and the device's, if the lease holds after they were
    /// looked at. A view that is detached by somebody else meanwhile loses its lease in order, but has its own pages before.
    #[inline]
    fn check_plane(&self, plane: &Plane) -> Result<(), Revoked> {
        self.slots
            .check(self.slot)
            .or_else(|revoked| if plane.is_own() { Ok(()) } else { Err(revoked) })
    }

    /// The same for all planes.
    pub(super) fn check(&self) -> Result<(), Revoked> {
        self.planes.iter().try_for_each(|plane| self.check_plane(plane))
    }

    /// Copies bytes into a memory plane and tells how many fitted. Waits for a detaching that is going on.
    ///
    /// # Errors
    /// [`Revoked`]: what is around them may be another picture's.
    ///
    /// # Safety
    /// The caller is the holder, and no other thread of its own uses these bytes meanwhile.
    pub(super) unsafe fn write(&self, memory: usize, offset: usize, bytes: &[u8]) -> Result<usize, Revoked> {
        let _gate = self.gate();
        let Some(plane) = self.planes.get(memory) else { return Ok(0) };
        let Some(region) = plane.region() else { return Ok(0) };
        if !plane.is_own() {
            let last = offset.saturating_add(bytes.len().saturating_sub(1));
            plane.written.mark(offset / page_size(), last / page_size());
        }
        // SAFETY: as the caller promises of its own threads; the queue, which alone shares the view, reads these bytes only with the
        // gate closed to us.
        let written = unsafe { region.write(offset, bytes) };
        self.check_plane(plane).map(|()| written)
    }

    /// The addresses of a memory plane, which stay from now on.
    pub(super) fn address(&self, memory: usize) -> Option<&Region> {
        let _gate = self.gate();
        self.addressed.store(true, Ordering::Release);
        self.region(memory)
    }

    /// Keeps the view from being detached, while its holder may write to any page; its addresses stay from now on.
    pub(super) fn gate_for_raw(&self) -> RwLockReadGuard<'_, State> {
        let gate = self.gate();
        self.addressed.store(true, Ordering::Release);
        self.planes.iter().for_each(|plane| plane.written.mark_unknown());
        gate
    }

    /// The addresses of a memory plane, for whoever has the gate.
    pub(super) fn region(&self, memory: usize) -> Option<&Region> {
        self.planes.get(memory)?.region()
    }

    fn gate(&self) -> RwLockReadGuard<'_, State> {
        // Nothing in here panics half-way through a change.
        self.gate.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn pages(&self) -> ViewPages {
        match &*self.gate() {
            State::Attached { .. } => ViewPages::Device,
            State::Own(pages) => *pages,
        }
    }

    /// Pages that are the view's own.
    ///
    /// # Errors
    /// What the kernel's account says.
    pub(super) fn copied(&self) -> Result<u64> {
        let _gate = self.gate();
        self.planes.iter().map(Plane::copied).sum()
    }

    /// Detaches unless the holder is writing right now, and tells whether the view keeps no lease any more.
    pub(super) fn try_detach(&self) -> bool {
        match self.gate.try_write() {
            Ok(mut state) => self.detach_from(&mut state).is_ok(),
            Err(TryLockError::Poisoned(poisoned)) => self.detach_from(&mut poisoned.into_inner()).is_ok(),
            Err(TryLockError::WouldBlock) => false,
        }
    }

    /// Detaches, after any write that is going on.
    ///
    /// # Errors
    /// For want of memory, and [`Revoked`]; the view is as it was.
    pub(super) fn detach(&self) -> Result<()> {
        self.detach_from(&mut self.gate.write().unwrap_or_else(PoisonError::into_inner))
    }

    fn detach_from(&self, state: &mut State) -> Result<()> {
        if let State::Own(_) = state {
            return Ok(());
        }
        let addressed = self.addressed.load(Ordering::Acquire);
        let views = self.slots.views();
        // Before the work, and again when it is done.
        self.check()?;
        for plane in self.planes.iter().filter(|plane| !plane.is_own()) {
            let Some(device) = &plane.device else { continue };
            let written = plane.written.pages(device);
            let len = device.region().len();
            let about = || "a view from its frame";
            let mut spare = views.spare(len).context("detach", about)?;
            spare.copy_from(plane.region().unwrap_or(device.region()));
            if let Err(revoked) = self.slots.check(self.slot) {
                views.keep(spare);
                return Err(revoked.into());
            }
            let shown = plane.show(spare, addressed).map_err(|(spare, error)| {
                views.keep(spare);
                error
            });
            shown.context("detach", about)?;
            self.enter_pages(written);
            self.enter(Cause::Detached, 1, len as u64);
        }
        // The lease goes here: after the last page of the device is out of the holder's sight.
        *state = State::Own(ViewPages::Detached);
        Ok(())
    }

    fn enter(&self, cause: Cause, count: u64, bytes: u64) {
        self.account.enter(cause, count, bytes);
        self.slots.views().account.enter(cause, count, bytes);
    }

    fn enter_pages(&self, pages: u64) {
        if pages > 0 {
            self.enter(Cause::Written, pages, pages * page_size() as u64);
        }
    }

    /// Gives each plane's memory back to where it can be used again. The lease and the place in the table go after it.
    fn end(&mut self) {
        let planes = std::mem::take(&mut self.planes);
        let mut clean = Vec::with_capacity(planes.len());
        let all = planes.len();
        for Plane { device, copy, exchanged, written } in planes {
            let copy = copy.into_inner();
            let detached = copy.is_some();
            copy.into_iter().for_each(|copy| self.slots.views().keep(copy));
            match device {
                Some(device) if exchanged.into_inner() => self.slots.views().keep(device.into_region()),
                Some(device) => {
                    let (pages, renewed) = written.renew(device);
                    // Else they were entered when it was detached.
                    self.enter_pages(if detached { 0 } else { pages });
                    clean.extend(renewed);
                }
                None => {}
            }
        }
        if clean.len() == all
            && let Some(buffer) = self.buffer.upgrade()
        {
            buffer.keep_private(clean);
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.end();
    }
}
