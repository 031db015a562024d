//! The frames that a receiver's program holds: which entry of the ring each is.
//!
//! Slots of this process alone, one for each frame held, and not one for each buffer: a buffer whose frame was taken back may come again
//! with another while the program still holds the first.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::area::SharedArea;
use super::socket::Socket;
use super::wire::Message;
use crate::fence::{FenceState, SyncFile};
use crate::frame::{Buffer, Frame, FrameMeta, Holding, Lease, Revoked, Slots, SlotsArc, Stage};
use crate::ledger::{Copies, Ledger};

/// So many frames can be held at a time: more than a ring has, for those that were taken back are held as well until they are dropped.
pub(super) const HELD: u32 = 32;

/// Where a frame came from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Held {
    pub position: u64,
    /// When it may be taken back, in µs of `CLOCK_MONOTONIC`.
    pub until_us: u64,
}

/// Where the frames of each slot are in the ring, for whoever reads one: views, on any thread.
struct Positions {
    area: SharedArea,
    of_slots: [AtomicU64; HELD as usize],
}

impl Holding for Arc<Positions> {
    fn holds(&self, slot: u32) -> bool {
        // Written before the lease was made, which whoever asks has.
        let position = self
            .of_slots
            .get(slot as usize)
            .map_or(0, |position| position.load(Ordering::Relaxed));
        self.area.holds(position)
    }
}

/// What became of frames that were given back.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Released {
    /// The server waits for one: its bell is to be rung.
    pub wake: bool,
    /// Those that had been taken back before.
    pub revoked: u64,
}

impl Released {
    fn add(&mut self, given_back: Result<bool, Revoked>) {
        match given_back {
            Ok(wake) => self.wake |= wake,
            Err(Revoked) => self.revoked += 1,
        }
    }
}

/// One fence for those of these that have not signalled; none if all have.
///
/// # Errors
/// For want of descriptors, and for what is no sync file.
fn all_of(fences: &[Arc<SyncFile>]) -> crate::Result<Option<Arc<SyncFile>>> {
    let mut all: Option<Arc<SyncFile>> = None;
    for fence in fences {
        if fence.state()? != FenceState::Active {
            continue;
        }
        all = Some(match all {
            None => Arc::clone(fence),
            Some(before) => Arc::new(before.merge(fence)?),
        });
    }
    Ok(all)
}

pub(super) struct HeldFrames {
    slots: SlotsArc,
    positions: Arc<Positions>,
    /// Slots without a frame.
    idle: Vec<u32>,
    held: [Option<Held>; HELD as usize],
    /// The acquire fences of those frames that have one, by slot.
    acquires: Vec<(u32, Arc<SyncFile>)>,
    /// Copies for views that are in an account which was closed.
    accounted: Vec<Copies>,
}

impl HeldFrames {
    /// No frames yet, of the ring in `area`.
    pub(super) fn new(area: SharedArea) -> HeldFrames {
        let positions = Arc::new(Positions { area, of_slots: [const { AtomicU64::new(0) }; HELD as usize] });
        let slots = Slots::revocable(HELD, Box::new(Arc::clone(&positions)));
        let mut idle = Vec::with_capacity(HELD as usize);
        for slot in slots.take_free() {
            idle.push(slot.index());
            slot.queued();
        }
        HeldFrames { slots, positions, idle, held: [None; HELD as usize], acquires: Vec::new(), accounted: Vec::new() }
    }

    /// Whether another frame can be held.
    pub(super) fn has_room(&self) -> bool {
        !self.idle.is_empty()
    }

    /// Whether no frame is held.
    pub(super) fn is_empty(&self) -> bool {
        self.held.iter().all(Option::is_none)
    }

    /// A frame of this process; none if too many are held.
    pub(super) fn hold(&mut self, held: Held, buffer: Buffer, meta: FrameMeta) -> Option<Frame> {
        let slot = self.idle.pop()?;
        if let Some(place) = self.positions.of_slots.get(slot as usize) {
            place.store(held.position, Ordering::Relaxed);
        }
        let lease: Lease = Slots::dequeued(&self.slots, slot)?;
        if let Some(place) = self.held.get_mut(slot as usize) {
            *place = Some(held);
        }
        Some(Frame::new(buffer, meta, lease))
    }

    /// The same for a frame that is there when this fence has signalled.
    #[cold]
    pub(super) fn hold_fenced(
        &mut self,
        held: Held,
        buffer: Buffer,
        meta: FrameMeta,
        fence: SyncFile,
    ) -> Option<Frame> {
        let (frame, fence) = (self.hold(held, buffer, meta)?, Arc::new(fence));
        self.acquires.push((frame.slot(), Arc::clone(&fence)));
        Some(frame.with_acquire_fence(fence))
    }

    /// Gives those back whose last lease was dropped. One load if there are none.
    ///
    /// Those that release fences keep are given back with one, by the `socket` of their server: by two system calls, and two more for each
    /// fence after the first. Where that cannot be they are kept here until those have signalled.
    pub(super) fn release(&mut self, socket: Option<&Socket>) -> Released {
        let mut released = Released::default();
        let mut free = self.slots.take_free();
        for slot in free.by_ref() {
            let index = slot.index();
            if let Some(held) = self.held.get_mut(index as usize).and_then(Option::take) {
                released.add(self.positions.area.release(held.position));
            }
            slot.queued();
            self.idle.push(index);
        }
        let fenced = free.has_kept();
        drop(free);
        if fenced || !self.acquires.is_empty() {
            self.release_fenced(socket, &mut released);
        }
        released
    }

    #[cold]
    fn release_fenced(&mut self, socket: Option<&Socket>, released: &mut Released) {
        if let Some(socket) = socket {
            self.send_fenced(socket, released);
        }
        let held = &self.held;
        self.acquires
            .retain(|&(slot, _)| held.get(slot as usize).is_some_and(Option::is_some));
    }

    fn send_fenced(&mut self, socket: &Socket, released: &mut Released) {
        for (slot, mut fences) in self.slots.take_fenced() {
            let index = slot.index();
            let Some(place) = self.held.get_mut(index as usize) else { continue };
            if let Some(Held { position, .. }) = *place {
                let area = &self.positions.area;
                // What a frame is written behind, its source knows.
                fences.retain(|fence| !self.acquires.iter().any(|(_, acquire)| Arc::ptr_eq(fence, acquire)));
                // One that was taken back goes without: nobody waits for what is read of it.
                let open = if area.holds(position) { all_of(&fences) } else { Ok(None) };
                let given_back = match open {
                    Ok(None) => area.release(position),
                    Ok(Some(fence)) => match socket.send(&Message::Fence { position }, &[fence.as_fd()]) {
                        Ok(()) => area.release_fenced(position),
                        // It is kept, and sent the next time, unless it has signalled by then.
                        Err(_) => continue,
                    },
                    Err(_) => continue,
                };
                released.add(given_back);
                *place = None;
            }
            slot.queued_before_its_fences();
            self.idle.push(index);
        }
    }

    /// Whether the frames are of the ring in `area`.
    pub(super) fn is_of(&self, area: &SharedArea) -> bool {
        self.positions.area.is(area)
    }

    /// What is known of a frame that came from here and is held.
    pub(super) fn of(&self, frame: &Frame) -> Option<Held> {
        if !SlotsArc::ptr_eq(&self.slots, frame.lease().slots_arc()) || frame.lease().stage() == Stage::Free {
            return None;
        }
        self.held.get(frame.slot() as usize).copied().flatten()
    }

    /// Detaches the views of a frame that may be taken back at this time or before, and that views alone keep. Whether there was one.
    pub(super) fn detach_view_due(&self, at_us: u64) -> bool {
        let due = |slot: u32| {
            let held = self.held.get(slot as usize).copied().flatten();
            held.is_some_and(|held| held.until_us <= at_us)
        };
        !self.slots.views().is_empty() && self.slots.detach_oldest_view_of(due)
    }

    /// When the first frame that has a view may be taken back, in µs of `CLOCK_MONOTONIC`; of those that were not yet.
    pub(super) fn first_viewed_until(&self) -> Option<u64> {
        let views = self.slots.views().slots();
        let held = self.held.iter().enumerate().filter(|(slot, _)| views >> slot & 1 != 0);
        held.filter_map(|(_, held)| *held)
            .filter(|held| self.positions.area.holds(held.position))
            .map(|held| held.until_us)
            .min()
    }

    /// Enters what was copied for views of these frames since the account was closed.
    pub(super) fn account_for(&self, ledger: &mut Ledger) {
        for Copies { cause, count, bytes } in self.slots.views().copies() {
            let before = self.accounted.iter().find(|before| before.cause == cause);
            let (counted, copied) = before.map_or((0, 0), |before| (before.count, before.bytes));
            if count > counted {
                ledger.add(&Copies { cause, count: count - counted, bytes: bytes.saturating_sub(copied) });
            }
        }
    }

    /// What was copied until now is in an account that is closed.
    pub(super) fn close_account(&mut self) {
        self.accounted = self.slots.views().copies();
    }

    pub(super) fn slots(&self) -> &Slots {
        &self.slots
    }
}

impl std::fmt::Debug for HeldFrames {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.slots.counts().fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{Format, Layout};
    use crate::frame::ViewPages;
    use crate::memory::Allocator;
    use crate::share::ring::{Consumer, Server, WORDS};

    fn buffer() -> Buffer {
        let layout = Layout::packed(Format::parse("GREY").unwrap().0, (64, 64), 1).unwrap();
        Buffer::new(layout, vec![Allocator::Plain.allocate(4096).unwrap()], &[4096]).unwrap()
    }

    /// A ring of which so many frames are taken.
    fn ring(count: u64) -> (Server<SharedArea, u64>, SharedArea) {
        let (area, fd) = SharedArea::create().unwrap();
        let theirs = SharedArea::open(fd.as_fd()).unwrap();
        let (mut server, mut consumer) = (Server::new(area, 15), Consumer::new(theirs.clone()));
        for number in 1..=count {
            server.publish(|_| [0; WORDS], number).unwrap();
            consumer.take().unwrap();
        }
        (server, theirs)
    }

    fn area() -> SharedArea {
        ring(0).1
    }

    fn hold(frames: &mut HeldFrames, position: u64) -> Option<Frame> {
        frames.hold(Held { position, until_us: position * 100 }, buffer(), FrameMeta::default())
    }

    /// The numbers of the frames that the server has with the consumer.
    fn out(server: &mut Server<SharedArea, u64>) -> Vec<u64> {
        server.collect().unwrap();
        let mut out: Vec<_> = server.leases().copied().collect();
        out.sort_unstable();
        out
    }

    #[test]
    fn each_frame_is_released_once_with_its_last_lease() {
        let (mut server, area) = ring(2);
        let mut frames = HeldFrames::new(area.clone());
        let (first, second) = (hold(&mut frames, 1).unwrap(), hold(&mut frames, 2).unwrap());
        let clone = first.clone();
        drop((first, second));
        assert_eq!(frames.release(None), Released::default());
        assert_eq!((out(&mut server), frames.of(&clone).unwrap().position), (vec![1], 1));
        assert_eq!(server.sleep(), Ok(true));
        drop(clone);
        assert_eq!(frames.release(None), Released { wake: true, revoked: 0 });
        assert_eq!(frames.release(None), Released::default());
        assert_eq!((out(&mut server), frames.is_empty()), (vec![], true));
        assert!(frames.is_of(&area) && !frames.is_of(&self::area()));
        let other = hold(&mut HeldFrames::new(self::area()), 7).unwrap();
        assert_eq!(frames.of(&other), None, "a frame of another source");
        let many: Vec<_> = (0..).map_while(|position| hold(&mut frames, position)).collect();
        assert_eq!((many.len(), frames.has_room()), (HELD as usize, false));
    }

    #[test]
    fn views_are_detached_when_they_are_due_and_no_frame_goes_with_them() {
        let (mut server, area) = ring(2);
        let mut frames = HeldFrames::new(area);
        let (kept, viewed) = (hold(&mut frames, 1).unwrap(), hold(&mut frames, 2).unwrap());
        let views = [kept.view("test").unwrap(), viewed.view("test").unwrap()];
        drop(viewed);
        assert!(!frames.detach_view_due(199));
        assert_eq!(frames.first_viewed_until(), Some(100));
        assert!(frames.detach_view_due(200), "the other is held as a frame");
        assert!(!frames.detach_view_due(200));
        frames.release(None);
        assert_eq!(out(&mut server), [1]);
        server.take_back(|_| true).unwrap();
        assert_eq!(frames.first_viewed_until(), None, "too late for that one");
        drop((views, kept));
    }

    /// A view that is still on the memory of a frame that was taken back says so at each access; one that was detached in time does not.
    #[test]
    fn views_of_what_was_taken_back_say_so() {
        let (mut server, area) = ring(3);
        let mut frames = HeldFrames::new(area);
        let [early, late, other] = [1, 2, 3].map(|position| hold(&mut frames, position).unwrap());
        let (detached, mut revoked) = (early.view("test").unwrap(), late.view("test").unwrap());
        detached.detach().unwrap();
        revoked.write(0, 0, 0, &[7]).unwrap();
        server.take_back(|&number| number <= 2).unwrap();
        let mut row = [0; 64];
        assert_eq!((detached.row(0, 0, &mut row), detached.check()), (Ok(()), Ok(())));
        assert_eq!((revoked.row(0, 0, &mut row), revoked.read(0, 0, &mut row)), (Err(Revoked), Err(Revoked)));
        assert_eq!((revoked.write(0, 1, 0, &[7]), revoked.check()), (Err(Revoked), Err(Revoked)));
        // Too late: the bytes are not the frame's.
        assert_eq!(revoked.detach().unwrap_err().kind(), crate::error::Kind::Revoked);
        assert_eq!(revoked.pages(), ViewPages::Device);
        assert_eq!((early.check(), late.check(), other.check()), (Err(Revoked), Err(Revoked), Ok(())));
        drop((late, revoked));
        assert!(!frames.detach_view_due(u64::MAX), "its lease went with the view");
        assert_eq!(frames.release(None), Released { wake: false, revoked: 1 });
        assert_eq!(out(&mut server), [3]);
    }
}
