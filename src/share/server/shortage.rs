//! What a server does when its source has hardly a buffer left to fill.

use std::time::Duration;

use crate::frame::{MAX_SLOTS, Slots};

use super::{Server, micros};

/// Frames that are tried to be had back at a time, more than there are: a consumer that says now that it has taken one and now that it
/// has not, at the right moments, has none of them go on for ever.
const TRIES: u32 = 2 * MAX_SLOTS;
/// When it is tried again after so many.
const AGAIN: Duration = Duration::from_millis(1);

impl Server {
    /// Whether the source has too few buffers to fill.
    pub(super) fn is_short(&self) -> bool {
        self.slots.as_ref().is_some_and(|slots| slots.0.are_short(self.passing))
    }

    /// Whether the consumers that there are can leave the source hardly a buffer to fill, for as long as a lease, by keeping what they may
    /// keep: each its budget of different frames. So it is where buffers are few and the lease is long; it can be otherwise by a shorter
    /// lease, a smaller budget, or more buffers of the source. False while nothing is joined.
    pub fn may_starve(&self) -> bool {
        let Some(generation) = &self.generation else { return false };
        let buffers = generation.gifts.len();
        let kept = self.consumers.len() as u64 * u64::from(self.request.budget);
        // No more frames are within their lease than come in that time; the first is just at its end when the last comes.
        let within = self.rate.map(|rate| self.lease().as_secs_f64() * rate);
        // `as` saturates.
        // Three frame times are three, whatever is lost in dividing by the rate.
        let within = within
            .map_or(u64::MAX, |frames| (frames - 1e-3).ceil() as u64)
            .saturating_add(1);
        kept.min(within).saturating_add(Slots::least(buffers) as u64) > buffers as u64
    }

    /// Takes what consumers have given back.
    fn collect(&mut self) {
        let mut lost = Vec::new();
        for consumer in &mut self.consumers {
            if let Err(why) = consumer.collect() {
                lost.push((consumer.token, why));
            }
        }
        self.lose_all(lost);
    }

    /// If the source has too few buffers to fill: takes a frame back that nobody has taken, else the oldest whose lease has run out. If
    /// there is none, consumers ring when they release one; tells when the next lease runs out.
    ///
    /// Frames that a consumer has given back behind a fence count as its own still: a fence that has not signalled when the lease has run
    /// out is not waited for any more.
    pub(super) fn relieve(&mut self, now: u64) -> Option<u64> {
        // Mostly there is nothing to do, which is to cost next to nothing.
        if self.is_short() { self.relieve_now(now) } else { self.look_at_passing(now) }
    }

    /// If the source is short when whoever has presented a frame keeps it: when that is known.
    fn look_at_passing(&self, now: u64) -> Option<u64> {
        self.passing?;
        let slots = self.slots.as_ref()?;
        slots.0.are_short(None).then(|| now + micros(AGAIN))
    }

    #[cold]
    fn relieve_now(&mut self, now: u64) -> Option<u64> {
        for _ in 0..TRIES {
            self.collect();
            if !self.is_short() {
                return None;
            }
            let generation = self.generations;
            let leases = self.consumers.iter().flat_map(|consumer| consumer.ring.leases());
            let mut frames: Vec<_> = leases
                .filter(|held| held.generation == generation)
                .map(|held| (held.number, held.since_us))
                .collect();
            frames.sort_unstable();
            frames.dedup();
            let lease = micros(self.lease());
            // The newest was published a moment ago: those who sleep are just waking.
            let untaken = |number: u64| {
                number < self.number
                    && !self
                        .consumers
                        .iter()
                        .any(|consumer| consumer.ring.has_taken(|held| held.number == number))
            };
            let idle = frames.iter().find(|&&(number, _)| untaken(number));
            let overdue = frames.iter().find(|&&(_, since)| now.saturating_sub(since) >= lease);
            let mut lost = Vec::new();
            if let Some(&(number, _)) = idle.or(overdue) {
                // Of an idle one no lease ends: who takes it meanwhile keeps it, and the next is tried.
                let taken_too = idle.is_none();
                for consumer in &mut self.consumers {
                    if let Err(broken) = consumer.take_back(|held| held.number == number, taken_too) {
                        lost.push((consumer.token, broken.into()));
                    }
                }
                self.lose_all(lost);
                continue;
            }
            let mut released = false;
            for consumer in &mut self.consumers {
                match consumer.ring.sleep() {
                    Ok(asleep) => released |= !asleep,
                    Err(broken) => lost.push((consumer.token, broken.into())),
                }
            }
            released |= !lost.is_empty();
            self.lose_all(lost);
            if !released {
                return frames.first().map(|&(_, since)| since.saturating_add(lease));
            }
        }
        Some(now.saturating_add(micros(AGAIN)))
    }
}
