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
//! The free list is one word with a bit a slot. Returning a slot is one atomic OR, from any thread, without a system call. A slot with
//! release fences stays in it until they have signalled: no `FreeSlot` comes of it before.

use std::fmt;

#[cfg(loom)]
use loom::sync::{Arc, atomic};
#[cfg(not(loom))]
use std::sync::{Arc, atomic};

use super::release::Releases;
use super::{Holding, Revoked, Views};
use crate::fence::SyncFile;
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
    /// Used by nobody, and not to be filled before a release fence has signalled.
    pub fenced: u32,
}

impl fmt::Display for SlotCounts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let SlotCounts { free, queued, dequeued, pending, on_screen, fenced } = self;
        write!(f, "{queued} queued, {dequeued} leased, {pending} pending, {on_screen} on screen, {free} free")?;
        if *fenced == 0 { Ok(()) } else { write!(f, ", {fenced} behind a fence") }
    }
}

/// All slots of one queue.
pub(crate) struct Slots {
    slots: Box<[Slot]>,
    free: AtomicU64,
    releases: Releases,
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
        Arc::new(Slots {
            slots: (0..count).map(|_| Slot::new()).collect(),
            free: AtomicU64::new(free),
            releases: Releases::new(count),
            views: Views::new(),
            holding,
        })
    }

    /// Takes every free slot that no release fence keeps. Those not taken out of the iterator stay free. Without release fences no
    /// system call.
    pub(crate) fn take_free(&self) -> FreeSlots<'_> {
        // The plain load keeps the common answer "none" free of a locked instruction.
        let bits = if self.free.load(Ordering::Relaxed) == 0 { 0 } else { self.free.swap(0, Ordering::Acquire) };
        FreeSlots { slots: self, bits, kept: 0 }
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
        counts.fenced = self
            .releases
            .among(self.free.load(Ordering::Relaxed))
            .count_ones()
            .min(counts.free);
        counts.free -= counts.fenced;
        counts
    }

    /// The release fences that keep slots which nobody uses, with the slots' indices. Neither a system call nor an allocation without one.
    pub(crate) fn release_fences(&self) -> Vec<(u32, std::sync::Arc<SyncFile>)> {
        self.releases.of(self.free.load(Ordering::Acquire))
    }

    /// `; slot 2 waits for the fence of …` for each of [`release_fences`](Slots::release_fences), or nothing: for errors.
    pub(crate) fn waits_for(&self) -> String {
        let fences = self.release_fences();
        let fences = fences.iter().map(|(index, fence)| format!("; slot {index} waits for {fence}"));
        fences.collect()
    }

    /// The open fences of all slots, also of those that are held, with the slots' indices. Neither a system call nor an allocation without
    /// one.
    pub(crate) fn open_fences(&self) -> Vec<(u32, std::sync::Arc<SyncFile>)> {
        let mut fences = self.releases.of(u64::MAX);
        fences.retain(|(_, fence)| !fence.is_signalled());
        fences
    }

    /// A slot is not to be filled before this fence has signalled: a device reads its memory from before the slot was made.
    pub(crate) fn hold_back(&self, index: u32, fence: std::sync::Arc<SyncFile>) {
        self.releases.add(index, fence);
    }

    /// A slot may be filled before this fence has signalled: it was taken back.
    pub(crate) fn no_longer_after(&self, index: u32, fence: &std::sync::Arc<SyncFile>) {
        self.releases.forget(index, fence);
    }

    /// Takes the free slots that release fences keep, with their fences: for who passes those on to somebody who waits for them. One that is
    /// dropped is as before. Neither a system call nor an allocation without release fences.
    pub(crate) fn take_fenced(&self) -> Vec<(FreeSlot<'_>, Vec<std::sync::Arc<SyncFile>>)> {
        let wanted = self.releases.among(self.free.load(Ordering::Relaxed));
        if wanted == 0 {
            return Vec::new();
        }
        let taken = self.free.fetch_and(!wanted, Ordering::Acquire) & wanted;
        let indices = (0u32..).take(self.slots.len()).filter(|index| taken & (1 << index) != 0);
        let slots = indices.map(|index| {
            let fences = self.releases.of(1 << index).into_iter().map(|(_, fence)| fence);
            (FreeSlot { slots: self, index, taken: false }, fences.collect())
        });
        slots.collect()
    }

    /// How many slots the driver has.
    pub(crate) fn queued(&self) -> u32 {
        let queued = |slot: &&Slot| slot.stage.load(Ordering::Relaxed) == Stage::Queued as u8;
        self.slots.iter().filter(queued).count() as u32
    }

    /// Whether the driver has none, and none can be given to it. Looked at, a free slot stays free. Without release fences no system call.
    pub(crate) fn starve(&self) -> bool {
        self.queued() == 0 && self.take_free().next().is_none()
    }

    /// Whether the frame in a slot that is leased was not taken back.
    pub(crate) fn check(&self, index: u32) -> Result<(), Revoked> {
        match &self.holding {
            Some(holding) if !holding.holds(index) => Err(Revoked),
            _ => Ok(()),
        }
    }

    /// So many a queue of this size needs so as not to starve, see [`Slots::are_short`].
    pub(crate) const fn least(slots: usize) -> usize {
        if slots < 4 { 1 } else { 2 }
    }

    /// Whether fewer are free or with the driver than it needs so as not to starve before somebody looks again: one to fill, and the next
    /// where there are so many. One that a release fence keeps is not free; that which is `passing` is as good as free, whoever has it. Without
    /// release fences no system call.
    pub(crate) fn are_short(&self, passing: Option<u32>) -> bool {
        let least = Slots::least(self.slots.len());
        if self.releases.among(u64::MAX) != 0 || passing.is_some() {
            return self.are_short_besides(least, passing);
        }
        let leased = |slot: &&Slot| slot.stage.load(Ordering::Relaxed) == Stage::Dequeued as u8;
        self.slots.iter().filter(|slot| !leased(slot)).take(least).count() < least
    }

    #[cold]
    fn are_short_besides(&self, least: usize, passing: Option<u32>) -> bool {
        let free = self.free.load(Ordering::Acquire);
        let there = |&(index, slot): &(u32, &Slot)| match free & (1 << index) {
            0 => slot.stage.load(Ordering::Relaxed) == Stage::Queued as u8,
            _ => self.releases.is_done(index),
        };
        let there = |slot: &(u32, &Slot)| passing == Some(slot.0) || there(slot);
        (0u32..).zip(&self.slots).filter(there).take(least).count() < least
    }

    /// Who has views of these slots' frames, and what was copied for them.
    pub(crate) fn views(&self) -> &Views {
        &self.views
    }

    /// Makes a slot free by detaching the views of one that views alone keep, the oldest first: no device either, by a release fence.
    /// Whether one is free now.
    pub(crate) fn detach_oldest_view(&self) -> bool {
        self.detach_oldest_view_of(|_| true)
    }

    /// The same among those slots alone that are `wanted`.
    pub(crate) fn detach_oldest_view_of(&self, wanted: impl Fn(u32) -> bool) -> bool {
        self.views.detach_oldest(|index, views| {
            let slot = self.slots.get(index as usize);
            wanted(index)
                && slot.is_some_and(|slot| slot.leases.load(Ordering::Acquire) == views)
                && self.releases.is_done(index)
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
    /// Those that a release fence keeps.
    kept: u64,
}

impl FreeSlots<'_> {
    /// Whether a release fence keeps one of those that were looked at.
    pub(crate) fn has_kept(&self) -> bool {
        self.kept != 0
    }
}

impl<'a> Iterator for FreeSlots<'a> {
    type Item = FreeSlot<'a>;

    fn next(&mut self) -> Option<FreeSlot<'a>> {
        while self.bits != 0 {
            let index = self.bits.trailing_zeros();
            self.bits &= self.bits - 1;
            if self.slots.releases.is_done(index) {
                return Some(FreeSlot { slots: self.slots, index, taken: false });
            }
            self.kept |= 1 << index;
        }
        None
    }
}

impl Drop for FreeSlots<'_> {
    fn drop(&mut self) {
        let back = self.bits | self.kept;
        if back != 0 {
            self.slots.free.fetch_or(back, Ordering::Release);
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

    /// The same, and its release fences are somebody else's to wait for.
    pub(crate) fn queued_before_its_fences(self) {
        self.slots.releases.forget_all(self.index);
        self.queued();
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

    /// The slot is not filled again before this fence has signalled, however early its last lease is dropped: a device goes on reading
    /// the memory until then. Several add up. What has signalled is closed by the queue when it looks at its free slots, and, of a slot
    /// that is held for long, when others are added.
    pub fn release_after(&self, fence: impl Into<std::sync::Arc<SyncFile>>) {
        self.slots.releases.add(self.index, fence.into());
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

    pub(crate) fn slots_arc(&self) -> &SlotsArc {
        &self.slots
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

#[cfg(all(test, loom))]
mod loom_tests;
#[cfg(all(test, not(loom)))]
mod tests;
