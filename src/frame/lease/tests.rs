//! Slots and their leases on one thread.

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

#[test]
fn a_slot_behind_a_fence_is_not_given_out() {
    let slots = Slots::new(2);
    queue_all(&slots);
    let (fences, ends): (Vec<_>, Vec<_>) = (0..2)
        .map(|_| nix::unistd::pipe().map(|(read, write)| (SyncFile::from(read), write)).unwrap())
        .unzip();
    let lease = Slots::dequeued(&slots, 1).unwrap();
    fences.into_iter().for_each(|fence| lease.clone().release_after(fence));
    assert!(slots.release_fences().is_empty(), "it is leased: no fence keeps it yet");
    drop(lease);
    let taken = || slots.take_free().map(|slot| slot.index()).collect::<Vec<_>>();
    assert_eq!(taken(), [0; 0]);
    assert_eq!(slots.release_fences().iter().map(|(index, _)| *index).collect::<Vec<_>>(), [1, 1]);
    assert_eq!(slots.counts(), SlotCounts { queued: 1, fenced: 1, ..SlotCounts::default() });
    nix::unistd::write(&ends[1], b"x").unwrap();
    assert_eq!(taken(), [0; 0], "one of two has signalled");
    assert_eq!(slots.release_fences().len(), 1, "and is closed");
    nix::unistd::write(&ends[0], b"x").unwrap();
    assert_eq!(taken(), [1]);
    assert!(slots.release_fences().is_empty());
    assert_eq!(slots.counts(), SlotCounts { queued: 1, free: 1, ..SlotCounts::default() });
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
