//! Every interleaving of holders on other threads with the queue that takes slots back.

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

/// A fence that a holder adds is seen by the queue that finds the slot free, whichever holder was the last.
#[test]
fn a_release_fence_is_seen_with_the_free_slot() {
    loom::model(|| {
        let slots = Slots::new(1);
        slots.take_free().for_each(FreeSlot::queued);
        let lease = Slots::dequeued(&slots, 0).unwrap();
        let (read, end) = nix::unistd::pipe().unwrap();
        let other = lease.clone();
        let reader = thread::spawn(move || {
            lease.release_after(SyncFile::from(read));
            drop(lease);
        });
        let holder = thread::spawn(move || drop(other));
        assert_eq!(slots.take_free().count(), 0, "filled while it is read");
        reader.join().unwrap();
        holder.join().unwrap();
        assert_eq!(slots.take_free().count(), 0, "filled while it is read");
        nix::unistd::write(&end, b"x").unwrap();
        assert_eq!(slots.take_free().map(FreeSlot::queued).count(), 1, "the slot was lost");
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
