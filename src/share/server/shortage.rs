//! What a server does when its source has hardly a buffer left to fill.

use std::time::Duration;

use crate::frame::MAX_SLOTS;

use super::{Server, micros};

/// Frames that are tried to be had back at a time, more than there are: a consumer that says now that it has taken one and now that it
/// has not, at the right moments, has none of them go on for ever.
const TRIES: u32 = 2 * MAX_SLOTS;
/// When it is tried again after so many.
const AGAIN: Duration = Duration::from_millis(1);

impl Server {
    /// Whether the source has too few buffers to fill.
    fn is_short(&self) -> bool {
        self.slots.as_ref().is_some_and(|slots| slots.0.are_short())
    }

    /// If the source has too few buffers to fill: takes a frame back that nobody has taken, else the oldest whose lease has run out. If
    /// there is none, consumers ring when they release one; tells when the next lease runs out.
    pub(super) fn relieve(&mut self, now: u64) -> Option<u64> {
        for _ in 0..TRIES {
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
            let mut broken = Vec::new();
            if let Some(&(number, _)) = idle.or(overdue) {
                // Of an idle one no lease ends: who takes it meanwhile keeps it, and the next is tried.
                let taken_too = idle.is_none();
                for consumer in &mut self.consumers {
                    if let Err(why) = consumer.take_back(|held| held.number == number, taken_too) {
                        broken.push((consumer.token, why.to_string()));
                    }
                }
                self.lose_broken(broken);
                continue;
            }
            let mut released = false;
            for consumer in &mut self.consumers {
                match consumer.ring.sleep() {
                    Ok(asleep) => released |= !asleep,
                    Err(why) => broken.push((consumer.token, why.to_string())),
                }
            }
            released |= !broken.is_empty();
            self.lose_broken(broken);
            if !released {
                return frames.first().map(|&(_, since)| since.saturating_add(lease));
            }
        }
        Some(now.saturating_add(micros(AGAIN)))
    }
}
