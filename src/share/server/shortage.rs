//! What a server does when its source has hardly a buffer left to fill.

use super::{Server, micros};

impl Server {
    /// Whether the source has too few buffers to fill.
    pub(super) fn is_short(&self) -> bool {
        self.slots.as_ref().is_some_and(|slots| slots.0.are_short())
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
        while self.is_short() {
            self.collect();
            if !self.is_short() {
                break;
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
                for consumer in &mut self.consumers {
                    if let Err(broken) = consumer.take_back(|held| held.number == number) {
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
        None
    }
}
