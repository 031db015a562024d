//! Slots and leases: who may fill a buffer, and when.
//!
//! A slot is one index of a queue. Its life:
//!
//! ```text
//!          take_free, FreeSlot::queued        dequeued
//!   Free ───────────────────────────▶ Queued ─────────▶ Dequeued ─▶ Pending ─▶ OnScreen
//!    ▲                                   │ cancelled        │          │          │
//!    └───────────────────────────────────┴──────────────────┴──────────┴──────────┘
//!                                                       the last Lease is dropped
//! ```
//!
//! Pending and on screen are said of the one [`Lease`] that a display holds. When that is dropped and others are left (a view, a clone
//! that the program keeps), the slot is no longer the display's: it is `Dequeued` again.
//!
//! Only a [`FreeSlot`] can be queued, a `FreeSlot` only comes from the free list, and a slot enters the free list only when
//! its last [`Lease`] is dropped or the driver gives it back unfilled. A display holds the lease of the frame that it shows
//! or is about to show, so a buffer that is pending or on screen cannot be queued: there is no value to do it with.
//!
//! The free list is one word with a bit a slot. Returning a slot is one atomic OR, from any thread, without a system call.

use std::fmt;

#[cfg(loom)]
use loom::sync::{Arc, atomic};
#[cfg(not(loom))]
use std::sync::{Arc, atomic};

use super::{Holding, Revoked, Views};
use atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering, fence};

/// The most slots a queue can have: a bit each in the free list. (V4L2 stopped at 32 until Linux 6.8.)
pub const MAX_SLOTS: u32 = 64;

/// Where a slot is in its life.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum Stage {
    /// Nobody uses it.
    Free,
    /// The driver has it and may be writing.
    Queued,
    /// Filled and leased by the program.
    Dequeued,
    /// Leased by a display that has been told to show it.
    Pending,
    /// Leased by a display that scans it out.
    OnScreen,
}

/// How many slots are at each [`Stage`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct SlotCounts {
    /// Used by nobody.
    pub free: u32,
    /// With the driver.
    pub queued: u32,
    /// Leased by the program.
    pub dequeued: u32,
    /// Leased by a display for its next picture.
    pub pending: u32,
    /// Leased by a display for the picture that it shows.
    pub on_screen: u32,
}

impl fmt::Display for SlotCounts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let SlotCounts { free, queued, dequeued, pending, on_screen } = self;
        write!(f, "{queued} queued, {dequeued} leased, {pending} pending, {on_screen} on screen, {free} free")
    }
}

/// All slots of one queue.
pub(crate) struct Slots {
    slots: Box<[Slot]>,
    free: AtomicU64,
    views: Views,
    /// Of those that can be taken back.
    holding: Option<Box<dyn Holding>>,
}

/// Shared slots; loom brings an `Arc` of its own.
pub(crate) type SlotsArc = Arc<Slots>;

struct Slot {
    leases: AtomicU32,
    /// `Free`, `Queued` or `Dequeued`: what displays do with it is in the two counts.
    stage: AtomicU8,
    /// Leases that a display holds for its next picture. A frame may be shown several times in a row, so there may be more than one.
    pending: AtomicU32,
    /// Leases that a display holds for the picture that it shows.
    on_screen: AtomicU32,
}

impl Slot {
    fn new() -> Slot {
        Slot {
            leases: AtomicU32::new(0),
            stage: AtomicU8::new(Stage::Free as u8),
            pending: AtomicU32::new(0),
            on_screen: AtomicU32::new(0),
        }
    }

    /// Where it is, as its holders have said; for reports.
    fn stage(&self) -> Stage {
        match self.stage.load(Ordering::Relaxed) {
            stage if stage == Stage::Free as u8 => Stage::Free,
            stage if stage == Stage::Queued as u8 => Stage::Queued,
            _ if self.on_screen.load(Ordering::Relaxed) > 0 => Stage::OnScreen,
            _ if self.pending.load(Ordering::Relaxed) > 0 => Stage::Pending,
            _ => Stage::Dequeued,
        }
    }

    /// The count of the leases with this mark.
    fn marked(&self, mark: u8) -> Option<&AtomicU32> {
        match mark {
            mark if mark == Stage::Pending as u8 => Some(&self.pending),
            mark if mark == Stage::OnScreen as u8 => Some(&self.on_screen),
            _ => None,
        }
    }
}

impl Slots {
    /// `count` free slots, [`MAX_SLOTS`] at most.
    pub(crate) fn new(count: u32) -> Arc<Slots> {
        Slots::with(count, None)
    }

    /// The same for frames that can be taken back, as `holding` knows.
    pub(crate) fn revocable(count: u32, holding: Box<dyn Holding>) -> Arc<Slots> {
        Slots::with(count, Some(holding))
    }

    fn with(count: u32, holding: Option<Box<dyn Holding>>) -> Arc<Slots> {
        let count = count.min(MAX_SLOTS);
        let free = if count == MAX_SLOTS { u64::MAX } else { (1 << count) - 1 };
        let slots = (0..count).map(|_| Slot::new()).collect();
        Arc::new(Slots { slots, free: AtomicU64::new(free), views: Views::new(), holding })
    }

    /// Takes every free slot. Those not taken out of the iterator stay free.
    pub(crate) fn take_free(&self) -> FreeSlots<'_> {
        // The plain load keeps the common answer "none" free of a locked instruction.
        let bits = if self.free.load(Ordering::Relaxed) == 0 { 0 } else { self.free.swap(0, Ordering::Acquire) };
        FreeSlots { slots: self, bits }
    }

    /// The driver gave slot `index` back filled: the first lease on it. `None` if the driver did not have that slot.
    pub(crate) fn dequeued(this: &Arc<Self>, index: u32) -> Option<Lease> {
        let slot = this.slots.get(index as usize)?;
        let (from, to) = (Stage::Queued as u8, Stage::Dequeued as u8);
        slot.stage
            .compare_exchange(from, to, Ordering::Relaxed, Ordering::Relaxed)
            .ok()?;
        slot.leases.store(1, Ordering::Relaxed);
        Some(Lease::new(Arc::clone(this), index))
    }

    /// The driver gave all slots back unfilled (`VIDIOC_STREAMOFF`).
    pub(crate) fn cancelled(&self) {
        for (index, slot) in (0u32..).zip(&self.slots) {
            if slot.stage.load(Ordering::Relaxed) == Stage::Queued as u8 {
                self.release(index, slot);
            }
        }
    }

    /// How many slots are at each stage now.
    pub(crate) fn counts(&self) -> SlotCounts {
        let mut counts = SlotCounts::default();
        for slot in &self.slots {
            *match slot.stage() {
                Stage::Free => &mut counts.free,
                Stage::Queued => &mut counts.queued,
                Stage::Dequeued => &mut counts.dequeued,
                Stage::Pending => &mut counts.pending,
                Stage::OnScreen => &mut counts.on_screen,
            } += 1;
        }
        counts
    }

    /// How many slots the driver has.
    pub(crate) fn queued(&self) -> u32 {
        let queued = |slot: &&Slot| slot.stage.load(Ordering::Relaxed) == Stage::Queued as u8;
        self.slots.iter().filter(queued).count() as u32
    }

    /// Whether the frame in a slot that is leased was not taken back.
    pub(crate) fn check(&self, index: u32) -> Result<(), Revoked> {
        match &self.holding {
            Some(holding) if !holding.holds(index) => Err(Revoked),
            _ => Ok(()),
        }
    }

    /// Whether fewer are free or with the driver than it needs so as not to starve before somebody looks again: one to fill, and the next
    /// where there are so many.
    pub(crate) fn are_short(&self) -> bool {
        let leased = |slot: &&Slot| slot.stage.load(Ordering::Relaxed) == Stage::Dequeued as u8;
        let least = if self.slots.len() < 4 { 1 } else { 2 };
        self.slots.iter().filter(|slot| !leased(slot)).take(least).count() < least
    }

    /// Who has views of these slots' frames, and what was copied for them.
    pub(crate) fn views(&self) -> &Views {
        &self.views
    }

    /// Makes a slot free by detaching the views of one that views alone keep, the oldest first. Whether one is free now.
    pub(crate) fn detach_oldest_view(&self) -> bool {
        self.detach_oldest_view_of(|_| true)
    }

    /// The same among those slots alone that are `wanted`.
    pub(crate) fn detach_oldest_view_of(&self, wanted: impl Fn(u32) -> bool) -> bool {
        self.views.detach_oldest(|index, views| {
            let slot = self.slots.get(index as usize);
            wanted(index) && slot.is_some_and(|slot| slot.leases.load(Ordering::Acquire) == views)
        })
    }

    /// The stage goes first, so that whoever finds the slot in the free list finds it free.
    fn release(&self, index: u32, slot: &Slot) {
        slot.stage.store(Stage::Free as u8, Ordering::Relaxed);
        self.free.fetch_or(1 << index, Ordering::Release);
    }
}

/// The free slots at one moment; see [`Slots::take_free`].
pub(crate) struct FreeSlots<'a> {
    slots: &'a Slots,
    bits: u64,
}

impl<'a> Iterator for FreeSlots<'a> {
    type Item = FreeSlot<'a>;

    fn next(&mut self) -> Option<FreeSlot<'a>> {
        if self.bits == 0 {
            return None;
        }
        let index = self.bits.trailing_zeros();
        self.bits &= self.bits - 1;
        Some(FreeSlot { slots: self.slots, index, taken: false })
    }
}

impl Drop for FreeSlots<'_> {
    fn drop(&mut self) {
        if self.bits != 0 {
            self.slots.free.fetch_or(self.bits, Ordering::Release);
        }
    }
}

/// The only thing that can be queued: a slot that nobody uses. Goes back to the free list if it is not.
#[must_use = "a free slot goes back to the free list when dropped"]
pub(crate) struct FreeSlot<'a> {
    slots: &'a Slots,
    index: u32,
    taken: bool,
}

impl FreeSlot<'_> {
    pub(crate) fn index(&self) -> u32 {
        self.index
    }

    /// The driver has accepted the slot.
    pub(crate) fn queued(mut self) {
        self.taken = true;
        if let Some(slot) = self.slots.slots.get(self.index as usize) {
            slot.stage.store(Stage::Queued as u8, Ordering::Relaxed);
        }
    }
}

impl Drop for FreeSlot<'_> {
    fn drop(&mut self) {
        if !self.taken {
            self.slots.free.fetch_or(1 << self.index, Ordering::Release);
        }
    }
}

/// The right to keep one slot out of its queue. Clones share it; the last to drop gives the slot back.
///
/// Dropping is one atomic subtraction, and for the last clone one atomic OR: no system call, no failure.
pub struct Lease {
    slots: Arc<Slots>,
    index: u32,
    /// What a display does with it: `Pending`, `OnScreen`, else `Dequeued`. Of this lease alone: clones begin as `Dequeued`.
    mark: AtomicU8,
}

impl Lease {
    fn new(slots: Arc<Slots>, index: u32) -> Lease {
        Lease { slots, index, mark: AtomicU8::new(Stage::Dequeued as u8) }
    }

    /// The slot's index in its queue.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// Where the slot is in its life, as its holders have said; for reports.
    pub fn stage(&self) -> Stage {
        self.slot().map_or(Stage::Dequeued, Slot::stage)
    }

    /// A display was told to show the frame.
    pub(crate) fn mark_pending(&self) {
        self.mark(Stage::Pending);
    }

    /// A display scans the frame out.
    pub(crate) fn mark_on_screen(&self) {
        self.mark(Stage::OnScreen);
    }

    /// A display shows another frame, and holds this one for a moment longer.
    pub(crate) fn mark_left(&self) {
        self.mark(Stage::Dequeued);
    }

    fn mark(&self, stage: Stage) {
        let Some(slot) = self.slot() else { return };
        // Up before down, so that nobody sees it as neither.
        if let Some(count) = slot.marked(stage as u8) {
            count.fetch_add(1, Ordering::Relaxed);
        }
        if let Some(count) = slot.marked(self.mark.swap(stage as u8, Ordering::Relaxed)) {
            count.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Whether the frame was not taken back by who shares it.
    pub(crate) fn check(&self) -> Result<(), Revoked> {
        self.slots.check(self.index)
    }

    pub(crate) fn slots_arc(&self) -> SlotsArc {
        Arc::clone(&self.slots)
    }

    fn slot(&self) -> Option<&Slot> {
        self.slots.slots.get(self.index as usize)
    }
}

impl Clone for Lease {
    fn clone(&self) -> Lease {
        if let Some(slot) = self.slot() {
            // As for `Arc`: a clone is made from a live lease, so nothing needs ordering.
            slot.leases.fetch_add(1, Ordering::Relaxed);
        }
        Lease::new(Arc::clone(&self.slots), self.index)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let Some(slot) = self.slot() else { return };
        // Before the slot can be leased anew, whose counts these are then.
        if let Some(count) = slot.marked(self.mark.load(Ordering::Relaxed)) {
            count.fetch_sub(1, Ordering::Relaxed);
        }
        // As for `Arc`: what every holder did with the memory happens before it is queued again.
        if slot.leases.fetch_sub(1, Ordering::Release) == 1 {
            fence(Ordering::Acquire);
            self.slots.release(self.index, slot);
        }
    }
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Lease(slot {}, {:?})", self.index, self.stage())
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn free(slots: &Slots) -> Vec<u32> {
        let taken = slots.take_free();
        let found: Vec<_> = (0..64).filter(|bit| taken.bits & (1 << bit) != 0).collect();
        drop(taken);
        found
    }

    fn queue_all(slots: &Slots) {
        slots.take_free().for_each(FreeSlot::queued);
    }

    #[test]
    fn a_slot_comes_back_with_its_last_lease() {
        let slots = Slots::new(3);
        assert_eq!(free(&slots), [0, 1, 2]);
        queue_all(&slots);
        assert_eq!(slots.counts().queued, 3);
        let first = Slots::dequeued(&slots, 1).unwrap();
        let second = first.clone();
        first.mark_on_screen();
        assert_eq!(second.stage(), Stage::OnScreen);
        drop(first);
        assert_eq!(free(&slots), [0; 0]);
        drop(second);
        assert_eq!(free(&slots), [1]);
        assert_eq!(slots.counts(), SlotCounts { free: 1, queued: 2, ..SlotCounts::default() });
    }

    /// A view, or a clone that the program keeps, outlives the picture.
    #[test]
    fn a_slot_is_the_displays_no_longer_than_its_lease() {
        let slots = Slots::new(1);
        queue_all(&slots);
        let kept = Slots::dequeued(&slots, 0).unwrap();
        let shown = kept.clone();
        shown.mark_pending();
        assert_eq!(kept.stage(), Stage::Pending);
        shown.mark_on_screen();
        assert_eq!(slots.counts(), SlotCounts { on_screen: 1, ..SlotCounts::default() });
        // The same frame is the next picture as well.
        let again = kept.clone();
        again.mark_pending();
        assert_eq!(kept.stage(), Stage::OnScreen);
        again.mark_on_screen();
        drop(shown);
        assert_eq!(kept.stage(), Stage::OnScreen);
        let view = again.clone();
        drop((again, kept));
        assert_eq!(slots.counts(), SlotCounts { dequeued: 1, ..SlotCounts::default() });
        drop(view);
        assert_eq!(slots.counts(), SlotCounts { free: 1, ..SlotCounts::default() });
        queue_all(&slots);
        assert_eq!(Slots::dequeued(&slots, 0).unwrap().stage(), Stage::Dequeued);
    }

    #[test]
    fn a_driver_cannot_give_what_it_does_not_have() {
        let slots = Slots::new(2);
        assert!(Slots::dequeued(&slots, 0).is_none(), "slot 0 was never queued");
        queue_all(&slots);
        assert!(Slots::dequeued(&slots, 2).is_none(), "there is no slot 2");
        let lease = Slots::dequeued(&slots, 0).unwrap();
        assert!(Slots::dequeued(&slots, 0).is_none(), "slot 0 is leased");
        drop(lease);
    }

    #[test]
    fn an_unqueued_free_slot_stays_free() {
        let slots = Slots::new(4);
        let mut taken = slots.take_free();
        taken.next().unwrap().queued();
        drop(taken.next());
        drop(taken);
        assert_eq!(free(&slots), [1, 2, 3]);
    }

    #[test]
    fn stopping_gives_back_what_the_driver_had_and_no_more() {
        let slots = Slots::new(3);
        queue_all(&slots);
        let lease = Slots::dequeued(&slots, 2).unwrap();
        slots.cancelled();
        assert_eq!(free(&slots), [0, 1]);
        drop(lease);
        assert_eq!(free(&slots), [0, 1, 2]);
    }

    #[test]
    fn all_64_bits_are_used() {
        let slots = Slots::new(1000);
        assert_eq!(free(&slots).len(), 64);
    }

    /// Leases may outlive every handle to the queue.
    #[test]
    fn a_lease_outlives_its_queue() {
        let slots = Slots::new(1);
        queue_all(&slots);
        let lease = Slots::dequeued(&slots, 0).unwrap();
        drop(slots);
        drop(lease.clone());
        drop(lease);
    }
}

/// Every interleaving of holders on other threads with the queue that takes slots back.
#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use loom::cell::UnsafeCell;
    use loom::thread;

    /// The memory of slot 0, written by the "driver" and read by holders: loom fails on any unordered access.
    struct Memory(UnsafeCell<u32>);
    // SAFETY: for loom's checked cell only; loom reports any access that is not ordered.
    unsafe impl Sync for Memory {}
    // SAFETY: as above.
    unsafe impl Send for Memory {}

    fn queue(slots: &Slots, memory: &Memory) -> bool {
        let mut queued = false;
        for slot in slots.take_free() {
            assert!(!queued, "one slot was free twice");
            // SAFETY: loom checks that nobody reads at the same time.
            memory.0.with_mut(|cell| unsafe { *cell += 1 });
            slot.queued();
            queued = true;
        }
        queued
    }

    #[test]
    fn memory_is_refilled_only_after_every_holder_is_done() {
        loom::model(|| {
            let slots = Slots::new(1);
            let memory = Arc::new(Memory(UnsafeCell::new(0)));
            assert!(queue(&slots, &memory));
            let lease = Slots::dequeued(&slots, 0).unwrap();
            let holders: Vec<_> = [lease.clone(), lease]
                .into_iter()
                .map(|lease| {
                    let memory = Arc::clone(&memory);
                    thread::spawn(move || {
                        // SAFETY: loom checks that the driver does not write at the same time.
                        let seen = memory.0.with(|cell| unsafe { *cell });
                        assert_eq!(seen, 1);
                        drop(lease);
                    })
                })
                .collect();
            let early = queue(&slots, &memory);
            for holder in holders {
                holder.join().unwrap();
            }
            assert!(early || queue(&slots, &memory), "the slot was lost");
            assert!(Slots::dequeued(&slots, 0).is_some());
        });
    }

    #[test]
    fn two_slots_returned_at_once_are_both_found() {
        loom::model(|| {
            let slots = Slots::new(2);
            slots.take_free().for_each(FreeSlot::queued);
            let leases = [Slots::dequeued(&slots, 0).unwrap(), Slots::dequeued(&slots, 1).unwrap()];
            let threads = leases.map(|lease| thread::spawn(move || drop(lease)));
            let mut found = slots.take_free().map(FreeSlot::queued).count();
            for thread in threads {
                thread.join().unwrap();
            }
            found += slots.take_free().map(FreeSlot::queued).count();
            assert_eq!(found, 2);
        });
    }
}
