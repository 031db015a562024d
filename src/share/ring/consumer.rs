//! The consumer's end.

use super::*;

/// A frame that a consumer has taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in super::super) struct Taken {
    pub position: u64,
    pub words: [u64; WORDS],
}

/// The consumer's end.
#[derive(Debug)]
pub(in super::super) struct Consumer<A> {
    area: A,
    /// The position that is looked at next.
    next: u64,
    /// Of the frames that it has taken.
    pub(super) delays: Delays,
    /// How often it may have been rung for, since this was set to 0.
    pub(in super::super) woken: u32,
}

impl<A: Deref<Target = Area>> Consumer<A> {
    pub(in super::super) fn new(area: A) -> Consumer<A> {
        Consumer { area, next: 1, delays: Delays::default(), woken: 0 }
    }

    /// The next frame, in the order of capture; none if there is none yet. No system call.
    pub(in super::super) fn take(&mut self) -> Option<Taken> {
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

    /// Tells the server how long after it was published a frame was taken, in µs. One store.
    pub(in super::super) fn tell_delay(&mut self, us: u64) {
        let Delays { frames, sum_us } = &mut self.delays;
        (*frames, *sum_us) = (frames.wrapping_add(1), sum_us.wrapping_add(us));
        let told = *frames << SUM_BITS | *sum_us & SUM;
        self.area.consumer.delays.store(told, Ordering::Relaxed);
    }

    /// See [`Area::release`].
    #[cfg(test)]
    pub(in super::super) fn release(&self, position: u64) -> Result<bool, Revoked> {
        self.area.release(position)
    }

    /// See [`Area::holds`].
    pub(in super::super) fn holds(&self, position: u64) -> bool {
        self.area.holds(position)
    }

    /// Says that the consumer is about to sleep. `false` if a frame has come: then it must not.
    pub(in super::super) fn sleep(&mut self) -> bool {
        let sleeps = &self.area.consumer.sleeps;
        // The server has written 0, and rung.
        if sleeps.swap(1, Ordering::Relaxed) == 0 {
            self.woken = self.woken.saturating_add(1);
        }
        fence(Ordering::SeqCst);
        let nothing = self.area.head.0.load(Ordering::Acquire) <= self.next;
        if !nothing {
            sleeps.store(0, Ordering::Relaxed);
        }
        nothing
    }
}
