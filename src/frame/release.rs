//! Release fences: slots that nobody holds any more, and that a device still reads.

use std::sync::Arc;

#[cfg(loom)]
use loom::sync::{Mutex, atomic};
#[cfg(not(loom))]
use std::sync::{Mutex, atomic};

use crate::fence::SyncFile;
use atomic::{AtomicU64, Ordering};

/// So many fences of a slot are not looked at when another is added.
const FEW: usize = 4;

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
    /// the queue's look, so the bit needs no order of its own. Fences that have signalled are closed now and then, so that a slot which is
    /// held for long has about twice as many as are open, at most: one system call for each that is looked at.
    pub(super) fn add(&self, index: u32, fence: Arc<SyncFile>) {
        let Some(fences) = self.fences.get(index as usize) else { return };
        // Whoever panicked here had added its fence or not: either list is whole.
        let mut fences = fences.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        // While the slot is held nobody else closes what has signalled. At 4, 8, 16 and so on: to look at each is not worth it each time.
        if fences.len() >= FEW && fences.len().is_power_of_two() {
            fences.retain(|fence| !fence.is_signalled());
        }
        fences.push(fence);
        self.fenced.fetch_or(1 << index, Ordering::Relaxed);
    }

    /// Whether no fence keeps the slot, which nobody holds, or holds to add one. Fences that have signalled are closed. One system call
    /// for each, none without.
    #[inline]
    pub(super) fn is_done(&self, index: u32) -> bool {
        self.fenced.load(Ordering::Relaxed) & (1 << index) == 0 || self.are_done(index)
    }

    fn are_done(&self, index: u32) -> bool {
        let Some(fences) = self.fences.get(index as usize) else { return true };
        let mut fences = fences.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        // Also one whose work has failed: that device is done with the memory.
        fences.retain(|fence| !fence.is_signalled());
        if fences.is_empty() {
            self.fenced.fetch_and(!(1 << index), Ordering::Relaxed);
        }
        fences.is_empty()
    }

    /// The slot is not kept by this fence any more.
    pub(super) fn forget(&self, index: u32, fence: &Arc<SyncFile>) {
        self.retain(index, |other| !Arc::ptr_eq(other, fence));
    }

    /// The slot is not kept by any fence any more.
    pub(super) fn forget_all(&self, index: u32) {
        self.retain(index, |_| false);
    }

    fn retain(&self, index: u32, wanted: impl FnMut(&Arc<SyncFile>) -> bool) {
        let Some(fences) = self.fences.get(index as usize) else { return };
        let mut fences = fences.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        fences.retain(wanted);
        // Under the lock, as all that sets it: one that was added meanwhile is in the list, or comes after this.
        if fences.is_empty() {
            self.fenced.fetch_and(!(1 << index), Ordering::Relaxed);
        }
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

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use nix::unistd::{pipe, write};

    /// A frame that is held while a device reads it again and again, as a still picture is.
    #[test]
    fn a_held_slot_does_not_collect_what_has_signalled() {
        let releases = Releases::new(1);
        // A pipe is open as a fence is, and readable as one that has signalled.
        let ((open, _open_end), (done, done_end)) = (pipe().unwrap(), pipe().unwrap());
        write(&done_end, b"x").unwrap();
        releases.add(0, Arc::new(SyncFile::from(open)));
        let done = SyncFile::from(done);
        let mut most = 0;
        for _ in 0..2000 {
            releases.add(0, Arc::new(done.try_clone().unwrap()));
            most = most.max(releases.of(1).len());
        }
        assert!(most <= 2 * FEW, "{most} descriptors");
        assert!(!releases.is_done(0) && releases.of(1).len() == 1, "the open one is kept");
    }

    /// One that is taken back keeps the slot no more, and the others do.
    #[test]
    fn a_fence_is_taken_back_alone() {
        let releases = Releases::new(2);
        let (fences, _ends): (Vec<_>, Vec<_>) = (0..3).map(|_| pipe().unwrap()).unzip();
        let fences: Vec<_> = fences.into_iter().map(|fence| Arc::new(SyncFile::from(fence))).collect();
        fences.iter().for_each(|fence| releases.add(1, Arc::clone(fence)));
        releases.forget(0, &fences[0]);
        releases.forget(1, &fences[1]);
        let left: Vec<_> = releases.of(2).into_iter().map(|(_, fence)| fence).collect();
        assert!(left.len() == 2 && Arc::ptr_eq(&left[0], &fences[0]) && Arc::ptr_eq(&left[1], &fences[2]));
        assert!(!releases.is_done(1) && releases.among(3) == 2);
        releases.forget_all(1);
        assert!(releases.is_done(1) && releases.among(3) == 0);
        drop(left);
        assert!(fences.iter().all(|fence| Arc::strong_count(fence) == 1), "they would stay open");
    }

    /// Those that are open add up, each looked at a few times and not each time.
    #[test]
    fn open_fences_add_up() {
        let releases = Releases::new(1);
        let (fences, ends): (Vec<_>, Vec<_>) = (0..3 * FEW).map(|_| pipe().unwrap()).unzip();
        fences
            .into_iter()
            .for_each(|fence| releases.add(0, Arc::new(SyncFile::from(fence))));
        assert_eq!(releases.of(1).len(), 3 * FEW);
        ends.iter().skip(1).for_each(|end| assert_eq!(write(end, b"x").unwrap(), 1));
        assert!(!releases.is_done(0));
        write(&ends[0], b"x").unwrap();
        assert!(releases.is_done(0) && releases.of(1).is_empty());
    }
}
