//! The part of a view that its holder and the queue share.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, TryLockError};

use super::views::{Account, Cause};
use crate::error::{Context, Result};
use crate::format::MAX_PLANES;
use crate::frame::{Buffer, Lease, SlotsArc};
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
/// copy and the exchange of the pages and be lost. Reading needs no gate, because it finds the same bytes before and after.
pub(super) struct Shared {
    /// By memory plane. Addresses and lengths never change.
    planes: Vec<Plane>,
    gate: RwLock<State>,
    /// Whether the holder may have written, so that pages have to be counted at the end.
    written: AtomicBool,
    account: Account,
    slots: SlotsArc,
}

struct Plane {
    pages: Pages,
    /// Whether the pages at the address are the view's own by now.
    own: AtomicBool,
}

enum Pages {
    Private(Private),
    Copied(Region),
}

/// What holds the gate, and what it guards.
pub(super) enum State {
    Attached(Held),
    Own(ViewPages),
}

/// What a view keeps while it shows the device's pages. The fields go in this order: the memory is given back before the table says so.
pub(super) struct Held {
    _access: [Option<OwnedAccess>; MAX_PLANES],
    buffer: Buffer,
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
    fn new(pages: Pages) -> Plane {
        let own = AtomicBool::new(matches!(pages, Pages::Copied(_)));
        Plane { pages, own }
    }

    fn region(&self) -> &Region {
        match &self.pages {
            Pages::Private(private) => private.region(),
            Pages::Copied(region) => region,
        }
    }

    fn is_own(&self) -> bool {
        self.own.load(Ordering::Acquire)
    }

    fn copied(&self) -> Result<u64> {
        match &self.pages {
            Pages::Private(private) if !self.is_own() => private.copied(),
            _ => Ok((self.region().len() / page_size()) as u64),
        }
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
        let slots = lease.slots_arc();
        let held = Held { _access: access, buffer: buffer.clone(), _lease: lease, _entered: entered };
        let planes = planes.into_iter().map(|private| Plane::new(Pages::Private(private))).collect();
        Ok(Shared::new(planes, State::Attached(held), slots))
    }

    /// A copy of a buffer, which the view has for itself.
    ///
    /// # Errors
    /// If the exporter refuses a mapping or CPU access; for want of memory.
    pub(super) fn snapshot(buffer: &Buffer, slots: SlotsArc) -> Result<Shared> {
        let reader = buffer.read()?;
        let mut planes = Vec::with_capacity(MAX_PLANES);
        for (memory, &len) in buffer.memory_lens().iter().enumerate() {
            let spare = slots.views().spare(len.next_multiple_of(page_size()));
            let mut spare = spare.context("copy", || format!("{len} bytes of a frame"))?;
            match u32::try_from(memory).ok().and_then(|memory| reader.memory(memory)) {
                Some(span) => span.read(0, spare.bytes_mut()),
                None => spare.bytes_mut().fill(0),
            }
            planes.push(Plane::new(Pages::Copied(spare)));
        }
        drop(reader);
        let shared = Shared::new(planes, State::Own(ViewPages::Snapshot), slots);
        for &len in buffer.memory_lens() {
            shared.enter(Cause::Snapshot, 1, len as u64);
        }
        Ok(shared)
    }

    fn new(planes: Vec<Plane>, state: State, slots: SlotsArc) -> Shared {
        let written = AtomicBool::new(false);
        Shared { planes, gate: RwLock::new(state), written, account: Account::default(), slots }
    }

    pub(super) fn account(&self) -> &Account {
        &self.account
    }

    /// The addresses of a memory plane.
    pub(super) fn region(&self, memory: usize) -> Option<&Region> {
        self.planes.get(memory).map(Plane::region)
    }

    /// Keeps the view from being detached, and remembers that it may be written.
    pub(super) fn gate_for_writing(&self) -> RwLockReadGuard<'_, State> {
        self.written.store(true, Ordering::Relaxed);
        self.gate()
    }

    fn gate(&self) -> RwLockReadGuard<'_, State> {
        // Nothing in here panics half-way through a change.
        self.gate.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn pages(&self) -> ViewPages {
        match &*self.gate() {
            State::Attached(_) => ViewPages::Device,
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
    /// For want of memory; the view is as it was.
    pub(super) fn detach(&self) -> Result<()> {
        self.detach_from(&mut self.gate.write().unwrap_or_else(PoisonError::into_inner))
    }

    fn detach_from(&self, state: &mut State) -> Result<()> {
        if let State::Own(_) = state {
            return Ok(());
        }
        let about = || "a view from its frame";
        for plane in self.planes.iter().filter(|plane| !plane.is_own()) {
            if let (Pages::Private(private), true) = (&plane.pages, self.written.load(Ordering::Relaxed)) {
                self.enter_pages(private.copied().unwrap_or(0));
            }
            let region = plane.region();
            let mut spare = self.slots.views().spare(region.len()).context("detach", about)?;
            spare.copy_from(region);
            if let Err((spare, error)) = spare.replace(region) {
                self.slots.views().keep(spare);
                return Err(error).context("detach", about);
            }
            plane.own.store(true, Ordering::Release);
            self.enter(Cause::Detached, 1, region.len() as u64);
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
        self.enter(Cause::Written, pages, pages * page_size() as u64);
    }

    /// Gives each plane's memory back to where it can be used again.
    fn end(&mut self) {
        let planes = std::mem::take(&mut self.planes);
        let state = self.gate.get_mut().unwrap_or_else(PoisonError::into_inner);
        let written = self.written.load(Ordering::Relaxed);
        let mut pages = 0;
        let mut clean = Vec::with_capacity(planes.len());
        let all = planes.len();
        for Plane { pages: memory, own } in planes {
            match memory {
                Pages::Private(private) if !own.into_inner() => {
                    if !written {
                        clean.push(private);
                        continue;
                    }
                    let (copied, renewed) = private.renew();
                    pages += copied;
                    clean.extend(renewed);
                }
                Pages::Private(private) => self.slots.views().keep(private.into_region()),
                Pages::Copied(region) => self.slots.views().keep(region),
            }
        }
        if let State::Attached(held) = state
            && clean.len() == all
        {
            held.buffer.keep_private(clean);
        }
        if pages > 0 {
            self.enter_pages(pages);
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.end();
    }
}
