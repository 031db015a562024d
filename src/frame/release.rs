//! Release fences: slots that nobody holds any more, and that a device still reads.

use std::sync::Arc;

#[cfg(loom)]
use loom::sync::{Mutex, atomic};
#[cfg(not(loom))]
use std::sync::{Mutex, atomic};

use crate::fence::SyncFile;
use atomic::{AtomicU64, Ordering};

/// The release fences of a queue's slots. A slot without one costs a look at a bit.
pub(super) struct Releases {
    /// A bit for each slot that has fences. Set by a holder of the slot's lease, cleared by its queue.
    fenced: AtomicU64,
    fences: Box<[Mutex<Vec<Arc<SyncFile>>>]>,
}

impl Releases {
    pub(super) fn new(count: u32) -> Releases {
        let none = |_| Mutex::new(Vec::new());
        Releases { fenced: AtomicU64::new(0), fences: (0..count).map(none).collect() }
    }

    /// The slot is not to be filled before this fence has signalled. For holders of its lease: giving that back is what orders this before
    /// the queue's look, so the bit needs no order of its own.
    pub(super) fn add(&self, index: u32, fence: Arc<SyncFile>) {
        let Some(fences) = self.fences.get(index as usize) else { return };
        // Whoever panicked here had added its fence or not: either list is whole.
        let mut fences = fences.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        fences.push(fence);
        self.fenced.fetch_or(1 << index, Ordering::Relaxed);
    }

    /// Whether no fence keeps the slot, which nobody holds, or holds to add one. Fences that have signalled are closed. One system call
    /// for each, none without.
    pub(super) fn is_done(&self, index: u32) -> bool {
        if self.fenced.load(Ordering::Relaxed) & (1 << index) == 0 {
            return true;
        }
        let Some(fences) = self.fences.get(index as usize) else { return true };
        let mut fences = fences.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        // Also one whose work has failed: that device is done with the memory.
        fences.retain(|fence| !fence.is_signalled());
        if fences.is_empty() {
            self.fenced.fetch_and(!(1 << index), Ordering::Relaxed);
        }
        fences.is_empty()
    }

    /// Those of these slots (a bit each) that have fences.
    pub(super) fn among(&self, slots: u64) -> u64 {
        slots & self.fenced.load(Ordering::Relaxed)
    }

    /// The fences of these slots (a bit each), each slot's index with them.
    pub(super) fn of(&self, slots: u64) -> Vec<(u32, Arc<SyncFile>)> {
        let slots = self.among(slots);
        if slots == 0 {
            return Vec::new();
        }
        let mut all = Vec::new();
        for (index, fences) in (0u32..).zip(&self.fences).filter(|(index, _)| slots & (1 << index) != 0) {
            let fences = fences.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            all.extend(fences.iter().map(|fence| (index, Arc::clone(fence))));
        }
        all
    }
}
