//! How a frame changes hands between two processes without the kernel: one area of shared memory for each consumer.
//!
//! The server writes a frame's number, buffer and data into an entry and raises the head; the consumer takes the entry, uses the buffer, and
//! says so when it has done with it. Each entry has one word that both change, position and [`Stage`] in one, so that each step is one
//! compare-and-exchange that only one side can win:
//!
//! ```text
//!              publish            take               release
//!   (free) ──────────────▶ Published ──────▶ Taken ──────────────▶ Released ─▶ (free)
//!                              │               │
//!                              └─▶ Skipped     └─▶ Revoked                     by the server alone: the frame was too old, or the
//!                                                                              lease ran out; the buffer is the camera's again
//! ```
//!
//! | byte | what | written by |
//! |---|---|---|
//! | 0 | 64 bits: the position after the newest entry (the head); 0 before the first | server |
//! | 64 | 32 bits: 1 while the consumer sleeps or is about to | consumer; the server writes 0 when it rings |
//! | 128 | 32 bits: 1 while the server waits for a release | server; the consumer writes 0 when it rings |
//! | 192 | 16 entries of 64 bytes: 64 bits of state, and seven words of data (`entry.rs`) | both the state, the server the data |
//!
//! Positions count from 1; that of the entry at place p of the 16 leaves p when divided by 16, and some may be passed over. A state is
//! `position * 8 + stage`; stages are 1 published, 2 taken, 3 released, 4 skipped, 5 revoked. All numbers are the machine's own, at their
//! natural alignment, and read and written by atomic instructions: the head is loaded with acquire order, a state exchanged with acquire
//! order to take and with release order to release. The memfd has whole pages of at least this size, and is sealed against another.
//!
//! A consumer takes a frame in four steps: it loads the head; for the next position below it that is no further back than 16, exchanges
//! published for taken, or goes on to the next position; copies the data; and looks whether the state is still that (after an acquire
//! fence): if not, the frame is not its own. The same look tells at any time whether what it has read of a frame until then was the frame.
//!
//! The consumer can write anything anywhere at any time: it has the area mapped. So the server keeps what it needs to know in memory of its
//! own, and of the area it reads those words alone, each of which can have three values or its consumer is [`Broken`]. No value read there
//! is ever an index, a length or an address.
//!
//! Somebody who waits says so in a word of the area, looks once more, and sleeps on an eventfd; the other side rings it only if it reads
//! that word as 1 and exchanges it for 0. Both sides store and then load with a sequentially consistent fence between, so at least one of them sees the other
//! (`loom_no_wake_is_lost`).

use std::ops::Deref;

#[cfg(loom)]
use loom::sync::atomic;
#[cfg(not(loom))]
use std::sync::atomic;

use crate::frame::Revoked;
use atomic::{AtomicU32, AtomicU64, Ordering, fence};

/// Entries of a ring; more than any [budget](Server::new). loom's models have fewer, because each word counts.
pub(super) const ENTRIES: usize = if cfg!(loom) { 2 } else { 16 };

/// Words of data that an entry carries.
pub(super) const WORDS: usize = if cfg!(loom) { 1 } else { 7 };

/// What may happen with an entry next. The values are part of the protocol.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u64)]
pub(super) enum Stage {
    Published = 1,
    Taken = 2,
    Released = 3,
    Skipped = 4,
    Revoked = 5,
}

/// Bits of the stage in a word; the position has the others, enough for a million frames a second for 70,000 years.
const STAGE_BITS: u32 = 3;

fn word(position: u64, stage: Stage) -> u64 {
    position << STAGE_BITS | stage as u64
}

/// A cache line of its own, so that the two sides do not take it from each other when they write to different words.
#[repr(C, align(64))]
#[derive(Debug)]
struct Line<T>(T);

/// The shared memory, zeroed at first. Positions count from 1, so that a word of zeroes is no entry of anybody's.
#[repr(C)]
#[derive(Debug)]
pub(super) struct Area {
    /// The position after the newest entry. Written by the server.
    head: Line<AtomicU64>,
    /// 1 while the consumer sleeps or is about to.
    consumer_sleeps: Line<AtomicU32>,
    /// 1 while the server waits for a release.
    server_sleeps: Line<AtomicU32>,
    entries: [Entry; ENTRIES],
}

#[repr(C, align(64))]
#[derive(Debug)]
struct Entry {
    state: AtomicU64,
    words: [AtomicU64; WORDS],
}

impl Area {
    /// An empty ring in memory of this process. The shared one is zeroed memory, which is the same.
    #[allow(dead_code, reason = "for tests, and for ci/bench/share.rs, which has this file as a part")]
    pub(super) fn new() -> Area {
        let entry = || Entry { state: AtomicU64::new(0), words: std::array::from_fn(|_| AtomicU64::new(0)) };
        Area {
            head: Line(AtomicU64::new(0)),
            consumer_sleeps: Line(AtomicU32::new(0)),
            server_sleeps: Line(AtomicU32::new(0)),
            entries: std::array::from_fn(|_| entry()),
        }
    }

    /// Whether a frame that was taken is still its consumer's. What was read of it before a `true` was the frame; and what happened before
    /// it was released is seen after a `false`.
    pub(super) fn holds(&self, position: u64) -> bool {
        fence(Ordering::Acquire);
        self.entry(position).state.load(Ordering::Acquire) == word(position, Stage::Taken)
    }

    /// Gives a frame that was taken back, and tells whether the server waits for that: then its bell is to be rung.
    ///
    /// # Errors
    /// [`Revoked`] if the server has taken it back before: what was read of it since may be another picture's.
    pub(super) fn release(&self, position: u64) -> Result<bool, Revoked> {
        let (old, new) = (word(position, Stage::Taken), word(position, Stage::Released));
        let state = &self.entry(position).state;
        state
            .compare_exchange(old, new, Ordering::Release, Ordering::Relaxed)
            .map_err(|_| Revoked)?;
        fence(Ordering::SeqCst);
        let sleeps = &self.server_sleeps.0;
        Ok(sleeps.load(Ordering::Relaxed) != 0 && sleeps.swap(0, Ordering::Relaxed) != 0)
    }

    fn entry(&self, position: u64) -> &Entry {
        // The remainder is less than the number of entries.
        &self.entries[(position % ENTRIES as u64) as usize]
    }
}

/// A consumer has written what it cannot have meant.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("entry {position} of its ring holds {found:#x}")]
pub(super) struct Broken {
    position: u64,
    found: u64,
}

/// What became of a frame that was published.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Published {
    /// Frames that this consumer does not get: older ones that it had not taken, or this one, because it holds all that it may.
    pub skipped: u32,
    /// Whether it gets this one.
    pub given: bool,
    /// Whether the consumer sleeps: its bell is to be rung.
    pub wake: bool,
}

/// How many frames were taken back.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct TakenBack {
    /// Those that the consumer had not taken.
    pub skipped: u32,
    /// Those that it had.
    pub revoked: u32,
}

/// The server's end. `T` is what is kept while a frame is with the consumer: its lease.
#[derive(Debug)]
pub(super) struct Server<A, T> {
    area: A,
    /// The position of the next entry.
    next: u64,
    budget: usize,
    /// Entries with the consumer, by their place in the ring.
    out: [Option<Out<T>>; ENTRIES],
    /// A bit for each place of `out` that may hold one: an empty ring is known by one look. Bits of empty places go when they are met.
    places: u32,
}

/// The places of the bits that are set.
fn places(mut bits: u32) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let place = bits.trailing_zeros();
        bits &= bits.wrapping_sub(1);
        (place < u32::BITS).then_some(place as usize)
    })
}

#[derive(Debug)]
struct Out<T> {
    position: u64,
    lease: T,
}

impl<A: Deref<Target = Area>, T> Server<A, T> {
    /// `budget` is how many frames the consumer may have at a time, taken or not; from 1 to one less than [`ENTRIES`].
    pub(super) fn new(area: A, budget: usize) -> Server<A, T> {
        let budget = budget.clamp(1, ENTRIES - 1);
        Server { area, next: 1, budget, out: [const { None }; ENTRIES], places: 0 }
    }

    /// Hands a frame over: some ten loads and stores, no system call. What the consumer has released is given up first; if it has all
    /// that it may have, the oldest that it has not taken is skipped for this one. `words` is told how many were.
    ///
    /// # Errors
    /// [`Broken`]; nothing was published.
    pub(super) fn publish(&mut self, words: impl FnOnce(u32) -> [u64; WORDS], lease: T) -> Result<Published, Broken> {
        let mut published = Published::default();
        let mut held = self.collect()?;
        while held >= self.budget {
            match self.skip_oldest()? {
                Some(Stage::Skipped) => published.skipped += 1,
                Some(_) => {}
                None => {
                    published.skipped += 1;
                    return Ok(published);
                }
            }
            held -= 1;
        }
        // An entry whose last frame is still held is passed over: the consumer sees a position that is not there.
        while self.out[index(self.next)].is_some() {
            self.next += 1;
        }
        let position = self.next;
        let entry = self.area.entry(position);
        for (to, word) in entry.words.iter().zip(words(published.skipped)) {
            to.store(word, Ordering::Relaxed);
        }
        entry.state.store(word(position, Stage::Published), Ordering::Release);
        self.out[index(position)] = Some(Out { position, lease });
        self.places |= 1 << index(position);
        self.next = position + 1;
        published.given = true;
        self.area.head.0.store(self.next, Ordering::Release);
        fence(Ordering::SeqCst);
        let sleeps = &self.area.consumer_sleeps.0;
        published.wake = sleeps.load(Ordering::Relaxed) != 0 && sleeps.swap(0, Ordering::Relaxed) != 0;
        Ok(published)
    }

    /// Gives up what the consumer has released, and tells how many frames it has.
    ///
    /// # Errors
    /// [`Broken`].
    pub(super) fn collect(&mut self) -> Result<usize, Broken> {
        let mut held = 0;
        for place in places(self.places) {
            let out = &mut self.out[place];
            let Some(Out { position, .. }) = out else {
                self.places &= !(1 << place);
                continue;
            };
            let (position, found) = (*position, self.area.entry(*position).state.load(Ordering::Acquire));
            if found == word(position, Stage::Released) {
                *out = None;
                self.places &= !(1 << place);
            } else if found == word(position, Stage::Published) || found == word(position, Stage::Taken) {
                held += 1;
            } else {
                return Err(Broken { position, found });
            }
        }
        Ok(held)
    }

    /// Takes the oldest frame back that the consumer has not taken, and tells where it ended: a faster consumer may have released it
    /// meanwhile. None if it has taken all.
    fn skip_oldest(&mut self) -> Result<Option<Stage>, Broken> {
        let area = &*self.area;
        // Whatever the consumer does meanwhile, no more tries than there are entries.
        for _ in 0..ENTRIES {
            let untaken = |out: &&mut Option<Out<T>>| {
                let position = out.as_ref().map(|out| out.position);
                position.is_some_and(|position| {
                    area.entry(position).state.load(Ordering::Relaxed) == word(position, Stage::Published)
                })
            };
            let oldest = self
                .out
                .iter_mut()
                .filter(untaken)
                .min_by_key(|out| out.as_ref().map(|out| out.position));
            let Some(out) = oldest else { break };
            if let Some(stage) = end(area, out, false)? {
                return Ok(Some(stage));
            }
        }
        Ok(None)
    }

    /// Takes the frames back whose lease is `like` that, taken or not: their buffers may be filled again, and the consumer is told when
    /// it looks.
    ///
    /// # Errors
    /// [`Broken`].
    pub(super) fn take_back(&mut self, like: impl Fn(&T) -> bool) -> Result<TakenBack, Broken> {
        let mut taken_back = TakenBack::default();
        for out in self
            .out
            .iter_mut()
            .filter(|out| out.as_ref().is_some_and(|out| like(&out.lease)))
        {
            match end(&self.area, out, true)? {
                Some(Stage::Skipped) => taken_back.skipped += 1,
                Some(Stage::Revoked) => taken_back.revoked += 1,
                _ => {}
            }
        }
        Ok(taken_back)
    }

    /// Whether the consumer has taken a frame whose lease is `like` that, and not released it.
    pub(super) fn has_taken(&self, like: impl Fn(&T) -> bool) -> bool {
        self.out.iter().flatten().filter(|out| like(&out.lease)).any(|out| {
            let found = self.area.entry(out.position).state.load(Ordering::Acquire);
            found == word(out.position, Stage::Taken)
        })
    }

    /// What is kept for the frames that the consumer has.
    pub(super) fn leases(&self) -> impl Iterator<Item = &T> {
        self.out.iter().flatten().map(|out| &out.lease)
    }

    /// Says that the server waits for a release. `false` if one has come: then it need not wait.
    ///
    /// # Errors
    /// [`Broken`].
    pub(super) fn sleep(&mut self) -> Result<bool, Broken> {
        let before = self.collect()?;
        self.area.server_sleeps.0.store(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let after = self.collect()?;
        if after < before {
            self.area.server_sleeps.0.store(0, Ordering::Relaxed);
        }
        Ok(after == before)
    }
}

/// Ends one entry, if it is with the consumer, and tells as what. A frame that was taken only if that is wanted: else it goes on.
///
/// # Errors
/// [`Broken`].
fn end<T>(area: &Area, out: &mut Option<Out<T>>, taken_too: bool) -> Result<Option<Stage>, Broken> {
    let Some(position) = out.as_ref().map(|out| out.position) else { return Ok(None) };
    let state = &area.entry(position).state;
    let mut found = state.load(Ordering::Acquire);
    // Published, taken, released: a consumer that keeps to the rules is faster twice at most.
    for _ in 0..3 {
        let to = if found == word(position, Stage::Published) {
            Stage::Skipped
        } else if found == word(position, Stage::Taken) && taken_too {
            Stage::Revoked
        } else if found == word(position, Stage::Taken) {
            return Ok(None);
        } else if found == word(position, Stage::Released) {
            *out = None;
            return Ok(Some(Stage::Released));
        } else {
            break;
        };
        match state.compare_exchange(found, word(position, to), Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => {
                *out = None;
                return Ok(Some(to));
            }
            Err(now) => found = now,
        }
    }
    Err(Broken { position, found })
}

fn index(position: u64) -> usize {
    // The remainder is less than the number of entries.
    (position % ENTRIES as u64) as usize
}

/// A frame that a consumer has taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Taken {
    pub position: u64,
    pub words: [u64; WORDS],
}

/// The consumer's end.
#[derive(Debug)]
pub(super) struct Consumer<A> {
    area: A,
    /// The position that is looked at next.
    next: u64,
}

impl<A: Deref<Target = Area>> Consumer<A> {
    pub(super) fn new(area: A) -> Consumer<A> {
        Consumer { area, next: 1 }
    }

    /// The next frame, in the order of capture; none if there is none yet. No system call.
    pub(super) fn take(&mut self) -> Option<Taken> {
        let head = self.area.head.0.load(Ordering::Acquire);
        // Whatever the server says, no more steps than there are entries.
        self.next = self.next.max(head.saturating_sub(ENTRIES as u64));
        while self.next < head {
            let position = self.next;
            self.next += 1;
            let entry = self.area.entry(position);
            let (old, new) = (word(position, Stage::Published), word(position, Stage::Taken));
            if entry
                .state
                .compare_exchange(old, new, Ordering::Acquire, Ordering::Relaxed)
                .is_err()
            {
                continue;
            }
            let mut words = [0; WORDS];
            for (word, from) in words.iter_mut().zip(&entry.words) {
                *word = from.load(Ordering::Relaxed);
            }
            // It may have been taken back already, and the entry used for another frame.
            if self.holds(position) {
                return Some(Taken { position, words });
            }
        }
        None
    }

    /// See [`Area::release`].
    #[cfg(test)]
    pub(super) fn release(&self, position: u64) -> Result<bool, Revoked> {
        self.area.release(position)
    }

    /// See [`Area::holds`].
    pub(super) fn holds(&self, position: u64) -> bool {
        self.area.holds(position)
    }

    /// Says that the consumer is about to sleep. `false` if a frame has come: then it must not.
    pub(super) fn sleep(&self) -> bool {
        let sleeps = &self.area.consumer_sleeps.0;
        sleeps.store(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let nothing = self.area.head.0.load(Ordering::Acquire) <= self.next;
        if !nothing {
            sleeps.store(0, Ordering::Relaxed);
        }
        nothing
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::rc::Rc;

    type Ends = (Server<Rc<Area>, u64>, Consumer<Rc<Area>>, Rc<Area>);

    fn ends(budget: usize) -> Ends {
        let area = Rc::new(Area::new());
        (Server::new(Rc::clone(&area), budget), Consumer::new(Rc::clone(&area)), area)
    }

    fn words(number: u64) -> [u64; WORDS] {
        std::array::from_fn(|i| number * 10 + i as u64)
    }

    #[test]
    fn the_layout_is_the_documented_one() {
        assert_eq!(size_of::<Area>(), 64 * (3 + ENTRIES));
        assert_eq!((align_of::<Area>(), size_of::<Entry>()), (64, 64));
        assert_eq!(std::mem::offset_of!(Area, consumer_sleeps), 64);
        assert_eq!(std::mem::offset_of!(Area, server_sleeps), 128);
        assert_eq!(std::mem::offset_of!(Area, entries), 192);
    }

    #[test]
    fn frames_come_in_order_and_the_oldest_is_skipped_for_a_new_one() {
        let (mut server, mut consumer, _area) = ends(2);
        assert_eq!(consumer.take(), None);
        for number in 1..=4 {
            let published = server.publish(|_| words(number), number).unwrap();
            assert_eq!(published.skipped, u32::from(number > 2), "{number}");
        }
        assert_eq!(server.leases().copied().min(), Some(3), "1 and 2 were given up");
        let third = consumer.take().unwrap();
        assert_eq!(third.words, words(3));
        let fourth = consumer.take().unwrap();
        assert_eq!((fourth.words, consumer.take()), (words(4), None));
        // It holds all that it may: nothing can be skipped for the next but that one itself.
        let published = server.publish(|_| words(5), 5).unwrap();
        assert_eq!((published.skipped, consumer.take()), (1, None));
        assert_eq!(consumer.release(third.position), Ok(false));
        assert_eq!(consumer.release(third.position), Err(Revoked), "once is enough");
        assert_eq!(server.publish(|_| words(6), 6).unwrap().skipped, 0);
        assert_eq!(consumer.take().unwrap().words, words(6));
    }

    #[test]
    fn a_frame_that_is_kept_stops_no_other() {
        let (mut server, mut consumer, _area) = ends(2);
        server.publish(|_| words(0), 0).unwrap();
        let kept = consumer.take().unwrap();
        for number in 1..100 {
            assert_eq!(server.publish(|_| words(number), number).unwrap().skipped, 0, "{number}");
            let taken = consumer.take().unwrap();
            assert_eq!(taken.words, words(number));
            consumer.release(taken.position).unwrap();
        }
        assert!(consumer.holds(kept.position));
        assert_eq!(consumer.release(kept.position), Ok(false));
        assert_eq!(server.collect(), Ok(0));
    }

    #[test]
    fn what_is_taken_back_is_told() {
        let (mut server, mut consumer, _area) = ends(2);
        for number in 1..=2 {
            server.publish(|_| words(number), number).unwrap();
        }
        assert!(!server.has_taken(|_| true));
        let (first, second) = (consumer.take().unwrap(), consumer.take().unwrap());
        assert!(server.has_taken(|&number| number == 1) && !server.has_taken(|&number| number == 3));
        assert_eq!(server.take_back(|&number| number == 1), Ok(TakenBack { revoked: 1, skipped: 0 }));
        assert!(!consumer.holds(first.position) && consumer.holds(second.position));
        assert_eq!(server.leases().copied().collect::<Vec<_>>(), [2]);
        assert_eq!(consumer.release(first.position), Err(Revoked));
        assert_eq!(consumer.release(second.position), Ok(false));
        server.publish(|_| words(3), 3).unwrap();
        assert_eq!(server.take_back(|_| true), Ok(TakenBack { revoked: 0, skipped: 1 }));
        assert_eq!((consumer.take(), server.leases().count()), (None, 0));
    }

    #[test]
    fn the_words_are_told_what_was_skipped() {
        let (mut server, mut consumer, _area) = ends(1);
        for number in 1..=3 {
            server.publish(|skipped| [u64::from(skipped); WORDS], number).unwrap();
        }
        assert_eq!(consumer.take().unwrap().words, [1; WORDS]);
    }

    #[test]
    fn a_bell_is_rung_for_a_sleeper_alone() {
        let (mut server, mut consumer, _area) = ends(2);
        assert!(!server.publish(|_| words(1), 1).unwrap().wake);
        assert!(!consumer.sleep(), "a frame is there");
        let taken = consumer.take().unwrap();
        assert!(consumer.sleep());
        assert!(server.publish(|_| words(2), 2).unwrap().wake);
        assert!(!server.publish(|_| words(3), 3).unwrap().wake, "it was rung already");
        assert_eq!(server.sleep(), Ok(true));
        assert_eq!(consumer.release(taken.position), Ok(true));
        assert_eq!(server.collect(), Ok(1));
    }

    proptest! {
        /// Whatever a server writes into the area, a consumer takes no more than there are entries, each of them once, and goes on.
        #[test]
        fn a_server_that_writes_anything(
            steps in prop::collection::vec((0u8..5, 0usize..ENTRIES, prop_oneof![any::<u64>(), 0u64..400, Just(u64::MAX)]), 1..200)
        ) {
            let (_, mut consumer, area) = ends(3);
            for (step, place, value) in steps {
                match step {
                    0 => {
                        let taken: Vec<_> = std::iter::from_fn(|| consumer.take()).map(|taken| taken.position).collect();
                        prop_assert!(taken.len() <= ENTRIES && taken.is_sorted_by(|a, b| a < b), "{taken:?}");
                        for position in taken {
                            prop_assert!(consumer.holds(position));
                            let _ = consumer.release(position);
                            prop_assert_eq!(consumer.release(position), Err(Revoked));
                        }
                    }
                    1 => area.head.0.store(value, Ordering::Relaxed),
                    2 => area.entries[place].state.store(word(value, Stage::Published), Ordering::Relaxed),
                    3 => area.entries[place].state.store(value, Ordering::Relaxed),
                    _ => { consumer.sleep(); }
                }
            }
        }

        /// Whatever a consumer writes into the area, the server goes on or says that it is broken, and never gives up a lease of which
        /// the area does not say so.
        #[test]
        fn a_consumer_that_writes_anything(
            steps in prop::collection::vec((0u8..6, 0usize..ENTRIES, prop_oneof![any::<u64>(), 0u64..400]), 1..200)
        ) {
            let (mut server, mut consumer, area) = ends(3);
            let mut number = 0;
            for (step, place, value) in steps {
                let result = match step {
                    0 | 1 => {
                        number += 1;
                        server.publish(|_| words(number), number).map(drop)
                    }
                    2 => server.take_back(|&number| number % 2 == value % 2).map(drop),
                    3 => { consumer.take(); Ok(()) }
                    4 => { let _ = consumer.release(value); Ok(()) }
                    _ => {
                        match place {
                            0 => area.head.0.store(value, Ordering::Relaxed),
                            1 => area.consumer_sleeps.0.store(value as u32, Ordering::Relaxed),
                            2 => area.entries[place].words[0].store(value, Ordering::Relaxed),
                            _ => area.entries[place].state.store(value, Ordering::Relaxed),
                        }
                        Ok(())
                    }
                };
                prop_assert!(server.leases().count() <= 3);
                if result.is_err() {
                    return Ok(());
                }
            }
        }
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use loom::cell::UnsafeCell;
    use loom::sync::Arc;
    use loom::sync::atomic::AtomicBool;
    use loom::thread;

    /// A buffer, filled by the camera and read by a consumer. Loom reports an access that is not ordered against the others.
    struct Buffer(UnsafeCell<u64>);
    // SAFETY: for loom's checked cell only, which is what the models are about.
    unsafe impl Sync for Buffer {}

    #[test]
    fn loom_a_buffer_is_not_filled_while_it_is_read() {
        loom::model(|| {
            let area = Arc::new(Area::new());
            let buffers = Arc::new([Buffer(UnsafeCell::new(0)), Buffer(UnsafeCell::new(0))]);
            let mut server = Server::new(Arc::clone(&area), 1);
            let other = Arc::clone(&buffers);
            let reader = thread::spawn(move || {
                let mut consumer = Consumer::new(area);
                for _ in 0..2 {
                    let Some(taken) = consumer.take() else { continue };
                    let number = taken.words[0];
                    // SAFETY: a read that loom checks.
                    other[(number % 2) as usize].0.with(|byte| assert_eq!(unsafe { *byte }, number));
                    consumer.release(taken.position).unwrap();
                }
            });
            // The camera fills a buffer that nobody has a lease of.
            for number in 1..=3u64 {
                let place = (number % 2) as usize;
                server.collect().unwrap();
                if server.leases().any(|&held| held == place) {
                    continue;
                }
                // SAFETY: a write that loom checks.
                buffers[place].0.with_mut(|byte| unsafe { *byte = number });
                server.publish(|_| [number; WORDS], place).unwrap();
            }
            reader.join().unwrap();
        });
    }

    #[test]
    fn loom_no_wake_is_lost() {
        loom::model(|| {
            let area = Arc::new(Area::new());
            let bell = Arc::new(AtomicBool::new(false));
            let mut server = Server::new(Arc::clone(&area), 1);
            let rung = Arc::clone(&bell);
            let sleeper = thread::spawn(move || {
                let mut consumer = Consumer::new(area);
                match consumer.take() {
                    Some(_) => (true, consumer),
                    None => (!consumer.sleep(), consumer),
                }
            });
            if server.publish(|_| [1; WORDS], ()).unwrap().wake {
                rung.store(true, Ordering::Relaxed);
            }
            let (awake, mut consumer) = sleeper.join().unwrap();
            assert!(awake || bell.load(Ordering::Relaxed), "it sleeps and nobody rings");
            if !awake {
                assert!(consumer.take().is_some());
            }
        });
    }

    #[test]
    fn loom_a_lease_ends_once() {
        loom::model(|| {
            let area = Arc::new(Area::new());
            let mut server = Server::new(Arc::clone(&area), 1);
            server.publish(|_| [7; WORDS], ()).unwrap();
            let other = thread::spawn(move || {
                let mut consumer = Consumer::new(area);
                // The words of a frame that is taken back, and of the one that comes after it, are never mixed.
                let first = consumer.take();
                first.map(|taken| {
                    assert_eq!(taken.words, [taken.position + 6; WORDS]);
                    (taken.position, consumer.release(taken.position).is_ok())
                })
            });
            let revoked = server.take_back(|()| true).unwrap().revoked > 0;
            server.publish(|_| [8; WORDS], ()).unwrap();
            let released = other.join().unwrap();
            // What was released was not revoked. (One that is revoked while it is being taken is never seen.)
            assert!(!revoked || released != Some((1, true)));
        });
    }
}
