//! How a frame changes hands between two processes without the kernel: one area of shared memory for each consumer.
//!
//! The server writes a frame's number, buffer and data into an entry and raises the head; the consumer takes the entry, uses the buffer, and
//! says so when it has done with it. Each entry has one word that both change, position and [`Stage`] in one, so that each step is one
//! compare-and-exchange that only one side can win:
//!
//! ```text
//!              publish            take               release
//!   (free) ──────────────▶ Published ──────▶ Taken ──────────────▶ Released ─▶ (free)
//!                              │               │├────────────────▶ Fenced ───▶ (free)   when its fence has signalled
//!                              └─▶ Skipped     └─▶ Revoked                     by the server alone: the frame was too old, or the
//!                                                                              lease ran out; the buffer is the camera's again
//! ```
//!
//! | byte | what | written by |
//! |---|---|---|
//! | 0 | 64 bits: the position after the newest entry (the head); 0 before the first | server |
//! | 64 | 32 bits: 1 while the consumer sleeps or is about to | consumer; the server writes 0 when it rings |
//! | 72 | 40 bits: the times from publication to taking of all frames that were taken, in µs, added up; 24 bits: how many these are. Both wrap; 0 of a consumer that does not tell | consumer |
//! | 128 | 32 bits: 1 while the server waits for a release | server; the consumer writes 0 when it rings |
//! | 192 | 16 entries of 64 bytes: 64 bits of state, and seven words of data (`entry.rs`) | both the state, the server the data |
//!
//! Positions count from 1; that of the entry at place p of the 16 leaves p when divided by 16, and some may be passed over. A state is
//! `position * 8 + stage`; stages are 1 published, 2 taken, 3 released, 4 skipped, 5 revoked, 6 fenced. All numbers are the machine's own, at their
//! natural alignment, and read and written by atomic instructions: the head is loaded with acquire order, a state exchanged with acquire
//! order to take and with release order to release. The memfd has exactly the whole pages that this size needs, and is sealed
//! against another size.
//!
//! A consumer takes a frame in four steps: it loads the head; for the next position below it that is no further back than 16, exchanges
//! published for taken, or goes on to the next position; copies the data; and looks whether the state is still that (after an acquire
//! fence): if not, the frame is not its own. The same look tells at any time whether what it has read of a frame until then was the frame.
//!
//! A consumer that drops a frame which its device still reads may give it back as fenced, in place of released: the fence comes by the
//! socket, before the state is exchanged (`wire.rs`). Until the fence has signalled the frame counts as one that the consumer has.
//!
//! The consumer can write anything anywhere at any time: it has the area mapped. So the server keeps what it needs to know in memory of its
//! own, and of the area it reads three sorts of words alone: the states of entries that are out, each of which can have four values or its
//! consumer is [`Broken`]; whether the consumer sleeps, where anything but 0 means that it does and costs a ring of its bell; and the delays,
//! which it passes on to be shown. No value read there is ever an index, a length or an address.
//!
//! Somebody who waits says so in a word of the area, looks once more, and sleeps on its bell; the other side rings it only if it reads
//! that word as 1 and exchanges it for 0. Both sides store and then load with a sequentially consistent fence between, so at least one of
//! them sees the other (`loom_no_wake_is_lost`).

// By their paths: ci/bench/share.rs has this file as a part of itself.
#[path = "ring/consumer.rs"]
mod consumer;
#[path = "ring/fenced.rs"]
mod fenced;
#[cfg(all(test, loom))]
#[path = "ring/loom_tests.rs"]
mod loom_tests;
#[path = "ring/take_back.rs"]
mod take_back;
#[cfg(test)]
#[cfg(not(loom))]
#[path = "ring/tests.rs"]
mod tests;

use std::ops::Deref;

#[cfg(loom)]
use loom::sync::atomic;
#[cfg(not(loom))]
use std::sync::atomic;

use crate::frame::Revoked;
use atomic::{AtomicU32, AtomicU64, Ordering, fence};
pub(super) use consumer::Consumer;
#[allow(unused_imports, reason = "ci/bench/share.rs, which has the ring as a part, does not name it")]
pub(super) use consumer::Taken;
use take_back::end;

/// Entries of a ring; more than any [budget](Server::new). loom's models have fewer, because each word counts.
pub(super) const ENTRIES: usize = if cfg!(loom) { 3 } else { 16 };

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
    Fenced = 6,
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
    consumer: ConsumerLine,
    /// 1 while the server waits for a release.
    server_sleeps: Line<AtomicU32>,
    entries: [Entry; ENTRIES],
}

/// What the consumer tells: in one line, because the server looks at both for each frame.
#[repr(C, align(64))]
#[derive(Debug)]
struct ConsumerLine {
    /// 1 while it sleeps or is about to.
    sleeps: AtomicU32,
    /// How late it took frames, added up, and how many: sums, so that none is lost of several that are taken before the server looks.
    delays: AtomicU64,
}

/// Bits of the delays' sum; the number of frames has the others.
const SUM_BITS: u32 = 40;
const SUM: u64 = (1 << SUM_BITS) - 1;

/// How long after they were published a consumer has taken frames. It is its word: nothing may hang on it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Delays {
    pub frames: u64,
    /// Of all of them together.
    pub sum_us: u64,
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
            consumer: ConsumerLine { sleeps: AtomicU32::new(0), delays: AtomicU64::new(0) },
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
        self.give_back(position, Stage::Released)
    }

    /// The same for a frame that a device reads until a fence has signalled, which the server has been sent.
    ///
    /// # Errors
    /// As [`Area::release`].
    #[allow(dead_code, reason = "ci/bench/share.rs, which has this file as a part, has no fences")]
    pub(super) fn release_fenced(&self, position: u64) -> Result<bool, Revoked> {
        self.give_back(position, Stage::Fenced)
    }

    fn give_back(&self, position: u64, stage: Stage) -> Result<bool, Revoked> {
        let (old, new) = (word(position, Stage::Taken), word(position, stage));
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
    /// The same for those that were given back behind a fence.
    fenced: u32,
    /// What the consumer told of its delays at last.
    delays: u64,
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
        Server { area, next: 1, budget, out: [const { None }; ENTRIES], places: 0, fenced: 0, delays: 0 }
    }

    /// Hands a frame over: some ten loads and stores, no system call. What the consumer has released is given up first; if it has all
    /// that it may have, the oldest that it has not taken is skipped for this one. `words` is told how many were.
    ///
    /// # Errors
    /// [`Broken`]; nothing was published.
    pub(super) fn publish(&mut self, words: impl FnOnce(u32) -> [u64; WORDS], lease: T) -> Result<Published, Broken> {
        let mut published = self.make_room()?;
        if published.given {
            published.wake = self.put(words(published.skipped), lease);
        }
        Ok(published)
    }

    /// The first part of [`publish`](Server::publish): whether there is room for a frame, at [`position`](Server::position), and what was
    /// skipped for it.
    ///
    /// # Errors
    /// [`Broken`].
    #[inline]
    pub(super) fn make_room(&mut self) -> Result<Published, Broken> {
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
        if self.out[index(self.next)].is_some() {
            published.skipped += self.pass_over()?;
        }
        published.given = true;
        Ok(published)
    }

    /// An entry whose last frame is still held is passed over: the consumer sees a position that is not there. A frame that it has not taken
    /// it would not look for any more, so that one is skipped. How many were.
    #[cold]
    fn pass_over(&mut self) -> Result<u32, Broken> {
        let mut skipped = 0;
        while self.out[index(self.next)].is_some() {
            match end(&self.area, &mut self.out[index(self.next)], false)? {
                Some(Stage::Skipped) => skipped += 1,
                Some(_) => {}
                None => self.next += 1,
            }
        }
        Ok(skipped)
    }

    /// That of the next frame, once there is room for it.
    pub(super) fn position(&self) -> u64 {
        self.next
    }

    /// The second part of [`publish`](Server::publish), where there is room. Whether the consumer sleeps.
    pub(super) fn put(&mut self, words: [u64; WORDS], lease: T) -> bool {
        let position = self.next;
        let entry = self.area.entry(position);
        // Who still reads the words of this entry's last frame, which was taken back, and finds one of these, finds that it was taken back
        // too: with this fence before the words and its own after them, that comes first also where stores pass each other (`take`).
        fence(Ordering::Release);
        for (to, word) in entry.words.iter().zip(words) {
            to.store(word, Ordering::Relaxed);
        }
        entry.state.store(word(position, Stage::Published), Ordering::Release);
        self.out[index(position)] = Some(Out { position, lease });
        self.places |= 1 << index(position);
        self.next = position + 1;
        self.area.head.0.store(self.next, Ordering::Release);
        fence(Ordering::SeqCst);
        let sleeps = &self.area.consumer.sleeps;
        sleeps.load(Ordering::Relaxed) != 0 && sleeps.swap(0, Ordering::Relaxed) != 0
    }

    /// The delays of the frames that the consumer has taken since this was asked. One load.
    pub(super) fn delays(&mut self) -> Delays {
        let told = self.area.consumer.delays.load(Ordering::Relaxed);
        let before = std::mem::replace(&mut self.delays, told);
        // Differences of what wraps; that of the sums in the lower bits alone.
        let frames = (told >> SUM_BITS).wrapping_sub(before >> SUM_BITS) & (u64::MAX >> SUM_BITS);
        Delays { frames, sum_us: told.wrapping_sub(before) & SUM }
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
            } else if found == word(position, Stage::Fenced) {
                self.fenced |= 1 << place;
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

    /// What is kept for the frames that the consumer has.
    pub(super) fn leases(&self) -> impl Iterator<Item = &T> {
        self.out.iter().flatten().map(|out| &out.lease)
    }

    /// Says that the server waits for a release, behind a fence or not. `false` if one has come: then it need not wait.
    ///
    /// # Errors
    /// [`Broken`].
    pub(super) fn sleep(&mut self) -> Result<bool, Broken> {
        let known = self.fenced;
        let before = self.collect()?;
        self.area.server_sleeps.0.store(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let after = self.collect()?;
        let asleep = after == before && self.fenced & !known == 0;
        if !asleep {
            self.area.server_sleeps.0.store(0, Ordering::Relaxed);
        }
        Ok(asleep)
    }
}

fn index(position: u64) -> usize {
    // The remainder is less than the number of entries.
    (position % ENTRIES as u64) as usize
}
